"""The encoder's whole objective at once: the terms against numpy, and what follows what.

And the same step however it is split.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_mesh
from recipes import load
from test_contract import run

from dlc_jax import parallel, train
from dlc_jax.checkpoint import Checkpoints
from dlc_jax.errors import UserError
from dlc_jax.models.encoder import Encoder
from dlc_jax.models.vit import standardize
from dlc_jax.plan import program
from dlc_jax.recipe import build
from dlc_jax.stages import STAGES
from dlc_jax.stages.encoder import Section, batch_spec, distillation
from dlc_jax.stages.encoder.objective import rise
from dlc_jax.stages.encoder.setup import Setup
from dlc_jax.step import make_init, make_train_step, make_validation_step

GROUP = 4
CROPS = dict(global_crops=2, global_size=16, local_crops=2, local_size=8)


def recipe(*, kinds=("all",), **sections):
    """The paper's objective on small pictures, and what is set in sections of the encoder.

    The network is small, and its LayerScale does not hide the blocks.
    """
    small = {f"model.backbone.{name}": 2 for name in ("depth", "heads")}
    small |= {"model.backbone.patch": 4, "model.backbone.width": 32, "model.backbone.unroll": 1}
    small |= {"model.backbone.layer_scale": 0.5, "model.dino.prototypes": 24}
    small |= {"model.simplicial.positions": 6, "model.simplicial.values": 5}
    paper = load("imagenet256.py").encoder.objective.to_dict()
    small |= {f"objective.{name}": value for name, value in paper.items()}
    small |= {f"objective.{name}_group": GROUP for name in ("mask", "koleo", "drop_path")}
    small |= {"objective.teacher_temperature": (0.04, 0.07, 10), "optimizer.warmup": 0}
    small |= {"train.batch": 32, "train.clip_separately": ("head/.*",)}
    usual = load("quickstart.py:tiny").encoder.crops
    crops = next(iter(usual.values())).to_dict() | CROPS | {"share": 1}
    small |= {f"crops.{kind}.{name}": x for kind in kinds for name, x in crops.items()}
    for section, given in sections.items():
        small |= {f"{section}.{name}": value for name, value in given.items()}
    own = {f"encoder.{name}": value for name, value in small.items()}
    return load("quickstart.py:tiny", {"encoder.crops": None} | own)


def make(**options):
    return STAGES["encoder"](recipe(**options), step="encoder", workdir="unused")


def measure(stage):
    """State, batch and metrics of one batch, with other parameters than the teacher's."""

    def shake(leaf):
        return leaf + 0.02 * jnp.sin(jnp.arange(leaf.size).reshape(leaf.shape) * 1.7)

    state = jax.jit(make_init(stage))(jax.random.key(0))
    state = dataclasses.replace(state, params=jax.tree.map(shake, state.params))
    batch, step = next(stage.batches("train")), jax.jit(make_validation_step(stage))
    return state, batch, jax.device_get(step(state, batch, {}, jax.random.key(3)))


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


HALFWAY = 0.055  # the teacher's temperature at step 5 of 10, in which it rises from 0.04 to 0.07
SIMPLEX = dict(student=0.8, teacher=0.7)  # and of the simplices, which fall from 1


def center_targets(logits, center):
    return np.exp(log_softmax((logits - center) / HALFWAY))


def balanced_targets(logits, _, temperature=HALFWAY):
    """Sinkhorn-Knopp as it is written, on all samples.

    Totals of prototypes, then of samples, three times.
    """
    q = np.exp((logits - logits.max()) / temperature)
    for _ in range(3):
        q = q / q.sum(tuple(range(q.ndim - 1)))
        q = q / q.sum(-1, keepdims=True)
    return q


