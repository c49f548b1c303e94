"""Opens a place of images: a folder, an archive, IDX, .npz, Parquet, records, or a TFDS set."""

import math
import pathlib
import threading

from dlc_jax import remote
from dlc_jax.data import archives, idx, listing, naming, npz, parquet, records, tfds, webdataset
from dlc_jax.data import cache as conversions
from dlc_jax.data.folder import MAX_BYTES, FolderReader, list_folder
from dlc_jax.data.listing import Listing
from dlc_jax.errors import UserError

# Of a compressed tar that is read once, with no cache: stops one that decompresses without end.
UNPACKED_GB = 10_000


class Place:
    """A place of images, looked through once, at the first need; splits are taken from it.

    Args:
      path: of a folder, an archive, ...; see `scan`.
      cache: folder for indexes and conversions; `~/.cache/dlc_jax` if None.
      cache_gb: the most that one conversion may take there, in 10^9 bytes.
      field: image column of Parquet, image feature of TFDS, array of .npz.
    """

    def __init__(self, path, *, cache=None, cache_gb=20.0, field="image"):
        self._path, self._cache, self._cache_gb, self._field = path, cache, cache_gb, field
        self._lock, self._all, self._records = threading.Lock(), None, None

    def images(self, split: str | None = None, *, validation: float = 0.1) -> Listing:
        """The `Listing` of a split, to read at random from several threads, sorted by name.

        What `scan` calls sequential is converted once, to ArrayRecord shards in the cache; that is
        announced, and resumes after a kill.

        Args:
          split: "train", "validation", "test" (see `naming.choose_rows`), or None for all images.
          validation: share held out where no folders say the split.

        Raises:
          UserError: for a place that is missing, empty, damaged, too large to convert, or of no
            known kind.
        """
        with self._lock:
            if self._all is None:
                self._all = scan(
                    self._path, cache=self._cache, cache_gb=self._cache_gb, field=self._field
                )
            found = self._all
            if split is None:
                rows = sorted(range(len(found)), key=found.names.__getitem__)
            else:
                rows = naming.choose_rows(found.names, split, validation=validation)
            if not rows:
                raise UserError(f"no {split} images in {self._path}")
            if found.sequential and self._records is None:
                folder = conversions.folder_of(self._cache)
                self._records = conversions.convert(
                    found, self._path, folder=folder, cache_gb=self._cache_gb
                )
            return (self._records or found).select(rows)


def open_files(
    path: str | pathlib.Path, *, split: str | None = None, validation: float = 0.1, **options
) -> Listing:
    """`Place(path, **options).images(split, validation=validation)`."""
    return Place(path, **options).images(split, validation=validation)


def scan(
    path: str | pathlib.Path, *, cache=None, cache_gb: float = math.inf, field: str = "image"
) -> Listing:
    """The `Listing` of all images of a place, in any order, possibly a `sequential` one.

    Args:
      path: a folder of image files; `.tar`, `.zip`, `.tar.xz`, `.tar.gz`, `.tar.bz2`, or a folder
        of `.tar` and `.zip`; a folder of IDX pairs, or the images file of one; a `.npz` or
        `.parquet` file, or a folder of these; a folder that `dlc data convert` wrote; "tfds:NAME",
        or the folder of a prepared TFDS data set; or the URL of any of these in an object store,
        which is downloaded to the cache once.
      cache, field: see `Place`.
      cache_gb: the most that a compressed archive may decompress to, in 10^9 bytes.

    Raises:
      UserError: see `Place.images`.
    """
    if str(path).startswith("tfds:"):
        found = tfds.open_tfds(str(path).removeprefix("tfds:"), field=field)
    else:
        place = pathlib.Path(path).expanduser()
        if remote.is_url(path):
            folder = conversions.folder_of(cache)
            place = conversions.download(str(path), folder=folder, cache_gb=cache_gb)
        if not place.exists():
            raise UserError(f"no images: {path} does not exist")
        with listing.reading(path, OSError):
            find = _scan_folder if place.is_dir() else _scan_file
            found = webdataset.labeled(
                find(place, cache=conversions.folder_of(cache), limit=cache_gb * 1e9, field=field)
            )
    if not len(found):
        raise UserError(f"no images in {path}" + _list_skipped(found.skipped))
    return found.settled()


