"""What an encoder's codes are worth: how they use their values, whether two views of an image agree, and what can be read from them.

The encoder's stage asks on the way, the probe job when the codes are written, `dlc probe` whenever somebody wants to know.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dlc_jax import parallel
from dlc_jax.data import inputs, sources, transforms
from dlc_jax.data.sources import DataSet
from dlc_jax.errors import UserError
from dlc_jax.evals import codes as health
from dlc_jax.evals import neighbors, probe
from dlc_jax.networks import Networks
from dlc_jax.stage import Evaluator

PART = 256  # images in memory of the host at once
PIXELS = 32  # side of the images whose pixels are classified: larger ones are scaled down


@dataclasses.dataclass(frozen=True, kw_only=True)
class Monitor:
    """The `monitor` section of an encoder: a checkup of the teacher on the way.

    Attributes:
      every: steps between two; 0 is only at the end.
      count: images of the train split, and as many of validation; 0 is no checkup at all.
    """

    every: int = 0
    count: int = 1000

    def __post_init__(self):
        if self.every < 0 or self.count < 0:
            raise UserError(f"encoder.monitor: every and count must be at least 0; got {self}")


def evaluators(config, *, step: str, workdir) -> tuple[Evaluator, ...]:
    """What the `monitor` section of step `step`, an encoder, asks for: one evaluator, or none.

    It gives `codes/…` (`health`), `agreement/…` and, of data with factors, `probe/…`, `probe_knn/…`, `probe_features/…` and so on; see
    `probes`. Health and agreement are of validation images.
    """
    section, monitor = config[step], Monitor(**config[step].monitor)
    values, data = section.model.simplicial["values"], DataSet(**config.data)

    @functools.cache
    def reader(mesh):  # compiled once, not at every checkup
        parts = parallel.shares(mesh)
        batch = -(-min(PART, monitor.count) // parts) * parts
        return Networks(config, workdir, mesh, batch=batch, dtype=section.train.dtype)[step]

    def run(state, frozen, mesh, directory):
        network = reader(mesh)
        params = network.cast(state.ema)
        asked = (network.encode, network.features)
        encode, features = (functools.partial(ask, params=params) for ask in asked)
        opened = {split: data.source(split) for split in ("train", "validation")}
        rows = {split: sources.choose(source, monitor.count) for split, source in opened.items()}
        labels = data.factors()
        of = {"codes": encode} | ({"features": features} if labels else {})
        found = {split: read(opened[split], rows[split], of) for split in opened}
        result = {f"codes/{key}": value for key, value in health.health(found["validation"]["codes"], values=values).items()}
        crops = section.crops.to_dict()
        alike = agreement(opened["validation"], rows["validation"], encode, crops=crops, values=values, seed=config.seed)
        result |= {f"agreement/{key}": value for key, value in alike.items()}
        return result | (probes(found["train"], found["validation"], factors=labels, values=values) if labels else {})

    return (Evaluator("monitor", monitor.every, run),) if monitor.count else ()


def read(source, rows: Sequence[int], of: Mapping[str, Callable]) -> dict[str, np.ndarray]:
    """What each function of images says of records `rows`, a few at a time, by the function's name; and their `factors` if they have any."""
    found: dict[str, list] = {}
    for start in range(0, len(rows), PART):
        records = [source[int(row)] for row in rows[start : start + PART]]
        images = [record["image"] for record in records]
        for name, function in of.items():
            found.setdefault(name, []).append(function(images))
        if "factors" in records[0]:
            found.setdefault("factors", []).append(np.stack([record["factors"] for record in records]))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def pixels(images: Sequence[np.ndarray]) -> np.ndarray:
    """Images as features float32 [b, d]: their pixels, scaled down to PIXELS a side where they are larger."""
    size = min(PIXELS, *(min(image.shape[:2]) for image in images))
    return inputs.fit(images, size=size).reshape(len(images), -1).astype(np.float32)


