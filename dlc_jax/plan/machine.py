"""Machines that are not here, TPU slices and GPU hosts, as devices to compile for.

    environment()                    first of all, before anything imports jax
    machine = find("v5p:4x4x8")      devices to build a mesh from, and what they can do
    print(listing())                 what may be asked for

The compilers of this installation need no device. jax is imported by the functions, never by the
module: libtpu and XLA read their settings when they are loaded.
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

from dlc_jax import memory
from dlc_jax.errors import UserError
from dlc_jax.plan.chip import GIB, GPU, GPUS_PER_HOST, MOST_GPUS, TPU, Chip, count, examples, form

# They keep libtpu from looking for a machine, from writing logs, and from refusing a second process
# beside this one.
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
# The CUDA plug-in prints these on a machine without a driver, whatever the log levels are.
FOREIGN = ("before absl::InitializeLog() is called", "Could not find cuda drivers on your machine")

# What the compiler must know of a GPU that it cannot ask. Both kinds are GH100 with 132 cores,
# compute capability 9.0.
_GPU_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 52428800
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA" device_description_str: "{name}"
dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 12 minor: 8 }}
"""
# Without a GPU nothing can be timed, so nothing is tuned; and the Triton matmuls have no untuned
# choice for some shapes.
_GPU_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


@dataclasses.dataclass(frozen=True)
class Machine:
    """A machine to compile for. `devices` are jax devices that fit a mesh but cannot run anything.

    Attributes:
      name: as asked for, "v5e:8x16".
      kind: "v5e", "h200".
      platform: "tpu" or "gpu".
      devices: tuple, slice by slice; of a tpu7x chip both cores, one after the other.
      chips: number of chips; for tpu7x half the devices, otherwise as many.
      slices: groups of devices that the fast interconnect joins: TPU slices, GPU hosts. All have
        the same number of devices, and `devices` has them one after the other.
      hbm_bytes: device memory that a program may use. For a GPU that is the share of the memory
        that JAX takes, see `hbm_note`.
      hbm_note: a sentence where hbm_bytes needs explaining, otherwise "".
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
    """Readies this process to compile for other machines, quietly. Imports jax; call it first.

    Sets the variables of SETTINGS that are not set, and JAX_PLATFORMS=cpu whatever it was: a plan
    takes no accelerator.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ["JAX_PLATFORMS"] = "cpu"
    with _without_foreign_lines():
        import jax

        jax.devices()  # loads the plug-ins, which print now


def find(name: str) -> Machine:
    """The machine `name`: "v5e:8x16", "2*v6e:16x16" (two slices), "h200:64" (eight hosts of eight).

    Raises:
      UserError: there is no such machine, or the package that compiles for it is not installed.
    """
    match = re.fullmatch(r"(?:(\d{1,4})\*)?(\w+):(\d{1,4}(?:x\d{1,4}){0,2})", name)
    slices, kind, shape = match.groups() if match else (None, "", "")
    if kind in TPU:
        return _find_tpu(name, kind, shape, slices=1 if slices is None else int(slices))
    if kind in GPU and shape.isdigit() and slices is None:
        return _find_gpu(name, kind, int(shape))
    near = difflib.get_close_matches(name.lower(), examples(), n=3, cutoff=0.5)
    near = f"; nearest: {', '.join(near)}" if near else ""
    forms = ", ".join(f"{kind}:{form(kind)}" for kind in TPU | GPU)
    raise UserError(
        f"unknown topology {name!r}{near}; valid are {forms}, as dlc plan --list-topologies shows"
    )


def _find_tpu(name: str, kind: str, shape: str, *, slices: int) -> Machine:
    chip = TPU[kind]
    sides = [int(side) for side in shape.split("x")]
    chips, most = count(shape), count(chip.example[-1])
    is_formed = len(sides) == len(form(kind).split("x"))
    is_even = is_formed and chips and (chips == 1 or not (sides[0] % 2 or sides[1] % 2))
    if not is_even or chips > most or not 1 <= slices <= 64:
        by_size = sorted(chip.example, key=lambda each: abs(math.log(count(each) / max(chips, 1))))
        near = ", ".join(f"{kind}:{each}" for each in sorted(by_size[:3], key=count))
        raise UserError(
            f"unknown topology {name!r}: {kind} comes as {form(kind)} with A and B even, "
            f"up to {most} chips a slice and 64 slices; nearest: {near}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"{name}: libtpu, which compiles for TPUs, is not installed; pip install '.[tpu]'"
        )
    options = {"chips_per_host_bounds": (1, 1, 1)} if chips == 1 else {}
    if (
        kind == "v4"
    ):  # as on a machine, both cores of a chip are one device; libtpu's default is two
        options["chip_config_name"] = "megacore"
    if slices > 1:
        options["num_slices"] = slices
    devices = _topology(name, "tpu", topology_name=f"{kind}:{shape}", **options)
    if len(devices) != slices * chips * chip.devices_per_chip:
        raise UserError(
            f"{name}: this libtpu makes {len(devices)} devices of {slices * chips} chips; "
            "install it again, pip install '.[tpu]'"
        )
    return _machine(name, kind, "tpu", devices, chip, chips=slices * chips, slices=slices)


