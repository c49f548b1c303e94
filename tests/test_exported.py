"""Networks as functions of jax.export: equal to the pipeline's, in a program without dlc_jax."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import recipes
from foreign_official import IMAGE, published
from test_cli import refused, untrained  # noqa: F401  the last is a fixture
from test_interop_cli import dlc
from test_official import RECIPE

from dlc_jax import cli, pipeline, recipe
from dlc_jax.cli import export_stablehlo
from dlc_jax.diffusion.guidance import Guidance
from dlc_jax.diffusion.sample import Sampler
from dlc_jax.errors import UserError
from dlc_jax.interop import slots
from dlc_jax.networks import exported

STEPS = "--config.samples.sampler.steps=3"
N, SEED, FIRST, CLASSES = 3, 5, 2, 7

# what a program that has jax alone does: the modules of this package are refused
PROGRAM = """
import sys

class Refused:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("dlc_jax", "flax"):
            raise ImportError(f"{name} is refused")

sys.meta_path.insert(0, Refused())
import runpy
import jax
import numpy as np
from safetensors.flax import load_file

given, found = dict(np.load("given.npz")), {}
for name in ("encode", "sample_codes", "decode"):
    with open(f"{name}.stablehlo", "rb") as file:
        function = jax.export.deserialize(bytearray(file.read()))
    assert function.platforms == ("cpu", "cuda", "tpu"), function.platforms
    arrays = {"encode": ["images"], "sample_codes": ["seed", "numbers"]}.get(
        name, ["seed", "numbers", "codes", "labels"]
    )
    weights = load_file(f"{name}.safetensors")
    found[name] = np.asarray(function.call(weights, *(given[key] for key in arrays)))
np.savez("found.npz", **found)
runpy.run_path("example.py")
assert not any(name.startswith("dlc_jax") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir of the published networks, tiny, with classes too."""
    here = tmp_path_factory.mktemp("exported")
    flags = published(here, classes=CLASSES)
    arguments = ["import", "official", *flags, "--out", here / "run", *RECIPE, STEPS]
    assert cli.main([str(argument) for argument in arguments]) == 0
    return here / "run"


@pytest.fixture(scope="module")
def expected(run):
    """({argument: array}, {function: what the pipeline gives})."""
    images = np.random.default_rng(0).integers(256, size=(N, 16, 16, 3), dtype=np.uint8)
    labels = np.array([0, CLASSES - 1, 3], np.int32)
    with pipeline.load(run, batch=N) as loaded:
        codes = loaded.sample_codes(N, seed=SEED, first=FIRST)
        wanted = {"encode": loaded.encode(images), "sample_codes": codes}
        wanted["decode"] = loaded.decode(codes, labels=labels, seed=SEED, first=FIRST)
    given = {"images": images, "codes": codes, "labels": labels, "seed": np.int32(SEED)}
    return given | {"numbers": np.arange(FIRST, FIRST + N, dtype=np.int32)}, wanted


def compared(found, wanted):
    for name in ("encode", "sample_codes"):
        assert found[name].dtype == np.int32 and np.array_equal(found[name], wanted[name]), name
    images = found["decode"]
    assert images.dtype == np.uint8 and images.shape == (N, IMAGE, IMAGE, 3)
    assert np.abs(images.astype(int) - wanted["decode"].astype(int)).max() <= 1


@pytest.mark.slow
def test_functions_equal_the_pipeline_at_any_batch(run, expected):
    given, wanted = expected
    functions, size = export_stablehlo._functions(recipe.of_run(run), run)
    assert size == 16 and list(functions) == ["encode", "sample_codes", "decode"]
    assert list(functions["decode"].arguments) == ["seed", "numbers", "codes", "labels"]
    found, batch = {}, export_stablehlo.SYMBOLIC
    for name, function in functions.items():
        program, names = export_stablehlo.program(function, ("cpu", "cuda", "tpu"), batch)
        assert program.platforms == ("cpu", "cuda", "tpu")  # which are not here
        params = slots.flat(function.params)
        arrays = [given[key] for key in function.arguments]
        found[name] = np.asarray(program.call({key: params[key] for key in names}, *arrays))
        if name == "encode":  # heads of training are no part of it
            assert all(key.startswith(("vit/", "simplicial/")) for key in names)
            assert "simplicial/out/kernel" in params and "simplicial/out/kernel" not in names
    compared(found, wanted)


@pytest.mark.slow
def test_a_program_without_this_package_calls_them(run, expected, tmp_path, capsys):
    pytest.importorskip("flatbuffers", reason="jax.export reads and writes with flatbuffers")
    out = tmp_path / "functions"
    said = dlc(capsys, "export", "stablehlo", "-w", run, "--out", out, "--batch", N)
    assert "decode(weights, seed, numbers, codes, labels)" in said
    ends = [
        f"{name}.{end}"
        for name in ("encode", "sample_codes", "decode")
        for end in ("stablehlo", "safetensors")
    ]
    names = {path.name for path in out.iterdir()}
    assert names == {"README.txt", "example.py", "functions.json", *ends}
    given, wanted = expected
    np.savez(out / "given.npz", **given)
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=out, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"images: ({N}, {IMAGE}, {IMAGE}, 3) uint8" in done.stdout
    compared(np.load(out / "found.npz"), wanted)
    assert "is there already" in refused(capsys, "export", "stablehlo", "-w", run, "--out", out)


def test_what_cannot_be_exported_is_refused(tmp_path, capsys, monkeypatch, untrained):  # noqa: F811
    def line(*flags):
        return refused(capsys, "export", "stablehlo", "-w", untrained, "--out", *flags)

    out = tmp_path / "functions"
    assert "platforms are cpu, cuda" in line(out, "--platforms", "cpu,metal")
    assert "neither a number nor symbolic" in line(out, "--batch", "0")
    assert "is there already" in line(untrained)
    with monkeypatch.context() as without:
        without.setattr(export_stablehlo.importlib.util, "find_spec", lambda name: None)
        assert "jax.export writes with flatbuffers; pip install" in line(out)
    monkeypatch.setattr(export_stablehlo.importlib.util, "find_spec", lambda name: name)
    assert "has no encoder, prior or generator that is complete" in line(out)
    assert not out.exists()
    with pipeline.load(untrained, batch=1) as loaded:
        away = Sampler(guidance=Guidance(scale=2.0, base="elsewhere"))
        with pytest.raises(UserError, match="guidance.base=elsewhere: a generator of another run"):
            exported.decode(loaded.networks["generator"], away)


def test_attention_is_that_of_every_platform():
    config = export_stablehlo._plain(recipes.load("imagenet256.py"))
    found = {
        name: value
        for name, value in recipe.flat(config.to_dict()).items()
        if "implementation" in name
    }
    steps = ("encoder.model.backbone", "prior.model", "generator.model")
    assert {f"{step}.implementation" for step in steps} <= found.keys()
    assert set(found.values()) == {"xla"}


def test_a_traced_seed_gives_the_noise_of_a_known_one():
    from dlc_jax.networks.network import keys

    numbers = np.arange(2, 5, dtype=np.int32)
    for seed in (0, 7, 2**31 - 2):
        found = jax.jit(exported._keys)(np.int32(seed), numbers)
        known = keys(seed, 3, 2)
        assert np.array_equal(jax.random.key_data(found), jax.random.key_data(known))
