"""dlc compose -w W A.png B.png [C.png …]: images of mixed codes, below their parents.

With --complete or --redraw the prior draws a part of every mixture given the rest of it.
"""

import argparse
from pathlib import Path

import numpy as np

from dlc_jax.cli import networks
from dlc_jax.data import inputs
from dlc_jax.errors import UserError
from dlc_jax.evals import composition, pictures

EXAMPLE = "dlc compose -w runs/quickstart a.png b.png --weights 1,3 --keep 0-11 --out mixed.png"
COLUMNS = 8


def arguments(parser) -> None:
    networks.add_workdir(parser)
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="the parents, two or more; one is enough for --complete and --redraw",
    )
    parser.add_argument(
        "--weights",
        type=numbers,
        metavar="X,Y,…",
        help="how often a position is copied from each parent; equally",
    )
    parser.add_argument(
        "--keep",
        type=positions,
        default=(),
        metavar="I,J-K,…",
        help="positions always from the first parent; none",
    )
    parser.add_argument(
        "--temperature",
        type=temperature,
        default=0.0,
        metavar="T",
        help="above 0, values are drawn from the mean of the parents' simplices at that "
        "temperature; 0 copies their codes",
    )
    parser.add_argument(
        "--complete",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="of the positions, by lot and none of --keep, that the prior draws given the others; "
        "0 is none, 1 all",
    )
    parser.add_argument(
        "--redraw",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="of the positions, those with the least likely values, that the prior draws anew",
    )
    parser.add_argument(
        "--count",
        type=networks.whole,
        default=COLUMNS,
        metavar="N",
        help=f"how many to compose; {COLUMNS}",
    )
    networks.add_sampling(parser)
    parser.add_argument(
        "--out", default="composition.png", metavar="FILE.png", help="the picture; composition.png"
    )


def run(arguments, rest) -> None:
    out, count = Path(arguments.out), arguments.count
    if out.suffix.lower() != ".png":
        raise UserError(f"dlc compose: --out={out} is not a .png file")
    by_prior = arguments.complete or arguments.redraw
    if len(arguments.images) < 2 and not by_prior:
        raise UserError("dlc compose: give two images at least, or --complete or --redraw")
    networks.check(arguments, rest)
    images = [inputs.read(Path(path)) for path in arguments.images]
    networks.prepare(out, out.parent)
    loaded = networks.load(arguments, max(count, len(arguments.images)), rest)
    networks.say_resized(networks.resized(images, loaded.size), len(images), loaded.size)
    if arguments.temperature:
        parents = loaded.simplices(images, temperature=arguments.temperature)
    else:
        parents = loaded.encode(images)
    codes = mixed(arguments, loaded, parents)
    if by_prior:
        say_bits(loaded, "parents", parents if parents.ndim == 2 else parents.argmax(-1))
        say_bits(loaded, "mixtures", codes)
        codes = drawn(arguments, loaded, codes)
        say_bits(loaded, "after the prior", codes)
    networks.say_sampler(loaded, arguments.seed)
    children = [
        loaded.decode(codes[start:stop], seed=arguments.seed + 1, first=start)
        for start, stop in networks.parts(count, loaded.batch, "compose")
    ]
    with networks.writing(out):
        pictures.save_png(out, picture(images, np.concatenate(children)))
    print(f"wrote {out}: {count} compositions of {len(images)} images")


def mixed(arguments, loaded, parents: np.ndarray) -> np.ndarray:
    """Codes int32 [count, l] of parents, codes [p, l] or simplices [p, l, v]."""
    mixing = {"weights": arguments.weights, "keep": arguments.keep, "seed": arguments.seed}
    codes = []
    for start in range(0, arguments.count, loaded.batch):
        size = min(loaded.batch, arguments.count - start)
        repeated = [np.broadcast_to(parent, (size, *parent.shape)) for parent in parents]
        codes.append(loaded.compose(repeated, first=start, **mixing))
    return np.concatenate(codes)


def drawn(arguments, loaded, codes: np.ndarray) -> np.ndarray:
    """The codes with what --complete and --redraw say drawn by the prior."""
    if arguments.complete:
        kept = composition.kept(arguments.keep, codes.shape)
        known = composition.lot(arguments.complete, kept, seed=arguments.seed)
        codes = loaded.complete(codes, known, seed=arguments.seed)
    if arguments.redraw:
        codes = loaded.redraw(codes, arguments.redraw, seed=arguments.seed)
    return codes


def say_bits(loaded, what: str, codes: np.ndarray) -> None:
    bits, errors = loaded.likelihood(codes)
    error = (errors**2).sum() ** 0.5 / len(bits)  # of the noise that they are judged at
    print(f"{what}: {bits.mean():.1f} ± {error:.1f} bits a code at most", flush=True)


def picture(parents: list[np.ndarray], children: np.ndarray) -> np.ndarray:
    """The parents in a row, and their children in rows below, as large as the children are."""
    size = children.shape[1]
    children, parents = inputs.fit(children, size=size), inputs.fit(parents, size=size)
    columns = max(len(parents), min(len(children), COLUMNS))
    rows = {"parents": parents}
    for start in range(0, len(children), columns):
        rows[f"composed {start + 1}" if start else "composed"] = children[start : start + columns]
    paper = np.full((columns, size, size, 3), pictures.PAPER, np.uint8)
    return pictures.labelled_rows(
        {name: np.concatenate([row, paper[len(row) :]]) for name, row in rows.items()},
        columns=columns,
    )


def numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1,3") from None


def positions(text: str) -> list[int]:
    found = []
    for part in text.split(","):
        low, _, high = part.partition("-")
        if (
            not low.isdecimal()
            or not (high or low).isdecimal()
            or (part.endswith("-"))
            or int(high or low) < int(low)
        ):
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of positions such as 0-11,20")
        if int(high or low) >= 2**20:
            raise argparse.ArgumentTypeError(f"{text!r} has positions beyond any code")
        found += range(int(low), int(high or low) + 1)
    return found


def share(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to 1")
    return found


def temperature(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return found
