"""Operators of composition, beside a prior that knows the joint distribution of short codes."""

import itertools

import numpy as np
import pytest

from dlc_jax import recipe
from dlc_jax.composition import OPERATORS, best, groups
from dlc_jax.composition.mix import mix
from dlc_jax.composition.operators import Blocks, Chosen, Coin, Infill, Refine, Soft
from dlc_jax.data import transforms
from dlc_jax.errors import UserError

LENGTH, VALUES = 4, 3
GROUPS = {"form": (0, 1), "tint": (2, 3)}


class Joint:
    """Every code's probability; what a trained prior can do, exactly."""

    def __init__(self, seed=0):
        random = np.random.default_rng(seed)
        self.p = random.dirichlet(0.3 * np.ones(VALUES**LENGTH)).reshape((VALUES,) * LENGTH)
        self.all = np.array(list(itertools.product(range(VALUES), repeat=LENGTH)))

    def given(self, code, known):
        """The probabilities of `all` given what is known of a code."""
        fits = (self.all[:, known] == code[known]).all(1)
        p = np.where(fits, self.p.ravel(), 0)
        return p / p.sum()

    def sample(self, count, *, seed, first, prompt, known, purpose=1):
        assert prompt.shape == known.shape == (count, LENGTH) and len(first) == count
        random = [np.random.default_rng([seed, int(number), purpose, 9]) for number in first]
        return np.stack(
            [
                self.all[draw.choice(len(self.all), p=self.given(code, mask))]
                for draw, code, mask in zip(random, prompt, known, strict=True)
            ]
        )

    def surprise(self, codes, *, seed, first, calls):
        found = np.empty(codes.shape)
        for row, code in zip(found, codes, strict=True):
            for place in range(LENGTH):
                at = (*code[:place], slice(None), *code[place + 1 :])
                row[place] = -np.log2(self.p[tuple(code)] / self.p[at].sum())
        return found

    def redraw(self, codes, *, positions, keep, seed, first, calls):
        bits = np.where(keep, -np.inf, self.surprise(codes, seed=seed, first=first, calls=calls))
        known = (np.argsort(np.argsort(-bits, 1), 1) >= positions) | keep
        return self.sample(len(codes), seed=seed, first=first, prompt=codes, known=known, purpose=2)


PRIOR = Joint()
RANDOM = np.random.default_rng(1)
PARENTS = list(RANDOM.integers(0, VALUES, (2, 60, LENGTH)))
SIMPLICES = list(RANDOM.dirichlet(np.ones(VALUES), (2, 60, LENGTH)))
EVERY = {
    "coin": Coin(),
    "blocks": Blocks(),
    "sized": Blocks(size=3),
    "chosen": Chosen(groups=("form", "3")),
    "soft": Soft(),
    "infill": Infill(),
    "whole": Infill(share=0.5, whole=True),
    "named": Infill(groups=("0", "tint")),
    "refine": Refine(),
    "refine infill": Refine(start=Infill(), rounds=1, share=0.5),
}


def compose(operator, parents=None, prior=PRIOR, *, seed=3, **how):
    usual = SIMPLICES if isinstance(operator, Soft) else PARENTS
    how = {"groups": GROUPS} | how
    return operator(usual if parents is None else parents, prior, seed=seed, **how)


@pytest.mark.parametrize("name", EVERY)
def test_an_example_draws_by_its_number_and_the_seed_alone(name):
    operator = EVERY[name]
    parents = SIMPLICES if name == "soft" else PARENTS
    keep = np.zeros((60, LENGTH), bool)
    keep[::2, 1] = True
    whole = compose(operator, keep=keep, weights=(1, 2))
    assert whole.codes.dtype == np.int32 and whole.codes.shape == (60, LENGTH)
    some = np.array([41, 7, 8, 30])
    part = compose(
        operator, [parent[some] for parent in parents], position=some, keep=keep[some],
        weights=(1, 2),
    )  # fmt: skip
    np.testing.assert_array_equal(part.codes, whole.codes[some])
    np.testing.assert_array_equal(part.bits, whole.bits[some])
    assert (compose(operator, keep=keep, seed=4).codes != whole.codes).any()
    first = parents[0].argmax(-1) if name == "soft" else parents[0]
    np.testing.assert_array_equal(whole.codes[keep], first[keep])  # kept, whatever the operator


