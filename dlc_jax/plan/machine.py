"""Machines that are not here: TPU slices and GPU hosts for which the compilers of this installation make programs without a device.

    environment()                    first of all, before anything imports jax
    machine = find("v5p:4x4x8")      devices to build a mesh from, and what they can do
    print(listing())                 what may be asked for

jax is imported by the functions, never by the module: libtpu and XLA read their settings when they
are loaded.
"""

import contextlib
import dataclasses
import difflib
import importlib.metadata
import importlib.util
import math
import os
import re
import sys
import tempfile

from dlc_jax.errors import UserError

GIB = 2**30

# What keeps libtpu from looking for a machine, from writing logs, and from refusing a second
# process beside this one.
SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# Said by the CUDA plugin on a machine without a driver, whatever the log levels are.
FOREIGN = ("before absl::InitializeLog() is called", "Could not find cuda drivers on your machine")


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device of a kind can do. All rates are per device as jax counts devices, per second, from data sheets.

    Attributes:
      hbm_bytes: what a program may use: for a TPU what the compiler's refusal says, for a GPU the
        memory that the driver reports.
      flops: peak bf16 multiply-adds, counted as two.
      clock: cycles of the compiler's estimates; None for a GPU, whose compiler gives none.
      hbm_bandwidth, interconnect, network: bytes. `interconnect` within a slice or host and
        `network` between them, one direction.
      example: shapes that are on sale, the largest last; or numbers of GPUs.
      devices_per_chip: 2 where the two cores of a chip are devices of their own.
    """

    hbm_bytes: int
    flops: float
    clock: float | None
    hbm_bandwidth: float
    interconnect: float
    network: float
    example: tuple[str, ...]
    devices_per_chip: int = 1


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = (
    "2x2x1",
    "2x2x2",
    "2x2x4",
    "2x4x4",
    "4x4x4",
    "4x4x8",
    "4x8x8",
    "8x8x8",
    "8x8x16",
    "8x16x16",
    "16x16x16",
)

# FLOP/s, HBM and chip interconnect: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; interconnect
# is half of the bidirectional figure. Network between slices: 50 Gbit/s a chip to v5p, 100 from v6e
# on (same pages). Clock: peak over what the matrix units do in a cycle (v4 and v5p 8 of 128x128 a
# chip, v5e 4, v6e 4 of 256x256, tpu7x 4 of 256x256 a core). HBM: the compiler's own "available
# HBM", libtpu 0.0.42; tests/test_plan_machine.py asks it again.
TPU = {
    "v4": Chip(int(30.75 * GIB), 275e12, 1.05e9, 1.2e12, 300e9, 6.25e9, _CUBE),
    "v5e": Chip(int(15.75 * GIB), 197e12, 1.5e9, 0.819e12, 200e9, 6.25e9, _FLAT),
    "v5p": Chip(int(95.74 * GIB), 459e12, 1.75e9, 2.765e12, 600e9, 6.25e9, (*_CUBE, "16x16x24")),
    "v6e": Chip(int(31.25 * GIB), 918e12, 1.75e9, 1.638e12, 400e9, 12.5e9, _FLAT),
    "tpu7x": Chip(
        int(94.75 * GIB),
        1153.5e12,
        2.2e9,
        3.69e12,
        300e9,
        6.25e9,
        (*_CUBE, "16x16x36"),
        devices_per_chip=2,
    ),
}
# NVIDIA's data sheets of the SXM boards, dense bf16; NVLink 4, half of 900 GB/s; 400 Gbit/s of
# network a GPU, as in a DGX. Memory: what the driver reports as total (torch's "total capacity",
# JAX's 100 %).
_COUNTS = ("1", "8", "64")
GPU = {
    "h100": Chip(int(79.1 * GIB), 989.4e12, None, 3.35e12, 450e9, 50e9, _COUNTS),
    "h200": Chip(int(139.7 * GIB), 989.4e12, None, 4.8e12, 450e9, 50e9, _COUNTS),
}
GPUS_PER_HOST, MOST_GPUS = 8, 4096
# What the compiler must know of a GPU that it cannot ask. Both are GH100 with 132 cores, compute
# capability 9.0.
_GPU_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} device_memory_size: {memory} cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA" device_description_str: "{name}"
dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 12 minor: 8 }}
"""
# Without a GPU nothing can be timed, so nothing is tuned; and the Triton matmuls have no untuned
# choice for some shapes.
_GPU_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


