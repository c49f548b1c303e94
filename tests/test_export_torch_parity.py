"""PyTorch's code of an exported folder against the networks and samplers that it is of, in float32.

Within 1e-5 of the largest output, and 2 of 255 in images of the same noise.
"""

import functools
import json

import hub_folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes
from hub_folders import close, loaded, modeling
from small_models import (
    L,
    V,
    apply,
    drawn,
    integers,
    normal,
    small_dit,
    small_encoder,
    small_prior,
)

from dlc_jax.diffusion import guidance, sample
from dlc_jax.diffusion.code_sampler import CodeSampler
from dlc_jax.diffusion.ddpm import DDPM
from dlc_jax.diffusion.edm import EDM
from dlc_jax.diffusion.linear import Linear
from dlc_jax.diffusion.masked import Masked
from dlc_jax.diffusion.noise import Noise, total
from dlc_jax.interop import hub_config, hub_names, slots
from dlc_jax.models.vit import standardize
from dlc_jax.networks import KINDS
from dlc_jax.networks.generator import sized, to_uint8
from dlc_jax.networks.network import keys
from dlc_jax.typing import Given

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="parity needs the extra torch")
M = modeling()
T = np.array([0.2, 0.9], np.float32)


def tensor(array):
    return torch.tensor(np.asarray(array))


ENCODERS = {
    "plain": {},
    "no registers": {"registers": 0, "layer_scale": 1.0, "pos_resize": "plain"},
    "gated": {"mlp": "swiglu", "readout": "shared", "layer_scale": 1.0},
    "sincos": {"pos": "sincos", "readout": "pos-shared", "layer_scale": 1.0},
    "rope": {"pos": "rope", "qk_norm": True, "layer_scale": 1.0},
}


@pytest.mark.parametrize("size", [8, 12])
@pytest.mark.parametrize("case", ENCODERS)
def test_encoder(case, size, tmp_path):
    model = small_encoder(**ENCODERS[case])
    variables = drawn(model, jnp.zeros((1, 8, 8, 3)))
    images = np.random.default_rng(0).integers(256, size=(3, size, size, 3), dtype=np.uint8)
    expected = apply(model, variables, standardize(jnp.asarray(images)))
    part = hub_folders.encoder(model, variables, size)
    found = M.DLCPipeline(encoder=loaded("DLCEncoder", tmp_path / "encoder", part))
    close(found.logits(images), expected["logits"])
    np.testing.assert_array_equal(found.encode(images), expected["logits"].argmax(-1))
    simplices = found.simplices(images)
    close(simplices, expected["simplices"])
    close(found.encoder.vector(simplices), expected["vector"])


RECIPES = [
    "imagenet256.py",
    "imagenet256.py:sedd,32x4096",
    "imagenet256_fast.py",
    "image_folder.py",
]


@pytest.mark.parametrize("name", RECIPES)
def test_networks_of_recipes_have_the_same_names_and_shapes(name):
    """At their true sizes, without any memory."""
    config = recipes.load(name)
    for step in ("encoder", "prior", "generator"):
        settings = {"mesh": None, "batch": 1, "dtype": None}
        network = KINDS[config[step].stage](config, "nowhere", step, **settings)
        unread = hub_names.TRAINING.get(config[step].stage, ())
        shapes = {
            path: shape
            for path, shape in slots.shapes_of(network.shapes).items()
            if not path.startswith(unread)
        }
        table = hub_names.encoder(shapes) if step == "encoder" else hub_names.network(shapes)
        given = {key: row.shape for key, row in table.items()}
        if step == "encoder":
            given |= {key: array.shape for key, array in hub_names.scales(shapes).items()}
            made = hub_config.encoder(config[step].model, network.size, "float32")
        elif step == "prior":
            made = hub_config.prior(config[step], {})
        else:
            sampler = config.samples.sampler
            how = hub_config.sampler(sampler, config[step].process.name, "samples", plain=False)
            outputs = network.model.out_channels
            made = hub_config.generator(config[step], outputs, how, None)
        with torch.device("meta"):
            kind = {"encoder": M.DLCEncoder, "prior": M.DLCPrior, "generator": M.DLCGenerator}
            found = kind[step](json.loads(json.dumps(made))).state_dict()
        assert {key: tuple(leaf.shape) for key, leaf in found.items()} == given


PRIORS = {
    "plain": {},
    "each position": {"per_position": True},
    "sigma": {"sigma_conditioning": True},
    "all": {"per_position": True, "sigma_conditioning": True, "classes": 3},
}
CODES, LABEL = integers(3, V, 2, L), integers(4, 3, 2)
SIGMA = np.array([0.1, 2.0], np.float32)


@functools.cache
def prior(case):
    model = small_prior(**PRIORS[case])
    sigma = SIGMA if model.sigma_conditioning else None
    label = LABEL if model.classes else None
    return model, drawn(model, CODES, sigma, label), sigma, label


