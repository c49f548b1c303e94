"""Machines that are not here; their compilers themselves are asked where they are installed."""

import dataclasses
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from dlc_jax import memory, parallel
from dlc_jax.errors import UserError
from dlc_jax.plan import machine
from dlc_jax.plan.chip import examples

tpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no libtpu: pip install '.[tpu]'"
)
gpu = pytest.mark.skipif(
    machine._cuda_plugin() is None, reason="no CUDA plug-in: pip install '.[cuda-plan]'"
)


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    for name, value in machine.SETTINGS.items():
        monkeypatch.setenv(name, value)
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)


@tpu
@pytest.mark.parametrize(
    ("name", "kind", "devices", "chips", "slices"),
    [
        ("v5e:1x1", "v5e", 1, 1, 1),
        ("v5e:8x16", "v5e", 128, 128, 1),
        ("v4:2x2x2", "v4", 8, 8, 1),  # both cores of a chip are one device
        ("v5p:16x16x24", "v5p", 6144, 6144, 1),
        ("v6e:16x16", "v6e", 256, 256, 1),
        ("tpu7x:4x4x4", "tpu7x", 128, 64, 1),  # and here they are two
        ("2*v5e:4x4", "v5e", 32, 32, 2),
        ("3*tpu7x:2x2x1", "tpu7x", 24, 12, 3),
    ],
)
def test_tpu(name, kind, devices, chips, slices):
    found = machine.find(name)
    assert (found.name, found.kind, found.platform) == (name, kind, "tpu")
    assert (len(found.devices), found.chips, found.slices) == (devices, chips, slices)
    assert {device.platform for device in found.devices} == {"tpu"}
    each = devices // slices
    assert [getattr(device, "slice_index", 0) for device in found.devices] == [
        index // each for index in range(devices)
    ]
    assert (found.hbm_note, found.compiler_options) == ("", {})


@gpu
@pytest.mark.parametrize(
    ("name", "hosts"), [("h100:1", 1), ("h200:4", 1), ("h200:8", 1), ("h200:64", 8)]
)
def test_gpu(name, hosts):
    found = machine.find(name)
    count = int(name.split(":")[1])
    assert (found.platform, len(found.devices), found.chips, found.slices) == (
        "gpu",
        count,
        count,
        hosts,
    )
    assert [device.process_index for device in found.devices] == [
        index // 8 for index in range(count)
    ]
    assert {device.device_kind for device in found.devices} == {f"NVIDIA {found.kind.upper()}"}


@gpu
def test_a_gpu_has_the_memory_that_jax_takes(monkeypatch):
    whole = machine.GPU["h200"].hbm_bytes
    found = machine.find("h200:1")
    assert found.hbm_bytes == int(0.92 * whole)
    assert "92%" in found.hbm_note and "XLA_CLIENT_MEM_FRACTION" in found.hbm_note
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", ".95")
    assert machine.find("h200:1").hbm_bytes == int(0.95 * whole)
    for wrong in ("most", "0", "nan"):
        monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", wrong)
        with pytest.raises(UserError, match=f"XLA_CLIENT_MEM_FRACTION='{wrong}'"):
            machine.find("h200:1")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("", "valid are v4:AxBxC, v5e:AxB, v5p:AxBxC, v6e:AxB, tpu7x:AxBxC, h100:N, h200:N"),
        ("v5e", "nearest: v5e:"),
        ("v7x:2x2x1", "tpu7x:2x2x1"),
        ("V5E:8X16", "v5e:8x16"),
        ("v5e:8x", "v5e:8x8"),
        ("h300:8", "h200:8"),
        ("2*h200:8", "h200:8"),
        ("h200:8x8", "h200:8"),
        (
            "v5e:3x4",
            "A and B even, up to 256 chips a slice and 64 slices; nearest: v5e:2x4, v5e:4x4",
        ),
        ("v5e:16x32", "nearest: v5e:8x8, v5e:8x16, v5e:16x16"),
        ("v5e:2x2x1", "AxB with"),
        ("v5p:4x4", "AxBxC with"),
        ("v5p:16x20x28", "up to 6144 chips"),
        ("v5e:0x0", "nearest: v5e:1x1"),
        ("0*v5e:4x4", "64 slices"),
        ("65*v5e:4x4", "64 slices"),
        ("h200:0", "nearest: h200:8"),
        ("h200:12", "nearest: h200:8"),
        ("h200:8192", "nearest: h200:4096"),
    ],
)
def test_unknown(name, told):
    with pytest.raises(UserError) as caught:
        machine.find(name)
    assert repr(name) in str(caught.value) and told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_compilers_that_are_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"v5e:4x4: libtpu.*pip install '\.\[tpu\]'"):
        machine.find("v5e:4x4")
    with pytest.raises(UserError, match=r"h200:8: .*pip install '\.\[cuda-plan\]'"):
        machine.find("h200:8")
    listing = machine.listing()
    assert (
        "NOT INSTALLED: pip install '.[tpu]'" in listing
        and "NOT INSTALLED: pip install '.[cuda-plan]'" in listing
    )