@pytest.mark.parametrize("teacher", ["centering", "sinkhorn"])
@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
def test_terms_are_those_of_whole_images(separate, teacher):
    """Every patch through the head, without a buffer, then NumPy: all terms.

    Centers are not zero, and the step is in the midst of the schedules.
    """
    falling = dict(simplex_temperature=((1.0, 0.6, 10), (1.0, 0.4, 10)))
    agreeing = dict(consistency=0.5, consistency_temperature=(0.9, 0.6), plain=0.25)
    objective = dict(drop_path=0.0, teacher=teacher, **falling, **agreeing)
    stage = make(objective=objective, model=dict(separate_head=separate))
    config = recipe(model=dict(separate_head=separate)).encoder
    state = jax.jit(make_init(stage))(jax.random.key(0))
    centers = {
        name: 0.1 * np.cos(np.arange(24))[None] * sign
        for name, sign in (("center", 1), ("patch_center", -1))
    }
    state = dataclasses.replace(
        state,
        step=jnp.int32(5),
        params=jax.tree.map(lambda leaf: leaf * 1.1 + 0.01, state.params),
        extra={name: jnp.float32(center) for name, center in centers.items()},
    )
    batch = next(stage.batches("train"))
    found = jax.jit(make_validation_step(stage))(state, batch, {}, jax.random.key(3))
    model = build(Encoder, config.model)

    @jax.jit
    def network(params, pixels, hidden, temperature):
        out = model.apply({"params": params}, pixels, masked=hidden, temperature=temperature)
        method = lambda model, x: model.score(model.normalize(x))  # noqa: E731
        patches = model.apply({"params": params}, out["patches"], method=method)
        names = ("prototypes", "vector", "logits", "simplices")
        return {name: out[name] for name in names}, patches

    def see(params, crops, hidden=None, whose="student"):
        pixels = standardize(jnp.asarray(crops).reshape(-1, *crops.shape[2:]))
        found, patches = jax.device_get(network(params, pixels, hidden, SIMPLEX[whose]))
        found = {name: leaf.astype(float) for name, leaf in found.items()}
        found = {name: x.reshape(*crops.shape[:2], *x.shape[1:]) for name, x in found.items()}
        return found | {"patches": patches.astype(float)}

    def cross_entropy(student, teacher):
        """The mean over pairs of a crop [b, 4, p] and another of the first two [b, 2, p]."""
        pairs = [(s, t) for s, t in itertools.product(range(4), range(2)) if s != t]
        return np.mean([-(teacher[:, t] * student[:, s]).sum(-1).mean() for s, t in pairs])

    hidden = batch["all/masked"].reshape(64, 16)
    assert 0 < hidden.any(1).sum() < 64
    seen = see(state.ema, batch["all/global"], whose="teacher")
    views = see(state.params, batch["all/global"], jnp.asarray(hidden))
    local = see(state.params, batch["all/local"])
    names = ("prototypes", "logits")
    prototypes, logits = (np.concatenate([views[name], local[name]], 1) for name in names)
    aim = {"centering": center_targets, "sinkhorn": balanced_targets}[teacher]
    targets = aim(seen["prototypes"], centers["center"])
    expected = cross_entropy(log_softmax(prototypes / 0.1), targets)
    np.testing.assert_allclose(found["dino"], expected, rtol=1e-4)
    entropy = -(targets * np.log(targets)).sum(-1).mean()
    np.testing.assert_allclose(found["target_entropy"], entropy, rtol=1e-4)
    targets = np.zeros(seen["patches"].shape)
    targets[hidden] = aim(seen["patches"][hidden], centers["patch_center"])
    entropies = -(targets * log_softmax(views["patches"] / 0.1)).sum(-1)
    expected = (
        sum(entropy[mask].mean() for entropy, mask in zip(entropies, hidden) if mask.any()) / 64
    )
    np.testing.assert_allclose(found["ibot"], expected, rtol=1e-4)
    # each position for itself, its values balanced over all crops of the teacher
    each = []
    for place in range(6):
        targets = balanced_targets(seen["logits"][:, :, place], None, 0.6)
        each.append(cross_entropy(log_softmax(logits[:, :, place] / 0.9), targets))
    np.testing.assert_allclose(found["consistency"], np.mean(each), rtol=1e-4)
    # and what it says of the image itself, against the mean over the teacher's crops
    own = log_softmax(see(state.params, batch["plain"][:, None])["logits"][:, 0] / 0.9)
    means = np.moveaxis(seen["logits"].mean(1), 1, 0)
    targets = np.stack([balanced_targets(mean, None, 0.6) for mean in means], 1)
    np.testing.assert_allclose(found["plain"], -(targets * own).sum(-1).mean(), rtol=1e-4)
    shares = views["simplices"].mean((0, 1))
    perplexity = np.exp(-(shares * np.log(shares)).sum(-1)).mean()
    np.testing.assert_allclose(found["code_perplexity"], perplexity, rtol=1e-4)
    # of what the head has not seen: the sum over the first crops of a group's images and the second
    vectors = views["vector"]
    units = (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).reshape(
        -1, GROUP, 2, vectors.shape[-1]
    )
    distances = np.linalg.norm(units[:, :, None] - units[:, None], axis=-1)
    distances += 9.0 * np.eye(GROUP)[None, :, :, None]
    expected = -np.log(distances.min(2)).mean((0, 1)).sum()
    np.testing.assert_allclose(found["koleo"], expected, rtol=1e-4)
    total = found["dino"] + found["ibot"] + 0.1 * found["koleo"] + 0.5 * found["consistency"]
    total += 0.25 * found["plain"]
    np.testing.assert_allclose(found["loss"], total, rtol=1e-5)


