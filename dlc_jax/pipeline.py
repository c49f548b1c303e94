"""The Python face of a workdir: images to codes, codes to images, new codes, mixtures.

    from dlc_jax import pipeline
    p = pipeline.load("runs/quickstart")
    codes = p.encode(images)                                 # uint8 [b, y, x, c] -> int32 [b, l]
    images = p.decode(codes, seed=0)                         # back
    images = p.sample(16, seed=0)                            # new ones: p.decode(p.sample_codes(16, seed=0), seed=1)
    images = p.decode(p.compose([a, b], weights=(1, 3)))     # a and b: images, or their codes

Soft codes are points of the simplices instead of their corners. The generator reads both:

    s = p.simplices(images, temperature=0.3)                 # float32 [b, l, v]
    images = p.decode(0.5 * s[:8] + 0.5 * s[8:])             # half of each at every position
    images = p.decode(p.compose([a, b], temperature=0.3))    # values drawn from that mean, position by position

Every draw has its own key, folded from the seed and the sample's number, so that results do not depend on the batch size, and a long job
can be done in parts (`first`). Functions are compiled once per shape; the last batch is padded.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dlc_jax import checkpoint, parallel, recipe
from dlc_jax import workdir as home
from dlc_jax.data import inputs
from dlc_jax.diffusion import flow
from dlc_jax.diffusion.guidance import Guidance, guided
from dlc_jax.diffusion.masked import CodeSampler
from dlc_jax.diffusion.sample import Sampler
from dlc_jax.errors import UserError
from dlc_jax.evals import composition
from dlc_jax.models.dit import RULES, DiT
from dlc_jax.models.layers import compute_dtypes
from dlc_jax.models.masked_transformer import MaskedTransformer
from dlc_jax.models.simplicial import Encoder, relax
from dlc_jax.models.vit import standardize
from dlc_jax.stage import Program

NETWORKS = {"encode": "encoder", "sample_codes": "prior", "decode": "generator"}
WHOLE = 4 * 2**30  # bytes of the largest network that every device keeps whole


def load(workdir: str | Path, *, batch: int = 128) -> "Pipeline":
    """The pipeline of a run, which samples as the `samples` section of its recipe does. A network is loaded when first used.

    Args:
      batch: examples per call of a network; it is rounded up to what the devices here divide.

    Raises:
      UserError: `workdir` holds no run, or its config.json is damaged.
    """
    config = ml_collections.ConfigDict(home.read_config(workdir))
    mesh = parallel.make_mesh()
    batch = -(-max(1, batch) // parallel.shares(mesh)) * parallel.shares(mesh)
    if "samples" not in config:
        return Pipeline(config, Path(workdir), mesh=mesh, batch=batch)
    section = config.samples
    names = {network: section[network] for network in ("encoder", "prior", "generator")}
    settings = {"calls": section.calls, "steps": section.sampling_steps, "guidance": section.guidance, "method": section.method}
    return Pipeline(config, Path(workdir), mesh=mesh, batch=batch, **names, **settings)


class Pipeline:
    """Networks of a workdir, loaded when first used.

    Attributes:
      config: of the run.
      mesh: over which batches are split.
      batch: examples per call of a network; the mesh must divide it.
      encoder, prior, generator: which steps of the recipe are used.
      dtype: of the encoder's products, "float32" or "bfloat16"; the rest of it is float32 (`layers.compute_dtypes`). None is the
        `dtype` of the recipe's codes, so that images have here the codes that they have in the store. "" is for runs of before
        there was that field: all of it in the dtype that it was trained in.
      calls, steps, guidance, method: how codes and images are sampled unless a call says otherwise; see `sample_codes`, `decode`.
    """

    def __init__(
        self,
        config,
        workdir: Path,
        *,
        mesh,
        batch: int = 128,
        encoder: str = "encoder",
        prior: str = "prior",
        generator: str = "generator",
        dtype: str | None = None,
        calls: int = 0,
        steps: int = 50,
        guidance: float = 1.0,
        method: str = "heun",
    ):
        parallel.check_batch(batch, mesh, accumulate=1, where="samples")
        self.config, self.workdir, self.mesh, self.batch = config, Path(workdir), mesh, batch
        self._names = {"encoder": encoder, "prior": prior, "generator": generator}
        self.dtype = recipe.codes_dtype(config, encoder) if dtype is None else dtype
        self.calls, self.steps, self.guidance, self.method = calls, steps, guidance, method

    @property
    def size(self) -> int:
        """Side of the images that the encoder reads: of the crops it was trained with, whatever size its positions were made for."""
        return max(crops.global_size for crops in self._section("encoder").crops.values())

    def encode(self, images: np.ndarray | Sequence[np.ndarray], *, params=None) -> np.ndarray:
        """Images uint8 [b, y, x, c] to codes int32 [b, l]: the likeliest value of every position.

        Gray is repeated, and another size than the encoder's is scaled and center-cropped; a list may hold several sizes.

        Args:
          params: of the encoder; None are those saved in the workdir.

        Raises: UserError if these are no such images.
        """
        images = inputs.fit(images, size=self.size)
        return self._run(self._encode, "encoder", images, params=params)

    def features(self, images: np.ndarray | Sequence[np.ndarray], *, params=None) -> np.ndarray:
        """Images and `params`, as in `encode`, to features of the ViT, float32 [b, 2 d]: normalized class token, and mean of the patches'."""
        images = inputs.fit(images, size=self.size)
        return self._run(self._features, "encoder", images, params=params)

    def untrained(self):
        """Parameters of an encoder that has learned nothing, from the run's seed: what `params` may be, to compare with."""
        model, shapes = self._model("encoder")
        images = jnp.zeros((1, self.size, self.size, 3))
        placed = parallel.shardings(shapes, self.mesh, rules=RULES, strict=False)
        params = jax.jit(lambda key: model.init(key, images)["params"], out_shardings=placed)(jax.random.key(self.config.seed))
        return self.cast(params)

    def cast(self, params, network: str = "encoder"):
        """Parameters of a network, float32, in the dtypes that it computes with."""
        return jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), params, self._dtypes(network))

    def coder(self):
        """(params, images uint8 [b, y, x, 3] of the encoder's size) -> codes int32 [b, l], to be traced, and the params.

        Reads the params: of several processes all must call it, together.
        """
        return self._encode, self._params("encoder")

    def simplices(self, images: np.ndarray | Sequence[np.ndarray], *, temperature: float = 1.0) -> np.ndarray:
        """Images, as in `encode`, to soft codes float32 [b, l, v]: softmax of logits / temperature (above 0), without noise."""
        if not temperature > 0 or not np.isfinite(temperature):
            raise UserError(f"simplices: temperature={temperature} must be above 0; the limit at 0 is encode")
        images = inputs.fit(images, size=self.size)
        return self._run(self._simplices, "encoder", images, np.full(len(images), temperature, np.float32))

    def sample_codes(
        self, count: int, *, seed: int = 0, first: int = 0, calls: int | None = None, temperature: float = 1.0
    ) -> np.ndarray:
        """`count` new codes int32 [count, l] in `calls` calls of the prior; 0 makes one call per position, which is exact."""
        length = self._section("prior").model.positions
        calls = (self.calls if calls is None else calls) or length
        function = functools.partial(self._sample_codes, calls=calls, temperature=temperature)
        return self._run(function, "prior", _keys(seed, count, first))

    def decode(
        self, codes: np.ndarray | None, *, seed: int = 0, count: int | None = None, first: int = 0,
        steps: int | None = None, guidance: float | None = None, method: str | None = None, params=None,
    ) -> np.ndarray:  # fmt: skip
        """Codes int [b, l] or soft ones float [b, l, v] to uint8 images [b, y, x, c]; what is None is as the pipeline has it.

        Args:
          codes: None, with a `count`, draws from a generator trained without codes.
          steps: of the integrator; heun calls the generator twice in each, euler once.
          guidance: 1 is none, above 1 leans to the codes.
          method: "heun" or "euler".
          params: of the generator; None are those saved in the workdir.

        Raises:
          UserError: codes of another shape or type, outside of [0, V), or no points of simplices.
        """
        section = self._drawing()
        function = functools.partial(
            self._decode,
            steps=self.steps if steps is None else steps,
            scale=float(self.guidance if guidance is None else guidance),
            method=self.method if method is None else method,
        )
        if codes is None and section.model.positions:
            raise UserError(f"{self._names['generator']} was trained with codes; give some, as from sample_codes or encode")
        if codes is None:
            return self._run(function, "generator", _keys(seed, count or 0, first), params=params)
        codes = self._checked(codes, "decode")
        return self._run(function, "generator", _keys(seed, len(codes), first), codes, params=params)

    def sample(
        self, count: int, *, seed: int = 0, first: int = 0, calls: int | None = None, temperature: float = 1.0, **sampling
    ) -> np.ndarray:
        """New images uint8 [count, y, x, c]: codes as `sample_codes` draws them, then `decode` with `sampling`.

        Args:
          first: number of the first image: images [n, n + count) of a seed are these of any longer call.
        """
        codes = None
        if self._drawing().model.positions:
            codes = self.sample_codes(count, seed=seed, first=first, calls=calls, temperature=temperature)
        return self.decode(codes, seed=seed + 1, count=count, first=first, **sampling)

    def compose(
        self, parents: Sequence[np.ndarray], *, weights: Sequence[float] | None = None, keep: Sequence[int] = (),
        temperature: float = 0.0, seed: int = 0, first: int = 0,
    ) -> np.ndarray:  # fmt: skip
        """Codes int32 [b, l] put together from parents, each images [b, y, x, c], codes [b, l] or simplices [b, l, v].

        Every position is copied from one parent, drawn by `weights`; those of `keep` always from the first. Above temperature 0 the value
        of an image is drawn from its simplex there, so all of it from the weighted mean of the simplices. See `composition.mix`.
        Source: arXiv 2507.12318, section 4.

        Raises:
          UserError: parents of different lengths or kinds that do not go together; weights or positions to keep that do not fit.
        """
        parents = [np.asarray(parent) for parent in parents]
        if not parents:
            raise UserError("compose: there are no parents")
        if temperature and any(parent.ndim != 4 for parent in parents):
            raise UserError("compose: a temperature is for images; simplices have theirs, and codes are corners already")
        read = functools.partial(self.simplices, temperature=temperature) if temperature else self.encode
        found = [read(parent) if parent.ndim == 4 else self._checked(parent, "compose") for parent in parents]
        if len({len(parent) for parent in found}) > 1:
            raise UserError(f"compose: parents hold the same number of examples; they hold {[len(parent) for parent in found]}")
        numbers = first + np.arange(len(found[0]))
        try:
            return composition.mix(found, seed=seed, weights=weights, keep=keep, position=numbers).astype(np.int32)
        except ValueError as error:
            raise UserError(f"compose: {error}") from error

    def abstract(self, program: str):
        """Shapes and placements of the parameters that "encode", "sample_codes" or "decode" reads."""
        network = NETWORKS[program]
        return jax.tree.map(lambda leaf, dtype: leaf.update(dtype=dtype), self._placed(network), self._dtypes(network))

    def lower(self, program: str):
        """Lowers "encode", "sample_codes" or "decode" for the mesh, from shapes alone and with the pipeline's settings."""
        network = NETWORKS[program]
        (model, _), mesh = self._model(network), self._mesh(network)

        def batch(shape, dtype):
            return jax.ShapeDtypeStruct((self.batch, *shape), dtype, sharding=jax.NamedSharding(mesh, parallel.BATCH))

        keys = batch((), jax.random.key(0).dtype)
        if program == "encode":
            function, arguments = self._encode, [batch((self.size, self.size, 3), jnp.uint8)]
        elif program == "sample_codes":
            function, arguments = (
                functools.partial(self._sample_codes, calls=self.calls or model.positions, temperature=1.0),
                [keys],
            )
        else:
            function = functools.partial(self._decode, steps=self.steps, scale=self.guidance, method=self.method)
            arguments = [keys, *([batch((model.positions,), jnp.int32)] if model.positions else [])]
        with jax.set_mesh(mesh):
            return jax.jit(function).lower(self.abstract(program), *arguments)

    def _encoder(self, params, images, method=None):
        # float32 is float32 everywhere: by default TPUs round its factors to bfloat16, and GPUs to TF32
        with jax.default_matmul_precision("highest" if self.dtype == "float32" else None):
            return self._model("encoder")[0].apply({"params": params}, standardize(images), method=method)

    def _encode(self, params, images):
        return self._encoder(params, images, method="codes")

    def _features(self, params, images):
        model, tokens = self._model("encoder")[0], self._encoder(params, images)
        norm = functools.partial(model.apply, {"params": params}, method="normalize")
        found = jnp.concatenate([norm(tokens["cls"]), norm(tokens["patches"]).mean(axis=1)], axis=-1)
        return found.astype(jnp.float32)

    def _simplices(self, params, images, temperature):
        logits = self._encoder(params, images)["logits"]
        return relax(logits, "softmax", temperature=temperature[:, None, None])

    def _sample_codes(self, params, keys, *, calls, temperature):
        model, _ = self._model("prior")
        logits = functools.partial(model.apply, {"params": params})
        sampler = CodeSampler(calls=calls, temperature=temperature)
        return sampler.draw(logits, keys, model.positions, model.values)

    def _decode(self, params, keys, codes=None, *, steps, scale, method):
        model, _ = self._model("generator")
        objective = self.config[self._names["generator"]].objective

        def velocity(x, t, codes):
            prediction = model.apply({"params": params}, x, t, codes)
            return flow.to_velocity(prediction, x, t, kind=objective.prediction, floor=1e-3)

        guidance = Guidance(scale=scale if codes is not None else 1.0)
        sampler = Sampler(method=method, steps=steps, guidance=guidance)
        shape = (model.image, model.image, model.channels)
        x = sampler.draw(guided(velocity, codes, guidance), keys, shape)
        return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)

    def _section(self, network: str):
        name = self._names[network]
        if name not in self.config:
            raise UserError(f"{self.workdir} is a run whose recipe has no step {name!r}")
        return self.config[name]

    def _drawing(self):
        """The generator's section, of one that draws pixels."""
        section = self._section("generator")
        if section.latents:
            raise UserError(f"{self._names['generator']} draws latents; this version has no decoder that makes images of them")
        return section

    def _checked(self, codes: np.ndarray, where: str) -> np.ndarray:
        """Codes int32 [b, l] or float32 [b, l, v] that the generator can read."""
        model = self._section("generator").model
        if not model.positions:
            raise UserError(f"{where}: {self._names['generator']} was trained without codes, so it reads none")
        return inputs.check_codes(codes, length=model.positions, values=model["values"], where=where)

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

    def _dtypes(self, network: str):
        """Of each parameter."""
        _, shapes = self._model(network)
        if network == "encoder" and self.dtype:
            return compute_dtypes(shapes, self.dtype)
        return jax.tree.map(lambda _: jnp.dtype(self.config[self._names[network]].train.dtype), shapes)

    @functools.cache  # noqa: B019
    def _mesh(self, network: str):
        """A sampler reads all parameters in every one of its calls: small networks are kept whole, so that nothing is sent for it."""
        sizes = jax.tree.map(lambda leaf, dtype: leaf.size * dtype.itemsize, self._model(network)[1], self._dtypes(network))
        size = sum(jax.tree.leaves(sizes))
        return parallel.unsplit(self.mesh) if size <= WHOLE else self.mesh

    def _placed(self, network: str):
        _, shapes = self._model(network)
        return parallel.abstract(shapes, parallel.shardings(shapes, self._mesh(network), rules=RULES, strict=False))

    @functools.cache  # noqa: B019
    def _params(self, network: str):
        where = recipe.trained(self.config, self.workdir, self._names[network])
        params = checkpoint.load_params(where / "checkpoints", self._placed(network))
        return self.cast(params, network)  # once, not in every call

    @functools.cache  # noqa: B019
    def _jit(self, function, keywords):
        return jax.jit(functools.partial(function, **dict(keywords)))

    def _run(self, function, network: str, *arrays, params=None) -> np.ndarray:
        """Calls a function of (params, batch of each array) on padded batches, and joins the results; None are the network's params."""
        if not len(arrays[0]):
            raise UserError("there is nothing to do: give one image, one code or a count of 1 at least")
        keywords = ()
        if isinstance(function, functools.partial):
            function, keywords = function.func, tuple(sorted(function.keywords.items()))
        starts = range(0, len(arrays[0]), self.batch)
        batches = ([array[start : start + self.batch] for array in arrays] for start in starts)
        mesh = self._mesh(network) if params is None else self.mesh
        params = self._params(network) if params is None else params
        return np.concatenate(list(parallel.each(self._jit(function, keywords), params, batches, mesh=mesh, size=self.batch)))


def _keys(seed: int, count: int, first: int):
    return jax.vmap(lambda number: jax.random.fold_in(jax.random.key(seed), number))(first + jnp.arange(count))


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
