"""Views of an image, and draws of its latent, from what a code store has of it.

A store has the moments of each latent's posterior: `latent_mean`, and `latent_logvar` of an
autoencoder that has one. Fields that end in `_flipped` are of the mirror image. `view` and `Drawn`
are transforms of the loader, whose generator follows from the record's place in the run: every
epoch draws anew, and validation, of a fixed seed, always the same.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from dlc_jax.data import shard
from dlc_jax.errors import UserError

MEAN, LOGVAR, FLIPPED = "latent_mean", "latent_logvar", "_flipped"
Record = dict[str, np.ndarray]


def view(record: Record, rng: np.random.Generator) -> Record:
    """The image or, with chance 1/2, its mirror image; codes and all else are of the same view.

    A record that has nothing of its mirror image stays as it is.
    """
    mirrored = any(name.endswith(FLIPPED) for name in record) and rng.random() < 0.5
    found = {name: value for name, value in record.items() if not name.endswith(FLIPPED)}
    if not mirrored:
        return found
    if "image" in found:
        found["image"] = found["image"][:, ::-1]
    return found | {name: record[f"{name}{FLIPPED}"] for name in found if name + FLIPPED in record}


class Drawn:
    """A record's view with `latent`, float32 [y, x, c], drawn from its posterior, for moments.

    Args:
      scaling: of the autoencoder.
      mean, std: of scaled latents, [c]; see `networks.autoencoder.Normalizer`. None leaves the
        latents as they are.
      deviation: standard deviation that a latent has after normalization.
    """

    def __init__(self, *, scaling: float, mean=None, std=None, deviation: float = 1.0):
        self._factor = scaling if mean is None else scaling * deviation / np.asarray(std)
        self._shift = 0.0 if mean is None else np.asarray(mean) / scaling

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        found = view(record, rng)
        latent, logvar = found.pop(MEAN).astype(np.float32), found.pop(LOGVAR, None)
        if logvar is not None:
            noise = rng.standard_normal(latent.shape, np.float32)
            latent += np.exp(logvar.astype(np.float32) / 2) * noise
        return found | {"latent": np.float32(self._factor * (latent - self._shift))}


class Sums:
    """Sums over the latents of a shard's records, all of their views, by channel.

    They are the same however the records come in parts: a record's are summed by themselves, and
    those of all records are rounded once.
    """

    def __init__(self):
        self._first, self._second, self._each = [], [], 0

    def add(self, rows: np.ndarray) -> None:
        """Adds packed records (`codes.record_dtype`)."""
        for name in (name for name in rows.dtype.names if name.startswith(MEAN)):
            mean = rows[name].astype(np.float32)
            square = mean * mean
            logvar = name.replace(MEAN, LOGVAR)
            if logvar in rows.dtype.names:
                square += np.exp(rows[logvar].astype(np.float32))
            axes = tuple(range(1, mean.ndim - 1))
            self._first += mean.astype(np.float64).sum(axes).tolist()
            self._second += square.astype(np.float64).sum(axes).tolist()
            self._each = math.prod(mean.shape[1:-1])

    def plain(self) -> dict:
        """{"count": latent vectors, "first", "second": sums of draws and of their squares, [c]}."""
        sums = [[math.fsum(column) for column in zip(*rows, strict=True)] for rows in self._both()]
        return {"count": self._each * len(self._first), "first": sums[0], "second": sums[1]}

    def _both(self):
        return self._first, self._second


def statistics(sums: Iterable[Mapping]) -> dict:
    """{"mean", "std": [c], "count"} of posterior draws before scaling, from the shards' sums."""
    sums = list(sums)
    count = sum(each["count"] for each in sums)
    first, second = (
        np.array([math.fsum(c) for c in zip(*(each[name] for each in sums), strict=True)]) / count
        for name in ("first", "second")
    )
    std = np.sqrt(np.maximum(second - first**2, 0.0))
    return {"mean": first.tolist(), "std": std.tolist(), "count": count}


def check(store, identity: str, where: str) -> None:
    """Refuses a `CodeStore` without latents, or with those of another autoencoder.

    Args:
      identity: of the autoencoder's weights.
      where: its section.

    Raises:
      UserError: see above.
    """
    view = store.manifest["view"]
    found = view.get("latents", {}) if isinstance(view, dict) else {}
    if MEAN not in store.manifest["fields"]:
        raise UserError(
            f"code store {store.directory} has no latents; set codes.autoencoder={where!r}, in "
            "another --workdir"
        )
    if found.get("autoencoder") != identity:
        which = shard.difference(found.get("autoencoder"), identity)
        raise UserError(
            f"code store {store.directory} has latents of another autoencoder ({which}); give the "
            f"one it was made with as {where}.path, or codes of this one"
        )


def measured(store) -> tuple[Sequence[float], Sequence[float]]:
    """(mean, std) [c] of a `CodeStore`'s latents before scaling.

    Raises:
      UserError: a store without them, of an earlier version or without latents; a channel that
        never varies, which nothing can be divided by.
    """
    found = store.manifest.get("statistics", {}).get("latent")
    if found is None:
        raise UserError(
            f"code store {store.directory} has no statistics of latents; run the codes step again, "
            "with codes.autoencoder"
        )
    mean, std = found["mean"], found["std"]
    if constant := [channel for channel, value in enumerate(std) if not value > 0]:
        raise UserError(
            f"code store {store.directory} has latents whose channel {constant[0]} never varies; "
            "import the autoencoder again, and run the codes step again"
        )
    return mean, std
