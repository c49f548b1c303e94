"""The Python face of a workdir: images to codes, codes to images, new codes, mixtures.

    from dlc_jax import pipeline
    p = pipeline.load("runs/quickstart")
    codes = p.encode(images)                 # uint8 [b, y, x, c] -> int32 [b, l]
    images = p.decode(codes)                 # back
    images = p.decode(p.sample_codes(16))    # unconditional
    images = p.decode(p.compose([a, b], seed=0))

Every draw has its own key, folded from the seed and the sample's number, so that results do not depend on the batch size. Functions are
compiled once per shape; the last batch is padded.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dlc_jax import checkpoint, parallel
from dlc_jax.diffusion import flow, guidance, masked, sample, schedules
from dlc_jax.errors import UserError
from dlc_jax.evals import composition
from dlc_jax.models.dit import RULES, DiT
from dlc_jax.models.masked_transformer import MaskedTransformer
from dlc_jax.models.simplicial import Encoder
from dlc_jax.models.vit import standardize
from dlc_jax.stage import Program
from dlc_jax.step import cast


def load(workdir: str | Path, *, batch: int = 128) -> "Pipeline":
    """The pipeline of a finished run.

    Raises:
      UserError: `workdir` holds no run.
    """
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(
            f"{workdir} holds no run (no config.json); train one with python -m dlc_jax.main --config=configs/quickstart.py"
        )
    config = ml_collections.ConfigDict(json.loads(path.read_text()))
    return Pipeline(config, Path(workdir), mesh=parallel.make_mesh(), batch=batch)


class Pipeline:
    """Networks of a workdir, loaded when first used.

    Attributes:
      config: of the run.
      mesh: over which batches are split.
      batch: examples per call of a network; the mesh must divide it.
      encoder, prior, generator: which steps of the recipe are used.
    """

    def __init__(self, config, workdir: Path, *, mesh, batch=128, encoder="encoder", prior="prior", generator="generator"):
        parallel.check_batch(batch, mesh, accumulate=1, where="samples")
        self.config, self.workdir, self.mesh, self.batch = config, Path(workdir), mesh, batch
        self._names = {"encoder": encoder, "prior": prior, "generator": generator}

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 images [b, y, x, c] to codes int32 [b, l]: the argmax of every simplex."""
        return self._run(self._encode, self._params("encoder"), np.asarray(images))

    def sample_codes(self, count: int, *, seed: int = 0, calls: int | None = None, temperature: float = 1.0) -> np.ndarray:
        """`count` new codes int32 [count, l] in `calls` calls of the prior; None makes one call per position."""
        calls = calls or self.config[self._names["prior"]].model.positions
        function = functools.partial(self._sample_codes, calls=calls, temperature=temperature)
        return self._run(function, self._params("prior"), _keys(seed, count))

    def decode(
        self,
        codes: np.ndarray | None,
        *,
        seed: int = 0,
        count: int | None = None,
        steps: int = 50,
        guidance: float = 1.0,
        method: str = "heun",
    ) -> np.ndarray:
        """Codes int32 [b, l] to uint8 images [b, y, x, c]; None with a `count` draws from a generator trained without codes.

        Raises:
          UserError: a code outside of [0, V).
        """
        function = functools.partial(self._decode, steps=steps, scale=guidance, method=method)
        if codes is None:
            return self._run(function, self._params("generator"), _keys(seed, count))
        codes = np.asarray(codes, np.int32)
        values = self.config[self._names["generator"]].model["values"]
        if codes.size and (codes.min() < 0 or codes.max() >= values):
            raise UserError(f"decode: codes must lie in 0..{values - 1}; found {codes.min()}..{codes.max()}")
        return self._run(function, self._params("generator"), _keys(seed, len(codes)), codes)

    def compose(self, parents: Sequence[np.ndarray], *, seed: int = 0, weights: Sequence[float] | None = None) -> np.ndarray:
        """Mixes codes: every position is copied from one of the parents [b, l], drawn by `weights`. Source: arXiv 2507.12318, section 4."""
        return composition.mix(parents, seed=seed, weights=weights)

    def abstract(self, program: str):
        """Shapes and placements of the parameters that "encode", "sample_codes" or "decode" reads."""
        network = {"encode": "encoder", "sample_codes": "prior", "decode": "generator"}[program]
        shapes = jax.eval_shape(functools.partial(cast, dtype=self._dtype(network)), self._model(network)[1])
        return parallel.abstract(shapes, parallel.shardings(shapes, self.mesh, rules=RULES, strict=False))

    def lower(self, program: str):
        """ "encode", "sample_codes" or "decode" lowered for the mesh from shapes alone, as the run's samples are drawn."""
        params = self.abstract(program)

        def batch(shape, dtype):
            return jax.ShapeDtypeStruct((self.batch, *shape), dtype, sharding=jax.NamedSharding(self.mesh, parallel.BATCH))

        keys = batch((), jax.random.key(0).dtype)
        with jax.set_mesh(self.mesh):
            if program == "encode":
                size = self.config[self._names["encoder"]].model.image
                return jax.jit(self._encode).lower(params, batch((size, size, 3), jnp.uint8))
            if program == "sample_codes":
                positions = self._model("prior")[0].positions
                function = functools.partial(self._sample_codes, calls=positions, temperature=1.0)
                return jax.jit(function).lower(params, keys)
            positions = self._model("generator")[0].positions
            codes = [batch((positions,), jnp.int32)] if positions else []
            return jax.jit(functools.partial(self._decode, steps=50, scale=1.5, method="heun")).lower(params, keys, *codes)

    def _encode(self, params, images):
        return self._model("encoder")[0].apply({"params": params}, standardize(images), method="codes")

    def _sample_codes(self, params, keys, *, calls, temperature):
        model, _ = self._model("prior")
        logits = functools.partial(model.apply, {"params": params})
        return masked.sample(logits, keys, model.positions, model.values, calls=calls, temperature=temperature)

    def _decode(self, params, keys, codes=None, *, steps, scale, method):
        model, _ = self._model("generator")
        objective = self.config[self._names["generator"]].objective

        def velocity(x, t, codes):
            prediction = model.apply({"params": params}, x, t, codes)
            return flow.to_velocity(prediction, x, t, kind=objective.prediction, floor=1e-3)

        function = guidance.guided(velocity, codes, scale=scale if codes is not None else 1.0)
        shape = (model.image, model.image, model.channels)
        x = sample.flow_sample(function, keys, shape, schedules.uniform_grid(steps), method=method)
        return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)

    @functools.cache  # noqa: B019, a pipeline lives as long as its networks
    def _model(self, network: str):
        section = self.config[self._names[network]].model
        model = {"encoder": Encoder, "prior": MaskedTransformer, "generator": DiT}[network](**section)
        key = jax.random.key(0)
        if network == "encoder":
            arguments = (jnp.zeros((1, section.image, section.image, 3)),)
        elif network == "prior":
            arguments = (jnp.zeros((1, section.positions), jnp.int32),)
        else:
            codes = jnp.zeros((1, section.positions), jnp.int32) if section.positions else None
            arguments = (jnp.zeros((1, section.image, section.image, section.channels)), jnp.zeros((1,)), codes)
        return model, jax.eval_shape(lambda: model.init(key, *arguments)["params"])

    def _dtype(self, network: str) -> str:
        return self.config[self._names[network]].train.dtype

    @functools.cache  # noqa: B019
    def _params(self, network: str):
        _, shapes = self._model(network)
        placed = parallel.abstract(shapes, parallel.shardings(shapes, self.mesh, rules=RULES, strict=False))
        params = checkpoint.load_params(self.workdir / self._names[network] / "checkpoints", placed)
        return cast(params, self._dtype(network))  # once, not in every call

    @functools.cache  # noqa: B019
    def _jit(self, function, keywords):
        return jax.jit(functools.partial(function, **dict(keywords)))

    def _run(self, function, params, *arrays) -> np.ndarray:
        """Calls a function of (params, batch of each array) on padded batches, and joins the results."""
        keywords = ()
        if isinstance(function, functools.partial):
            function, keywords = function.func, tuple(sorted(function.keywords.items()))
        jitted = self._jit(function, keywords)
        count, found = len(arrays[0]), []
        for start in range(0, count, self.batch):
            rows = np.minimum(np.arange(start, start + self.batch), count - 1)
            with jax.set_mesh(self.mesh):
                batch = [jax.device_put(array[rows], jax.NamedSharding(self.mesh, parallel.BATCH)) for array in arrays]
                found.append(np.asarray(jitted(params, *batch)))
        return np.concatenate(found)[:count]


def _keys(seed: int, count: int):
    return jax.vmap(lambda number: jax.random.fold_in(jax.random.key(seed), number))(jnp.arange(count))


def programs(pipeline, *, batch: int, flops) -> dict[str, Program]:
    """What a job that uses a pipeline may be planned by.

    Args:
      pipeline: (mesh=) -> Pipeline.
      flops: {program: model FLOPs of one example}.
    """
    return {
        name: Program(
            lower=lambda mesh, name=name: pipeline(mesh=mesh).lower(name),
            state=lambda mesh, name=name: pipeline(mesh=mesh).abstract(name),
            flops=batch * count,
            batch=batch,
        )
        for name, count in flops.items()
    }
