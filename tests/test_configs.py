"""Every recipe: what it expands to, and that each of its steps builds and lowers from shapes alone.

UPDATE_GOLDEN=1 rewrites the full configs in tests/goldens/.
"""

import ast
import functools
import itertools
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import recipes

from dlc_jax import agenda, optim, parallel, recipe, train
from dlc_jax.errors import UserError
from dlc_jax.interop import slots, torch_names
from dlc_jax.models.encoder import Encoder
from dlc_jax.stage import Stage
from dlc_jax.stages import STAGES

ROOT = Path(__file__).parents[1]
GOLDENS = Path(__file__).parent / "goldens"
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
SIZES = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
    "8B": (3584, 36, 28),
}


def load(path, variant=""):
    """The full config of a recipe's file."""
    return recipes.load(f"{Path(path).name}:{variant}")


imagenet = functools.cache(functools.partial(load, "imagenet256.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_docstring_has_the_command(path):
    assert f"--config=configs/{path.name}" in (ast.get_docstring(ast.parse(path.read_text())) or "")


def test_recipes_are_short():
    lines = {path.stem: len(path.read_text().splitlines()) for path in CONFIGS}
    assert sum(lines[name] for name in ("quickstart", "image_folder", "imagenet256")) <= 300
    assert all(count <= 140 for count in lines.values())


# ---- what they expand to


FULL = {
    "quickstart": ("", "32px", "tiny", "ablation"),
    "image_folder": ("", "28px", "64px", "long", "tiny", "latent256"),
    "imagenet256": ("", "8B", "32x4096", "512px"),
    "imagenet256_fast": ("", "B"),
    "imagenet512": ("",),
}


@pytest.mark.parametrize(
    "name, variant", [(name, variant) for name, variants in FULL.items() for variant in variants]
)
def test_full_config(name, variant):
    """Every field; a variant's golden has the fields that it changes."""
    fields = recipe.flat(recipes.load(f"{name}.py:{variant}").to_dict())
    own = recipe.flat(recipes.load(f"{name}.py").to_dict()) if variant else {}
    new = [field for field in fields if field not in own or own[field] != fields[field]]
    lines = [f"{field} = {fields[field]!r}" for field in new]
    lines += [f"without {field}" for field in own if field not in fields]
    golden = GOLDENS / f"config_{'_'.join(filter(None, (name, variant)))}.txt"
    text = "\n".join(lines) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text(), f"{golden} differs; UPDATE_GOLDEN=1 rewrites it"


@pytest.mark.parametrize(
    "variant, steps",
    [
        ("generator,B", ("generator",)),
        ("encoder,codes", ("encoder", "codes")),
        ("32x4096", ("encoder", "codes", "probe", "prior", "generator", "samples")),
    ],
)
def test_words_of_a_variant(variant, steps):
    config = imagenet(variant)
    assert config.steps == steps
    assert config.generator.model.width == (768 if "B" in variant else 1152)
    codes = (32, 4096) if "4096" in variant else (512, 256)
    for model in (config.encoder.model.simplicial, config.prior.model, config.generator.model):
        assert (model.positions, model["values"]) == codes
    with pytest.raises(UserError, match="unknown variant 'tiny-ish'; .* has XL, 512x256, .*codes"):
        load("imagenet256.py", f"{variant},tiny-ish")


# ---- what they build


def lowered(config, step, workdir):
    """Programs of a step as StableHLO."""
    made = STAGES[config[step].stage](config, step=step, workdir=workdir)
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    if isinstance(made, Stage):
        return [train.lower(made, mesh).as_text()]
    return [each.lower(mesh).as_text() for each in made.programs.values()]


def every_step():
    for path in CONFIGS:
        marks = [] if path.stem == "quickstart" else [pytest.mark.slow]
        for name in load(path).steps:
            yield pytest.param(path, name, marks=marks, id=f"{path.stem}-{name}")


@pytest.mark.parametrize("path, name", list(every_step()))
def test_builds_and_lowers_without_data_or_checkpoints(path, name, tmp_path):
    assert all("dot_general" in text for text in lowered(load(path), name, tmp_path))
    assert not list(tmp_path.iterdir())


def test_every_imagenet_variant_builds_any_step_alone(tmp_path):
    """Shapes of codes, latents and networks fit each other, for all combinations of words."""
    codes = ("32x4096", "128x1024", "512x256")
    for size, code, pixels in itertools.product(SIZES, codes, (256, 512)):
        positions, values = map(int, code.split("x"))
        for step in imagenet().steps:
            config = imagenet(f"{code},{step},{pixels}px,{size}")
            assert config.steps == (step,) and config.data.image == pixels
            made = STAGES[config[step].stage](config, step=step, workdir=tmp_path)
            programs = [made] if isinstance(made, Stage) else made.programs.values()
            assert all(each.flops > 0 for each in programs)
            if isinstance(made, Stage):
                model = config[step].model
                model = model.simplicial if step == "encoder" else model
                assert (model.positions, model["values"]) == (positions, values)
                assert jax.tree.leaves(jax.eval_shape(made.init, jax.random.key(0)))
            if step == "prior":
                assert made.batch_spec["codes"].shape == (512, positions)
            if step == "generator":
                assert (model.width, model.depth, model.heads) == SIZES[size]
                assert made.batch_spec["latent"].shape == (256, pixels // 8, pixels // 8, 4)
    assert not list(tmp_path.iterdir())


def told_by_dinov2(name, depth):
    """How the reference treats a parameter, by its own name for it.

    (factor of the learning rate, decays, is frozen at first, is clipped with the heads)
    """
    rank, head = depth + 1, name.startswith(("dino_head.", "ibot_head."))
    if not head:
        if re.match("(pos_embed|patch_embed|mask_token|cls_token|register_tokens)", name):
            rank = 0
        elif block := re.match(r"blocks\.(\d+)\.", name):
            rank = int(block[1]) + 1
    decays = not (name.endswith(".bias") or "norm" in name or "gamma" in name)
    factor = 0.9 ** (depth + 1 - rank) * (0.2 if "patch_embed" in name else 1)
    return factor, decays, "last_layer" in name, head


@pytest.mark.parametrize(
    "readout, separate_head", [("plain", False), ("shared", True), ("pos-shared", True)]
)
@pytest.mark.parametrize("name", ["imagenet256.py", "image_folder.py:latent256"])
def test_every_parameter_is_treated_as_dinov2_does(name, readout, separate_head, tmp_path):
    """By name: learning rate, weight decay, what is frozen at first, what is clipped together."""
    fields = {"simplicial.readout": readout, "separate_head": separate_head}
    config = recipes.load(name, {f"encoder.model.{key}": value for key, value in fields.items()})
    stage = STAGES["encoder"](config, step="encoder", workdir=tmp_path)
    params, _ = jax.eval_shape(stage.init, jax.random.key(0))
    rule, depth = config.encoder.optimizer, config.encoder.model.backbone.depth
    (_, until), *others = rule.freeze
    assert not others
    model, optimizer = recipe.build(Encoder, config.encoder.model), recipe.build(optim.AdamW, rule)
    start, later = (
        slots.flat(optimizer._factors(params, count, model.layer)) for count in (until - 1, until)
    )
    decays = slots.flat(optim.named(params, rule.decayed, "decayed"))
    seen = set()
    for name, slot in torch_names.official(slots.shapes_of(params)).items():
        seen.add(slot.path)
        number = int(name.split(".")[1]) if name.startswith("blocks.") else ...
        factors = [np.squeeze(found[slot.path])[number] for found in (start, later)]
        first, factor = (np.broadcast_to(each, ()) for each in factors)
        patterns = config.encoder.train.clip_separately
        apart = any(re.fullmatch(pattern, slot.path) for pattern in patterns)
        rate, *rest = told_by_dinov2(name, depth)
        assert factor == pytest.approx(rate, rel=1e-5), name
        assert [decays[slot.path], first == 0, apart] == rest, name
    assert seen == decays.keys()


CHANGED = [  # the words that change a step
    *itertools.product(("encoder", "codes", "prior"), ("32x4096", "128x1024")),
    *itertools.product(
        ("generator", "samples"),
        ("32x4096", "128x1024", "512px", "S", "B", "L", "8B", "8B,512px,32x4096"),
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("step, variant", CHANGED)
def test_imagenet_variants_lower(step, variant, tmp_path):
    assert all("dot_general" in text for text in lowered(imagenet(variant), step, tmp_path))


def test_a_generator_of_latents_may_read_classes_instead_of_codes(tmp_path, monkeypatch):
    """Or nothing. The store's latents serve it; its samples ask no prior."""
    monkeypatch.setattr(agenda, "_check_autoencoders", lambda *_: None)  # no weights are here
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    none = {"generator.model.positions": 0, "generator.model.values": 0}
    small = {"generator.model.width": 64, "generator.model.depth": 2, "generator.model.heads": 2}
    for classes in (0, 1000):
        lines = none | small | {"generator.model.classes": classes}
        lines |= {"steps": ("generator", "samples")}
        made = agenda.make(recipes.load("imagenet256.py", lines), tmp_path, mesh)
        assert ("label" in made["generator"].batch_spec) == (classes > 0)
        assert "codes" not in made["generator"].batch_spec
        assert list(made["samples"].programs) == ["decode"]
