"""The networks of a workdir: read, placed, cast, compiled, and run in padded batches.

    with Networks(config, workdir, mesh, batch=64) as networks:
        codes = networks["encoder"].encode(images)
        images = networks["generator"].decode(codes, seed=0)

A step's network is loaded when it is first run, and what it compiled belongs to it: both end with
the `Networks` that it came from.
"""

from pathlib import Path

from dlc_jax import parallel, remote
from dlc_jax.errors import UserError
from dlc_jax.networks.encoder import EncoderNetwork
from dlc_jax.networks.generator import GeneratorNetwork
from dlc_jax.networks.network import Network
from dlc_jax.networks.prior import PriorNetwork
from dlc_jax.stage import Program

KINDS = {
    "encoder": EncoderNetwork,
    "prior": PriorNetwork,
    "distill": PriorNetwork,
    "generator": GeneratorNetwork,
}


class Networks:
    """The trained steps of a workdir by name, each an `EncoderNetwork`, `PriorNetwork`, ...

    Attributes:
      config: of the run, expanded.
      workdir: its directory.
      mesh: over which batches are split.
      batch: examples per call of a network; the mesh must divide it.
      dtype: of the encoders' products, "float32" or "bfloat16"; all else of them is float32
        (`layers.compute_dtypes`). None is the `dtype` of the recipe's codes, so that images have
        here the codes that they have in the store. "" is all of an encoder in the dtype it was
        trained in, as in runs from before codes had a dtype.
    """

    def __init__(
        self, config, workdir: str | Path, mesh, *, batch: int = 128, dtype: str | None = None
    ):
        parallel.check_batch(batch, mesh, accumulate=1, where="samples")
        self.config, self.workdir, self.mesh = config, remote.local(workdir), mesh
        self.batch, self.dtype = batch, dtype
        self._loaded: dict[str, Network] = {}

    def __getitem__(self, step: str) -> Network:
        """The network of a step; nothing is loaded before it is run.

        Raises:
          UserError: the recipe has no such trained step.
        """
        if step not in self._loaded:
            if step not in self.config:
                raise UserError(f"{self.workdir} is a run whose recipe has no step {step!r}")
            settings = {"mesh": self.mesh, "batch": self.batch, "dtype": self.dtype}
            kind = KINDS[self.config[step].stage]
            self._loaded[step] = kind(self.config, self.workdir, step, **settings)
        return self._loaded[step]

    def close(self) -> None:
        """Frees parameters and programs; a network that is asked again is loaded again."""
        self._loaded.clear()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def program(networks, step: str, *, flops: float, batch: int, **settings) -> Program:
    """What a job that runs a network may be planned by.

    Args:
      networks: (mesh) -> Networks.
      flops: model FLOPs of one example.
      settings: of the network's `lower`.
    """
    return Program(
        lower=lambda mesh: networks(mesh)[step].lower(**settings),
        state=lambda mesh: networks(mesh)[step].abstract(),
        flops=batch * flops,
        batch=batch,
    )
