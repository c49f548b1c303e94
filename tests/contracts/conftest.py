import sys
from pathlib import Path

import numpy as np
import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # for `throwaway` and `test_configs`


@pytest.fixture(scope="session")
def real_stages(tmp_path_factory):
    """The trained stages of the quickstart, narrow, on random codes that use a quarter of the values, so that there is something to learn."""
    from test_configs import ROOT, load

    from dlc_jax.data import code_writer, sources
    from dlc_jax.stages import STAGES

    workdir = tmp_path_factory.mktemp("stages")
    config = load(ROOT / "configs" / "quickstart.py", "tiny")
    config.encoder.objective.koleo_group = 8
    for name in ("encoder", "prior", "generator"):
        config[name].train.batch = 32
        config[name].optimizer.warmup = 0
        config[name].model.update(dict(width=32, depth=2, heads=2))
    positions, values = config.prior.model.positions, config.prior.model["values"]

    def encode(start, stop):
        return {"codes": np.random.default_rng(start).integers(0, values // 4, (stop - start, positions))}

    for split in ("train", "validation"):
        source = sources.identity(split=split, **config.data)
        code_writer.write(
            workdir / "codes" / split, encode, total=1024, positions=positions, values=values, identity="random", source=source
        )
    return {name: STAGES[name](config, step=name, workdir=workdir) for name in ("encoder", "prior", "generator")}