def test_schedules_of_the_teacher():
    """The paper's: momentum on a cosine from 0.992 to 1 over the run.

    Temperature straight from 0.04 to 0.07, and there it stays.
    """
    stage = make(train=dict(steps=100))
    decays = [stage.ema_decay(step) for step in (0, 25, 50, 100)]
    np.testing.assert_allclose(decays, [0.992, 0.9931716, 0.996, 1.0], rtol=1e-6)
    paper = load("imagenet256.py").encoder.objective.teacher_temperature
    found = [rise(paper, step) for step in (0, 18_750, 37_500, 125_000)]
    np.testing.assert_allclose(found, [0.04, 0.055, 0.07, 0.07], rtol=1e-6)


def test_centers_are_means_over_crops_and_over_masked_patches():
    """Sums and numbers of masked patches come in; without any the patches' center fades."""
    after = jax.jit(make(objective=dict(center_momentum=0.75)).after_update)
    center = {"center": np.float32([[1, 2]]), "patch_center": np.float32([[4, 8]])}
    for patches, expected in ((0.5, [[5.0, 9.0]]), (0.0, [[3.0, 6.0]])):
        sums = np.float32([[4, 6]]) * (patches > 0)
        aux = {"center": np.float32([[5, 6]]), "patch_center": sums}
        aux["patches"] = np.float32([patches])
        found = after(center, {}, aux, 0)
        np.testing.assert_allclose(found["center"], [[2, 3]], rtol=1e-6)
        np.testing.assert_allclose(found["patch_center"], expected, rtol=1e-6)


def test_batches_are_of_the_split_and_their_crops_and_masks_of_the_seed():
    def batch(seed, split="train"):
        config = recipe()
        config.seed = seed
        return next(STAGES["encoder"](config, step="encoder", workdir="unused").batches(split))

    first, again, other, unseen = batch(0), batch(0), batch(1), batch(0, "validation")
    for name in ("all/global", "all/local", "all/masked"):
        np.testing.assert_array_equal(first[name], again[name])
        assert (first[name] != other[name]).any(), name
    assert (first["all/global"] != unseen["all/global"]).any()


