"""Samplers on every process, against flows, marginals and a mixture that are known."""

import dataclasses
import importlib.util
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlc_jax.diffusion import schedules
from dlc_jax.diffusion.ddpm import DDPM
from dlc_jax.diffusion.edm import EDM
from dlc_jax.diffusion.guidance import Guidance
from dlc_jax.diffusion.linear import FLOOR, Linear
from dlc_jax.diffusion.process import Prediction, per_example
from dlc_jax.diffusion.sample import METHODS, Method, Sampler
from dlc_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
LINEAR, MEAN, DEVIATION = Linear(), 0.5, 0.4
ALL = {"linear": LINEAR, "ddpm": DDPM(), "edm": EDM()}
every = pytest.mark.parametrize("name", ALL)


def keys_of(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def velocity(function):
    """The prediction of a network on the linear path that gives `function`(x, t)."""
    return lambda x, t: LINEAR.predict(function(x, t), x, t)


def gaussian(process):
    """The exact prediction for data N(MEAN, DEVIATION^2)."""

    def predict(x, t):
        alpha, sigma = (per_example(each, x) for each in process.path(t))
        pull = (x - alpha * MEAN) / (alpha**2 * DEVIATION**2 + sigma**2)
        return Prediction(MEAN + alpha * DEVIATION**2 * pull, sigma * pull)

    return predict


CASES = [(name, method, 4) for name in ALL for method in METHODS] + [("linear", "heun", 1)]
cases = pytest.mark.parametrize(("name", "method", "steps"), CASES)


@cases
def test_a_network_that_knows_the_data_ends_there(name, method, steps):
    process, target = ALL[name], jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), float)

    def predict(x, t):
        alpha, sigma = (per_example(each, x) for each in process.path(t))
        return Prediction(target, (x - alpha * target) / sigma)

    out = Sampler(method=method, steps=steps).draw(process, predict, keys_of(3), (4,))
    np.testing.assert_allclose(out, target, atol=2e-5)


def error(process, method, steps, times):
    """Of the flow that carries N(alpha MEAN, ...) at t=1 to the data, the largest of 64 draws."""
    alpha, sigma = process.path(jnp.float32(1))
    keys = keys_of(64)
    start = sigma * jax.vmap(lambda key: jax.random.normal(key, (4,)))(keys)
    scale = DEVIATION / math.sqrt(alpha**2 * DEVIATION**2 + sigma**2)
    expected = MEAN + scale * (start - alpha * MEAN)
    sampler = Sampler(method=method, steps=steps, times=times)
    return float(jnp.abs(sampler.draw(process, gaussian(process), keys, (4,)) - expected).max())


@pytest.mark.parametrize(
    ("process", "times"),
    [(LINEAR, "uniform"), (LINEAR, "cosine"), (Linear(shift=3.0), "uniform"), (EDM(), "uniform")],
    ids=["linear", "cosine", "shifted", "edm"],
)
@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_orders_of_the_integrators(process, times, method, order):
    coarse, fine = (error(process, method, steps, times) for steps in (40, 80))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@every
def test_ddim_without_noise_is_euler(name):
    draw = [Sampler(method=method, steps=9).draw for method in ("euler", "ddim")]
    found = [each(ALL[name], gaussian(ALL[name]), keys_of(20), (3,)) for each in draw]
    np.testing.assert_allclose(*found, atol=2e-5)


@every
def test_ddim_with_all_noise_is_ancestral(name):
    draw = [Sampler(method="ancestral", steps=9).draw]
    draw += [Sampler(method="ddim", steps=9, eta=1.0).draw]
    found = [each(ALL[name], gaussian(ALL[name]), keys_of(20), (3,)) for each in draw]
    np.testing.assert_allclose(*found, atol=5e-5)


def test_the_learned_variance_is_that_of_the_draw():
    process, grid = DDPM(), DDPM().grid("uniform", 4, 1)
    (alpha, sigma), (alpha_s, sigma_s) = process.path(grid[1]), process.path(grid[2])
    upper = 1 - (alpha / alpha_s) ** 2
    lower = upper * (sigma_s / sigma) ** 2
    keys, x = keys_of(4000), jnp.zeros((4000, 5))
    for mix in (0.0, 0.5, 1.0):
        known = Prediction(x, x, jnp.full_like(x, mix))
        out = METHODS["ancestral"].step(
            process, lambda x, t, known=known: known, x, grid[1], grid[2], keys
        )
        expected = upper**mix * lower ** (1 - mix)
        assert np.var(out) == pytest.approx(expected, rel=4 * np.sqrt(2 / out.size))


