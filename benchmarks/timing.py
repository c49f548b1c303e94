"""How benchmarks time: cases in turn, the machine's own matmul rate among them, Markdown tables.

A ratio counts only within one run, in which the cases take turns: clocks, heat and neighbors change
from run to run.
"""

import argparse
import datetime
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax import metrics, workdir

PACKAGES = ("jax", "jaxlib", "flax", "torch", "triton", "libtpu")


def alternate(cases: Mapping[str, Callable], *, rounds: int, repeat: int = 1) -> dict:
    """{case: seconds of a call [rounds]}, the mean of `repeat` calls in a row each.

    A case is a function that starts its work and returns the arrays to wait for. One round, which
    compiles and warms up, comes before those that count.
    """
    taken = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, call in cases.items():
            start = time.perf_counter()
            for _ in range(repeat if number else 1):
                found = call()
            _wait(found)
            if number:
                taken[name].append((time.perf_counter() - start) / repeat)
    return {name: np.array(seconds) for name, seconds in taken.items()}


def _wait(found) -> None:
    jax.block_until_ready(found)
    if "torch" in sys.modules and (torch := sys.modules["torch"]).cuda.is_available():
        torch.cuda.synchronize()


def matmul() -> tuple[Callable, float]:
    """(case, its FLOPs): large products of normal numbers, bfloat16, on a CPU float32."""
    on_cpu = jax.default_backend() == "cpu"
    size, count, dtype = (2048, 2, jnp.float32) if on_cpu else (8192, 10, jnp.bfloat16)
    factors = (jax.random.normal(jax.random.key(n), (size, size), dtype) for n in range(2))
    a, b = jax.block_until_ready(tuple(factors))
    product = jax.jit(jnp.matmul)
    return lambda: [product(a, b) for _ in range(count)][-1], count * 2.0 * size**3


def milliseconds(seconds: np.ndarray) -> str:
    """Median, and from the least to the most."""
    low, middle, high = 1e3 * np.quantile(seconds, (0, 0.5, 1))
    places = 1 if high < 1000 else 0
    return f"{middle:.{places}f} ({low:.{places}f} to {high:.{places}f})"


def rate(flops: float, seconds: np.ndarray) -> float:
    """FLOP/s by the median."""
    return flops / float(np.median(seconds))


def head(*names: str) -> str:
    """The first two lines of a table; the first column is words, the others numbers."""
    return "\n".join([row(*names), row("---", *["---:"] * (len(names) - 1))])


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def failed(name: str, error: Exception, columns: int) -> str:
    """The row of a case that cannot run, with the error in a line."""
    said = " ".join(f"{type(error).__name__}: {error}".split())[:160].replace("|", "/")
    return row(name, said, *[""] * (columns - 2))


def about() -> str:
    """Devices, versions, date and commit: what a table is worth nothing without.

    DLC_COMMIT names the commit where there is no checkout.
    """
    found = [f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} CPUs"]
    found.append(f"Python {platform.python_version()}")
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = os.environ.get("DLC_COMMIT") or workdir.commit() or "unknown"
    found += [str(datetime.date.today()), f"commit {commit}"]
    return ", ".join(found)


def memory() -> str:
    """The most that the first device held in this whole run, or else this process."""
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    peak = peak or metrics.peak_memory_gb() * 1e9
    return f"most memory at once in this run: {peak / 2**30:.1f} GiB"


def parser(description: str) -> argparse.ArgumentParser:
    """With what all benchmarks of time take."""
    form = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(description=description, formatter_class=form)
    made.add_argument("--rounds", type=int, default=5, help="numbers that a median is of")
    made.add_argument("--repeat", type=int, default=1, help="calls in a row for each number")
    made.add_argument("--batch", type=int, help="examples of a call; the default is the case's")
    made.add_argument("--rehearse", action="store_true", help="tiny sizes: does it run?")
    return made
