"""`dlc plan` as it is called, and the words and the search behind it.

What needs a compiler for other machines says so and skips.
"""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
import recipes
from commands import ROOT

from dlc_jax import command
from dlc_jax.errors import UserError
from dlc_jax.plan import estimate, program, search, words

GIB = 2**30
SMALL = ("--config=configs/imagenet256.py:generator,S", "--config.generator.model.depth=1")

needs_tpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no libtpu: pip install '.[tpu]'"
)
# a folder with the plug-in; beside the environment, for jax is never quiet with it
CUDA = os.environ.get("DLC_CUDA_PLAN", "")
needs_cuda = pytest.mark.skipif(
    not CUDA, reason="DLC_CUDA_PLAN names no folder with the packages of the extra cuda-plan"
)


def dlc(*arguments, **environment):
    """As in a shell of a user's: neither the tests' eight devices nor their platform."""
    outside = {
        name: value
        for name, value in os.environ.items()
        if name not in ("XLA_FLAGS", "JAX_PLATFORMS")
    }
    environment = outside | {"COLUMNS": "120"} | environment
    return subprocess.run(
        [sys.executable, "-m", "dlc_jax.cli", "plan", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def found():
    """A step of 3 GiB of state and 9 of temporaries, on 8 devices of 10 GiB."""
    return estimate.Estimate(
        step="generator",
        program="train",
        topology="v5e:2x4",
        devices=8,
        mesh={"data": 1, "fsdp": 8, "tensor": 1},
        batch=256,
        fits=False,
        available=10 * GIB,
        wanted=12 * GIB,
        memory=program.Memory(
            arguments=3 * GIB,
            temporaries=9 * GIB,
            outputs=3 * GIB,
            aliased=3 * GIB,
            code=0,
            peak=12 * GIB,
        ),
        state=3 * GIB,
        collectives={"reduce-scatter": program.Collective(count=4, bytes=GIB)},
        flops=197e10,
        seconds=0.02,
        how="a guess",
        utilization=0.5,
        lower_seconds=1.0,
        compile_seconds=20.0,
        host_bytes=2 * GIB,
        advice="",
    )


def test_what_to_change_where_it_does_not_fit(found):
    # 9 GiB in two halves beside 3 of state
    assert "--config.generator.train.accumulate=2" in estimate.advice(found, accumulate=1)
    whole = dataclasses.replace(found, state=9 * GIB, mesh={"data": 8, "fsdp": 1, "tensor": 1})
    assert "--config.mesh.fsdp=2" in estimate.advice(whole, accumulate=1)
    spread = dataclasses.replace(found, state=9 * GIB)
    assert "take more devices" in estimate.advice(spread, accumulate=1)
    one = estimate.advice(dataclasses.replace(found, batch=8), accumulate=1)
    assert "accumulate" not in one and "remat=full" in one
    drawing = dataclasses.replace(found, step="samples", program="decode")
    assert "--config.samples.batch=128" in estimate.advice(drawing, accumulate=1)


def test_words(found):
    assert (
        words.verdict(found) == "does not fit: 12.00 GiB of 10.00 GiB a device, 2.00 GiB too much"
    )
    assert (
        words.verdict(dataclasses.replace(found, fits=True, wanted=GIB))
        == "fits: 1.00 GiB of 10.00 GiB a device"
    )
    assert words.moves(found) == "reduce-scatter 4 x, 1.00 GiB"
    assert words.moves(dataclasses.replace(found, collectives={})) == "nothing"
    assert "unknown" in words.moves(dataclasses.replace(found, collectives=None))


def test_programs_of_every_step():
    config = recipes.load("imagenet256.py")
    names = {step: set(estimate.programs(config, step)) for step in config.steps}
    assert names.pop("samples") == {"sample_codes", "decode"} and names.pop("codes") == {"encode"}
    assert names.pop("probe") == set()
    assert set(map(frozenset, names.values())) == {frozenset({"train"})}
    with pytest.raises(
        UserError, match="no step 'draw'; it has encoder, codes, probe, prior, generator, samples"
    ):
        estimate.programs(config, "draw")


def test_search_climbs_to_the_best_that_fits(monkeypatch):
    """With a made-up compiler: memory grows with the batch and with stored activations.

    Full remat costs a third; two layers per turn of the loop pay.
    """

    def compiled(arguments, fields, *, step, name, machine):
        remat, batch = fields[f"{step}.model*.remat"], fields[f"{step}.train.batch"]
        wanted = {"none": 8, "dots": 3, "full": 1}[remat] * batch // 256 + 8 // fields["mesh.fsdp"]
        seconds = batch / {"none": 100, "dots": 95, "full": 70}[remat]
        seconds /= 1.1 if fields.get(f"{step}.model*.unroll") == 2 else 1
        found = dict(wanted=wanted, available=10, seconds=seconds, batch=batch)
        return dict(fits=wanted <= 10, compile_seconds=1.0, **found)

    monkeypatch.setattr(search, "_compile", compiled)
    machine = type("Machine", (), {"name": "v5e:2x4", "devices": range(8)})()
    config = recipes.load("imagenet256.py")
    said = []
    found, best = search.search(
        (), config=config, step="generator", name="train", machine=machine, say=said.append
    )
    assert best["settings"] == {"remat": "none", "fsdp": 8, "batch": 256, "turn": 2}
    assert len(said) == len(found) and not [
        each for each in found if each["batch"] > 256 and each["fits"]
    ]
    shown = search.table(found, best)
    assert shown.count("*") == 1 and len(shown.splitlines()) == len(found) + 1


@pytest.mark.parametrize("step", ["encoder", "prior", "generator"])
def test_what_the_search_tries_are_fields_of_every_network(step, monkeypatch):
    def compiled(arguments, fields, *, step, name, machine):
        flags = [f"--config.{field}={value}" for field, value in fields.items()]
        config, _ = command.parse(["dlc", *arguments, *flags])
        section = config[step]
        model = section.model.backbone if step == "encoder" else section.model
        tried.add((model.remat, model.unroll, model.width))
        found = dict(fits=True, wanted=1, available=10, compile_seconds=1.0)
        return found | {"seconds": 1.0 / model.unroll, "batch": section.train.batch}

    tried = set()
    monkeypatch.setattr(search, "_compile", compiled)
    machine = type("Machine", (), {"name": "v5e:2x4", "devices": range(8)})()
    arguments = (f"--config={recipes.CONFIGS}/imagenet256.py", f"--config.{step}.model*.width=960")
    config, _ = command.parse(["dlc", *arguments])
    how = {"config": config, "step": step, "name": "train", "machine": machine}
    search.search(arguments, **how, say=lambda line: None)
    assert {remat for remat, _, _ in tried} == {"none", "dots", "full"}
    assert {unroll for _, unroll, _ in tried} == {1, 2, 4}
    assert {width for _, _, width in tried} == {960}  # what was given stays


def test_search_says_why_nothing_can_be_built(monkeypatch):
    monkeypatch.setattr(search, "_compile", lambda *_, **__: {"error": "no such field"})
    machine = type("Machine", (), {"name": "v5e:2x4", "devices": range(8)})()
    with pytest.raises(UserError, match="no such field"):
        search.search(
            (),
            config=recipes.load("imagenet256.py"),
            step="prior",
            name="train",
            machine=machine,
            say=print,
        )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "no machine"),
        (("--topology=v5e:8x16",), "no recipe"),
        (("--topology=v5x:8x16", *SMALL), "unknown topology 'v5x:8x16'"),
        (("--topology=v5e:3x5", *SMALL), "unknown topology 'v5e:3x5'"),
        (
            ("--topology=v5e:2x2", *SMALL, "--config.mesh.data=-1", "--config.mesh.fsdp=3"),
            "mesh.fsdp=3 does not divide the 4 devices; sizes that do: 1, 2, 4",
        ),
        (
            ("--topology=v5e:2x2", *SMALL, "--config.generator.train.batch=6"),
            "generator.train.batch=6 does not divide by 4",
        ),
        (
            ("--topology=v5e:2x4", *SMALL, "--config.mesh.tensor=4"),
            "mesh.tensor=4 does not divide the 6 heads",
        ),
        (("--topology=2*v5e:2x2", *SMALL), "set mesh.dcn_data=2"),
        (("--topology=v5e:2x2", *SMALL, "--program=decode"), "programs of these steps: train"),
        (("--topology=v5e:2x2", *SMALL, "--step=generater"), "no step 'generater'"),
        (
            ("--topology=v5e:2x2", *SMALL, "--config.generator.model.dept=3"),
            "did you mean 'generator.model.depth'",
        ),
        (("--topology=v5e:2x2", "--serch", *SMALL), "serch"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@needs_tpu
def test_a_mistake_is_one_line_and_exit_2(arguments, message):
    done = dlc(*arguments)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_a_compiler_that_is_missing_is_said_with_the_line_that_installs_it(tmp_path):
    hide = """
import importlib.util as u
find = u.find_spec
u.find_spec = lambda name, *a: None if "libtpu" in name or "cuda" in name else find(name, *a)
"""
    (tmp_path / "sitecustomize.py").write_text(hide)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    for topology, line in (
        ("v5e:2x2", "pip install '.[tpu]'"),
        ("h200:8", "pip install '.[cuda-plan]'"),
    ):
        done = dlc(f"--topology={topology}", *SMALL, PYTHONPATH=path)
        assert done.returncode == 2 and line in done.stderr and done.stderr.count("\n") == 1, (
            done.stderr
        )


def test_list_topologies_and_shardings():
    done = dlc("--list-topologies")
    assert done.returncode == 0 and all(
        kind in done.stdout for kind in ("v4", "v5e", "v5p", "v6e", "tpu7x", "h100", "h200")
    )
    if importlib.util.find_spec("libtpu"):
        done = dlc("--shardings", "--topology=v5e:4x4", "--config=configs/imagenet256.py:prior")
        assert (
            done.returncode == 0
            and "params/blocks/attention/qkv/kernel" in done.stdout
            and ". fsdp" in done.stdout
        )


@needs_tpu
@pytest.mark.slow
def test_tpu_step_fits_and_its_gradients_are_reduce_scattered():
    done = dlc(
        "--json", "--topology=v5e:8x16", *SMALL, "--config.mesh.data=-1", "--config.mesh.fsdp=16"
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    (found,) = json.loads(done.stdout)
    assert (
        found["fits"]
        and found["devices"] == 128
        and found["mesh"] == {"data": 8, "fsdp": 16, "tensor": 1}
    )
    assert 0 < found["state"] < found["wanted"] < found["available"] and found["seconds"] > 0
    moved = {kind: each["bytes"] for kind, each in found["collectives"].items()}
    # bytes of the gradients of the one layer, in bfloat16, and of the codes, whose table is float32
    kernels, table = 2 * 18 * 384**2, 4 * 512 * 257 * 384
    assert moved["reduce-scatter"] >= kernels
    # what the eight replicas still sum are shares, and biases
    assert moved["all-reduce"] < (kernels + table) / 16 * 1.2


@needs_tpu
@pytest.mark.slow
def test_the_kernel_saves_a_fifth_of_the_cycles_of_dit_xl():
    """Its step at 16 images a chip; a kernel's cycles are three times those of its products."""
    recipe = ("--json", "--config=configs/imagenet256.py:generator", "--topology=v5e:8x16")
    recipe += ("--config.mesh.data=-1", "--config.mesh.fsdp=16")
    recipe += ("--config.generator.train.batch=2048",)
    counted = {}
    for implementation in ("xla", "pallas_tpu"):
        done = dlc(*recipe, f"--config.generator.model.implementation={implementation}")
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        (found,) = json.loads(done.stdout)
        millions = re.findall(r"([\d.]+) M (?:cycles|inside)", found["how"])
        assert len(millions) == {"xla": 1, "pallas_tpu": 2}[implementation]
        counted[implementation] = sum(map(float, millions))
        assert found["fits"] and found["memory"]["temporaries"] <= 4 * GIB
    assert counted["pallas_tpu"] <= 0.80 * counted["xla"]


@needs_tpu
@pytest.mark.slow
def test_two_slices_are_set_by_the_fields_that_the_message_names():
    recipe = (*SMALL, "--topology=2*v5e:2x4", "--config.mesh.data=2", "--config.mesh.fsdp=8")
    refused = dlc(*recipe)
    assert refused.returncode == 2 and "set mesh.dcn_data=2" in refused.stderr
    done = dlc(*recipe, "--config.mesh.dcn_data=2")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "16 devices, mesh data 2 x fsdp 8" in done.stdout and "between slices" in done.stdout


@needs_tpu
@pytest.mark.slow
def test_out_of_memory_is_a_finding_not_a_crash():
    done = dlc(
        "--topology=v5e:1x1",
        *SMALL,
        "--config.generator.train.batch=32768",
        "--config.generator.model.remat=none",
    )
    assert (done.returncode, done.stderr) == (1, ""), done.stderr
    assert (
        "does not fit" in done.stdout
        and "of 15.75 GiB a device" in done.stdout
        and "accumulate=" in done.stdout
    )


@needs_cuda
@pytest.mark.slow
def test_gpu_step_fits_and_its_gradients_are_reduce_scattered():
    done = dlc("--json", "--topology=h200:8", *SMALL, PYTHONPATH=os.pathsep.join([CUDA, str(ROOT)]))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    (found,) = json.loads(done.stdout)
    assert (
        found["fits"]
        and found["collectives"]["reduce-scatter"]["bytes"]
        > 50 * found["collectives"]["all-reduce"]["bytes"]
    )