def test_the_batch_and_its_views_have_the_shapes_that_they_say():
    """Each kind has its own crops, and reads its own share of the positions."""
    config = recipe(kinds=("a", "b"))
    section = build(Section, config.encoder)
    setup = Setup(section.model, section.objective, config.encoder.crops, 10)
    assert {name: leaf.shape for name, leaf in batch_spec(setup, 32).items()} == {
        "position": (32,),
        **{f"{kind}/global": (32, 2, 16, 16, 3) for kind in "ab"},
        **{f"{kind}/local": (32, 2, 8, 8, 3) for kind in "ab"},
        **{f"{kind}/masked": (32, 2, 16) for kind in "ab"},
    }
    assert setup.ranges == {"a": (0, 3), "b": (3, 6)}
    params, _ = jax.eval_shape(functools.partial(distillation.init, setup), jax.random.key(0))
    crops = jax.ShapeDtypeStruct((4, 2, 8, 8, 3), jnp.uint8)
    look = functools.partial(distillation.views, setup, temperature=1.0, local=True)
    out = jax.eval_shape(lambda params, crops: look(params, crops, None, "b"), params, crops)
    assert {name: leaf.shape for name, leaf in out.items()} == {
        "prototypes": (4, 2, 24),
        "vector": (4, 2, 32),
        "logits": (4, 2, 3, 5),
        "simplices": (4, 2, 3, 5),
        "patches": (8, 4, 32),
    }


@pytest.mark.slow
def test_bfloat16_computes_the_same_terms():
    """Networks in bfloat16; probabilities, norms and sums in float32.

    Gradients, averages and centers stay float32.
    """
    stage = make()
    state, batch, _ = measure(stage)
    (_, wide), (after, narrow) = (
        jax.jit(make_train_step(stage, dtype=dtype))(state, batch, {}, jax.random.key(1))
        for dtype in ("float32", "bfloat16")
    )
    for name in ("loss", "dino", "ibot", "koleo", "target_entropy"):
        assert 0 < abs(wide[name] - narrow[name]) < 0.02 * abs(wide[name]), name
        assert narrow[name].dtype == jnp.float32
    assert narrow["gradient_norm"] == pytest.approx(float(wide["gradient_norm"]), rel=0.1)
    leaves = jax.tree.leaves((after.params, after.ema, after.extra))
    assert {leaf.dtype for leaf in leaves if leaf.ndim} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_centers_follow_the_teacher():
    stage = make()
    before, batch, _ = measure(stage)
    model = build(Encoder, recipe().encoder.model)
    pixels = standardize(jnp.asarray(batch["all/global"]).reshape(64, 16, 16, 3))
    out = model.apply({"params": before.ema}, pixels)
    normal = model.apply({"params": before.ema}, out["patches"], method="normalize")
    patches = model.apply({"params": before.ema}, normal, method="score")
    after, _ = jax.jit(make_train_step(stage))(before, batch, {}, jax.random.key(1))
    hidden = batch["all/masked"].reshape(64, 16)
    scores = {"center": out["prototypes"], "patch_center": patches[hidden]}
    for name, each in scores.items():
        center = after.extra[name][0]
        np.testing.assert_allclose(center, 0.1 * each.mean(0), rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_separate_heads_learn_their_own():
    def moved(**objective):
        stage = make(
            objective=dict(drop_path=0.0, **objective),
            model=dict(separate_head=True),
            train=dict(clip_separately=()),
        )
        before, batch, _ = measure(stage)
        after, _ = jax.jit(make_train_step(stage))(before, batch, {}, jax.random.key(1))
        change = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), before.params, after.params)
        return {head: change[head]["gain"] > 1e-6 for head in ("head", "patch_head")}

    assert moved(dino=0.0) == {"head": False, "patch_head": True}
    assert moved(ibot=0.0) == {"head": True, "patch_head": False}


@pytest.mark.slow
def test_drop_path_is_the_students_and_the_groups():
    _, _, without = measure(make(objective=dict(drop_path=0.0)))
    dropped = make()
    state, batch, found = measure(dropped)
    step = jax.jit(make_validation_step(dropped))

    def dino(position):
        return step(state, batch | {"position": position}, {}, jax.random.key(3))["dino"]

    # the teacher drops nothing
    assert found["target_entropy"] == pytest.approx(without["target_entropy"], rel=1e-6)
    assert abs(found["dino"] - without["dino"]) > 1e-4
    # Only the first of a group counts: the others' places change nothing, its own does.
    position = np.arange(32, dtype=np.int32)
    others, leaders = position.copy(), position.copy()
    others[position % GROUP != 0] += 100
    leaders[position % GROUP == 0] += 100
    assert dino(others) == found["dino"] != dino(leaders)