@pytest.mark.parametrize("name", EVERY)
def test_bits_are_the_mean_over_positions_given_the_others(name):
    codes, bits = compose(EVERY[name])
    expected = np.zeros(60)
    for place in range(LENGTH):
        others = np.delete(np.arange(LENGTH), place)
        for row, code in enumerate(codes):
            p = PRIOR.given(code, others)[(PRIOR.all == code).all(1)].item()
            expected[row] -= np.log2(p) / LENGTH
    np.testing.assert_allclose(bits, expected)
    if not EVERY[name].needs_prior:
        assert compose(EVERY[name], prior=None).bits is None
        np.testing.assert_array_equal(compose(EVERY[name], prior=None).codes, codes)


def test_masks_are_by_the_number_alone():
    told = []

    class Told(Joint):
        def surprise(self, codes, *, seed, first, calls):
            told.append((seed, first.tolist()))
            return super().surprise(codes, seed=seed, first=first, calls=calls)

    numbers = np.arange(60) + 5
    best(Coin(), PARENTS, Told(), n=3, seed=9, position=numbers)
    assert told == 3 * [(0, numbers.tolist())]


def test_coin_is_the_paper_s_and_blocks_of_one_are_it():
    expected = mix(PARENTS, seed=3, weights=(1, 3), keep=(2,))
    for operator in (Coin(), Blocks(size=1), Soft()):
        parents = [np.eye(VALUES)[parent] for parent in PARENTS]
        parents = parents if isinstance(operator, Soft) else PARENTS
        found = compose(operator, parents, weights=(1, 3), keep=(2,))
        np.testing.assert_array_equal(found.codes, expected)


def test_blocks_come_whole_from_parents_in_the_weights_proportion():
    parents = [np.full((2000, 7), number) for number in (0, 1)]
    sized = compose(Blocks(size=3), parents, None, weights=(1, 3)).codes
    assert (sized[:, :3] == sized[:, :1]).all() and (sized[:, 3:6] == sized[:, 3:4]).all()
    np.testing.assert_allclose(sized.mean(0), 0.75, atol=0.05)  # standard error 0.01
    np.testing.assert_allclose(np.corrcoef(sized[:, [0, 3, 6]].T), np.eye(3), atol=0.1)
    apart = {"x": (0, 4), "y": (1, 4, 6)}  # 4 is x's; 2, 3 and 5 are by themselves
    found = compose(Blocks(), parents, None, groups=apart).codes
    same = np.corrcoef(found.T) > 0.5
    assert {(i, j) for i, j in zip(*np.nonzero(same)) if i < j} == {(0, 4), (1, 6)}


def test_chosen_positions_are_their_parents():
    a, b = np.zeros((50, 6), int), np.ones((50, 6), int)
    where = {"form": (0, 1), "tint": (2, 3)}
    found = compose(Chosen(groups=("form+5", "tint")), [a, b], None, groups=where).codes
    np.testing.assert_array_equal(found[:, [0, 1, 5, 2, 3]], np.tile([0, 0, 0, 1, 1], (50, 1)))
    assert 0.2 < found[:, 4].mean() < 0.8
    held = compose(Chosen(groups=("", "tint")), [a, b], None, groups=where, keep=(2,)).codes
    np.testing.assert_array_equal(held[:, 2:4], np.tile([0, 1], (50, 1)))


def test_infill_follows_the_exact_conditional():
    count = 6000
    parents = [np.tile(code, (count, 1)) for code in ([0, 1, 2, 0], [2, 0, 1, 1])]
    codes = compose(Infill(groups=("0", "3")), parents, groups={}).codes
    expected = PRIOR.given(np.array([0, 0, 0, 1]), np.array([True, False, False, True]))
    found = (codes[:, None] == PRIOR.all).all(-1).mean(0)
    np.testing.assert_allclose(found, expected, atol=0.03)  # standard error at most 0.0065
    assert expected.max() < 0.9


