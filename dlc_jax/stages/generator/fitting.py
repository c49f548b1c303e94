"""What does not fit together in a generator's section, told before anything is trained."""

from dlc_jax import recipe
from dlc_jax.errors import UserError
from dlc_jax.models.encoder import EMBEDDINGS, Encoder
from dlc_jax.networks.samplers import check_base, check_sampler


def check(section, image, step: str) -> None:
    """Refuses parts that do not go with each other.

    Args:
      section: of the generator, built.
      image: side of the data's images.
      step: its name.

    Raises:
      UserError: it says what to set.
    """
    model = section.model
    if section.latents and not section.codes:
        raise UserError(
            f"{step}.latents are in the store of a codes step, and {step}.codes is ''; name it, "
            f"and set {step}.model.positions=0 to draw them without codes"
        )
    reads = bool(model.positions or model.embedding or section.latents)
    if bool(section.codes) != reads:
        raise UserError(
            f"{step}.codes={section.codes!r} does not go with {step}.model.positions="
            f"{model.positions} and .embedding={model.embedding}: without codes, positions and "
            "embedding are 0; with codes, one of them is read"
        )
    if not section.latents and model.image != image:
        raise UserError(
            f"{step}.model.image={model.image}, but images of {image} pixels are drawn "
            "(data.image); set both alike"
        )
    if section.normalize and not section.latents:
        raise UserError(f"{step}.normalize=True is for latents; pixels lie in [-1, 1] as they are")
    for weight, field, what in (
        (section.objective.align, "align", "a block whose patches are aligned"),
        (section.objective.route, "route", "True"),
    ):
        if bool(weight) != bool(getattr(model, field)):
            raise UserError(
                f"{step}.objective.{field}={weight} does not go with {step}.model.{field}="
                f"{getattr(model, field)}: give {what}, or 0 and none"
            )
    for where, sampler in _samplers(section, step):
        check_sampler(sampler, section, where)


def check_embedding(config, section, step: str) -> None:
    """Refuses a width that the embeddings of the codes step do not have; it needs no files.

    Raises:
      UserError: it says what to set.
    """
    width, codes = section.model.embedding, section.codes
    if not width:
        return
    kind = config[codes].embedding
    if not kind:
        raise UserError(
            f"{step}.model.embedding={width}, but {codes}.embedding='' stores none; set "
            f"{codes}.embedding={EMBEDDINGS[0]}, or {step}.model.embedding=0"
        )
    encoder = config[codes].encoder
    found = recipe.build(Encoder, config[encoder].model).embedding_width(kind)
    if found != width:
        raise UserError(
            f"{step}.model.embedding={width}, but the embedding {kind!r} of {encoder} has width "
            f"{found}; set {step}.model.embedding={found}"
        )


def check_bases(section, step: str) -> None:
    """Refuses samplers whose base is not on disk; see `check_base`."""
    for where, sampler in _samplers(section, step):
        check_base(sampler, where)


def _samplers(section, step):
    found = [(f"{step}.grid.sampler", section.grid.sampler)]
    if section.scores.weights:
        found.append((f"{step}.scores.sampler", section.scores.sampler))
    return found
