"""dlc train --config=FILE.py[:VARIANT] [--workdir=DIR]: the same as python -m dlc_jax.main."""

from dlc_jax import command, main, memory

EXAMPLE = "dlc train --config=configs/quickstart.py --workdir=runs/quickstart"


def arguments(parser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="recipe, with an optional variant; --config.NAME=VALUE sets a field",
    )
    parser.add_argument(
        "--workdir", metavar="DIR", help="where everything is written; runs/<recipe> by default"
    )


def run(arguments, rest) -> None:
    memory.reserve()
    main.start([*command.given(arguments), *rest])
