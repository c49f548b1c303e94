"""Attention over a packed projection: one entry, several implementations."""

import functools
import math

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dlc_jax.errors import UserError
from dlc_jax.kernels import cudnn, measured, pallas_gpu, pallas_tpu, reference, tokamax
from dlc_jax.parallel import BATCH, shares
from dlc_jax.typing import Array, Bool, Float

# name -> module of two functions: `attention`, with the arguments of the one below but for
# `implementation`; and `refusal`, with those and the platform ("cpu", "tpu", "gpu"), which says in
# a clause why they cannot be computed there, or returns None.
IMPLEMENTATIONS = {
    "xla": reference,
    "pallas_tpu": pallas_tpu,
    "pallas_gpu": pallas_gpu,
    "cudnn": cudnn,
    "tokamax": tokamax,
}
# Where none is named, the first of these that does not refuse; "xla" never does.
PREFERRED = {"tpu": ("pallas_tpu",), "gpu": ("xla",)}  # on GPUs after `measured`
SUMS_BIAS = ("pallas_tpu",)  # has the bias's gradient at hand, which costs others a pass in memory
DENSE = "dense"  # names the result of a dense layer for remat


def attention(
    qkv: Float[Array, "b n 3 h k"],
    *,
    bias: Float[Array, "3 h k"] | None = None,
    mask: Bool[Array, "b n"] | None = None,
    rotary: tuple[Float[Array, "*b n half"], Float[Array, "*b n half"]] | None = None,
    qk_scale: tuple[Float[Array, "k"], Float[Array, "k"]] | None = None,
    causal: bool = False,
    implementation: str | None = None,
) -> Float[Array, "b n h k"]:
    """Self-attention, softmax(q k^T / sqrt(k)) v per head, of one packed projection.

    The softmax is computed in float32; the result has the dtype of `qkv`. Queries and keys are
    first normalized, then rotated. On a mesh each device computes its own examples and heads.

    Args:
      qkv: queries, keys and values, in this order along the third dimension.
      bias: of the projection, to be added to `qkv`.
      mask: True for the keys that count. An example needs one at least; without any its output is
        finite but means nothing.
      rotary: cosines and sines of the angle of each token and pair, [n, k/2] each, or [b, n, k/2]
        where examples differ; pair i is (x[i], x[i + k/2]).
      qk_scale: two [k] vectors; divides queries and keys by their root mean square over k, then
        multiplies by these.
      causal: a token reads itself and those before it, no others.
      implementation: one of IMPLEMENTATIONS; None takes the best that can compute this here.

    Raises:
      UserError: there is no implementation of that name, or it cannot compute this here.
    """
    b, n, _, h, k = qkv.shape
    inputs = {"mask": mask, "rotary": rotary, "qk_scale": qk_scale, "causal": causal}
    name = _chosen(implementation, qkv, inputs)
    qkv = qkv.reshape(-1, 3, h, k)
    if bias is not None:
        if name in SUMS_BIAS:
            inputs["bias"], bias = bias, jax.lax.stop_gradient(bias)
        qkv = biased(qkv, bias)
    qkv = checkpoint_name(qkv, DENSE).reshape(b, n, 3, h, k)
    if name == "xla":  # which the compiler partitions by itself
        return reference.attention(qkv, **inputs)
    return _on_mesh(IMPLEMENTATIONS[name].attention, qkv, **inputs)


def biased(y: Float[Array, "n *features"], bias: Float[Array, "*features"]) -> Array:
    """y + bias, as [n, features] where no mesh splits those."""
    bias = bias.astype(y.dtype)
    if jax.sharding.get_abstract_mesh().shape.get("tensor", 1) == 1:
        # Flat, as the product is: TPUs would turn [d, 3, heads, k] and back in memory.
        y, bias = y.reshape(-1, math.prod(bias.shape)), bias.reshape(-1)
    return y + bias


def _platform() -> str:
    """Of the mesh in context, which may be of a machine that is not here; else of this one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    found = device.platform if device else jax.default_backend()
    return "gpu" if found == "cuda" else found


def _chosen(asked: str | None, qkv, inputs) -> str:
    platform = _platform()
    if not asked:
        names = PREFERRED.get(platform, ())
        if platform == "gpu":
            names = (*measured.fastest(qkv), *names)
        fitting = (
            name
            for name in names
            if not IMPLEMENTATIONS[name].refusal(qkv, **inputs, platform=platform)
        )
        return next(fitting, "xla")
    if asked not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise UserError(f"attention implementation {asked!r} is unknown; known: {known}")
    why = IMPLEMENTATIONS[asked].refusal(qkv, **inputs, platform=platform)
    if why:
        raise UserError(f"attention implementation {asked!r} cannot run: {why}; None chooses")
    return asked


def _on_mesh(compute, qkv, *, causal, **places):
    """compute(qkv, ...) of each device's share, where a mesh is in context."""
    mesh = jax.sharding.get_abstract_mesh()
    compute = functools.partial(compute, causal=causal)
    if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return compute(qkv, **places)
    examples = BATCH[0] if len(qkv) % shares(mesh) == 0 else None
    b, n, _, h, k = qkv.shape
    parts = mesh.shape["tensor"] if h % mesh.shape["tensor"] == 0 else 1
    # Where heads stay together they come and go flat: XLA gives [3, h, k] another place in memory
    # than 3 h k, and would copy it there and back.
    came, gone = P(examples), P(examples)
    if parts > 1:
        came, gone = P(examples, None, None, "tensor"), P(examples, None, "tensor")

    def share(qkv, places):
        out = compute(qkv.reshape(-1, n, 3, h // parts, k), **places)
        return out if parts > 1 else out.reshape(-1, n, h * k)

    rotary = places["rotary"]
    tables = rotary and tuple(P() if table.ndim == 2 else P(examples) for table in rotary)
    specs = {"mask": P(examples), "rotary": tables, "qk_scale": P()}
    if "bias" in places:
        specs["bias"] = P(None, "tensor") if parts > 1 else P()
    given = qkv if parts > 1 else qkv.reshape(b, n, -1)
    whole = jax.shard_map(share, in_specs=(came, specs), out_specs=gone, check_vma=False)
    return whole(given, places).reshape(b, n, h, k)
