"""Scores while a generator trains: images drawn on the way, compared with real ones."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dlc_jax import features, workdir
from dlc_jax.diffusion.guidance import Guidance
from dlc_jax.diffusion.sample import Sampler
from dlc_jax.errors import UserError
from dlc_jax.evaluation import names, results
from dlc_jax.evaluation.images import ImageSet, of_pixels
from dlc_jax.evaluation.reference import Reference, of_images
from dlc_jax.evaluation.scoring import Scorer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """The `scores` section: what is measured of images drawn on the way. See docs/evaluation.md.

    Attributes:
      weights: file of the feature network; "" measures nothing.
      network: "inception", "dinov2", "squeezenet", "resnet20" or "resnet56".
      protocol: how images get to the network's size; "" is the network's first.
      metrics: their names; () are the network's usual ones. LPIPS is not among them.
      every: steps between two; 0 is only at the end.
      count: images drawn each time, always of the same codes with the same noise. They are held in
        memory.
      reference: split of the real images.
      reference_count: of them, evenly spaced; 0 takes all.
      batch: images at a time.
      sampler: how they are drawn.
    """

    weights: str = ""
    network: str = "inception"
    protocol: str = ""
    metrics: tuple[str, ...] = ()
    every: int = 0
    count: int = 5000
    reference: str = "train"
    reference_count: int = 0
    batch: int = 64
    sampler: Sampler = Sampler(steps=50, guidance=Guidance(scale=1.0))

    def __post_init__(self):
        if self.every < 0 or self.count < 2 or self.reference_count < 0 or self.batch < 1:
            raise UserError(
                f"scores: every={self.every} and reference_count={self.reference_count} must be at "
                f"least 0, batch={self.batch} at least 1, count={self.count} at least 2"
            )
        if self.network not in features.NETWORKS:
            known = ", ".join(features.NETWORKS)
            raise UserError(f"scores.network={self.network!r} is unknown; known: {known}")
        if "lpips" in self.kinds:
            raise UserError("scores.metrics: lpips is not measured on the way; use dlc evaluate")

    @property
    def kinds(self) -> list[str]:
        """Kinds of its metrics."""
        text = ",".join(self.metrics) or names.usual(self.network)
        return names.parse(text, self.network)


class TrainingScores:
    """The evaluator's work: {metric: value, metric_error: its standard error}.

    Everything that is the same each time, the network and the reference's statistics, is made at
    the first. Several processes share the images and end with the same values.
    """

    def __init__(
        self,
        section: Scores,
        source: Callable,
        draw: Callable[..., np.ndarray],
        *,
        seed: int,
        cache: str | None = None,
    ):
        """
        Args:
          source: (split) -> its images, as `DataSet.source`.
          draw: (state, mesh) -> `count` images, uint8 [n, y, x, 3], in all processes.
          seed: of the recipe, for the file of results.
          cache: folder of the reference's statistics, see `data.cache.folder_of`.
        """
        self._section, self._source, self._draw = section, source, draw
        self._seed, self._cache = seed, cache
        self._made: tuple[Scorer, Reference] | None = None

    def check(self) -> None:
        """Raises UserError if the file of weights does not fit, before anything is trained."""
        self._load()

    def __call__(self, state, frozen, mesh, directory: Path) -> dict[str, float]:
        if self._made is None:
            scorer = Scorer(self._load(), mesh=mesh, batch=self._section.batch)
            self._made = scorer, of_images(self._real(), scorer, cache=self._cache)
        scorer, reference = self._made
        drawn = self._draw(state, mesh)
        step = int(state.step)
        images = of_pixels(f"step {step}", drawn.__getitem__, len(drawn))
        shared = {"reference": reference, "scorer": scorer, "seed": self._seed}
        found = results.scored(images, self._section.kinds, **shared)
        workdir.write(directory / "scores.json", results.document([found], step=step, **shared))
        values = found["metrics"].items()
        errors = {f"{name}_error": each["error"] for name, each in values}
        return {name: each["value"] for name, each in values} | {
            name: error for name, error in errors.items() if error is not None
        }

    def _load(self):
        section = self._section
        return features.load(
            section.network, weights=section.weights, protocol=section.protocol or None
        )

    def _real(self) -> ImageSet:
        source = self._source(self._section.reference)
        count = min(self._section.reference_count or len(source), len(source))
        rows = (np.arange(count) * len(source) // count).tolist()
        name = f"{self._section.reference} images"
        return of_pixels(name, lambda number: source[rows[number]]["image"], count)
