"""dlc positions W: what each position of the codes says, as a picture and as named groups.

Bits of information with the factors or labels of unseen images, and with other positions; and what
a single position changes in the image when it has another image's value. Positions that say the
same are grouped, and the groups are written into the run: `dlc compose --keep NAME` reads them.
"""

from pathlib import Path

import numpy as np

from dlc_jax import remote
from dlc_jax import workdir as home
from dlc_jax.cli import networks
from dlc_jax.composition import groups as names
from dlc_jax.data.progress import Progress
from dlc_jax.errors import UserError
from dlc_jax.evals import pictures, positions
from dlc_jax.report import heat

EXAMPLE = "dlc positions runs/quickstart --clusters 4 --out positions.png"


def arguments(parser) -> None:
    parser.add_argument("workdir", metavar="W", help="folder of a run whose encoder is trained")
    parser.add_argument(
        "--count",
        type=networks.whole,
        default=2000,
        metavar="N",
        help="unseen images whose codes are counted; 2000",
    )
    parser.add_argument(
        "--pairs",
        type=networks.whole,
        default=64,
        metavar="N",
        help="pairs of them between which each position is swapped; 64",
    )
    parser.add_argument(
        "--clusters",
        type=networks.whole,
        metavar="K",
        help="groups, at most; as many as are far apart",
    )
    parser.add_argument(
        "--seed", type=networks.seed, default=0, metavar="S", help="of the pairs and the noise; 0"
    )
    parser.add_argument(
        "--batch", type=networks.whole, default=64, metavar="N", help="most images at once; 64"
    )
    parser.add_argument(
        "--out", default="positions.png", metavar="FILE.png", help="the picture; positions.png"
    )


def run(arguments, rest) -> None:
    out, workdir = Path(arguments.out), Path(arguments.workdir)
    if out.suffix.lower() != ".png":
        raise UserError(f"dlc positions: --out={out} is not a .png file")
    networks.check(arguments)
    networks.prepare(out, out.parent)
    loaded = networks.load(arguments, arguments.count)
    rows, columns, shared, clusters = measured(arguments, loaded)
    found = {"length": len(shared), "groups": clusters, "rows": rows, "columns": flat(columns)}
    if workdir != home.DEMO:
        home.write(workdir / names.FILE, home.plain(listed(found)))
    print(text(rows, flat(columns)))
    with networks.writing(out):
        pictures.save_png(out, picture(rows, columns, shared))
    if workdir != home.DEMO:
        remote.send(workdir / names.FILE)  # of a run in a store
    each = ", ".join(f"{name} ({len(group)})" for name, group in clusters.items())
    kept = "" if workdir == home.DEMO else f" into {workdir / names.FILE}"
    print(f"wrote {out}, and groups of positions{kept}: {each}")


def measured(arguments, loaded) -> tuple[list[str], dict, np.ndarray, dict]:
    """(rows, {title: {column: a number a row}}, bits that positions share, {name: positions}).

    There is a row for each position and then one for each group.
    """
    from dlc_jax import checkup
    from dlc_jax.data.sources import DataSet, choose

    config = loaded.config
    with DataSet(**config.data) as data:
        source, factors = data.source("validation"), list(data.factors())
        found = checkup.read(source, choose(source, arguments.count), {"codes": loaded.encode})
        judge = data.judge()
    codes = found["codes"]
    known = found["factors"] if factors else np.empty((len(codes), 0), int)
    information, shared = positions.about(codes, known), positions.among(codes)
    clusters = positions.named(
        positions.clusters(shared, arguments.clusters),
        information,
        dict(zip(factors, map(positions.entropy, known.T), strict=True)),
    )
    length = codes.shape[1]
    groups = names.known(config[loaded.encoder], {"length": length, "groups": clusters})
    of = [[name for name, each in groups.items() if n in each] for n in range(length)]
    rows = [" ".join([str(n), *each]) for n, each in enumerate(of)]
    rows += [f"all {name}" for name in groups]

    def padded(column):  # groups have no bits
        return np.append(column, np.full(len(groups), np.nan))

    columns = {"bits": {"its own": padded(np.diag(shared))}}
    if factors:
        each = zip(factors, information.T, strict=True)
        columns["bits it says of"] = {name: padded(column) for name, column in each}
    if is_decoded(loaded):
        places = [*([n] for n in range(length)), *groups.values()]
        columns |= swapped(arguments, loaded, codes, places, judge, factors)
    else:
        print("no swaps: this run has no trained generator that reads codes", flush=True)
    return rows, columns, shared, clusters


def is_decoded(loaded) -> bool:
    """Whether there is a trained generator that reads codes."""
    from dlc_jax.networks import weights

    config, step = loaded.config, loaded.generator
    if step not in config or not config[step].model["positions"]:
        return False
    return weights.are_in(loaded.networks[step].directory)


def swapped(arguments, loaded, codes, places, judge, factors) -> dict:
    """Columns of what swaps do to images."""
    random = np.random.default_rng(arguments.seed)
    pairs = random.integers(len(codes), size=(arguments.pairs, 2))
    networks.say_sampler(loaded, arguments.seed)
    calls, count = len(places) + (1 if judge is None else 2), len(pairs)
    with Progress("swap", "images") as progress:
        done = iter(range(calls))

        def decode(swapped):
            progress(next(done) * count, calls * count)
            return loaded.decode(swapped, seed=arguments.seed)

        read = None if judge is None else lambda images: judge.read(images).factors
        both = codes[pairs[:, 0]], codes[pairs[:, 1]]
        rms, changed = positions.swaps(*both, places, decode, read)
    found = {"swapped: rms of 255": {"image": rms}}
    if changed is not None:
        found["swapped: % that show the other's"] = dict(zip(factors, 100 * changed.T, strict=True))
    return found


def flat(columns) -> dict[str, np.ndarray]:
    """{title and column: numbers}."""
    return {f"{title} {name}": each for title, of in columns.items() for name, each in of.items()}


def listed(value):
    """Arrays as lists."""
    if isinstance(value, dict):
        return {name: listed(each) for name, each in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value


def text(rows: list[str], columns) -> str:
    """The table in print: a line a position."""
    width = max(map(len, rows))
    lines = [f"{number}: {title}" for number, title in enumerate(columns, start=1)]
    heads = " ".join(f"{number:>6}" for number in range(1, len(columns) + 1))
    lines.append(f"{'':{width}} {heads}")
    for n, row in enumerate(rows):
        cells = " ".join(f"{each[n]:6.2f}".replace("nan", "   ") for each in columns.values())
        lines.append(f"{row:{width}} {cells}".rstrip())
    return "\n".join(lines)


def picture(rows: list[str], columns, shared: np.ndarray) -> np.ndarray:
    """The table as colors, and beside it what positions share."""
    table = heat.table(rows, columns, first=len(shared))
    return heat.beside(table, heat.matrix(shared, "bits two positions share"))
