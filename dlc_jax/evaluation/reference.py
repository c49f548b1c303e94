"""Statistics of the images that samples are compared with: computed and kept, or read from .npz.

Of ADM (mu, sigma, mu_s, sigma_s, arr_0), of pytorch-fid (mu, sigma), or our own, which have what
ADM's have and say how they were made, so that none of another network, protocol or weights is used.
"""

import contextlib
import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from dlc_jax import checksum
from dlc_jax.data import cache as caches
from dlc_jax.errors import UserError
from dlc_jax.evaluation.images import ImageSet, open_set, spaced
from dlc_jax.evaluation.scoring import Scorer
from dlc_jax.features import Extractor
from dlc_jax.hosts import agreement

ROWS = 10_000  # whose features are kept: of the published protocol of precision and recall
NAMES = {"main": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # of arrays in a file
FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """Statistics of reference images.

    Attributes:
      name: of the place, for messages.
      sha256: of the images' content, or of the file of the statistics.
      count: of images; None where a file does not say.
      statistics: {"main" or "spatial": (mu [d], sigma [d, d])}, float64.
      features: of ROWS images at most, float32 [rows, d], of the main output; None in a file
        without.
      images: sha256 of the images, to be recognized; None where a file does not say.
      size: (y, x) of the images; None where a file does not say.
    """

    name: str
    sha256: str
    count: int | None
    statistics: Mapping[str, tuple[np.ndarray, np.ndarray]]
    features: np.ndarray | None
    images: str | None
    size: tuple[int, int] | None

    def moments(self, which: str) -> tuple[np.ndarray, np.ndarray]:
        """(mu, sigma) of the "main" or "spatial" features.

        Raises:
          UserError: the file has none.
        """
        if which not in self.statistics:
            raise UserError(
                f"{self.name} has no statistics {' and '.join(NAMES[which])}; give the images of "
                "the reference, or leave this metric out"
            )
        return self.statistics[which]


def of_images(
    images: ImageSet, scorer: Scorer, *, cache: str | Path | None = None, keep: bool = True
) -> Reference:
    """The reference of images; what was computed once is found in the cache.

    Args:
      images: see `images.open_set`.
      scorer: of the network.
      cache: folder, see `data.cache.folder_of`.
      keep: whether to keep it there.

    Raises:
      UserError: as `Scorer.collect`.
    """
    about = _about(scorer.extractor) | {"images": images.sha256}
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    path, found = caches.folder_of(cache) / "statistics" / f"{key[:32]}.npz", None
    if keep:
        with contextlib.suppress(UserError):  # absent or damaged: it is made
            found = read(path, scorer.extractor)
    if all(agreement.gather("reference", found is not None)):
        return dataclasses.replace(found, name=images.name, sha256=images.sha256)
    main, outputs = scorer.main, scorer.extractor.outputs
    kinds = {"main": main} | ({"spatial": "spatial"} if "spatial" in outputs else {})
    rows = {main: spaced(images, ROWS)}
    passed = scorer.collect(images, moments=[*kinds.values()], keep=rows, name="reference")
    with passed as collected:
        sums = {kind: collected.moments[output] for kind, output in kinds.items()}
        made = Reference(
            name=images.name,
            sha256=images.sha256,
            count=images.count,
            statistics={kind: (each.mean, each.covariance) for kind, each in sums.items()},
            features=np.array(collected.features[main]),
            images=images.sha256,
            size=images.size,
        )
    if keep:
        save(made, path, scorer.extractor)
    return made


def open_reference(
    path: str | Path,
    scorer: Scorer,
    *,
    made_with: str | None = None,
    features: bool = False,
    cache: str | Path | None = None,
    **options,
) -> Reference:
    """The reference in a place: statistics in an .npz, or images.

    Args:
      made_with: protocol of a file that does not say its own; "adm" if None and the file has what
        only ADM's have, else "torch".
      features: whether features of images are needed too; of a file without, those of the images in
        it, arr_0, are computed.
      cache: folder, see `data.cache.folder_of`.
      **options: see `open_set`.

    Raises:
      UserError: see `read`, `open_set` and `of_images`.
    """
    if not is_statistics(path):
        return of_images(open_set(path, cache=cache, **options), scorer, cache=cache)
    found = read(path, scorer.extractor, made_with=made_with)
    if not features or found.features is not None:
        return found
    with np.load(path) as archive:
        if "arr_0" not in archive:
            raise UserError(
                f"{path} has statistics but no images (arr_0), which precision, recall, density, "
                "coverage and kernel distances need; give images, or leave these metrics out"
            )
    images = open_set(path, cache=cache, field="arr_0")
    return dataclasses.replace(found, features=of_images(images, scorer, cache=cache).features)


def is_statistics(path: str | Path) -> bool:
    """Whether a place is a file of statistics, an .npz that has `mu`."""
    if Path(path).suffix.lower() != ".npz" or not Path(path).is_file():
        return False
    with _damage(path), np.load(path, allow_pickle=False) as archive:
        return "mu" in archive


def read(path: str | Path, extractor: Extractor, *, made_with: str | None = None) -> Reference:
    """The statistics in a file, if they are of this network.

    Raises:
      UserError: no such file, or a damaged one; it is of another network, protocol or weights.
    """
    with _damage(path), np.load(path, allow_pickle=False) as archive:
        there = set(archive.files)
        if "dlc_jax" in there:
            about = json.loads(str(archive["dlc_jax"]))
        else:
            adm = there & {"mu_s", "arr_0"}
            about = {"network": "inception", "protocol": made_with or ("adm" if adm else "torch")}
        _check(path, about, extractor)
        kinds = {kind: names for kind, names in NAMES.items() if there.issuperset(names)}
        statistics = {
            kind: tuple(np.asarray(archive[name], np.float64) for name in names)
            for kind, names in kinds.items()
        }
        features = archive["features"] if "features" in there else None
    main = next(iter(extractor.outputs))
    widths = {"main": extractor.outputs[main], "spatial": extractor.outputs.get("spatial")}
    for kind, (mu, sigma) in statistics.items():
        if mu.shape != (widths[kind],) or sigma.shape != (widths[kind],) * 2:
            raise UserError(
                f"{path}: {' and '.join(NAMES[kind])} are {list(mu.shape)} and "
                f"{list(sigma.shape)}, of {extractor.name} they are [d] and [d, d] with "
                f"d = {widths[kind]}; give another file, or images"
            )
    return Reference(
        name=str(path),
        sha256=about.get("images") or checksum.of_file(path),
        count=about.get("count"),
        statistics=statistics,
        features=features,
        images=about.get("images"),
        size=about.get("size") and tuple(about["size"]),
    )


def save(reference: Reference, path: str | Path, extractor: Extractor) -> None:
    """Writes statistics; ADM's and pytorch-fid's programs read them too. Process 0 writes.

    Raises:
      OSError: the disk refuses.
    """
    if jax.process_index():
        return
    about = _about(extractor) | {"images": reference.images, "count": reference.count}
    about |= {"size": reference.size}
    saved = {"dlc_jax": np.array(json.dumps(about))}
    for kind, values in reference.statistics.items():
        saved |= dict(zip(NAMES[kind], values))
    if reference.features is not None:
        saved["features"] = reference.features
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "wb") as file:
        np.savez(file, **saved)
    partial.replace(path)


