"""Recipes: a few lines of what they change, and the full config that these lines stand for."""

from pathlib import Path

from ml_collections import ConfigDict

from dlc_jax import workdir as home
from dlc_jax.errors import UserError
from dlc_jax.recipe import latents, steps
from dlc_jax.recipe.expansion import changed as changed
from dlc_jax.recipe.expansion import complete as complete
from dlc_jax.recipe.expansion import expand as expand
from dlc_jax.recipe.expansion import expanded as expanded
from dlc_jax.recipe.expansion import kinds as kinds
from dlc_jax.recipe.expansion import present
from dlc_jax.recipe.fields import build as build
from dlc_jax.recipe.latents import autoencoder as autoencoder
from dlc_jax.recipe.latents import autoencoders as autoencoders
from dlc_jax.recipe.lines import flat as flat
from dlc_jax.recipe.lines import later as later
from dlc_jax.recipe.listing import listing as listing
from dlc_jax.recipe.steps import codes_dtype as codes_dtype
from dlc_jax.recipe.steps import embedding as embedding
from dlc_jax.recipe.steps import of_stage as of_stage
from dlc_jax.recipe.steps import place as place
from dlc_jax.recipe.steps import trained as trained
from dlc_jax.recipe.steps import unneeded as unneeded
from dlc_jax.recipe.steps import upstream as upstream
from dlc_jax.recipe.steps import view as view
from dlc_jax.recipe.values import Text as Text


def check(config) -> None:
    """Refuses what can be refused of a recipe by itself, without jax.

    Raises:
      UserError: see `steps.check` and `latents.check`.
    """
    steps.check(config)
    latents.check(config)


def of_run(workdir: str | Path) -> ConfigDict:
    """The full config of a run, for those who read it; see `workdir.locate`.

    Raises:
      UserError: `workdir` holds no run, or its config.json is damaged or of another version.
    """
    workdir = home.locate(workdir)
    saved = home.read_config(workdir)
    return ConfigDict(read_back(saved, home.config_file(workdir))).lock()


def read_back(saved: dict, where: Path) -> dict:
    """`present` of what a file holds.

    Raises:
      UserError: it is damaged or of another version; the file is named.
    """
    try:
        return present(saved)
    except UserError as error:
        raise UserError(f"{where} does not fit this version: {error}") from error
    except (AttributeError, TypeError, KeyError) as error:
        raise UserError(f"{where} is damaged; move it away, or give another --workdir") from error
