"""What an encoder's codes are worth: how they use their values, whether two views of an image
agree, and what can be read from them.

The encoder's stage asks on the way, the probe job when the codes are written, and `dlc probe` at
any time.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dlc_jax import parallel
from dlc_jax.composition import groups
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


def evaluators(config, monitor: Monitor, *, step: str, workdir) -> tuple[Evaluator, ...]:
    """The checkup of step `step`, an encoder, that `monitor` asks for: one evaluator, or none.

    It gives `codes/…` (`health`), `agreement/…` and, of data with factors, the groups of `probes`.
    Health and agreement are of validation images.
    """
    section, data = config[step], DataSet(**config.data)
    values = section.model.simplicial["values"]

    @functools.cache
    def network(mesh):  # compiled once, not at every checkup
        parts = parallel.shares(mesh)
        batch = -(-min(PART, monitor.count) // parts) * parts
        return Networks(config, workdir, mesh, batch=batch, dtype=section.train.dtype)[step]

    def run(state, frozen, mesh, directory):
        encoder = network(mesh)
        params = encoder.cast(state.ema)
        encode = functools.partial(encoder.encode, params=params)
        opened = {split: data.source(split) for split in ("train", "validation")}
        rows = {split: sources.choose(source, monitor.count) for split, source in opened.items()}
        labels, of = data.factors(), {"codes": encode}
        if labels:
            of["features"] = functools.partial(encoder.features, params=params)
        records = {split: read(opened[split], rows[split], of) for split in opened}
        groups = {
            "codes": health.health(records["validation"]["codes"], values=values),
            "agreement": agreement(
                opened["validation"],
                rows["validation"],
                encode,
                crops=section.crops.to_dict(),
                values=values,
                seed=config.seed,
            ),
        }
        result = {f"{name}/{key}": x for name, group in groups.items() for key, x in group.items()}
        if labels:
            result |= probes(records["train"], records["validation"], factors=labels, values=values)
        return result

    return (Evaluator("monitor", monitor.every, run),) if monitor.count else ()


def read(source, rows: Sequence[int], of: Mapping[str, Callable]) -> dict[str, np.ndarray]:
    """What each function of images says of records `rows`, by the function's name.

    A few records are read at a time. Their `factors` are returned beside it, if they have any.
    """
    found: dict[str, list] = {}
    for start in range(0, len(rows), PART):
        records = [source[int(row)] for row in rows[start : start + PART]]
        images = [record["image"] for record in records]
        for name, function in of.items():
            found.setdefault(name, []).append(function(images))
        if "factors" in records[0]:
            factors = np.stack([record["factors"] for record in records])
            found.setdefault("factors", []).append(factors)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def pixels(images: Sequence[np.ndarray]) -> np.ndarray:
    """Images as features float32 [b, d]: their pixels, at most PIXELS a side."""
    size = min(PIXELS, *(min(image.shape[:2]) for image in images))
    return inputs.fit(images, size=size).reshape(len(images), -1).astype(np.float32)


def agreement(
    source,
    rows: Sequence[int],
    encode: Callable,
    *,
    crops: Mapping[str, dict],
    values: int,
    seed: int,
) -> dict:
    """Agreement of the codes of two augmented views of each image; see `evals.codes.agreement`.

    The views are two global crops as the encoder was trained with, the same for a seed. With
    several kinds of crops each kind's positions, those trained to agree under it, are compared
    under its own crops.

    Args:
      encode: images to codes [n, l].
      crops: {kind: arguments of `MultiCrop`}.
    """
    kinds = sorted(crops)
    pair = {"global_crops": 2, "local_crops": 0}
    cut = transforms.Views({kind: transforms.MultiCrop(**crops[kind] | pair) for kind in kinds})
    pairs = []
    for start in range(0, len(rows), PART):
        views = [
            cut({"image": source[row]["image"]}, np.random.default_rng((seed, row)))
            for row in map(int, rows[start : start + PART])
        ]
        pairs.append([])
        for number in range(2):
            codes = [
                encode(np.stack([v[f"{kind}/global"][number] for v in views])) for kind in kinds
            ]
            shares = groups.shared_out(crops, codes[0].shape[1])
            own = [each[:, shares[kind]] for kind, each in zip(kinds, codes)]
            pairs[-1].append(np.concatenate(own, axis=1))
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
    """How well each factor can be read by what was learned from `train`.

    Args:
      train, unseen: of `read`, all with `factors`: `codes`, and, if they are there, `features` (as
        `Pipeline.features` gives them), `pixels`, and `untrained`, codes of an untrained encoder.
      factors: {name: its values}.
      values: V.
      split: of `unseen`. "validation" gives names that begin with probe, others with probe_SPLIT.
      fit: of the linear probe of codes. Features and pixels have a scale of their own, so their
        rates are always `probe.RATES`.

    Returns:
      Shares of right answers on `unseen`, NAME being a factor's, and the `count` of each group:
      `probe/NAME`, linear probe of the codes, its rate chosen on a part of train;
      `probe_best_on_SPLIT/NAME`, its rate chosen on `unseen` itself;
      `probe_knn/NAME`, vote of the 5 nearest codes;
      `probe_features/NAME`, linear probe of the class token;
      `probe_features_patches/NAME`, linear probe of it and the patches' mean;
      `probe_features_knn/NAME_K`, weighted vote of the K nearest class tokens;
      `probe_untrained/NAME` and `probe_pixels/NAME`, linear.
    """
    prefix = "probe" if split == "validation" else f"probe_{split}"
    classes = [len(kinds) for kinds in factors.values()]
    labels, asked = train["factors"], unseen["factors"]
    result: dict[str, float] = {}

    def note(group, accuracies, after=""):
        for name, share in zip(factors, accuracies, strict=True):
            result[f"{prefix}{group}/{name}{after}"] = float(share)
        result[f"{prefix}{group}/count"] = len(asked)

    def linear(x, y, **settings):
        return probe.linear_probe(x, labels, y, asked, classes=classes, **settings)

    found = linear(train["codes"], unseen["codes"], values=values, fit=fit)
    note("", found.accuracy)
    note(f"_best_on_{split}", found.best)
    nearest = neighbors.nearest_neighbors(train["codes"], unseen["codes"], neighbors=5)
    guesses = [
        neighbors.vote(labels[:, f][nearest], classes=kinds) for f, kinds in enumerate(classes)
    ]
    note("_knn", [np.mean(guess == asked[:, f]) for f, guess in enumerate(guesses)])
    if "untrained" in train:
        found = linear(train["untrained"], unseen["untrained"], values=values, fit=fit)
        note("_untrained", found.accuracy)
    dense = {}
    if "features" in train:
        half = train["features"].shape[1] // 2
        token, token_asked = (found["features"][:, :half] for found in (train, unseen))
        dense["_features"] = token, token_asked
        dense["_features_patches"] = train["features"], unseen["features"]
        voted = neighbors.feature_knn(token, labels, token_asked, asked, classes=classes)
        for number, accuracies in voted.items():
            note("_features_knn", accuracies, f"_{number}")
    if "pixels" in train:
        dense["_pixels"] = train["pixels"], unseen["pixels"]
    scaled = dataclasses.replace(fit, rates=probe.RATES)
    for group, (x, y) in dense.items():
        note(group, linear(x, y, fit=scaled).accuracy)
    return result
