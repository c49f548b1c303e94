"""Results as JSON: values, and all that they depend on."""

import time
from collections.abc import Mapping, Sequence

import jax

from dlc_jax import metrics as measures
from dlc_jax import workdir
from dlc_jax.evaluation import metrics
from dlc_jax.evaluation.diversity import diversity
from dlc_jax.evaluation.images import ImageSet
from dlc_jax.evaluation.reference import ROWS, Reference
from dlc_jax.evaluation.scoring import Scorer
from dlc_jax.features.lpips import Lpips

FORMAT = 1


def scored(
    images: ImageSet,
    kinds: Sequence[str],
    *,
    reference: Reference | None = None,
    scorer: Scorer | None = None,
    lpips: Lpips | None = None,
    seed: int = 0,
    batch: int = 64,
) -> dict:
    """One set of images: {"samples", "sha256", "count", "size", "metrics", "warnings", …}.

    Args:
      images: the samples.
      kinds: of `metrics.parse`.
      reference, scorer, lpips: what these kinds need.
      seed: of what is drawn: the pairs of LPIPS.
      batch: pairs of LPIPS at a time.

    Raises:
      UserError: see `metrics.score` and `diversity`.
    """
    began, values, warnings = time.monotonic(), {}, []
    others = [kind for kind in kinds if kind != "lpips"]
    if others:
        name = images.name
        values, warnings = metrics.score(images, others, reference, scorer, name=name)
    if "lpips" in kinds:
        values["lpips"] = diversity(images, lpips, seed=seed, batch=batch)
    seconds = time.monotonic() - began
    about = {"samples": images.name, "sha256": images.sha256, "count": images.count}
    about |= {"size": list(images.size), "gray": images.gray}
    pace = {"seconds": round(seconds, 2), "images_per_s": round(images.count / seconds, 1)}
    return about | {"metrics": values, "warnings": warnings} | pace


def document(
    results: Sequence[Mapping],
    *,
    seed: int,
    image: int | None = None,
    reference: Reference | None = None,
    scorer: Scorer | None = None,
    lpips: Lpips | None = None,
    **more,
) -> dict:
    """The whole file: {"results": sets, and what they share: networks, reference, versions, …}."""
    made = {"format": FORMAT, "results": list(results), "seed": seed, "image": image}
    if scorer is not None:
        network = scorer.extractor
        made |= {"network": network.name, "protocol": network.protocol, "batch": scorer.batch}
        made |= {"weights_sha256": network.weights_sha256, "published": network.published}
    if reference is not None:
        rows = 0 if reference.features is None else len(reference.features)
        about = {"name": reference.name, "sha256": reference.sha256, "count": reference.count}
        made["reference"] = about | {"rows": rows, "rows_at_most": ROWS}
    if lpips is not None:
        about = {"trunk": lpips.trunk, "version": lpips.version}
        about |= {"weights_sha256": lpips.weights_sha256, "published": lpips.published}
        made["lpips"] = about
    made |= {"matmul_precision": "highest", "versions": measures.versions()}
    made |= {"device": measures.device(), "processes": jax.process_count()}
    return workdir.plain(made | {"commit": workdir.commit()} | more)
