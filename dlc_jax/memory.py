"""Memory that does not suffice, in one line; and how much of a GPU's memory training takes.

    with memory.during("encoder", section, ...):   one step of a recipe
    memory.line(error)                             any other command

jax is imported by the functions, never by the module: `reserve` is called before it.
"""

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from dlc_jax.errors import UserError

SHARE = 0.92  # of a GPU; what is left holds the driver's context, NCCL's and cuDNN's buffers
FRACTION = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second is deprecated
_PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"


def reserve() -> None:
    """Lets JAX take SHARE of every GPU, unless the environment says otherwise; before jax starts.

    JAX's own default is 0.75. A share that is set, under either name, or a preallocation that is
    switched off stays as it is.
    """
    off = os.environ.get(_PREALLOCATE, "") in ("false", "False", "0")
    if not off and not any(os.environ.get(name) for name in FRACTION):
        os.environ[FRACTION[0]] = str(SHARE)


@dataclasses.dataclass(frozen=True)
class Shortage:
    """What an error says of memory, in bytes; None where it gives no number.

    Attributes:
      wanted: what the program or the single array needs.
      available: what the device has, or has left where `is_free`.
      is_program: `wanted` is all that a program needs, not one allocation of it.
      is_free: `available` is what other arrays leave.
      is_host: it is the host's memory.
    """

    wanted: int | None = None
    available: int | None = None
    is_program: bool = False
    is_free: bool = False
    is_host: bool = False


_SIZE = r"([\d.]+)\s*([KMGTP]?)i?B?"
# Refusals of TPU compilers: the whole program against the whole device.
_REFUSALS = (
    # libtpu 0.0.42: the total, although it says temporaries
    re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
    re.compile(rf"memory space hbm\. Used {_SIZE} of {_SIZE} hbm"),  # libtpu before
)
# A TPU that runs: one allocation, or a program that is loaded, against what is free.
_TPU = re.compile(
    rf"[Aa]ttempting to (?:allocate|reserve) {_SIZE}(?=[\s.]).*?There are {_SIZE} free", re.DOTALL
)
# XLA on GPUs and CPUs, and NumPy: the size alone.
_ASKED = (
    re.compile(r"[Oo]ut of memory (?:while trying to allocate|allocating) ([\d.]+)() ?bytes"),
    re.compile(rf"[Oo]ut of memory (?:while )?trying to allocate {_SIZE}"),  # the BFC allocator's
    re.compile(r"[Ff]ailed to allocate (?:request for )?[^(\n]{0,40}\((\d+)()B\)"),
    re.compile(rf"[Ff]ailed to allocate (?:request for )?{_SIZE}"),
    re.compile(rf"[Uu]nable to allocate {_SIZE}"),
)
# Without a number.
_BARE = re.compile(r"out of memory|OUT_OF_MEMORY|bad[_ ]alloc|ran out of memory", re.IGNORECASE)
# The memory of a core, which no batch changes: what is wrong is a kernel or the compiler.
_ON_CHIP = re.compile(
    r"memory space (?:vmem|smem|cmem|sflag)|space=(?:vmem|smem|cmem|sflag)|shared memory"
)
_OURS = ("JaxRuntimeError", "XlaRuntimeError")  # the second is jaxlib's older name


def refusal(error: BaseException) -> Shortage | None:
    """What a compiler's refusal says, or None for another error, such as too little on-chip memory.

    GPU compilers never refuse.
    """
    for pattern in _REFUSALS:
        if match := pattern.search(str(error)):
            return Shortage(_bytes(*match.groups()[:2]), _bytes(*match.groups()[2:]), True)
    return None


def shortage(error: BaseException) -> Shortage | None:
    """What is said of memory by an error of jax, of NumPy or of Python; None if it is another."""
    text = str(error)
    if isinstance(error, MemoryError):
        return Shortage(wanted=_asked(text), is_host=True)
    if not any(kind.__name__ in _OURS for kind in type(error).__mro__) or _ON_CHIP.search(text):
        return None
    if found := refusal(error):
        return found
    if match := _TPU.search(text):
        return Shortage(_bytes(*match.groups()[:2]), _bytes(*match.groups()[2:]), is_free=True)
    wanted = _asked(text)
    return Shortage(wanted) if wanted is not None or _BARE.search(text) else None


def _asked(text: str) -> int | None:
    for pattern in _ASKED:
        if match := pattern.search(text):
            return _bytes(*match.groups())
    return None


def _bytes(number: str, unit: str) -> int:
    """Bytes of "1.5" and "G"; every power is of 1024, as in XLA's messages."""
    return int(float(number.rstrip(".")) * 1024 ** " KMGTP".index(unit or " "))


