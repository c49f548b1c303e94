"""Many drawn images as one .npz, ADM's format of samples: uint8 [n, y, x, c] under `arr_0`.

    OUT.npz.partial/about.json              what is drawn
    OUT.npz.partial/0000000-0001024.npy     images 0 to 1023, whole or not there
    OUT.npz                                 all of them, once all are there

A draw that was interrupted goes on with the parts that are missing. The file has its name only when
it is complete.
"""

import contextlib
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np

from dlc_jax.errors import UserError

PART = 1024  # images


class BatchFile:
    """An .npz of drawn images on its way.

    Args:
      path: of the .npz.
      count: images.
      about: what is drawn, JSON: where parts of something else lie already, they are refused.

    Raises:
      UserError: parts of something else, or a disk that refuses.
    """

    def __init__(self, path: Path, count: int, about: dict):
        self.path, self.count = path, count
        self.folder = path.with_name(f"{path.name}.partial")
        with self._disk():
            self.folder.mkdir(parents=True, exist_ok=True)
            claim(self.folder / "about.json", about)

    def missing(self) -> list[tuple[int, int]]:
        """(start, stop) of the parts that are not there."""
        starts = range(0, self.count, PART)
        ranges = [(start, min(start + PART, self.count)) for start in starts]
        return [each for each in ranges if not _is_whole(self._part(*each), each[1] - each[0])]

    def write(self, start: int, images: np.ndarray) -> None:
        """A part, from image `start` on.

        Raises:
          UserError: a disk that refuses.
        """
        path = self._part(start, start + len(images))
        temporary = path.with_suffix(".writing")
        with self._disk():
            with temporary.open("wb") as file:
                np.save(file, np.ascontiguousarray(images))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)

    def finish(self) -> None:
        """Puts the parts together, and removes them.

        Raises:
          UserError: a disk that refuses, or parts of different sizes.
        """
        starts = range(0, self.count, PART)
        parts = [self._part(start, min(start + PART, self.count)) for start in starts]
        whole = self.folder / "whole"
        with self._disk():
            arrays = [np.load(part, mmap_mode="r") for part in parts]
            if len({array.shape[1:] for array in arrays}) > 1:
                raise UserError(f"{self.folder} has images of different sizes; move it away")
            header = {
                "descr": "|u1",
                "fortran_order": False,
                "shape": (self.count, *arrays[0].shape[1:]),
            }
            with zipfile.ZipFile(whole, "w", zipfile.ZIP_STORED) as archive:
                with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array_header_1_0(file, header)
                    for array in arrays:
                        file.write(np.ascontiguousarray(array).data)
            with whole.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(whole, self.path)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _part(self, start: int, stop: int) -> Path:
        return self.folder / f"{start:07d}-{stop:07d}.npy"

    @contextlib.contextmanager
    def _disk(self):
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror or error}; make room and give the same "
                f"command again: what is in {self.folder} is kept"
            ) from error


def _is_whole(path: Path, count: int) -> bool:
    try:
        return len(np.load(path, mmap_mode="r")) == count
    except (OSError, ValueError, EOFError):  # not there, or cut short by a crash
        return False


def claim(path: Path, about: dict) -> None:
    """Writes down what is drawn in a folder, or compares it with what was begun there.

    Raises:
      UserError: something else was; what differs is named.
      OSError: a disk that refuses.
    """
    about = json.loads(json.dumps(about))
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        temporary = path.with_suffix(".writing")
        temporary.write_text(json.dumps(about, indent=1))
        os.replace(temporary, path)
        return
    except ValueError:
        found = {}
    found = found if isinstance(found, dict) else {}
    if found != about:
        names = [name for name in {**about, **found} if about.get(name) != found.get(name)]
        raise UserError(
            f"{path.parent} has parts of other samples (another {', '.join(sorted(names))}); move "
            "it away, or give another --out"
        )
