"""The metrics by name, each with its error where one is defined."""

import math
from collections.abc import Sequence

import numpy as np

from dlc_jax.evals import frechet, kernel_distance, manifold, vendi
from dlc_jax.evaluation import names
from dlc_jax.evaluation.images import ImageSet
from dlc_jax.evaluation.reference import Reference
from dlc_jax.evaluation.scoring import Collected, Scorer

LARGE = 0.1  # share of a distance that its bias may be without a warning


def score(
    images: ImageSet,
    kinds: Sequence[str],
    reference: Reference | None,
    scorer: Scorer,
    *,
    name: str = "samples",
) -> tuple[dict[str, dict], list[str]]:
    """({metric: {"value", "error", …}}, warnings) of a set of images, in one pass over them.

    A Fréchet distance has besides "bias", what as many images of the reference's own Gaussian would
    get, and "bias_reference", the same for the reference's number, if it is known. The kernel
    distance is of all pairs, unbiased. An error is None where none is defined. See `evals`.

    Args:
      images: the samples.
      kinds: of `parse`, "lpips" excepted: see `diversity`.
      reference: None if no kind refers to one.
      scorer: of the network.
      name: of the line of progress.

    Raises:
      UserError: features that are NaN, or all equal; too few images for a metric.
    """
    main, every = scorer.main, np.arange(images.count)
    outputs = {"frechet": main, "spatial": "spatial"}
    wanted = [outputs[kind] for kind in kinds if kind in outputs]
    keep = {output: every for output in wanted}
    if names.needs_features(kinds) or "vendi" in kinds:
        keep[main] = every
    called = names.called(scorer.extractor.name)
    values, warnings = {}, _doubts(images, reference)
    passed = scorer.collect(images, moments=wanted, keep=keep, score="score" in kinds, name=name)
    with passed as found:
        near = None
        if set(names.MANIFOLD) & set(kinds):
            near = manifold.precision_recall_density_coverage(
                found.features[main], reference.features
            )
        for kind in kinds:
            if kind in outputs:
                value = _frechet(found, reference, outputs[kind], kind)
                warnings += _small(called[kind], value, images.count)
            elif kind == "score":
                result = found.inception_score.score()
                value = {"value": result.mean, "error": result.error, "std": result.std}
            elif kind == "kernel":
                result = kernel_distance.kernel_distance(found.features[main], reference.features)
                value = {"value": result.value, "error": result.error}
            elif kind == "vendi":
                value = {"value": vendi.vendi_score(found.features[main]), "error": None}
            else:
                value = {"value": getattr(near, kind), "error": None}
                if kind == "precision":  # images are in or out, one by one
                    share = value["value"]
                    value["error"] = math.sqrt(share * (1 - share) / images.count)
            values[called[kind]] = value
    return values, warnings


def _frechet(found: Collected, reference: Reference, output: str, kind: str) -> dict:
    mu, sigma = reference.moments("spatial" if kind == "spatial" else "main")
    moments = found.moments[output]
    pair = moments.mean, moments.covariance, mu, sigma
    influence = frechet.influence(found.features[output], *pair)
    made = {
        "value": frechet.distance(*pair),
        "error": frechet.standard_error(influence),
        "bias": frechet.bias(sigma, found.count),
    }
    if reference.count:
        made["bias_reference"] = frechet.bias(sigma, reference.count)
    return made


def _doubts(images: ImageSet, reference: Reference | None) -> list[str]:
    said = []
    if images.gray:
        said.append(f"{images.gray} of {images.count} images of {images.name} are gray; repeated")
    if images.skipped:
        left = ", ".join(f"{count}: {why}" for why, count in sorted(images.skipped.items()))
        said.append(f"left out of {images.name}: {left}")
    if reference is not None and reference.images == images.sha256:
        said.append(f"{images.name} and the reference are the same images")
    elif reference is not None and reference.size not in (None, images.size):
        sizes = [" x ".join(map(str, size)) for size in (images.size, reference.size)]
        said.append(
            f"{images.name} are of {sizes[0]} pixels, the reference of {sizes[1]}: part of a "
            "distance is that"
        )
    return said


def _small(name: str, value: dict, count: int) -> list[str]:
    if value["bias"] <= LARGE * value["value"]:
        return []
    return [
        f"{name} {value['value']:.4g} of {count} images: about {value['bias']:.3g} of it is bias, "
        "for want of images; compare it only with values of as many images, or give more"
    ]