@pytest.mark.parametrize("case", PRIORS)
def test_prior(case, tmp_path):
    model, variables, sigma, label = prior(case)
    noisy = CODES.at[:, 1].set(V)
    found = loaded("DLCPrior", tmp_path / "prior", hub_folders.prior(model, variables))
    given = [None if part is None else tensor(part) for part in (sigma, label)]
    close(found(tensor(noisy), *given), apply(model, variables, noisy, sigma, label))


def test_weights_of_bfloat16(tmp_path):
    """They are the rounded ones, and may be read as float32."""
    model, variables, sigma, label = prior("all")
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(leaf.dtype), variables)
    expected = apply(model, rounded, CODES, sigma, label)
    assert np.abs(expected - apply(model, variables, CODES, sigma, label)).max() > 1e-3
    loaded("DLCPrior", tmp_path / "prior", hub_folders.prior(model, variables), "bfloat16")
    found = M.DLCPrior.from_pretrained(tmp_path / "prior", dtype=torch.float32)
    close(found(tensor(CODES), tensor(sigma), tensor(label)), expected)
    narrow = M.DLCPrior.from_pretrained(tmp_path / "prior")
    assert narrow.final.weight.dtype == torch.bfloat16
    close(narrow(tensor(CODES), tensor(sigma), tensor(label)), expected, 0.03)


SCHEDULES = {"linear": {}, "log_linear": {"eps": 0.6}, "geometric": {"largest": 2.0}}


DRAWS = [(0, "linear", 1.0), (0, "log_linear", 0.0), (2, "log_linear", 0.5), (3, "geometric", 1.0)]


@pytest.mark.parametrize("calls, schedule, temperature", DRAWS)
def test_codes_of_the_same_noise_are_the_same(calls, schedule, temperature, tmp_path):
    """With a part of them known; a network that is told sigma, and the scores of all schedules."""
    model, variables, *_ = prior("all")
    noise = Noise(schedule=schedule, **SCHEDULES[schedule])
    said = {"schedule": schedule, "eps": noise.eps, "largest": noise.largest}
    part = hub_folders.prior(model, variables, said)
    found = loaded("DLCPrior", tmp_path / "prior", part)
    label, draws = integers(4, 3, 16), keys(0, 16)
    prompt, known = integers(5, V, 16, L), np.arange(L) == np.arange(16)[:, None] % 5

    def predict(noisy, hidden):
        sigma = total(jnp.minimum(hidden, noise.hidden(1.0)))
        return model.apply(variables, noisy, sigma, label)

    sampler = CodeSampler(calls=calls, temperature=temperature)
    how = {"prompt": prompt, "known": jnp.asarray(known)}
    expected = jax.jit(
        lambda: sampler.draw(Masked(noise=noise), predict, draws, L, V, **how).codes
    )()
    order, value = jax.vmap(jax.random.split)(draws).transpose()
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (L,)))(order)

    def gumbel(key):
        each = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(L))
        return jax.vmap(lambda key: jax.random.gumbel(key, (V,), mode="high"))(each)

    own = tensor(uniform), tensor(jax.vmap(gumbel)(value))
    how = {"steps": calls or None, "temperature": temperature, "labels": tensor(label)}
    codes = M.draw_codes(found, tensor(prompt), tensor(known), own, **how)
    np.testing.assert_array_equal(codes, expected)
    assert (codes.numpy()[~known] != np.asarray(prompt)[~known]).any()


def test_surprise(tmp_path):
    model, variables, *_ = prior("plain")
    found = loaded("DLCPrior", tmp_path / "prior", hub_folders.prior(model, variables))
    order = jax.vmap(lambda key: jax.random.permutation(key, L))(keys(0, 2))
    bits = np.zeros((2, L))
    for index in range(3):
        hidden = np.asarray(order) % 3 == index
        logits = apply(model, variables, jnp.where(hidden, V, CODES))
        p = jax.nn.log_softmax(logits)
        each = -np.take_along_axis(np.asarray(p), np.asarray(CODES)[..., None], -1)[..., 0]
        bits = np.where(hidden, each / np.log(2), bits)
    close(M.surprise(found, tensor(CODES), tensor(order), calls=3), bits)


MODERN = {"block": "modern", "qk_norm": True, "context": 2, "head_width": 24, "head_depth": 2}
GENERATORS = {
    "dit": {"qk_norm": True, "classes": 3, "out_channels": 6, "mlp_ratio": 3.0},
    "without codes": {"positions": 0, "values": 0, "classes": 3},
    "cross": {"cross": 2, "context": 4, "embedding": 6},
    "early": {"early": 1, "align": 2, "align_width": 5},
    "modern": MODERN | {"depth": 6, "route": True, "early": 3},
    "modern, late": MODERN | {"depth": 6, "route": True, "early": 4, "cross": 4},
}
GIVEN = {"codes": CODES, "label": LABEL, "embedding": normal(6, 2, 6)}


