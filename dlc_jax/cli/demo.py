"""dlc demo [-w W]: a page to play with: pick or drop images, mix their codes, see the children."""

import importlib.util

from dlc_jax import workdir as home
from dlc_jax.cli import networks
from dlc_jax.errors import UserError

EXAMPLE = "dlc demo\n  dlc demo -w runs/quickstart --port 7860"


def arguments(parser) -> None:
    networks.add_workdir(parser, required=False)
    parser.set_defaults(workdir=str(home.DEMO))
    parser.add_argument(
        "--port", type=networks.whole, metavar="N", help="of the page; the first that is free"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="NAME", help="who may see it; this machine alone"
    )


def run(arguments, rest) -> None:
    if importlib.util.find_spec("gradio") is None:
        raise UserError("dlc demo: gradio is not installed; pip install 'dlc_jax[demo]'")
    config = networks.check(arguments)
    for step in ("encoder", "generator"):
        if step not in config:
            raise UserError(f"dlc demo: {arguments.workdir} is a run whose recipe has no {step}")
    from dlc_jax.cli import demo_board, demo_page

    loaded = networks.load(arguments, demo_board.COUNT)
    board = demo_board.Board(loaded, demo_board.images(config))
    demo_page.serve(board, host=arguments.host, port=arguments.port)
