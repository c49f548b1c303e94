"""dlc probe W: what a run's codes and features say of its images, how healthy the codes are, and whether two views of an image agree."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

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
        "--count", type=networks.whole, metavar="N", help="images of each split; as in the run's recipe if not given"
    )
    parser.add_argument("--splits", metavar="A,B", help="splits to report on; as in the recipe if not given")
    parser.add_argument("--baselines", action="store_true", help="also an untrained encoder's codes, and pixels")
    parser.add_argument("--out", metavar="FILE.json", help="write the numbers there; otherwise nothing is written")


def run(arguments, rest) -> None:
    workdir = Path(arguments.workdir)
    config = ConfigDict(home.read_config(workdir))
    found = [name for name in config if isinstance(config[name], ConfigDict) and config[name].to_dict().get("stage") == "probe"]
    if not found:
        raise UserError(f"dlc probe: the recipe of {workdir} has no section with stage='probe'")
    with config.unlocked():  # runs of before these fields have none
        section = config[found[0]] = ConfigDict({"baselines": False} | config[found[0]].to_dict())
    section.count = arguments.count or section.count
    section.splits = tuple(arguments.splits.split(",")) if arguments.splits else section.splits
    section.baselines = arguments.baselines or section.baselines
    made = [split for split in config[section.codes].splits]
    if missing := [split for split in section.splits if split not in made]:
        raise UserError(f"dlc probe: no codes of split {missing[0]!r}; the codes step of {workdir} made {', '.join(made)}")
    if arguments.out:
        networks.prepare(Path(arguments.out), Path(arguments.out).parent)
    from absl import logging

    from dlc_jax import parallel, stages
    from dlc_jax.data import sources  # and jax: seconds, which a mistake need not wait for
    from dlc_jax.evals.probe import SMALL

    with config.unlocked():
        if "fit" not in section:  # a run of before that field
            section.fit = dataclasses.asdict(SMALL)

    logging.set_verbosity(logging.ERROR)
    results = stages.STAGES["probe"](config, step=found[0], workdir=workdir).run(parallel.make_mesh(**config.mesh), None)
    names = list(sources.factors(**config.data))
    print("\n\n".join(table(results, split=split, names=names) for split in section.splits))
    if arguments.out:
        with networks.writing(Path(arguments.out)):
            Path(arguments.out).write_text(json.dumps(home.plain(results), indent=1) + "\n")
        print(f"wrote {arguments.out}")


def table(results: Mapping[str, float], *, split: str, names: Sequence[str]) -> str:
    """What the probe job found on one split: a line a probe, a column a factor; then health and agreement."""
    after = "" if split == "validation" else f"_{split}"
    rows = [(f"% right on {split}, {results[f'health{after}/count']} images", *names)] if names else []
    for group, what in PROBES.items():
        group = f"probe{after}{group.format(split=split)}"
        endings = {key.removeprefix(f"{group}/{names[0]}_") for key in results} if names else set()
        voters = sorted(int(ending) for ending in endings if ending.isdecimal())
        for ending, said in [(f"_{number}", f"{number} {what}") for number in voters] or [("", what)]:
            shares = [results.get(f"{group}/{name}{ending}") for name in names]
            if names and None not in shares:
                rows.append((said, *(f"{100 * share:.1f}" for share in shares)))
    for group, lines in (("health", HEALTH), ("agreement", AGREEMENT)):
        found = [
            (what, f"{results[f'{group}{after}/{key}']:.3g}") for key, what in lines.items() if f"{group}{after}/{key}" in results
        ]
        rows += [("",), (f"{group} of codes, {split}, {results[f'{group}{after}/count']} images",), *found]
    width = max(len(row[0]) for row in rows)
    columns = max(8, *(len(name) for name in names)) if names else 8
    return "\n".join("  ".join([row[0].ljust(width), *(cell.rjust(columns) for cell in row[1:])]).rstrip() for row in rows)
