"""dlc sample -w W [-n 64] [--out grid.png|DIR]: new images of a run, one picture or a folder."""

import math
from pathlib import Path

import numpy as np

from dlc_jax.cli import networks
from dlc_jax.errors import UserError
from dlc_jax.evals import pictures

EXAMPLE = "dlc sample -w runs/quickstart -n 64 --sampler.steps=12 --seed 0 --out grid.png"
MOST = 1024  # images of a grid


def arguments(parser) -> None:
    networks.add_workdir(parser)
    parser.add_argument(
        "-n", "--number", type=networks.whole, default=64, metavar="N", help="how many images; 64"
    )
    networks.add_sampling(parser)
    parser.add_argument(
        "--out",
        default="samples.png",
        metavar="PATH",
        help="a .png: a grid; else a folder of .png; samples.png",
    )


def run(arguments, rest) -> None:
    out, count = Path(arguments.out), arguments.number
    grid = out.suffix.lower() == ".png" and not out.is_dir()
    if out.suffix and not grid and not out.is_dir():
        raise UserError(f"dlc sample: --out={out} is neither a .png nor a folder")
    if grid and count > MOST:
        raise UserError(
            f"dlc sample: a grid of {count} images is too large to look at; give --out=FOLDER, or "
            f"at most -n {MOST}"
        )
    networks.check(arguments, rest)
    networks.prepare(out, out.parent if grid else out)
    loaded = networks.load(arguments, count, rest)
    networks.say_sampler(loaded, arguments.seed)
    shown = []
    for start, stop in networks.parts(count, loaded.batch, "sample"):
        images = loaded.sample(stop - start, first=start, seed=arguments.seed)
        if grid:
            shown.append(images)
            continue
        with networks.writing(out):
            for number, image in zip(range(start, stop), images, strict=True):
                pictures.save_png(out / f"{number:06d}.png", image)
    if grid:
        with networks.writing(out):
            pictures.save_png(
                out, pictures.grid(np.concatenate(shown), columns=math.ceil(math.sqrt(count)))
            )
    print(f"wrote {out}: {count} images")
