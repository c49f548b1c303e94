"""What the verbs that use trained networks share: the workdir, samplers, and where results go."""

import argparse
import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dlc_jax import recipe
from dlc_jax import workdir as home
from dlc_jax.data.progress import Progress
from dlc_jax.errors import UserError

if TYPE_CHECKING:
    from dlc_jax.pipeline import Pipeline

SAMPLERS = ("sampler", "code_sampler")  # fields of a `samples` section


def add_workdir(parser, *, required: bool = True) -> None:
    where = parser.add_mutually_exclusive_group(required=required)
    said = "folder of a run, or one that dlc export torch wrote"
    where.add_argument("-w", "--workdir", metavar="W", help=said)
    said = "the small run that comes with the package, as -w demo"
    where.add_argument(
        "--demo", dest="workdir", action="store_const", const=str(home.DEMO), help=said
    )
    parser.add_argument(
        "--batch", type=whole, default=64, metavar="N", help="most images in device memory; 64"
    )


def add_sampling(parser) -> None:
    parser.add_argument(
        "--sampler.NAME",
        dest="fields",
        metavar="VALUE",
        help="how images are drawn: --sampler.steps=12 --sampler.guidance.scale=2, and how codes "
        "are: --code_sampler.calls=8; fields of the samples section of a recipe (dlc config FILE "
        "--all), as the run's recipe has them if not given",
    )
    parser.add_argument(
        "--sampler",
        metavar="METHOD",
        help='how codes are drawn, as --code_sampler.method: "auto" goes by the calls',
    )
    parser.add_argument(
        "--calls",
        type=whole,
        metavar="N",
        help="of the prior's network for one code, at most, as --code_sampler.calls",
    )
    parser.add_argument(
        "--guide-workdir",
        metavar="W2[@STEP]",
        help="autoguidance: lean away from the generator of another run, such as a smaller or a "
        "younger one, of its newest checkpoint or of STEP; with --sampler.guidance.scale above 1",
    )
    parser.add_argument(
        "--seed", type=seed, default=0, metavar="S", help="another seed draws other images; 0"
    )


def is_first() -> bool:
    """Whether this process speaks and writes: process 0 of those that were started together."""
    import jax

    return jax.process_index() == 0


def agreed(name: str, value):
    """Process 0's value, JSON, in all processes."""
    from dlc_jax.hosts import agreement

    return agreement.agreed(name, value)


def say(text: str) -> None:
    if is_first():
        print(text, flush=True)


def check(arguments, rest: Sequence[str] = (), *, sections: Sequence[str] = SAMPLERS):
    """The run's config as `load` reads it: refuses what is wrong before seconds go there."""
    config = recipe.of_run(arguments.workdir)
    return changed(config, [*rest, *_short(arguments)], sections=sections)


def changed(config, rest: Sequence[str], *, sections: Sequence[str] = SAMPLERS):
    """The config of a run with --sampler.NAME=VALUE put into its `samples` section.

    Args:
      sections: fields of that section that may be set.

    Raises:
      UserError: an unknown field, or a value of another type.
    """
    flags = {}
    for argument in rest:
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or name.partition(".")[0] not in sections or not equals:
            raise UserError(
                f"unexpected argument {argument!r}; there are --{'.NAME=VALUE, --'.join(sections)}"
                ".NAME=VALUE"
            )
        flags[f"samples.{name}"] = recipe.Text(value)
    if flags and "samples" not in config:  # a recipe of other steps
        flags["samples.stage"] = "samples"
    return recipe.changed(config, flags) if flags else config


def _short(arguments) -> list[str]:
    """The fields that short options stand for."""
    fields = {
        "guide_workdir": "sampler.guidance.base",
        "sampler": "code_sampler.method",
        "calls": "code_sampler.calls",
    }
    given = {field: getattr(arguments, name, None) for name, field in fields.items()}
    return [f"--{field}={value}" for field, value in given.items() if value]


def load(
    arguments, count: int, rest: Sequence[str] = (), *, sections: Sequence[str] = SAMPLERS
) -> "Pipeline":
    """The pipeline for `count` images: a batch is no larger than that."""
    from absl import logging

    from dlc_jax import pipeline

    logging.set_verbosity(logging.ERROR)
    config = check(arguments, rest, sections=sections)
    return pipeline.load(arguments.workdir, batch=min(count, arguments.batch), config=config)


def say_sampler(pipeline: "Pipeline", seed: int) -> None:
    """Tells how images are drawn."""
    sampler = pipeline.sampler
    guidance = dataclasses.asdict(sampler.guidance)
    usual = {"interval": (0.0, 1.0), "channels": None, "base": ""}
    more = [f"{key} {value}" for key, value in guidance.items() if usual.get(key, value) != value]
    more += [f"churn {sampler.churn:g}"] if sampler.churn else []
    how = ", ".join([f"guidance {sampler.guidance.scale:g}", *more, f"seed {seed}"])
    say(f"{sampler.steps} steps of {sampler.method}, {how}")


def say_calls(pipeline: "Pipeline") -> None:
    """Tells how often the prior's network was called for a code, if it drew any."""
    network = pipeline.networks[pipeline.prior] if pipeline.prior in pipeline.config else None
    if network is not None and network.drawn:
        method = pipeline.code_sampler.resolved(network.process, network.model.positions).method
        say(f"codes by {method}, {network.called / network.drawn:.1f} calls each")


def resized(images: Sequence[np.ndarray], size: int) -> int:
    """How many images are not of the encoder's size."""
    return sum(image.shape[:2] != (size, size) for image in images)


def say_resized(count: int, total: int, size: int) -> None:
    if count:
        how = f"resized to {size} x {size} pixels, their centers cropped"
        print(f"{count} of {total} images {how}", flush=True)


def parts(total: int, size: int, what: str) -> Iterator[tuple[int, int]]:
    """(start, stop) of the parts of a job, showing how much of it is done and when it will end."""
    with Progress(what, "images", silent=not is_first()) as progress:
        for start in range(0, total, size):
            progress(start, total)
            yield start, min(start + size, total)


def prepare(path: Path, folder: Path) -> Path:
    """Makes sure that `path` can be written in `folder`, which is made, before the long work."""
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
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; make room or give another --out"
        ) from error


def whole(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**31 - 1:  # seed + 1 is used too
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**31 - 2}")
    return int(text)
