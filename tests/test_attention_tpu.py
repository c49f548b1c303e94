"""The TPU kernel compiled for machines that are not here: every shape of the paper's models."""

import importlib.util
import itertools
import pathlib

import jax
import jax.numpy as jnp
import pytest

from dlc_jax import parallel
from dlc_jax.kernels.attention import attention
from dlc_jax.plan import machine, program

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="no libtpu: pip install '.[tpu]'"
    ),
]
ROOT = pathlib.Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("static", ROOT / "benchmarks" / "static.py")
static = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(static)

# name -> (examples, tokens, heads, size of a head, options)
PAPER = {
    "DiT-XL/2": (32, 256, 16, 72, ()),
    "DiT-XL/2, modern": (32, 256, 16, 72, ("qk_scale", "rotary")),
    "codes in context": (32, 320, 16, 72, ()),
    "wide heads": (32, 256, 9, 128, ()),
    "ViT-L/14, global": (16, 261, 16, 64, ()),
    "ViT-L/14, local": (64, 54, 16, 64, ()),
    "SEDD-medium": (16, 512, 16, 64, ("rotary",)),
}
OTHERS = {  # for one machine alone
    "tokens dropped": (32, 64, 16, 72, ("qk_scale", "rotary each")),
    "512 pixels": (8, 1024, 16, 72, ()),
    "half of the heads": (32, 256, 8, 72, ()),  # mesh.tensor=2
    "masked": (32, 49, 12, 64, ("mask", "causal")),
    "one token": (32, 1, 12, 64, ()),
}
SHAPES = PAPER | OTHERS


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    for name, value in machine.SETTINGS.items():
        monkeypatch.setenv(name, value)


def arguments(shape, placed):
    b, n, _, k, options = shape

    def array(shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    every = {
        "mask": array((b, n), bool),
        "qk_scale": (array((k,)),) * 2,
        "rotary": (array((n, k // 2)),) * 2,
        "rotary each": (array((b, n, k // 2)),) * 2,
    }
    chosen = {name.removesuffix(" each"): every[name] for name in options if name in every}
    return array((b, n, 3, *shape[2:4]), jnp.bfloat16), chosen


@pytest.mark.parametrize(
    ("kind", "name"),
    [*itertools.product(static.MACHINES, PAPER), *(("v5e", name) for name in OTHERS)],
)
def test_compiles_forward_and_backward(kind, name):
    found = machine.find(static.MACHINES[kind])
    mesh = parallel.make_mesh(devices=found.devices[:1])
    qkv, given = arguments(SHAPES[name], parallel.replicated(mesh))
    causal = "causal" in SHAPES[name][-1]

    @jax.jit
    def both(qkv, given, dout):
        bias = jnp.zeros(qkv.shape[2:])
        out, pull = jax.vjp(
            lambda qkv, bias: attention(qkv, bias=bias, causal=causal, **given), qkv, bias
        )
        return out, pull(dout)

    with jax.set_mesh(mesh):  # None takes the kernel there
        lowered = both.lower(qkv, given, jax.eval_shape(lambda x: x[:, :, 0], qkv))
    assert lowered.as_text().count("tpu_custom_call") >= 2
    lowered.compile()


def test_too_long_for_a_program_takes_xla():
    found = machine.find("v5e:2x2")
    mesh = parallel.make_mesh(devices=found.devices[:1])
    qkv, _ = arguments((1, 4096, 16, 72, ()), parallel.replicated(mesh))
    with jax.set_mesh(mesh):
        assert "tpu_custom_call" not in jax.jit(attention).lower(qkv).as_text()


@pytest.mark.parametrize("kind", ["v5e", "v5p"])
def test_the_sub_block_moves_few_bytes(kind):
    """At most 0.40 of what it moves with XLA's attention, at DiT-XL/2's shape."""
    found = machine.find(static.MACHINES[kind])
    ours, xla = (
        static.sub_block(found, static.SHAPES["DiT-XL/2"], kernel=kernel, backward=True)
        for kernel in (True, False)
    )
    assert program.memory(ours).temporaries < program.memory(xla).temporaries
    counted = [each.cost_analysis()["bytes accessed"] for each in (ours, xla)]
    assert counted[0] <= 0.40 * counted[1]