@pytest.mark.slow
@pytest.mark.parametrize("whose", [0, 1], ids=["student", "teacher"])
def test_simplex_temperatures_of_student_and_teacher_rise_apart(whose):
    flat, falling = (1.0, 1.0, 1), (1.0, 0.2, 10)
    pair = (falling, flat) if whose == 0 else (flat, falling)
    stage = make(
        objective=dict(simplex_temperature=pair, drop_path=0.0, teacher_temperature=(0.04, 0.04, 1))
    )
    state, batch, start = measure(stage)
    step = jax.jit(make_validation_step(stage))
    middle, end, after = (
        step(dataclasses.replace(state, step=jnp.int32(number)), batch, {}, jax.random.key(3))
        for number in (5, 10, 20)
    )
    own, other = ("code_perplexity", "target_entropy")[:: 1 - 2 * whose]
    assert start[own] != middle[own] != end[own] == after[own]
    assert start[other] == middle[other] == end[other]


VARIANTS = {
    "centering": dict(),
    "sinkhorn, gumbel": dict(
        objective=dict(teacher="sinkhorn"), model={"simplicial.relaxation": "gumbel"}
    ),
    "straight through, two kinds": dict(
        kinds=("one", "two"),
        objective=dict(consistency=1.0),
        model={"simplicial.relaxation": "straight_through", "separate_head": True},
    ),
    # One image's nearest in the whole batch. Without drop path, which makes some vectors nearly
    # equal: then rounding decides who is nearest.
    "koleo over all": dict(objective=dict(koleo_group=0, drop_path=0.0)),
}


@functools.cache
def alone(variant):
    """What one device does, computed once for each variant."""
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    return test_mesh.follow(make(**VARIANTS[variant]), mesh)


# every variant on one mesh, and one of them on both: each is minutes of compiling
MESHES = [
    *((name, (8, 1, 1) if place % 2 else (2, 2, 2)) for place, name in enumerate(VARIANTS)),
    ("centering", (8, 1, 1)),
]


@pytest.mark.slow
@pytest.mark.parametrize("variant, sizes", MESHES, ids=str)
def test_eight_devices_do_what_one_does(variant, sizes, monkeypatch):
    """The first gradient and three losses, with all terms, drop path and noise."""
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices; on CPU the tests force them")
    monkeypatch.setattr(parallel, "SMALLEST", 64)
    monkeypatch.setattr(test_mesh, "STEPS", 3)
    stage = make(**VARIANTS[variant])
    mesh = parallel.make_mesh(**dict(zip(parallel.AXES, sizes)), devices=jax.devices()[:8])
    gradient, _, losses = alone(variant)
    found, _, together = test_mesh.follow(stage, mesh)

    def compare(path, one, eight):
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(one, eight, rtol=0, atol=2e-5 * np.abs(one).max(), err_msg=where)

    jax.tree_util.tree_map_with_path(compare, gradient, found)
    np.testing.assert_allclose(losses, together, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "koleo over all"])
def test_accumulation_of_whole_groups_equals_the_whole_step(variant):
    whole, first, _ = run(make(**VARIANTS[variant]), steps=2)
    stage = make(**VARIANTS[variant], train=dict(accumulate=4))
    parts, second, _ = run(stage, steps=2, accumulate=4)
    for a, b in zip(first, second):
        assert a.keys() == b.keys()
        for name in {"loss", "dino", "ibot", "koleo", "consistency", "gradient_norm"} & a.keys():
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert all(first[0][name] != 0 for name in ("dino", "ibot", "koleo"))  # every term is on
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole.extra, parts.extra)