def _find_gpu(name: str, kind: str, gpus: int) -> Machine:
    chip = GPU[kind]
    hosts = max(1, gpus // GPUS_PER_HOST)
    if not 1 <= gpus <= MOST_GPUS or (gpus > GPUS_PER_HOST and gpus % GPUS_PER_HOST):
        near = min(hosts * GPUS_PER_HOST, MOST_GPUS)
        raise UserError(
            f"unknown topology {name!r}: {kind} comes as 1 to 8, or hosts of 8 up to {MOST_GPUS}; "
            f"nearest: {kind}:{near}"
        )
    if _cuda_plugin() is None:
        raise UserError(
            f"{name}: the plug-in that compiles for NVIDIA GPUs is not installed; "
            "pip install '.[cuda-plan]'"
        )
    bandwidth = int(chip.hbm_bandwidth)
    target = _GPU_TARGET.format(
        name=f"NVIDIA {kind.upper()}", bandwidth=bandwidth, memory=chip.hbm_bytes
    )
    layout = f"{hosts}x1x{gpus // hosts}"  # NVLink domains x hosts in each x devices on each
    devices = _topology(name, "cuda", topology_name=kind, target_config=target, topology=layout)
    share = _memory_share()
    more = "; XLA_CLIENT_MEM_FRACTION=0.95 lets it take more" if share < 0.95 else ""
    found = _machine(name, kind, "gpu", devices, chip, chips=gpus, slices=hosts)
    return dataclasses.replace(
        found,
        hbm_bytes=int(chip.hbm_bytes * share),
        hbm_note=f"training takes {share:.0%} of {chip.hbm_bytes / GIB:.1f} GiB{more}",
        compiler_options=dict(_GPU_OPTIONS),
    )


def _memory_share() -> float:
    """The part of a GPU's memory that training takes in this environment."""
    given = (os.environ[name] for name in memory.FRACTION if os.environ.get(name))
    given = next(given, str(memory.SHARE))
    try:
        share = float(given)
    except ValueError:
        share = math.nan
    if not 0 < share < math.inf:
        raise UserError(
            f"XLA_CLIENT_MEM_FRACTION={given!r} is not a share of the memory; "
            "set it to a number such as 0.9, or unset it"
        )
    return share


def _machine(name, kind, platform, devices, chip: Chip, *, chips, slices) -> Machine:
    return Machine(
        name=name,
        kind=kind,
        platform=platform,
        devices=devices,
        chips=chips,
        slices=slices,
        hbm_bytes=chip.hbm_bytes,
        hbm_note="",
        flops=chip.flops,
        clock=chip.clock,
        hbm_bandwidth=chip.hbm_bandwidth,
        interconnect=chip.interconnect,
        network=chip.network,
        compiler_options={},
    )


def _topology(name: str, platform: str, **options) -> tuple:
    from jax.experimental import topologies

    try:
        with _without_foreign_lines():
            return tuple(topologies.get_topology_desc(platform=platform, **options).devices)
    except (RuntimeError, ValueError) as error:  # jax's own errors are RuntimeErrors
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{name}: the compiler installed here refuses it ({reason}); see --list-topologies"
        ) from error


def _cuda_plugin() -> str | None:
    """The installed plug-in's package: of extra `cuda-plan`, or that of a machine with GPUs."""
    for plugin in ("jax_cuda13_plugin", "jax_cuda12_plugin"):
        if importlib.util.find_spec(plugin) is not None:
            return plugin
    return None


def listing() -> str:
    """What may be asked for here, as text; needs no jax."""
    libtpu = "libtpu" if importlib.util.find_spec("libtpu") else None
    lines = [f"TPU ({_installed(libtpu, 'tpu')}), KIND:SHAPE in chips"]
    lines += [_row(kind, chip) for kind, chip in TPU.items()]
    lines += [
        "  Any shape with A and B even, up to the largest shown, and a single chip.",
        "  N*KIND:SHAPE is N slices joined by the data center's network, as in 2*v5e:16x16.",
        "  A tpu7x chip is two devices; figures are per device.",
        "",
        f"GPU ({_installed(_cuda_plugin(), 'cuda-plan')}), KIND:NUMBER",
    ]
    lines += [_row(kind, chip) for kind, chip in GPU.items()]
    lines += [
        "  1 to 8 on one host, or a multiple of 8: hosts of 8.",
        f"  Training takes {_memory_share():.0%} of the memory by default.",
    ]
    return "\n".join(lines)


def _row(kind: str, chip: Chip) -> str:
    head = f"  {f'{kind}:{form(kind)}':<12} {chip.hbm_bytes / GIB:6.1f} GiB"
    return f"{head} {chip.flops / 1e12:6.0f} bf16 TFLOP/s   {' '.join(chip.example)}"


def _installed(package: str | None, extra: str) -> str:
    if package is None:
        return f"NOT INSTALLED: pip install '.[{extra}]'"
    version = importlib.metadata.version(package.replace("_", "-"))
    return f"pip install '.[{extra}]', here {package} {version}"


@contextlib.contextmanager
def _without_foreign_lines():
    """Holds back the process's stderr, C++ too, and prints what is not FOREIGN at the end."""
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
            own = [line for line in lines if not any(words in line for words in FOREIGN)]
            sys.stderr.write("".join(own))
