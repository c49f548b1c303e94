"""What the prior is trained on: the bound's weight, the codes of a split, an order by the seed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recipes import load

from dlc_jax.data import code_writer, sources
from dlc_jax.models.masked_transformer import MaskedTransformer
from dlc_jax.stages import STAGES

LENGTH, VALUES = 6, 5
SPLITS = {"train": 0, "validation": 1}


def recipe(step, *, seed=0, count=64, **fields):
    """The quickstart's, with short codes, on few images: each batch of `count` is an epoch."""
    own = {"model.positions": LENGTH, "model.values": VALUES, "train.batch": count, **fields}
    lines = {f"{step}.{name}": value for name, value in own.items()}
    return load("quickstart.py:tiny", {"seed": seed, "data.count": count, **lines})


def stage(step, workdir="unused", **options):
    return STAGES[step](recipe(step, **options), step=step, workdir=workdir)


@pytest.fixture(scope="session")
def stores(tmp_path_factory):
    """A workdir with codes of 64 images a split: the image's number in base 5.

    In training it is counted up from 0, in validation down from the top.
    """
    workdir, config = tmp_path_factory.mktemp("stores"), recipe("prior")
    for split, down in SPLITS.items():

        def encode(start, stop, down=down):
            digits = np.arange(start, stop)[:, None] // VALUES ** np.arange(LENGTH) % VALUES
            return {"codes": np.abs(down * (VALUES - 1) - digits)}

        source = sources.identity(split=split, **config.data)
        sizes = dict(total=64, positions=LENGTH, values=VALUES)
        origin = dict(identity="counted", source=source)
        code_writer.write(workdir / "codes" / split, encode, **sizes, **origin)
    return workdir


def test_guessing_evenly_costs_log_v_a_token(monkeypatch):
    """On average over times and masks: the weight is one over the share of hidden positions."""

    def network(self, variables, noisy, *_):
        return jnp.zeros((*noisy.shape, VALUES))

    monkeypatch.setattr(MaskedTransformer, "apply", network)
    made = stage("prior", count=2048)
    batch = {"position": np.arange(2048, dtype=np.int32)}
    batch["codes"] = np.zeros((2048, LENGTH), np.int32)
    loss = jax.jit(lambda batch, key: made.loss({}, {}, batch, {}, 0, key))
    value, (metrics, _) = loss(batch, jax.random.key(0))
    assert value == metrics["nats_per_token"] == pytest.approx(np.log(VALUES), rel=0.1)


def test_the_average_warms_up():
    """It is of the last steps at first, not of the random start."""
    decay = stage("prior").ema_decay
    found = [decay(step) for step in (0, 10, 10**6)]
    np.testing.assert_allclose(found, [1 / 10, 11 / 20, 0.99], rtol=1e-6)


def test_batches_are_of_the_split_in_the_order_of_the_seed(stores):
    def batch(split, seed):
        return next(stage("prior", stores, seed=seed).batches(split))["codes"]

    train, again, other = batch("train", 0), batch("train", 0), batch("train", 1)
    np.testing.assert_array_equal(train, again)
    assert (train != other).any()
    first = {split: {tuple(row) for row in batch(split, 0)} for split in SPLITS}
    mirrored = {tuple(VALUES - 1 - value for value in row) for row in first["train"]}
    assert mirrored == first["validation"] != first["train"]
