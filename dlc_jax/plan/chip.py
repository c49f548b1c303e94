"""What one device of each kind can do, from data sheets and from the compilers' refusals."""

import dataclasses
import math

GIB = 2**30
GPUS_PER_HOST, MOST_GPUS = 8, 4096


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device of a kind, as jax counts devices. All rates are per second.

    Attributes:
      hbm_bytes: what a program may use. For a TPU it is what the compiler's refusal says, for a GPU
        the memory that the driver reports.
      flops: peak bf16 multiply-adds, counted as two.
      clock: cycles of the compiler's estimates; None for a GPU, whose compiler gives none.
      hbm_bandwidth, interconnect, network: bytes. `interconnect` is within a slice or host,
        `network` between them, both in one direction.
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
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8"),
    *("4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16"),
)

# FLOP/s, HBM and interconnect: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; interconnect is
# half of the bidirectional figure. Network between slices: 50 Gbit/s per chip up to v5p, 100 from
# v6e on (same pages). Clock: peak over what the matrix units do in a cycle (v4 and v5p 8 of 128x128
# per chip, v5e 4, v6e 4 of 256x256, tpu7x 4 of 256x256 per core). HBM: the compiler's own
# "available HBM", libtpu 0.0.42; tests/test_plan_machine.py asks it again.
TPU = {
    "v4": Chip(int(30.75 * GIB), 275e12, 1.05e9, 1.2e12, 300e9, 6.25e9, _CUBE),
    "v5e": Chip(int(15.75 * GIB), 197e12, 1.5e9, 0.819e12, 200e9, 6.25e9, _FLAT),
    "v5p": Chip(int(95.74 * GIB), 459e12, 1.75e9, 2.765e12, 600e9, 6.25e9, (*_CUBE, "16x16x24")),
    "v6e": Chip(int(31.25 * GIB), 918e12, 1.75e9, 1.638e12, 400e9, 12.5e9, _FLAT),
    "tpu7x": Chip(
        *(int(94.75 * GIB), 1153.5e12, 2.2e9, 3.69e12, 300e9, 6.25e9, (*_CUBE, "16x16x36")),
        devices_per_chip=2,
    ),
}
# NVIDIA's data sheets of the SXM boards, dense bf16; NVLink 4, half of 900 GB/s; 400 Gbit/s of
# network per GPU, as in a DGX. Memory: what the driver reports as total (torch's "total capacity",
# JAX's 100 %).
_COUNTS = ("1", "8", "64")
GPU = {
    "h100": Chip(int(79.1 * GIB), 989.4e12, None, 3.35e12, 450e9, 50e9, _COUNTS),
    "h200": Chip(int(139.7 * GIB), 989.4e12, None, 4.8e12, 450e9, 50e9, _COUNTS),
}


def form(kind: str) -> str:
    """How a shape of this kind is written: "AxB", "AxBxC", or "N" for GPUs."""
    return "N" if kind in GPU else "x".join("ABC"[: len(TPU[kind].example[0].split("x"))])


def examples() -> list[str]:
    return [f"{kind}:{shape}" for kind, chip in (TPU | GPU).items() for shape in chip.example]


def count(shape: str) -> int:
    """Chips of a shape: 32 for "4x8"."""
    return math.prod(int(side) for side in shape.split("x"))
