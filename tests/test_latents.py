"""Latents: views and draws, their statistics, and recipes whose parts do not fit together."""

import types

import numpy as np
import pytest
from recipes import load

from dlc_jax import recipe
from dlc_jax.data import latents
from dlc_jax.data.codes import record_dtype
from dlc_jax.errors import UserError
from dlc_jax.networks.autoencoder import Normalizer

C, SHAPE = 3, (4, 5, 3)


def generator(seed=0):
    return np.random.default_rng(seed)


def record(*, flipped=True, logvar=True):
    """What a store and its source have of an image; the mirror image's is the mirror of it."""
    random = generator(1)
    found = {"image": random.integers(0, 256, (8, 10, 3), np.uint8), "label": 7}
    found |= {"codes": np.arange(6), "latent_mean": random.normal(size=SHAPE).astype(np.float16)}
    if logvar:
        found["latent_logvar"] = random.normal(-2, 1, SHAPE).astype(np.float16)
    if flipped:
        names = [name for name in found if name not in ("image", "label")]
        found |= {f"{name}_flipped": found[name][::-1] for name in names}
    return found


def test_codes_moments_and_image_are_of_one_view_and_each_comes_half_of_the_time():
    given, mirrored = record(), []
    for seed in range(400):
        found = latents.view(given, generator(seed))
        assert set(found) == {"image", "label", "codes", "latent_mean", "latent_logvar"}
        mirrored.append(found["codes"][0] == 5)
        side = -1 if mirrored[-1] else 1
        np.testing.assert_array_equal(found["image"], given["image"][:, ::side])
        for name in ("codes", "latent_mean", "latent_logvar"):
            np.testing.assert_array_equal(found[name], given[name][::side])
    assert abs(np.mean(mirrored) - 0.5) < 0.08
    alone = record(flipped=False)
    assert all(latents.view(alone, generator(seed)) == alone for seed in range(20))


def test_draws_have_the_posterior_s_mean_and_deviation_scaled():
    given, scaling = record(flipped=False), 0.25
    drawn = latents.Drawn(scaling=scaling)
    found = np.stack([drawn(given, generator(seed))["latent"] for seed in range(4000)])
    assert found.dtype == np.float32
    mean, deviation = given["latent_mean"].astype(float), np.exp(given["latent_logvar"] / 2.0)
    error = scaling * deviation / np.sqrt(len(found))
    assert np.abs((found.mean(0) - scaling * mean) / error).max() < 5
    np.testing.assert_allclose(found.std(0), scaling * deviation, rtol=0.06)
    again = drawn(given, generator(3))
    np.testing.assert_array_equal(again["latent"], found[3])
    assert not {"latent_mean", "latent_logvar"} & set(again) and again["label"] == 7


def test_without_a_posterior_the_latent_is_its_mean():
    given = record(flipped=False, logvar=False)
    found = latents.Drawn(scaling=2.0)(given, generator())["latent"]
    np.testing.assert_array_equal(found, 2 * given["latent_mean"].astype(np.float32))


def rows(count, *, logvar=True):
    fields = {"latent_mean": ("float16", SHAPE), "latent_mean_flipped": ("float16", SHAPE)}
    if logvar:
        fields |= {name.replace("mean", "logvar"): kind for name, kind in fields.items()}
    dtype = record_dtype({"dtype": "uint8", "positions": 6, "fields": fields})
    found, random = np.zeros(count, dtype), generator(2)
    for name in fields:
        found[name] = 3 * random.normal(size=found[name].shape) - ("logvar" in name)
    return found


