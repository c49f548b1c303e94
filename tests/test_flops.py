"""FLOP formulas: every term against the traced program, whole models against the compiler's count.

The compiler's count (`cost_analysis` of a program compiled for the CPU) has the elementwise work
too, about 1 % at these widths. It counts the body of a loop once, so the layers are unrolled; one
and two layers are compiled and extrapolated to all.
"""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dlc_jax import command, recipe
from dlc_jax.diffusion.code_sampler import CodeSampler
from dlc_jax.diffusion.guidance import Guidance, guided
from dlc_jax.diffusion.linear import Linear
from dlc_jax.diffusion.masked import Masked
from dlc_jax.diffusion.process import Prediction
from dlc_jax.diffusion.processes import PROCESSES
from dlc_jax.diffusion.sample import Sampler
from dlc_jax.models import vit
from dlc_jax.models.dit import DiT
from dlc_jax.models.encoder import Encoder
from dlc_jax.models.masked_transformer import MaskedTransformer
from dlc_jax.models.simplicial import DinoHead, Simplicial
from dlc_jax.networks.generator import sized
from dlc_jax.stages import STAGES
from dlc_jax.typing import Given

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
KEY = jax.random.key(0, impl="rbg")
B = 2


def load(name, variant=""):
    return command.parse(["dlc", f"--config={CONFIGS}/{name}.py:{variant}"])[0]


def products(jaxpr):
    """FLOPs of all matrix products of a traced program, exactly: 2 for each multiply-add.

    A convolution counts its zeros beyond the edges, too.
    """
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            total += 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[1].aval.shape[:-1])
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
        sigma = jax.ShapeDtypeStruct((batch,), jnp.float32) if model.sigma_conditioning else None
        label = jax.ShapeDtypeStruct((batch,), jnp.int32) if model.classes else None
        return jax.ShapeDtypeStruct((batch, model.positions), jnp.int32), sigma, label
    body = model.backbone if isinstance(model, Encoder) else model
    side = image or body.image
    pixels = jax.ShapeDtypeStruct((batch, side, side, body.channels), jnp.float32)
    if not isinstance(model, DiT):
        return (pixels,)
    times = jax.ShapeDtypeStruct((batch,), jnp.float32)
    codes = jax.ShapeDtypeStruct((batch, model.positions), jnp.int32) if model.positions else None
    if not model.embedding:
        return pixels, times, codes
    embedding = jax.ShapeDtypeStruct((batch, model.embedding), jnp.float32)
    return pixels, times, Given(codes, embedding=embedding)


def forward(model, *, method=None, **given):
    """(function, abstract arguments) of a forward pass."""
    arguments = inputs(model, **given)
    variables = jax.eval_shape(functools.partial(model.init, KEY), *arguments)
    return functools.partial(model.apply, method=method), (variables, *arguments)


WIDTHS = {"width": 24, "depth": 3, "heads": 2, "mlp_ratio": 2.3}


def encoder(readout="plain", **fields):
    backbone = vit.ViT(image=16, patch=4, channels=2, **WIDTHS, **fields)
    head = Simplicial(positions=3, values=5, readout=readout)
    return Encoder(backbone, head, DinoHead(prototypes=7, hidden=9, bottleneck=6))


def everything(**fields):
    """A DiT with all that it may have."""
    tokens = {"context": 3, "cross": 2, "early": 3, "align": 5, "align_width": 7}
    head = {"head_width": 16, "head_depth": 2, "route": True, "embedding": 9, "classes": 3}
    settings = WIDTHS | {"depth": 7} | tokens | head | fields
    return DiT(16, 3, 4, positions=6, values=5, **settings)


