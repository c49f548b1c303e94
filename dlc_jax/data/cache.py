"""The cache: images that are slow to read at random, converted once to records, or downloaded."""

import contextlib
import fcntl
import os
import pathlib
import shutil

from dlc_jax import remote
from dlc_jax.data import listing, naming, record_writer, records, shard
from dlc_jax.data.progress import Progress
from dlc_jax.errors import UserError

TOGETHER = 64  # objects that are downloaded at once


def folder_of(cache):
    """The folder of the cache: `cache`, or `~/.cache/dlc_jax` if None."""
    if cache is not None:
        return pathlib.Path(cache).expanduser()
    parent = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(parent) / "dlc_jax"


def convert(found, path, *, folder, cache_gb):
    """The images of a `sequential` listing as records in the cache, in the same order.

    Args:
      found: the `Listing` of `path`.
      path: the place, for its name.
      folder: of the cache, see `folder_of`.
      cache_gb: the most that one conversion may take there, in 10^9 bytes.

    Raises:
      UserError: the images take more, or the disk refuses.
    """
    place = pathlib.Path(path).expanduser().absolute()
    # Archives were converted without the labels in them before those were read; what has none stays
    # where it is.
    labelled = found.kind == "tar" and found.classes != naming.classify(found.names)[1]
    labels = ["labels"] if labelled else []
    identity = listing.digest([str(place), found.content, *_stamps(place), *labels])
    directory = folder / f"{place.name}-{identity[:12]}"
    with _locked(directory):
        # Absent, unfinished or damaged: what is missing is written.
        with contextlib.suppress(UserError):
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
        with Progress("converting", "images") as progress:
            record_writer.write(directory, found, progress=progress)
        return records.open_records(directory)


def download(url, *, folder, cache_gb):
    """What is at a URL of an object store, as a file or folder in the cache; one that is there is
    kept until an object in the store changes.

    Args:
      folder: of the cache, see `folder_of`.
      cache_gb: the most that it may take, in 10^9 bytes.

    Raises:
      UserError: nothing is there, it takes more, or the disk refuses.
      StoreError: see `remote.Store`.
    """
    store = remote.Store(url)
    objects = store.versions()
    if not objects:
        raise UserError(f"no images: {url} does not exist")
    size = sum(size for size, _ in objects.values())
    if size > cache_gb * 1e9:
        raise UserError(
            f"{url} has {size / 1e9:.3g} GB, to be downloaded, and cache_gb allows {cache_gb:g}; "
            "raise it, or mount the bucket as a file system and give the mounted folder"
        )
    identity = listing.digest([url, *(f"{name} {objects[name]}" for name in sorted(objects))])
    last = store.url.rpartition("/")[2]
    directory = folder / f"{last}-{identity[:12]}"
    with _locked(directory):
        if not directory.exists():
            print(f"downloading {url} once: {size / 1e6:.1f} MB, to {directory}", flush=True)
            unfinished = directory.with_name(f"{directory.name}.tmp")
            _download(store, objects, unfinished / last)
            unfinished.rename(directory)
    return directory / last


def _download(store, objects, place):
    """The objects that are not there yet; a single one has the name ""."""
    names = [name for name in objects if shard.wrong_size(place / name, objects[name][0])]
    with shard.disk(f"the cache {place.parent}"), Progress("downloading", "files") as progress:
        for start in range(0, len(names), TOGETHER):
            progress(start, len(names))
            some = names[start : start + TOGETHER]
            part = place.with_name(
                f"{place.name}.part"
            )  # an unfinished file may have its full size
            shutil.rmtree(part, ignore_errors=True)
            part.unlink(missing_ok=True)
            store.get(some, part)
            for name in some:
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(part / name, place / name)


def _stamps(place):
    """Sizes and times of change: another place may have equal names and sizes of the images."""
    inside = [place]
    if place.is_dir():
        inside = sorted(
            file for ending in ("parquet", "npz") for file in place.rglob(f"*.{ending}")
        )
    stats = [file.stat() for file in inside]
    return [f"{found.st_size} {found.st_mtime_ns}" for found in stats]


@contextlib.contextmanager
def _locked(directory):
    """One process at a time; the others wait. The lock ends with the process, however it ends."""
    with shard.disk(f"the cache {directory.parent}"):
        directory.parent.mkdir(parents=True, exist_ok=True)
        file = open(directory.with_name(directory.name + ".lock"), "w")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