@pytest.mark.parametrize("logvar", [True, False])
def test_statistics_are_those_of_draws_of_all_views(logvar):
    found, sums = rows(40, logvar=logvar), latents.Sums()
    sums.add(found[:16])
    other = latents.Sums()
    other.add(found[16:])
    measured = latents.statistics([sums.plain(), other.plain()])
    views = ("", "_flipped")
    mean = np.concatenate([found[f"latent_mean{view}"] for view in views]).astype(float)
    variance = mean.var((0, 1, 2))
    if logvar:
        each = np.concatenate([found[f"latent_logvar{view}"] for view in views]).astype(float)
        variance += np.exp(each).mean((0, 1, 2))
    assert measured["count"] == 40 * 2 * 4 * 5
    np.testing.assert_allclose(measured["mean"], mean.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(measured["std"], np.sqrt(variance), rtol=1e-6)


@pytest.mark.parametrize("at", [1, 7, 39])
def test_sums_do_not_depend_on_the_parts_that_records_come_in(at):
    found, whole, parts = rows(40), latents.Sums(), latents.Sums()
    whole.add(found)
    parts.add(found[:at])
    parts.add(found[at:])
    assert parts.plain() == whole.plain()


def test_normalized_latents_have_the_deviation_and_come_back():
    manifest = {"statistics": {"latent": {"mean": [1.0, -2.0, 0.5], "std": [3.0, 0.2, 1.0]}}}
    mean, std = latents.measured(types.SimpleNamespace(manifest=manifest))
    normalizer = Normalizer(0.5 * np.array(mean), 0.5 * np.array(std), 0.7)
    given = record(flipped=False)
    plain = latents.Drawn(scaling=0.5)(given, generator(5))["latent"]
    how = {"mean": normalizer.mean, "std": normalizer.std, "deviation": 0.7}
    found = latents.Drawn(scaling=0.5, **how)(given, generator(5))["latent"]
    np.testing.assert_allclose(found, normalizer(plain), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(normalizer.inverse(found), plain, rtol=1e-5, atol=1e-6)
    # a latent one deviation above the mean is 0.7
    np.testing.assert_allclose(normalizer(normalizer.mean + normalizer.std), 0.7, rtol=1e-6)
    assert Normalizer()(plain) is plain and Normalizer().inverse(plain) is plain


def test_stores_that_no_generator_of_latents_can_read():
    def store(**manifest):
        found = {"fields": {"latent_mean": ["float16", [1]]}, "view": "center crop"} | manifest
        return types.SimpleNamespace(manifest=found, directory="W/codes/train")

    with pytest.raises(UserError, match="no statistics of latents; run the codes step again"):
        latents.measured(store())
    constant = {"latent": {"mean": [0.0, 0.0], "std": [1.0, 0.0], "count": 4}}
    with pytest.raises(UserError, match="channel 1 never varies"):
        latents.measured(store(statistics=constant))
    with pytest.raises(UserError, match="W/codes/train has no latents; set codes.autoencoder='a'"):
        latents.check(store(fields={}), "abc", "a")
    ours = {"latents": {"autoencoder": "abc", "image": 16}}
    latents.check(store(view=ours), "abc", "a")
    for view in (ours, "center crop"):
        with pytest.raises(UserError, match="latents of another autoencoder .* as a.path"):
            latents.check(store(view=view), "xyz", "a")


LATENT = {
    "autoencoder.path": "vae",
    "autoencoder.model.channels": (8, 16),
    "codes.autoencoder": "autoencoder",
    "generator.latents": True,
    "generator.model.image": 8,
    "generator.model.channels": 4,
    "steps": ("encoder", "codes", "generator"),
}
TINY = {"autoencoder.model": None, "autoencoder.model.name": "tiny"}
WRONG = {
    "generator draws latents, and codes.autoencoder='' makes none: set --config.codes.autoencoder="
    "autoencoder": {"codes.autoencoder": ""},
    "kept beside codes and generator.codes=''": {
        "generator.codes": "",
        "generator.model.positions": 0,
    },
    "draws 16x16x4, but latents of 16-pixel images by autoencoder .kl. are 8x8x4: set --config."
    "generator.model.image=8 --config.generator.model.channels=4": {"generator.model.image": 16},
    "draws 8x8x3, but .* are 8x8x4": {"generator.model.channels": 3},
    "draws 8x8x4, but .* .tiny. are 2x2x32": TINY,
    "data.image=15 has no latents: .* a multiple of 2": {"data.image": 15},
    "codes.autoencoder='other' is not a section": {
        "codes.autoencoder": "other",
        "generator.latents": False,
    },
    "generator needs the weights of autoencoder: give --config.autoencoder.path=DIR, made by dlc "
    "import vae": {"autoencoder.path": ""},
    "codes needs the weights": {"autoencoder.path": "", "generator.latents": False},
    "autoencoder.path=nowhere holds no autoencoder": {"autoencoder.path": "nowhere"},
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Where autoencoder.path=vae is a folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vae" / "checkpoints").mkdir(parents=True)


@pytest.mark.parametrize("said", WRONG)
def test_a_recipe_whose_latents_do_not_fit_is_refused(said, here):
    config = load("quickstart.py:tiny", LATENT | WRONG[said])
    with pytest.raises(UserError, match=said):
        recipe.check(config)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        TINY | {"generator.model.image": 2, "generator.model.channels": 32},
        {"steps": ("encoder",), "autoencoder.path": ""},  # nothing needs it yet
        {"codes.autoencoder": "", "generator.latents": False, "generator.model.image": 16},
    ],
)
def test_recipes_whose_latents_fit(changed, here):
    config = load("quickstart.py:tiny", LATENT | changed)
    recipe.check(config)
    used = {"autoencoder": "generator"} if config.generator.latents else {}
    assert recipe.autoencoders(config) == (used if "generator" in config.steps else {})


@pytest.mark.parametrize("name", ["imagenet256.py", "image_folder.py:latent256"])
def test_the_recipes_of_latents_lack_only_the_weights(name, here):
    lines = {"data.path": "images"} if "folder" in name else {}
    with pytest.raises(UserError, match="needs the weights of autoencoder"):
        recipe.check(load(name, lines))
    recipe.check(load(name, lines | {"autoencoder.path": "vae"}))


def test_a_recipe_of_before_there_were_two_kinds_is_of_the_first():
    config = load("quickstart.py:tiny", LATENT).to_dict()
    del config["autoencoder"]["model"]["name"]
    assert recipe.expansion.present(config)["autoencoder"]["model"]["name"] == "kl"
