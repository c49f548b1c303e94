"""An encoder that was trained: images to codes, soft codes, embeddings and features."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax import parallel, recipe
from dlc_jax.data import inputs
from dlc_jax.errors import UserError
from dlc_jax.models.encoder import EMBEDDINGS, Encoder
from dlc_jax.models.layers import compute_dtypes
from dlc_jax.models.simplicial import relax
from dlc_jax.models.vit import standardize
from dlc_jax.networks.network import Network

Images = np.ndarray | Sequence[np.ndarray]


class EncoderNetwork(Network):
    """Images are uint8 [b, y, x, c]: gray is repeated, another size scaled and center-cropped.

    A list may hold several sizes. `params` of a method are the encoder's; None are the saved ones.
    """

    @functools.cached_property
    def model(self) -> Encoder:
        return recipe.build(Encoder, self.section.model)

    def inputs(self):
        return (jnp.zeros((1, self.size, self.size, 3)),)

    @property
    def size(self) -> int:
        """Side of the images that it reads: of the crops it was trained with."""
        return max(crops.global_size for crops in self.section.crops.values())

    @functools.cached_property
    def dtype(self) -> str:
        """Of the products; "" is that of training, for all of the encoder."""
        own = recipe.codes_dtype(self.config, self.step)
        return own if self._dtype is None else self._dtype

    @functools.cached_property
    def dtypes(self):
        if self.dtype:
            return compute_dtypes(self.shapes, self.dtype)
        return jax.tree.map(lambda _: jnp.dtype(self.section.train.dtype), self.shapes)

    def encode(self, images: Images, *, params=None) -> np.ndarray:
        """Codes int32 [b, l]: the likeliest value of every position."""
        return self.run(self.codes, self._fitted(images), params=params)

    def features(self, images: Images, *, params=None) -> np.ndarray:
        """Features float32 [b, 2 d]: normalized class token, and mean of the patches'."""
        return self.run(self._features, self._fitted(images), params=params)

    def embed(self, images: Images, *, kind: str = "", params=None) -> np.ndarray:
        """Embeddings float32 [b, e], as a codes step stores them, but not rounded.

        Args:
          kind: "class" or "summary", see `Encoder.embedding`; "" is what the recipe's codes step
            stores, or "class" where it stores none.

        Raises:
          UserError: another kind.
        """
        kind = kind or recipe.embedding(self.config, self.step) or EMBEDDINGS[0]
        if kind not in EMBEDDINGS:
            raise UserError(f"embed: kind={kind!r} is unknown; known: {', '.join(EMBEDDINGS)}")
        return self.run(self._embedded, self._fitted(images), params=params, kind=kind)

    def simplices(self, images: Images, *, temperature: float = 1.0) -> np.ndarray:
        """Soft codes float32 [b, l, v]: softmax of logits / temperature, without noise.

        Raises:
          UserError: a temperature that is not above 0.
        """
        if not temperature > 0 or not np.isfinite(temperature):
            raise UserError(
                f"simplices: temperature={temperature} must be above 0; the limit at 0 is encode"
            )
        images = self._fitted(images)
        temperatures = np.full(len(images), temperature, np.float32)
        return self.run(self._simplices, images, temperatures)

    def untrained(self):
        """Parameters that have learned nothing, from the run's seed, to compare with."""
        shardings = parallel.shardings(
            self.shapes, self.full_mesh, rules=self.model.rules, strict=False
        )
        images = jnp.zeros((1, self.size, self.size, 3))
        key = jax.random.key(self.config.seed)
        init = jax.jit(lambda: self.model.init(key, images)["params"], out_shardings=shardings)
        return self.cast(init())

    def codes(self, params, images):
        """Codes int32 [b, l] of images uint8 [b, y, x, 3] of the encoder's size, to be traced."""
        return self._apply(params, images, method="codes")

    def described(self, params, images, *, kind: str):
        """{"codes" int32 [b, l], "embedding" float32 [b, e]} from one pass, to be traced."""
        tokens = self._apply(params, images)
        found = self.model.apply({"params": params}, tokens, kind, method="embedding")
        codes = jnp.argmax(tokens["logits"], axis=-1).astype(jnp.int32)
        return {"codes": codes, "embedding": found.astype(jnp.float32)}

    def patches(self, params, images):
        """Normalized patches [b, n, d] of images uint8 [b, y, x, 3] of its size, to be traced."""
        tokens = self._apply(params, images)["patches"]
        return self.model.apply({"params": params}, tokens, method="normalize")

    def lower(self):
        """`encode` of a batch, lowered from shapes alone."""
        return self._lower(self.codes, ((self.size, self.size, 3), jnp.uint8))

    def _features(self, params, images):
        tokens = self._apply(params, images)
        norm = functools.partial(self.model.apply, {"params": params}, method="normalize")
        patches = norm(tokens["patches"]).mean(axis=1)
        return jnp.concatenate([norm(tokens["cls"]), patches], axis=-1).astype(jnp.float32)

    def _embedded(self, params, images, *, kind):
        return self.described(params, images, kind=kind)["embedding"]

    def _simplices(self, params, images, temperature):
        logits = self._apply(params, images)["logits"]
        return relax(logits, "softmax", temperature=temperature[:, None, None])

    def _apply(self, params, images, method=None):
        # float32 is float32 everywhere: by default TPUs round factors to bfloat16, GPUs to TF32
        with jax.default_matmul_precision("highest" if self.dtype == "float32" else None):
            return self.model.apply({"params": params}, standardize(images), method=method)

    def _fitted(self, images: Images) -> np.ndarray:
        return inputs.fit(images, size=self.size)
