"""What the verbs that use trained networks share: the workdir, how images are sampled, where results go, and how long it still takes."""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dlc_jax import workdir as home
from dlc_jax.data.progress import Progress
from dlc_jax.errors import UserError

if TYPE_CHECKING:
    from dlc_jax import pipeline

SAMPLERS = ("euler", "heun")  # diffusion.sample.METHODS, which needs jax


def add_workdir(parser) -> None:
    parser.add_argument("-w", "--workdir", required=True, metavar="W", help="folder of a run")
    parser.add_argument("--batch", type=whole, default=64, metavar="N", help="most images in memory of the device at once; 64")


def add_sampling(parser) -> None:
    own = "as in the run's recipe if not given"
    parser.add_argument("--steps", type=whole, metavar="N", help=f"steps of the sampler; {own}")
    parser.add_argument("--sampler", choices=SAMPLERS, help=f"of the generator; {own}")
    parser.add_argument("--guidance", type=float, metavar="G", help=f"1 is none, above 1 leans to the codes; {own}")
    parser.add_argument("--seed", type=seed, default=0, metavar="S", help="another seed draws other images; 0")


def check(arguments) -> None:
    """Refuses what is no run, before seconds are spent on `load`."""
    home.read_config(arguments.workdir)


def load(arguments, count: int) -> "pipeline.Pipeline":
    """The pipeline for `count` images: a batch is no larger than that."""
    from absl import logging

    from dlc_jax import pipeline

    logging.set_verbosity(logging.ERROR)
    return pipeline.load(arguments.workdir, batch=min(count, arguments.batch))


def sampling(arguments, networks: "pipeline.Pipeline") -> dict:
    """What `Pipeline.decode` takes, said on stdout."""
    chosen = {
        "steps": networks.steps if arguments.steps is None else arguments.steps,
        "guidance": networks.guidance if arguments.guidance is None else arguments.guidance,
        "method": arguments.sampler or networks.method,
    }
    print(f"{chosen['steps']} steps of {chosen['method']}, guidance {chosen['guidance']:g}, seed {arguments.seed}", flush=True)
    return chosen


def resized(images: Sequence[np.ndarray], size: int) -> int:
    """How many images are not of the encoder's size."""
    return sum(image.shape[:2] != (size, size) for image in images)


def say_resized(count: int, total: int, size: int) -> None:
    if count:
        print(f"{count} of {total} images resized to {size} x {size} pixels, their centers cropped", flush=True)


def parts(total: int, size: int, what: str) -> Iterator[tuple[int, int]]:
    """(start, stop) of the parts of a job, showing how much of it is done and when it will end."""
    with Progress(what, "images") as progress:
        for start in range(0, total, size):
            progress(start, total)
            yield start, min(start + size, total)


def prepare(path: Path, folder: Path) -> Path:
    """Sees to it that `path` can be written in `folder`, which is made, before the long work rather than after it."""
    if path != folder and path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; give a file as --out")
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return path


@contextlib.contextmanager
def writing(path: Path):
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; make room or give another --out") from error


def whole(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**31 - 1:  # seed + 1 is used too
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to {2**31 - 2}")
    return int(text)
