"""dlc probe W: what a run's codes and features say of its images, and how healthy the codes are."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from dlc_jax import recipe
from dlc_jax import workdir as home
from dlc_jax.cli import networks
from dlc_jax.errors import UserError

EXAMPLE = "dlc probe runs/quickstart --count 2000 --baselines"
# group of results -> what it is; in the order of the table
PROBES = {
    "": "linear, hard codes",
    "_best_on_{split}": "linear, hard codes, rate chosen on these images",
    "_knn": "5 nearest codes",
    "_untrained": "linear, codes of an untrained encoder",
    "_features": "linear, class token",
    "_features_patches": "linear, class token and mean of patches",
    "_features_knn": "nearest class tokens",
    "_pixels": "linear, pixels",
}
HEALTH = {
    "perplexity": "share of the values in use (perplexity / V)",
    "entropy": "entropy of a position, nats",
    "dead": "values never used",
    "mutual_information": "mutual information of two positions, nats",
    "mutual_information_chance": "  of which by chance",
}
AGREEMENT = {
    "positions": "equal positions of two augmented views",
    "chance_positions": "  by chance",
    "times_chance": "  times chance",
}


def arguments(parser) -> None:
    parser.add_argument("workdir", metavar="W", help="folder of a run whose codes step is complete")
    parser.add_argument(
        "--count",
        type=networks.whole,
        metavar="N",
        help="images of each split; as in the run's recipe if not given",
    )
    parser.add_argument(
        "--splits", metavar="A,B", help="splits to report on; as in the recipe if not given"
    )
    parser.add_argument(
        "--baselines", action="store_true", help="also an untrained encoder's codes, and pixels"
    )
    parser.add_argument(
        "--out", metavar="FILE.json", help="write the numbers there; otherwise nothing is written"
    )


def run(arguments, rest) -> None:
    workdir = Path(arguments.workdir)
    config = recipe.of_run(workdir)
    found = recipe.of_stage(config, "probe")
    if not found:
        raise UserError(f"dlc probe: the recipe of {workdir} has no section with stage='probe'")
    section = config[found[0]]
    splits = tuple(arguments.splits.split(",")) if arguments.splits else section.splits
    made = config[section.codes].splits
    if missing := [split for split in splits if split not in made]:
        raise UserError(
            f"dlc probe: no codes of split {missing[0]!r}; the codes step of {workdir} made "
            f"{', '.join(made)}"
        )
    if arguments.out:
        networks.prepare(Path(arguments.out), Path(arguments.out).parent)
    from absl import logging

    from dlc_jax import parallel, stages
    from dlc_jax.data import sources  # and jax: seconds, which a mistake need not wait for

    logging.set_verbosity(logging.ERROR)
    fields = {
        "count": arguments.count or section.count,
        "splits": splits,
        "baselines": arguments.baselines or section.baselines,
    }
    flags = {f"{found[0]}.{name}": value for name, value in fields.items()}
    config = recipe.changed(config, flags)
    job = stages.STAGES["probe"](config, step=found[0], workdir=workdir)
    results = job.run(parallel.make_mesh(**config.mesh), None)
    names = list(sources.factors(**config.data))
    print("\n\n".join(table(results, split=split, names=names) for split in splits))
    if arguments.out:
        with networks.writing(Path(arguments.out)):
            Path(arguments.out).write_text(json.dumps(home.plain(results), indent=1) + "\n")
        print(f"wrote {arguments.out}")


def table(results: Mapping[str, float], *, split: str, names: Sequence[str]) -> str:
    """What the probe job found on one split.

    A line a probe, a column a factor; then health and agreement.
    """
    after = "" if split == "validation" else f"_{split}"
    rows = []
    if names:
        rows.append((f"% right on {split}, {results[f'health{after}/count']} images", *names))
    for group, what in PROBES.items():
        group = f"probe{after}{group.format(split=split)}"
        endings = {key.removeprefix(f"{group}/{names[0]}_") for key in results} if names else set()
        voters = sorted(int(ending) for ending in endings if ending.isdecimal())
        said = [(f"_{number}", f"{number} {what}") for number in voters] or [("", what)]
        for ending, line in said:
            shares = [results.get(f"{group}/{name}{ending}") for name in names]
            if names and None not in shares:
                rows.append((line, *(f"{100 * share:.1f}" for share in shares)))
    for group, lines in (("health", HEALTH), ("agreement", AGREEMENT)):
        found = {
            key.partition("/")[2]: key for key in results if key.startswith(f"{group}{after}/")
        }
        rows += [("",), (f"{group} of codes, {split}, {results[found['count']]} images",)]
        rows += [(lines[key], f"{results[found[key]]:.3g}") for key in lines if key in found]
    width = max(len(row[0]) for row in rows)
    columns = max(8, *(len(name) for name in names)) if names else 8
    padded = ([row[0].ljust(width), *(cell.rjust(columns) for cell in row[1:])] for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in padded)
