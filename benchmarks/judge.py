"""The proof of the judge: are real images accepted, bad ones rejected, and factors read?

    python benchmarks/judge.py [--count 1000]

Prints markdown tables. No trained model is involved. About 6 minutes on 2 CPU cores.
"""

import argparse
import time

import numpy as np

from dlc_jax.data import counterexamples, shapes
from dlc_jax.data import judge as judging

VARIANTS = ((16, False), (16, True), (32, False), (32, True))
SIGMAS = (0.03, 0.0625, 0.09, 0.13, counterexamples.BLUR, 0.25)


def percent(value):
    return "" if value is None else f"{100 * value:.1f}"


def table(header, rows):
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    print(flush=True)


def ladder(image, count):
    """Rows for blurs of held-out images, from light to strong: what is read, what is accepted."""
    judge = judging.Judge(image=image)
    factors, nuisances = shapes.draw(np.arange(count), split="held_out", seed=3)
    images = shapes.render(factors, nuisances, image=image)
    for sigma in SIGMAS:
        reading = judge.read(counterexamples.blurred(images, sigma=sigma))
        kept = (reading.factors == factors).mean(axis=0)
        shares = (percent(share) for share in (kept[0], kept[3], reading.valid.mean()))
        yield (image, sigma, round(sigma * image, 2), *shares)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="images of each kind")
    count = parser.parse_args().count

    print("Distances, rms in units of [0, 1] colors:")
    print("real images, 99th percentile; bad kinds, 1st percentile.\n")
    kinds = ("blank", "blur", "noise", "mixture", "halves")
    rows = []
    for image in judging.THRESHOLD:
        found = judging.calibration(image=image, count=count)
        numbers = (found["real_99"], *(found[f"{kind}_1"] for kind in kinds))
        cells = (f"{number:.4f}" for number in numbers)
        rows.append((image, *cells, judging.THRESHOLD[image]))
    table(("pixels", "real", *kinds, "threshold"), rows)

    results, seconds = [], []
    for image, positions in VARIANTS:
        judge = judging.Judge(image=image, positions=positions)
        start = time.perf_counter()
        results.append(judge.proof(count))
        seconds.append(f"{time.perf_counter() - start:.0f}")
    names = [f"{image} px" + (", positions" if positions else "") for image, positions in VARIANTS]

    print(f"Share in %, {count} images in each cell.\n")
    rows = []
    for split in ("seen", "held_out"):
        label = f"real, {split} combinations".replace("_", "-")
        rows.append((label, "accepted", *(percent(r[f"accepted_{split}"]) for r in results)))
    for kind in kinds:
        rows.append((kind, "rejected", *(percent(r[f"rejected_{kind}"]) for r in results)))
    for factor in shapes.NAMES:
        for split in ("seen", "held_out"):
            label = f"{factor}, {split} combinations".replace("_", "-")
            cells = (percent(r.get(f"read_{split}_{factor}")) for r in results)
            rows.append((label, "read right", *cells))
    for factor in shapes.NAMES:
        cells = (percent(r.get(f"told_{factor}")) for r in results)
        rows.append((f"{factor} altered", "told from the claim", *cells))
    rows.append(("seconds", "", *seconds))
    table(("images", "", *names), rows)

    print(f"Blurs of held-out images; sigma {counterexamples.BLUR} alone has set the threshold.\n")
    header = ("pixels", "sigma / side", "sigma, pixels")
    header += ("shape read right", "size read right", "accepted")
    table(header, [row for image in judging.THRESHOLD for row in ladder(image, count // 2)])


if __name__ == "__main__":
    main()
