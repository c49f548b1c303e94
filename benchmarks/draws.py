"""Are drawn images those of their numbers alone? One run's images in two batches, to be compared.

    python benchmarks/draws.py W one.npz
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python benchmarks/draws.py W 8.npz one.npz

Writes the codes, and the images that three methods draw of them, in batches of 16 and of 64. With a
second file it prints, for each, the largest difference in levels and the share of pixels within 1.
"""

import sys

import jax
import numpy as np

from dlc_jax import pipeline
from dlc_jax.pipeline import Sampler

METHODS, BATCHES = ("heun", "ancestral", "sde"), (16, 64)


def drawn(workdir):
    """{what and batch: codes or images}."""
    found = {}
    for batch in BATCHES:
        with pipeline.load(workdir, batch=batch) as p:
            codes = found[f"codes of {batch}"] = p.sample_codes(64, seed=1)
            for method in METHODS:
                sampler = Sampler(method=method, steps=8)
                found[f"{method} of {batch}"] = p.decode(codes, seed=2, sampler=sampler)
    return found


def main():
    workdir, out, *others = sys.argv[1:]
    found = drawn(workdir)
    np.savez(out, **found)
    print(f"{len(jax.devices())} devices")
    first = np.load(others[0]) if others else found
    for name, array in found.items():
        known = first[f"{name.split()[0]} of {BATCHES[0]}"]
        apart = np.abs(array.astype(int) - known)
        print(f"{name}: at most {apart.max()}, {100 * (apart <= 1).mean():.2f} % within 1")


if __name__ == "__main__":
    main()
