"""Codes against other conditions of one generator at equal budget: reconstruction, composition.

    python benchmarks/baselines.py W --workdir DIR [--steps 3000] [--seeds 0,1,2]

W is a run of the embedded shapes whose encoder is trained, as of `configs/quickstart.py`.
Its generator is trained anew under each condition, alike in all but what it reads:

    codes      the codes of W: positions by coin, or form and ground of one, tint of the other
    embedding  the continuous tokens that these codes are read from (RCG's way): mean, slerp of two
    factors    the true factors, the ceiling: each from a parent, all parents shown
    label      the class, which is the (shape, color, background) that training showed; a new
               combination has no label, so a child is the mean of two labels' vectors
    none       nothing: what chance is for this generator

Children are of pairs of unseen images that differ in every factor. A success is that of
`evals.factors`: valid, shape, color and background each a parent's, and both parents in them.
Options of training that only codes of many positions have (`objective.drop_positions`, `foreign`)
are W's for codes, and 0 for factors and labels. What was measured is kept in DIR/baselines.json,
and a second run measures the rest.
"""

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import children
import numpy as np
from children import KNOWN, SEEN, assigned, label_of, slerp

from dlc_jax import pipeline, recipe
from dlc_jax import workdir as home
from dlc_jax.composition.operators import Chosen, Coin
from dlc_jax.data import code_writer
from dlc_jax.data.codes import CodeStore
from dlc_jax.data.sources import DataSet
from dlc_jax.evals import composition
from dlc_jax.evals.factors import Factors

IMAGES = 512  # unseen ones: for reconstruction, and to choose pairs from
NAMED = "form+ground, tint"
CODES = {"coin": Coin(), NAMED: Chosen(groups=("form+ground", "tint"))}
OPERATORS = {
    "codes": tuple(CODES),
    "embedding": ("mean", "slerp"),
    "factors": ("each from a parent",),
    "label": ("mean",),
    "none": ("unconditional",),
}


