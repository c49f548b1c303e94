"""Continuous embeddings: what the codes step stores, and a generator that learns from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_prior_stage as prior_stage
from recipes import load
from test_codes_job import config, images, make, recipe, run, trained, workdir  # noqa: F401
from test_pipeline import FAST, SMALL, close, drawn
from test_pipeline import images as pictures

from dlc_jax import agenda, parallel
from dlc_jax.data import code_writer, codes, sources
from dlc_jax.diffusion.guidance import Guidance
from dlc_jax.errors import UserError
from dlc_jax.networks import Networks, exported
from dlc_jax.recipe import build, changed
from dlc_jax.stages import STAGES, generator
from dlc_jax.stages.generator import objective, upstream

WIDTH, BATCH = 88, 64  # of a token of the quickstart's encoder; images of a split
FIELDS = {"codes.embedding": "class", "generator.model.embedding": WIDTH}
FIELDS |= {"generator.model.positions": 0, "generator.model.values": 0}


# ---- the store


@pytest.mark.parametrize("kind, width", [("class", 16), ("summary", 48)])
def test_rows_of_the_store_are_what_the_encoder_says(kind, width, config, workdir):  # noqa: F811
    """Of either view; and codes are those that are stored without."""
    config.codes.update(dict(embedding=kind, flip=True))
    run(config, workdir)
    store = codes.CodeStore(workdir / "codes" / "train")
    fields = {f"embedding{view}": ["float16", [width]] for view in ("", "_flipped")}
    assert store.manifest["fields"] == fields | {"codes_flipped": ["uint8", [6]]}
    assert store.manifest["view"] == {"embedding": kind}
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    encoder = Networks(config, workdir, mesh, batch=8)["encoder"]
    rows, seen = [store[index] for index in range(len(store))], images(config)
    for view, pixels in (("", seen), ("_flipped", seen[:, :, ::-1])):
        found = np.stack([row[f"embedding{view}"] for row in rows])
        wanted = encoder.embed(pixels)  # the kind that the recipe stores
        assert found.dtype == np.float16 and wanted.dtype == np.float32
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal([row[f"codes{view}"] for row in rows], encoder.encode(pixels))
    first = encoder.features(seen)[:, :16]  # the normalized class token
    np.testing.assert_allclose(encoder.embed(seen)[:, :16], first, rtol=1e-4, atol=1e-4)
    for part in np.split(wanted, width // 16, axis=1):  # each token is normalized by itself
        assert 0.2 < part.std() < 2 and np.abs(part[0] - part[-1]).max() > 0.1
    some = [7, 3, 40]
    np.testing.assert_array_equal(store.embeddings(some), [rows[n]["embedding"] for n in some])


def test_a_store_without_embeddings_is_as_it_was(config, workdir):  # noqa: F811
    run(config, workdir)
    manifest = codes.CodeStore(workdir / "codes" / "train").manifest
    assert manifest["fields"] == {} and manifest["view"] == {}
    config.codes.path, config.codes.embedding = str(workdir / "codes"), "class"
    with pytest.raises(UserError, match="has no embeddings, which codes asks for; set codes.emb"):
        run(config, workdir)
    config.codes.embedding = "mean"
    with pytest.raises(UserError, match="codes.embedding='mean' is unknown; known: class, summ"):
        make(config, workdir)


# ---- the stage


def settings(**fields):
    given = {f"generator.{name}": value for name, value in fields.items()}
    return changed(prior_stage.recipe("generator"), FIELDS | given)


def stage(place="unused", **fields):
    return STAGES["generator"](settings(**fields), step="generator", workdir=place)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A workdir with a store: the embedding of image i has i everywhere."""
    place, data = tmp_path_factory.mktemp("embedded"), settings().data

    def encode(start, stop):
        rows = np.arange(start, stop)[:, None]
        return {"codes": rows % 5, "embedding": np.tile(rows, WIDTH).astype(np.float16)}

    about = dict(total=BATCH, positions=1, values=5, identity="counted")
    about |= {"fields": {"embedding": ("float16", (WIDTH,))}}
    for split in ("train", "validation"):
        source = sources.identity(split=split, **data)
        code_writer.write(place / "codes" / split, encode, source=source, **about)
    return place


def test_a_batch_has_the_embedding_of_each_of_its_images(stores):
    made = stage(stores)
    assert made.reads()["store"]["encoder"] == "counted"
    batch = next(made.batches("train"))
    assert set(made.batch_spec) == {"position", "image", "embedding"} <= set(batch)
    spec = made.batch_spec["embedding"]
    assert batch["embedding"].shape == spec.shape == (BATCH, WIDTH)
    rows = batch["embedding"][:, 0].astype(int)
    assert sorted(rows) == list(range(BATCH))
    source = sources.source(split="train", **settings().data)
    np.testing.assert_array_equal(batch["image"], [source[int(row)]["image"] for row in rows])


def test_embeddings_are_dropped_for_guidance():
    """As whole examples, with a label beside them; a label is dropped by itself as often again."""
    section = build(generator.Section, settings(**{"objective.drop": 0.5}).generator)
    place, model = jnp.arange(BATCH), section.model.clone(classes=7)
    batch = {"position": place, "embedding": jnp.ones((BATCH, WIDTH)), "label": place % 7}
    given = objective.hide(model, section.objective, batch, jax.random.key(0))
    drop, label = np.asarray(given.drop), np.asarray(given.label) == 7
    assert given.codes is None and 0.3 < drop.mean() < 0.7
    assert label[drop].all() and 0.3 < label[~drop].mean() < 0.7
    np.testing.assert_array_equal(given.embedding, batch["embedding"])


