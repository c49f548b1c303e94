"""What every transformer here is made of: dense layers, norms, attention, patches, drop path, and scanning over layers.

Parameters are made in float32. A layer computes in the dtype of the parameters it is given, so casting the tree to bfloat16
is all that mixed precision needs; norms and softmax stay in float32 inside. Casting the kernels alone (`compute_dtypes`) leaves
the residual stream in float32 too: it has the dtype of the tokens and positions that it begins with.
"""

import math
import re
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax.errors import UserError
from dlc_jax.kernels.attention import attention
from dlc_jax.parallel import constrain, matmul
from dlc_jax.typing import Array, Bool, Float, Int, Key, Tree

XAVIER = nn.initializers.xavier_uniform()
# U(-1/sqrt(fan_in), 1/sqrt(fan_in)): what the reference's layers without an initialization of their own start from
FAN_IN = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
# the reference's "truncated normal" cuts at an absolute +-2, a hundred deviations out: a plain normal
NORMAL = nn.initializers.normal(0.02)
ZEROS = nn.initializers.zeros
ONES = nn.initializers.ones

# What the mesh's `tensor` axis splits in a block: heads, and the hidden units of the MLP (Megatron-LM, arXiv 1909.08053).
# See `parallel.placement`.
RULES = (
    (r"attention/qkv/(kernel|bias)$", -2, "tensor"),
    (r"attention/out/kernel$", 0, "tensor"),
    (r"mlp/fc1/(kernel|bias)$", -1, "tensor"),
    (r"mlp/fc2/kernel$", 0, "tensor"),
)


class Dense(nn.Module):
    """Linear map of the last dimension to `features`, which may be several dimensions.

    The product is taken between matrices: gradients of a 3-D product are twice as slow on CPUs. `kernel_init` sees the flat
    shape.
    """

    features: int | tuple[int, ...]
    use_bias: bool = True
    kernel_init: Callable = XAVIER

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"], *, dtype=None) -> Array:
        """Factors are in the kernel's dtype; sums, bias and result in `dtype`, by default the same."""
        features = (self.features,) if isinstance(self.features, int) else tuple(self.features)
        flat = (x.shape[-1], math.prod(features))
        kernel = self.param("kernel", lambda key, shape: self.kernel_init(key, flat).reshape(shape), (x.shape[-1], *features))
        dtype = dtype or kernel.dtype
        y = matmul(x.reshape(-1, flat[0]).astype(kernel.dtype), kernel, "/".join((*self.path, "kernel")), RULES, dtype=dtype)
        if self.use_bias:
            y = y + self.param("bias", ZEROS, features).astype(dtype)
        return y.reshape(*x.shape[:-1], *features)


class LayerNorm(nn.Module):
    """Layer normalization of the last dimension (arXiv 1607.06450), in float32; the result has the dtype of the input."""

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
    """Two dense layers with a GELU between; `gelu` is "exact" (erf) or "tanh" (its approximation)."""

    hidden: int
    gelu: str = "exact"
    kernel_init: Callable = XAVIER

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        h = Dense(self.hidden, kernel_init=self.kernel_init, name="fc1")(x)
        h = jax.nn.gelu(h.astype(x.dtype), approximate={"exact": False, "tanh": True}[self.gelu])
        return Dense(x.shape[-1], kernel_init=self.kernel_init, name="fc2")(h, dtype=x.dtype)


class SwiGlu(nn.Module):
    """fc2(silu(gate) * up), gate and up packed as fc1 in this order (GLU variants, arXiv 2002.05202)."""

    hidden: int
    kernel_init: Callable = XAVIER

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        h = Dense((2, self.hidden), kernel_init=self.kernel_init, name="fc1")(x).astype(x.dtype)
        h = jax.nn.silu(h[..., 0, :]) * h[..., 1, :]
        return Dense(x.shape[-1], kernel_init=self.kernel_init, name="fc2")(h, dtype=x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention; the projection is packed as [d, 3, h, k] so that it can be sharded by head.

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
        self, x: Float[Array, "b n d"], *, mask: Bool[Array, "b n"] | None = None, rotary: tuple | None = None
    ) -> Float[Array, "b n d"]:
        width = x.shape[-1]
        if width % self.heads:
            raise UserError(f"width {width} is not a multiple of {self.heads} heads; change one of them")
        k = width // self.heads
        qkv = Dense((3, self.heads, k), use_bias=self.use_bias, kernel_init=self.kernel_init, name="qkv")(x)
        qk_scale = (self.param("q_scale", ONES, (k,)), self.param("k_scale", ONES, (k,))) if self.qk_norm else None
        y = attention(qkv, mask=mask, rotary=rotary, qk_scale=qk_scale, implementation=self.implementation)
        out = Dense(width, use_bias=self.use_bias, kernel_init=self.kernel_init, name="out")
        return out(y.reshape(x.shape), dtype=x.dtype)