@tpu
def test_a_refusal_by_libtpu_is_the_users_to_read(monkeypatch):
    monkeypatch.setitem(machine.TPU, "v9z", machine.TPU["v5e"])
    with pytest.raises(
        UserError, match=r"v9z:4x4: the compiler installed here refuses it \(INVALID_ARGUMENT.*v9z"
    ) as caught:
        machine.find("v9z:4x4")
    assert "\n" not in str(caught.value)


@tpu
@gpu
def test_everything_listed_can_be_found():
    listing = machine.listing()
    assert "NOT INSTALLED" not in listing
    for name in examples():
        kind, shape = name.split(":")
        row = next(line for line in listing.splitlines() if line.startswith(f"  {kind}:"))
        assert f" {shape}" in row
        assert machine.find(name).name == name


@tpu
@pytest.mark.parametrize("kind", machine.TPU)
def test_memory_of_the_table_is_the_compilers(kind):
    found = machine.find(f"{kind}:{machine.TPU[kind].example[0]}")
    size = found.hbm_bytes  # twice that is wanted
    x = jax.ShapeDtypeStruct(
        (size // 4,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(found.devices[0])
    )
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.jit(lambda x: x * 2).lower(x).compile()
    refusal = memory.refusal(caught.value)
    # the refusal has two digits after the point
    assert abs(refusal.available - found.hbm_bytes) < 0.006 * 2**30
    assert abs(refusal.wanted - 2 * size) < 0.01 * 2**30


def test_clocks_are_what_the_matrix_units_need_for_the_peak():
    per_cycle = {
        "v4": 8 * 128**2,
        "v5e": 4 * 128**2,
        "v5p": 8 * 128**2,
        "v6e": 4 * 256**2,
        "tpu7x": 4 * 256**2,
    }
    for kind, chip in machine.TPU.items():
        assert 2 * per_cycle[kind] * chip.clock == pytest.approx(chip.flops, rel=0.003)


QUIET = """
import sys
from dlc_jax.plan import machine
assert "jax" not in sys.modules
machine.listing()
assert "jax" not in sys.modules
machine.environment()
import jax, jax.numpy as jnp
for name in sys.argv[1:]:
    found = machine.find(name)
    there = jax.sharding.SingleDeviceSharding(found.devices[0])
    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=there)
    jax.jit(lambda x: jnp.tanh(x @ x)).lower(x).compile(compiler_options=found.compiler_options)
    print(name)
print(jax.default_backend())
"""


@tpu
@gpu
def test_a_plan_says_nothing_of_its_own():
    names = ["v5e:4x4", "h200:8"]
    outside = {name: value for name, value in os.environ.items() if name not in machine.SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", QUIET, *names],
        capture_output=True,
        text=True,
        env=outside | {"JAX_PLATFORMS": "cuda"},
    )
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, [*names, "cpu"], "")


def test_what_is_not_foreign_comes_out(capfd):
    with machine._without_foreign_lines():
        os.write(2, b"I0000 00:00:1 1 cudart_stub.cc:31] Could not find cuda drivers on your ")
        os.write(2, b"machine, GPU will not be used.\n")
        os.write(2, b"something broke\n")
    os.write(2, b"after\n")
    with pytest.raises(ZeroDivisionError), machine._without_foreign_lines():
        os.write(2, b"before the error\n")
        1 / 0  # noqa: B018
    assert capfd.readouterr().err == "something broke\nafter\nbefore the error\n"


def test_a_machine_is_not_changed_by_hand():
    with pytest.raises(dataclasses.FrozenInstanceError):
        machine.TPU["v5e"].flops = 1.0


@tpu
@pytest.mark.parametrize(
    "name, fsdp", [("v5e:16x16", 16), ("v5e:8x16", 16), ("v5p:4x4x8", 8), ("v6e:16x16", 16)]
)
def test_neighbors_on_fsdp_are_neighbors_on_the_torus(name, fsdp):
    """Every group is a ring: each device one hop from the next, the last from the first."""
    devices = machine.find(name).devices
    sides = [max(device.coords[axis] for device in devices) + 1 for axis in range(3)]
    mesh = parallel.make_mesh(data=-1, fsdp=fsdp, devices=devices)

    def hops(one, other):
        return sum(
            min((a - b) % side, (b - a) % side)
            for a, b, side in zip(one.coords, other.coords, sides)
        )

    for group in mesh.devices[:, :, 0]:
        assert [hops(group[place - 1], group[place]) for place in range(fsdp)] == [1] * fsdp


@tpu
def test_slices_stay_whole_on_the_mesh():
    mesh = parallel.make_mesh(
        data=2, fsdp=16, dcn_data=2, devices=machine.find("2*v5e:4x4").devices
    )
    assert [{device.slice_index for device in group.ravel()} for group in mesh.devices] == [
        {0},
        {1},
    ]
    with pytest.raises(UserError, match="these devices are 2 slices, .* set mesh.dcn_data=2"):
        parallel.make_mesh(data=2, fsdp=16, devices=machine.find("2*v5e:4x4").devices)
