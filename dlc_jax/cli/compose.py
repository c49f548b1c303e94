"""dlc compose -w W A.png B.png [C.png …]: images of composed codes, below their parents.

How codes are composed is an operator, see `composition.operators`; how likely each result is to the
prior is printed.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dlc_jax import recipe
from dlc_jax import workdir as home
from dlc_jax.cli import networks
from dlc_jax.composition import OPERATORS, groups
from dlc_jax.composition.mix import mixing, portion
from dlc_jax.composition.operators import Coin, Soft
from dlc_jax.data import inputs
from dlc_jax.errors import UserError
from dlc_jax.evals import pictures

EXAMPLE = "dlc compose -w runs/quickstart a.png b.png --operator infill --best 4 --keep form"
EXAMPLE += "\n  dlc compose --demo"
COLUMNS = 8
UNSEEN = (3, 5)  # the images that are composed if none is given
SECTIONS = (*networks.SAMPLERS, "operator")


def arguments(parser) -> None:
    networks.add_workdir(parser)
    parser.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="the parents, two or more; one is enough where the prior or the generator adds to it; "
        "two unseen images of the run's data if none is given",
    )
    parser.add_argument(
        "--operator",
        choices=OPERATORS,
        metavar="NAME",
        help=f"how codes are composed: {', '.join(OPERATORS)}; its fields are set as "
        "--operator.share=0.2; as the run's recipe has it",
    )
    parser.add_argument(
        "--weights",
        type=numbers,
        metavar="X,Y,…",
        help="how often a position is from each parent; equally",
    )
    parser.add_argument(
        "--keep",
        type=lambda text: text.split(","),
        default=[],
        metavar="NAME,I,J-K,…",
        help="positions always from the first parent, by number or by the name of a kind of crops "
        "or of a group that dlc positions found; none",
    )
    parser.add_argument(
        "--best",
        type=networks.whole,
        default=1,
        metavar="N",
        help="draw each code N times and take the likeliest; 1",
    )
    parser.add_argument(
        "--partial",
        type=share,
        default=1.0,
        metavar="SHARE",
        help="of the positions, by lot, that the generator is told; 1",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="mix nothing: the generator is led to all parents at once, by --weights; best with "
        "--partial, by which each asks for positions of its own",
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
    rest = [*named(arguments), *rest]  # the operator before its fields
    config = networks.check(arguments, rest, sections=SECTIONS)
    check(arguments, config)
    images = [inputs.read(Path(path)) for path in arguments.images]
    if not images:
        images, words = zip(*unseen(config, UNSEEN))
        print(f"two unseen images of the run's data: {'; '.join(filter(None, words))}", flush=True)
    networks.prepare(out, out.parent)
    loaded = networks.load(arguments, max(count, len(images)), rest, sections=SECTIONS)
    networks.say_resized(networks.resized(images, loaded.size), len(images), loaded.size)
    parents = codes = loaded.encode(images)
    if isinstance(loaded.operator, Soft) and not arguments.all:
        parents = loaded.simplices(images, temperature=loaded.operator.temperature)
    say_bits("parents", [loaded.compose([codes], operator=Coin()).bits])
    networks.say_sampler(loaded, arguments.seed)
    draw, children = together if arguments.all else mixed, []
    for start, stop in networks.parts(count, loaded.batch, "compose"):
        repeated = [np.repeat(parent[None], stop - start, 0) for parent in parents]
        children.append(draw(arguments, loaded, repeated, start))
    say_bits("composed", [bits for _, bits in children])
    with networks.writing(out):
        drawn = np.concatenate([part for part, _ in children])
        pictures.save_png(out, picture(images, drawn))
    print(f"wrote {out}: {count} compositions of {len(images)} images")


def named(arguments) -> list[str]:
    """The fields that --operator stands for: another one than the run's names no groups yet."""
    name, config = arguments.operator, recipe.of_run(arguments.workdir)
    own = config.samples.operator if "samples" in config else {"name": ""}
    fields = [f"--operator.name={name}"] if name else []
    if name in OPERATORS and name != own["name"] and "groups" in own:
        names_groups = any(each.name == "groups" for each in dataclasses.fields(OPERATORS[name]))
        fields += ["--operator.groups=()"] if names_groups else []
    return fields


