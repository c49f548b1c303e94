"""What the prior is trained on: the bound's weight, the codes of a split, an order by the seed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recipes import load

from dlc_jax.data import code_writer, sources
from dlc_jax.errors import UserError
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


def loss_of(made, labels, key=0):
    """The loss of a stage whose network is drawn at random, on one batch."""
    params, _ = made.init(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    drawn = [
        0.2 * jax.random.normal(jax.random.key(i), leaf.shape) for i, leaf in enumerate(leaves)
    ]
    batch = {
        "position": jnp.arange(64, dtype=jnp.int32),
        "codes": jax.random.randint(jax.random.key(1), (64, LENGTH), 0, VALUES, jnp.int32),
        "label": jnp.asarray(labels, jnp.int32),
    }
    loss = jax.jit(made.loss)
    return float(loss(tree.unflatten(drawn), {}, batch, {}, 0, jax.random.key(key))[0])


def test_classes_are_read_and_dropped():
    zeros, ones = np.zeros(64), np.ones(64)
    read = stage("prior", **{"model.classes": 3, "drop_label": 0.0})
    assert "label" in read.batch_spec and loss_of(read, zeros) != loss_of(read, ones)
    dropped = stage("prior", **{"model.classes": 3, "drop_label": 1.0})
    assert loss_of(dropped, zeros) == loss_of(dropped, ones) != loss_of(read, zeros)
    validated = dataclasses.replace(dropped, loss=dropped.validation_loss)
    assert loss_of(validated, zeros) == loss_of(read, zeros)
    half = stage("prior", **{"model.classes": 3, "drop_label": 0.5})
    assert min(loss_of(read, zeros), loss_of(dropped, zeros)) < loss_of(half, zeros)
    assert max(loss_of(read, zeros), loss_of(dropped, zeros)) > loss_of(half, zeros)


def test_data_without_classes_is_refused(stores):
    made = stage("prior", stores, **{"model.classes": 3})
    with pytest.raises(UserError, match="prior.model.classes=3, but the data is not in classes"):
        made.reads()


def test_the_networks_time_is_the_schedules():
    """With sigma told, another schedule is another loss, and dropout draws by the key."""
    lines = {"model.sigma_conditioning": True, "process.objective": "score"}
    labels = np.zeros(64)
    found = [
        loss_of(stage("prior", **lines, **{"process.noise.schedule": schedule}), labels)
        for schedule in ("log_linear", "cosine")
    ]
    assert np.isfinite(found).all() and found[0] != found[1]
    dropout = stage("prior", **{"model.dropout": 0.3})
    plain = loss_of(stage("prior"), labels)
    assert loss_of(dropout, labels) != plain
    validated = dataclasses.replace(dropout, loss=dropout.validation_loss)
    assert loss_of(validated, labels) == plain


def test_uniform_noise_is_learned_too():
    lines = {"process.name": "uniform", "process.noise.schedule": "log_linear"}
    with pytest.raises(UserError, match="process.name=uniform needs prior.model.sigma_cond"):
        stage("prior", **lines)
    lines["model.sigma_conditioning"] = True
    for noise, words in (
        ({"schedule": "cosine"}, "'cosine' has no rate at t=1"),
        ({"schedule": "geometric", "largest": 100.0}, "is at most 80 for"),
    ):
        own = {f"process.noise.{name}": value for name, value in noise.items()}
        with pytest.raises(UserError, match=words):
            stage("prior", **lines | own)
    assert np.isfinite(loss_of(stage("prior", **lines), np.zeros(64)))


def test_a_flow_is_learned_too():
    with pytest.raises(UserError, match="process.name=flow needs prior.model.sigma_conditioning"):
        stage("prior", **{"process.name": "flow"})
    lines = {"process.name": "flow", "model.sigma_conditioning": True}
    found = [
        loss_of(stage("prior", **lines, **own), np.zeros(64))
        for own in ({}, {"process.noise.schedule": "cosine"}, {"model.per_position": True})
    ]
    assert np.isfinite(found).all() and len(set(found)) == 3


def test_former_identities_had_one_process():
    saved = {"model": {"positions": LENGTH}, "codes": "codes"}
    found = stage("prior").former(saved)
    assert found["process"]["name"] == "masked" and found["process"]["objective"] == "elbo"
    assert found["process"]["noise"]["schedule"] == "linear"
    whole = stage("prior").identity
    assert stage("prior").former(whole) == whole
