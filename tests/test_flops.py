"""FLOP formulas: every term against the traced program, whole models against the compiler's count.

The compiler's count (`cost_analysis` of a program compiled for the CPU) has the elementwise work
too, about 1 % at these widths. It counts the body of a loop once, so the layers are unrolled; one
and two layers are compiled and extrapolated to all.
"""

import functools
import importlib.util
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dlc_jax.diffusion.guidance import Guidance, guided
from dlc_jax.diffusion.masked import CodeSampler
from dlc_jax.diffusion.sample import Sampler
from dlc_jax.models import simplicial, vit
from dlc_jax.models.dit import DiT
from dlc_jax.models.masked_transformer import MaskedTransformer
from dlc_jax.stages import STAGES

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
KEY = jax.random.key(0, impl="rbg")
B = 2


def load(name, variant=""):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant)


def products(jaxpr):
    """FLOPs of all matrix products of a traced program, exactly: 2 for each multiply-add."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            summed = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * eqn.outvars[0].aval.size * summed
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += times * products(inner)
    return total


def inputs(model, *, batch=B, image=None):
    """Abstract arguments of a forward pass."""
    if isinstance(model, MaskedTransformer):
        sigma = (jax.ShapeDtypeStruct((batch,), jnp.float32),) if model.sigma_conditioning else ()
        return jax.ShapeDtypeStruct((batch, model.positions), jnp.int32), *sigma
    side = image or model.image
    pixels = jax.ShapeDtypeStruct((batch, side, side, model.channels), jnp.float32)
    if not isinstance(model, DiT):
        return (pixels,)
    codes = (jax.ShapeDtypeStruct((batch, model.positions), jnp.int32),) if model.positions else ()
    return pixels, jax.ShapeDtypeStruct((batch,), jnp.float32), *codes


def forward(model, *, method=None, **given):
    """(function, abstract arguments) of a forward pass."""
    arguments = inputs(model, **given)
    variables = jax.eval_shape(functools.partial(model.init, KEY), *arguments)
    return functools.partial(model.apply, method=method), (variables, *arguments)


WIDTHS = {"width": 24, "depth": 3, "heads": 2, "mlp_ratio": 2.3}
ENCODER = {
    "image": 16,
    "patch": 4,
    "positions": 3,
    "values": 5,
    "prototypes": 7,
    "hidden": 9,
    "bottleneck": 6,
    "channels": 2,
}
TINY = {
    "vit": (vit, vit.ViT(image=16, patch=4, channels=2, **WIDTHS), {}, {}),
    "vit, no registers, another image": (
        vit,
        vit.ViT(16, 4, registers=0, pos="sincos", **WIDTHS),
        {"image": 8},
        {"image": 8},
    ),
    "vit, rope": (vit, vit.ViT(16, 4, pos="rope", **WIDTHS | {"width": 16}), {}, {}),
    "vit, swiglu": (vit, vit.ViT(16, 4, mlp="swiglu", **WIDTHS), {}, {}),
    "encoder": (simplicial, simplicial.Encoder(**ENCODER, **WIDTHS), {}, {}),
    "encoder, shared": (
        simplicial,
        simplicial.Encoder(readout="shared", **ENCODER, **WIDTHS),
        {},
        {},
    ),
    "encoder, pos-shared": (
        simplicial,
        simplicial.Encoder(readout="pos-shared", **ENCODER, **WIDTHS),
        {},
        {},
    ),
    "encoder, local crop": (
        simplicial,
        simplicial.Encoder(**ENCODER, pos="sincos", **WIDTHS),
        {"image": 12},
        {"image": 12},
    ),
    "encoder, codes": (
        simplicial,
        simplicial.Encoder(**ENCODER, **WIDTHS),
        {"codes": True},
        {"method": "codes"},
    ),
    "dit": (DiT, DiT(16, 3, 4, positions=3, values=5, qk_norm=True, **WIDTHS), {}, {}),
    "dit, no codes, more out": (
        DiT,
        DiT(16, 3, 2, positions=0, values=0, out_channels=6, **WIDTHS),
        {},
        {},
    ),
    "prior": (
        MaskedTransformer,
        MaskedTransformer(7, 5, per_position=True, **WIDTHS),
        {},
        {},
    ),
    "prior, sigma": (
        MaskedTransformer,
        MaskedTransformer(7, 5, sigma_conditioning=True, **WIDTHS),
        {},
        {},
    ),
}


@pytest.mark.parametrize("name", TINY)
def test_every_product_is_counted(name):
    module, model, options, call = TINY[name]
    function, arguments = forward(model, **call)
    traced = products(jax.make_jaxpr(function)(*arguments).jaxpr)
    assert module.flops(model, **options) * B == traced


@pytest.mark.parametrize("name", ["vit", "encoder"])
def test_drop_path_leaves_its_share_of_the_blocks(name):
    module, model, _, _ = TINY[name]
    function, (variables, images) = forward(model, batch=2 * 8)
    kept = jnp.zeros((model.depth, 2, 2, 6), jnp.int32)  # six of the eight rows of two groups
    traced = jax.make_jaxpr(lambda *arguments: function(*arguments, kept=kept))(variables, images)
    counted = products(traced.jaxpr)
    assert module.flops(model, drop_path=0.25) * 16 == counted


WHOLE = {  # at the paper's widths and depths
    "dit": (DiT, DiT(), None),
    "prior": (MaskedTransformer, MaskedTransformer(), None),
    "vit": (vit, vit.ViT(224, 14, **vit.SIZES["L"]), 224),
    "encoder, global": (
        simplicial,
        simplicial.Encoder(224, 14, positions=512, values=256, prototypes=65_536, **vit.SIZES["L"]),
        224,
    ),
    "encoder, local": (
        simplicial,
        simplicial.Encoder(224, 14, positions=512, values=256, prototypes=65_536, **vit.SIZES["L"]),
        98,
    ),
}


def extrapolate(count, depth):
    """From programs of one and of two layers to one of `depth`."""
    one, two = count(1), count(2)
    return one + (depth - 1) * (two - one)


@pytest.mark.parametrize("name", WHOLE)
def test_models_within_five_percent_of_the_compiler(name):
    module, model, image = WHOLE[name]

    def compiled(depth):
        function, arguments = forward(model.clone(depth=depth, unroll=0, remat="none"), image=image)
        return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]

    formula = module.flops(model) if image is None else module.flops(model, image=image)
    assert formula * B == pytest.approx(extrapolate(compiled, model.depth), rel=0.05)


@pytest.mark.parametrize("name", ["encoder", "prior", "generator"])
def test_stages_within_five_percent_of_the_compiler(name, tmp_path):
    config = load("imagenet256")
    section, depth = config[name], config[name].model.depth
    section.train.batch = B
    section.model.update(unroll=0, remat="none")
    if name == "encoder":
        # of 4 global and 16 local crops in a group exactly a quarter is dropped
        section.objective.update(koleo_group=B, mask_group=B, drop_path_group=B, drop_path=0.25)

    def made(depth):
        section.model.depth = depth
        return STAGES[name](config, step=name, workdir=tmp_path)

    def compiled(depth):
        stage = made(depth)
        params, extra = jax.eval_shape(stage.init, KEY)

        def gradient(params, ema, extra, batch, key):
            batch = jax.lax.stop_gradient(stage.prepare(params, ema, extra, batch, {}, 0, key))
            return jax.grad(lambda params: stage.loss(params, extra, batch, {}, 0, key)[0])(params)

        # a key of the kind that the recipes use
        key = jax.eval_shape(lambda: jax.random.key(0))
        lowered = jax.jit(gradient).lower(params, params, extra, stage.batch_spec, key)
        return lowered.compile().cost_analysis()["flops"]

    assert made(depth).flops == pytest.approx(extrapolate(compiled, depth), rel=0.05)


def test_codes_job_counts_one_batch_up_to_the_logits(tmp_path):
    config = load("imagenet256")
    job = STAGES["codes"](config, step="codes", workdir=tmp_path)
    model = simplicial.Encoder(**config.encoder.model)
    function, arguments = forward(model, method="codes", batch=config.codes.batch)
    assert job.programs["encode"].flops == products(jax.make_jaxpr(function)(*arguments).jaxpr)


@pytest.mark.parametrize(
    "method, scale, drawn",
    [("heun", 1.5, True), ("heun", 1.5, False), ("heun", 1.0, True), ("euler", 1.5, True)],
)
def test_samples_job_counts_the_calls_of_its_sampler(method, scale, drawn, tmp_path):
    config = load("imagenet256")
    config.samples.update(method=method, guidance=scale, sampling_steps=4)
    config.samples.codes = "codes" if drawn else ""
    if not drawn:
        config.generator.model.update(positions=0, values=0)
    codes, calls = (jnp.zeros((2, 3), jnp.int32) if drawn else None), []

    def velocity(x, t, codes):
        calls.append(t)
        return x

    with jax.disable_jit():  # loops and branches run as Python's, so that each call is seen
        function = guided(velocity, codes, Guidance(scale=scale if drawn else 1.0))
        keys = jax.random.split(jax.random.key(0), 2)
        Sampler(method=method, steps=4).draw(function, keys, (1,))
    job = STAGES["samples"](config, step="samples", workdir=tmp_path)
    once = DiT(**config.generator.model).flops()
    assert job.programs["decode"].flops == config.samples.batch * len(calls) * once


@pytest.mark.parametrize("calls", [0, 8])
def test_samples_job_counts_the_calls_of_the_prior(calls, tmp_path):
    config, seen = load("imagenet256", "32x4096"), []
    config.samples.calls = calls

    def logits(codes):
        seen.append(codes)
        return jnp.zeros((*codes.shape, 3))

    with jax.disable_jit():
        CodeSampler(calls=calls).draw(logits, jax.random.split(jax.random.key(0), 2), 32, 3)
    job = STAGES["samples"](config, step="samples", workdir=tmp_path)
    once = MaskedTransformer(**config.prior.model).flops()
    assert job.programs["sample_codes"].flops == config.samples.batch * len(seen) * once


def test_published_counts():
    """Per image, code or crop, in units of 1e9.

    Without registers, codes and heads where the figures that go around have none.
    """
    bare = DiT(positions=0, values=0)
    assert round(bare.flops() / 1e9, 1) == 237.2  # 118.6 multiply-adds, DiT's table 4
    plain = vit.ViT(224, 14, registers=0, **vit.SIZES["L"])
    with_registers = vit.ViT(224, 14, **vit.SIZES["L"])
    for model, expected in ((plain, [162.0, 30.5]), (with_registers, [164.6, 33.0])):
        found = [round(vit.flops(model, image=image) / 1e9, 1) for image in (224, 98)]
        assert found == expected
    assert round(MaskedTransformer().flops() / 1e9, 1) == 335.3


def test_encoder_step_of_the_paper(tmp_path):
    """1.64 TF an image; 2.18 without drop path, of which 2.161 is without masked patches."""
    config = load("imagenet256")

    def image(**changed):
        config.encoder.objective.update(changed)
        stage = STAGES["encoder"](config, step="encoder", workdir=tmp_path)
        return stage.flops / config.encoder.train.batch / 1e12

    assert round(image(), 2) == 1.64
    assert round(image(ibot=0.0), 3) == 1.629
    assert round(image(drop_path=0.0), 3) == 2.161
    whole = image(ibot=1.0)
    assert round(whole, 2) == 2.18
    # student forward and backward, teacher forward; half of two crops, 10 to 50 % of their patches
    head = 2.0 * (1024 * 2048 + 2048 * 2048 + 2048 * 256 + 256 * 65_536)
    assert whole - image(ibot=0.0) == pytest.approx(4 * head * 0.5 * 0.3 * 2 * 256 / 1e12)