class TimeEmbedding(nn.Module):
    """Embeds a number per example: 256 cosines and sines of `scale` times it, then two dense layers with a SiLU between."""

    width: int
    scale: float = 1000.0
    kernel_init: Callable = NORMAL

    @nn.compact
    def __call__(self, t: Float[Array, "b"]) -> Float[Array, "b d"]:
        h = Dense(self.width, kernel_init=self.kernel_init, name="fc1")(sincos_1d(self.scale * t, 256))
        return Dense(self.width, kernel_init=self.kernel_init, name="fc2")(jax.nn.silu(h))


def compute_dtypes(params: Tree, dtype: str) -> Tree:
    """The dtype of each parameter for products in `dtype`: kernels have it, all else float32.

    Then residual stream, norms, softmax, activations and logits are float32, as under torch's autocast; products get factors of
    `dtype` and are summed in float32.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.dtype(dtype if path[-1].key == "kernel" else jnp.float32), params
    )


def mlp_hidden(width: int, mlp_ratio: float, *, mlp: str = "gelu") -> int:
    """Hidden units of a block's MLP. A "swiglu" has three matrices and, as in DINOv2, two thirds of them, rounded up to a multiple of 8."""
    hidden = int(mlp_ratio * width)
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if mlp == "swiglu" else hidden


def block_flops(tokens: int, width: int, *, mlp_ratio: float, mlp: str = "gelu") -> float:
    """FLOPs of a forward pass of one example's tokens through the attention and the MLP of one block.

    A FLOP count here and in the models is 2 for each multiply-add of every matrix product, the attention's own among them:
    projections 8 n d^2, queries by keys and weights by values 4 n^2 d, MLP 4 n d hidden ("swiglu" 6). Left out everywhere: norms,
    softmax, activations, biases, positions, lookups in tables.
    """
    projections, core = 8.0 * tokens * width**2, 4.0 * tokens**2 * width
    matrices = 3 if mlp == "swiglu" else 2
    return projections + core + 2.0 * matrices * tokens * width * mlp_hidden(width, mlp_ratio, mlp=mlp)


def time_embedding_flops(width: int) -> float:
    """FLOPs of a `TimeEmbedding` of one number."""
    return 2.0 * (256 * width + width**2)