# Drawn at commit 16194b4 with the velocity below, in five uniform steps.
FROZEN = {
    "euler": [
        [0.6663743257522583, 0.4067639708518982, -0.6517658829689026],
        [0.6422746181488037, 0.6662539839744568, -0.5706260204315186],
    ],
    "heun": [
        [0.7034420967102051, 0.4460277259349823, -0.6615322828292847],
        [0.6502337455749512, 0.695356011390686, -0.5859670639038086],
    ],
}


@pytest.mark.parametrize("method", FROZEN)
def test_numbers_stay_those_of_earlier_versions(method):
    field = velocity(lambda x, t: x * (1 + t)[:, None] - jnp.sin(3 * x))
    out = Sampler(method=method, steps=5).draw(LINEAR, field, keys_of(2, seed=7), (3,))
    np.testing.assert_allclose(out, FROZEN[method], rtol=1e-6)


@cases
def test_calls_counts_the_evaluations_and_none_is_at_the_data(name, method, steps):
    asked = []

    def predict(x, t):
        asked.append(float(t[0]))
        return Prediction(x, x)

    sampler = Sampler(method=method, steps=steps)
    with jax.disable_jit():  # the loop runs as Python's, so that each call is seen
        sampler.draw(ALL[name], predict, keys_of(1), (1,))
    assert len(asked) == sampler.calls and min(asked) > 0 and asked[0] == 1
    if name == "linear" and method == "heun" and steps > 1:
        assert asked[:3] == [1.0, 0.75, 0.75]


@pytest.mark.parametrize(("method", "kind"), [*((each, "x") for each in METHODS), ("heun", "v")])
def test_nothing_is_nan_at_pure_noise_or_in_small_steps(method, kind):
    process = Linear(prediction=kind)
    churn = 0.0 if method == "ancestral" else 40.0
    sampler = Sampler(method=method, steps=40, churn=churn)
    predict = lambda x, t: process.predict(x * t[:, None], x, t)  # noqa: E731
    assert jnp.isfinite(sampler.draw(process, predict, keys_of(5), (3,))).all()
    x = jnp.ones((1, 2))
    for t in (0.0, 1.0):
        assert all(jnp.isfinite(each).all() for each in predict(x, jnp.array([t]))[:2])
    assert 0 < FLOOR <= 1e-3


def noisy(process, predict_fn, x, t, s, keys):
    """A stochastic method, for the tests: it adds noise of its own."""
    return x + jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys)


@pytest.mark.parametrize(
    ("method", "churn"), [*((method, 0.0) for method in [*METHODS, "noisy"]), ("heun", 0.5)]
)
def test_a_sample_depends_on_its_key_alone(method, churn, monkeypatch):
    monkeypatch.setitem(METHODS, "noisy", Method(noisy, calls=lambda steps: 0))
    eta = {"eta": 0.7} if method == "ddim" else {}
    draw = Sampler(method=method, steps=2, churn=churn, **eta).draw
    keys, field = keys_of(64, seed=1), velocity(lambda x, t: x * t[:, None])
    whole = draw(LINEAR, field, keys, (300,))
    np.testing.assert_array_equal(whole[32:48], draw(LINEAR, field, keys[32:48], (300,)))
    if method == "euler" and not churn:  # from N(0, 1), times 1 - 1/2 and then 1 - 1/4
        assert np.std(whole) == pytest.approx(0.375, rel=4 / np.sqrt(2 * whole.size))


def test_a_stochastic_method_gets_new_keys_for_every_step_and_example(monkeypatch):
    monkeypatch.setitem(METHODS, "noisy", Method(noisy, calls=lambda steps: 0))
    out = Sampler(method="noisy", steps=8).draw(LINEAR, noisy, keys_of(50, seed=2), (400,))
    # The start and eight steps are independent: variances add up. Equal keys anywhere would add
    # amplitudes instead.
    assert np.var(out) == pytest.approx(9, rel=4 * np.sqrt(2 / out.size))
    assert abs(np.corrcoef(out)[np.triu_indices(50, 1)]).max() < 5 / np.sqrt(400)


