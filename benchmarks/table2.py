"""What a generator is conditioned on, on real images: the paper's Table 2 in small.

    python benchmarks/table2.py PLACE --workdir DIR --weights squeezenet_v1.0_decoded_OIHW.npz

PLACE is CIFAR-10, or any place of images in folders by class, taken at 16 pixels. DIR can be that
of `priors.py`: encoder, codes and prior are the same and are trained once. One generator is trained
a condition, alike in all but what it reads:

    none       nothing
    label      the class
    embedding  the encoder's continuous summary, from which the codes are read; new ones are drawn
               from a normal distribution fitted to those of training, for want of a better prior
    codes      128 positions of 16 values; new ones are drawn from the prior, a call a position

Of each: how well a linear probe reads the class from the condition (unseen images); the Fréchet
distance of SqueezeNet's features between 5,000 training images and as many images as `--count`
that are generated from new conditions; and the same of unseen images that went through their
condition and back. The floor is that distance of these unseen images themselves. What is done in
DIR is not done again.
"""

import argparse
from pathlib import Path

import numpy as np
from baselines import Board
from priors import prior, ruler, run

from dlc_jax import pipeline
from dlc_jax.data.codes import CodeStore
from dlc_jax.data.sources import DataSet
from dlc_jax.diffusion.code_sampler import CodeSampler
from dlc_jax.diffusion.sample import Sampler
from dlc_jax.evals.probe import Fit, linear_probe

CONDITIONS = ("none", "label", "embedding", "codes")
HOW = Sampler(method="heun", steps=10)


class Bench:
    """Encoder, codes and prior, trained if they are not there, and a generator a condition."""

    def __init__(self, arguments):
        self.arguments, self.shared = arguments, arguments.workdir / "shared"
        self.lines = prior({}, arguments.prior_steps)
        run(arguments.place, self.shared, "encoder,codes,prior", self.lines)
        data = DataSet(name="images", path=arguments.place, image=16)
        self.classes = len(data.factors()["label"])
        self.train, self.unseen = (
            self.read(data.source(split), CodeStore(self.shared / "codes" / split), count)
            for split, count in (("train", None), ("validation", arguments.count))
        )
        self.distance = ruler(arguments)

    def read(self, source, store: CodeStore, count: int | None) -> dict:
        rows = np.linspace(0, len(store) - 1, count or len(store)).astype(int)
        found = {"codes": store.codes(rows).astype(np.int32), "embedding": store.embeddings(rows)}
        if count:
            found["images"] = np.stack([source[int(row)]["image"] for row in rows])
        found["label"] = np.array([source[int(row)]["label"] for row in rows])
        return found

    def probe(self, condition: str) -> dict:
        """Share of unseen images whose class a linear classifier reads from their condition."""
        how = {"classes": [self.classes], "values": 16, "fit": Fit(epochs=20)}
        train, unseen = (
            (split[condition], split["label"][:, None]) for split in (self.train, self.unseen)
        )
        return {"accuracy": float(linear_probe(*train, *unseen, **how).accuracy[0])}

    def loaded(self, condition: str, seed: int):
        """The pipeline of a condition's generator, trained if it is not there."""
        place = self.arguments.workdir / f"{condition}_{self.arguments.steps}_{seed}"
        lines = self.lines | {"generator.train.steps": self.arguments.steps, "seed": seed}
        lines |= {"codes.path": self.shared / "codes"}
        if condition != "codes":
            lines |= {"generator.model.positions": 0, "generator.model.values": 0}
        if condition == "embedding":
            lines["generator.model.embedding"] = self.unseen["embedding"].shape[1]
        elif condition != "codes":
            lines |= {"codes.path": "", "generator.codes": ""}
        if condition == "label":
            lines["generator.model.classes"] = self.classes
        run(self.arguments.place, place, "generator", lines)
        return pipeline.load(place, batch=250)

    def new(self, condition: str) -> dict:
        """New conditions, `count` of them, as `Pipeline.decode` takes them."""
        count, random = self.arguments.count, np.random.default_rng(3)
        if condition == "none":
            return {"count": count}
        if condition == "label":
            return {"count": count, "labels": random.integers(0, self.classes, count)}
        if condition == "embedding":
            known = self.train["embedding"].astype(np.float64)
            normal = random.multivariate_normal(known.mean(0), np.cov(known.T), count)
            return {"embeddings": normal.astype(np.float32)}
        with pipeline.load(self.shared, batch=250) as shared:
            sampler = CodeSampler(method="first_hitting")
            return {"codes": shared.sample_codes(count, seed=7, sampler=sampler)}

    def own(self, condition: str) -> dict:
        """The conditions of the unseen images."""
        names = {"label": "labels", "embedding": "embeddings", "codes": "codes"}
        some = {"count": self.arguments.count} if condition == "label" else {}
        return {names[condition]: self.unseen[condition]} | some

    def images(self, condition: str, seed: int) -> dict:
        """Both distances of a generator."""
        with self.loaded(condition, seed) as loaded:
            asked = {"generated": self.new(condition)}
            if condition != "none":
                asked["there and back"] = self.own(condition)
            return {
                name: self.distance(loaded.decode(**given, seed=1, sampler=HOW))
                for name, given in asked.items()
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("place")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--steps", type=int, default=2000, help="of each generator")
    parser.add_argument("--prior-steps", type=int, default=3000)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--count", type=int, default=2000, help="images of a distance")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    board = Board(arguments.workdir / f"table2_{arguments.count}.json")
    floor = board.of("floor", lambda: {"distance": bench.distance(bench.unseen["images"])})
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    print(f"Fréchet distance of {arguments.count} unseen images: {floor['distance']:.0f}\n")
    print("| condition | linear probe % | generated | there and back |\n|---|---:|---:|---:|")
    for condition in CONDITIONS:
        probed = ""
        if condition in ("embedding", "codes"):
            found = board.of(f"{condition}, probe", bench.probe, condition)
            probed = f"{100 * found['accuracy']:.1f}"
        keys = [f"{condition}, {arguments.steps} steps, seed {seed}" for seed in seeds]
        rows = [
            board.of(key, bench.images, condition, seed)
            for key, seed in zip(keys, seeds, strict=True)
        ]
        cells = [
            ", ".join(f"{row[name]:.0f}" for row in rows if name in row)
            for name in ("generated", "there and back")
        ]
        print(f"| {condition} | {probed} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
