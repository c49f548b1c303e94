"""A generator that was trained: codes to images."""

import dataclasses
import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from dlc_jax import recipe
from dlc_jax.data import inputs
from dlc_jax.diffusion import flow, guidance
from dlc_jax.diffusion.sample import Sampler
from dlc_jax.errors import UserError
from dlc_jax.models.dit import DiT
from dlc_jax.networks.network import Network, key_dtype, keys

FLOOR = 1e-3  # of the time that predicted data are divided by; below a sampler's last step


class GeneratorNetwork(Network):
    """Images by their number: a draw depends on the seed and on that, not on the batch."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self._bases: dict = {}  # parameters that guidance leans away from

    @functools.cached_property
    def model(self) -> DiT:
        return recipe.build(DiT, self.section.model)

    def inputs(self):
        length = self.model.positions
        codes = jnp.zeros((1, length), jnp.int32) if length else None
        return jnp.zeros((1, *self._shape)), jnp.zeros((1,)), codes

    def decode(
        self,
        codes: np.ndarray | None,
        *,
        seed: int = 0,
        count: int | None = None,
        first: int = 0,
        sampler: Sampler = Sampler(),  # noqa: B008, it is frozen
        params=None,
    ) -> np.ndarray:
        """Codes int [b, l] or soft ones float [b, l, v] to uint8 images [b, y, x, c].

        Args:
          codes: None, with a `count`, draws from a generator trained without codes.
          params: of the generator; None are those saved.

        Raises:
          UserError: codes of another shape or type, outside [0, V), or soft ones that are not
            points of simplices; none for a generator that reads some; a generator of latents; a
            `guidance.base` that is not this model, trained.
        """
        if self.section.latents:
            raise UserError(
                f"{self.step} draws latents; this version has no decoder that makes images of them"
            )
        if codes is None and self.model.positions:
            raise UserError(
                f"{self.step} was trained with codes; give some, as from sample_codes or encode"
            )
        arrays = () if codes is None else (self.checked(codes, "decode"),)
        count = (count or 0) if codes is None else len(arrays[0])
        mesh = self.mesh if params is None else self.full_mesh
        if base := sampler.guidance.base:
            own = self.params if params is None else params
            if (base, mesh) not in self._bases:
                try:
                    self._bases[base, mesh] = self.load(Path(base), mesh)
                except UserError as error:
                    raise UserError(f"sampler.guidance.base={base}: {error}") from error
            params = {"own": own, "base": self._bases[base, mesh]}
        draws = keys(seed, count, first)
        return self.run(self._decode, draws, *arrays, params=params, mesh=mesh, sampler=sampler)

    def checked(self, codes: np.ndarray, where: str) -> np.ndarray:
        """Codes int32 [b, l] or float32 [b, l, v] that the generator can read; see `decode`."""
        if not self.model.positions:
            raise UserError(f"{where}: {self.step} was trained without codes, so it reads none")
        shape = {"length": self.model.positions, "values": self.model.values}
        return inputs.check_codes(codes, where=where, **shape)

    def lower(self, *, sampler: Sampler):
        """`decode` of a batch, lowered from shapes alone."""
        length = self.model.positions
        shapes = [((), key_dtype()), *([((length,), jnp.int32)] if length else [])]
        own = self.abstract()
        params = {"own": own, "base": own} if sampler.guidance.base else own
        return self._lower(self._decode, *shapes, params=params, sampler=sampler)

    def _decode(self, params, keys, codes=None, *, sampler):
        own, weak = params, None
        if sampler.guidance.base:
            own, weak = params["own"], params["base"]

        def velocity(params, x, t, codes):
            prediction = self.model.apply({"params": params}, x, t, codes)
            kind = self.section.objective.prediction
            return flow.to_velocity(prediction, x, t, kind=kind, floor=FLOOR)

        function = functools.partial(velocity, own)
        null = None if weak is None else lambda x, t: velocity(weak, x, t, codes)
        how = sampler.guidance
        if codes is None and weak is None:  # nothing to lean to
            how = dataclasses.replace(how, scale=1.0)
        function = guidance.guided(function, codes, how, null_fn=null)
        x = sampler.draw(function, keys, self._shape)
        return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)

    @property
    def _shape(self):
        return (self.model.image, self.model.image, self.model.channels)
