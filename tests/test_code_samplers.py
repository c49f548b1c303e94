"""The samplers of codes: against an enumerated joint distribution, and step by step."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumerated import CODES, LENGTH, VALUES, conditionals, joint, lookup, variation

from dlc_jax.diffusion import chain, code_sampler
from dlc_jax.diffusion.code_sampler import CodeSampler
from dlc_jax.diffusion.masked import Masked
from dlc_jax.diffusion.noise import Noise
from dlc_jax.diffusion.uniform import Uniform
from dlc_jax.errors import UserError

P = joint(floor=0.1)
EXACT = lookup(conditionals(P))
GOOD = "first_hitting ancestral euler maskgit low_confidence entropy".split()
AGAIN = "remdm_cap remdm_loop remask".split()


def draws(sampler, count=20_000, *, predict=EXACT, process=Masked(), seed=3, **given):  # noqa: B008
    """(codes, calls) by the exact network."""
    keys = jax.random.split(jax.random.key(seed), count)

    @jax.jit
    def draw(keys, given):
        return sampler.draw(process, predict, keys, LENGTH, VALUES, **given)

    codes, calls = draw(keys, given)
    return np.asarray(codes), np.asarray(calls)


@functools.cache
def noise_of(count):
    """Total variation of `count` true draws, its mean and deviation."""
    rng = np.random.default_rng(0)
    found = [variation(CODES[rng.choice(len(P), count, p=P)], P) for _ in range(50)]
    return np.mean(found), np.std(found)


def is_exact(codes, p=P):
    mean, deviation = noise_of(len(codes))
    return variation(codes, p) < mean + 4 * deviation


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampler",
    [CodeSampler(), CodeSampler(method="ancestral", calls=1024)],
    ids=lambda sampler: sampler.method,
)
def test_a_million_draws_of_the_joint_distribution(sampler):
    codes, calls = draws(sampler, 1_000_000)
    assert is_exact(codes) and variation(codes, P) < 0.01
    assert calls.max() == LENGTH  # of 1024 steps only those that reveal something


def test_few_calls_draw_positions_of_a_call_by_themselves():
    one, calls = draws(CodeSampler(calls=1))
    marginals = np.exp(conditionals(P)[(VALUES,) * LENGTH])
    independent = np.prod([marginals[i, CODES[:, i]] for i in range(LENGTH)], axis=0)
    assert is_exact(one, independent) and not is_exact(one)
    assert (calls == 1).all()
    exact = draws(CodeSampler())[0]
    assert is_exact(exact)
    for method in ("first_hitting", "maskgit", "low_confidence", "entropy"):  # more do nothing
        least, more = (CodeSampler(method=method, calls=calls) for calls in (LENGTH, 50))
        np.testing.assert_array_equal(draws(least, 500)[0], draws(more, 500)[0])


def test_ancestral_nears_the_joint_with_steps():
    found = [
        variation(draws(CodeSampler(method="ancestral", calls=calls))[0], P) for calls in (2, 8, 64)
    ]
    assert found[0] > 2 * found[1] > 3 * found[2]


@pytest.mark.parametrize("schedule", ["cosine", "polynomial"])
def test_steps_follow_the_schedule(schedule):
    """After half of the steps as much is visible as the schedule says; Euler differs from it."""
    process = Masked(noise=Noise(schedule=schedule))
    share = {}
    for method in ("ancestral", "euler"):
        states = watched(CodeSampler(method=method, calls=4), length=64, values=4, process=process)
        levels = np.array([float(told[0]) for _, told in states])
        share[method] = levels
    t = np.array([1, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(share["ancestral"], process.noise.hidden(t, np), rtol=1e-5)


def watched(sampler, *, length, values, b=3, known=None, process=Masked()):  # noqa: B008
    """What each call of the network saw, (noisy, share of noise), and at last the codes."""
    seen = []

    def predict(noisy, share):
        note = lambda *x: seen.append(tuple(np.asarray(each) for each in x))  # noqa: E731
        jax.debug.callback(note, noisy, share, ordered=True)
        return jnp.zeros(noisy.shape + (values,))

    keys = jax.random.split(jax.random.key(4), b)
    prompt = None if known is None else jnp.full((b, length), 1, jnp.int32)
    draw = functools.partial(sampler.draw, prompt=prompt, known=known)
    out = jax.jit(lambda keys: draw(process, predict, keys, length, values))(keys)
    jax.effects_barrier()
    watched.drawn = out
    return seen


@pytest.mark.parametrize("calls", [1, 3, 5, 7])
def test_every_call_reveals_its_share_and_changes_nothing_else(calls):
    seen = watched(CodeSampler(calls=calls), length=7, values=4)
    states = [noisy for noisy, _ in seen] + [np.asarray(watched.drawn.codes)]
    assert len(states) == calls + 1
    assert (states[0] == 4).all() and (states[-1] < 4).all()
    left = [7 - index * 7 // calls for index in range(calls + 1)]
    np.testing.assert_array_equal(
        [(state == 4).sum(1) for state in states], np.outer(left, [1] * 3)
    )
    for before, after in itertools.pairwise(states):
        np.testing.assert_array_equal(after[before < 4], before[before < 4])
    told = np.array([share for _, share in seen])
    assert (np.diff(told, axis=0) < 0).all() and (0 < told).all() and (told <= 1).all()


@pytest.mark.parametrize("method", GOOD + AGAIN)
def test_known_positions_stay_and_no_mask_is_left(method):
    known = np.array([[True] * 7, [True, False] * 3 + [True], [False] * 7])
    sampler = CodeSampler(method=method, calls=5, eta=0.5)
    seen = watched(sampler, length=7, values=4, known=jnp.asarray(known))
    codes, calls = (np.asarray(each) for each in watched.drawn)
    for state in [noisy for noisy, _ in seen] + [codes]:
        assert (state[known] == 1).all()
    assert (0 <= codes).all() and (codes < 4).all()
    assert calls[0] == 0 and 0 < calls[1] <= 5 and 0 < calls[2] <= 5
    if method in GOOD:
        assert calls[1] <= 3  # as there are only three positions


@pytest.mark.parametrize("method", ["first_hitting", "ancestral"])
def test_kept_positions_give_the_exact_conditionals(method):
    """Position 1 is known: the others are drawn from the joint, given its value."""
    sampler, count = CodeSampler(method=method, calls=0 if method[0] == "f" else 512), 60_000
    prompt = np.full((count, LENGTH), 2, np.int32)
    known = np.broadcast_to(np.arange(LENGTH) == 1, prompt.shape)
    codes, _ = draws(sampler, count, prompt=jnp.asarray(prompt), known=jnp.asarray(known))
    p = np.where(CODES[:, 1] == 2, P, 0)
    assert (codes[:, 1] == 2).all() and is_exact(codes, p / p.sum())


@pytest.mark.parametrize("method", GOOD + AGAIN)
def test_a_draw_depends_on_its_key_alone(method):
    sampler = CodeSampler(method=method, calls=2)
    keys = jax.random.split(jax.random.key(6), 9)
    draw = jax.jit(lambda keys: sampler.draw(Masked(), EXACT, keys, LENGTH, VALUES))
    whole = draw(keys)
    parts = [draw(keys[i : i + 3]) for i in range(0, 9, 3)]
    for name in ("codes", "calls"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(getattr(whole, name), joined)
    assert len(np.unique(whole.codes, axis=0)) > 1


@pytest.mark.parametrize("method", GOOD + AGAIN)
def test_the_network_is_told_what_share_of_the_whole_code_is_noise(method):
    """Also where a half of it is known, as in training at that time."""
    length = 400
    known = jnp.asarray(np.arange(length) % 2 == 0)[None]
    sampler = CodeSampler(method=method, calls=6)
    for noisy, told in watched(sampler, length=length, values=4, b=1, known=known):
        assert told[0] == pytest.approx((noisy == 4).mean(), abs=0.06)


def test_orders_differ_between_examples():
    seen = watched(CodeSampler(), length=7, values=4, b=30)
    assert len({tuple(row < 4) for row in seen[1][0]}) == 7


def test_a_score_whose_mass_is_one_is_ancestral():
    """SEDD's analytic sampler with a normalized head: in distribution, step by step."""
    process = Masked(objective="score")
    predict = lambda *x: EXACT(*x) + math.log(VALUES)  # noqa: E731
    sampler = CodeSampler(method="ancestral", calls=3)
    scores, calls = draws(sampler, 60_000, predict=predict, process=process)
    plain = draws(sampler, 60_000)[0]
    mean, deviation = noise_of(60_000)
    counts = np.unique(plain, axis=0, return_counts=True)
    p = np.zeros(len(CODES))
    p[np.ravel_multi_index(counts[0].T, (VALUES,) * LENGTH)] = counts[1] / len(plain)
    assert variation(scores, p) < 2 * (mean + 4 * deviation)
    assert not is_exact(scores)
    assert calls.mean() > 2  # the network says how many positions a step reveals


