"""How well codes of two images compose, by operator; where factors come from; what positions know.

    python benchmarks/composition.py runs/quickstart [--parts operators,origins,probes,crops]

For runs whose data set has a judge. `operators`: success of pairs that differ in every factor, see
`evals.factors`. `origins`: from which parent factors come, and whether together. `probes`: what one
kind's positions know, by a linear probe. `crops`: the same of codes that are taken from the mean of
the log chances over several crops of the kind, instead of from the image itself.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np

from dlc_jax import pipeline
from dlc_jax.composition.mix import mix
from dlc_jax.composition.operators import Blocks, Coin, Infill, Refine
from dlc_jax.data import sources, transforms
from dlc_jax.evals import composition
from dlc_jax.evals.factors import Factors
from dlc_jax.evals.probe import linear_probe

COUNT, CROPS = 512, 8
OPERATORS = {
    "coin": Coin(),
    "blocks": Blocks(),
    "infill 1/9": Infill(share=1 / 9),
    "infill 1/6": Infill(share=1 / 6),
    "infill 1/4": Infill(share=1 / 4),
    "infill whole": Infill(share=1 / 3, whole=True),
    "infill form, tint": Infill(groups=("form", "tint")),
    "refine coin": Refine(share=1 / 6, rounds=6),
    "refine infill 1/6": Refine(start=Infill(share=1 / 6), rounds=2),
}


class Bench:
    """A run, unseen images of it and pairs of them that differ in every factor."""

    def __init__(self, workdir: Path):
        self.run = pipeline.load(workdir)
        self.config = self.run.config
        self.data = sources.DataSet(**self.config.data)
        self.judge, self.names = self.data.judge(), list(self.data.factors())
        self.classes = [len(values) for values in self.data.factors().values()]
        self.kinds = sorted(self.config.encoder.crops)
        images, self.factors = self.read("validation", COUNT)
        self.codes = self.run.encode(images)
        self.pairs = composition.choose_parents(
            self.factors, COUNT, parents=2, seed=self.config.seed
        )
        self.parents = [self.codes[self.pairs[:, n]] for n in range(2)]

    def read(self, split: str, count: int):
        """(images, factors) of the first records of a split."""
        source = self.data.source(split)
        records = [source[index] for index in range(count)]
        return tuple(np.stack([each[name] for each in records]) for name in ("image", "factors"))

    def operators(self) -> None:
        rates = Factors(self.judge, self.names, self.classes)
        inherited = [self.factors[self.pairs[:, n]] for n in range(2)]
        columns = ["success", "valid", "both_parents"]
        columns += [f"{name}_from_parents" for name in self.names[:3]]
        print(f"\n| operator | guidance | {' | '.join(columns)} | bits | auc of bits |")
        print(f"|---|{'---:|' * (len(columns) + 3)}")
        own = self.run.sampler
        free = dataclasses.replace(own, guidance=dataclasses.replace(own.guidance, scale=1.0))
        for name, operator in OPERATORS.items():
            if any(group not in self.run.groups for group in getattr(operator, "groups", ())):
                continue
            codes, bits = self.run.compose(self.parents, operator=operator, seed=self.config.seed)
            for sampler in (own, free):
                children = self.run.decode(codes, seed=3, sampler=sampler)
                found = rates.composition(inherited, children, bits)
                shares = " | ".join(f"{100 * found[column]:.1f}" for column in columns)
                auc = found.get("auc_bits", float("nan"))
                scale = sampler.guidance.scale
                print(f"| {name} | {scale} | {shares} | {found['bits']:.2f} | {auc:.2f} |")
        chance = 100 * found["chance_success"]
        real = self.run.surprise(self.codes).mean()
        print(f"\nchance of success {chance:.1f} %; bits of real codes {real:.2f}")

    def origins(self) -> None:
        first, second = (self.factors[self.pairs[:, n]] for n in range(2))

        def origin_of(mixed):
            """1 where a child's factor is the first parent's, -1 the second's, 0 neither's."""
            found = self.judge.read(self.run.decode(mixed, seed=3)).factors
            return np.where(found == first, 1, np.where(found == second, -1, 0))

        origin = origin_of(mix(self.parents, seed=self.config.seed))
        print("\nPositions by lot: correlation of two factors' origins, if both are a parent's")
        for a in range(len(self.names)):
            for b in range(a):
                product = origin[:, a] * origin[:, b]
                print(f"  {self.names[b]} and {self.names[a]}: {product[product != 0].mean():.2f}")
        share = self.codes.shape[1] // len(self.kinds)
        pick = np.random.default_rng(0).integers(0, 2, (COUNT, len(self.kinds)))
        whole = np.where(np.repeat(pick, share, axis=1) == 0, *self.parents)
        origin = origin_of(whole)
        print("Whole kinds of positions: % of children with a factor of the kind's parent:")
        print("  " + ", ".join(self.names))
        for place, kind in enumerate(self.kinds):
            giver = np.where(pick[:, place] == 0, 1, -1)
            shares = [100 * np.mean(column == giver) for column in origin.T]
            print(f"  {kind}: " + ", ".join(f"{each:.0f}" for each in shares))

    def probes(self) -> None:
        train, unseen = self.read("train", 6000), self.read("validation", 2000)
        codes = [self.run.encode(images) for images, _ in (train, unseen)]
        print(f"\nLinear probe of one kind's positions, unseen images, %: {', '.join(self.names)}")
        for kind in self.kinds:
            self.probe(kind, *codes, train[1], unseen[1])

    def crops(self) -> None:
        train, unseen = self.read("train", 3000), self.read("validation", 1000)
        print(f"\nThe same of the mean over {CROPS} crops: {', '.join(self.names)}")
        for kind in self.kinds:
            codes = [self.averaged(images, kind) for images, _ in (train, unseen)]
            self.probe(kind, *codes, train[1], unseen[1])

    def averaged(self, images: np.ndarray, kind: str) -> np.ndarray:
        """Codes [n, l] of the mean of the log chances over crops of a kind."""
        section = {**self.config.encoder.crops[kind].to_dict(), "global_crops": CROPS}
        augment, random = transforms.MultiCrop(**section), np.random.default_rng(0)
        views = np.stack([augment({"image": image}, random)["global"] for image in images])
        chances = (self.run.simplices(views[:, n], temperature=0.5) for n in range(CROPS))
        return sum(np.log(np.maximum(each, 1e-20)) for each in chances).argmax(-1)

    def probe(self, kind: str, codes, unseen, factors, answers) -> None:
        share = codes.shape[1] // len(self.kinds)
        part = slice(self.kinds.index(kind) * share, (self.kinds.index(kind) + 1) * share)
        how = {"values": self.config.encoder.model.simplicial["values"], "classes": self.classes}
        right = linear_probe(codes[:, part], factors, unseen[:, part], answers, **how).accuracy
        print(f"  {kind}: " + ", ".join(f"{100 * each:.0f}" for each in right), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--parts", default="operators,origins,probes")
    arguments = parser.parse_args()
    bench = Bench(arguments.workdir)
    for part in arguments.parts.split(","):
        getattr(bench, part)()


if __name__ == "__main__":
    main()