def test_infill_keeps_a_share_of_each_parent_by_lot():
    class Marks:
        def sample(self, count, *, seed, first, prompt, known):
            return np.where(known, prompt, 9)

        def surprise(self, codes, **_):
            return np.zeros(codes.shape)

    def owners(operator, parents=2, length=12, **how):
        given = [np.full((300, length), number) for number in range(parents)]
        return compose(operator, given, Marks(), **how).codes

    def counts(found, whose):
        return set((found == whose).sum(1).tolist())

    found = owners(Infill(share=0.25))
    assert [counts(found, whose) for whose in (0, 1, 9)] == [{3}, {3}, {6}]
    np.testing.assert_allclose((found == 1).mean(0), 0.25, atol=0.1)
    found = owners(Infill(share=0.25), weights=(2, 1))
    assert [counts(found, whose) for whose in (0, 1, 9)] == [{4}, {2}, {6}]
    assert counts(owners(Infill(share=1.0), parents=1), 0) == {12}
    assert counts(owners(Infill(share=0.0)), 9) == {12}
    thirds = {"x": range(4), "y": range(4, 8), "z": range(8, 12)}
    found = owners(Infill(share=1 / 3, whole=True), groups=thirds).reshape(-1, 3, 4)
    assert (found == found[..., :1]).all()
    assert [sorted(row) for row in found[..., 0].tolist()] == [[0, 1, 9]] * 300


def test_refine_draws_the_least_likely_anew_and_no_kept_position():
    keep = np.zeros((60, LENGTH), bool)
    keep[np.arange(60), np.arange(60) % LENGTH] = True
    start = compose(Coin(), keep=keep)
    for rounds, share in ((1, 0.25), (3, 0.5), (1, 1.0)):
        found = compose(Refine(rounds=rounds, share=share), keep=keep)
        np.testing.assert_array_equal(found.codes[keep], start.codes[keep])
        assert ((found.codes != start.codes).sum(1) <= np.ceil(4 * share) * rounds).all()
        assert found.bits.mean() < start.bits.mean()
    once = compose(Refine(rounds=1, share=0.25))
    worst = PRIOR.surprise(compose(Coin()).codes, seed=0, first=0, calls=1).argmax(1)
    changed = once.codes != compose(Coin()).codes
    assert changed.any() and (np.nonzero(changed)[1] == worst[changed.any(1)]).all()


def test_every_round_of_refine_has_draws_of_its_own():
    seeds = []

    class Told(Joint):
        def redraw(self, codes, *, seed, **how):
            seeds.append(seed)
            return super().redraw(codes, seed=seed, **how)

    compose(Refine(rounds=3), prior=Told())
    compose(Refine(rounds=3), prior=Told(), seed=4)
    assert len(set(seeds)) == 6


@pytest.mark.parametrize("name", ["coin", "infill", "refine"])
def test_the_best_of_several_draws_has_the_least_bits(name):
    operator, how = EVERY[name], {"seed": 3, "groups": GROUPS}
    draws = [best(operator, PARENTS, PRIOR, n=n, **how) for n in range(1, 6)]
    np.testing.assert_array_equal(draws[0].codes, compose(operator).codes)
    bits = np.stack([draw.bits for draw in draws])
    assert (np.diff(bits, axis=0) <= 0).all() and (bits[-1] < bits[0]).mean() > 0.3
    codes, bits = draws[-1]
    own = PRIOR.surprise(codes, seed=0, first=0, calls=1).mean(1)
    np.testing.assert_allclose(bits, own)  # of the codes that are kept
    part = best(
        operator, [p[5:9] for p in PARENTS], PRIOR, n=5, position=np.arange(5, 9), **how
    )  # fmt: skip
    np.testing.assert_array_equal(part.codes, codes[5:9])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: compose(Infill(), prior=None), "infill draws from a prior, and there is none"),
        (lambda: compose(Refine(), prior=None), "refine draws from a prior"),
        (lambda: best(Coin(), PARENTS, None, n=2, seed=0), "needs a prior"),
        (lambda: best(Coin(), PARENTS, PRIOR, n=0, seed=0), "best=0"),
        (lambda: compose(Coin(), []), "no parents"),
        (lambda: compose(Coin(), [PARENTS[0], PARENTS[1][:3]]), "[(3, 4), (60, 4)]"),
        (lambda: compose(Blocks(), groups={}), "run dlc positions W"),
        (lambda: compose(Blocks(size=-1)), "size=-1"),
        (lambda: compose(Chosen()), "names nothing"),
        (lambda: compose(Chosen(groups=("fork",))), "'fork'; known: form, tint"),
        (lambda: compose(Chosen(groups=("form", "1+2"))), "position 1 twice"),
        (lambda: compose(Chosen(groups=("0", "1", "2"))), "more than 2 parents"),
        (lambda: compose(Chosen(groups=("form+tint",))), "leaves nothing to the last of 2 images"),
        (lambda: compose(Soft(), PARENTS), "codes are corners"),
        (lambda: compose(Infill(share=0.6)), "0 to 0.5"),
        (lambda: compose(Infill(share=float("nan"))), "share=nan"),
        (lambda: compose(Infill(whole=True), groups={}), "run dlc positions W"),
        (lambda: compose(Infill(groups=("form", "tint"))), "form,tint leaves the prior nothing to"),
        (lambda: compose(Refine(rounds=0)), "rounds=0"),
        (lambda: compose(Refine(share=0.0)), "share=0.0"),
    ],
)
def test_refused_in_one_line(call, words):
    with pytest.raises(UserError) as refused:
        call()
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_recipe_names_operators_within_operators():
    def built(lines):
        config = recipe.expand({f"samples.operator.{name}": value for name, value in lines.items()})
        return recipe.build(OPERATORS, config.samples.operator)

    assert built({}) == Coin()
    assert built({"name": "infill", "groups": ("form", "tint")}) == Infill(groups=("form", "tint"))
    lines = {"name": "refine", "rounds": 2, "start.name": "infill", "start.share": 0.1}
    assert built(lines) == Refine(rounds=2, start=Infill(share=0.1))
    assert {name: built({"name": name}) for name in OPERATORS} == {
        name: operator() for name, operator in OPERATORS.items()
    }