def _about(extractor: Extractor) -> dict:
    fields = {"network": extractor.name, "protocol": extractor.protocol, "format": FORMAT}
    return fields | {"weights_sha256": extractor.weights_sha256}


def _check(path, about: Mapping, extractor: Extractor) -> None:
    for field in ("network", "protocol"):
        mine = {"network": extractor.name, "protocol": extractor.protocol}[field]
        if about[field] != mine:
            raise UserError(
                f"{path} is of {field} {about[field]}, not {mine}: distances between them mean "
                f"nothing; choose that {field}, another file, or give images"
            )
    weights = about.get("weights_sha256")
    if weights not in (None, extractor.weights_sha256):
        raise UserError(
            f"{path} is of {extractor.name} with other weights (SHA-256 {weights[:8]}…, not "
            f"{extractor.weights_sha256[:8]}…); give those weights, another file, or images"
        )
    if weights is None and extractor.published is False:
        raise UserError(
            f"{path} is of {extractor.name}'s published weights, and --weights has others (SHA-256 "
            f"{extractor.weights_sha256[:8]}…); give the published ones, or images"
        )


@contextlib.contextmanager
def _damage(path):
    try:
        yield
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} cannot be read as statistics, an .npz with mu and sigma; fetch or make it "
            "again"
        ) from error