@pytest.mark.parametrize("case", GENERATORS)
def test_generator(case, tmp_path):
    """Under all that it reads, hard codes and soft ones, and under its null condition."""
    model = small_dit(**GENERATORS[case])
    read = {"codes": model.positions, "label": model.classes, "embedding": model.embedding}
    given = {name: GIVEN[name] for name, size in read.items() if size}
    x, soft = normal(0, 2, 16, 16, 3), jax.nn.softmax(normal(7, 2, L, V))
    variables = drawn(model, x, T, Given(**given))
    found = loaded("DLCGenerator", tmp_path / "it", hub_folders.generator(model, variables))
    softly = [given | {"codes": soft}] if model.positions else []
    conditions = (given, {}, *softly) if case == "cross" else (given, {})
    for condition in conditions:
        ours = Given(**condition)
        expected = apply(model, variables, x, T, ours, method="all")
        theirs = found.embed(**{name: tensor(part) for name, part in condition.items()})
        weak = model.early > 0
        out = found(tensor(x), tensor(T), theirs, early=weak)
        for ours, theirs in zip(expected, out if weak else [out], strict=False):
            close(theirs, ours)


SAMPLERS = {
    "v heun": (Linear(prediction="v", shift=0.0), {"method": "heun", "times": "cosine"}, {}),
    "x euler": (Linear(prediction="x"), {"method": "euler"}, {"scale": 1.5, "channels": 2}),
    "x internal": (Linear(prediction="x"), {}, {"scale": 2.0, "base": "internal"}),
    "ddpm ancestral": (DDPM(steps=50), {"method": "ancestral"}, {"scale": 1.4}),
    "ddpm ddim": (DDPM(steps=50, learned_variance=False), {"method": "ddim", "eta": 0.5}, {}),
    "ddpm posterior": (DDPM(steps=50, learned_variance=False), {"method": "ancestral"}, {}),
    "edm heun": (EDM(), {"method": "heun"}, {"scale": 1.5, "interval": (0.2, 0.9)}),
}


@pytest.mark.parametrize("case", SAMPLERS)
def test_images_of_the_same_noise(case, tmp_path):
    process, fields, how = SAMPLERS[case]
    how, steps = guidance.Guidance(**how), 5
    sampler = sample.Sampler(steps=steps, **fields)
    model = sized(small_dit(depth=3, early=1), process)
    codes, draws, shape = integers(3, V, 8, L), keys(2, 8), (8, 8, 3)
    variables = drawn(model, normal(0, 8, *shape), np.zeros(8, np.float32), codes, scale=0.1)
    variables["params"]["code_table"]["table"] *= 20  # so that guidance matters

    def predictor(condition):
        def predict(x, t):
            out = model.apply(variables, *process.inputs(x, t), condition, method="all")
            pair = tuple(process.predict(each, x, t) for each in (out.output, out.early))
            return pair if how.base else pair[0]

        return predict

    def draw():
        found = predictor(model.apply(variables, codes, method="embed"))
        if how.base:
            guided = guidance.guided_pair(found, how)
        else:
            weak = predictor(model.apply(variables, None, method="embed"))
            guided = guidance.guided(found, weak, how)
        return sampler.draw(process, guided, draws, shape)

    expected = jax.jit(draw)()
    streams = sample._fold(draws, sample.STEPS)
    fresh = [
        tensor(sample._normal(sample._fold(sample._fold(streams, n), 1), shape))
        for n in range(steps)
    ]
    said = {name: getattr(process, name) for name in process.__dataclass_fields__}
    said["name"] = {Linear: "linear", DDPM: "ddpm", EDM: "edm"}[type(process)]
    part = hub_folders.generator(model, variables, said)
    found = M.DLCPipeline(generator=loaded("DLCGenerator", tmp_path / "generator", part))
    fields = {"steps": steps, "method": sampler.method, "times": sampler.times, "eta": sampler.eta}
    fields |= {"guidance": how.scale, "interval": how.interval, "channels": how.channels}
    noise = tensor(sample._normal(draws, shape))
    images = found.decode(tensor(codes), noise=noise, fresh=fresh, base=how.base, **fields).numpy()
    expected = np.asarray(to_uint8(expected))
    assert ((expected > 0) & (expected < 255)).mean() > 0.3
    assert np.abs(images.astype(int) - expected).max() <= 2
    fields |= {"interval": (0.0, 1.0), "channels": None, "guidance": 1 + 2 * (how.scale == 1)}
    other = found.decode(tensor(codes), noise=noise, fresh=fresh, **fields).numpy()
    assert np.abs(other.astype(int) - expected).mean() > 1
