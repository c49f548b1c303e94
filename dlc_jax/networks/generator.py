"""A generator that was trained: codes, labels and embeddings to images."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax import parallel, recipe, remote
from dlc_jax.data import inputs
from dlc_jax.data.manifest import facts
from dlc_jax.diffusion import guidance
from dlc_jax.diffusion.processes import PROCESSES
from dlc_jax.diffusion.sample import Sampler
from dlc_jax.errors import UserError
from dlc_jax.models.dit import DiT
from dlc_jax.networks.autoencoder import AutoencoderNetwork, Normalizer
from dlc_jax.networks.network import Network, key_dtype, keys
from dlc_jax.networks.partial import partial, together
from dlc_jax.networks.samplers import check_sampler
from dlc_jax.typing import Given

DECODED = 8  # latents that a device makes images of at a time


def sized(model: DiT, process: Any) -> DiT:
    """The model with as many channels of output as the process asks for."""
    wanted = process.outputs * model.channels
    if model.out_channels not in (None, wanted):
        raise UserError(
            f"model.out_channels={model.out_channels}, but this process asks for {wanted}; leave "
            "it out, or choose the process of the weights (DDPM has twice as many as channels)"
        )
    return model.clone(out_channels=wanted)


def example(model: DiT) -> Given:
    """The condition of one example, zeros in all that the model reads."""
    return Given(
        codes=jnp.zeros((1, model.positions), jnp.int32) if model.positions else None,
        label=jnp.zeros((1,), jnp.int32) if model.classes else None,
        embedding=jnp.zeros((1, model.embedding)) if model.embedding else None,
    )


def to_uint8(images):
    """Images in [-1, 1] to uint8."""
    return jnp.clip(jnp.round((images + 1) * 127.5), 0, 255).astype(jnp.uint8)


class GeneratorNetwork(Network):
    """Images by their number: a draw depends on the seed and on that, not on the batch."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self._bases: dict = {}  # generators that guidance leans away from, by their names
        self._base_loaded: dict = {}  # their parameters

    @functools.cached_property
    def process(self):
        """How images become noise, see `diffusion.processes`."""
        return recipe.build(PROCESSES, self.section.process)

    @functools.cached_property
    def model(self) -> DiT:
        return sized(recipe.build(DiT, self.section.model), self.process)

    def inputs(self):
        return jnp.zeros((1, *self._shape)), jnp.zeros((1,)), example(self.model)

    def decode(
        self,
        codes: np.ndarray | None = None,
        *,
        labels: np.ndarray | None = None,
        embeddings: np.ndarray | None = None,
        seed: int = 0,
        count: int | None = None,
        first: int = 0,
        sampler: Sampler = Sampler(),  # noqa: B008, it is frozen
        params=None,
        known: np.ndarray | None = None,
    ) -> np.ndarray:
        """Codes int [b, l] or soft ones float [b, l, v] to uint8 images [b, y, x, c].

        Args:
          codes: None, with a `count`, draws from a generator trained without codes.
          known: bool [l] or [b, l], the positions that ask for something; the others are null, as
            training with `objective.drop_positions` has them. None is all.
          labels: class of each image, int [b], for a generator trained with classes. None is the
            null class.
          embeddings: of images or between them, float [b, e], for a generator trained with some.
          params: of the generator; None are those saved.

        Raises:
          UserError: codes, labels or embeddings of another shape or type, or out of range; soft
            codes that are not points of simplices; none for a generator that reads some; no weights
            of the autoencoder; a `guidance.base` that is not there, or draws something else.
        """
        if codes is None and self.model.positions:
            raise UserError(
                f"{self.step} was trained with codes; give some, as from sample_codes or encode"
            )
        check_sampler(sampler, self.section, "sampler")
        given = {}
        if codes is not None:
            own = self.checked(codes, "decode")
            given["codes"] = partial(own, known, values=self.model.values, where="decode")
        if embeddings is not None or self.model.embedding:
            how = {"width": self.model.embedding, "count": len(given.get("codes", ())) or None}
            given["embedding"] = inputs.check_embeddings(embeddings, **how, where=self.step)
        count = len(next(iter(given.values()))) if given else count or 0
        given |= self.labels(labels, count)
        mesh = self.mesh if params is None else self.full_mesh
        if (base := sampler.guidance.base) not in ("", "internal") and sampler.guidance.scale != 1:
            own = self.params if params is None else params
            params = {"own": own, "base": self._base_params(base, mesh)}
        how = {"sampler": sampler, "names": tuple(given), "params": params, "mesh": mesh}
        return self._drawn(keys(seed, count, first), given, **how)

    def decode_all(
        self,
        parents: Sequence[np.ndarray],
        *,
        known: Sequence[np.ndarray | None] | None = None,
        scales: Sequence[float] | None = None,
        labels: np.ndarray | None = None,
        seed: int = 0,
        first: int = 0,
        sampler: Sampler = Sampler(),  # noqa: B008
    ) -> np.ndarray:
        """uint8 images [b, y, x, c] that fit all of several codes at once; see `conjoined`.

        The network is called once more in a step than there are parents.

        Args:
          parents: p of codes, all hard or all soft, of b examples each.
          known: for each parent as in `decode`, so that each asks for positions of its own.
          scales: how strongly each parent is met; None is the sampler's scale of guidance for all.
          labels: as in `decode`, beside every parent.

        Raises:
          UserError: as `decode`; parents, masks or scales that do not go together; another base.
        """
        scales = [sampler.guidance.scale] * len(parents) if scales is None else scales
        if sampler.guidance.base:
            raise UserError(
                "decode_all leans away from the null condition; it takes no sampler.guidance.base"
            )
        null = dataclasses.replace(sampler.guidance, scale=0.0)
        check_sampler(dataclasses.replace(sampler, guidance=null), self.section, "sampler")
        codes = [self.checked(parent, "decode_all") for parent in parents]
        codes = together(codes, known, scales, values=self.model.values, where="decode_all")
        given = {"codes": codes} | self.labels(labels, len(codes))
        how = {"sampler": sampler, "names": tuple(given), "scales": tuple(map(float, scales))}
        return self._drawn(keys(seed, len(codes), first), given, **how)

    def _drawn(self, draws, given, **how) -> np.ndarray:
        drawn = self.run(self._draw, draws, *given.values(), **how)
        return self._pictures(drawn) if self.section.latents else drawn

    def checked(self, codes: np.ndarray, where: str) -> np.ndarray:
        """Codes int32 [b, l] or float32 [b, l, v] that the generator can read; see `decode`."""
        if not self.model.positions:
            raise UserError(f"{where}: {self.step} was trained without codes, so it reads none")
        shape = {"length": self.model.positions, "values": self.model.values}
        return inputs.check_codes(codes, where=where, **shape)

    def lower(self, *, sampler: Sampler):
        """`decode` of a batch up to the latents, if it draws them, lowered from shapes alone."""
        given = {name: value for name, value in example(self.model)._asdict().items()}
        given = {name: value for name, value in given.items() if value is not None}
        shapes = [((), key_dtype()), *((leaf.shape[1:], leaf.dtype) for leaf in given.values())]
        own = self.abstract()
        is_other = sampler.guidance.base not in ("", "internal") and sampler.guidance.scale != 1
        params = {"own": own, "base": own} if is_other else own  # planned as one of its own size
        how = {"sampler": sampler, "names": tuple(given)}
        return self._lower(self._draw, *shapes, params=params, **how)

    def _draw(self, params, keys, *given, sampler, names, scales=None):
        given = Given(**dict(zip(names, given, strict=True)))
        how = sampler.guidance
        is_other = how.base not in ("", "internal") and how.scale != 1
        own = params["own"] if is_other else params
        if scales is not None:
            parents = [given._replace(codes=given.codes[:, n]) for n in range(len(scales))]
            found = [self._predictor(own, parent) for parent in parents]
            predict = guidance.conjoined(found, self._predictor(own, None), how, scales)
        elif how.base == "internal" and how.scale != 1:
            predict = guidance.guided_pair(self._pair(own, given), how)
        elif is_other:
            base = self._bases.get(how.base, self)  # of a plan there is none
            weak = base._predictor(params["base"], given)
            predict = guidance.guided(self._predictor(own, given), weak, how)
        elif names:
            less = self._predictor(own, None)
            predict = guidance.guided(self._predictor(own, given), less, how)
        else:  # nothing to lean to
            predict = self._predictor(own, given)
        x = sampler.draw(self.process, predict, keys, self._shape)
        return x if self.section.latents else to_uint8(x)

    def _apply(self, params, *inputs, method):
        return self.model.apply({"params": params}, *inputs, method=method)

    def _predictor(self, params, given):
        """(x, t) -> Prediction under what is given; None is the null condition."""
        condition = self._apply(params, given, method="embed")  # once, not in every step

        def predict(x, t):
            inputs = self.process.inputs(x, t)
            output = self._apply(params, *inputs, condition, method="denoise")
            return self.process.predict(output, x, t)

        return predict

    def _pair(self, params, given):
        """(x, t) -> the network's Prediction and its early head's."""
        condition = self._apply(params, given, method="embed")

        def both(x, t):
            found = self._apply(params, *self.process.inputs(x, t), condition, method="all")
            return tuple(self.process.predict(each, x, t) for each in (found.output, found.early))

        return both

    def _base_params(self, base: str, mesh):
        """Parameters of the generator that guidance leans away from, W[@STEP]."""
        if (base, mesh) not in self._base_loaded:
            place, _, at = base.rpartition("@")
            place, at = (place, int(at)) if place and at.isdecimal() else (base, None)
            try:
                network, directory = self._other(remote.local(place))
                self._bases[base] = network
                self._base_loaded[base, mesh] = network.load(directory, mesh, step=at)
            except UserError as error:
                raise UserError(f"sampler.guidance.base={base}: {error}") from error
        return self._base_loaded[base, mesh]

    def _other(self, place: Path):
        """(network, folder of its step): a run with a step of this name, or a step's folder."""
        for workdir, step in ((place, self.step), (place.parent, place.name)):
            if (workdir / "config.json").is_file():
                config = recipe.of_run(workdir)
                if step not in config:
                    raise UserError(f"its recipe has no step {step!r}")
                settings = {"mesh": self.full_mesh, "batch": self.batch, "dtype": self._dtype}
                found = GeneratorNetwork(config, workdir, step, **settings)
                self._check_alike(found)
                return found, recipe.trained(config, workdir, step)
        return self, place

    def _check_alike(self, other: "GeneratorNetwork") -> None:
        """Refuses a base that draws something else, or of something else."""
        for part in ("process", "latents", "normalize"):
            if self.section[part] != other.section[part]:
                raise UserError(f"it was trained with another {part}; a base has the same")
        for field in ("image", "channels", "positions", "values", "classes", "embedding"):
            ours, theirs = (getattr(each.model, field) for each in (self, other))
            if ours != theirs:
                raise UserError(f"its model.{field} is {theirs}, and here it is {ours}")

    def _pictures(self, drawn) -> np.ndarray:
        """uint8 images of latents as they are drawn; a few at a time, since they are large."""
        decode, params = self._decoder
        mesh, size = parallel.unsplit(self.full_mesh), DECODED * parallel.shares(self.full_mesh)
        starts = range(0, len(drawn), size)
        batches = ([drawn[start : start + size]] for start in starts)
        return np.concatenate(list(parallel.each(decode, params, batches, mesh=mesh, size=size)))

    @functools.cached_property
    def _decoder(self):
        """(program, params) of the autoencoder."""
        codes = self.section.codes
        mesh = parallel.unsplit(self.full_mesh)
        network = AutoencoderNetwork(self.config, self.config[codes].autoencoder, mesh)
        place, normalizer = recipe.place(self.config, self.workdir, codes) / "train", Normalizer()
        remote.fetch(place)
        if self.section.normalize or place.is_dir():  # else of an imported generator
            store = facts(place)
            network.check(store)
            if self.section.normalize:
                normalizer = network.normalizer(store, self.process.deviation)

        def decode(params, x):
            return to_uint8(network.decode(params, normalizer.inverse(x)))

        return jax.jit(decode), network.params

    @property
    def _shape(self):
        return (self.model.image, self.model.image, self.model.channels)
