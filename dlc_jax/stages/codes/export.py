"""Writing the stores of a codes job.

Of P processes, the p-th encodes shards p, p + P, ... on its own devices, and they meet when a split
is complete. Killed at any time the job goes on where each of its shards was. A code depends on its
image and on how many images a device takes at once, not on P.
"""

import functools
import itertools
import json
import os
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax import checkpoint, parallel, recipe, remote
from dlc_jax.data import code_writer, codes, inputs
from dlc_jax.data.progress import Progress
from dlc_jax.data.sources import DataSet
from dlc_jax.data.sweep import sweep
from dlc_jax.hosts import sharing
from dlc_jax.networks import Networks
from dlc_jax.networks.autoencoder import AutoencoderNetwork

READERS = min(32, os.cpu_count() or 1)  # threads; each keeps some dozens of images waiting


def export(config, workdir, step: str, section, mesh, directory: Path) -> float | None:
    """Makes the stores, or what is missing of them.

    Returns:
      Images per second of all processes, at this one's pace; None if there was nothing to do.
    """
    parallel.check_batch(section.batch, parallel.replicas(mesh), accumulate=1, where=step)
    mine = parallel.replicas(mesh, local=True)
    batch = section.batch // mesh.size * mine.size
    networks = Networks(config, workdir, mine, batch=batch, dtype=section.dtype)
    with networks, DataSet(**config.data) as data:
        network = networks[section.encoder]
        compute, params, fields = _program(config, section, network, mine)
        trained = recipe.trained(config, workdir, section.encoder)
        identity = checkpoint.identity_of(trained / "checkpoints")
        about = {"identity": identity, "view": _view(config, section), "computed": section.dtype}
        if jax.process_index() == 0:
            for split in section.splits:
                drop_others(directory / split, identity)
        sharing.share(directory, f"{step}: begin", whole=True)
        views = {split: _Views(data, section, split, network.size) for split in section.splits}
        shares = [_share(len(view), section.shard_size) for view in views.values()]
        pace = _Pace()
        with Progress(step, "images", silent=jax.process_index() != 0) as progress:
            for number, (split, view) in enumerate(views.items()):
                before = sum(shares[:number])

                def encode(start, stop, view=view, before=before):
                    done = before + _share(start, section.shard_size)
                    with pace:
                        rows = view.batches(start, stop, batch)
                        parts = parallel.each(compute, params, rows, mesh=mine, size=batch)
                        for part in parts:
                            progress(done, sum(shares))
                            done += len(part["codes"])
                            pace.count += len(part["codes"])
                            yield {
                                name: value.astype(fields[name][0]) for name, value in part.items()
                            }

                code_writer.write(
                    directory / split,
                    encode,
                    total=len(view),
                    positions=network.model.simplicial.positions,
                    values=network.model.simplicial.values,
                    source=data.identity(split),
                    shard_size=section.shard_size,
                    fields={name: kind for name, kind in fields.items() if name != "codes"},
                    process_index=jax.process_index(),
                    process_count=jax.process_count(),
                    barrier=functools.partial(
                        sharing.share, directory / split, f"{step}: {split}", whole=True
                    ),
                    **about,
                )
    return pace.count / pace.seconds * jax.process_count() if pace.count else None


def _program(config, section, network, mesh):
    """What is computed of a batch: (function, its params, {field: (dtype, shape)}).

    All parameters are read here, by all processes: none knows whether others have shards to make.
    """
    to_moments, moments_params = _moments(config, section, mesh)

    def look(params, images, pictures=None):
        if section.embedding:
            found = network.described(params[0], images, kind=section.embedding)
            found |= {"embedding": found["embedding"].astype(jnp.float16)}
        else:
            found = {"codes": network.codes(params[0], images)}
        return found if pictures is None else found | to_moments(params[1], pictures)

    @jax.jit
    def compute(params, *images):
        found = look(params, *images)
        if section.flip:
            again = look(params, *(jnp.flip(view, axis=2) for view in images))
            found |= {f"{name}_flipped": value for name, value in again.items()}
        return found

    params = (network.params, moments_params)
    sides = [network.size, *([config.data.image] if section.autoencoder else [])]
    shapes = [jax.ShapeDtypeStruct((network.batch, side, side, 3), jnp.uint8) for side in sides]
    smallest = codes.code_dtype(network.model.simplicial.values)
    fields = {
        name: (smallest if name.startswith("codes") else leaf.dtype, leaf.shape[1:])
        for name, leaf in jax.eval_shape(compute, params, *shapes).items()
    }
    return compute, params, fields


def _moments(config, section, mesh):
    """(function, its params); of no autoencoder (None, None).

    The function is (params, images uint8 [b, y, x, 3]) -> {"latent_mean", and "latent_logvar" of an
    autoencoder with a posterior} float16 [b, y/8, x/8, c].
    """
    if not section.autoencoder:
        return None, None
    network = AutoencoderNetwork(config, section.autoencoder, mesh)

    def moments(params, images):
        found = network.encode(params, images)
        return {f"latent_{name}": value.astype(jnp.float16) for name, value in found.items()}

    return moments, network.params


def _view(config, section) -> dict:
    """Which view of the images the codes and all else are of, for the manifest."""
    found = recipe.view(section) | ({"embedding": section.embedding} if section.embedding else {})
    if section.autoencoder:
        where = remote.local(config[section.autoencoder].path) / "checkpoints"
        latents = {"autoencoder": checkpoint.identity_of(where), "image": config.data.image}
        found |= {"latents": latents}
    return found


class _Views:
    """The images of a split as the encoder takes them.

    With an autoencoder also as the generator is to draw them.
    """

    def __init__(self, data: DataSet, section, split, size):
        self._size = size
        self._sources = [data.source(split, **recipe.view(section))]
        if section.autoencoder:
            self._sources.append(data.source(split))

    def __len__(self):
        return len(self._sources[0])

    def batches(self, start, stop, size):
        """Tuples of uint8 [at most size, y, x, 3] of records start .. stop - 1, read ahead."""
        # Record i is what source[i] gives: for a file that cannot be read its replacement, the
        # same wherever it is read.
        read = sweep(self._records, range(start, stop), workers=READERS)
        while rows := list(itertools.islice(read, size)):
            images, *pictures = zip(*rows, strict=True)
            yield inputs.fit(images, size=self._size), *map(np.stack, pictures)

    def _records(self, row):
        return [source[row]["image"] for source in self._sources]


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


def drop_others(directory: Path, identity: str) -> None:
    """Removes a store, or a part of one, of the encoder as it was before it was trained longer."""
    for path in [directory / "manifest.json", *directory.glob("codes-*.json")]:
        try:
            found = json.loads(path.read_text())
            of = found.get("description", found).get("identity")
        except (OSError, ValueError, AttributeError):
            continue  # none, or damaged: `code_writer.write` sees to it
        if of != identity:
            shutil.rmtree(directory)
            remote.remove(directory)
            return
