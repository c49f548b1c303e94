"""Opens a place that holds images: a folder, an archive, IDX, .npz, Parquet, ArrayRecord shards, or
a TFDS data set.
"""

import contextlib
import errno
import fcntl
import heapq
import math
import os
import pathlib
import stat
import time

from dlc_jax.data import archives, idx, listing, npz, parquet, records, shard, tfds, webdataset
from dlc_jax.data.listing import Listing
from dlc_jax.errors import UserError

MAX_BYTES = 2**28  # of one image file
UNPACKED_GB = 10_000  # for those who read a compressed tar once and fill no cache: stops one that decompresses without end


def open_files(path, *, split=None, validation=0.1, cache=None, cache_gb=20.0, field="image"):
    """The images of a place, to read at random from several threads, sorted by name.

    What `scan` calls sequential is converted once, to ArrayRecord shards in the cache; that is
    announced, and goes on after a kill.

    Args:
      path: of a folder, an archive, ...; see `scan`.
      split: "train", "validation", "test" (see `listing.choose_rows`), or None for all images.
      validation: share held out where no folders say the split.
      cache: folder for indexes and conversions; `~/.cache/dlc_jax` if None.
      cache_gb: the most that one conversion may take there, in 10^9 bytes.
      field: image column of Parquet, image feature of TFDS, array of .npz.

    Returns:
      A `Listing`.

    Raises:
      UserError: for a place that is missing, empty, damaged, too large to convert, or of no known
        kind.
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
      path: a folder of image files; `.tar`, `.zip`, `.tar.xz`, `.tar.gz`, `.tar.bz2`, or a folder
        of `.tar` and `.zip`; a folder of IDX pairs, or the images file of one; a `.npz` or
        `.parquet` file, or a folder of these; a folder that `dlc data convert` wrote; "tfds:NAME",
        or the folder of a prepared TFDS data set.
      cache, field: see `open_files`.
      cache_gb: the most that a compressed archive may decompress to, in 10^9 bytes.

    Raises:
      UserError: see `open_files`.
    """
    if str(path).startswith("tfds:"):
        found = tfds.open_tfds(str(path).removeprefix("tfds:"), field=field)
    elif "://" in str(path):
        raise UserError(
            f"{path}: remote paths are not read; mount the bucket (for gs://, by gcsfuse) and give "
            "the mounted folder"
        )
    else:
        place = pathlib.Path(path).expanduser()
        if not place.exists():
            raise UserError(f"no images: {path} does not exist")
        with listing.reading(path, OSError):
            find = _scan_folder if place.is_dir() else _scan_file
            found = webdataset.labeled(
                find(place, cache=_cache(cache), limit=cache_gb * 1e9, field=field)
            )
    if not len(found):
        raise UserError(f"no images in {path}" + _list_skipped(found.skipped))
    return found.settled()


def _cache(cache):
    if cache is not None:
        return pathlib.Path(cache).expanduser()
    return (
        pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "dlc_jax"
    )


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
        f"{path} is no folder, archive (.tar, .zip, .tar.xz, .tar.gz, .tar.bz2), IDX pair, .npz or "
        "Parquet file"
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
    names, sizes, others, skipped = _list_folder(path)
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
    skipped |= {listing.NOT_AN_IMAGE: unread}
    if not unread:
        skipped.pop(listing.NOT_AN_IMAGE)
    if len(found) == 1 and found[0].kind == "npz":
        found[0].skipped |= skipped
        return found[0]
    return _joined(
        found, [f"{file.relative_to(path).with_suffix('')}/" for file in inside], skipped
    )


def _list_folder(path):
    names, sizes, others, skipped = [], [], [], listing.Skipped()
    for name, found in _walk(path, skipped):
        reason = listing.not_image(name) if stat.S_ISREG(found.st_mode) else "special file"
        if reason == listing.NOT_AN_IMAGE:
            others.append(name)
        if reason:
            skipped.add(reason)
        else:
            names.append(name)
            sizes.append(found.st_size)
    return names, sizes, others, skipped.counts()


def _walk(path, skipped):
    """(relative name, status) of all files that are not hidden. Links are followed, to each real
    folder once.

    What is really there comes first, then the links by name: so a folder has the same name every
      time.
    """
    root = os.path.realpath(path)
    seen, folders, links = set(), [(root, "")], []
    while folders or links:
        if folders:
            real, folder = folders.pop()
        else:
            name, real = heapq.heappop(links)
            if f"{root}/".startswith(f"{real.rstrip('/')}/"):
                skipped.add("link to a folder that it is in", name)
                continue
            if real in seen:
                skipped.add("link to a folder that is read already", name)
                continue
            seen.add(real)
            folder = f"{name}/"
        with os.scandir(real) as entries:
            for entry in entries:
                name = folder + entry.name
                if listing.system_folder(f"{entry.name}/"):
                    skipped.add(listing.SYSTEM_FOLDER)
                    continue
                if entry.name.startswith("."):
                    continue
                try:
                    found = entry.stat()
                except OSError as error:
                    skipped.add(
                        "link in a ring" if error.errno == errno.ELOOP else "broken link", name
                    )
                    continue
                if not stat.S_ISDIR(found.st_mode):
                    yield name, found
                elif entry.is_symlink():
                    heapq.heappush(links, (name, os.path.realpath(entry.path)))
                elif (inner := os.path.join(real, entry.name)) not in seen:
                    seen.add(inner)
                    folders.append((inner, f"{name}/"))


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
        labels, classes = listing.number_classes(texts)
    about = dict(labels=labels, classes=classes, sequential=any(part.sequential for part in parts))
    kind = parts[0].kind if parts else "tar"
    return Listing(
        kind, names, _Joined(places), content=content, skipped=skipped, size=size, **about
    )


def _labels(part):
    return [-1] * len(part) if part.labels is None else part.labels.tolist()


class _Joined:
    def __init__(self, places):
        self.places = places

    def __call__(self, index):
        read, inner = self.places[index]
        return read(inner)


def _convert(found, path, *, cache, cache_gb):
    """The same images as records in the cache, in the same order."""
    place = pathlib.Path(path).expanduser().absolute()
    # Archives were converted without the labels in them before those were read; what has none stays
    # where it is.
    labels = (
        ["labels"]
        if found.kind == "tar" and found.classes != listing.classify(found.names)[1]
        else []
    )
    identity = listing.digest([str(place), found.content, *_stamps(place), *labels])
    directory = cache / f"{place.name}-{identity[:12]}"
    with _locked(directory):
        with contextlib.suppress(
            UserError
        ):  # absent, unfinished or damaged: what is missing is written
            return records.open_records(directory)
        if found.size > cache_gb * 1e9:
            raise UserError(
                f"{path} has {found.size / 1e9:.3g} GB of images, to be converted to read them at "
                f"random, and cache_gb allows {cache_gb:g}; raise it, or convert them where there "
                f"is room: dlc data convert {path} FOLDER"
            )
        print(
            f"converting {path} once: {len(found)} images, {found.size / 1e6:.1f} MB, to "
            f"{directory}",
            flush=True,
        )
        records.write(directory, found, progress=_Progress())
        return records.open_records(directory)


def _stamps(place):
    """Sizes and times of change: equal names and sizes of the images do not make a conversion that
    of this place.
    """
    inside = (
        sorted(file for ending in ("parquet", "npz") for file in place.rglob(f"*.{ending}"))
        if place.is_dir()
        else [place]
    )
    stats = [file.stat() for file in inside]
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