def agreement(source, rows: Sequence[int], encode: Callable, *, crops: Mapping[str, dict], values: int, seed: int) -> dict:
    """Agreement of the codes of two augmented views of each image; see `evals.codes.agreement`.

    The views are two global crops as the encoder was trained with, the same for a seed. With several kinds of crops each kind's positions,
    those trained to agree under it, are compared under its own crops.

    Args:
      encode: images to codes [n, l].
      crops: {kind: arguments of `MultiCrop`}.
    """
    kinds = sorted(crops)
    views = transforms.Views(
        {kind: transforms.MultiCrop(**{**crops[kind], "global_crops": 2, "local_crops": 0}) for kind in kinds}
    )
    pairs = []
    for start in range(0, len(rows), PART):
        part = [int(row) for row in rows[start : start + PART]]
        cut = [views({"image": source[row]["image"]}, np.random.default_rng((seed, row))) for row in part]
        codes = {kind: [encode(np.stack([one[f"{kind}/global"][view] for one in cut])) for view in range(2)] for kind in kinds}
        share = codes[kinds[0]][0].shape[1] // len(kinds)
        ranges = {kind: slice(place * share, (place + 1) * share) for place, kind in enumerate(kinds)}
        pairs.append([np.concatenate([codes[kind][view][:, ranges[kind]] for kind in kinds], axis=1) for view in range(2)])
    first, second = (np.concatenate(view) for view in zip(*pairs, strict=True))
    return dict(health.agreement(first, second, values=values))


def probes(
    train: Mapping[str, np.ndarray],
    unseen: Mapping[str, np.ndarray],
    *,
    factors: Mapping[str, Sequence],
    values: int,
    split: str = "validation",
    fit: probe.Fit = probe.Fit(),  # noqa: B008, it is frozen
) -> dict[str, float]:
    """How well each factor can be read by what was learned from `train`; shares of right answers on `unseen`.

    Args:
      train, unseen: of `read`, all with `factors`: `codes`, and, if they are there, `features` (as `Pipeline.features` gives them),
        `pixels`, and `untrained`, codes of an untrained encoder.
      factors: {name: its values}.
      values: V.
      split: of `unseen`. "validation" gives names that begin with probe, others with probe_SPLIT.
      fit: of the linear probe of codes. Features and pixels have a scale of their own, so their rates are always `probe.RATES`.

    Returns:
      With NAME a factor's: `probe/NAME`, linear probe of the codes, its rate chosen on a part of train; `probe_best_on_SPLIT/NAME`, its
      rate chosen on `unseen` itself; `probe_knn/NAME`, vote of the 5 nearest codes; `probe_features/NAME`, linear probe of the class
      token, `probe_features_patches/NAME` of it and the patches' mean; `probe_features_knn/NAME_K`, weighted vote of the K nearest
      class tokens; `probe_untrained/NAME` and `probe_pixels/NAME`, linear. And of each group its `count`.
    """
    prefix = "probe" if split == "validation" else f"probe_{split}"
    classes = [len(kinds) for kinds in factors.values()]
    labels, asked = train["factors"], unseen["factors"]
    result: dict[str, float] = {}

    def note(group, accuracies):
        result.update({f"{group}/{name}": float(share) for name, share in zip(factors, accuracies, strict=True)})
        result[f"{group}/count"] = len(asked)

    for name, after in (("codes", ""), ("untrained", "_untrained")):
        if name in train:
            found = probe.linear_probe(train[name], labels, unseen[name], asked, classes=classes, values=values, fit=fit)
            note(f"{prefix}{after}", found.accuracy)
            if name == "codes":
                note(f"{prefix}_best_on_{split}", found.best)
                nearest = neighbors.nearest_neighbors(train[name], unseen[name], neighbors=5)
                guesses = [neighbors.vote(labels[:, f][nearest], classes=kinds) for f, kinds in enumerate(classes)]
                note(f"{prefix}_knn", [np.mean(guess == asked[:, f]) for f, guess in enumerate(guesses)])
    scaled = dataclasses.replace(fit, rates=probe.RATES)
    dense = {}
    if "features" in train:
        half = train["features"].shape[1] // 2  # the class token
        dense |= {"_features": (train["features"][:, :half], unseen["features"][:, :half])}
        dense |= {"_features_patches": (train["features"], unseen["features"])}
        voted = neighbors.feature_knn(dense["_features"][0], labels, dense["_features"][1], asked, classes=classes)
        for number, accuracies in voted.items():
            result.update(
                {f"{prefix}_features_knn/{name}_{number}": float(x) for name, x in zip(factors, accuracies, strict=True)}
            )
        result[f"{prefix}_features_knn/count"] = len(asked)
    if "pixels" in train:
        dense |= {"_pixels": (train["pixels"], unseen["pixels"])}
    for after, (x, y) in dense.items():
        note(f"{prefix}{after}", probe.linear_probe(x, labels, y, asked, classes=classes, fit=scaled).accuracy)
    return result
