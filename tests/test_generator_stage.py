"""What the generator is trained on: pixels, noise, times and codes; what is drawn on the way."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from test_prior_stage import LENGTH, SPLITS, VALUES, recipe, stage, stores  # noqa: F401, a fixture

from dlc_jax import parallel
from dlc_jax.data import sources
from dlc_jax.diffusion.guidance import Guidance
from dlc_jax.diffusion.linear import Linear
from dlc_jax.diffusion.sample import Sampler
from dlc_jax.errors import UserError
from dlc_jax.models.dit import DiT, Outputs
from dlc_jax.networks.generator import GeneratorNetwork
from dlc_jax.recipe import build, changed
from dlc_jax.stages import STAGES, generator
from dlc_jax.stages.generator import objective
from dlc_jax.step import example_keys

COUNT = 1024  # examples: shares below are of so many
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, 2, 2, 3), np.uint8)
PIXELS = IMAGES / 127.5 - 1
TIME, FLOOR, DROP, POSITIONS, FOREIGN = (0.8, 1.5), 0.3, 0.2, 0.5, 0.4


@pytest.fixture(scope="module")
def draws():
    """What the loss shows to the network for two keys, by name.

    Example i has the value i at every position of its code. The network is a stub that says 0
    everywhere, so the loss is that of the images alone.
    """
    shares = dict(drop=DROP, drop_positions=POSITIONS, foreign=FOREIGN)
    process = dict(prediction="x", floor=FLOOR, mean=TIME[0], spread=TIME[1])
    fields = {f"objective.{name}": value for name, value in shares.items()}
    fields |= {f"process.{name}": value for name, value in process.items()}
    fields |= {"model.image": 2, "model.patch": 2, "model.values": COUNT}
    config = changed(recipe("generator", count=COUNT, **fields), {"data.image": 2})
    made = STAGES["generator"](config, step="generator", workdir="unused")
    batch = {
        "position": np.arange(COUNT, dtype=np.int32),
        "image": IMAGES,
        "codes": np.tile(np.arange(COUNT, dtype=np.int32)[:, None], LENGTH),
    }
    seen = {}

    def network(self, variables, x, t, given, *, keep, method):
        seen.update(x=x, t=t, codes=given.codes)
        return Outputs(jnp.zeros_like(x))

    @jax.jit
    def look(batch, key):
        value, _ = made.loss({}, {}, made.prepare({}, {}, {}, batch, {}, 0, key), {}, 0, key)
        return seen | {"loss": value}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiT, "apply", network)
        return [jax.device_get(look(batch, jax.random.key(seed))) for seed in (0, 1)]


def test_the_loss_is_of_pixels_from_minus_one_to_one(draws):
    """Of the data, weighted as the velocity's: over the square of a time held above the floor."""
    expected = np.mean(np.square(PIXELS).mean((1, 2, 3)) / np.maximum(draws[0]["t"], FLOOR) ** 2)
    assert draws[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_noisy_images_lie_between_pixels_and_normal_noise(draws):
    t = draws[0]["t"][:, None, None, None]
    noise = ((draws[0]["x"] - (1 - t) * PIXELS) / t)[draws[0]["t"] > 0.1].reshape(-1, 12)
    np.testing.assert_allclose([noise.mean(), noise.std()], [0, 1], atol=0.03)  # error 0.01
    assert np.abs(np.corrcoef(noise.T) - np.eye(12)).max() < 0.2  # each pixel for itself
    assert len(np.unique(noise[:, 0])) == len(noise)


def test_times_are_logit_normal_one_in_each_part(draws):
    """One quantile in each of as many equal parts of (0, 1) as there are examples."""
    for draw in draws:
        normal = (scipy.special.logit(draw["t"].astype(float)) - TIME[0]) / TIME[1]
        quantiles = np.sort(scipy.special.ndtr(normal))
        np.testing.assert_allclose(quantiles, (np.arange(COUNT) + 0.5) / COUNT, atol=0.51 / COUNT)


def test_every_draw_is_another_with_another_key(draws):
    for name in ("t", "x", "codes"):
        assert np.mean(draws[0][name] != draws[1][name]) > 0.2, name


def test_codes_are_dropped_whole_and_by_position(draws):
    codes, own = draws[0]["codes"], np.arange(COUNT)[:, None]
    null, foreign = codes == COUNT, (codes != COUNT) & (codes != own)
    whole = null.all(1)
    assert whole.mean() == pytest.approx(DROP, abs=0.04)  # standard error 0.0125
    replaced = (null | foreign)[~whole].sum(1)
    # The share is drawn evenly up to POSITIONS; with a fixed one the variance would be 1.1.
    assert replaced.mean() / LENGTH == pytest.approx(POSITIONS / 2, abs=0.03)
    assert replaced.var() == pytest.approx(1.75, abs=0.3)
    # One kind in an example, and foreign values of as many images as there are of them.
    assert not (null.any(1) & foreign.any(1)).any()
    assert foreign.any(1).sum() / (replaced > 0).sum() == pytest.approx(FOREIGN, abs=0.06)
    assert all(len(set(row[these])) == these.sum() for row, these in zip(codes, foreign))


def test_labels_are_dropped_with_the_codes():
    """The null condition is a whole; and codes are given without their label as often."""
    config = recipe(
        "generator", **{"model.classes": 7, "objective.drop": 0.5, "objective.foreign": 0.0}
    )
    section, place = build(generator.Section, config.generator), jnp.arange(64)
    batch = {"position": place, "codes": jnp.zeros((64, LENGTH), jnp.int32), "label": place % 7}
    given = objective.hide(section.model, section.objective, batch, jax.random.key(0))
    label, codes = np.asarray(given.label) == 7, (np.asarray(given.codes) == VALUES).all(1)
    assert 0.3 < codes.mean() < 0.7 and 0.3 < label[~codes].mean() < 0.7
    assert label[codes].all()
    np.testing.assert_array_equal(given.label[~label], batch["label"][~label])


@pytest.mark.parametrize(
    "step, aligned, routed", [(3, True, True), (7, False, True), (9, False, 0)]
)
def test_early_head_alignment_and_routing_are_in_the_loss(step, aligned, routed, monkeypatch):
    """The first weighs always, the second and third until a step of their own."""
    model = DiT(image=8, channels=3, patch=2, width=8, depth=5, early=2, align=2, route=True)
    how = objective.Objective(
        early=0.5, align=2.0, align_until=5, route=0.75, route_until=8, drop=0.0
    )
    task = objective.Task(model.clone(positions=0, values=0), Linear(), how, 4, teacher=True)
    draws = {"position": jnp.arange(4), "image": jnp.zeros((4, 8, 8, 3), jnp.uint8)}
    patches = jax.random.normal(jax.random.key(1), (4, 16, 5))

    def network(self, variables, x, t, given, *, keep, method):
        seen = 8 if keep is None else keep.shape[1]
        return Outputs(jnp.zeros_like(x) + seen, jnp.ones_like(x), -patches)

    monkeypatch.setattr(DiT, "apply", network)
    total, (metrics, _) = objective.loss(
        task, {}, {}, draws | {"patches": patches}, {}, jnp.int32(step), jax.random.key(0)
    )
    assert metrics["align"] == pytest.approx(2.0, abs=1e-5)  # opposite vectors
    rest = total - 0.5 * metrics["early"] - (2.0 * metrics["align"] if aligned else 0.0)
    seen = 4 if routed else 8  # what the stub was shown
    expected = np.mean((seen - _velocity(task, draws)) ** 2)
    assert rest == pytest.approx(expected, rel=1e-4)


def _velocity(task, draws):
    """Noise minus data of the batch, as the loss draws them."""
    keys = example_keys(jax.random.key(0), draws["position"], objective.NOISE)
    noise = jax.vmap(lambda key: jax.random.normal(key, (8, 8, 3)))(keys)
    return np.asarray(noise) + 1.0


def test_teachers_patches_lose_what_they_share_and_fit_the_models_grid():
    patches = jax.random.normal(jax.random.key(0), (2, 9, 4)) * 3 + 5
    found = np.asarray(objective.spatial(patches))
    np.testing.assert_allclose(found.mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(found.std(1), 1, atol=1e-4)
    constant = jnp.broadcast_to(jnp.arange(1.0, 5), (2, 9, 4))
    assert objective.align(jnp.broadcast_to(jnp.arange(1.0, 5), (2, 36, 4)), constant) < 1e-5


def test_codes_are_hidden_for_one_example_at_a_time():
    """A share of 1 hides all of an example, 0 leaves it; draws follow the place, not the batch."""

    def hide(position, **shares):
        config = recipe("generator", **{f"objective.{name}": x for name, x in shares.items()})
        codes = jnp.tile(position[:, None] % VALUES, LENGTH)
        section = build(generator.Section, config.generator)
        batch = {"position": position, "codes": codes, "other": codes}
        found = objective.hide(section.model, section.objective, batch, jax.random.key(0))
        return np.asarray(found.codes)

    place, own = jnp.arange(32), np.arange(32)[:, None] % VALUES
    assert (hide(place, drop=1.0, drop_positions=0.0) == VALUES).all()
    assert (hide(place, drop=0.0, drop_positions=0.0) == own).all()
    some = {"drop": 0.5, "drop_positions": 0.8, "foreign": 0.0}
    found = hide(place, **some)
    assert 0.3 < (found == VALUES).mean() < 0.9
    np.testing.assert_array_equal(hide(place[16:], **some), found[16:])


def test_the_average_warms_up():
    decay = stage("generator").ema_decay
    found = [decay(step) for step in (0, 10, 10**6)]
    np.testing.assert_allclose(found, [1 / 10, 11 / 20, 0.998], rtol=1e-6)


def test_batches_are_of_the_split_in_the_order_of_the_seed_with_their_codes(stores):  # noqa: F811
    def batch(split, seed):
        found = next(stage("generator", stores, seed=seed).batches(split))
        return found["image"], found["codes"] @ 5 ** np.arange(LENGTH)

    images, numbers = batch("train", 0)
    np.testing.assert_array_equal(images, batch("train", 0)[0])
    assert (images != batch("train", 1)[0]).any()
    for split, down in SPLITS.items():
        images, numbers = batch(split, 0)
        source = sources.source(split=split, **recipe("generator").data)
        records = np.abs(down * (5**LENGTH - 1) - numbers)
        expected = [source[int(row)]["image"] for row in records]
        np.testing.assert_array_equal(images, expected)


def test_the_grid_draws_unseen_images_by_the_average(stores, tmp_path, monkeypatch):  # noqa: F811
    made, calls = stage("generator", stores), []

    def decode(self, codes, **more):
        calls.append((self.batch, codes, more))
        return np.zeros((len(codes), 16, 16, 3), np.uint8)

    monkeypatch.setattr(GeneratorNetwork, "decode", decode)
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    (grid,) = made.evals
    state = types.SimpleNamespace(params="now", ema="average", step=7)
    found = grid.run(state, {}, mesh, tmp_path)
    ((batch, codes, more),) = calls
    sampler = Sampler(steps=4, method="heun", guidance=Guidance(scale=1.5))
    assert (grid.every, batch, len(codes)) == (12, 8, 8)
    assert more == {"params": "average", "seed": 0, "count": 8, "sampler": sampler}
    np.testing.assert_array_equal(codes[0], np.full(LENGTH, 4))  # validation counts down
    assert found["samples"].ndim == 3 and (tmp_path / "pictures" / "step_7.png").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.image": 8}, "generator.model.image=8, but images of 16 pixels"),
        ({"normalize": True}, "normalize=True is for latents"),
        ({"codes": ""}, "without codes, positions and embedding are 0"),
        ({"codes": "", "latents": True}, "latents are in the store of a codes step"),
        ({"objective.route": 0.5}, "objective.route=0.5 does not go with"),
        ({"model.align": 1}, "objective.align=0.0 does not go with"),
        ({"model.out_channels": 6}, "model.out_channels=6, but this process asks for 3"),
        ({"process.name": "ddpm", "grid.sampler.churn": 5.0}, "churn needs a process of cont"),
        ({"process.name": "ddpm", "grid.sampler.steps": 2000}, "2000 steps"),
        ({"grid.sampler.guidance.base": "internal"}, "grid.sampler.guidance.base=internal needs"),
        ({"objective.drop": 0.0}, "objective.drop=0 does not train"),
        ({"objective.drop": 1.5}, "objective.drop=1.5 is a share"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_anything_is_trained(changes, words):
    with pytest.raises(UserError, match=words):
        stage("generator", **changes)


def test_a_base_that_is_nowhere_is_told_before_training(stores):  # noqa: F811
    made = stage("generator", stores, **{"grid.sampler.guidance.base": "/nowhere@3"})
    with pytest.raises(UserError, match="grid.sampler.guidance.base=/nowhere@3: there is no such"):
        made.reads()


def test_labels_must_be_those_of_the_data(stores):  # noqa: F811
    made = stage("generator", stores, **{"model.classes": 3})
    with pytest.raises(UserError, match="model.classes=3, but the data is not in classes"):
        made.reads()


@pytest.mark.parametrize("process", ["linear", "ddpm"])
def test_a_checkpoint_of_before_there_were_processes_is_of_the_linear_path(process):
    """It goes on under that one alone, and a field that is new since has its default."""
    made = stage("generator", **{"process.name": process})
    saved = {name: dict(value) for name, value in made.identity.items() if name == "model"}
    before = {**made.identity, **saved}
    for name in ("process", "normalize"):
        del before[name]
    del before["model"]["route"]
    found = made.former(before)
    assert found["model"] == made.identity["model"] and found["normalize"] is False
    assert (found == made.identity) == (process == "linear")
    assert found["process"]["name"] == "linear"
    assert made.former(made.identity) == made.identity
