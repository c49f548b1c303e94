"""How well codes of two images compose, by operator; where factors come from; what positions know.

    python benchmarks/composition.py runs/quickstart [--parts operators,origins,probes,crops,taught]

For runs whose data set has a judge. `operators`: success of pairs that differ in every factor, see
`evals.factors`. `origins`: from which parent factors come, and whether together. `probes`: what one
kind's positions know, by a linear probe. `crops`: the same of codes that are taken from the mean of
the logits over several crops of the kind, instead of from the image itself. `taught`: the same of a
student of the encoder that learned to say of the image itself what the encoder says of its crops.
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dlc_jax import pipeline
from dlc_jax.composition.groups import shared_out
from dlc_jax.composition.mix import mix
from dlc_jax.composition.operators import Blocks, Chosen, Coin, Infill, Refine
from dlc_jax.data import sources, transforms
from dlc_jax.evals import composition
from dlc_jax.evals.factors import Factors, area
from dlc_jax.evals.probe import linear_probe
from dlc_jax.models.vit import standardize

COUNT, CROPS = 512, 8
LESSON = {"images": 12_000, "steps": 600, "batch": 256, "rate": 1e-3, "temperature": 0.5}
OPERATORS = {
    "coin": Coin(),
    "blocks": Blocks(),
    "infill 1/9": Infill(share=1 / 9),
    "infill 1/6": Infill(share=1 / 6),
    "infill 1/4": Infill(share=1 / 4),
    "infill whole": Infill(share=1 / 3, whole=True),
    "infill form, tint": Infill(groups=("form", "tint")),
    "chosen form, tint+ground": Chosen(groups=("form", "tint+ground")),
    "chosen form+ground, tint": Chosen(groups=("form+ground", "tint")),
    "chosen form+tint, ground": Chosen(groups=("form+tint", "ground")),
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
        encoder = self.config.encoder
        self.shares = shared_out(encoder.crops, encoder.model.simplicial["positions"])
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
        every = []
        for name, operator in OPERATORS.items():
            named = "+".join(getattr(operator, "groups", ()))
            if any(group not in self.run.groups for group in named.split("+") if named):
                continue
            codes, bits = self.run.compose(self.parents, operator=operator, seed=self.config.seed)
            for sampler in dict.fromkeys((own, free)):
                children = self.run.decode(codes, seed=3, sampler=sampler)
                found = rates.composition(inherited, children, bits)
                reading = self.judge.read(children)
                every.append((bits, rates.success(inherited, reading), reading.valid))
                shares = " | ".join(f"{100 * found[column]:.1f}" for column in columns)
                auc = found.get("auc_bits", float("nan"))
                scale = sampler.guidance.scale
                print(f"| {name} | {scale} | {shares} | {found['bits']:.2f} | {auc:.2f} |")
        chance = 100 * found["chance_success"]
        real = self.run.surprise(self.codes).mean()
        print(f"\nchance of success {chance:.1f} %; bits of real codes {real:.2f}")
        bits, *kinds = (np.concatenate(column) for column in zip(*every))
        areas = [area(bits, hits)["auc_bits"] for hits in kinds]
        print("All operators' children together, chance that one with fewer bits is the better:")
        print(f"  it succeeds and the other fails {areas[0]:.2f}, it is valid {areas[1]:.2f}")

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
        pick = np.random.default_rng(0).integers(0, 2, (COUNT, len(self.shares)))
        whole = np.where(
            np.repeat(pick, [len(own) for own in self.shares.values()], axis=1) == 0, *self.parents
        )
        origin = origin_of(whole)
        print("Whole kinds of positions: % of children with a factor of the kind's parent:")
        print("  " + ", ".join(self.names))
        for place, kind in enumerate(self.shares):
            giver = np.where(pick[:, place] == 0, 1, -1)
            shares = [100 * np.mean(column == giver) for column in origin.T]
            print(f"  {kind}: " + ", ".join(f"{each:.0f}" for each in shares))

    def probes(self) -> None:
        train, unseen = self.read("train", 6000), self.read("validation", 2000)
        codes = [self.run.encode(images) for images, _ in (train, unseen)]
        print(f"\nLinear probe of one kind's positions, unseen images, %: {', '.join(self.names)}")
        for kind in self.shares:
            self.probe(kind, *codes, train[1], unseen[1])

    def crops(self) -> None:
        train, unseen = self.read("train", 3000), self.read("validation", 1000)
        print(f"\nThe same of the mean over {CROPS} crops: {', '.join(self.names)}")
        for kind in self.shares:
            codes = [self.averaged(images, kind, CROPS).argmax(-1) for images, _ in (train, unseen)]
            self.probe(kind, *codes, train[1], unseen[1])

    def taught(self) -> None:
        train, unseen = self.read("train", LESSON["images"]), self.read("validation", 2000)
        targets = np.concatenate(
            [
                self.averaged(train[0], kind, CROPS // 2)[:, positions]
                for kind, positions in self.shares.items()
            ],
            axis=1,
        )
        student = self.teach(train[0], targets)
        codes = [self.logits(images, student).argmax(-1) for images in (train[0][:6000], unseen[0])]
        before = self.run.encode(train[0][:2000])
        right = [(each[:2000] == targets[:2000].argmax(-1)).mean() for each in (before, codes[0])]
        print(f"\nAgrees with the mean over crops: {right[0]:.3f}; once taught {right[1]:.3f}")
        print(f"Linear probe of the student's codes: {', '.join(self.names)}")
        for kind in self.shares:
            self.probe(kind, *codes, train[1][:6000], unseen[1])

    def teach(self, images: np.ndarray, targets: np.ndarray):
        """Parameters of a student, taught logits [n, l, v] of images."""
        model, temperature = self.encoder.model, LESSON["temperature"]
        optimizer = optax.adam(optax.cosine_decay_schedule(LESSON["rate"], LESSON["steps"]))

        def loss(params, images, targets):
            logits = model.apply({"params": params}, standardize(images), method="logits")
            targets = jax.nn.softmax(targets / temperature)
            return optax.softmax_cross_entropy(logits / temperature, targets).mean()

        @jax.jit
        def step(params, state, images, targets):
            change, state = optimizer.update(jax.grad(loss)(params, images, targets), state)
            return optax.apply_updates(params, change), state

        params, random = jax.tree.map(jnp.asarray, self.encoder.params), np.random.default_rng(0)
        state = optimizer.init(params)
        for _ in range(LESSON["steps"]):
            rows = random.choice(len(images), LESSON["batch"], replace=False)
            params, state = step(params, state, images[rows], targets[rows])
        return params

    @property
    def encoder(self):
        return self.run.networks["encoder"]

    def logits(self, images: np.ndarray, params=None) -> np.ndarray:
        """Of the simplices, float32 [n, l, v]."""
        params = self.encoder.params if params is None else params
        apply = jax.jit(
            lambda images: self.encoder.model.apply(
                {"params": params}, standardize(images), method="logits"
            )
        )
        return np.concatenate([apply(images[n : n + 500]) for n in range(0, len(images), 500)])

    def averaged(self, images: np.ndarray, kind: str, number: int) -> np.ndarray:
        """Logits [n, l, v], the mean over a number of crops of a kind."""
        section = {**self.config.encoder.crops[kind].to_dict(), "global_crops": number}
        augment, random = transforms.MultiCrop(**section), np.random.default_rng(0)
        views = np.stack([augment({"image": image}, random)["global"] for image in images])
        return sum(self.logits(views[:, n]) for n in range(number)) / number

    def probe(self, kind: str, codes, unseen, factors, answers) -> None:
        part = self.shares[kind]
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
