"""What every transformer here is made of: dense layers, norms, attention, patches, a scan.

Parameters are made in float32. A layer computes in the dtype of the parameters it is given, so
casting the tree to bfloat16 is all that mixed precision needs; norms and softmax stay in float32
inside. Casting the kernels alone (`compute_dtypes`) leaves the residual stream in float32 too: it
has the dtype of the tokens and positions that it begins with.
"""

import functools
import math
from collections.abc import Callable

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from dlc_jax.errors import UserError
from dlc_jax.kernels.attention import DENSE, attention, biased
from dlc_jax.parallel import constrain, matmul
from dlc_jax.typing import Array, Bool, Float, Tree

XAVIER = nn.initializers.xavier_uniform()
# U(-1/sqrt(fan_in), 1/sqrt(fan_in)): what torch's layers start from by default
FAN_IN = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
# a plain normal: the reference's "truncated normal" cuts at +-2, a hundred deviations out
NORMAL = nn.initializers.normal(0.02)
ZEROS = nn.initializers.zeros
ONES = nn.initializers.ones

# What the mesh's `tensor` axis splits in a block: heads, and the hidden units of the MLP
# (Megatron-LM, arXiv 1909.08053). See `parallel.placement`.
RULES = (
    (r"attention/(qkv|q|kv)/(kernel|bias)$", -2, "tensor"),
    (r"attention/out/kernel$", 0, "tensor"),
    (r"mlp/fc1/(kernel|bias)$", -1, "tensor"),
    (r"mlp/fc2/kernel$", 0, "tensor"),
)


class Dense(nn.Module):
    """Linear map of the last dimension to `features`, which may be several dimensions.

    The product is taken between matrices: gradients of a 3-D product are twice as slow on CPUs.
    `kernel_init` sees the flat shape.
    """

    features: int | tuple[int, ...]
    use_bias: bool = True
    kernel_init: Callable = XAVIER

    @nn.compact
    def __call__(
        self, x: Float[Array, "*n d"], *, dtype=None, add_bias: bool = True
    ) -> Array | tuple[Array, Array | None]:
        """Factors have the kernel's dtype; sums, bias and result `dtype`, by default the same.

        Without `add_bias` the result is (product, bias or None), for who adds it and names the sum.
        """
        features = (self.features,) if isinstance(self.features, int) else tuple(self.features)
        flat = (x.shape[-1], math.prod(features))
        shape = (x.shape[-1], *features)
        kernel = self.param("kernel", lambda key: self.kernel_init(key, flat).reshape(shape))
        dtype, name = dtype or kernel.dtype, "/".join((*self.path, "kernel"))
        x2 = x.reshape(-1, flat[0]).astype(kernel.dtype)
        y = matmul(x2, kernel, name, RULES, dtype=dtype)
        bias = self.param("bias", ZEROS, features) if self.use_bias else None
        if not add_bias:
            return y.reshape(*x.shape[:-1], *features), bias
        if bias is not None:
            y = biased(y, bias)
        # The name is what remat="dots" stores: with the bias, or it would be added again.
        return checkpoint_name(y, DENSE).reshape(*x.shape[:-1], *features)


class LayerNorm(nn.Module):
    """Layer normalization of the last dimension (arXiv 1607.06450), in float32.

    The result has the dtype of the input.
    """

    eps: float = 1e-6
    use_scale: bool = True
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        if self.use_scale:
            y = y * self.param("scale", ONES, x.shape[-1:]).astype(jnp.float32)
        if self.use_bias:
            y = y + self.param("bias", ZEROS, x.shape[-1:]).astype(jnp.float32)
        return y.astype(x.dtype)


class Mlp(nn.Module):
    """Two dense layers with a GELU between, "exact" (erf) or "tanh" (its approximation)."""

    hidden: int
    gelu: str = "exact"
    kernel_init: Callable = XAVIER

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        h = Dense(self.hidden, kernel_init=self.kernel_init, name="fc1")(x)
        h = jax.nn.gelu(h.astype(x.dtype), approximate={"exact": False, "tanh": True}[self.gelu])
        return Dense(x.shape[-1], kernel_init=self.kernel_init, name="fc2")(h, dtype=x.dtype)


class SwiGlu(nn.Module):
    """fc2(silu(gate) * up), gate and up packed as fc1 in this order (arXiv 2002.05202)."""

    hidden: int
    kernel_init: Callable = XAVIER
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        dense = functools.partial(Dense, use_bias=self.use_bias, kernel_init=self.kernel_init)
        h = dense((2, self.hidden), name="fc1")(x).astype(x.dtype)
        h = jax.nn.silu(h[..., 0, :]) * h[..., 1, :]
        return dense(x.shape[-1], name="fc2")(h, dtype=x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention; its projection is [d, 3, h, k], to be sharded by head.

    Raises:
      UserError: the heads do not divide the width.
    """

    heads: int
    use_bias: bool = True
    qk_norm: bool = False
    kernel_init: Callable = XAVIER
    implementation: str | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        *,
        mask: Bool[Array, "b n"] | None = None,
        rotary: tuple | None = None,
    ) -> Float[Array, "b n d"]:
        width = x.shape[-1]
        if width % self.heads:
            raise UserError(
                f"width {width} is not a multiple of {self.heads} heads; change one of them"
            )
        k = width // self.heads
        dense = functools.partial(Dense, use_bias=self.use_bias, kernel_init=self.kernel_init)
        inputs = {"mask": mask, "rotary": rotary, "implementation": self.implementation}
        qkv, bias = dense((3, self.heads, k), name="qkv")(x, add_bias=False)
        if self.qk_norm:
            scales = self.param("q_scale", ONES, (k,)), self.param("k_scale", ONES, (k,))
            inputs["qk_scale"] = scales
        y = attention(qkv, bias=bias, **inputs)
        return dense(width, name="out")(y.reshape(x.shape), dtype=x.dtype)


def compute_dtypes(params: Tree, dtype: str) -> Tree:
    """The dtype of each parameter for products in `dtype`: kernels have it, all else float32.

    Then residual stream, norms, softmax, activations and logits are float32, as under torch's
    autocast; products get factors of `dtype` and are summed in float32.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.dtype(dtype if path[-1].key == "kernel" else jnp.float32), params
    )