@pytest.mark.parametrize("drop", [0.0, 0.5, 1.0])
def test_gradients_reach_what_reads_the_embedding(drop):
    """The map of embeddings that are given, and the null vector of those that are dropped."""
    fields = {"objective.drop": drop, "grid.sampler.guidance.scale": 1.0}
    made, random = stage(**fields), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: made.init(jax.random.key(0))[0])
    params = jax.tree.map(lambda leaf: 0.1 * random.standard_normal(leaf.shape, np.float32), shapes)
    batch = {"position": np.arange(BATCH, dtype=np.int32)}
    batch["image"] = random.integers(0, 256, (BATCH, 16, 16, 3), np.uint8)
    batch["embedding"] = random.standard_normal((BATCH, WIDTH), np.float32)
    loss = jax.jit(jax.value_and_grad(made.loss, has_aux=True))
    (value, _), grads = loss(params, {}, batch, {}, 0, jax.random.key(0))
    read = grads["embedding_input"]
    assert np.isfinite(value) and np.abs(read["dense"]["kernel"]).max() > 1e-6
    assert (np.abs(read["null"]).max() > 1e-6) == (drop > 0)
    (other, _), _ = loss(
        params, {}, batch | {"embedding": -batch["embedding"]}, {}, 0, jax.random.key(0)
    )
    assert (float(value) != float(other)) == (drop < 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model.embedding": 64},
            "embedding=64, but the embedding 'class' of encoder has width 88",
        ),
        (
            {"codes": ""},
            "codes='' does not go with .* without codes, positions and embedding are 0",
        ),
        (
            {"model.embedding": 0},
            "codes='codes' does not go with .* with codes, one of them is read",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_trained(changes, words):
    with pytest.raises(UserError, match=words):
        stage(**changes)


def test_what_is_not_stored_is_refused_before_anything_is_trained(stores):
    lacks = changed(settings(), {"codes.embedding": ""})
    with pytest.raises(UserError, match="codes.embedding='' stores none; set codes.embedding=cl"):
        STAGES["generator"](lacks, step="generator", workdir="unused")
    whole = changed(settings(**{"model.embedding": 3 * WIDTH}), {"codes.embedding": "summary"})
    made = STAGES["generator"](whole, step="generator", workdir=stores)
    with pytest.raises(UserError, match="generator has embeddings of width 264; .* width 88"):
        made.reads()
    with pytest.raises(UserError, match="samples: generator reads embeddings, and no step draws"):
        STAGES["samples"](settings(), step="samples", workdir="unused")
    steps = {"generator": stage()}  # codes of other sizes do not matter, as none are read
    agenda._check_codes(changed(settings(), {"encoder.model.simplicial.values": 9}), "generator")
    assert steps["generator"].batch_spec["embedding"].shape == (BATCH, WIDTH)


def test_the_store_is_checked_for_each_split(stores):
    config_ = settings()
    section = build(generator.Section, config_.generator)
    files = upstream.Upstream(config_, stores, "generator", section)
    assert len(files.store("validation")) == BATCH


# ---- the networks


@pytest.fixture(scope="module")
def p():
    lines = {name: value for name, value in FIELDS.items() if name != "generator.model.embedding"}
    return drawn(lines | {"generator.model.embedding": SMALL["*.model*.width"]})


def test_images_are_drawn_from_embeddings(p):
    found = p.embed(pictures(5))
    assert found.shape == (5, 16)
    assert p.embed(pictures(5), kind="summary").shape == (5, 32)
    with pytest.raises(UserError, match="embed: kind='mean' is unknown; known: class, summary"):
        p.embed(pictures(5), kind="mean")
    whole = p.decode(embeddings=found, seed=3)
    assert whole.shape == (5, 8, 8, 3) and (whole[0] != whole[1]).any()
    close(whole[2:], p.decode(embeddings=found[2:], seed=3, first=2))
    assert (whole != p.decode(embeddings=found[::-1], seed=3)).any()
    leaning = p.decode(embeddings=found, seed=3, sampler=guided(3.0)).astype(int)
    plain = p.decode(embeddings=found, seed=3, sampler=guided(1.0)).astype(int)
    assert np.abs(leaning - plain).max() > 5


def guided(scale):
    return type(FAST)(method="euler", steps=2, guidance=Guidance(scale=scale))


@pytest.mark.parametrize(
    "given, words",
    [
        ({}, "generator was trained with embeddings; give some, as from embed"),
        ({"count": 3}, "generator was trained with embeddings; give some"),
        ({"embeddings": np.zeros((3, 4))}, r"embeddings are finite floats \[b, 16\]; got float64 "),
        ({"embeddings": np.full((3, 16), np.nan)}, "embeddings are finite floats"),
        ({"embeddings": np.zeros((3, 16), int)}, "embeddings are finite floats"),
    ],
)
def test_embeddings_that_are_none_are_refused(given, words, p):
    with pytest.raises(UserError, match=words):
        p.decode(**given)


def test_a_generator_of_codes_takes_no_embeddings():
    with pytest.raises(UserError, match="generator was trained without embeddings; give none"):
        drawn().decode(np.zeros((3, 6), int), embeddings=np.zeros((3, 16)))


def test_an_exported_function_reads_embeddings(p):
    function = exported.decode(p.networks["generator"], FAST)
    assert function.arguments["embeddings"] == ((16,), jnp.float32)
    found, numbers = p.embed(pictures(5)), np.arange(5, dtype=np.int32)
    drawn_ = jax.jit(function.call)(function.params, np.int32(3), numbers, found)
    close(np.asarray(drawn_), p.decode(embeddings=found, seed=3))


def test_recipes_do_not_store_any():
    assert {load(name).codes.embedding for name in ("quickstart.py", "imagenet256.py")} == {""}