@pytest.mark.parametrize("method", ["ancestral", "euler", "remdm_cap", "remask"])
def test_the_mass_of_a_score_hurries_or_waits(method):
    """Twice the mass reveals twice as many positions in a step; the last step reveals the rest."""
    sampler = CodeSampler(method=method, calls=8)
    keys = jax.random.split(jax.random.key(0), 500)

    def second(factor):
        """Share that is visible after the first step."""
        states = []

        def predict(noisy, _):
            jax.debug.callback(lambda x: states.append(np.asarray(x)), noisy, ordered=True)
            return jnp.full((*noisy.shape, 4), jnp.log(factor))

        process = Masked(objective="score")
        codes, _ = jax.jit(lambda keys: sampler.draw(process, predict, keys, 8, 4))(keys)
        jax.effects_barrier()
        assert (codes < 4).all()
        return (states[1] < 4).mean()

    seen = {factor: second(factor) for factor in (1.0, 2.0, 0.0)}
    assert seen[1.0] == pytest.approx(1 / 8, abs=0.02)
    assert seen[2.0] == pytest.approx(2 / 8, abs=0.03)
    assert seen[0.0] == 0


@pytest.mark.parametrize("method", AGAIN)
def test_hiding_again_nears_the_joint_with_steps(method):
    found = [
        variation(draws(CodeSampler(method=method, calls=calls), 10_000)[0], P) for calls in (4, 64)
    ]
    mean, _ = noise_of(10_000)
    assert found[0] > 1.5 * found[1] and found[1] < mean + 0.02


