"""The probe job: what do hard codes, and the features they are made of, say of each factor?

And do two views of an image agree? With `baselines` also what an untrained encoder's codes and
plain pixels say: what is above those was learned.
"""

import dataclasses
import functools

from dlc_jax import checkpoint, checkup, recipe
from dlc_jax.data import sources
from dlc_jax.data.codes import CodeStore
from dlc_jax.data.sources import DataSet
from dlc_jax.evals import codes as health
from dlc_jax.evals.probe import Fit
from dlc_jax.networks import Networks
from dlc_jax.stage import Job


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """The section of a probe.

    Attributes:
      encoder: step whose codes and features are probed.
      codes: step whose code store is read.
      splits: to report on.
      count: records of each split.
      baselines: also probes an untrained encoder's codes, and pixels.
      fit: how the probes are trained.
    """

    encoder: str = "encoder"
    codes: str = "codes"
    splits: tuple[str, ...] = ("validation",)
    count: int = 5000
    baselines: bool = False
    fit: Fit = Fit()


def make(config, *, step: str, workdir) -> Job:
    """The job of a recipe's section `step`: fits on `count` records of the train split.

    Codes are those of the store of `codes`. Agreement of views, health of codes and the rest of
    `checkup.probes` are of the same records. Without factors (classes) there is nothing to probe,
    and health and agreement are all.
    """
    section = recipe.build(Section, config[step])

    def run(mesh, directory):
        codes = config[section.codes]
        settings = {"batch": codes.batch, "dtype": codes.dtype}
        networks = Networks(config, workdir, mesh, **settings)
        with networks, DataSet(**config.data) as data:
            return measure(config, workdir, section, data, networks[section.encoder])

    return Job(run=run, settings=("splits", "count", "baselines", "fit"))


def measure(config, workdir, section: Section, data, network) -> dict[str, float]:
    """The results of the job, of an encoder's network."""
    values = network.model.simplicial.values
    labels = data.factors()
    of = {"features": network.features} if labels else {}
    if labels and section.baselines:
        untrained = functools.partial(network.encode, params=network.untrained())
        of |= {"untrained": untrained, "pixels": checkup.pixels}
    read = functools.partial(read_split, config, workdir, section, data, of)
    train, results = read("train") if labels else {}, {}
    for split in section.splits:
        unseen = read(split)
        after = "" if split == "validation" else f"_{split}"
        found = health.health(unseen["codes"], values=values)
        results |= {f"health{after}/{key}": value for key, value in found.items()}
        source = data.source(split)
        alike = checkup.agreement(
            source,
            sources.choose(source, section.count),
            network.encode,
            crops=config[section.encoder].crops.to_dict(),
            values=values,
            seed=config.seed,
        )
        results |= {f"agreement{after}/{key}": value for key, value in alike.items()}
        if labels:
            how = {"factors": labels, "values": values, "split": split, "fit": section.fit}
            results |= checkup.probes(train, unseen, **how)
    return results


def read_split(config, workdir, section: Section, data, of, split: str) -> dict:
    """`codes`, `factors` and what each function of `of` says of `count` records of a split.

    Agreement and features are of the encoder that is here: codes of another one beside them would
    be two encoders in one table.

    Raises:
      UserError: the codes are of another encoder.
    """
    source = data.source(split, **recipe.view(config[section.codes]))
    rows = sources.choose(source, section.count)
    store = CodeStore(recipe.place(config, workdir, section.codes) / split)
    trained = recipe.trained(config, workdir, section.encoder)
    store.check_encoder(checkpoint.identity_of(trained / "checkpoints"))
    return {"codes": store.codes(rows)} | checkup.read(source, rows, of)