TINY = {
    "vit": (vit.ViT(image=16, patch=4, channels=2, **WIDTHS), {}, {}),
    "vit, no registers, another image": (
        vit.ViT(16, 4, registers=0, pos="sincos", **WIDTHS),
        {"image": 8},
        {"image": 8},
    ),
    "vit, rope": (vit.ViT(16, 4, pos="rope", **WIDTHS | {"width": 16}), {}, {}),
    "vit, swiglu": (vit.ViT(16, 4, mlp="swiglu", **WIDTHS), {}, {}),
    "encoder": (encoder(), {}, {}),
    "encoder, shared": (encoder(readout="shared"), {}, {}),
    "encoder, pos-shared": (encoder(readout="pos-shared"), {}, {}),
    "encoder, local crop": (encoder(pos="sincos"), {"image": 12}, {"image": 12}),
    "encoder, codes": (encoder(), {"codes": True}, {"method": "codes"}),
    "dit": (DiT(16, 3, 4, positions=3, values=5, qk_norm=True, **WIDTHS), {}, {}),
    "dit, no codes, more out": (
        DiT(16, 3, 2, positions=0, values=0, out_channels=6, **WIDTHS),
        {},
        {},
    ),
    "dit, every option": (everything(), {}, {}),
    "dit, in training": (everything(), {"training": True}, {"method": "all"}),
    "dit, modern": (everything(block="modern"), {"training": True}, {"method": "all"}),
    "prior": (MaskedTransformer(7, 5, per_position=True, **WIDTHS), {}, {}),
    "prior, sigma": (MaskedTransformer(7, 5, sigma_conditioning=True, **WIDTHS), {}, {}),
    "prior, classes": (MaskedTransformer(7, 5, classes=3, **WIDTHS), {}, {}),
}


@pytest.mark.parametrize("name", TINY)
def test_every_product_is_counted(name):
    model, options, call = TINY[name]
    function, arguments = forward(model, **call)
    traced = products(jax.make_jaxpr(function)(*arguments).jaxpr)
    assert model.flops(**options) * B == traced


@pytest.mark.parametrize("name", ["vit", "encoder"])
def test_drop_path_leaves_its_share_of_the_blocks(name):
    model, _, _ = TINY[name]
    depth = WIDTHS["depth"]
    function, (variables, images) = forward(model, batch=2 * 8)
    kept = jnp.zeros((depth, 2, 2, 6), jnp.int32)  # six of the eight rows of two groups
    traced = jax.make_jaxpr(lambda *arguments: function(*arguments, kept=kept))(variables, images)
    counted = products(traced.jaxpr)
    assert model.flops(drop_path=0.25) * 16 == counted


@pytest.mark.parametrize("training", [False, True])
def test_token_dropping_leaves_its_share_of_the_middle_blocks(training):
    model = everything()
    function, (variables, *given) = forward(model, method="all" if training else None)
    keep = jax.ShapeDtypeStruct((B, 5), jnp.int32)
    call = lambda *arguments, keep: function(*arguments, keep=keep)  # noqa: E731
    traced = jax.make_jaxpr(call)(variables, *given, keep=keep)
    assert model.flops(training=training, kept=5) * B == products(traced.jaxpr)


WHOLE = {  # at the paper's widths and depths
    "dit": (DiT(), None),
    "prior": (MaskedTransformer(), None),
    "vit": (vit.ViT(), 224),
    "encoder, global": (Encoder(), 224),
    "encoder, local": (Encoder(), 98),
}


def extrapolate(count, depth):
    """From programs of one and of two layers to one of `depth`."""
    one, two = count(1), count(2)
    return one + (depth - 1) * (two - one)


@pytest.mark.parametrize("name", WHOLE)
def test_models_within_five_percent_of_the_compiler(name):
    model, image = WHOLE[name]
    depth = model.backbone.depth if isinstance(model, Encoder) else model.depth

    def compiled(depth):
        changes = {"depth": depth, "unroll": 0, "remat": "none"}
        if isinstance(model, Encoder):
            changes = {"backbone": model.backbone.clone(**changes)}
        function, arguments = forward(model.clone(**changes), image=image)
        return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]

    formula = model.flops() if image is None else model.flops(image=image)
    assert formula * B == pytest.approx(extrapolate(compiled, depth), rel=0.05)


