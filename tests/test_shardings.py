"""Where every parameter of the paper's three models lives: goldens/shardings_*.txt.

UPDATE_GOLDEN=1 writes them.
"""

import os
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from dlc_jax import command, parallel
from dlc_jax.plan import words
from dlc_jax.stages import STAGES
from dlc_jax.step import make_init

ROOT = Path(__file__).resolve().parents[1]
GOLDENS = Path(__file__).parent / "goldens"


def state(name, sizes):
    config, _ = command.parse(["dlc", f"--config={ROOT}/configs/imagenet256.py"])
    stage = STAGES[name](config, step=name, workdir=Path("unused"))
    shapes = jax.eval_shape(make_init(stage), jax.random.key(0))
    mesh = AbstractMesh(sizes, parallel.AXES, axis_types=(AxisType.Auto,) * 3)
    return parallel.abstract(shapes, parallel.shardings(shapes, mesh, rules=stage.rules))


@pytest.mark.parametrize("sizes", [(8, 16, 1), (2, 16, 4)], ids=str)
@pytest.mark.parametrize("name", ["encoder", "prior", "generator"])
def test_shardings(name, sizes):
    found = state(name, sizes)
    mesh = " x ".join(f"{axis} {size}" for axis, size in zip(parallel.AXES, sizes))
    title = f"{name} of configs/imagenet256.py, parameters, mesh {mesh}"
    text = f"{title}\n\n{words.shardings(found.params)}\n"
    path = GOLDENS / f"shardings_{name}_{'x'.join(map(str, sizes))}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text(), (
        f"{path.name} is of other shardings; if they are meant: "
        f"UPDATE_GOLDEN=1 pytest {Path(__file__).name}"
    )
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, found.params)
    assert jax.tree.map(lambda leaf: leaf.sharding.spec, found.ema) == specs
    moments = [
        part
        for part in jax.tree.leaves(found.opt_state, is_leaf=lambda part: hasattr(part, "mu"))
        if hasattr(part, "mu")
    ]
    assert moments
    for part in moments:
        assert jax.tree.map(lambda leaf: leaf.sharding.spec, (part.mu, part.nu)) == (specs, specs)


def test_large_arrays_are_split():
    """Nothing above a megabyte is held whole by every device, but for what no dimension allows."""
    for name in ("encoder", "prior", "generator"):
        for path, leaf in jax.tree_util.tree_flatten_with_path(state(name, (8, 16, 1)).params)[0]:
            layers = (
                leaf.shape[0]
                if parallel.STACKED.search(jax.tree_util.keystr(path, simple=True, separator="/"))
                else 1
            )
            assert leaf.size // layers < parallel.SMALLEST or "fsdp" in leaf.sharding.spec, (
                jax.tree_util.keystr(path)
            )
