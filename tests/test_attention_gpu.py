"""Attention for GPUs, without one: interpreted, refused, lowered and compiled."""

import functools
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from attention_errors import OPTIONS, errors, inputs
from commands import ROOT

from dlc_jax import parallel
from dlc_jax.errors import UserError
from dlc_jax.kernels import attention as entry
from dlc_jax.kernels import cudnn, measured, pallas_gpu, tokamax
from dlc_jax.kernels import triton_attention as program
from dlc_jax.kernels.attention import attention
from dlc_jax.models.positions import rotary

CUDA = os.environ.get("DLC_CUDA_PLAN", "")
MODELS = {  # name: n, h, k, options
    "DiT-XL/2": (256, 16, 72, ()),
    "DiT-XL/2, normalized and rotated": (256, 16, 72, ("rotary", "qk_scale")),
    "DiT-XL/2, 9 heads": (256, 9, 128, ()),
    "ViT-L, global crop": (261, 16, 64, ()),
    "ViT-L, local crop": (54, 16, 64, ()),
    "SEDD-medium": (512, 16, 64, ("rotary",)),
}


def largest(n, k, dtype, options, *, b=2, h=2, seed=0):
    return max(errors(pallas_gpu.attention, *inputs(b, n, h, k, dtype, options, seed)))


@pytest.mark.parametrize("options", [(), OPTIONS])
def test_small_heads_equal_float64(options):
    assert largest(21, 12, jnp.float32, options) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("k", [64, 72, 128])
@pytest.mark.parametrize(
    "n, options", [(1, ()), (16, ("mask",)), (54, OPTIONS), (256, ("causal",)), (261, ())]
)
def test_equals_float64(n, k, options):
    dtype, bound = (jnp.bfloat16, 1e-2) if n in (54, 261) else (jnp.float32, 1e-5)
    assert largest(n, k, dtype, options, b=1) < bound


@pytest.mark.parametrize("size", range(1, 129))
def test_pieces_cover_the_columns_once(size):
    found = program.pieces(3, size)
    columns = [first + i for first, _, used in found for i in range(used)]
    assert columns == list(range(3, 3 + size))
    assert all(width >= used and width & (width - 1) == 0 for _, width, used in found)
    assert sum(width for _, width, _ in found) <= max(16, 2 * size)


def test_on_a_mesh_equals_one_device():
    mesh = parallel.make_mesh(data=2, fsdp=2, tensor=2)
    qkv, _, given = inputs(4, 16, 2, 16, jnp.float32, OPTIONS)
    run = jax.jit(lambda qkv: attention(qkv, implementation="pallas_gpu", **given))
    with jax.set_mesh(mesh):
        found = run(qkv)
    assert jnp.allclose(found, run(qkv), atol=1e-6)


def refused(module, *, n=16, k=64, dtype=jnp.bfloat16, platform="gpu", **given):
    qkv = jax.ShapeDtypeStruct((2, n, 3, 4, k), dtype)
    return module.refusal(qkv, platform=platform, **given)


def test_refusals_name_the_reason():
    assert refused(pallas_gpu) is None and refused(pallas_gpu, platform="cpu") is None
    assert "not on 'tpu'" in refused(pallas_gpu, platform="tpu")
    assert "heads of 256 are wider" in refused(pallas_gpu, k=256)
    assert "not float64" in refused(pallas_gpu, dtype=jnp.dtype("float64"))
    assert "not on 'cpu'" in refused(cudnn, platform="cpu")
    assert "not float32" in refused(cudnn, dtype=jnp.float32)
    assert "not of 36" in refused(cudnn, k=36)
    assert "not 261" in refused(cudnn, n=261, mask=True)
    assert "no GPU" in refused(cudnn)
    assert "pip install tokamax" in refused(tokamax)
    with pytest.raises(UserError, match="'cudnn' cannot run: cuDNN runs on NVIDIA GPUs only"):
        attention(jnp.zeros((1, 4, 3, 1, 8), jnp.bfloat16), implementation="cudnn")


def test_an_old_gpu_is_refused(monkeypatch):
    class T4:
        device_kind, compute_capability = "Tesla T4", "7.5"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [T4])
    assert "this GPU has 7.5" in refused(pallas_gpu)
    T4.compute_capability = "gfx942"
    assert "this is a Tesla T4" in refused(pallas_gpu)


def test_none_takes_on_a_gpu_what_was_measured_there(monkeypatch):
    monkeypatch.setattr(entry, "_platform", lambda: "gpu")
    monkeypatch.setattr(measured, "FASTEST", {(72, 256): "pallas_gpu", (64, 64): "tokamax"})

    def chosen(n, k, dtype=jnp.bfloat16, chip="NVIDIA H100 80GB HBM3"):
        monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=chip)])
        inputs = dict.fromkeys(("mask", "rotary", "qk_scale"), None) | {"causal": False}
        return entry._chosen(None, jax.ShapeDtypeStruct((2, n, 3, 4, k), dtype), inputs)

    assert chosen(256, 72) == chosen(200, 72) == "pallas_gpu"
    assert chosen(257, 72) == chosen(256, 64) == chosen(256, 72, jnp.float32) == "xla"
    assert chosen(256, 72, chip="NVIDIA A100") == "xla"
    assert chosen(54, 64) == "xla"  # it is not installed


def traced(n, h, k, options, *, b=4, sharding=None):
    """Traces of attention and of its gradient, in bfloat16."""
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    qkv, scale = shape((b, n, 3, h, k), jnp.bfloat16), shape((k,), jnp.float32)
    given = {"rotary": rotary(n, k)} if "rotary" in options else {}

    def run(qkv, qk_scale):
        qk_scale = (qk_scale, qk_scale) if "qk_scale" in options else None
        return pallas_gpu.attention(qkv, qk_scale=qk_scale, **given)

    def back(qkv, qk_scale):
        out, pull = jax.vjp(run, qkv, qk_scale)
        return pull(out)

    return [jax.jit(each).trace(qkv, scale) for each in (run, back)]


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_lowers_for_cuda(model):
    forward, both = traced(*MODELS[model])
    text = forward.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("attention_forward") and "transpose" not in text
    text = both.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("attention_backward")


def compiled():
    """Of this module as a program, beside the CUDA plug-in: temporary bytes of each model's."""
    from dlc_jax.plan import machine

    machine.environment()
    h200 = machine.find("h200:1")
    sharding = jax.sharding.SingleDeviceSharding(h200.devices[0])
    for name, sizes in MODELS.items():
        n, h, k, _ = sizes
        for trace, arrays in zip(traced(*sizes, sharding=sharding), (4, 8)):
            lowered = trace.lower(lowering_platforms=("cuda",))
            program = lowered.compile(compiler_options=h200.compiler_options)
            assert "conditional(" not in program.as_text()  # of CPUs nothing is left
            memory = program.memory_analysis()
            assert memory.temp_size_in_bytes < arrays * 4 * n * h * k * 2, (name, memory)
        print("compiled", name, flush=True)


@pytest.mark.slow
@pytest.mark.skipif(not CUDA, reason="DLC_CUDA_PLAN names no folder of the extra cuda-plan")
def test_compiles_for_h200_and_keeps_no_logits():
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), CUDA])
    done = subprocess.run(
        [sys.executable, "-c", "import test_attention_gpu; test_attention_gpu.compiled()"],
        env=os.environ | {"PYTHONPATH": path, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.stdout.count("compiled") == len(MODELS), done.stderr[-2000:]
