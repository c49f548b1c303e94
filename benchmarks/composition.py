"""From which parent composed images have their factors, and how factors go together.

python benchmarks/composition.py runs/quickstart
"""

import sys
from pathlib import Path

import numpy as np

from dlc_jax import pipeline
from dlc_jax.composition.operators import Coin
from dlc_jax.data import sources
from dlc_jax.data.codes import CodeStore
from dlc_jax.evals import composition
from dlc_jax.evals.probe import linear_probe

NAMES, CLASSES, COUNT = ("shape", "color", "background", "size"), (6, 6, 4, 2), 512


def main(workdir: Path) -> None:
    networks = pipeline.load(workdir)
    config = networks.config
    values, kinds = config.encoder.model.simplicial["values"], sorted(config.encoder.crops)
    judge = sources.judge(**config.data)

    def read(split, count):
        source = sources.source(split=split, **config.data)
        factors = np.stack([source[index]["factors"] for index in range(count)])
        return CodeStore(workdir / "codes" / split).codes()[:count], factors

    codes, factors = read("validation", COUNT)
    pairs = composition.choose_parents(factors, COUNT, parents=2, seed=config.seed)
    first, second = factors[pairs[:, 0]], factors[pairs[:, 1]]

    def origins(mixed):
        """1 where a child's factor is the first parent's, -1 the second's, 0 neither's."""
        found = judge.read(networks.decode(mixed, seed=3)).factors
        return np.where(found == first, 1, np.where(found == second, -1, 0))

    parents = [codes[pairs[:, 0]], codes[pairs[:, 1]]]
    origin = origins(networks.compose(parents, operator=Coin(), seed=config.seed).codes)
    print("Positions mixed at random: correlation of two factors' origins, if both are a parent's")
    for a in range(4):
        for b in range(a):
            product = origin[:, a] * origin[:, b]
            print(f"  {NAMES[b]} and {NAMES[a]}: {product[product != 0].mean():.2f}")

    share = codes.shape[1] // len(kinds)
    pick = np.random.default_rng(0).integers(0, 2, (COUNT, len(kinds)))
    mixed = np.where(np.repeat(pick, share, axis=1) == 0, codes[pairs[:, 0]], codes[pairs[:, 1]])
    origin = origins(mixed)
    print("Whole kinds of positions copied: % of children with a factor of the kind's parent:")
    print("  " + ", ".join(NAMES))
    for place, kind in enumerate(kinds):
        giver = np.where(pick[:, place] == 0, 1, -1)
        shares = [100 * np.mean(origin[:, factor] == giver) for factor in range(4)]
        print(f"  {kind}: " + ", ".join(f"{each:.0f}" for each in shares))

    train, unseen = read("train", 6000), read("validation", 2000)
    print("Linear probe of one kind's positions, unseen images, %:", ", ".join(NAMES))
    for place, kind in enumerate(kinds):
        part = slice(place * share, (place + 1) * share)
        seen, new = (train[0][:, part], train[1]), (unseen[0][:, part], unseen[1])
        right = linear_probe(*seen, *new, values=values, classes=CLASSES).accuracy
        print(f"  {kind}: " + ", ".join(f"{100 * each:.0f}" for each in right))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
