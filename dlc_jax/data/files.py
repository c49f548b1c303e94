"""Opens a place that holds images: a folder, an archive, IDX, Parquet, ArrayRecord shards, or a TFDS data set."""

import contextlib
import fcntl
import math
import os
import pathlib
import stat
import time

from dlc_jax.data import archives, idx, listing, parquet, records, shard, tfds
from dlc_jax.data.listing import Listing
from dlc_jax.errors import UserError

MAX_BYTES = 2**28  # of one image file
UNPACKED_GB = 10_000  # for those who read a compressed tar once and fill no cache: stops one that decompresses without end


def open_files(path, *, split=None, validation=0.1, cache=None, cache_gb=20.0, field="image"):
    """The images of a place, to read at random from several threads, sorted by name.

    What `scan` calls sequential is converted once, to ArrayRecord shards in the cache; that is announced, and goes on after a kill.

    Args:
      path: of a folder, an archive, ...; see `scan`.
      split: "train", "validation", "test" (see `listing.choose_rows`), or None for all images.
      validation: share held out where no folders say the split.
      cache: folder for indexes and conversions; `~/.cache/dlc_jax` if None.
      cache_gb: the most that one conversion may take there, in 10^9 bytes.
      field: image column of Parquet, image feature of TFDS.

    Returns:
      A `Listing`.

    Raises:
      UserError: for a place that is missing, empty, damaged, too large to convert, or of no known kind.
    """
    found = scan(path, cache=cache, cache_gb=cache_gb, field=field)
    if split is None:
        rows = sorted(range(len(found)), key=found.names.__getitem__)
    else:
        rows = listing.choose_rows(found.names, split, validation=validation)
    if not rows:
        raise UserError(f"no {split} images in {path}")
    if found.sequential:
        found = _convert(found, path, cache=_cache(cache), cache_gb=cache_gb)
    return found.select(rows)


def scan(path, *, cache=None, cache_gb=math.inf, field="image"):
    """The `Listing` of all images of a place, in any order, possibly a `sequential` one.

    Args:
      path: a folder of image files; `.tar`, `.zip`, `.tar.xz`, `.tar.gz`, `.tar.bz2`, or a folder of `.tar` and `.zip`; a folder of
        IDX pairs, or the images file of one; a folder that `dlc data convert` wrote; a `.parquet` file, or a folder of these;
        "tfds:NAME", or the folder of a prepared TFDS data set.
      cache, field: see `open_files`.
      cache_gb: the most that a compressed archive may decompress to, in 10^9 bytes.

    Raises:
      UserError: see `open_files`.
    """
    if str(path).startswith("tfds:"):
        found = tfds.open_tfds(str(path).removeprefix("tfds:"), field=field)
    elif "://" in str(path):
        raise UserError(
            f"{path}: remote paths are not read; mount the bucket (for gs://, by gcsfuse) and give the mounted folder"
        )
    else:
        place = pathlib.Path(path).expanduser()
        if not place.exists():
            raise UserError(f"no images: {path} does not exist")
        with listing.reading(path, OSError):
            find = _scan_folder if place.is_dir() else _scan_file
            found = find(place, cache=_cache(cache), limit=cache_gb * 1e9, field=field)
    if not len(found):
        raise UserError(f"no images in {path}" + _list_skipped(found.skipped))
    return found.settled()


def _cache(cache):
    if cache is not None:
        return pathlib.Path(cache).expanduser()
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "dlc_jax"


def _list_skipped(skipped):
    return "".join(f"; {count} left out: {reason}" for reason, count in sorted(skipped.items()))


def _scan_file(path, *, cache, limit, field):
    if archives.kind_of(path):
        return archives.open_archive(path, cache=cache, limit=limit, max_bytes=MAX_BYTES)
    if idx.pairs(path):
        return idx.open_idx([path])
    if path.suffix.lower() == ".parquet":
        return parquet.open_parquet([path], root=path.parent, field=field)
    raise UserError(f"{path} is no folder, archive (.tar, .zip, .tar.xz, .tar.gz, .tar.bz2), IDX pair or Parquet file")


