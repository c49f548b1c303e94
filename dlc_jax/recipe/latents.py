"""Whether what makes latents, what keeps them and what draws them fit together in a recipe.

It is told before anything is trained, and without jax.
"""

from pathlib import Path

from dlc_jax import remote
from dlc_jax.errors import UserError
from dlc_jax.recipe.steps import of_stage, unneeded

TINY = 8  # sides of an image in multiples of a tiny autoencoder's latent


def autoencoder(config, step: str) -> str:
    """The section of the autoencoder whose latents a generator draws; "" for one of pixels."""
    section = config[step]
    return config[section.codes].autoencoder if section.latents else ""


def stride(model) -> int:
    """Sides of an image in multiples of its latent's, by an autoencoder's `model` section."""
    return 2 ** (len(model.channels) - 1) if model.name == "kl" else TINY


def autoencoders(config) -> dict[str, str]:
    """{section: step} of the autoencoders that the recipe's steps encode or decode with."""
    codes, generators = _users(config)
    found = {config[name].autoencoder: name for name in codes}
    return found | {autoencoder(config, name): name for name in generators}


def check(config) -> None:
    """Refuses steps that cannot read or make the latents that they are to.

    Raises:
      UserError: a generator of latents without codes that have any, of other sides or channels than
        they have; an autoencoder without weights.
    """
    codes, generators = _users(config)
    for name in generators:
        _check_generator(config, name)
    for name in codes:
        _check_codes(config, name)


def _users(config) -> tuple[list[str], list[str]]:
    """(codes steps that make latents, generators that draw some) of those that are to run."""
    steps = [name for name in config.steps if name not in unneeded(config)]
    codes = [name for name in of_stage(config, "codes") if name in steps]
    generators = [name for name in of_stage(config, "generator") if name in steps]
    generators += [config[name].generator for name in of_stage(config, "samples") if name in steps]
    return (
        [name for name in codes if config[name].autoencoder],
        [name for name in dict.fromkeys(generators) if config[name].latents],
    )


def _check_codes(config, name: str) -> None:
    section = config[name].autoencoder
    if section not in config:
        raise UserError(
            f"{name}.autoencoder={section!r} is not a section of this recipe; give one, or '' for "
            "codes alone"
        )
    _check_sides(config, section)
    _check_weights(config, section, name)


def _check_generator(config, name: str) -> None:
    codes, model = config[name].codes, config[name].model
    if not codes:
        raise UserError(
            f"{name}.latents=True, but latents are kept beside codes and {name}.codes=''; name the "
            f"codes step, or set {name}.latents=False"
        )
    section = config[codes].autoencoder
    if not section or section not in config:
        raise UserError(
            f"{name} draws latents, and {codes}.autoencoder={section!r} makes none: set --config."
            f"{codes}.autoencoder=autoencoder, or --config.{name}.latents=False"
        )
    _check_sides(config, section)
    known, image = config[section].model, config.data.image
    side = image // stride(known)
    if model.image != side or model.channels != known.latent:
        raise UserError(
            f"{name} draws {model.image}x{model.image}x{model.channels}, but latents of "
            f"{image}-pixel images by {section} ({known.name}) are {side}x{side}x{known.latent}: "
            f"set --config.{name}.model.image={side} --config.{name}.model.channels={known.latent}"
        )
    _check_weights(config, section, name)


def _check_sides(config, section: str) -> None:
    part, image = stride(config[section].model), config.data.image
    if not isinstance(image, int) or image % part:
        raise UserError(
            f"data.image={image!r} has no latents: for {section} ({config[section].model.name}) "
            f"give a number of pixels that is a multiple of {part}"
        )


def _check_weights(config, section: str, step: str) -> None:
    path = config[section].path
    if not path:
        raise UserError(
            f"{step} needs the weights of {section}: give --config.{section}.path=DIR, made by dlc "
            "import vae FILE --out DIR"
        )
    if not remote.is_url(path) and not (Path(path) / "checkpoints").is_dir():
        raise UserError(
            f"{section}.path={path} holds no autoencoder; give the folder that dlc import vae FILE "
            "--out DIR made"
        )