# ---- groups


def test_groups_of_a_run():
    lines = {"data.name": "shapes", "encoder.model.simplicial.positions": 6}
    one = recipe.expand(lines).encoder
    three = recipe.expand(
        lines
        | {"encoder.crops.b.gray": 0.0, "encoder.crops.c.gray": 0.1, "encoder.crops.a.gray": 0}
    ).encoder
    kinds = {"a": (0, 1), "b": (2, 3), "c": (4, 5)}
    assert groups.known(one, None) == groups.known(None, None) == {}
    assert groups.known(three, None) == kinds
    found = {"length": 6, "groups": {"shape": [0, 5], "a": [1]}}
    assert groups.known(one, found) == {"shape": (0, 5), "a": (1,)}
    assert groups.known(three, found) == kinds | {"shape": (0, 5)}
    for damaged in ({"length": 7, "groups": {}}, {"length": 6}, {}):
        with pytest.raises(UserError, match="positions.json is not of the codes of this run"):
            groups.known(one, damaged)


def test_positions_by_numbers_ranges_and_names():
    of = {"form": (0, 3), "0-1": (5,)}
    assert groups.positions([4, "form", "1-2", "6"], of, 7, "keep") == [4, 0, 3, 1, 2, 6]
    assert groups.positions(["0-1"], of, 7, "keep") == [5]
    for given, words in (
        ("7", "0..6; got 7"),
        ("0-7", "0..6; got 0-7"),
        ("3-1", "3-1 is not a range"),
        ("1-", "no group of positions '1-'; known: form, 0-1"),
        ("", "no group of positions ''"),
    ):
        with pytest.raises(UserError) as refused:
            groups.positions([given], of, 7, "keep")
        assert words in str(refused.value)
    with pytest.raises(UserError, match="this run has none; run dlc positions W"):
        groups.positions(["form"], {}, 7, "keep")


def test_kinds_share_positions_out():
    def shared(length, **shares):
        crops = {kind: {"share": share} for kind, share in shares.items()}
        return {kind: list(each) for kind, each in groups.shared_out(crops, length).items()}

    assert shared(6, tint=1, form=1, ground=1) == {"form": [0, 1], "ground": [2, 3], "tint": [4, 5]}
    assert shared(6, tint=1, form=3, ground=2) == {"form": [0, 1, 2], "ground": [3, 4], "tint": [5]}
    assert [len(own) for own in shared(11, a=3, b=2, c=1).values()] == [5, 4, 2]
    assert groups.shared_out({"all": {}}, 5) == {"all": range(5)}
    with pytest.raises(UserError, match=r"5 positions are too few .* \(a 1, b 7\)"):
        shared(5, a=1, b=7)
    with pytest.raises(UserError, match="share=0 of a kind of crops"):
        transforms.MultiCrop(share=0)
