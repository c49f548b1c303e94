"""The probe job: what do hard codes, and the features they are made of, say about each factor of an image? And do two views agree?

With `baselines` also what an untrained encoder's codes and plain pixels say: what is above those was learned.
"""

import functools

from dlc_jax import checkpoint, checkup, recipe
from dlc_jax.data import sources
from dlc_jax.data.codes import CodeStore
from dlc_jax.evals import codes as health
from dlc_jax.evals.probe import Fit
from dlc_jax.pipeline import Pipeline
from dlc_jax.stage import Job


def make(config, *, step: str, workdir) -> Job:
    """The job of a recipe's section `step`: fits on `count` records of the train split, reports on `splits`.

    Codes are those of the store of `codes`. Agreement of views, health of codes and the rest of `checkup.probes` are of the same
    records; without factors (classes) there is nothing to probe, and health and agreement are all.
    """
    section = config[step]
    values = config[section.encoder].model["values"]
    fit = Fit(**section.fit)

    def run(mesh, directory):
        dtype = config[section.codes].get("dtype", "")
        pipeline = Pipeline(config, workdir, mesh=mesh, batch=config[section.codes].batch, encoder=section.encoder, dtype=dtype)
        view = config.data.to_dict() | config[section.codes].view.to_dict()
        labels = sources.factors(**config.data)
        of = {"features": pipeline.features} if labels else {}
        if labels and section.baselines:
            of |= {"untrained": functools.partial(pipeline.encode, params=pipeline.untrained()), "pixels": checkup.pixels}

        # Agreement and features are the encoder's that is here: codes of another one beside them would be two encoders in one table.
        @functools.cache
        def encoder():
            return checkpoint.identity_of(recipe.trained(config, workdir, section.encoder) / "checkpoints")

        def read(split):
            source = sources.source(split=split, **view)
            rows = sources.choose(source, section.count)
            store = CodeStore(recipe.place(config, workdir, section.codes) / split)
            store.check_encoder(encoder())
            return {"codes": store.codes(rows)} | checkup.read(source, rows, of)

        train, results = read("train") if labels else {}, {}
        for split in section.splits:
            unseen = read(split)
            after = "" if split == "validation" else f"_{split}"
            found = health.health(unseen["codes"], values=values)
            results |= {f"health{after}/{key}": value for key, value in found.items()}
            source = sources.source(split=split, **config.data)
            rows = sources.choose(source, section.count)
            crops = config[section.encoder].crops.to_dict()
            alike = checkup.agreement(source, rows, pipeline.encode, crops=crops, values=values, seed=config.seed)
            results |= {f"agreement{after}/{key}": value for key, value in alike.items()}
            if labels:
                results |= checkup.probes(train, unseen, factors=labels, values=values, split=split, fit=fit)
        return results

    return Job(run=run, settings=("splits", "count", "baselines", "fit"))