def test_hiding_too_much_again_fails():
    """Exact is only what changes little in a step."""
    how = {"remdm_cap": (0.99, 2.5), "remask": (0.5, 8)}
    for method, (eta, times) in how.items():
        own, much = (
            variation(draws(CodeSampler(method=method, calls=32, eta=each), 10_000)[0], P)
            for each in (0.002, eta)
        )
        assert much > times * own


@pytest.mark.parametrize("method", AGAIN)
def test_chances_of_hiding_again(method, monkeypatch):
    """A share eta of what is visible is hidden again within the window alone."""
    eta, calls = 0.2, 20
    states = watched(CodeSampler(method=method, calls=calls, eta=eta), length=4000, values=4, b=1)
    states = [noisy[0] == 4 for noisy, _ in states]
    again = [
        (after & ~before).sum() / max(1, (~before).sum())
        for before, after in itertools.pairwise(states)
    ]
    t = 1 - np.arange(calls - 1) / calls
    wanted = {
        "remdm_cap": np.minimum(eta, (t - 1 / calls) / np.maximum(1 - t, 1e-9)),
        "remdm_loop": np.where((t <= 0.55 + 1e-9) & (t > 0.05 + 1e-9), 0.1 / 0.9, 0),
        "remask": np.where((t < 0.55 - 1e-9) & (t > 0.3 + 1e-9), eta, 0),
    }[method]
    np.testing.assert_allclose(again[3:], np.minimum(wanted, eta)[3:], atol=0.03)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial"])