def _list_skipped(skipped):
    return "".join(f"; {count} left out: {reason}" for reason, count in sorted(skipped.items()))


def _scan_file(path, *, cache, limit, field):
    if archives.kind_of(path):
        return archives.open_archive(path, cache=cache, limit=limit, max_bytes=MAX_BYTES)
    if idx.pairs(path):
        return idx.open_idx([path])
    if path.suffix.lower() == ".parquet":
        return parquet.open_parquet([path], root=path.parent, field=field)
    if path.suffix.lower() == ".npz":
        return npz.open_npz(path, field=field)
    raise UserError(
        f"{path} is not a folder, archive (.tar, .zip, .tar.xz, .tar.gz, .tar.bz2), IDX pair, "
        ".npz or Parquet file"
    )


def _scan_folder(path, *, cache, limit, field):
    if (path / "dataset_info.json").exists():
        return tfds.open_tfds(str(path), field=field)
    if records.is_set(path):
        return records.open_records(path)
    if list(path.glob("*.arrayrecord")):
        raise UserError(
            f"{path} holds ArrayRecord shards without their manifest.json; run dlc data convert "
            "again to complete them"
        )
    if idx.pairs(path):
        return idx.open_idx(idx.pairs(path))
    names, sizes, others, skipped = list_folder(path)
    if names:
        reader = FolderReader(path, names)
        content = listing.content_of(names, sizes)
        return Listing("folder", names, reader, content=content, skipped=skipped, size=sum(sizes))
    tables = [path / name for name in sorted(others) if name.lower().endswith(".parquet")]
    if tables:
        return parquet.open_parquet(tables, root=path, field=field)
    inside = [path / name for name in sorted(others) if archives.kind_of(name)]
    found = [
        archives.open_archive(file, cache=cache, limit=limit, max_bytes=MAX_BYTES)
        for file in inside
    ]
    if any(part.sequential for part in found):
        raise UserError(
            f"no images in {path}, but compressed archives: give the path of one, such as "
            f"{inside[0]}"
        )
    if not inside:
        inside = [path / name for name in sorted(others) if name.lower().endswith(".npz")]
        found = [npz.open_npz(file, field=field) for file in inside]
    unread = len(others) - len(inside)
    skipped |= {naming.NOT_AN_IMAGE: unread}
    if not unread:
        skipped.pop(naming.NOT_AN_IMAGE)
    if len(found) == 1 and found[0].kind == "npz":
        found[0].skipped |= skipped
        return found[0]
    folders = [f"{file.relative_to(path).with_suffix('')}/" for file in inside]
    return _joined(found, folders, skipped)


def _joined(parts, folders, skipped):
    """One listing of several archives or .npz files, each a folder."""
    names = [folder + name for part, folder in zip(parts, folders) for name in part.names]
    for part in parts:
        for reason, count in part.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + count
    content = listing.digest(
        [text for part, folder in zip(parts, folders) for text in (folder, part.content)]
    )
    size = sum(part.size for part in parts)
    places = [(part.read, k) for part in parts for k in range(len(part))]
    labels, classes = None, []
    if any(part.classes for part in parts):
        texts = [part.classes[k] if k >= 0 else None for part in parts for k in _labels(part)]
        labels, classes = naming.number_classes(texts)
    about = dict(labels=labels, classes=classes, sequential=any(part.sequential for part in parts))
    kind = parts[0].kind if parts else "tar"
    return Listing(
        kind, names, _Joined(places), content=content, skipped=skipped, size=size, **about
    )


def _labels(part):
    return [-1] * len(part) if part.labels is None else part.labels.tolist()


class _Joined:
    """Index -> what the reader of one of several parts gives."""

    def __init__(self, places):
        self.places = places

    def __call__(self, index):
        read, inner = self.places[index]
        return read(inner)

    def close(self):
        for read in {id(read): read for read, _ in self.places}.values():
            listing.close(read)
