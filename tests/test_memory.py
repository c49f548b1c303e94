"""Memory that does not suffice is one line with the numbers and what to change, exit code 2."""

import os
import subprocess
import sys
import types

import commands
import pytest

from dlc_jax import command, memory
from dlc_jax.errors import UserError
from dlc_jax.memory import Shortage
from dlc_jax.stage import Plan

GIB = 2**30


class JaxRuntimeError(RuntimeError):
    """What jax calls its error; XlaRuntimeError in older versions."""


FORMS = {
    "libtpu": (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (7.40T) exceeds available HBM (94.75G).",
        Shortage(int(7.40 * 2**40), int(94.75 * GIB), is_program=True),
    ),
    "libtpu_code": (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: … HLO temporaries (16.48G) exceeds "
        "available HBM (15.75G)",
        Shortage(int(16.48 * GIB), int(15.75 * GIB), is_program=True),
    ),
    "libtpu_before": (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 20.00G of 15.75G hbm. Exceeded hbm capacity by 4.25G.\n\nTotal hbm usage >= "
        "20.51G:\n    reserved        530.00M\n    program          20.00G\n",
        Shortage(20 * GIB, int(15.75 * GIB), is_program=True),
    ),
    "tpu_load": (
        "RESOURCE_EXHAUSTED: Error loading program 'jit_step': Attempting to reserve 3.95G at the "
        "bottom of memory. That was not possible. There are 1.92G free, 0B reserved, and 1.92G "
        "reservable.: while running replica 0",
        Shortage(int(3.95 * GIB), int(1.92 * GIB), is_free=True),
    ),
    "tpu_allocate": (
        "RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 512.00M. That "
        "was not possible. There are 96.50M free.; (0x0x0_HBM0)",
        Shortage(512 * 2**20, int(96.5 * 2**20), is_free=True),
    ),
    "gpu": (
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12345 bytes.\nBufferAssignment "
        "OOM Debugging.\nBufferAssignment stats:\n   parameter allocation:  372.76MiB\n",
        Shortage(12345),
    ),
    "gpu_new": (
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2.50GiB.",
        Shortage(int(2.5 * GIB)),
    ),
    "gpu_request": (
        "RESOURCE_EXHAUSTED: Failed to allocate request for 2.99GiB (3206250496B) on device "
        "ordinal 0",
        Shortage(3206250496),
    ),
    "gpu_request_only": (
        "RESOURCE_EXHAUSTED: Failed to allocate request for 1.5GiB",
        Shortage(int(1.5 * GIB)),
    ),
    "gpu_allocator": (
        "RESOURCE_EXHAUSTED: Allocator (GPU_0_bfc) ran out of memory trying to allocate 3.37GiB "
        "with freed_by_count=0.",
        Shortage(int(3.37 * GIB)),
    ),
    "gpu_driver": (
        "INTERNAL: Failed to load in-memory CUBIN: CUDA_ERROR_OUT_OF_MEMORY: out of memory",
        Shortage(),
    ),
    "cpu": (
        "RESOURCE_EXHAUSTED: Out of memory allocating 140737488355328 bytes.",
        Shortage(2**47),
    ),
    "cpu_bare": ("INTERNAL: std::bad_alloc", Shortage()),
}


@pytest.mark.parametrize(("text", "expected"), FORMS.values(), ids=FORMS)
def test_what_an_error_says(text, expected):
    assert memory.shortage(JaxRuntimeError(text)) == expected
    assert memory.refusal(RuntimeError(text)) == (expected if expected.is_program else None)


@pytest.mark.parametrize(
    "text",
    [
        "RESOURCE_EXHAUSTED: Allocation (size=268435456) would exceed memory (size=134217728) :: "
        "space=vmem",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 200.00M of 128.00M vmem.",
        "RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 270336, available 232448 "
        "of shared memory",
        "RESOURCE_EXHAUSTED: CLIENT: Received message larger than max (5 vs. 4)",
        "INVALID_ARGUMENT: exceeds available HBM",
    ],
)
def test_other_errors_stay_what_they_are(text):
    error = JaxRuntimeError(text)
    assert memory.shortage(error) is None and memory.line(error) is None
    with pytest.raises(JaxRuntimeError) as caught:
        command.outcome(raising(error))
    assert caught.value is error


