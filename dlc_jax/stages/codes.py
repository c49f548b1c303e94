"""The codes job: every image of every split through the encoder's average, its codes into a store. Source: arXiv 2507.12318, section 3.

With a `path`, the store that another run made there is used instead: it is checked, and nothing is encoded.

Of P processes, the p-th encodes shards p, p + P, ... on its own devices, and they meet when a split is complete. Killed at any time the
job goes on where each of its shards was. A code depends on its image and on how many images a device takes at once, not on P.
"""

import functools
import itertools
import json
import os
import shutil
import time

import jax

from dlc_jax import checkpoint, parallel, recipe
from dlc_jax import workdir as home
from dlc_jax.data import codes, sources
from dlc_jax.data.progress import Progress
from dlc_jax.data.sweep import sweep
from dlc_jax.evals import codes as health
from dlc_jax.models.simplicial import Encoder, flops
from dlc_jax.pipeline import Pipeline, programs
from dlc_jax.stage import Job

READERS = min(32, os.cpu_count() or 1)  # threads; each keeps some dozens of images waiting
SAMPLE = 2**25  # entries of the codes whose health is told: 268 MB as int64


def make(config, *, step: str, workdir) -> Job:
    """The job of a recipe's section `step`, which names its `encoder`, the `splits` and the `view` that is coded.

    Raises:
      UserError: values that no store holds.
    """
    section = config[step]
    model = config[section.encoder].model
    codes.code_dtype(model["values"])
    pipeline = functools.partial(Pipeline, config, workdir, encoder=section.encoder)

    def export(mesh, directory):
        """Makes the stores, or what is missing of them; returns images per second of all processes, at this one's pace."""
        parallel.check_batch(section.batch, parallel.replicas(mesh), accumulate=1, where=step)
        mine = parallel.replicas(mesh, local=True)
        coder = pipeline(mesh=mine, batch=section.batch // mesh.size * mine.size)
        coder.load("encoder")  # now, by all: none knows whether the others still have shards to make
        identity = checkpoint.identity_of(workdir / section.encoder / "checkpoints")
        if jax.process_index() == 0:
            for split in section.splits:
                _drop_others(directory / split, identity)
        checkpoint.meet(f"{step}: begin")
        view = config.data.to_dict() | section.view.to_dict()
        found = {split: sources.source(split=split, **view) for split in section.splits}
        shares = [_share(len(source), section.shard_size) for source in found.values()]
        pace = _Pace()
        with Progress(step, "images", silent=jax.process_index() != 0) as progress:
            for (split, source), before in zip(found.items(), itertools.accumulate(shares, initial=0)):

                def encode(start, stop, source=source, before=before):
                    done = before + _share(start, section.shard_size)
                    with pace:
                        # Record i is what source[i] gives: for a file that cannot be read its replacement, the same wherever it is read.
                        images = sweep(lambda row: source[row]["image"], range(start, stop), workers=READERS)
                        for part in coder.encode_each(_batched(images, coder.batch)):
                            progress(done, sum(shares))
                            done += len(part)
                            pace.count += len(part)
                            yield {"codes": part}

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
                    process_index=jax.process_index(),
                    process_count=jax.process_count(),
                    barrier=functools.partial(checkpoint.meet, f"{step}: {split}"),
                )
        return pace.count / pace.seconds * jax.process_count() if pace.count else None

    def run(mesh, directory):
        results = {}
        if not section.path:
            results["images_per_s"] = export(mesh, directory)
        stores = {split: codes.CodeStore(recipe.place(config, workdir, step) / split) for split in section.splits}
        first = stores[section.splits[0]].checked(positions=model.positions, values=model["values"], where=section.encoder)
        if section.path:
            for split, store in stores.items():
                store.check_source(sources.identity(split=split, **config.data))
            home.remember(directory, {"store": first.origin}, operational=())
        rows = sources.choose(first, max(1, SAMPLE // model.positions))
        some = first.codes()[rows] if len(rows) < len(first) else first.codes()
        home.write(directory / "usage.json", health.usage(some, values=model["values"]))
        results |= {f"{split}_count": len(store) for split, store in stores.items()}
        results |= health.health(some, values=model["values"])
        return {f"codes/{key}": value for key, value in results.items() if value is not None}

    once = flops(Encoder(**model), codes=True)
    planned = functools.partial(pipeline, batch=section.batch)
    return Job(run=run, programs=programs(planned, batch=section.batch, flops={"encode": once}), settings=("path",))


class _Pace:
    """As a context, times encoding: `seconds` in all, beside the `count` of images."""

    def __init__(self):
        self.count, self.seconds = 0, 0.0

    def __enter__(self):
        self._begin = time.monotonic()

    def __exit__(self, *_):
        self.seconds += time.monotonic() - self._begin


def _share(total: int, shard_size: int) -> int:
    """How many of the first `total` records are this process's."""
    starts = range(jax.process_index() * shard_size, total, jax.process_count() * shard_size)
    return sum(min(shard_size, total - start) for start in starts)


def _batched(images, size: int):
    while batch := list(itertools.islice(images, size)):
        yield batch


def _drop_others(directory, identity) -> None:
    """Removes a store, or a part of one, of the encoder as it was before: it was trained longer since, and its codes are made anew."""
    for path in [directory / "manifest.json", *directory.glob("codes-*.json")]:
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):  # none, or damaged: `codes.write` sees to it
            continue
        if found.get("description", found).get("identity") != identity:
            shutil.rmtree(directory)
            return
