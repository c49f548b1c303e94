"""The codes job: every image of every split through the encoder's average, its codes into a store. Source: arXiv 2507.12318, section 3.

With a `path`, the store that another run made there is used instead: it is checked, and nothing is encoded.

A record may have more than its codes: with an `autoencoder`, the moments of the posterior of the image's latent, `latent_mean` and
`latent_logvar`, and with `flip` all of it once more of the flipped image, `codes_flipped` and so on: what has the same ending is of the
same view. Moments are float16: they lie within its range, and bfloat16 would round means by more than the posterior's deviation.

Of P processes, the p-th encodes shards p, p + P, ... on its own devices, and they meet when a split is complete. Killed at any time the
job goes on where each of its shards was. A code depends on its image and on how many images a device takes at once, not on P.

Codes are what priors and generators learn to speak, and every image that is encoded later must be spelled as those of the store were. So
`dtype` is a field of its own, whatever the encoder was trained in, and the store's manifest has it. In float32 a code hardly depends on
the device; in bfloat16 about one position in a hundred does.
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

from dlc_jax import checkpoint, parallel, recipe
from dlc_jax import workdir as home
from dlc_jax.data import code_writer, codes, inputs, sources
from dlc_jax.data.progress import Progress
from dlc_jax.data.sweep import sweep
from dlc_jax.errors import UserError
from dlc_jax.evals import codes as health
from dlc_jax.models.autoencoder import Autoencoder
from dlc_jax.models.simplicial import Encoder, flops
from dlc_jax.pipeline import Pipeline, programs
from dlc_jax.stage import Job

READERS = min(32, os.cpu_count() or 1)  # threads; each keeps some dozens of images waiting
DTYPES = ("float32", "bfloat16")
SAMPLE = 2**25  # entries of the codes whose health is told: 268 MB as int64


def make(config, *, step: str, workdir) -> Job:
    """The job of a recipe's section `step`, which names its `encoder`, the `splits` and the `view` that is coded.

    Raises:
      UserError: values that no store holds; an autoencoder that the recipe has no section of.
    """
    section = config[step]
    model = config[section.encoder].model
    code_dtype = codes.code_dtype(model["values"])
    if section.autoencoder and section.autoencoder not in config:
        raise UserError(
            f"{step}.autoencoder={section.autoencoder!r} is no section of this recipe; give one, or '' for codes alone"
        )
    dtype = section.get("dtype", "")  # a run of before there was the field goes on as it began, see `Pipeline`
    if "dtype" in section and dtype not in DTYPES:
        raise UserError(f"{step}.dtype={dtype!r} is unknown; known: {', '.join(DTYPES)}")
    pipeline = functools.partial(Pipeline, config, workdir, encoder=section.encoder, dtype=dtype)

    def export(mesh, directory):
        """Makes the stores, or what is missing of them; returns images per second of all processes, at this one's pace."""
        parallel.check_batch(section.batch, parallel.replicas(mesh), accumulate=1, where=step)
        mine = parallel.replicas(mesh, local=True)
        batch = section.batch // mesh.size * mine.size
        # All parameters now, by all processes: none knows whether the others still have shards to make.
        coder = pipeline(mesh=mine, batch=batch)
        to_codes, params = coder.coder()
        to_moments, moments_params = _moments(config, step, mine)
        identity = checkpoint.identity_of(recipe.trained(config, workdir, section.encoder) / "checkpoints")
        view = section.view.to_dict()
        if section.autoencoder:
            where = Path(config[section.autoencoder].path)
            view |= {"latents": {"autoencoder": checkpoint.identity_of(where / "checkpoints"), "image": config.data.image}}

        def look(params, images, pictures=None):
            found = {"codes": to_codes(params[0], images)}
            return found if pictures is None else found | to_moments(params[1], pictures)

        @jax.jit
        def compute(params, *images):
            found = look(params, *images)
            if section.flip:
                again = look(params, *(jnp.flip(view, axis=2) for view in images))
                found |= {f"{name}_flipped": value for name, value in again.items()}
            return found

        sizes = [(batch, coder.size, coder.size, 3), (batch, config.data.image, config.data.image, 3)]
        made = jax.eval_shape(
            compute,
            (params, moments_params),
            *(jax.ShapeDtypeStruct(size, jnp.uint8) for size in sizes[: 1 + bool(section.autoencoder)]),
        )
        stored = {name: code_dtype if name.startswith("codes") else leaf.dtype for name, leaf in made.items()}
        fields = {name: (stored[name], leaf.shape[1:]) for name, leaf in made.items() if name != "codes"}

        if jax.process_index() == 0:
            for split in section.splits:
                _drop_others(directory / split, identity)
        checkpoint.meet(f"{step}: begin")
        opened = {split: _Views(config, section, split, coder.size) for split in section.splits}
        shares = [_share(len(views), section.shard_size) for views in opened.values()]
        pace = _Pace()
        with Progress(step, "images", silent=jax.process_index() != 0) as progress:
            for (split, views), before in zip(opened.items(), itertools.accumulate(shares, initial=0), strict=False):

                def encode(start, stop, views=views, before=before):
                    done = before + _share(start, section.shard_size)
                    with pace:
                        batches = views.batches(start, stop, batch)
                        for part in parallel.each(compute, (params, moments_params), batches, mesh=mine, size=batch):
                            progress(done, sum(shares))
                            done += len(part["codes"])
                            pace.count += len(part["codes"])
                            yield {name: value.astype(stored[name]) for name, value in part.items()}

                code_writer.write(
                    directory / split,
                    encode,
                    total=len(views),
                    positions=model.positions,
                    values=model["values"],
                    identity=identity,
                    source=sources.identity(split=split, **config.data),
                    view=view,
                    computed=dtype,
                    shard_size=section.shard_size,
                    fields=fields,
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
            trained = recipe.trained(config, workdir, section.encoder) / "checkpoints"
            identity = checkpoint.identity_of(trained) if checkpoint.identities(trained) else None  # they may come without it
            for split, store in stores.items():
                if identity is not None:
                    store.check_encoder(identity)
                store.check_source(sources.identity(split=split, **config.data))
                store.check_dtype(dtype, step)
            home.remember(directory, {"store": first.origin}, operational=())
        rows = sources.choose(first, max(1, SAMPLE // model.positions))
        some = first.codes(rows)
        home.write(directory / "usage.json", health.usage(some, values=model["values"]))
        results |= {f"{split}_count": len(store) for split, store in stores.items()}
        results |= health.health(some, values=model["values"])
        return {f"codes/{key}": value for key, value in results.items() if value is not None}

    def whole(directory):
        if section.path:  # the matter of the run that made them, and of whoever reads them
            return True
        known = checkpoint.identities(recipe.trained(config, workdir, section.encoder) / "checkpoints")
        for split in section.splits:
            try:
                store = codes.CodeStore(directory / split)
            except UserError:
                return False
            if known and store.manifest["identity"] not in known:
                store.check_encoder(known.pop())
            store.check_dtype(dtype, step)
        return True

    once = flops(Encoder(**model), codes=True)
    planned = functools.partial(pipeline, batch=section.batch)
    return Job(run=run, programs=programs(planned, batch=section.batch, flops={"encode": once}), settings=("path",), whole=whole)


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


class _Views:
    """The images of a split: as the encoder takes them, and with an autoencoder beside that as the generator is to draw them."""

    def __init__(self, config, section, split, size):
        self._size = size
        self._sources = [sources.source(split=split, **(config.data.to_dict() | section.view.to_dict()))]
        if section.autoencoder:
            self._sources.append(sources.source(split=split, **config.data))

    def __len__(self):
        return len(self._sources[0])

    def batches(self, start, stop, size):
        """Tuples of uint8 [at most size, y, x, 3] of records start .. stop - 1, read ahead by threads."""
        # Record i is what source[i] gives: for a file that cannot be read its replacement, the same wherever it is read.
        read = sweep(lambda row: [source[row]["image"] for source in self._sources], range(start, stop), workers=READERS)
        while rows := list(itertools.islice(read, size)):
            images, *pictures = zip(*rows, strict=True)
            yield inputs.fit(images, size=self._size), *map(np.stack, pictures)


def _moments(config, step, mesh):
    """(params, images uint8 [b, y, x, 3]) -> {"latent_mean", "latent_logvar"} float16 [b, y/8, x/8, c], and the params; of nothing, None."""
    section = config[step]
    if not section.autoencoder:
        return None, None
    if not config[section.autoencoder].path:
        raise UserError(
            f"{step} needs the weights of {section.autoencoder}: give --config.{section.autoencoder}.path=DIR, made by dlc import vae "
            f"FILE --out DIR, or --config.{step}.autoencoder='' for codes alone"
        )
    model = Autoencoder(**config[section.autoencoder].model)
    image = jnp.zeros((1, config.data.image, config.data.image, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), image)["params"])
    placed = parallel.abstract(shapes, parallel.shardings(shapes, mesh, strict=False))
    params = checkpoint.load_params(Path(config[section.autoencoder].path) / "checkpoints", placed)

    def moments(params, images):
        found = model.apply({"params": params}, images / jnp.float32(127.5) - 1, method="encode")
        return {f"latent_{name}": value.astype(jnp.float16) for name, value in found.items()}

    return moments, params


def _drop_others(directory, identity) -> None:
    """Removes a store, or a part of one, of the encoder as it was before: it was trained longer since, and its codes are made anew."""
    for path in [directory / "manifest.json", *directory.glob("codes-*.json")]:
        try:
            found = json.loads(path.read_text())
            of = found.get("description", found).get("identity")
        except (OSError, ValueError, AttributeError):  # none, or damaged: `code_writer.write` sees to it
            continue
        if of != identity:
            shutil.rmtree(directory)
            return