@pytest.mark.parametrize("method", AGAIN)
def test_hiding_again_keeps_the_share_of_the_schedule(method, schedule):
    """Hiding again and revealing more balance: q(hidden at t) stays that of the process."""
    process, sampler = Masked(noise=Noise(schedule=schedule)), CodeSampler(method=method, calls=20)
    sampler = dataclasses.replace(sampler, eta=0.03)
    seen = watched(sampler, length=4000, values=4, b=1, process=process)
    for noisy, told in seen:
        assert (noisy == 4).mean() == pytest.approx(told[0], abs=0.03)


def test_the_papers_remasking_is_a_joint_draw_with_eta_moved():
    """Against the released rule, written over values and the mask together."""
    from dlc_jax.diffusion import remask

    rng, eta = np.random.default_rng(0), 0.05
    p = rng.dirichlet(np.ones(5), (1, 200))
    for chance in (0.1, 0.9):
        whole = np.concatenate([chance * p, np.full((1, 200, 1), 1 - chance)], -1)
        best = whole.argmax(-1)
        np.put_along_axis(
            whole,
            best[..., None],
            np.take_along_axis(whole, best[..., None], -1)
            - np.where(best < 5, eta * chance, 0)[..., None],
            -1,
        )
        whole[..., 5] += eta * chance
        whole = np.maximum(whole, 0) / np.maximum(whole, 0).sum(-1, keepdims=True)
        log_p, shown = remask._lessened(jnp.log(p), jnp.full((1, 200), chance), eta)
        positive = whole.min(-1) > 0
        np.testing.assert_allclose(shown[positive], 1 - whole[positive][:, 5], rtol=1e-4)
        values = np.exp(log_p)[positive] * np.asarray(shown)[positive][:, None]
        np.testing.assert_allclose(values, whole[positive][:, :5], rtol=1e-3, atol=1e-6)


def test_the_surest_come_first():
    """Low confidence keeps what was drawn where its chance is highest, as many in every call."""
    sure = np.array([0.4, 0.9, 0.5, 0.7, 0.3, 0.99, 0.6])
    rest = (1 - sure) / 3
    logits = jnp.log(jnp.asarray(np.stack([sure, rest, rest, rest], -1), jnp.float32))
    states = []

    def predict(noisy, _):
        jax.debug.callback(lambda x: states.append(np.asarray(x[0])), noisy, ordered=True)
        return jnp.broadcast_to(logits, (len(noisy), 7, 4))

    keys = jax.random.split(jax.random.key(0), 1)
    sampler = CodeSampler(method="low_confidence", calls=3, temperature=0.0)
    out = jax.jit(lambda keys: sampler.draw(Masked(), predict, keys, 7, 4))(keys)
    jax.effects_barrier()
    order = np.argsort(-sure)
    assert [sorted(np.flatnonzero(state < 4)) for state in states] == [
        [],
        sorted(order[:3]),
        sorted(order[:5]),
    ]  # 7 positions in 3 calls: 3, 2, 2
    assert (out.codes == 0).all() and out.calls[0] == 3


def test_maskgit_keeps_a_cosine_hidden():
    seen = watched(CodeSampler(method="maskgit", calls=4), length=16, values=4)
    left = np.array([(noisy == 4).sum(1) for noisy, _ in seen])
    wanted = [16] + [math.floor(16 * math.cos(math.pi / 2 * i / 4)) for i in (1, 2, 3)]
    np.testing.assert_array_equal(left, np.outer(wanted, [1] * 3))


