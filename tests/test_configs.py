"""Every recipe: its sections are its constructors' arguments, and each of its steps builds and lowers from shapes alone."""

import ast
import dataclasses
import importlib.util
import inspect
import itertools
import re
from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest

from dlc_jax import checkup, optim, parallel, train
from dlc_jax.data import sources
from dlc_jax.data.transforms import MultiCrop
from dlc_jax.evals.probe import Fit
from dlc_jax.interop import slots, torch_names
from dlc_jax.metrics import Log
from dlc_jax.models.dit import SIZES, DiT
from dlc_jax.models.masked_transformer import MaskedTransformer
from dlc_jax.models.simplicial import Encoder
from dlc_jax.stage import Plan, Stage
from dlc_jax.stages import STAGES, encoder, generator

ROOT = Path(__file__).parents[1]
IMAGENET = ROOT / "configs" / "imagenet256.py"
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
MODELS = {"encoder": Encoder, "prior": MaskedTransformer, "generator": DiT}
OBJECTIVES = {"encoder": encoder.Objective, "generator": generator.Objective}


def load(path, *variant):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*variant)


def arguments(constructor):
    if dataclasses.is_dataclass(constructor):  # linen modules have two fields of linen's own
        return {field.name for field in dataclasses.fields(constructor)} - {"parent", "name"}
    return set(inspect.signature(constructor).parameters)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_sections_list_every_argument_of_their_constructor(path):
    config = load(path)
    for name, section in config.items():
        if not isinstance(section, ml_collections.ConfigDict) or "stage" not in section:
            continue
        assert section.stage in STAGES, name
        if section.stage == "probe":
            assert set(section.fit) == arguments(Fit), name
        if "train" not in section:
            continue
        assert set(section.train) == arguments(Plan), name
        assert set(section.optimizer) == arguments(optim.make) - {"steps"}, name
        assert set(section.model) == arguments(MODELS[section.stage]), name
        if section.stage == "encoder":
            assert set(section.monitor) == arguments(checkup.Monitor), name
        if "grid" in section:
            assert set(section.grid) == arguments(generator.Grid), name
        if "objective" in section:
            assert set(section.objective) == arguments(OBJECTIVES[section.stage]), name
        if "crops" in section:
            assert all(set(kind) == arguments(MultiCrop) for kind in section.crops.values()), name
    assert set(config.mesh) == arguments(parallel.make_mesh) - {"devices"}
    assert set(config.log) == arguments(Log)
    assert set(config.data) == {"name"} | arguments(sources.SOURCES[config.data.name]) - {"split"}
    assert all(name in config for name in config.steps)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_docstring_has_the_command(path):
    assert f"--config=configs/{path.name}" in (ast.get_docstring(ast.parse(path.read_text())) or "")


def every_step():
    for path in CONFIGS:
        for name in load(path).steps:
            yield pytest.param(
                path, name, marks=[pytest.mark.slow] if path.stem != "quickstart" else [], id=f"{path.stem}-{name}"
            )


@pytest.mark.parametrize("path, name", list(every_step()))
def test_builds_and_lowers_without_data_or_checkpoints(path, name, tmp_path):
    config = load(path)
    made = STAGES[config[name].stage](config, step=name, workdir=tmp_path)
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    lowered = [train.lower(made, mesh)] if isinstance(made, Stage) else [each.lower(mesh) for each in made.programs.values()]
    assert all("dot_general" in each.as_text() for each in lowered)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variant", ["generator,B", "32x4096", "encoder,codes"])
def test_imagenet_variants(variant):
    config = load(ROOT / "configs" / "imagenet256.py", variant)
    if variant == "generator,B":
        assert config.steps == ("generator",) and config.generator.model.width == 768
    elif variant == "32x4096":
        assert (config.prior.model.positions, config.generator.model["values"], config.encoder.model.positions) == (32, 4096, 32)
    else:
        assert config.steps == ("encoder", "codes")
    with pytest.raises(ValueError, match="unknown variant 'tiny-ish'"):
        load(ROOT / "configs" / "imagenet256.py", "tiny-ish")


