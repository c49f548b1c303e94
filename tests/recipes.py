"""The recipes of configs/ as tests take them."""

import pathlib

from dlc_jax import command, recipe

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"


def load(name, lines=()):
    """The expanded config of a recipe, "quickstart.py:tiny", with more lines after its own."""
    own = command.read(str(CONFIGS / name))[1]
    return recipe.expand(recipe.later(own, dict(lines)))