def test_an_error_of_the_code_is_not_about_memory():
    assert memory.shortage(RuntimeError("out of memory")) is None
    assert memory.shortage(ValueError(FORMS["cpu"][0])) is None


def raising(error):
    def run():
        raise error

    return run


def test_any_command_ends_in_a_line(capsys, monkeypatch):
    monkeypatch.setattr(memory, "_host_bytes", lambda: 16 * GIB)
    assert command.outcome(raising(JaxRuntimeError(FORMS["cpu"][0]))) == 2
    assert command.outcome(raising(MemoryError())) == 2
    assert capsys.readouterr().err.splitlines() == [
        "dlc_jax: out of memory: 128.00 TiB asked for, the host has 16.00 GiB; lower the batch, or "
        "how much is computed at once",
        "dlc_jax: out of memory: the host has 16.00 GiB; lower the batch, or how much is computed "
        "at once",
    ]


class Section(dict):
    def to_dict(self):
        return dict(self)


def refused(error, *, step=None, remat="dots", data=1, fsdp=8):
    """The line of an error in a step of 512 examples in groups of 8."""
    step = step or types.SimpleNamespace(plan=Plan(batch=512), group=8)
    mesh = types.SimpleNamespace(shape={"data": data, "fsdp": fsdp, "tensor": 1})
    section = Section(model={"backbone": {"remat": remat}})
    with (
        pytest.raises(UserError) as caught,
        memory.during("encoder", step, section, mesh=mesh, workdir="W"),
    ):
        raise error
    assert caught.value.__cause__ is error and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_step_says_what_to_change(monkeypatch):
    monkeypatch.setattr(memory, "_device", lambda: ("TPU v5 lite", None))
    monkeypatch.setattr(memory, "topology", lambda: "v5e:2x4")
    line = refused(JaxRuntimeError(FORMS["libtpu_before"][0]))
    assert line == (
        "encoder: out of memory: 20.00 GiB needed, TPU v5 lite has 15.75 GiB; set "
        "--config.encoder.train.accumulate=2 (now 1), or '--config.encoder.model*.remat=full' in a "
        "new workdir, or a smaller train.batch in a new workdir; `dlc plan --config=W/config.json "
        "--topology=v5e:2x4 --step=encoder --search` compares"
    )
    line = refused(JaxRuntimeError(FORMS["libtpu_before"][0]), remat="full", data=2)
    assert "accumulate=" in line and "--config.mesh.fsdp" in line and "remat" not in line


@pytest.mark.parametrize(
    ("wanted", "batch", "data", "expected"),
    [
        ("15.76G", 512, 1, 2),
        ("47.00G", 512, 1, 4),  # 3 does not divide the batch
        ("200.00G", 512, 1, None),  # groups of 8 on each of 8 devices: 8 parts at most
        ("15.76G", 512, 8, None),
        ("31.40G", 96 * 8, 1, 2),
        ("31.60G", 96 * 8, 1, 3),
    ],
)
def test_microbatches_are_the_fewest_that_may_fit(wanted, batch, data, expected, monkeypatch):
    monkeypatch.setattr(memory, "_device", lambda: ("TPU v5 lite", None))
    text = f"Ran out of memory in memory space hbm. Used {wanted} of 15.75G hbm."
    step = types.SimpleNamespace(plan=Plan(batch=batch), group=8)
    line = refused(JaxRuntimeError(text), step=step, data=data)
    assert (f"accumulate={expected} " in line) if expected else ("accumulate" not in line)


def test_a_running_program_says_what_is_free_and_a_gpu_what_jax_took(monkeypatch):
    monkeypatch.setattr(memory, "_device", lambda: ("NVIDIA H100", 72 * GIB))
    line = refused(JaxRuntimeError(FORMS["tpu_load"][0]))
    assert "encoder: out of memory: 3.95 GiB asked for, 1.92 GiB free; set" in line
    line = refused(JaxRuntimeError(FORMS["gpu_request"][0]))
    assert "encoder: out of memory: 2.99 GiB asked for, NVIDIA H100 has 72.00 GiB; set" in line


