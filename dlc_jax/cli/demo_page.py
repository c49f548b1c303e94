"""The page of `dlc demo`: where things are on it, and what is called when they change."""

import os

import numpy as np

from dlc_jax.cli.compose import UNSEEN
from dlc_jax.cli.demo_board import SLOTS, Board
from dlc_jax.errors import UserError

ABOUT = """# Compose images by their codes
Pick images at the left (each click fills the next place), or drop your own on a place. Every
position of a child's code comes from one of them, or from the prior where the operator draws some.
"""
COLORS = """The codes: a number for each position, in the color of the parent that has it too (the
first one, if several have); red is what no parent has."""


CSS = """.image-frame img, .thumbnail-item img {image-rendering: pixelated}
.image-frame img {width: 100%; height: 100%; object-fit: contain}
.codes td {min-width: 1.4em; font-family: monospace}"""


def serve(board: Board, *, host: str, port: int | None) -> None:
    """Shows the page until it is interrupted."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    made = page(board)
    try:
        made.launch(server_name=host, server_port=port, footer_links=[], **looks())
    except OSError as error:
        raise UserError(f"dlc demo: {error}; give another --port or --host") from error


def looks() -> dict:
    """Keywords of launch: letters that need no network, small images whose pixels are seen."""
    import gradio

    sans, mono = ["system-ui", "sans-serif"], ["monospace"]
    return {"theme": gradio.themes.Default(font=sans, font_mono=mono), "css": CSS}


def page(board: Board):
    """The gradio.Blocks of a board."""
    import gradio

    with gradio.Blocks(title="dlc demo", analytics_enabled=False) as made:
        gradio.Markdown(ABOUT)
        turn = gradio.State(2)
        with gradio.Row():
            with gradio.Column(scale=2):
                picks = gradio.Gallery(
                    board.picks(),
                    label="Unseen images",
                    columns=4,
                    height=430,
                    allow_preview=False,
                    elem_id="picks",
                )
                operator = gradio.Dropdown(board.operators, label="Operator", elem_id="operator")
                groups = list(board.loaded.groups)
                kept = gradio.CheckboxGroup(
                    groups, label="Keep of the first image", visible=bool(groups)
                )
                more = gradio.Textbox(label="Keep positions, such as 0-11,30", elem_id="positions")
                seed = gradio.Slider(0, 100, 0, step=1, label="Seed")
            with gradio.Column(scale=3):
                with gradio.Row():
                    parents, weights = zip(*[_slot(gradio, board, n) for n in range(len(SLOTS))])
                button = gradio.Button("Compose", variant="primary", elem_id="compose")
                children = gradio.Gallery(
                    label="Children", columns=4, height=370, elem_id="children"
                )
        gradio.Markdown(COLORS)
        table = gradio.HTML(elem_id="codes")

        def composed(operator, kept, more, seed, *slots):
            named = [each.strip() for each in more.split(",") if each.strip()]
            images, shares = slots[: len(SLOTS)], slots[len(SLOTS) :]
            try:
                found = board.children(images, shares, operator, [*kept, *named], seed)
            except UserError as error:
                raise gradio.Error(str(error)) from error
            return found.images, found.table

        def picked(turn, event: gradio.SelectData):
            places = [gradio.skip()] * len(SLOTS)
            places[turn] = np.asarray(board.images[event.index])
            return (turn + 1) % len(SLOTS), *places

        picks.select(picked, [turn], [turn, *parents])
        given = [operator, kept, more, seed, *parents, *weights]
        button.click(composed, given, [children, table])
        made.load(composed, given, [children, table])
    return made


def _slot(gradio, board: Board, number: int):
    """A place for a parent, filled if there is something to fill it with, and its weight."""
    name = SLOTS[number].capitalize()
    shown = board.images[UNSEEN[number]] if board.images and number < len(UNSEEN) else None
    with gradio.Column(min_width=120):
        place = gradio.Image(
            shown,
            type="numpy",
            image_mode="RGB",
            sources=["upload", "clipboard"],
            label=name,
            height=190,
            elem_id=f"parent-{number}",
        )
        weight = gradio.Slider(0, 3, 1, step=0.25, label="Weight")
    return place, weight
