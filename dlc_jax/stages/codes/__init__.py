"""The codes job: every image of every split through the encoder's average, its codes into a store.

Source: arXiv 2507.12318, section 3. With a `path`, the store that another run made there is used
instead: it is checked, and nothing is encoded.

A record may have more than its codes: with an `autoencoder`, the moments of the posterior of the
image's latent, `latent_mean` and (of one that has a posterior) `latent_logvar`, and with `flip` the
same of the flipped image, `codes_flipped` and so on: what has the same ending is of the same view.
Moments are float16: they lie within its range, and bfloat16 would round means by more than the
posterior's deviation. The manifest has the mean and the deviation of draws, see `data.latents`.

With an `embedding` it has that of the image too, float16, for generators that read no codes: the
continuous condition that codes are compared with (RCG, arXiv 2312.03701; arXiv 2507.12318, table
2).

Codes are what priors and generators learn to speak, and every image that is encoded later must be
spelled as those of the store were. So `dtype` is a field of its own, whatever the encoder was
trained in, and the store's manifest has it. In float32 a code hardly depends on the device; in
bfloat16 about one position in a hundred does.
"""

import dataclasses
import functools

from dlc_jax import checkpoint, recipe
from dlc_jax import workdir as home
from dlc_jax.data import codes, latents, sources
from dlc_jax.data.sources import DataSet
from dlc_jax.errors import UserError
from dlc_jax.evals import codes as health
from dlc_jax.models.encoder import EMBEDDINGS, Encoder
from dlc_jax.networks import Networks, program
from dlc_jax.networks.autoencoder import AutoencoderNetwork
from dlc_jax.stage import Job
from dlc_jax.stages.codes import export

DTYPES = ("float32", "bfloat16", "")
SAMPLE = 2**25  # entries of the codes whose health is measured: 268 MB as int64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """The section of a codes job.

    Attributes:
      path: folder of another run's codes to use instead of own ones.
      encoder: step whose average encodes.
      autoencoder: section of the autoencoder whose moments are stored beside codes; "" for none.
      embedding: of each image, stored beside codes for generators that read it instead: "class" is
        the encoder's normalized class token, "summary" all that codes are read from, registers too;
        "" stores none.
      flip: stores each image's mirror image too.
      image: side of the images that are coded; None is that of `data`.
      splits: to encode.
      batch: images per call, over all devices.
      dtype: of the encoder's products, "float32" or "bfloat16". "" is that of its training, for all
        of it, as in runs from before this field.
      shard_size: images per shard.
    """

    path: str = ""
    encoder: str = "encoder"
    autoencoder: str = ""
    embedding: str = ""
    flip: bool = False
    image: int | None = None
    splits: tuple[str, ...] = ("train", "validation")
    batch: int = 256
    dtype: str = "float32"
    shard_size: int = 4096

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise UserError(
                f"codes.dtype={self.dtype!r} is unknown; known: {', '.join(DTYPES[:2])}"
            )
        if self.embedding not in ("", *EMBEDDINGS):
            raise UserError(
                f"codes.embedding={self.embedding!r} is unknown; known: {', '.join(EMBEDDINGS)}, "
                "and '' for none"
            )


def make(config, *, step: str, workdir) -> Job:
    """The job of a recipe's section `step`.

    Raises:
      UserError: values that no store holds; an autoencoder that the recipe has no section of.
    """
    section = recipe.build(Section, config[step])
    model = recipe.build(Encoder, config[section.encoder].model)
    codes.code_dtype(model.simplicial.values)
    if section.autoencoder and section.autoencoder not in config:
        raise UserError(
            f"{step}.autoencoder={section.autoencoder!r} is not a section of this recipe; give "
            "one, or '' for codes alone"
        )
    store = functools.partial(open_store, config, workdir, step, model.simplicial)

    def run(mesh, directory):
        results = {}
        if not section.path:
            images_per_s = export.export(config, workdir, step, section, mesh, directory)
            results["images_per_s"] = images_per_s
        stores = {split: store(split) for split in section.splits}
        first = stores[section.splits[0]]
        if section.path:
            check_given(config, workdir, step, section, stores)
            home.remember(directory, {"store": first.origin}, operational=())
        results |= {f"{split}_count": len(found) for split, found in stores.items()}
        results |= measure(first, model.simplicial, directory)
        return {f"codes/{key}": value for key, value in results.items() if value is not None}

    def networks(mesh):
        return Networks(config, workdir, mesh, batch=section.batch, dtype=section.dtype)

    flops, batch = model.flops(codes=True), section.batch
    return Job(
        run=run,
        programs={"encode": program(networks, section.encoder, flops=flops, batch=batch)},
        settings=("path",),
        is_intact=functools.partial(is_intact, config, workdir, step, section),
    )


def open_store(config, workdir, step: str, simplicial, split: str) -> codes.CodeStore:
    """The store of a split, of the shape that the encoder's codes have."""
    store = codes.CodeStore(recipe.place(config, workdir, step) / split)
    shape = {"positions": simplicial.positions, "values": simplicial.values}
    return store.checked(**shape, where=config[step].encoder)


def check_given(config, workdir, step: str, section: Section, stores) -> None:
    """Refuses another run's stores that are not of this encoder, this data or this dtype.

    With an autoencoder they must have its latents, with an embedding that.
    """
    trained = recipe.trained(config, workdir, section.encoder) / "checkpoints"
    # codes may come without their encoder
    identity = checkpoint.identity_of(trained) if checkpoint.identities(trained) else None
    with DataSet(**config.data) as data:
        for split, store in stores.items():
            if identity is not None:
                store.check_encoder(identity)
            store.check_source(data.identity(split))
            store.check_dtype(section.dtype, step)
            if section.embedding:
                model = recipe.build(Encoder, config[section.encoder].model)
                store.check_embedding(model.embedding_width(section.embedding), step)
            if section.autoencoder:
                AutoencoderNetwork(config, section.autoencoder).check(store)
            for name in recipe.of_stage(config, "generator"):
                if config[name].codes == step and config[name].normalize:
                    latents.measured(store)


def measure(store, simplicial, directory) -> dict[str, float]:
    """The health of a store's codes; usage.json has how often each value occurs."""
    rows = sources.choose(store, max(1, SAMPLE // simplicial.positions))
    some = store.codes(rows)
    home.write(directory / "usage.json", health.usage(some, values=simplicial.values))
    return health.health(some, values=simplicial.values)


def is_intact(config, workdir, step: str, section: Section, directory) -> bool:
    """Whether every split's store is there, complete, and of the encoder that is here."""
    if section.path:  # the matter of the run that made them, and of whoever reads them
        return True
    trained = recipe.trained(config, workdir, section.encoder)
    known = checkpoint.identities(trained / "checkpoints")
    for split in section.splits:
        try:
            store = codes.CodeStore(directory / split)
        except UserError:
            return False
        if known and store.manifest["identity"] not in known:
            store.check_encoder(known.pop())
        store.check_dtype(section.dtype, step)
        if section.autoencoder:
            AutoencoderNetwork(config, section.autoencoder).check(store)
            if "statistics" not in store.manifest:  # of an earlier version
                return False
    return True