@dataclasses.dataclass(frozen=True)
class Machine:
    """A machine to compile for. `devices` are jax devices: fit for a mesh, not for running anything.

    Attributes:
      name: as asked for, "v5e:8x16".
      kind: "v5e", "h200".
      platform: "tpu" or "gpu".
      devices: tuple, slice by slice; of a tpu7x chip both cores, one after the other.
      chips: number of chips; half the devices for tpu7x, else as many.
      slices: groups of devices that the fast interconnect joins: TPU slices, GPU hosts. All have
        the same number of devices, and `devices` has them one after the other.
      hbm_bytes: device memory that a program may use. Of a GPU that is the share of it which JAX
        takes, see `hbm_note`.
      hbm_note: a sentence where hbm_bytes wants explaining, else "".
      flops, clock, hbm_bandwidth, interconnect, network: per device, see Chip.
      compiler_options: for `lowered.compile(compiler_options=…)`.
    """

    name: str
    kind: str
    platform: str
    devices: tuple = dataclasses.field(repr=False)
    chips: int
    slices: int
    hbm_bytes: int
    hbm_note: str
    flops: float
    clock: float | None
    hbm_bandwidth: float
    interconnect: float
    network: float
    compiler_options: dict


def environment() -> None:
    """Readies this process to compile for other machines, quietly; call it before anything imports jax.

    Sets the variables of SETTINGS that are not set, and JAX_PLATFORMS=cpu whatever it was: a plan
    takes no accelerator. Imports jax.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ["JAX_PLATFORMS"] = "cpu"
    with _without_foreign_lines():
        import jax

        jax.devices()  # loads the plug-ins, which have their say now


def find(name: str) -> Machine:
    """The machine called `name`: "v5e:8x16", "2*v6e:16x16" (two slices), "h200:64" (eight hosts of eight).

    Raises:
      UserError: there is no such machine, or the package that compiles for it is not installed.
    """
    match = re.fullmatch(r"(?:(\d{1,4})\*)?(\w+):(\d{1,4}(?:x\d{1,4}){0,2})", name)
    slices, kind, shape = match.groups() if match else (None, "", "")
    if kind in TPU:
        return _find_tpu(name, kind, shape, slices=1 if slices is None else int(slices))
    if kind in GPU and shape.isdigit() and slices is None:
        return _find_gpu(name, kind, int(shape))
    near = difflib.get_close_matches(name.lower(), _examples(), n=3, cutoff=0.5)
    near = f"; nearest: {', '.join(near)}" if near else ""
    kinds = ", ".join(
        [f"{kind}:{'AxB' if kind in _flat() else 'AxBxC'}" for kind in TPU]
        + [f"{kind}:N" for kind in GPU]
    )
    raise UserError(
        f"unknown topology {name!r}{near}; valid are {kinds}, as dlc plan --list-topologies shows"
    )


def _flat():
    return [kind for kind, chip in TPU.items() if chip.example is _FLAT]


def _examples():
    return [f"{kind}:{shape}" for kind, chip in (TPU | GPU).items() for shape in chip.example]


def _find_tpu(name: str, kind: str, shape: str, *, slices: int) -> Machine:
    chip = TPU[kind]
    sides = [int(side) for side in shape.split("x")]
    chips = math.prod(sides)
    whole = len(sides) == len(chip.example[0].split("x"))
    even = whole and chips and (chips == 1 or not (sides[0] % 2 or sides[1] % 2))
    if not even or chips > _chips(chip.example[-1]) or not 1 <= slices <= 64:
        near = sorted(chip.example, key=lambda each: abs(math.log(_chips(each) / max(chips, 1))))[
            :3
        ]
        rule = "AxB with A and B even" if kind in _flat() else "AxBxC with A and B even"
        raise UserError(
            f"unknown topology {name!r}: {kind} comes as {rule}, up to {_chips(chip.example[-1])} chips a slice and 64 slices; "
            f"nearest: {', '.join(f'{kind}:{each}' for each in sorted(near, key=_chips))}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"{name}: libtpu, which compiles for TPUs, is not installed; pip install '.[tpu]'"
        )
    options = {"chips_per_host_bounds": (1, 1, 1)} if chips == 1 else {}
    # both cores of a chip are one device, as they are on a machine; left alone libtpu gives two
    if kind == "v4":
        options["chip_config_name"] = "megacore"
    if slices > 1:
        options["num_slices"] = slices
    devices = _topology(name, "tpu", topology_name=f"{kind}:{shape}", **options)
    if len(devices) != slices * chips * chip.devices_per_chip:
        raise UserError(
            f"{name}: this libtpu makes {len(devices)} devices of {slices * chips} chips; pip install '.[tpu]' afresh"
        )
    return _machine(name, kind, "tpu", devices, chip, chips=slices * chips, slices=slices)


def _chips(shape):
    return math.prod(int(side) for side in shape.split("x"))


def _find_gpu(name: str, kind: str, count: int) -> Machine:
    chip = GPU[kind]
    hosts = max(1, count // GPUS_PER_HOST)
    if not 1 <= count <= MOST_GPUS or (count > GPUS_PER_HOST and count % GPUS_PER_HOST):
        near = min(hosts * GPUS_PER_HOST, MOST_GPUS)
        raise UserError(
            f"unknown topology {name!r}: {kind} comes as 1 to 8, or hosts of 8 up to {MOST_GPUS}; nearest: {kind}:{near}"
        )
    if _cuda_plugin() is None:
        raise UserError(
            f"{name}: the plug-in that compiles for NVIDIA GPUs is not installed; pip install '.[cuda-plan]'"
        )
    target = _GPU_TARGET.format(
        name=f"NVIDIA {kind.upper()}", bandwidth=int(chip.hbm_bandwidth), memory=chip.hbm_bytes
    )
    layout = f"{hosts}x1x{count // hosts}"  # NVLink domains x hosts in each x devices on each
    devices = _topology(name, "cuda", topology_name=kind, target_config=target, topology=layout)
    share = _memory_share()
    more = "; XLA_CLIENT_MEM_FRACTION=0.95 lets it take more" if share < 0.95 else ""
    note = f"JAX takes {share:.0%} of {chip.hbm_bytes / GIB:.1f} GiB{more}"
    limit = {
        "hbm_bytes": int(chip.hbm_bytes * share),
        "hbm_note": note,
        "compiler_options": dict(_GPU_OPTIONS),
    }
    return _machine(name, kind, "gpu", devices, chip, chips=count, slices=hosts, **limit)


def _memory_share() -> float:
    """The part of a GPU's memory that JAX's allocator will give to programs, under this environment."""
    given = (
        os.environ.get("XLA_CLIENT_MEM_FRACTION")
        or os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
        or "0.75"
    )
    try:
        share = float(given)
    except ValueError:
        share = math.nan
    if not 0 < share < math.inf:
        raise UserError(
            f"XLA_CLIENT_MEM_FRACTION={given!r} is no share of the memory; set it to one, as 0.9, or unset it"
        )
    return share


def _machine(name, kind, platform, devices, chip, **more) -> Machine:
    rates = {
        key: getattr(chip, key)
        for key in ("hbm_bytes", "flops", "clock", "hbm_bandwidth", "interconnect", "network")
    }
    rest = rates | {"hbm_note": "", "compiler_options": {}} | more
    return Machine(name=name, kind=kind, platform=platform, devices=devices, **rest)


def _topology(name: str, platform: str, **options) -> tuple:
    from jax.experimental import topologies

    try:
        with _without_foreign_lines():
            return tuple(topologies.get_topology_desc(platform=platform, **options).devices)
    except (RuntimeError, ValueError) as error:  # jax's own errors are RuntimeErrors
        said = " ".join(str(error).split())[:300]
        raise UserError(
            f"{name}: the compiler installed here refuses it ({said}); see --list-topologies"
        ) from error


def _cuda_plugin() -> str | None:
    """The installed plug-in's package: of extra `cuda-plan`, or that of a machine with GPUs."""
    for plugin in ("jax_cuda13_plugin", "jax_cuda12_plugin"):
        if importlib.util.find_spec(plugin) is not None:
            return plugin
    return None


