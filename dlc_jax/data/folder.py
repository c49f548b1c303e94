"""A folder of image files: what is in it, through links, and what is left out."""

import errno
import heapq
import os
import stat

from dlc_jax.data import naming

MAX_BYTES = 2**28  # of one image file


def list_folder(path):
    """(names of images, their sizes, names of other files, {reason: count} of what is left out)."""
    names, sizes, others, skipped = [], [], [], naming.Skipped()
    for name, found in _walk(path, skipped):
        reason = naming.not_image(name) if stat.S_ISREG(found.st_mode) else "special file"
        if reason == naming.NOT_AN_IMAGE:
            others.append(name)
        if reason:
            skipped.add(reason)
        else:
            names.append(name)
            sizes.append(found.st_size)
    return names, sizes, others, skipped.counts()


def _walk(path, skipped):
    """(relative name, status) of all files that are not hidden.

    Links are followed, to each real folder once. What is really there comes first, then the links
    by name: so a folder has the same name every time.
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
                if naming.system_folder(f"{entry.name}/"):
                    skipped.add(naming.SYSTEM_FOLDER)
                    continue
                if entry.name.startswith("."):
                    continue
                try:
                    found = entry.stat()
                except OSError as error:
                    ring = error.errno == errno.ELOOP
                    skipped.add("link in a ring" if ring else "broken link", name)
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