@pytest.mark.slow
def test_groups_ask_no_other_device():
    """Data parallel, compiled: only sums of gradients and means cross between devices."""
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices; on CPU the tests force them")
    lowered = train.lower(make(), parallel.make_mesh(devices=jax.devices()[:8]))
    assert set(program.collectives(program.text(lowered.compile()))) == {"all-reduce"}


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(train=dict(batch=6)),
            "encoder.train.batch=6 in 1 microbatch.* groups of encoder.objective.koleo_group=4",
        ),
        (
            dict(train=dict(batch=8), objective=dict(koleo=0.0, mask_group=16)),
            "groups of encoder.objective.mask_group=16",
        ),
        (
            dict(train=dict(batch=8), objective=dict(koleo=0.0, ibot=0.0, drop_path_group=16)),
            "groups of encoder.objective.drop_path_group=16",
        ),
        (
            dict(train=dict(accumulate=16)),
            "batch=32 in 16 microbatch.* encoder.objective.koleo_group=4",
        ),
        (
            dict(train=dict(accumulate=2), objective=dict(koleo_group=0)),
            "koleo_group=0 compares the whole batch",
        ),
        (dict(objective=dict(drop_path=1.0)), "drop_path=1.0 must be"),
    ],
)
def test_groups_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


def test_a_mesh_that_would_cut_groups_in_microbatches():
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    parallel.check_batch(32, mesh, accumulate=4, group=GROUP, where="encoder.train")
    with pytest.raises(UserError, match=r"does not divide by 64 .* accumulate 4 x groups of 16"):
        parallel.check_batch(32, mesh, accumulate=4, group=16, where="encoder.train")
    assert make().group == GROUP and make(objective=dict(koleo_group=2, mask_group=8)).group == 8


def test_without_masks_nothing_is_drawn():
    stage = make(objective=dict(ibot=0.0))
    assert not any("masked" in name for name in stage.batch_spec)
    assert "patch_center" not in jax.eval_shape(stage.init, jax.random.key(0))[1]
    assert set(next(stage.batches("train"))) == set(stage.batch_spec)
    assert set(next(make().batches("train"))) == set(stage.batch_spec) | {"all/masked"}


@pytest.mark.slow
def test_warm_up_on_a_frozen_backbone(tmp_path):
    """A backbone without heads stays bit for bit until the heads have learned, then all moves.

    So does its average.
    """
    state = make_init(make())(jax.random.key(7))
    given = {"params": {"vit": state.params["vit"]}, "ema": {"vit": state.params["vit"]}}
    given = jax.tree.map(lambda leaf: leaf + 0.01, given)
    checkpoints = Checkpoints(tmp_path / "given")
    checkpoints.save(0, given, None, {"identity": {}})
    checkpoints.close()

    def stage(steps):
        warm = dict(init_from=str(tmp_path / "given"), init_new=("simplicial.*", "head.*"))
        often = dict(save_every=steps, validate_every=100, validate_batches=1)
        return make(
            train=warm | often | dict(steps=steps, batch=16),
            optimizer=dict(freeze=(("vit/.*", 4),), weight_decay=0.1),
            objective=dict(momentum=(0.5, 0.5)),
        )

    def after(steps):
        made, directory = stage(steps), tmp_path / str(steps)
        mesh = parallel.make_mesh(devices=jax.devices()[:1])
        train.train(made, directory, mesh=mesh, seed=0, name="encoder")
        _, abstract = train.compile_step(made, mesh)
        return Checkpoints(directory / "checkpoints").restore(abstract, None, made.identity)[0]

    frozen, thawed = after(4), after(6)
    for tree in (frozen.params, frozen.ema):
        jax.tree.map(np.testing.assert_array_equal, tree["vit"], given["params"]["vit"])
        assert float(jnp.abs(tree["head"]["fc1"]["kernel"]).max()) > 0
    start = jax.eval_shape(make_init(stage(4)), jax.random.key(0)).params
    heads = (jax.tree.leaves(tree["head"]) for tree in (frozen.params, frozen.ema))
    moved = [float(jnp.abs(a - b).max()) for a, b in zip(*heads)]
    assert len(moved) == len(jax.tree.leaves(start["head"]))
    assert max(moved) > 1e-4  # the heads learn, and their average follows
    before = jax.tree.leaves(given["params"]["vit"])
    for tree in (thawed.params, thawed.ema):
        pairs = zip(jax.tree.leaves(tree["vit"]), before)
        assert any((np.asarray(a) != np.asarray(b)).any() for a, b in pairs)