def _scan_folder(path, *, cache, limit, field):
    if (path / "dataset_info.json").exists():
        return tfds.open_tfds(str(path), field=field)
    if records.is_set(path):
        return records.open_records(path)
    if list(path.glob("*.arrayrecord")):
        raise UserError(
            f"{path} holds ArrayRecord shards without their manifest.json; run dlc data convert again to complete them"
        )
    if idx.pairs(path):
        return idx.open_idx(idx.pairs(path))
    names, sizes, others, skipped = _list_folder(path)
    if names:
        reader = FolderReader(path, names)
        content = listing.content_of(names, sizes)
        return Listing("folder", names, reader, content=content, skipped=skipped, size=sum(sizes))
    tables = [path / name for name in sorted(others) if name.lower().endswith(".parquet")]
    if tables:
        return parquet.open_parquet(tables, root=path, field=field)
    inside = [path / name for name in sorted(others) if archives.kind_of(name)]
    found = [archives.open_archive(file, cache=cache, limit=limit, max_bytes=MAX_BYTES) for file in inside]
    if any(part.sequential for part in found):
        raise UserError(f"no images in {path}, but compressed archives: give the path of one, such as {inside[0]}")
    return _joined(found, [f"{file.relative_to(path).with_suffix('')}/" for file in inside], skipped)


def _list_folder(path):
    names, sizes, others, skipped = [], [], [], {}
    for name, entry in _walk(path, "", ()):
        try:
            found = entry.stat()
            reason = None if stat.S_ISREG(found.st_mode) else "special file"
        except OSError:
            reason = "broken link"
        if reason is None and not listing.is_image(name):
            others.append(name)
            reason = "not an image by its name"
        if reason:
            skipped[reason] = skipped.get(reason, 0) + 1
        else:
            names.append(name)
            sizes.append(found.st_size)
    return names, sizes, others, skipped


def _walk(path, folder, above):
    """(relative name, entry) of all files that are not hidden. Links are followed, but not into a folder that they are in."""
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            if entry.is_dir():
                found = entry.stat()
                if (found.st_dev, found.st_ino) not in above:
                    yield from _walk(entry.path, f"{folder}{entry.name}/", (*above, (found.st_dev, found.st_ino)))
            else:
                yield folder + entry.name, entry


class FolderReader:
    """Index -> bytes of a file."""

    def __init__(self, path, names):
        self.path, self.names = str(path), names

    def __call__(self, index):
        with open(os.path.join(self.path, self.names[index]), "rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES} bytes")
            return file.read()


def _joined(parts, folders, skipped):
    """One listing of several archives, each a folder."""
    names = [folder + name for part, folder in zip(parts, folders) for name in part.names]
    for part in parts:
        for reason, count in part.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + count
    content = listing.digest([text for part, folder in zip(parts, folders) for text in (folder, part.content)])
    size = sum(part.size for part in parts)
    places = [(part.read, k) for part in parts for k in range(len(part))]
    return Listing("tar", names, _Joined(places), content=content, skipped=skipped, size=size)


class _Joined:
    def __init__(self, places):
        self.places = places

    def __call__(self, index):
        read, inner = self.places[index]
        return read(inner)


def _convert(found, path, *, cache, cache_gb):
    """The same images as records in the cache, in the same order."""
    place = pathlib.Path(path).expanduser().absolute()
    directory = cache / f"{place.name}-{listing.digest([str(place), found.content, *_stamps(place)])[:12]}"
    with _locked(directory):
        with contextlib.suppress(UserError):  # absent, unfinished or damaged: what is missing is written
            return records.open_records(directory)
        if found.size > cache_gb * 1e9:
            raise UserError(
                f"{path} has {found.size / 1e9:.3g} GB of images, to be converted to read them at random, and cache_gb allows"
                f" {cache_gb:g}; raise it, or convert them where there is room: dlc data convert {path} FOLDER"
            )
        print(f"converting {path} once: {len(found)} images, {found.size / 1e6:.1f} MB, to {directory}", flush=True)
        records.write(directory, found, progress=_Progress())
        return records.open_records(directory)


def _stamps(place):
    """Sizes and times of change: equal names and sizes of the images do not make a conversion that of this place."""
    stats = [file.stat() for file in (sorted(place.rglob("*.parquet")) if place.is_dir() else [place])]
    return [f"{found.st_size} {found.st_mtime_ns}" for found in stats]


class _Progress:
    """A line every ten seconds."""

    def __init__(self):
        self.start = self.last = time.monotonic()

    def __call__(self, done, total):
        now = time.monotonic()
        if now - self.last > 10:
            self.last = now
            left = (now - self.start) / done * (total - done)
            print(f"  {done} of {total} images, {left:.0f} s left", flush=True)


@contextlib.contextmanager
def _locked(directory):
    """One process at a time; the others wait. The lock goes with the process, however it ends."""
    with shard.disk(f"the cache {directory.parent}"):
        directory.parent.mkdir(parents=True, exist_ok=True)
        file = open(directory.with_name(directory.name + ".lock"), "w")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
