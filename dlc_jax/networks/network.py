"""One trained network: what every kind of it shares."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax import parallel, recipe
from dlc_jax.errors import UserError
from dlc_jax.networks import weights

# Bytes of the largest network that every device keeps whole. A sampler reads all parameters in each
# of its calls: small networks are kept whole, so that nothing is sent for it.
WHOLE_BYTES = 4 * 2**30


class Network:
    """A trained step's network. Each kind gives `model`, `inputs` and `lower`.

    Attributes:
      config, workdir, step: where it is from.
      section: of the step.
      model: the linen module.
      batch: examples per call.
      full_mesh: over which parameters that a caller gives are placed.
    """

    def __init__(self, config, workdir: Path, step: str, *, mesh, batch: int, dtype: str | None):
        self.config, self.workdir, self.step = config, workdir, step
        self.section, self.batch = config[step], batch
        self.full_mesh, self._dtype = mesh, dtype
        self._programs: dict = {}

    @functools.cached_property
    def model(self):
        raise NotImplementedError

    def inputs(self) -> tuple:
        """Arrays of one example that the model is initialized with."""
        raise NotImplementedError

    @functools.cached_property
    def shapes(self):
        """Of the parameters, as they were trained."""
        key, inputs = jax.random.key(0), self.inputs()
        return jax.eval_shape(lambda: self.model.init(key, *inputs)["params"])

    @functools.cached_property
    def dtypes(self):
        """In which each parameter is used."""
        return jax.tree.map(lambda _: jnp.dtype(self.section.train.dtype), self.shapes)

    @functools.cached_property
    def mesh(self):
        """The devices, each with all parameters if the network is small."""
        sizes = jax.tree.map(
            lambda leaf, dtype: leaf.size * dtype.itemsize, self.shapes, self.dtypes
        )
        small = sum(jax.tree.leaves(sizes)) <= WHOLE_BYTES
        return parallel.unsplit(self.full_mesh) if small else self.full_mesh

    @property
    def directory(self) -> Path:
        """Where it was trained."""
        return recipe.trained(self.config, self.workdir, self.step)

    @functools.cached_property
    def params(self):
        """The saved average, placed and cast. Of several processes all must ask, together."""
        return self.load(self.directory, self.mesh)

    def load(self, directory: Path, mesh, *, step: int | None = None):
        """The saved average of a trained step of the same model, placed and cast.

        Args:
          step: of its checkpoints; None is the newest.
        """
        found = weights.load(directory, self.section.stage, self._sharded(mesh), step=step)
        return self.cast(found)

    def cast(self, params):
        """Parameters in the dtypes that the network computes with."""
        return jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), params, self.dtypes)

    def abstract(self):
        """Shapes and placements of the parameters as they are used."""
        return jax.tree.map(
            lambda leaf, dtype: leaf.update(dtype=dtype), self._sharded(self.mesh), self.dtypes
        )

    def run(self, function, *arrays, params=None, mesh=None, **static) -> np.ndarray:
        """function(params, *arrays, **static) on padded batches, joined; compiled once per shape.

        Args:
          function: a method of this network.
          params: None are the saved ones.
          mesh: where they are; None is `full_mesh` of parameters that are given.
          static: hashable, by which a program is compiled anew.

        Raises:
          UserError: the arrays are empty.
        """
        if not len(arrays[0]):
            raise UserError("there is nothing to do: give one image, one code or a count of 1")
        key = (function.__name__, *sorted(static.items()))
        if key not in self._programs:
            self._programs[key] = jax.jit(functools.partial(function, **static))
        starts = range(0, len(arrays[0]), self.batch)
        batches = ([array[start : start + self.batch] for array in arrays] for start in starts)
        if mesh is None:
            mesh = self.mesh if params is None else self.full_mesh
        params = self.params if params is None else params
        rows = parallel.each(self._programs[key], params, batches, mesh=mesh, size=self.batch)
        return np.concatenate(list(rows))

    def labels(self, labels: np.ndarray | None, count: int) -> dict[str, np.ndarray]:
        """{"label": int32 [count]} as the model reads them; {} of a model without classes.

        Args:
          labels: class of each example, int [count]. None is the null class.

        Raises:
          UserError: classes of another shape or type, out of range, or for a model without.
        """
        classes = self.model.classes
        if not classes:
            if labels is not None:
                raise UserError(f"{self.step} was trained without classes; give no labels")
            return {}
        if labels is None:
            return {"label": np.full(count, classes, np.int32)}
        labels = np.asarray(labels)
        if labels.shape != (count,) or labels.dtype.kind not in "iu":
            raise UserError(
                f"{self.step}: labels are one integer for each of {count} examples; got "
                f"{labels.dtype} {labels.shape}"
            )
        if labels.size and not 0 <= labels.min() <= labels.max() < classes:
            found = f"{labels.min()}..{labels.max()}"
            raise UserError(f"{self.step}: labels must lie in 0..{classes - 1}; found {found}")
        return {"label": labels.astype(np.int32)}

    def random_labels(self, count: int, *, seed: int, first: int = 0) -> np.ndarray:
        """Classes int [count], each as likely as any, of the images of the numbers from `first`."""
        return np.array(
            [
                np.random.default_rng([seed, number]).integers(self.model.classes)
                for number in range(first, first + count)
            ]
        )

    def _lower(self, function, *shapes, params=None, **static):
        """Lowers a function for the mesh, from (shape, dtype) of one example of each array.

        Args:
          params: abstract; None are `abstract()`.
        """
        arrays = [
            jax.ShapeDtypeStruct(
                (self.batch, *shape), dtype, sharding=jax.NamedSharding(self.mesh, parallel.BATCH)
            )
            for shape, dtype in shapes
        ]
        with jax.set_mesh(self.mesh):
            lowered = jax.jit(functools.partial(function, **static))
            return lowered.lower(self.abstract() if params is None else params, *arrays)

    def _sharded(self, mesh):
        shardings = parallel.shardings(self.shapes, mesh, rules=self.model.rules, strict=False)
        return parallel.abstract(self.shapes, shardings)


def keys(seed: int, count: int, first: int = 0):
    """A key for each of `count` samples, folded from the seed and the sample's number."""
    numbers = first + jnp.arange(count)
    return jax.vmap(lambda number: jax.random.fold_in(jax.random.key(seed), number))(numbers)


def key_dtype():
    return jax.random.key(0).dtype
