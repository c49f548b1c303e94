"""dlc sample -w W [-n 64] [--out grid.png|DIR|FILE.npz]: new images of a run.

A folder and an .npz are drawn in parts: an interrupted command that is given again goes on, and
writing goes on beside drawing. Started in several processes, as training is, they draw together.
"""

import concurrent.futures
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dlc_jax.cli import networks
from dlc_jax.data.batch_file import PART, BatchFile, claim
from dlc_jax.data.progress import Progress
from dlc_jax.errors import UserError

EXAMPLE = "dlc sample -w runs/quickstart -n 64 --sampler.steps=12 --seed 0 --out grid.png"
MOST = 1024  # images of a grid
FOLDER = 1000  # images of a folder within the folder, where there are more than MOST


def arguments(parser) -> None:
    networks.add_workdir(parser)
    parser.add_argument(
        "-n", "--number", type=networks.whole, default=64, metavar="N", help="how many images; 64"
    )
    networks.add_sampling(parser)
    parser.add_argument(
        "--label", type=int, metavar="C", help="class, of a generator that was trained with classes"
    )
    parser.add_argument(
        "--out",
        metavar="PATH",
        help="a .png: a grid; an .npz: ADM's batch of samples; else a folder of .png; samples.png",
    )
    parser.add_argument("--npz", metavar="FILE", help="the same as --out FILE.npz")


def run(arguments, rest) -> None:
    out, count = _out(arguments), arguments.number
    networks.check(arguments, rest)
    kind = out.suffix.lower() if out.suffix and not out.is_dir() else ""
    networks.prepare(out, out if not kind else out.parent)
    from dlc_jax.hosts import cluster

    cluster.join()
    loaded = networks.load(arguments, count, rest)
    networks.say_sampler(loaded, arguments.seed)

    def draw(start, stop):
        labels = None if arguments.label is None else np.full(stop - start, arguments.label)
        return loaded.sample(stop - start, first=start, seed=arguments.seed, labels=labels)

    if kind == ".png":
        _grid(out, count, loaded.batch, draw)
    elif kind == ".npz":
        _npz(out, count, draw, _about(arguments, loaded))
    else:
        _folder(out, count, draw, _about(arguments, loaded))
    networks.say_calls(loaded)
    networks.say(f"wrote {out}: {count} images")
    cluster.leave()


def _out(arguments) -> Path:
    """Where images go, by its ending.

    Raises:
      UserError: another ending than .png and .npz, two places, or too many images for a picture.
    """
    if arguments.npz and arguments.out:
        raise UserError("dlc sample: --npz and --out are two places; give one of them")
    out = Path(arguments.npz or arguments.out or "samples.png")
    if arguments.npz and out.suffix.lower() != ".npz":
        raise UserError(f"dlc sample: --npz={out} is not an .npz file")
    if out.suffix and out.suffix.lower() not in (".png", ".npz") and not out.is_dir():
        raise UserError(f"dlc sample: --out={out} is neither a .png, an .npz nor a folder")
    if out.suffix.lower() == ".png" and not out.is_dir() and arguments.number > MOST:
        raise UserError(
            f"dlc sample: a grid of {arguments.number} images is too large to look at; give "
            f"--out=FOLDER, --npz=FILE.npz, or at most -n {MOST}"
        )
    return out


def _grid(out: Path, count: int, batch: int, draw: Callable) -> None:
    from dlc_jax.evals import pictures

    shown = [draw(start, stop) for start, stop in networks.parts(count, batch, "sample")]
    if networks.is_first():
        with networks.writing(out):
            columns = math.ceil(math.sqrt(count))
            pictures.save_png(out, pictures.grid(np.concatenate(shown), columns=columns))


def _npz(out: Path, count: int, draw: Callable, about: dict) -> None:
    file = BatchFile(out, count, about) if networks.is_first() else None
    _in_parts(
        networks.agreed("parts", file.missing() if file else None),
        count,
        draw,
        lambda start, images: file.write(start, images),
    )
    if file:
        file.finish()


def _folder(out: Path, count: int, draw: Callable, about: dict) -> None:
    from dlc_jax.evals import pictures

    def missing():
        known = out / ".samples.json"
        if not known.exists() and path(0).exists():
            raise UserError(
                f"dlc sample: {out} has pictures of another command; give another --out"
            )
        with networks.writing(out):
            claim(known, about | {"folders": count > MOST})
        ranges = ((start, min(start + PART, count)) for start in range(0, count, PART))
        return [
            each for each in ranges if not all(path(number).exists() for number in range(*each))
        ]

    def path(number):
        above = out / f"{number // FOLDER:04d}" if count > MOST else out
        return above / f"{number:06d}.png"

    def write(start, images):
        with networks.writing(out):
            for number, image in zip(range(start, start + len(images)), images, strict=True):
                path(number).parent.mkdir(parents=True, exist_ok=True)
                pictures.save_png(path(number), image)

    _in_parts(
        networks.agreed("parts", missing() if networks.is_first() else None), count, draw, write
    )


def _in_parts(ranges, count: int, draw: Callable, write: Callable) -> None:
    """Draws what is missing; the part before is written meanwhile, by process 0."""
    waiting = None
    done = count - sum(stop - start for start, stop in ranges)
    with concurrent.futures.ThreadPoolExecutor(1) as writer, _progress() as progress:
        for start, stop in ranges:
            progress(done, count)
            images = draw(start, stop)
            done += stop - start
            if waiting is not None:
                waiting.result()
            if networks.is_first():
                waiting = writer.submit(write, start, images)
        if waiting is not None:
            waiting.result()


def _progress():
    return Progress("sample", "images", silent=not networks.is_first())


def _about(arguments, loaded) -> dict:
    """What images depend on, for parts that another command may have left."""
    from dlc_jax import checkpoint, recipe, remote
    from dlc_jax.networks import weights

    steps = {}
    for step in (loaded.prior, loaded.generator):
        if step in loaded.config:
            trained = loaded.networks[step].directory
            if weights.are_in(trained):
                steps[step] = weights.identity_of(trained)
    section = loaded.config[loaded.generator]
    if section.latents and (
        path := loaded.config[recipe.autoencoder(loaded.config, loaded.generator)].path
    ):
        place = remote.local(path) / "checkpoints"
        steps["autoencoder"] = checkpoint.identity_of(place)
    samplers = {"sampler": loaded.sampler, "code_sampler": loaded.code_sampler}
    return {
        "seed": arguments.seed,
        "label": arguments.label,
        **{name: dataclasses.asdict(sampler) for name, sampler in samplers.items()},
        **steps,
    }