def test_every_imagenet_variant_builds_any_step_alone(tmp_path):
    """All combinations of words, and all steps of each: the shapes of codes, latents and networks fit each other."""
    shapes = SIZES | {"8B": {"width": 3584, "depth": 36, "heads": 28}}
    for size, code, pixels in itertools.product(shapes, ("32x4096", "128x1024", "512x256"), (256, 512)):
        positions, values = map(int, code.split("x"))
        for step in load(IMAGENET).steps:
            config = load(IMAGENET, f"{code},{step},{pixels}px,{size}")
            assert config.steps == (step,) and config.data.image == pixels
            made = STAGES[config[step].stage](config, step=step, workdir=tmp_path)
            assert all(each.flops > 0 for each in ([made] if isinstance(made, Stage) else made.programs.values()))
            if step in ("encoder", "prior", "generator"):
                assert (config[step].model.positions, config[step].model["values"]) == (positions, values)
                assert jax.tree.leaves(jax.eval_shape(made.init, jax.random.key(0)))
            if step == "prior":
                assert made.batch_spec["codes"].shape == (512, positions)
            if step == "generator":
                assert {name: config[step].model[name] for name in shapes[size]} == shapes[size]
                assert made.batch_spec["latent"].shape == (256, pixels // 8, pixels // 8, 4)
    assert not list(tmp_path.iterdir())


def told_by_dinov2(name, depth):
    """(factor of the learning rate, decays, is frozen at first, is clipped with the heads) of a parameter, by the reference's own name."""
    rank, head = depth + 1, name.startswith(("dino_head.", "ibot_head."))
    if not head:
        if re.match("(pos_embed|patch_embed|mask_token|cls_token|register_tokens)", name):
            rank = 0
        elif block := re.match(r"blocks\.(\d+)\.", name):
            rank = int(block[1]) + 1
    decays = not (name.endswith(".bias") or "norm" in name or "gamma" in name)
    return 0.9 ** (depth + 1 - rank) * (0.2 if "patch_embed" in name else 1), decays, "last_layer" in name, head


@pytest.mark.parametrize("readout, separate_head", [("plain", False), ("shared", True), ("pos-shared", True)])
@pytest.mark.parametrize("recipe, variant", [("imagenet256", ""), ("image_folder", "latent256")])
def test_every_parameter_is_treated_as_dinov2_does(recipe, variant, readout, separate_head, tmp_path):
    """Name by name: learning rate, weight decay, what is frozen at first, what is clipped together."""
    section = (config := load(ROOT / "configs" / f"{recipe}.py", variant)).encoder
    section.model.update(dict(readout=readout, separate_head=separate_head))
    params, _ = jax.eval_shape(STAGES["encoder"](config, step="encoder", workdir=tmp_path).init, jax.random.key(0))
    rule, depth = section.optimizer, section.model.depth
    given = dict(layer_decay=rule.layer_decay, multipliers=rule.multipliers, freeze=rule.freeze)
    (_, until), *others = rule.freeze
    assert not others
    start, later = (slots.flat(optim._factors(params, count, **given)) for count in (until - 1, until))
    decays = slots.flat(optim.named(params, rule.decayed, "decayed"))
    seen = set()
    for name, slot in torch_names.official(slots.shapes_of(params)).items():
        seen.add(slot.path)
        number = int(name.split(".")[1]) if name.startswith("blocks.") else ...
        first, factor = (np.broadcast_to(np.squeeze(found[slot.path])[number], ()) for found in (start, later))
        apart = any(re.fullmatch(pattern, slot.path) for pattern in section.train.clip_separately)
        rate, *rest = told_by_dinov2(name, depth)
        assert factor == pytest.approx(rate, rel=1e-5), name
        assert [decays[slot.path], first == 0, apart] == rest, name
    assert seen == decays.keys()


CHANGED = [  # the words that change a step
    *itertools.product(("encoder", "codes", "prior"), ("32x4096", "128x1024")),
    *itertools.product(("generator", "samples"), ("32x4096", "128x1024", "512px", "S", "B", "L", "8B", "8B,512px,32x4096")),
]


@pytest.mark.slow
@pytest.mark.parametrize("step, variant", CHANGED)
def test_imagenet_variants_lower(step, variant, tmp_path):
    config = load(IMAGENET, variant)
    made = STAGES[config[step].stage](config, step=step, workdir=tmp_path)
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    lowered = [train.lower(made, mesh)] if isinstance(made, Stage) else [each.lower(mesh) for each in made.programs.values()]
    assert all("dot_general" in each.as_text() for each in lowered)