class Board:
    """What was measured, kept in a file."""

    def __init__(self, path: Path):
        self.path = path
        self.rows = json.loads(path.read_text()) if path.exists() else {}

    def of(self, name: str, make, *arguments) -> dict:
        if name not in self.rows:
            begin = time.monotonic()
            self.rows[name] = make(*arguments)
            home.write(self.path, self.rows)
            print(f"{name}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
        return self.rows[name]


class Bench:
    """A trained encoder's codes and embeddings of unseen images, and generators that learn them."""

    def __init__(self, arguments):
        self.arguments, self.place, self.last = arguments, arguments.workdir, None
        self.coded = self.place / f"coded_{arguments.embedding}"
        self.place.mkdir(parents=True, exist_ok=True)
        self.file = arguments.run / "config.json"
        self.config = recipe.of_run(arguments.run)
        self.encoder = self.config.codes.encoder
        self.data = DataSet(**self.config.data)
        self.judge, values = self.data.judge(), self.data.factors()
        if self.judge is None:
            sys.exit(f"baselines: {arguments.run} is no run of the embedded shapes")
        self.rates = Factors(self.judge, list(values), [len(each) for each in values.values()])
        self.encode()
        source = self.data.source("validation")
        records = [source[row] for row in range(min(IMAGES, len(source)))]
        self.images, self.factors = (
            np.stack([record[name] for record in records]) for name in ("image", "factors")
        )
        self.pairs = composition.choose_parents(self.factors, arguments.pairs, parents=2, seed=0)
        with pipeline.load(self.coded) as coded:
            self.groups = coded.groups
        store = CodeStore(self.coded / "codes" / "validation")
        rows = np.arange(len(records))
        self.own = {
            "codes": store.codes(rows).astype(np.int32),
            "embedding": store.embeddings(rows),
            "factors": self.factors,
            "label": label_of(self.factors)[:, None],
        }

    def encode(self) -> None:
        """Codes and embeddings of all images by W's encoder, and two stores that need none."""
        if not (self.coded / self.encoder).is_dir():
            trained = recipe.trained(self.config, self.arguments.run, self.encoder)
            copied = shutil.copytree(trained, self.coded / "copied", dirs_exist_ok=True)
            copied.rename(self.coded / self.encoder)  # whole, or not there
        lines = {"codes.path": "", "codes.embedding": self.arguments.embedding}
        self.train(self.coded, "codes", lines | {"codes.splits": "('train','validation')"})
        for split in ("train", "validation"):
            source = self.data.source(split)

            def rows(start, stop, source=source):
                return np.stack([source[row]["factors"] for row in range(start, stop)])

            how = {"total": len(source), "source": self.data.identity(split)}
            code_writer.write(
                self.place / "factors" / split,
                lambda start, stop, rows=rows: {"codes": rows(start, stop)},
                positions=len(self.rates.classes),
                values=max(self.rates.classes),
                identity="factors",
                **how,
            )
            code_writer.write(
                self.place / "label" / split,
                lambda start, stop, rows=rows: {"codes": label_of(rows(start, stop))[:, None]},
                positions=1,
                values=len(SEEN),
                identity="combination",
                **how,
            )

    def train(self, workdir: Path, step: str, lines: dict) -> None:
        if home.done(workdir / step) is not None:
            return
        given = [f"--config.{name}={value}" for name, value in lines.items()]
        given += [f"--config.steps=('{step}',)", f"--workdir={workdir}"]
        command = [sys.executable, "-m", "dlc_jax.main", f"--config={self.file}", *given]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def lines(self, condition: str) -> dict:
        """What a generator's recipe has of a condition."""
        of_encoder = condition in ("codes", "embedding")
        store = self.coded / "codes" if of_encoder else self.place / condition
        if condition == "codes":
            return {"codes.path": store}
        model = {"positions": 0, "values": 0}
        if condition == "none":
            lines = {"codes.path": "", "generator.codes": ""}
        elif condition == "embedding":
            lines = {"codes.path": store, "codes.embedding": self.arguments.embedding}
            model["embedding"] = self.own["embedding"].shape[1]
        else:
            about = CodeStore(store / "train").manifest
            model = {name: about[name] for name in model}
            lines = {f"{self.encoder}.model.simplicial.{name}": model[name] for name in model}
            lines |= {"codes.path": store, "generator.objective.drop_positions": 0.0}
            lines |= {"generator.objective.foreign": 0.0}
        return lines | {f"generator.model.{name}": value for name, value in model.items()}

    def opened(self, condition: str, seed: int):
        """The pipeline of a condition's generator, trained if it is not there."""
        workdir = self.place / f"{self.named(condition)}_{self.arguments.steps}_{seed}"
        if self.last is None or self.last[0] != workdir:
            lines = {"generator.train.steps": self.arguments.steps, "seed": seed}
            self.train(workdir, "generator", lines | self.lines(condition))
            self.last = workdir, pipeline.load(workdir, batch=256)
        return self.last[1]

    def named(self, condition: str) -> str:
        """A condition with all that its generator depends on."""
        return f"embedding_{self.arguments.embedding}" if condition == "embedding" else condition

    def children(self, condition: str, operator: str, draw: int):
        """(what a pair's child is decoded from, the factors int [n, 3] that are asked for or None).

        A coin asks for nothing by name, nor does what lies between two embeddings or labels.
        """
        if condition == "none":
            return {"count": len(self.pairs)}, None
        first, second = (self.own[condition][self.pairs[:, n]] for n in range(2))
        if condition == "codes":
            found = CODES[operator]([first, second], seed=draw, groups=self.groups).codes
            if operator == "coin":
                return {"codes": found}, None
            a, b = (self.factors[self.pairs[:, n], :KNOWN] for n in range(2))
            return {"codes": found}, np.stack([a[:, 0], b[:, 1], a[:, 2]], 1)
        if condition == "embedding":
            middle = slerp(first, second) if operator == "slerp" else (first + second) / 2
            return {"embeddings": middle}, None
        if condition == "factors":
            found = assigned(first, second, draw)
            return {"codes": found}, found[:, :KNOWN]
        soft = np.eye(len(SEEN), dtype=np.float32)
        return {"codes": (soft[first] + soft[second]) / 2}, None

    def compose(self, condition: str, seed: int, operator: str, scale: float) -> dict:
        """What the judge reads of every draw of every pair, and what was asked for."""
        loaded, readings, asked = self.opened(condition, seed), [], []
        for draw in range(self.arguments.draws):
            given, names = self.children(condition, operator, draw)
            how = {"seed": 1000 + draw, "sampler": guided(loaded.sampler, scale)}
            readings.append(self.judge.read(loaded.decode(**given, **how)))
            asked.append(None if names is None else names.tolist())
        return {
            "factors": [reading.factors.tolist() for reading in readings],
            "valid": [reading.valid.tolist() for reading in readings],
            "asked": asked if asked[0] is not None else None,
        }

    def rebuild(self, condition: str, seed: int, scale: float) -> dict:
        """Shares of unseen images whose factors come back from their own condition."""
        loaded = self.opened(condition, seed)
        name = "embeddings" if condition == "embedding" else "codes"
        given = (
            {name: self.own[condition]} if condition in self.own else {"count": len(self.images)}
        )
        images = loaded.decode(**given, seed=999, sampler=guided(loaded.sampler, scale))
        return self.rates.reconstruction(self.factors, self.images, images)[0]

    def measure(self, board: Board) -> tuple[dict, dict]:
        """({(condition, guidance): a row a seed}, {(condition, operator, guidance): the same})."""
        rebuilt, composed = {}, {}
        scales = [float(scale) for scale in self.arguments.guidance.split(",")]
        counts = f"{self.arguments.pairs} pairs, {self.arguments.draws} draws"
        for condition in self.arguments.conditions.split(","):
            for seed in map(int, self.arguments.seeds.split(",")):
                run = f"{self.named(condition)}_{self.arguments.steps}_{seed}"
                for scale in scales if condition != "none" else [1.0]:
                    tag = f"{run}, guidance {scale:g}"
                    found = board.of(tag, self.rebuild, condition, seed, scale)
                    rebuilt.setdefault((condition, scale), []).append(found)
                    for operator in OPERATORS[condition]:
                        if operator == NAMED and not {"form", "ground", "tint"} <= set(self.groups):
                            continue
                        key = f"{tag}, {operator}, {counts}"
                        found = board.of(key, self.compose, condition, seed, operator, scale)
                        composed.setdefault((condition, operator, scale), []).append(found)
        return rebuilt, composed


def guided(sampler, scale: float):
    return dataclasses.replace(sampler, guidance=dataclasses.replace(sampler.guidance, scale=scale))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run", type=Path)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--conditions", default=",".join(OPERATORS))
    parser.add_argument("--guidance", default="1,1.5")
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--embedding", choices=("class", "summary"), default="summary")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    rebuilt, composed = bench.measure(Board(arguments.workdir / "baselines.json"))
    names = bench.rates.names
    print(children.reconstruction(rebuilt, names))
    parents = [bench.factors[bench.pairs[:, n]] for n in range(2)]
    some = bench.rates.composition(parents, bench.images[bench.pairs[:, 0]])
    print(children.composition(composed, parents, bench.rates, chance=some["chance_success"]))


if __name__ == "__main__":
    main()
