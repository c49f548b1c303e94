"""Every implementation of attention against one written with numpy in float64."""

import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_attention import exact

from dlc_jax import parallel
from dlc_jax.errors import UserError
from dlc_jax.kernels.attention import IMPLEMENTATIONS, attention
from dlc_jax.models.layers import Attention, scan_blocks
from dlc_jax.models.positions import rotary

B, N, H, K = 2, 7, 3, 8
implementations = pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))
# at most this far from float64, as a share of the largest entry
BOUND = {"float32": 1e-5, "bfloat16": 1e-2}


def inputs(options, seed=0, b=B, n=N, h=H, k=K, dtype="float32", spread=2):
    """{"qkv"} and the options' arguments; "rotary each" turns every example its own way."""
    random = np.random.default_rng(seed)
    mask = random.random((b, n)) < 0.6
    mask[:, 0] = True
    tables = rotary(2 * n, k)
    starts = random.integers(n, size=b)
    every = {
        "mask": jnp.asarray(mask),
        "rotary": tuple(table[:n] for table in tables),
        "rotary each": tuple(jnp.stack([table[i:][:n] for i in starts]) for table in tables),
        "causal": True,
        "qk_scale": tuple(jnp.asarray(random.uniform(0.5, 2, size=(2, k)), jnp.float32)),
        "bias": jnp.asarray(random.normal(size=(3, h, k)), jnp.float32),
    }
    chosen = {name.removesuffix(" each"): every[name] for name in options}
    return {"qkv": jnp.asarray(spread * random.normal(size=(b, n, 3, h, k)), dtype)} | chosen


def run(implementation, data):
    """attention of the inputs; skips where the implementation refuses them."""
    refusal = IMPLEMENTATIONS[implementation].refusal
    rest = {"mask": None, "rotary": None, "qk_scale": None, "causal": False} | data
    rest.pop("bias", None)
    if why := refusal(rest.pop("qkv"), **rest, platform=jax.default_backend()):
        pytest.skip(f"{implementation} refuses: {why}")
    causal = data.get("causal", False)
    given = {name: value for name, value in data.items() if name != "causal"}
    return jax.jit(lambda given: attention(**given, causal=causal, implementation=implementation))(
        given
    )


def check(implementation, data):
    """Output and gradients, of the projection, its bias and the scales, against float64."""
    data, dtype = dict(data), data["qkv"].dtype
    shape = np.delete(data["qkv"].shape, 2)
    dout = jnp.asarray(np.random.default_rng(1).normal(size=shape), dtype)
    known = ("qkv", "qk_scale", "bias")
    differentiated = {name: data[name] for name in known if name in data}

    @jax.jit
    def both(given, dout):
        out, pull = jax.vjp(lambda given: run(implementation, data | given), given)
        return out, pull(dout)[0]

    out, gradients = both(differentiated, dout)
    assert out.dtype == gradients["qkv"].dtype == dtype
    if "bias" in data:
        data["qkv"] += data.pop("bias").astype(dtype)
    wanted = dict(zip(("out", "qkv", "qk_scale"), exact(**data, dout=dout)))
    wanted["bias"] = wanted["qkv"].sum((0, 1))
    for name, found in {"out": out, **gradients}.items():
        wrong = np.abs(np.asarray(found, np.float64) - wanted[name]).max()
        assert wrong <= BOUND[dtype.name] * (np.abs(wanted[name]).max() or 1), name


@implementations
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("mask",),
        ("rotary",),
        ("rotary each",),
        ("qk_scale",),
        ("causal",),
        ("bias",),
        ("mask", "rotary", "qk_scale", "causal", "bias"),
    ],
)
def test_equals_float64(implementation, options):
    check(implementation, inputs(options))


# A Pallas kernel that is interpreted finds its outputs and scratch filled with NaN, so that what it
# leaves unwritten shows.
ALL = ("mask", "rotary", "qk_scale", "causal", "bias")
SIZES = [
    (16, 72, 6, "float32", ("mask", "qk_scale")),
    (54, 64, 1, "bfloat16", ("mask", "bias")),
]
MORE = [
    (1, 64, 2, "float32", ()),
    (1, 72, 2, "bfloat16", ("qk_scale", "rotary")),
    (16, 128, 4, "bfloat16", ALL),
    (49, 64, 3, "float32", ("qk_scale", "rotary")),
    (49, 72, 2, "bfloat16", ("rotary", "causal")),
    (54, 72, 4, "float32", ("rotary each", "mask")),
    (64, 72, 2, "bfloat16", ("qk_scale", "rotary each")),
    (64, 128, 2, "float32", ("mask",)),
    (256, 72, 2, "float32", ("qk_scale", "rotary")),
    (256, 72, 2, "bfloat16", ("bias",)),
    (256, 128, 1, "bfloat16", ("qk_scale",)),
    (261, 64, 2, "float32", ()),
    (261, 72, 1, "bfloat16", ALL),
    (512, 64, 2, "bfloat16", ("rotary",)),
    (512, 128, 1, "float32", ("causal",)),
    (600, 72, 1, "float32", ALL),  # several tiles of queries, the last one shorter
]


@implementations
@pytest.mark.parametrize(
    ("n", "k", "h", "dtype", "options"),
    [*SIZES, *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE)],
)
def test_sizes(implementation, n, k, h, dtype, options):
    data = inputs(options, seed=n, b=4 if n < 100 else 1, n=n, h=h, k=k, dtype=dtype, spread=1)
    check(implementation, data)