def modulate(x: Float[Array, "b n d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"]) -> Float[Array, "b n d"]:
    """x (1 + scale) + shift, the same for all tokens of an example (DiT, arXiv 2212.09748)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def sincos_1d(x: Float[Array, "b"], width: int, *, period: float = 1e4) -> Float[Array, "b d"]:
    """[cos | sin] of x at width/2 frequencies from 1 down to nearly 1/period (arXiv 1706.03762), in float32."""
    frequency = period ** (-np.arange(width // 2) / (width // 2))
    angle = x.astype(jnp.float32)[:, None] * frequency.astype(np.float32)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def patchify(images: Float[Array, "b y x c"], patch: int) -> Float[Array, "b n p"]:
    """Cuts images into patches in reading order; within one the order is (patch row, patch column, channel).

    Raises:
      UserError: the images are not square, or the patch does not divide them.
    """
    b, y, x, c = images.shape
    if y != x or y % patch:
        raise UserError(f"images of {y}x{x} pixels cannot be cut into patches of {patch}; make them square and a multiple of it")
    grid = images.reshape(b, y // patch, patch, x // patch, patch, c)
    return jnp.transpose(grid, (0, 1, 3, 2, 4, 5)).reshape(b, (y // patch) * (x // patch), patch * patch * c)


def unpatchify(patches: Float[Array, "b n p"], patch: int) -> Float[Array, "b y x c"]:
    """Puts square images together again: the inverse of `patchify`."""
    b, n, _ = patches.shape
    side = math.isqrt(n)
    grid = jnp.transpose(patches.reshape(b, side, side, patch, patch, -1), (0, 1, 3, 2, 4, 5))
    return grid.reshape(b, side * patch, side * patch, -1)


def drop_subsets(keys: Key[Array, "g"], *, depth: int, rows: int, rate: float) -> Int[Array, "depth 2 g keep"]:
    """The rows whose residuals are computed under drop path: of every group and both residuals of every block, a random subset.

    Stochastic depth (arXiv 1603.09382) by subsets of the batch, as DINOv2 trains: what is dropped is not computed. The groups are fixed,
    so subsets depend neither on devices nor on processes, and whole groups on a device need nothing from another.

    Args:
      keys: one for each group.
      rows: examples in a group.
      rate: share that is dropped, from 0 to 1; keep = max(1, int(rows * (1 - rate))).

    Returns:
      places within the group, rising, int32.
    """
    keep = max(1, int(rows * (1 - rate)))
    order = jnp.argsort(jax.vmap(lambda key: jax.random.uniform(key, (depth, 2, rows)))(keys), axis=-1)
    return jnp.moveaxis(jnp.sort(order[..., :keep], axis=-1), 0, 2).astype(jnp.int32)


def add_residual(x: Float[Array, "b n d"], residual: Callable, kept: Int[Array, "g keep"] | None = None) -> Float[Array, "b n d"]:
    """x + residual(x), computed only for the rows `kept` of every group and there rows / keep times as large, so that its mean stays.

    Shapes: residual takes and gives [rows, n, d], and treats each example alone. Other rows of x pass unchanged.

    Args:
      kept: see `drop_subsets`; the examples lie group by group. None computes every residual.

    Raises:
      UserError: the batch does not divide into the groups.
    """
    if kept is None:
        return x + residual(x)
    (b, *shape), (groups, keep) = x.shape, kept.shape
    if b % groups:
        raise UserError(f"a batch of {b} does not divide into {groups} groups of drop path")
    known = {"unique_indices": True, "indices_are_sorted": True, "mode": "promise_in_bounds"}
    grouped = x.reshape(groups, b // groups, *shape)
    few = jax.vmap(lambda x, kept: x.at[kept].get(**known))(grouped, kept)
    update = residual(few.reshape(groups * keep, *shape)) * (b // groups / keep)
    return jax.vmap(lambda x, kept, y: x.at[kept].add(y, **known))(grouped, kept, update.reshape(few.shape)).reshape(x.shape)


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
    """Applies `depth` copies of a block, x = block(x, *shared, *own), each with its own parameters, stacked along axis 0.

    One compiled layer serves them all, so that compile time does not grow with depth.

    Args:
      block: a module of the caller; its name becomes the name of the stacked parameters.
      shared: what every layer reads besides x: arrays, tuples of arrays, None.
      own: what each layer reads of its own: arrays whose axis 0 counts layers, None.
      every: returns the outputs of all blocks, [depth, ...], instead of the last one's.
      remat: what the backward pass finds stored: everything ("none"), the products of dense layers ("dots"), or only each block's
        input ("full"); the rest is computed again.
      unroll: layers in a turn of the loop, 0 for all: slower to compile, with fewer of the copies that a loop makes of what it stores.

    Raises:
      UserError: there is no such remat.
    """
    if remat not in REMAT:
        raise UserError(f"remat={remat!r} is not one of {', '.join(REMAT)}")

    def body(block, x, *inputs):
        x = constrain(block(constrain(x), *inputs))
        return x, (x if every else None)

    if remat != "none":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
        # within a loop nothing can be merged with the forward pass, so its costly guard is left out
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


def block_layer(name: str, shape: tuple[int, ...], *, depth: int) -> np.ndarray | int:
    """Layers between each layer of a stacked parameter of `blocks` and the head; else 0."""
    return np.arange(depth, 0, -1) if re.match("blocks/", name) else 0