def test_a_job_and_the_host(monkeypatch):
    monkeypatch.setattr(memory, "_host_bytes", lambda: 16 * GIB)
    job = types.SimpleNamespace(run=None)
    line = refused(JaxRuntimeError(FORMS["cpu"][0]), step=job)
    assert "lower --config.encoder.batch, or" in line and "--topology=T --step=encoder" in line
    line = refused(MemoryError("Unable to allocate 2.00 PiB for an array with shape (2,)"))
    assert line == (
        "encoder: out of memory: 2.00 PiB asked for, the host has 16.00 GiB; lower "
        "--config.encoder.train.batch, or the threads that read ahead"
    )


def test_another_error_in_a_step_stays():
    mesh = types.SimpleNamespace(shape={"data": 1, "fsdp": 1})
    with (
        pytest.raises(ZeroDivisionError),
        memory.during("encoder", None, Section(), mesh=mesh, workdir="W"),
    ):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("kind", "coords", "expected"),
    [
        ("TPU v4", [(x, y, z) for x in range(2) for y in range(2) for z in range(4)], "v4:2x2x4"),
        ("TPU v5 lite", [(x, y, 0) for x in range(4) for y in range(8)], "v5e:4x8"),
        ("TPU v5", [(x, 0, 0) for x in range(2)] * 2, "v5p:2x1x1"),
        ("NVIDIA H100 80GB HBM3", [None] * 16, "h100:16"),
        ("NVIDIA A100-SXM4-40GB", [None] * 8, "T"),
        ("cpu", [None], "T"),
    ],
)
def test_the_machine_as_dlc_plan_names_it(kind, coords, expected, monkeypatch):
    platform = "tpu" if "TPU" in kind else "cpu" if kind == "cpu" else "gpu"
    devices = [
        types.SimpleNamespace(device_kind=kind, platform=platform, coords=at) for at in coords
    ]
    monkeypatch.setattr("jax.devices", lambda: devices)
    assert memory.topology() == expected


@pytest.mark.parametrize(
    ("count", "expected"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (2**50, "1.00 PiB")]
)
def test_sizes(count, expected):
    assert memory.size(count) == expected


def test_a_real_one_ends_a_run_in_a_line(tmp_path):
    """The encoder's parameters would be terabytes: the device refuses them."""
    width = "--config.encoder.model.backbone.width=1048576"
    done = subprocess.run(**commands.train(tmp_path / "W", width), timeout=240)
    assert (done.returncode, done.stdout) == (2, ""), done.stdout + done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("dlc_jax: encoder: out of memory: "), done.stderr
    assert "TiB asked for, the host has" in done.stderr and "dlc plan --config=" in done.stderr


# ---- the share of a GPU


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "0.92"),
        ({"XLA_CLIENT_MEM_FRACTION": "0.5"}, "0.5"),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, None),  # jax refuses both names together
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, None),
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "true"}, "0.92"),
    ],
)
def test_what_the_user_set_stays(given, expected, monkeypatch):
    for name in (*memory.FRACTION, "XLA_PYTHON_CLIENT_PREALLOCATE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    memory.reserve()
    assert os.environ.get("XLA_CLIENT_MEM_FRACTION") == expected
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)


SHOW = """
import os, sys
from dlc_jax import main
def parse(argv):
    print(os.environ.get("XLA_CLIENT_MEM_FRACTION"), "jax" in sys.modules)
    return None, None
main.command.parse, main.run = parse, lambda config, workdir: None
"""


@pytest.mark.parametrize(
    "call", ["main.main()", "from dlc_jax import cli; cli.main(['train'])"], ids=["main", "dlc"]
)
def test_training_takes_its_share_before_jax_is_imported(call):
    environment = {name: value for name, value in os.environ.items() if name not in memory.FRACTION}
    done = subprocess.run(
        [sys.executable, "-c", SHOW + call],
        env=environment | {"PYTHONPATH": str(commands.ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "0.92 False\n", done.stderr