def line(error: BaseException) -> str | None:
    """The line for an error of any command; None if it is not about memory."""
    found = shortage(error)
    if found is None:
        return None
    return f"{_said(*_counted(found))}; lower the batch, or how much is computed at once"


@contextlib.contextmanager
def during(name: str, step: Any, section: Any, *, mesh: Any, workdir: Any) -> Iterator[None]:
    """Within it, an error about memory becomes a UserError that says what to change in this step.

    Args:
      name: of the step.
      step: its Stage or Job.
      section: of the recipe, its fields.
      mesh: the jax Mesh.
      workdir: of the run; `dlc plan` takes the config.json in it.

    Raises:
      UserError: in place of the error, which is its cause.
    """
    try:
        yield
    except Exception as error:
        found = shortage(error)
        if found is None:
            raise
        found, owner = _counted(found)
        advice = _advice(found, name, step, section, dict(mesh.shape))
        if not found.is_host:
            plan = f"dlc plan --config={workdir}/config.json --topology={topology()} --step={name}"
            advice += f"; `{plan} --search` compares"
        raise UserError(f"{name}: {_said(found, owner)}; {advice}") from error


def _counted(found: Shortage) -> tuple[Shortage, str]:
    """(the same with what the device or host has, where the error did not say; which it is)."""
    owner, amount = ("the host", _host_bytes()) if found.is_host else _device()
    return dataclasses.replace(found, available=found.available or amount), owner


def _said(found: Shortage, owner: str) -> str:
    """What was asked for and what there is."""
    numbers = []
    if found.wanted is not None:
        numbers.append(f"{size(found.wanted)} {'needed' if found.is_program else 'asked for'}")
    if found.is_free:
        numbers.append(f"{size(found.available)} free")
    elif found.available:
        numbers.append(f"{owner} has {size(found.available)}")
    return "out of memory" + (": " + ", ".join(numbers) if numbers else f" of {owner}")


def _advice(found: Shortage, name: str, step: Any, section: Any, mesh: Mapping[str, int]) -> str:
    """What to change, first what the same workdir accepts."""
    plan = getattr(step, "plan", None)
    if plan is None:
        return f"lower --config.{name}.batch, or how much it computes at once"
    if found.is_host:
        return f"lower --config.{name}.train.batch, or the threads that read ahead"
    changes = []
    if parts := _parts(found, plan, each=mesh["data"] * mesh["fsdp"] * step.group):
        changes.append(f"--config.{name}.train.accumulate={parts} (now {plan.accumulate})")
    if mesh["data"] > 1:
        changes.append("a larger --config.mesh.fsdp with --config.mesh.data=-1")
    if "'remat'" in (fields := str(section.to_dict())) and "'remat': 'full'" not in fields:
        changes.append(f"'--config.{name}.model*.remat=full' in a new workdir")
    changes.append("a smaller train.batch in a new workdir")
    return "set " + ", or ".join(changes)


def _parts(found: Shortage, plan: Any, *, each: int) -> int | None:
    """The least number of microbatches that may fit; `each` divides the examples of one."""
    least = plan.accumulate + 1
    if found.wanted and found.available and not found.is_free:
        least = max(least, math.ceil(plan.accumulate * found.wanted / found.available))
    counts = range(least, plan.batch // each + 1)
    return next((parts for parts in counts if plan.batch % (each * parts) == 0), None)


def _device() -> tuple[str, int | None]:
    """(kind, bytes that programs may use) of one device; the host's for a CPU."""
    import jax

    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return "the host", _host_bytes()
    try:
        return device.device_kind, (device.memory_stats() or {}).get("bytes_limit")
    except Exception:  # some plug-ins have no statistics; the message has the rest
        return device.device_kind, None


def _host_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# What jax calls a device -> the kind of `dlc plan`; the first that occurs.
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v6": "v6e",
    "TPU7x": "tpu7x",
    "H100": "h100",
    "H200": "h200",
}


def topology() -> str:
    """The machine of this process, as `dlc plan --topology` takes it; T where it has no name."""
    import jax

    devices = jax.devices()
    kind = next((ours for name, ours in _KINDS.items() if name in devices[0].device_kind), None)
    if kind is None:
        return "T"
    if devices[0].platform != "tpu":
        return f"{kind}:{len(devices)}"
    sides = [max(side) - min(side) + 1 for side in zip(*(device.coords for device in devices))]
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    flat = sides[:2] if kind in ("v5e", "v6e") else sides
    return f"{slices}*" * (slices > 1) + f"{kind}:{'x'.join(map(str, flat))}"


def size(count: int) -> str:
    """ "15.75 GiB"."""
    power = min(max(count.bit_length() - 1, 0) // 10, 5)
    return f"{count / 1024**power:.2f} {'KMGTP'[power - 1]}iB" if power else f"{count} B"
