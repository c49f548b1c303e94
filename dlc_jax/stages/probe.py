"""The probe job: what do hard codes say about each factor of an image? A linear probe and nearest neighbors, on unseen images."""

import numpy as np

from dlc_jax import recipe
from dlc_jax.data import sources
from dlc_jax.data.codes import CodeStore
from dlc_jax.evals import probe
from dlc_jax.stage import Job


def make(config, *, step: str, workdir) -> Job:
    """The job of a recipe's section `step`: fits on `count` records of the train split, reports on `splits`."""
    section = config[step]

    def read(split, count):
        source = sources.source(split=split, **config.data)
        rows = sources.choose(source, count)
        codes = CodeStore(recipe.place(config, workdir, section.codes) / split).codes()[rows]
        return codes, np.stack([source[int(index)]["factors"] for index in rows])

    def run(mesh, directory):
        labels = sources.factors(**config.data)
        if not labels:
            return {}
        codes, factors = read("train", section.count)
        results = {}
        for split in section.splits:
            prefix = "probe" if split == "validation" else f"probe_{split}"
            unseen = read(split, section.count)
            found = probe.probe(
                codes,
                factors,
                *unseen,
                names=list(labels),
                classes=[len(of) for of in labels.values()],
                values=config[section.encoder].model["values"],
            )
            results |= {key.replace("probe", prefix, 1): value for key, value in found.items()}
            results[f"{prefix}/count"] = len(unseen[0])
        return results

    return Job(run=run, settings=("splits", "count"))
