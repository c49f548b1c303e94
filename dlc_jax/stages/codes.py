"""The codes job: every image of every split through the encoder's average, its codes into a store. Source: arXiv 2507.12318, section 3.

With a `path`, the store that another run made there is used instead: it is checked, and nothing is encoded.
"""

import functools
import json
import shutil

import jax
import numpy as np

from dlc_jax import checkpoint, recipe
from dlc_jax import workdir as home
from dlc_jax.data import codes, sources
from dlc_jax.evals import codes as health
from dlc_jax.models.simplicial import Encoder, flops
from dlc_jax.pipeline import Pipeline, programs
from dlc_jax.stage import Job


def make(config, *, step: str, workdir) -> Job:
    """The job of a recipe's section `step`, which names its `encoder`, the `splits` and the `view` that is coded."""
    section = config[step]
    model = config[section.encoder].model
    pipeline = functools.partial(Pipeline, config, workdir, batch=section.batch, encoder=section.encoder)

    def export(mesh, directory):
        coder = pipeline(mesh=mesh)
        identity = checkpoint.identity_of(workdir / section.encoder / "checkpoints")
        for split in section.splits:
            _drop_others(directory / split, identity)
            source = sources.source(split=split, **(config.data.to_dict() | section.view.to_dict()))

            def encode(start, stop, source=source):
                # Record i is what source[i] gives: for a file that cannot be read its replacement, the same wherever it is read.
                return {"codes": coder.encode(np.stack([source[index]["image"] for index in range(start, stop)]))}

            codes.write(
                directory / split,
                encode,
                total=len(source),
                positions=model.positions,
                values=model["values"],
                identity=identity,
                source=sources.identity(split=split, **config.data),
                view=section.view.to_dict(),
                shard_size=section.shard_size,
            )

    def run(mesh, directory):
        if not section.path:
            export(mesh, directory)
        stores = {split: codes.CodeStore(recipe.place(config, workdir, step) / split) for split in section.splits}
        first = stores[section.splits[0]].checked(positions=model.positions, values=model["values"], where=section.encoder)
        if section.path:
            for split, store in stores.items():
                store.check_source(sources.identity(split=split, **config.data))
            home.remember(directory, {"store": first.origin}, operational=())
        home.write(directory / "usage.json", health.usage(first.codes(), values=model["values"]))
        results = {f"{split}_count": len(store) for split, store in stores.items()}
        results |= health.health(first.codes(), values=model["values"])
        return {f"codes/{key}": value for key, value in results.items()}

    once = flops(Encoder(**model), codes=True)
    return Job(run=run, programs=programs(pipeline, batch=section.batch, flops={"encode": once}), settings=("path",))


def _drop_others(directory, identity) -> None:
    """Removes a store, or a part of one, of the encoder as it was before: it was trained longer since, and its codes are made anew."""
    for path in [directory / "manifest.json", *directory.glob("codes-*.json")]:
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):  # none, or damaged: `codes.write` sees to it
            continue
        if found.get("description", found).get("identity") != identity and jax.process_index() == 0:
            shutil.rmtree(directory)
            return
