"""The codes job: every image of every split through the encoder's average, its codes into a store. Source: arXiv 2507.12318, section 3."""

import functools

import numpy as np

from dlc_jax import checkpoint
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

    def run(mesh, directory):
        coder = pipeline(mesh=mesh)
        identity = checkpoint.identity_of(workdir / section.encoder / "checkpoints")
        results = {}
        for split in section.splits:
            source = sources.source(config.data.name, split, **(config.data.options.to_dict() | section.view.to_dict()))

            def encode(start, stop, source=source):
                records = [source[index] for index in range(start, stop)]
                found = coder.encode(np.stack([record["image"] for record in records]))
                return {"codes": found, "index": np.array([record["index"] for record in records])}

            codes.write(
                directory / split,
                encode,
                total=len(source),
                positions=model.positions,
                values=model["values"],
                identity=identity,
                source=sources.identity(config.data.name, split, **config.data.options),
                view=section.view.to_dict(),
                shard_size=section.shard_size,
            )
            results |= {f"codes/{split}_count": len(source)}
        found = codes.CodeStore(directory / section.splits[0], identity=identity).codes()
        return results | {f"codes/{key}": value for key, value in health.health(found, values=model["values"]).items()}

    once = flops(Encoder(**model), codes=True)
    return Job(run=run, programs=programs(pipeline, batch=section.batch, flops={"encode": once}))
