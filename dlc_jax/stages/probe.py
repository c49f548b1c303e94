"""The probe job: what do hard codes say about each factor of an image? A linear probe and nearest neighbors, on unseen images."""

import numpy as np

from dlc_jax.data import sources
from dlc_jax.data.codes import CodeStore
from dlc_jax.evals import probe
from dlc_jax.stage import Job


def make(config, *, step: str, workdir) -> Job:
    """The job of a recipe's section `step`: fits on `count` records of the train split, reports on `splits`."""
    section = config[step]

    def read(split, count):
        source = sources.source(config.data.name, split, **config.data.options)
        count = min(count, len(source))
        codes = CodeStore(workdir / section.codes / split).codes()[:count]
        return codes, np.stack([source[index]["factors"] for index in range(count)])

    def run(mesh, directory):
        labels = sources.factors(config.data.name, **config.data.options)
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

    return Job(run=run)