def mlp_hidden(width: int, mlp_ratio: float, *, mlp: str = "gelu") -> int:
    """Hidden units of a block's MLP.

    A "swiglu" has three matrices and, as in DINOv2, two thirds of the units, rounded up to a
    multiple of 8.
    """
    hidden = int(mlp_ratio * width)
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if mlp == "swiglu" else hidden


def block_flops(tokens: int, width: int, *, mlp_ratio: float, mlp: str = "gelu") -> float:
    """FLOPs of a forward pass of one example's tokens through the attention and MLP of one block.

    A FLOP count here and in the models is 2 for each multiply-add of every matrix product, the
    attention's own among them: projections 8 n d^2, queries by keys and weights by values 4 n^2 d,
    MLP 4 n d hidden ("swiglu" 6). Left out everywhere: norms, softmax, activations, biases,
    positions, lookups in tables.
    """
    projections, core = 8.0 * tokens * width**2, 4.0 * tokens**2 * width
    matrices, hidden = 3 if mlp == "swiglu" else 2, mlp_hidden(width, mlp_ratio, mlp=mlp)
    return projections + core + 2.0 * matrices * tokens * width * hidden


def block_layer(name: str, shape: tuple[int, ...], *, depth: int) -> np.ndarray | int:
    """How many layers lie between a parameter and the head.

    Args:
      name: path of the parameter, as in "blocks/mlp/fc1/kernel".
      shape: of the parameter; axis 0 of the blocks' counts layers.
      depth: number of blocks.

    Returns:
      For parameters of the blocks an int array [depth], from `depth` down to 1; 0 for all others.
    """
    return np.arange(depth, 0, -1) if name.startswith("blocks/") else 0


def modulate(
    x: Float[Array, "b n d"], shift: Float[Array, "b *n d"], scale: Float[Array, "b *n d"]
) -> Float[Array, "b n d"]:
    """x (1 + scale) + shift (DiT, arXiv 2212.09748), of examples [b d] or of tokens [b n d]."""
    return x * (1 + per_token(scale)) + per_token(shift)


def per_token(x: Float[Array, "b *n d"]) -> Float[Array, "b m d"]:
    """What is the same for all tokens of an example, [b d], as [b 1 d]; [b n d] as it is."""
    return x[:, None] if x.ndim == 2 else x


def patchify(images: Float[Array, "b y x c"], patch: int) -> Float[Array, "b n p"]:
    """Cuts images into patches in reading order; within one the order is (row, column, channel).

    Raises:
      UserError: the images are not square, or the patch does not divide them.
    """
    _, y, x, _ = images.shape
    if y != x or y % patch:
        raise UserError(
            f"images of {y}x{x} pixels cannot be cut into patches of {patch}; "
            "make them square and a multiple of it"
        )
    cut = "b (row r) (column c) channel -> b (row column) (r c channel)"
    return einops.rearrange(images, cut, r=patch, c=patch)


def unpatchify(patches: Float[Array, "b n p"], patch: int) -> Float[Array, "b y x c"]:
    """Puts square images together again: the inverse of `patchify`."""
    join = "b (row column) (r c channel) -> b (row r) (column c) channel"
    return einops.rearrange(patches, join, row=math.isqrt(patches.shape[1]), r=patch, c=patch)


REMAT = ("none", "dots", "full")


def scan_blocks(
    block: nn.Module,
    x: Array,
    *shared: object,
    depth: int,
    own: tuple = (),
    every: bool = False,
    remat: str = "dots",
    unroll: int = 1,
) -> Array:
    """Applies `depth` copies of a block, x = block(x, *shared, *own), each with its own parameters.

    These are stacked along axis 0. One compiled layer serves them all, so that compile time does
    not grow with depth.

    Args:
      block: a module of the caller; its name becomes the name of the stacked parameters.
      shared: what every layer reads besides x: arrays, tuples of arrays, None.
      own: what each layer reads of its own: arrays whose axis 0 counts layers, None.
      every: returns the outputs of all blocks, [depth, ...], instead of the last one's.
      remat: what the backward pass finds stored: everything ("none"), the products of dense layers
        ("dots"), or only each block's input ("full"); the rest is computed again.
      unroll: layers in a turn of the loop, 0 for all: slower to compile, with fewer of the copies
        that a loop makes of what it stores.

    Raises:
      UserError: there is no such remat.
    """
    if remat not in REMAT:
        raise UserError(f"remat={remat!r} is not one of {', '.join(REMAT)}")

    def body(block, x, *inputs):
        x = constrain(block(constrain(x), *inputs))
        return x, (x if every else None)

    if remat != "none":
        dots = jax.checkpoint_policies.save_only_these_names(DENSE)
        policy = dots if remat == "dots" else None
        # within a loop nothing can merge with the forward pass, so its costly guard is left out
        body = nn.remat(body, prevent_cse=unroll == 0, policy=policy)
    scanned = nn.scan(
        body,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast,) * len(shared) + (0,) * len(own),
        length=depth,
        unroll=unroll or depth,
    )
    last, outputs = scanned(block, x, *shared, *own)
    return outputs if every else last