def check(arguments, config) -> None:
    """Refuses what cannot be composed, and puts the positions to --keep as numbers."""
    encoder, operator = "encoder", Coin()
    if "samples" in config:
        encoder = config.samples.encoder
        operator = recipe.build(OPERATORS, config.samples.operator)
    if arguments.all and (arguments.operator or arguments.keep or arguments.best > 1):
        raise UserError(
            "dlc compose: --all mixes nothing; it takes no --operator, --keep or --best"
        )
    alone = operator.needs_prior or arguments.partial < 1
    if len(arguments.images) == 1 and not alone:
        raise UserError(
            "dlc compose: give two images at least, or one and an operator that draws from the "
            "prior, such as infill and refine"
        )
    if arguments.keep and encoder in config:
        section = config[encoder]
        length = section.model.simplicial["positions"]
        named = groups.known(section, home.read(Path(arguments.workdir) / groups.FILE))
        arguments.keep = groups.positions(arguments.keep, named, length, "--keep")


def unseen(config, numbers: Sequence[int]) -> list[tuple[np.ndarray, str]]:
    """Images of the run's data that training did not show, and what each shows, in words.

    Raises:
      UserError: the data is not here.
    """
    from dlc_jax.data.sources import DataSet

    with DataSet(**config.data) as data:
        source, names = data.source("validation"), data.factors().values()
        records = [source[number % len(source)] for number in numbers]
    words = [
        [values[at] for values, at in zip(names, record["factors"])] if names else []
        for record in records
    ]
    return [(np.asarray(each["image"]), ", ".join(of)) for each, of in zip(records, words)]


def mixed(arguments, loaded, parents, first: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Images of mixed codes, and their bits."""
    mixing = {"weights": arguments.weights, "keep": arguments.keep, "best": arguments.best}
    codes, bits = loaded.compose(parents, seed=arguments.seed, first=first, **mixing)
    known = None if arguments.partial == 1 else told(arguments, [codes], first)[0]
    how = {"seed": arguments.seed + 1, "first": first}
    return loaded.decode(codes, known=known, **how), bits


def together(arguments, loaded, codes, first: int) -> tuple[np.ndarray, None]:
    """Images that fit all parents."""
    known = None if arguments.partial == 1 else told(arguments, codes, first)
    shares = mixing(codes, seed=0, weights=arguments.weights).shares
    scales = len(codes) * loaded.sampler.guidance.scale * shares
    how = {"seed": arguments.seed + 1, "first": first, "scales": scales.tolist()}
    return loaded.decode_all(codes, known=known, **how), None


def told(arguments, codes: list[np.ndarray], first: int) -> list[np.ndarray]:
    """Which positions the generator is told of each of the codes: shares without a common one."""
    count, length = codes[0].shape
    each = [portion(arguments.partial, length)] * len(codes)
    if sum(each) > length:
        raise UserError(
            f"dlc compose: --partial={arguments.partial:g} of each of {len(codes)} parents is more "
            "than there are positions"
        )
    task = mixing(codes, seed=arguments.seed, position=first + np.arange(count))
    owner = task.dealt(each, np.arange(length))
    return [owner == number for number in range(len(codes))]


def say_bits(what: str, parts: list[np.ndarray | None]) -> None:
    """Tells how likely codes are, where there is a prior."""
    each = [f"{one:.2f}" for bits in parts if bits is not None for one in bits]
    if each:
        print(f"{what}, bits a position given the others: {' '.join(each)}", flush=True)


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


def share(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 < found <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share above 0 and at most 1")
    return found