def test_sure_codes_need_few_calls():
    """Entropy: what is certain is drawn at once; what is not, one position a call."""
    certain = jnp.array([100.0, 0, 0, 0])

    def predict(noisy, _):
        sure = jnp.arange(8) < jnp.where(noisy[:, :1] >= 0, jnp.arange(len(noisy))[:, None] * 4, 0)
        return jnp.where(sure[..., None], certain, jnp.zeros(4))

    keys = jax.random.split(jax.random.key(0), 3)
    draw = jax.jit(
        lambda keys, sampler: sampler.draw(Masked(), predict, keys, 8, 4), static_argnums=1
    )
    assert draw(keys, CodeSampler(method="entropy")).calls.tolist() == [8, 4, 1]
    assert draw(keys, CodeSampler(method="entropy", calls=2)).calls.tolist() == [2, 2, 1]
    bound = 1.5 * math.log(4)  # the entropies before a position: two of log 4 are too many
    many = CodeSampler(method="entropy", entropy_bound=bound)
    assert draw(keys, many).calls.tolist() == [4, 2, 1]


def test_temperature_and_nucleus():
    p = np.array([0.5, 0.3, 0.15, 0.05])
    log_p = jnp.log(jnp.asarray(p, jnp.float32))[None, None]
    sharp = lambda **how: np.exp(chain.sharpened(log_p, CodeSampler(**how)))[0, 0]  # noqa: E731
    np.testing.assert_allclose(sharp(temperature=2.0), np.sqrt(p) / np.sqrt(p).sum(), rtol=1e-5)
    np.testing.assert_allclose(sharp(nucleus=0.7), [0.625, 0.375, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(sharp(nucleus=0.85), p * [1, 1, 1, 0] / 0.95, rtol=1e-5)
    np.testing.assert_allclose(sharp(nucleus=0.01), [1, 0, 0, 0], rtol=1e-5)
    greedy = draws(CodeSampler(temperature=0.0), 50)[0]
    assert len(np.unique(greedy, axis=0)) <= 6  # one for each order


def test_noise_of_a_position_is_the_same_in_any_number_of_calls():
    even = lambda noisy, _: jnp.zeros((*noisy.shape, VALUES))  # noqa: E731
    one, many = (draws(CodeSampler(calls=calls), 50, predict=even)[0] for calls in (1, 3))
    np.testing.assert_array_equal(one, many)


def test_noise_has_the_high_range(monkeypatch):
    # In the common mode noise ends at 16, and a value of chance 1e-7 is drawn about half as often
    # as it should be. Seeing that would take a billion draws, hence a look at the call.
    asked = []
    real = jax.random.gumbel

    def gumbel(key, shape, *a, mode=None):
        asked.append((shape, mode))
        return real(key, shape, *a, mode=mode)

    monkeypatch.setattr(jax.random, "gumbel", gumbel)
    keys = jax.random.split(jax.random.key(9), 2)
    predict = lambda noisy, _: jnp.zeros((2, 6, 50))  # noqa: E731
    for method in GOOD + AGAIN:
        draw = functools.partial(CodeSampler(method=method, calls=3).draw, Masked(), predict)
        jax.make_jaxpr(lambda keys, draw=draw: draw(keys, 6, 50))(keys)
    assert set(asked) == {((50,), "high")}


@pytest.mark.slow
def test_rare_values_are_not_lost_to_rounding():
    """V=4096 and 512 steps: values of chance 1e-5 come as often as they should.

    `benchmarks/exact_codes.py --rare` shows the common joint draw beside it, which loses most.
    """
    values, length, rare = 4096, 16, 4000
    p = np.full(values, 1e-5)
    p[rare:] = (1 - rare * 1e-5) / (values - rare)
    log_p = jnp.log(jnp.asarray(p, jnp.float32))
    even = lambda noisy, _: jnp.broadcast_to(log_p, (*noisy.shape, values))  # noqa: E731
    sampler = CodeSampler(method="ancestral", calls=512)
    keys = jax.random.split(jax.random.key(0), 160)
    draw = jax.jit(lambda keys: sampler.draw(Masked(), even, keys, length, values).codes)
    codes = np.concatenate([draw(keys[i : i + 40]) for i in range(0, 160, 40)])
    chance = rare * 1e-5
    error = math.sqrt(chance * (1 - chance) / codes.size)
    assert abs((codes < rare).mean() - chance) < 3 * error


@pytest.mark.parametrize("method", ["ancestral", "euler"])
def test_uniform_diffusion_draws_the_joint_distribution(method):
    """With the exact scores of the process, from random values; more steps are nearer."""
    process = Uniform(noise=Noise(schedule="geometric", smallest=1e-3, largest=10.0))
    codes = jnp.asarray(CODES)

    def predict(noisy, share):
        # log p_t of every code that differs from noisy at one position
        def log_p(code):
            same = (code[:, None, :] == codes[None]).sum(-1)
            keep, other = 1 - share + share / VALUES, share / VALUES
            each = same * jnp.log(keep)[:, None] + (LENGTH - same) * jnp.log(other)[:, None]
            return jax.nn.logsumexp(each + jnp.log(jnp.asarray(P)), axis=1)

        own = log_p(noisy)
        put = lambda i, v: log_p(noisy.at[:, i].set(v)) - own  # noqa: E731
        rows = [jnp.stack([put(i, v) for v in range(VALUES)], -1) for i in range(LENGTH)]
        return jnp.stack(rows, 1)

    how = {"process": process, "predict": predict}
    found = [
        variation(draws(CodeSampler(method=method, calls=calls), **how)[0], P) for calls in (4, 128)
    ]
    mean, _ = noise_of(20_000)
    assert found[0] > 2 * found[1] and found[1] < mean + 0.03


def test_methods_of_a_process():
    with pytest.raises(UserError, match="'maskgit' cannot follow process.name='uniform'; those"):
        CodeSampler(method="maskgit").resolved(Uniform(), 8)
    with pytest.raises(UserError, match="code_sampler.temperature=0.5 is not of uniform processes"):
        CodeSampler(method="ancestral", temperature=0.5).resolved(Uniform(), 8)
    for process in (Masked(), Uniform()):
        for calls in (0, 1, 4, 16, 64, 256):
            found = CodeSampler(method="auto", calls=calls).resolved(process, 32)
            assert found.method in code_sampler.METHODS[type(process)]
    auto = {calls: CodeSampler(method="auto", calls=calls) for calls in (0, 8, 32, 64, 128)}
    chosen = [sampler.resolved(Masked(), 32).method for sampler in auto.values()]
    assert chosen == ["first_hitting", "maskgit", *2 * ["first_hitting"], "remdm_cap"]


def test_the_most_calls():
    score, plain = Masked(objective="score"), Masked()
    ancestral = CodeSampler(method="ancestral", calls=100)
    assert CodeSampler().steps(plain, 32) == 32
    assert ancestral.steps(plain, 32) == 32 and ancestral.steps(score, 32) == 100
    assert CodeSampler(method="remdm_cap", calls=100).steps(plain, 32) == 100
    assert ancestral.steps(Uniform(), 32) == 100


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"calls": -1}, "code_sampler.calls=-1 must be at least 0"),
        ({"temperature": -0.5}, "code_sampler.temperature=-0.5 must be a number from 0 up"),
        ({"nucleus": 0.0}, "code_sampler.nucleus=0.0 must be above 0 and at most 1"),
        ({"eta": 1.0}, "code_sampler.eta=1.0 must be from 0 to below 1"),
        ({"kept": 1.0}, "code_sampler.kept=1.0 must be between 0 and 1"),
        ({"window": (0.5, 0.2)}, r"code_sampler.window=\(0.5, 0.2\) must be two rising times in"),
        (
            {"method": "magic"},
            "code_sampler.method='magic' is unknown; known: first_hitting, ancestral",
        ),
        ({"times": "late"}, "code_sampler.times='late' is unknown; known: uniform, cosine"),
    ],
)
def test_a_code_sampler_checks_itself(fields, words):
    with pytest.raises(UserError, match=words):
        CodeSampler(**fields)


def test_prompt_and_known_go_together():
    keys = jax.random.split(jax.random.key(0), 2)
    with pytest.raises(ValueError, match="together"):
        CodeSampler().draw(Masked(), EXACT, keys, 3, 3, known=jnp.ones((2, 3), bool))
