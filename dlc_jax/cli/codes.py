"""dlc codes info | verify W: the code stores of a run."""

import json
from pathlib import Path

from dlc_jax import recipe
from dlc_jax.data.codes import CodeStore
from dlc_jax.data.progress import Progress
from dlc_jax.errors import UserError

EXAMPLE = "dlc codes verify runs/quickstart"


def arguments(parser) -> None:
    parser.add_argument(
        "action", choices=("info", "verify"), help="info: what there is; verify: reads every byte"
    )
    parser.add_argument("workdir", metavar="W", help="folder of a run")


def run(arguments, rest) -> None:
    workdir = Path(arguments.workdir)
    config = recipe.of_run(workdir)
    steps = recipe.of_stage(config, "codes")
    if not steps:
        raise UserError(f"dlc codes: the recipe of {workdir} has no section with stage='codes'")
    for step in steps:
        (info if arguments.action == "info" else verify)(config, workdir, step)


def stores(config, workdir: Path, step: str) -> dict[str, CodeStore]:
    """{split: store} of a codes step, of this run's encoder if it has one.

    Raises:
      UserError: a store is missing, unfinished, damaged, of another encoder or of another shape
        than the encoder's codes.
    """
    section = config[step]
    trained = recipe.trained(config, workdir, section.encoder) / "checkpoints"
    identity = None
    if trained.is_dir():
        from dlc_jax import checkpoint  # and jax: a second, which a mistake need not wait for

        identity = checkpoint.identity_of(trained)
    codes = config[section.encoder].model.simplicial
    found = {}
    for split in section.splits:
        store = CodeStore(recipe.place(config, workdir, step) / split, identity=identity)
        found[split] = store.checked(
            positions=codes.positions, values=codes["values"], where=section.encoder
        )
    return found


def info(config, workdir: Path, step: str) -> None:
    found = stores(config, workdir, step)
    for split, store in found.items():
        about = store.manifest
        size = sum(entry["bytes"] for entry in about["shards"])
        code = f"{about['positions']} positions of {about['values']} values, {about['dtype']}"
        shards = f"{len(about['shards'])} shards, {size / 1e6:,.1f} MB"
        print(f"{store.directory}: {len(store):,} codes in {shards}, {code}")
        if split == config[step].splits[0]:
            view = json.dumps(about["view"])
            print(f"  encoder {json.dumps(about['identity'])}, view {view}, {about['drawn']}")
            print(f"  computed in {about.get('computed') or formerly(config, workdir, step)}")
            for name, (dtype, shape) in about["fields"].items():
                print(f"  beside them {name}, {dtype} {shape}")
        print(f"  of {json.dumps(about['source'])}")
    try:
        usage = json.loads((workdir / step / "usage.json").read_text())
        share = sum(usage["perplexity"]) / len(usage["perplexity"]) / usage["values"]
        print(
            f"health: perplexity {share:.2f} of the number of values, "
            f"over {usage['count']:,} codes; more: dlc probe {workdir}"
        )
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        pass  # not written yet, or damaged


def formerly(config, workdir: Path, step: str) -> str:
    """The dtype in which a store was computed that does not say: that of its encoder's training."""
    try:
        origin = recipe.of_run(recipe.place(config, workdir, step).parent)
        dtype = origin[config[step].encoder].train.dtype
    except (UserError, KeyError, AttributeError):
        return "an unknown dtype: its run is not there"
    if dtype == "float32":
        return dtype
    return f"{dtype} throughout, the residual stream too, as older versions did"


def verify(config, workdir: Path, step: str) -> None:
    found = stores(config, workdir, step)
    shards = sum(len(store.manifest["shards"]) for store in found.values())
    done = 0
    with Progress(f"{step}: verifying", "shards") as progress:
        for store in found.values():
            store.verify(progress=lambda k, before=done: progress(before + k, shards))
            done += len(store.manifest["shards"])
    count = sum(map(len, found.values()))
    print(f"verified {count:,} codes in {shards} shards of {recipe.place(config, workdir, step)}")
