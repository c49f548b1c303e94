import sys
from pathlib import Path

import numpy as np
import pytest

sys.path[:0] = [
    str(Path(__file__).parent),
    str(Path(__file__).parents[1]),
]  # for `throwaway`, `recipes`


@pytest.fixture(scope="session")
def real_stages(tmp_path_factory):
    """The trained stages of the quickstart, narrow, on random codes; and a generator with all.

    The codes use a quarter of the values, so that there is something to learn.
    """
    from recipes import load

    from dlc_jax.data import code_writer, sources
    from dlc_jax.stages import STAGES

    workdir = tmp_path_factory.mktemp("stages")
    small = {"train.batch": 32, "optimizer.warmup": 0}
    small |= {"model*.width": 32, "model*.depth": 2, "model*.heads": 2}
    lines = {f"*.{name}": value for name, value in small.items()}
    lines |= {"encoder.objective.koleo_group": 8, "modern.like": "generator"}
    modern = {
        "process.name": "ddpm",
        "model.depth": 5,  # so that a block can skip patches
        "model.patch": 4,
        "model.block": "modern",
        "model.context": 4,
        "model.cross": 4,
        "model.early": 2,
        "model.head_width": 32,
        "model.head_depth": 1,
        "model.route": True,
        "objective.route": 0.75,
        "objective.route_until": 2,
        "optimizer.name": "muon",
    }
    lines |= {f"modern.{name}": value for name, value in modern.items()}
    config = load("quickstart.py:tiny", lines)
    sizes = {"positions": config.prior.model.positions, "values": config.prior.model["values"]}

    def encode(start, stop):
        random, shape = np.random.default_rng(start), (stop - start, sizes["positions"])
        return {"codes": random.integers(0, sizes["values"] // 4, shape)}

    for split in ("train", "validation"):
        origin = {"identity": "random", "source": sources.identity(split=split, **config.data)}
        code_writer.write(workdir / "codes" / split, encode, total=1024, **sizes, **origin)
    names = ("encoder", "prior", "generator", "modern")
    return {name: STAGES[config[name].stage](config, step=name, workdir=workdir) for name in names}