def listing() -> str:
    """What may be asked for here, as text; needs no jax."""
    missing = "NOT INSTALLED: "
    tpu = "" if importlib.util.find_spec("libtpu") else missing
    gpu = "" if _cuda_plugin() else missing
    lines = [f"TPU ({tpu}pip install '.[tpu]'{_version('libtpu', tpu)}), KIND:SHAPE in chips"]
    lines += [
        _row(f"{kind}:{'AxB' if kind in _flat() else 'AxBxC'}", chip) for kind, chip in TPU.items()
    ]
    lines += [
        "  Any shape with A and B even, up to the largest shown in chips, and a single chip. N*KIND:SHAPE is N slices joined by",
        "  the data center's network, as 2*v5e:16x16. A tpu7x chip is two devices; figures are per device.",
        "",
        f"GPU ({gpu}pip install '.[cuda-plan]'{_version(_cuda_plugin(), gpu)}), KIND:NUMBER",
    ]
    lines += [_row(f"{kind}:N", chip) for kind, chip in GPU.items()]
    lines += [
        f"  1 to 8 on one host, or a multiple of 8: hosts of 8. JAX takes {_memory_share():.0%} of the memory by default."
    ]
    return "\n".join(lines)


def _row(form, chip):
    return f"  {form:<12} {chip.hbm_bytes / GIB:6.1f} GiB {chip.flops / 1e12:6.0f} bf16 TFLOP/s   {' '.join(chip.example)}"


def _version(package, missing):
    return (
        ""
        if missing
        else f", here {package} {importlib.metadata.version(package.replace('_', '-'))}"
    )


@contextlib.contextmanager
def _without_foreign_lines():
    """Holds the process's stderr back, C++ libraries' included, and lets out what is not FOREIGN."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            held.seek(0)
            lines = held.read().decode(errors="replace").splitlines(keepends=True)
            sys.stderr.write(
                "".join(line for line in lines if not any(words in line for words in FOREIGN))
            )
