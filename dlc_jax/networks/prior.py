"""A prior that was trained: new codes."""

import functools

import jax.numpy as jnp
import numpy as np

from dlc_jax import recipe
from dlc_jax.diffusion.masked import CodeSampler
from dlc_jax.models.masked_transformer import MaskedTransformer
from dlc_jax.networks.network import Network, key_dtype, keys


class PriorNetwork(Network):
    """Codes by their number: a draw depends on the seed and on that, not on the batch."""

    @functools.cached_property
    def model(self) -> MaskedTransformer:
        return recipe.build(MaskedTransformer, self.section.model)

    def inputs(self):
        return (jnp.zeros((1, self.model.positions), jnp.int32),)

    def sample(
        self,
        count: int,
        *,
        seed: int,
        first: int = 0,
        sampler: CodeSampler = CodeSampler(),  # noqa: B008, it is frozen
    ) -> np.ndarray:
        """`count` new codes int32 [count, l], those of the numbers from `first` on."""
        return self.run(self._sample, keys(seed, count, first), sampler=sampler)

    def lower(self, *, sampler: CodeSampler):
        """`sample` of a batch, lowered from shapes alone."""
        return self._lower(self._sample, ((), key_dtype()), sampler=sampler)

    def _sample(self, params, keys, *, sampler):
        logits = functools.partial(self.model.apply, {"params": params})
        return sampler.draw(logits, keys, self.model.positions, self.model.values)