@implementations
def test_masked_keys_are_not_read(implementation):
    data = inputs(("mask",))
    hidden = ~data["mask"][:, :, None, None, None] & np.array([False, True, True])[:, None, None]
    changed = data | {"qkv": jnp.where(hidden, 1e4, data["qkv"])}
    np.testing.assert_array_equal(run(implementation, data), run(implementation, changed))


@implementations
def test_an_example_without_keys_stays_finite(implementation):
    data = inputs(()) | {"mask": jnp.zeros((B, N), bool)}
    out, grad = jax.value_and_grad(lambda x: run(implementation, data | {"qkv": x}).sum())(
        data["qkv"]
    )
    assert np.isfinite(out) and np.isfinite(grad).all()


@implementations
def test_rotary_reads_offsets_only(implementation):
    data = inputs(())
    cos, sin = rotary(N + 5, K)
    first, later = (
        run(implementation, data | {"rotary": (cos[start:][:N], sin[start:][:N])})
        for start in (0, 5)
    )
    np.testing.assert_allclose(first, later, atol=1e-5)
    assert np.abs(first - run(implementation, data)).max() > 0.1


@implementations
def test_qk_norm_ignores_the_scale_of_queries_and_keys(implementation):
    data = inputs(("qk_scale",))
    scaled = data["qkv"] * np.array([7.0, 0.3, 1.0], np.float32)[:, None, None]
    out, after = (run(implementation, data | {"qkv": x}) for x in (data["qkv"], scaled))
    np.testing.assert_allclose(out, after, atol=1e-4)


@implementations
@pytest.mark.parametrize(
    ("b", "tensor"),
    [(4, 2), (4, 1), pytest.param(3, 2, marks=pytest.mark.slow)],  # 3 is not cut
)
def test_on_a_mesh_equals_one_device(implementation, b, tensor):
    data = inputs(("mask", "rotary each", "qk_scale", "bias"), b=b, h=4)

    def loss(given):
        out = run(implementation, data | given)
        return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum()

    given = {name: data[name] for name in ("qkv", "qk_scale", "bias")}
    wanted = jax.jit(jax.value_and_grad(loss))(given)
    devices = jax.devices()[: 4 * tensor]
    with jax.set_mesh(parallel.make_mesh(data=2, fsdp=2, tensor=tensor, devices=devices)):
        found = jax.jit(jax.value_and_grad(loss))(given)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, wanted)


@pytest.mark.slow
@implementations
def test_mapped_over_an_axis(implementation):
    data = inputs(("mask",), b=4)
    stacked = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), data)

    def gradient(data):
        return jax.grad(lambda x: (run(implementation, data | {"qkv": x}) ** 2).sum())(data["qkv"])

    found, wanted = jax.jit(jax.vmap(gradient))(stacked), jax.jit(gradient)(data)
    np.testing.assert_allclose(found.reshape(wanted.shape), wanted, atol=1e-5)


class Blocks(nn.Module):
    implementation: str

    @nn.compact
    def __call__(self, x):
        block = Attention(4, qk_norm=True, implementation=self.implementation, name="blocks")
        return scan_blocks(block, x, depth=2)


@pytest.mark.slow
@implementations
def test_in_scanned_blocks_on_a_mesh(implementation):
    """Remat within a scan within a mesh, as models call it."""
    run(implementation, inputs(("qk_scale",), b=8, h=4))  # or skips
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, N, 4 * K)), jnp.float32)
    params = Blocks("xla").init(jax.random.key(0), x)

    def gradient(name):
        return jax.jit(jax.grad(lambda p: (Blocks(name).apply(p, x) ** 2).sum()))(params)

    wanted = gradient("xla")
    with jax.set_mesh(parallel.make_mesh(data=2, fsdp=2, tensor=2)):
        found = gradient(implementation)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, wanted)


PROGRAM = """
import jax, jax.numpy as jnp
from dlc_jax.kernels.attention import attention
def loss(qkv, bias, scale):
    out = attention(qkv, bias=bias, qk_scale=(scale, scale), implementation="pallas_tpu")
    return out.sum()
given = jnp.ones((2, 8, 3, 2, 8)), jnp.ones((3, 2, 8)), jnp.ones(8)
print(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*given))
"""


@pytest.mark.slow
def test_every_host_makes_the_same_program():
    """Hosts hash names differently, and must not order anything by it."""
    found = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env=os.environ | {"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in "12345"
    ]
    assert "attention_backward" in found[0] and len(set(found)) == 1


def test_unknown_implementation_is_named():
    with pytest.raises(UserError, match="'fast'.*xla"):
        attention(jnp.zeros((1, 2, 3, 1, 4)), implementation="fast")


def test_an_implementation_that_cannot_run_says_why():
    with pytest.raises(UserError, match="'pallas_tpu' cannot run: heads of 4 are not"):
        attention(jnp.zeros((1, 2, 3, 1, 4)), implementation="pallas_tpu")
    with pytest.raises(UserError, match="4096 tokens of 16 heads of 72 need .* MiB of VMEM"):
        attention(jnp.zeros((1, 4096, 3, 16, 72)), implementation="pallas_tpu")