@pytest.mark.parametrize(
    ("name", "churn", "interval"), [("linear", 2.4, (0.0, 1.0)), ("edm", 200.0, (0.25, 0.75))]
)
def test_marginals_stay_right_under_churn(name, churn, interval):
    process, states = ALL[name], []
    exact = gaussian(process)

    def predict(x, t):
        jax.debug.callback(lambda x, t: states.append((float(t[0]), x)), x, t, ordered=True)
        return exact(x, t)

    keys, steps = keys_of(100, seed=3), 120
    sampler = Sampler(method="heun", steps=steps, churn=churn, churn_interval=interval)
    out = sampler.draw(process, predict, keys, (400,))
    jax.effects_barrier()
    for t, x in [*states, (0.0, out)]:
        alpha, sigma = (float(each) for each in process.path(jnp.float32(t)))
        variance = alpha**2 * DEVIATION**2 + sigma**2
        assert np.mean(x) == pytest.approx(alpha * MEAN, abs=5 * math.sqrt(variance / x.size))
        assert np.var(x) == pytest.approx(variance, rel=0.015 + 5 * math.sqrt(2 / x.size))
    grid = np.asarray(process.grid("uniform", steps, 400))[:-1]
    share = min(churn / steps, math.sqrt(2) - 1)
    inside = (grid >= interval[0]) & (grid <= interval[1])
    raised = np.where(inside, process.raised(jnp.asarray(grid), 1 + share), grid)
    asked = np.array([t for t, _ in states])
    np.testing.assert_allclose(asked[::2], raised, rtol=1e-5)  # the first of both calls of a step
    still = Sampler(steps=steps).draw(process, exact, keys, (400,))
    assert np.abs(out - still).mean() > 0.05


def test_churn_s_noise_is_scaled():
    field = velocity(lambda x, t: 0 * x)  # nothing but noise that is added
    start, plain, more = (
        Sampler(method="euler", steps=3, churn=churn, churn_noise=scale).draw(
            LINEAR, field, keys_of(3), (5,)
        )
        for churn, scale in [(0.0, 1.0), (1.0, 1.0), (1.0, 1.5)]
    )
    kept = Sampler(method="euler", steps=3, churn=1.0, churn_noise=0.0)
    kept = kept.draw(LINEAR, field, keys_of(3), (5,))
    np.testing.assert_allclose(more - kept, 1.5 * (plain - kept), atol=1e-5)
    assert jnp.abs(plain - start).min() > 1e-3


def test_a_process_in_steps_refuses_churn_and_too_many_steps():
    for fields, words in [({"churn": 1.0}, "churn"), ({"steps": 1001}, "1001 steps")]:
        with pytest.raises(UserError, match=words):
            Sampler(**fields).draw(DDPM(), gaussian(DDPM()), keys_of(2), (1,))


def test_a_sampler_is_a_value_and_checks_itself():
    assert Sampler() == Sampler(method="heun", steps=50, guidance=Guidance(scale=1.0))
    assert hash(Sampler(churn=0.5)) == hash(dataclasses.replace(Sampler(), churn=0.5))
    known = ", ".join(METHODS)
    for wrong, words in [
        ({"method": "rk4"}, f"sampler.method='rk4' is unknown; known: {known}"),
        ({"times": "log"}, f"sampler.times='log' is unknown; known: {', '.join(schedules.TIMES)}"),
        ({"steps": 0}, "sampler.steps=0 must be at least 1"),
        ({"churn": -0.1}, "sampler.churn=-0.1 must be"),
        ({"churn": math.nan}, "sampler.churn=nan must be"),
        ({"churn_noise": math.inf}, "sampler.churn_noise=inf must be"),
        ({"churn_interval": (0.5, 0.4)}, r"sampler.churn_interval=\(0.5, 0.4\) must rise"),
        ({"method": "ddim", "eta": 1.5}, "sampler.eta=1.5 must lie"),
        ({"method": "heun", "eta": 0.5}, "sampler.eta=0.5 has no meaning for method='heun'"),
    ]:
        with pytest.raises(UserError, match=words):
            Sampler(**wrong)


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MIXTURE = load("samplers")


def test_every_method_is_measured_on_every_process():
    measured = {(name.split()[0], method) for name, method, *_ in MIXTURE.CASES}
    assert measured == {(name, method) for name in ALL for method in METHODS}


@pytest.mark.slow
def test_a_mixture_is_drawn_as_it_is():
    """In a process of its own: the tests' compiler flags would make it six times slower."""
    script = ROOT / "benchmarks" / "samplers.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    assert len(rows) == 2 + len(MIXTURE.CASES)
    for *case, mean, covariance, shares, _ in rows[2:]:
        assert float(mean) <= 0.02, case
        assert float(covariance.rstrip("%")) <= 2, case
        assert float(shares) <= 0.01, case
