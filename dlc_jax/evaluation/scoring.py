"""One pass of images through a feature network, into moments, scores and features on disk."""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from dlc_jax import parallel, stop
from dlc_jax.data.progress import Progress
from dlc_jax.data.sweep import sweep
from dlc_jax.evals.frechet import Moments
from dlc_jax.evals.inception_score import InceptionScore
from dlc_jax.evaluation.images import WORKERS, ImageSet
from dlc_jax.features import Extractor

BLOCK = 1024  # features taken in at once, whatever the batch: sums then go the same way


@dataclasses.dataclass(kw_only=True)
class Collected:
    """What a pass left of a set of images.

    Attributes:
      count: images.
      moments: {output: its Moments}.
      features: {output: float32 [rows kept, width]}, a memory map.
      inception_score: None without "logits".
    """

    count: int
    moments: Mapping[str, Moments]
    features: Mapping[str, np.ndarray]
    inception_score: InceptionScore | None


class Scorer:
    """A feature network on the devices of a mesh; compiled once for a size of images.

    Several processes share the images: each reads and prepares the rows that its own devices
    compute, and all get all features, in one order. So every process ends with the same numbers,
    and a batch size, a number of devices or of processes changes only the rounding of features.
    """

    def __init__(self, extractor: Extractor, *, mesh: Mesh | None = None, batch: int = 64):
        """Takes a network; batches are rounded up to what the devices divide."""
        self.extractor, self.mesh = extractor, mesh or parallel.make_mesh()
        shares = parallel.shares(self.mesh)
        self.batch = -(-batch // shares) * shares
        where = parallel.replicated(self.mesh)
        self._params = jax.tree.map(lambda leaf: parallel.spread(leaf, where), extractor.params)
        self._compiled = {}

    @property
    def main(self) -> str:
        """The output that is compared: the first, "pool" or "cls"."""
        return next(iter(self.extractor.outputs))

    def features(
        self, images: ImageSet, outputs: Sequence[str], *, name: str = ""
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields {output: float32 [at most batch, width]} of consecutive images.

        Raises:
          UserError: an image cannot be read, or is not of a size that the network reads.
        """
        own = parallel.rows(self.mesh, self.batch)
        starts = range(0, images.count, self.batch)
        numbers = [min(start + row, images.count - 1) for start in starts for row in own.tolist()]
        prepare, function = self.extractor.prepare, self._function(tuple(outputs))
        ready = sweep(lambda n: prepare([images.read(n)])[0], numbers, workers=WORKERS)
        before = None
        silent = jax.process_index() > 0
        with contextlib.closing(ready), Progress(name, "images", silent=silent) as progress:
            for start in starts:
                stop.breathe()
                rows = np.stack([next(ready) for _ in own])
                with jax.set_mesh(self.mesh):
                    batch = parallel.to_global(rows, self.mesh, self.batch)
                    found = parallel.everywhere(function(self._params, batch))
                if before is not None:  # the devices are at work on this batch meanwhile
                    yield _cut(*before)
                before = found, min(self.batch, images.count - start)
                progress(start, images.count)
        yield _cut(*before)

    def _function(self, outputs):
        if outputs not in self._compiled:

            def chosen(params, prepared):
                found = self.extractor.apply(params, prepared)
                return {name: found[name] for name in outputs}

            self._compiled[outputs] = jax.jit(chosen)
        return self._compiled[outputs]

    @contextlib.contextmanager
    def collect(
        self,
        images: ImageSet,
        *,
        moments: Sequence[str] = (),
        keep: Mapping[str, np.ndarray] | None = None,
        score: bool = False,
        name: str = "features",
    ) -> Iterator[Collected]:
        """One pass; the features that are kept are on disk until the context ends.

        Args:
          moments: outputs whose mean and covariance are wanted.
          keep: {output: increasing numbers of the images whose features are kept}.
          score: whether the Inception Score is wanted.
          name: of the line of progress.

        Raises:
          UserError: as `features`; NaN or infinite features, named with their row.
        """
        keep = keep or {}
        widths = self.extractor.outputs
        outputs = [*dict.fromkeys([*moments, *keep, *["logits"] * score])]
        sums = {output: Moments.of(widths[output]) for output in moments}
        logits = InceptionScore() if score else None
        with tempfile.TemporaryDirectory(prefix="dlc_features_") as folder:
            kept = {}
            for output, rows in keep.items():
                kept[output] = _on_disk(Path(folder) / output, (len(rows), widths[output]))
            for start, found in _blocks(self.features(images, outputs, name=name)):
                size = len(found[outputs[0]])
                for output in moments:
                    sums[output].add(found[output])
                if logits is not None:
                    logits.add(found["logits"], np.arange(start, start + size))
                for output, rows in keep.items():
                    first, last = np.searchsorted(rows, (start, start + size))
                    kept[output][first:last] = found[output][rows[first:last] - start]
            about = {"moments": sums, "features": kept, "inception_score": logits}
            yield Collected(count=images.count, **about)


def _on_disk(path: Path, shape: tuple[int, int]) -> np.ndarray:
    with open(path, "wb") as file:  # a map of a disk that is full would end the process
        os.posix_fallocate(file.fileno(), 0, 4 * max(1, shape[0] * shape[1]))
    return np.memmap(path, np.float32, "r+", shape=shape)


def _cut(found, count: int) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf)[:count] for name, leaf in found.items()}


def _blocks(batches) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(first row, features) of BLOCK rows, the last of fewer."""
    start, waiting, size = 0, [], 0
    for batch in batches:
        waiting.append(batch)
        size += len(next(iter(batch.values())))
        while size >= BLOCK:
            joined = {name: np.concatenate([each[name] for each in waiting]) for name in batch}
            yield start, {name: rows[:BLOCK] for name, rows in joined.items()}
            waiting = [{name: rows[BLOCK:] for name, rows in joined.items()}]
            start, size = start + BLOCK, size - BLOCK
    if size:
        names = waiting[0]
        yield start, {name: np.concatenate([each[name] for each in waiting]) for name in names}
