"""The prior on real codes: objectives at equal budget, samplers by calls, and distilled students.

    python benchmarks/priors.py PLACE --workdir DIR --part objectives|samplers|students
        [--weights squeezenet_v1.0_decoded_OIHW.npz]
    python benchmarks/priors.py --workdir W --part run         the prior of a run as it is
    python benchmarks/priors.py --workdir W --part objectives_of_run --into DIR

PLACE is CIFAR-10 or any place of images, taken at 16 pixels, of which an encoder makes codes of 128
positions with 16 values. `auc` is the area under the curve of a classifier that learned to tell
drawn from held-out codes: 0.5 is the best. Its floor is that of training codes.
With `--weights` some rows have the Fréchet distance of SqueezeNet's features between images of the
training split and images that one generator draws from the codes. Of a run whose data set has a
judge, there is the share of images from drawn codes that are valid. What is done in DIR is not done
again.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from dlc_jax import features, pipeline, recipe
from dlc_jax.data.codes import CodeStore
from dlc_jax.data.sources import DataSet
from dlc_jax.diffusion.code_sampler import METHODS as METHODS_OF
from dlc_jax.diffusion.code_sampler import CodeSampler
from dlc_jax.diffusion.sample import Sampler
from dlc_jax.evals import code_likeness, frechet, two_samples

RECIPE = Path(__file__).parents[1] / "configs" / "image_folder.py"
SHARED = {
    "data.image": 16,
    "*.model*.image": 16,
    "encoder.crops.*_size": 16,
    "encoder.train.steps": 600,
    "encoder.monitor.every": 600,
    "*.threads": 1,
    "*.model*positions": 128,
    "*.model*values": 16,
    "codes.embedding": "summary",  # beside them, for table2.py
}
PRIOR = {
    "model.width": 96,
    "model.depth": 3,
    "model.heads": 4,
    "ema_decay": 0.995,
    "optimizer.learning_rate": 2e-3,
    "optimizer.warmup": 100,
    "optimizer.schedule": "cosine",
    "train.batch": 64,
    "train.validate_every": 100_000,
    "train.validate_batches": 32,
    "train.save_every": 100_000,
}
GENERATOR = {
    "generator.model.patch": 4,
    "generator.model.width": 192,
    "generator.model.depth": 6,
    "generator.model.heads": 6,
    "generator.objective.drop_positions": 0.0,
    "generator.objective.foreign": 0.0,
    "generator.train.batch": 64,
    "generator.train.steps": 1000,
    "generator.ema_decay": 0.995,
    "generator.optimizer.learning_rate": 1e-3,
    "generator.grid.count": 16,
}
OBJECTIVES = {
    "elbo": {},
    "simple": {"process.objective": "simple"},
    "SEDD": {
        "process.objective": "score",
        "process.noise.schedule": "log_linear",
        "model.sigma_conditioning": True,
    },
}
CALLS = (1, 2, 4, 8, 16, 32, 64, 128)
METHODS = {
    "first_hitting": CALLS,
    "ancestral": (*CALLS, 1024),
    "maskgit": CALLS[:-1],
    "low_confidence": CALLS[:-1],
    "entropy": CALLS[:-1],
    "remdm_cap": (8, 16, 32, 64, 128),
    "remdm_loop": (8, 16, 32, 64, 128, 1024),
    "remask": (8, 16, 32, 64, 128),
}
STUDENTS = {"student32": (128, 32, "prior"), "student8": (32, 8, "student32")}


def run(place, workdir, steps, lines, file=RECIPE):
    lines = {"data.path": place, **SHARED, **GENERATOR, **lines}
    given = [f"--config.{name}={value}" for name, value in lines.items()]
    given += [f"--config.steps={tuple(steps.split(','))!r}", f"--workdir={workdir}"]
    command = [sys.executable, "-m", "dlc_jax.main", f"--config={file}", *given]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def prior(lines, steps):
    return {f"prior.{name}": value for name, value in {**PRIOR, **lines}.items()} | {
        "prior.train.steps": steps
    }


def measured(codes, real, values):
    found = code_likeness.likeness(codes, real, values=values)
    area, error = two_samples.auc(codes, real, values=values)
    return {**found, "auc": area, "auc_error": error}


def row(name, found):
    return (
        f"| {name} | {found['calls']:.1f} | {found['auc']:.3f} ± {found['auc_error']:.3f} | "
        f"{found['unigram']:.4f} | {found['pairwise']:.4f} | {found['entropy']:.3f} | "
        f"{found.get('distance', '')} |"
    )


class Board:
    """Rows that were measured, kept in a file."""

    def __init__(self, path):
        self.path = path
        self.rows = json.loads(path.read_text()) if path.exists() else {}

    def of(self, name, make):
        if name not in self.rows:
            begin = time.monotonic()
            self.rows[name] = make() | {"seconds": round(time.monotonic() - begin, 1)}
            self.path.write_text(json.dumps(self.rows, indent=1))
        print(row(name, self.rows[name]), flush=True)
        return self.rows[name]


def objectives(arguments, workdir):
    """Bits per held-out code, and of exact draws the area, over seeds."""
    print("| objective | seed | bits a code | ± | auc |\n|---|---|---|---|---|")
    for name, lines in OBJECTIVES.items():
        for seed in range(3):
            place = workdir / f"objective_{name}_{seed}"
            own = prior(lines, arguments.steps)
            own |= {"codes.path": f"{workdir}/shared/codes", "seed": seed}
            run(arguments.place, place, "prior", own)
            print(
                f"| {name} | {seed} | {learned(place, held_out(workdir, 1000), 16)} |", flush=True
            )


def objectives_of_run(arguments, workdir):
    """The same on the codes of a run, with its own prior's network and steps, into `--into`."""
    store = CodeStore(workdir / "codes" / "validation")
    real = store.codes(np.arange(len(store))[:1000]).astype(np.int32)
    print("| objective | seed | bits a code | ± | auc |\n|---|---|---|---|---|")
    for name, lines in OBJECTIVES.items():
        for seed in range(3):
            place = arguments.into / f"objective_{name}_{seed}"
            own = {f"prior.{field}": value for field, value in lines.items()}
            own |= {"codes.path": f"{workdir}/codes", "seed": seed, "steps": ("prior",)}
            given = [f"--config.{field}={value!r}" for field, value in own.items()]
            command = [sys.executable, "-m", "dlc_jax.main", f"--config={workdir}/config.json"]
            command += [*given, f"--workdir={place}"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            found = learned(place, real, store.manifest["values"])
            print(f"| {name} | {seed} | {found} |", flush=True)


def learned(place, real, values):
    """Cells of a prior: bits of held-out codes, their error, and the area of as many draws."""
    with pipeline.load(place, batch=250) as loaded:
        bits, _ = loaded.likelihood(real, draws=16)
        sampler = CodeSampler(method="ancestral", calls=128)
        codes = loaded.sample_codes(len(real), seed=7, sampler=sampler)
    area, error = two_samples.auc(codes, real, values=values)
    error_of_bits = bits.std(ddof=1) / np.sqrt(len(bits))
    return f"{bits.mean():.2f} | {error_of_bits:.2f} | {area:.3f} ± {error:.3f}"


def held_out(workdir, count, split="validation"):
    store = CodeStore(workdir / "shared" / "codes" / split)
    rows = np.linspace(0, len(store) - 1, count).astype(int)
    return store.codes(rows).astype(np.int32)


def head():
    print("| sampler, calls | calls made | auc | unigram | pairwise | entropy | Fréchet |")
    print("|---|---|---|---|---|---|---|")


def floor(board, workdir, count):
    real = held_out(workdir, count)
    other = held_out(workdir, count, "train")
    board.of("training codes", lambda: measured(other, real, 16) | {"calls": 0})
    return real


def samplers(arguments, workdir, step="prior", methods=METHODS, tag=""):
    board, count = (
        Board(workdir / f"samplers_{arguments.count}_{arguments.steps}.json"),
        arguments.count,
    )
    head()
    real = floor(board, workdir, count)
    distance = distances(arguments, workdir)
    with pipeline.load(workdir / "shared", batch=250) as loaded:
        network = loaded.networks[step]
        every = sorted({each for listed in methods.values() for each in listed})
        tag += "".join(f"{name}={value:g} " for name, value in arguments.set.items())
        for calls in arguments.calls or every:
            for method, listed in methods.items():
                if calls not in listed or arguments.only not in method:
                    continue
                sampler = CodeSampler(method=method, calls=calls, **arguments.set)

                def draw(sampler=sampler):
                    codes, made = network.sample_counted(count, seed=7, sampler=sampler)
                    found = measured(codes, real, 16) | {"calls": float(made.mean())}
                    return found | distance(loaded, codes)

                board.of(f"{tag}{method} {calls}", draw)


def ruler(arguments):
    """uint8 images [n, y, x, 3] -> their Fréchet distance to 5,000 images of the training split."""
    network = features.load("squeezenet", weights=arguments.weights, protocol="stretch")
    (name, width), apply = next(iter(network.outputs.items())), jax.jit(network.apply)

    def moments(images):
        found = frechet.Moments.of(width)
        for start in range(0, len(images), 250):
            rows = apply(network.params, network.prepare(list(images[start : start + 250])))
            found.add(np.asarray(rows[name]))
        return found.statistics()[:2]

    data = DataSet(name="images", path=arguments.place, image=16).source("train")
    rows = np.linspace(0, len(data) - 1, 5000).astype(int)
    reference = moments(np.stack([data[int(row)]["image"] for row in rows]))
    return lambda images: frechet.distance(*moments(images), *reference)


def distances(arguments, workdir):
    """(pipeline, codes) -> the Fréchet distance of their images, where weights are given.

    Every code is decoded with the same noise by its number.
    """
    if not arguments.weights:
        return lambda loaded, codes: {}
    run(arguments.place, workdir / "shared", "generator", prior({}, arguments.steps))
    measure, how = ruler(arguments), Sampler(method="heun", steps=10)
    return lambda loaded, codes: {
        "distance": round(measure(loaded.decode(codes, seed=1, sampler=how)))
    }


def of_run(arguments, workdir):
    """The samplers of a run's prior, with as many calls as it has positions and fewer."""
    config = recipe.of_run(workdir)
    judge = DataSet(**config.data).judge()
    store = CodeStore(workdir / "codes" / "validation")
    real = store.codes(np.arange(len(store))[: arguments.count]).astype(np.int32)
    train = CodeStore(workdir / "codes" / "train")
    other = train.codes(np.arange(len(train))[: arguments.count]).astype(np.int32)
    length, values = real.shape[1], store.manifest["values"]
    print("| sampler, calls | calls made | auc | unigram | pairwise | entropy | valid |")
    print("|---|---|---|---|---|---|---|")
    with pipeline.load(workdir, batch=250) as loaded:

        def show(name, codes, calls):
            found = measured(codes, real, values) | {"calls": calls}
            if judge:
                images = loaded.decode(codes, seed=1)
                found["distance"] = f"{judge.read(images).valid.mean():.3f}"
            print(row(name, found), flush=True)

        show("training codes", other, 0)
        network = loaded.networks[arguments.step or loaded.prior]
        own = METHODS_OF[type(network.process)]
        methods = METHODS if own.keys() > METHODS.keys() else own
        every = [each for each in CALLS if each < length] + [length, 4 * length]
        for calls in arguments.calls or every:
            for method in methods:
                again = method in ("remdm_cap", "remdm_loop", "remask")
                if (calls < 8 and again) or (calls > length and not again):
                    continue
                if arguments.only not in method:
                    continue
                sampler = CodeSampler(method=method, calls=calls, **arguments.set)
                codes, made = network.sample_counted(arguments.count, seed=7, sampler=sampler)
                show(f"{method} {calls}", codes, float(made.mean()))


def students(arguments, workdir):
    """Two rounds of distillation: 128 calls to 32 to 8."""
    lines = {**prior({}, arguments.steps)}
    for name, (teacher_calls, calls, teacher) in STUDENTS.items():
        own = {"stage": "distill", "teacher": teacher, "calls": calls}
        own |= {"teacher_calls": teacher_calls, **PRIOR, "optimizer.learning_rate": 3e-4}
        own |= {"train.steps": arguments.student_steps, "train.dtype": "float32"}
        own |= {"divergence": arguments.divergence}
        lines |= {f"{name}.{field}": value for field, value in own.items()}
    run(arguments.place, workdir / "shared", ",".join(STUDENTS), lines)
    some = {"first_hitting": (1, 2, 4, 8, 16, 32), "maskgit": (4, 8)}
    for name in STUDENTS:
        samplers(arguments, workdir, name, some, f"{name} ")


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("place", nargs="?")
    parser.add_argument("--workdir", required=True, type=Path)
    parts = {"objectives": objectives, "samplers": samplers, "students": students, "run": of_run}
    parts["objectives_of_run"] = objectives_of_run
    parser.add_argument("--part", choices=parts, required=True)
    parser.add_argument("--into", type=Path, help="folder for the priors of `objectives_of_run`")
    parser.add_argument("--weights")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--student-steps", type=int, default=600, help="of each round")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--divergence", default="reverse")
    parser.add_argument("--step", default="", help="of `run`, in place of the prior of its samples")
    parser.add_argument("--only", default="", help="methods with this in their name")
    parser.add_argument("--calls", type=int, nargs="*", help="all that make sense if not given")
    parser.add_argument("--set", nargs="*", default=(), type=lambda text: text.split("="))
    arguments = parser.parse_args()
    arguments.set = {name: float(value) for name, value in arguments.set}
    workdir = arguments.workdir
    if arguments.part == "objectives_of_run" and arguments.into is None:
        parser.error("objectives_of_run trains nine priors: say where with --into")
    if arguments.part not in ("run", "objectives_of_run"):
        steps = "encoder,codes" if arguments.part == "objectives" else "encoder,codes,prior"
        run(arguments.place, workdir / "shared", steps, prior({}, arguments.steps))
    parts[arguments.part](arguments, workdir)


if __name__ == "__main__":
    main()
