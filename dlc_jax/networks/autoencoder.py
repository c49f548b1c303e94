"""The autoencoder of a recipe: images to the moments of latents, and latents to images."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax import checkpoint, parallel, recipe, remote
from dlc_jax.data import latents
from dlc_jax.data.codes import CodeStore
from dlc_jax.errors import UserError
from dlc_jax.models.autoencoders import AUTOENCODERS


class Normalizer(NamedTuple):
    """Scaled latents to what a generator draws, and back.

    Attributes:
      mean, std: [c], of scaled latents; None leaves latents as they are.
      deviation: that of a normalized latent.
    """

    mean: np.ndarray | None = None
    std: np.ndarray | None = None
    deviation: float = 1.0

    def __call__(self, scaled):
        """(scaled - mean) / std * deviation."""
        if self.mean is None:
            return scaled
        return (scaled - self.mean) * (self.deviation / self.std)

    def inverse(self, x):
        """Scaled latents again, as `decode` takes them."""
        return x if self.mean is None else x * (self.std / self.deviation) + self.mean


class AutoencoderNetwork:
    """The autoencoder of a recipe's section, whose weights are imported.

    Attributes:
      section: of the recipe.
      where: its weights; "" where a program is only planned.
      model: the linen module.
      stride, channels, scaling: of its latents.
    """

    def __init__(self, config, name: str, mesh=None):
        """Without a mesh there are no parameters."""
        self.name, self.section, self._mesh = name, config[name], mesh
        self.where = self.section.path
        model = self.section.model
        self.model = recipe.build(AUTOENCODERS[model.name], model)
        self.stride, self.channels = self.model.stride, self.model.latent
        self.scaling = self.model.scaling

    @functools.cached_property
    def params(self):
        """The imported weights, placed. Of several processes all must ask, together.

        Raises:
          UserError: none are given; they are damaged, or of another autoencoder than `model`.
        """
        try:
            return checkpoint.load_params(self._checkpoints(), self.abstract())
        except UserError as error:
            what = str(error).removesuffix("; use the config it was trained with")
            raise UserError(
                f"{self.name}: {what}; give --config.{self.name}.path and .model as dlc import vae "
                "printed them"
            ) from error

    @functools.cached_property
    def identity(self) -> str:
        """A short hash of the weights.

        Raises:
          UserError: there are none.
        """
        return checkpoint.identity_of(self._checkpoints())

    def abstract(self):
        """Shapes and placements of the parameters, float32."""
        side = self.stride
        image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        shapes = jax.eval_shape(self.model.init, jax.random.key(0), image)["params"]
        return parallel.abstract(shapes, parallel.shardings(shapes, self._mesh, strict=False))

    def encode(self, params, images) -> dict[str, jax.Array]:
        """{"mean", and "logvar" if it has a posterior} of images uint8 [b, y, x, 3], float32."""
        pixels = images / jnp.float32(127.5) - 1
        return self.model.apply({"params": params}, pixels, method="encode")

    def decode(self, params, latents) -> jax.Array:
        """Scaled latents [b, y, x, c] to images float32 [b, y, x, 3], about in [-1, 1]."""
        return self.model.apply({"params": params}, latents, method="decode")

    def check(self, store: CodeStore) -> None:
        """Refuses a store without latents, or with those of another autoencoder.

        Raises:
          UserError: see above.
        """
        latents.check(store, self.identity, self.name)

    def normalizer(self, store: CodeStore, deviation: float = 1.0) -> Normalizer:
        """By the statistics of the train split's store, so that each channel has `deviation`.

        Raises:
          UserError: a store without statistics.
        """
        found = latents.measured(store)
        mean, std = (self.scaling * np.asarray(each, np.float32) for each in found)
        return Normalizer(mean, std, deviation)

    def _checkpoints(self):
        if not self.where:
            raise UserError(
                f"{self.name} has no weights: make some by dlc import vae FILE --out DIR"
            )
        return remote.local(self.where) / "checkpoints"