@pytest.mark.parametrize("name", ["encoder", "prior", "generator"])
def test_stages_within_five_percent_of_the_compiler(name, tmp_path):
    body = f"{name}.model.backbone" if name == "encoder" else f"{name}.model"
    changes = {f"{name}.train.batch": B, f"{body}.unroll": 0, f"{body}.remat": "none"}
    if name == "encoder":
        # of 4 global and 16 local crops in a group exactly a quarter is dropped
        groups = dict.fromkeys(("koleo_group", "mask_group", "drop_path_group"), B)
        objective = groups | {"drop_path": 0.25}
        changes |= {f"encoder.objective.{field}": value for field, value in objective.items()}
    depth = dict(recipe.flat(load("imagenet256").to_dict()))[f"{body}.depth"]

    def made(depth):
        config = recipe.changed(load("imagenet256"), changes | {f"{body}.depth": depth})
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
    model = recipe.build(Encoder, config.encoder.model)
    function, arguments = forward(model, method="codes", batch=config.codes.batch)
    assert job.programs["encode"].flops == products(jax.make_jaxpr(function)(*arguments).jaxpr)


@pytest.mark.parametrize(
    "method, scale, drawn",
    [("heun", 1.5, True), ("heun", 1.5, False), ("heun", 1.0, True), ("euler", 1.5, True)],
)
def test_samples_job_counts_the_calls_of_its_sampler(method, scale, drawn, tmp_path):
    sampler = {"method": method, "guidance.scale": scale, "steps": 4}
    changes = {f"samples.sampler.{field}": value for field, value in sampler.items()}
    if not drawn:
        model = dict.fromkeys(("generator.model.positions", "generator.model.values"), 0)
        changes |= {"samples.codes": ""} | model
    config = recipe.changed(load("imagenet256"), changes)
    calls = []

    def predict(x, t):
        calls.append(t)
        return Prediction(x, x)

    with jax.disable_jit():  # loops and branches run as Python's, so that each call is seen
        function = guided(predict, predict, Guidance(scale=scale if drawn else 1.0))
        keys = jax.random.split(jax.random.key(0), 2)
        Sampler(method=method, steps=4).draw(Linear(), function, keys, (1,))
    job = STAGES["samples"](config, step="samples", workdir=tmp_path)
    process = recipe.build(PROCESSES, config.generator.process)
    once = sized(recipe.build(DiT, config.generator.model), process).flops()
    assert job.programs["decode"].flops == config.samples.batch * len(calls) * once


@pytest.mark.parametrize("calls", [0, 8])
def test_samples_job_counts_the_calls_of_the_prior(calls, tmp_path):
    config = recipe.changed(load("imagenet256", "32x4096"), {"samples.code_sampler.calls": calls})
    seen = []

    def logits(codes, share):
        seen.append(codes)
        return jnp.zeros((*codes.shape, 3))

    with jax.disable_jit():
        keys = jax.random.split(jax.random.key(0), 2)
        CodeSampler(calls=calls).draw(Masked(), logits, keys, 32, 3)
    job = STAGES["samples"](config, step="samples", workdir=tmp_path)
    once = recipe.build(MaskedTransformer, config.prior.model).flops()
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
        found = [round(model.flops(image=image) / 1e9, 1) for image in (224, 98)]
        assert found == expected
    assert round(MaskedTransformer().flops() / 1e9, 1) == 335.3


def test_encoder_step_of_the_paper(tmp_path):
    """1.64 TF an image; 2.18 without drop path, of which 2.161 is without masked patches."""

    def image(**objective):
        changes = {f"encoder.objective.{field}": value for field, value in objective.items()}
        config = recipe.changed(load("imagenet256"), changes)
        stage = STAGES["encoder"](config, step="encoder", workdir=tmp_path)
        return stage.flops / config.encoder.train.batch / 1e12

    assert round(image(), 2) == 1.64
    assert round(image(ibot=0.0), 3) == 1.629
    unmasked = image(ibot=0.0, drop_path=0.0)
    assert round(unmasked, 3) == 2.161
    whole = image(ibot=1.0, drop_path=0.0)
    assert round(whole, 2) == 2.18
    # student forward and backward, teacher forward; half of two crops, 10 to 50 % of their patches
    head = 2.0 * (1024 * 2048 + 2048 * 2048 + 2048 * 256 + 256 * 65_536)
    assert whole - unmasked == pytest.approx(4 * head * 0.5 * 0.3 * 2 * 256 / 1e12)
