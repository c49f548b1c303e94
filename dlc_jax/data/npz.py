"""Arrays of images in an .npz file, such as ADM's batches of samples and MedMNIST, read in place.

`numpy.savez` stores arrays as they are: an image is read where it lies, however large the file.
What `numpy.savez_compressed` wrote is `sequential`. Nothing is ever unpickled.
"""

import dataclasses
import io
import math
import struct
import threading
import zipfile

import numpy as np
from PIL import Image

from dlc_jax.data.archive_reader import Reader as FileReader
from dlc_jax.data.decoder import MAX_PIXELS
from dlc_jax.data.listing import DAMAGE, Listing, digest, reading
from dlc_jax.data.naming import SPLITS, number_classes
from dlc_jax.errors import UserError

# Alternatives, the first that is there counts: {array of images: (array of their labels, folder of
# their names)}, in lower case.
NAMES = (
    {"arr_0": ("arr_1", "")},
    {"images": ("labels", "")},
    {f"{word}_images": (f"{word}_labels", f"{split}/") for word, split in SPLITS.items()},
    {f"x_{word}": (f"y_{word}", f"{split}/") for word, split in SPLITS.items()},
)
MAX_LABELS = 2**30  # bytes of an array of labels, which is held in memory


def open_npz(path, *, field):
    """The `Listing` of an .npz file.

    Images are read as PNG and named by their number, in folders where the arrays are of splits.

    Args:
      path: of the file. Its arrays of images are uint8 [n, y, x], [n, y, x, c] or [n, c, y, x] with
        c of 1, 3 or 4, and called as in NAMES; labels are whole numbers or texts, [n] or [n, 1].
      field: another name of the array of images; it has precedence.

    Raises:
      UserError: for a damaged file, one without such arrays, or labels of another number of images.
    """
    with reading(path), zipfile.ZipFile(path) as archive:
        inside = {
            info.filename[:-4]: info
            for info in archive.infolist()
            if info.filename.endswith(".npy")
        }
        chosen = _choose(inside, field, path)
        arrays = [_open(archive, inside[name], path) for name, _, _ in chosen]
        labels = [
            None if label is None else _read_labels(archive, inside[label], array.shape[0])
            for array, (_, label, _) in zip(arrays, chosen)
        ]
    train = any(folder == "train/" for *_, folder in chosen)
    folders = [folder if train else "" for *_, folder in chosen]
    starts, names = {}, []
    for array, folder in zip(arrays, folders):
        # "val_images" and "test_images" without training images are in one folder.
        start = starts.setdefault(folder, 0)
        names += [f"{folder}{start + k:08d}.png" for k in range(array.shape[0])]
        starts[folder] += array.shape[0]
    skipped = {}
    used = {name for name, _, _ in chosen} | {label for _, label, _ in chosen}
    if set(inside) - used:
        skipped["arrays of other names"] = len(set(inside) - used)
    unusable = sum(
        found is None for found, (_, label, _) in zip(labels, chosen) if label is not None
    )
    if unusable:
        skipped["arrays of labels that are not one number or name an image"] = unusable
    numbers, classes = None, []
    if all(found is not None for found in labels):
        numbers, classes = number_classes([text for found in labels for text in found])
    about = dict(
        labels=numbers,
        classes=classes,
        skipped=skipped,
        sequential=any(array.start is None for array in arrays),
    )
    content = digest(
        f"{folder} {array.shape} {array.seal}" for array, folder in zip(arrays, folders)
    )
    size = sum(math.prod(array.shape) for array in arrays)
    return Listing("npz", names, Reader(path, arrays), content=content, size=size, **about)


def _choose(inside, field, path):
    """[(array of images, array of labels or None, folder)]."""
    lower = {name.lower(): name for name in inside}
    for names in ({field.lower(): _labels_of(field.lower())}, *NAMES):
        found = [
            (lower[name], lower.get(label), folder)
            for name, (label, folder) in names.items()
            if name in lower
        ]
        if found:
            return found
    known = ", ".join(next(iter(names)) for names in NAMES)
    raise UserError(
        f"{path} has no array of images called {known}; it has "
        f"{', '.join(sorted(inside)) or 'none'}; say which by `field`"
    )


def _labels_of(field):
    known = {name: label for names in NAMES for name, (label, _) in names.items()}
    return known.get(field), ""


@dataclasses.dataclass(frozen=True)
class _Array:
    """What the headers say of an array of images."""

    member: str
    shape: tuple[int, ...]
    skip: int  # bytes of the member before the numbers
    start: int | None  # of the numbers, in the file; None if they are compressed
    seal: str

    @property
    def row(self):
        """Bytes of one image."""
        return math.prod(self.shape[1:])

    def pixels(self, data):
        """uint8 [y, x] or [y, x, c] of the bytes of one image."""
        pixels = np.frombuffer(data, np.uint8).reshape(self.shape[1:])
        if pixels.ndim == 3 and _channels_first(self.shape):
            pixels = np.moveaxis(pixels, 0, -1)
        return np.ascontiguousarray(
            pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels
        )


def _channels_first(shape):
    return shape[-1] not in (1, 3, 4) and shape[1] in (1, 3, 4)


def _open(archive, info, path):
    with archive.open(info) as file:
        shape, fortran, dtype = _header(file)
        skip = file.tell()
    name = info.filename[:-4]
    channels = len(shape) == 3 or (
        len(shape) == 4 and (shape[-1] in (1, 3, 4) or shape[1] in (1, 3, 4))
    )
    if dtype != np.uint8 or not channels or fortran or 0 in shape[1:]:
        raise UserError(
            f"{path}: {name} is {dtype} {list(shape)}{' in Fortran order' * fortran}; images are "
            "read from uint8, 0 to 255, [n, y, x] or [n, y, x, c] in C order: convert them and "
            "save them again"
        )
    if math.prod(shape[1:]) > 4 * MAX_PIXELS:
        raise UserError(f"{path}: the images in {name} are too large, {list(shape)}")
    if info.file_size != skip + math.prod(shape):
        raise ValueError(
            f"{name} has {info.file_size - skip} bytes of numbers and says {list(shape)}"
        )
    start = None
    if info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1:
        header = FileReader(path).at(info.header_offset, 30)
        start = info.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26)) + skip
    return _Array(info.filename, shape, skip, start, f"{info.CRC:08x}")


def _header(file):
    """(shape, whether in Fortran order, dtype) of an .npy file, read up to its numbers."""
    version = np.lib.format.read_magic(file)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"format {version} of .npy is not known")
    return readers[version](file)


def _read_labels(archive, info, count):
    """The classes of all images as texts, or None for an array that is of something else."""
    with archive.open(info) as file:
        shape, _, dtype = _header(file)
        if (
            dtype.kind not in "iuUS"
            or shape[1:] not in ((), (1,))
            or not shape
            or shape[0] * dtype.itemsize > MAX_LABELS
        ):
            return None
        if shape[0] != count:
            raise ValueError(f"{shape[0]} labels for {count} images")
    with archive.open(info) as file:
        values = np.lib.format.read_array(file, allow_pickle=False).reshape(-1)
    if dtype.kind == "S":
        values = np.char.decode(values, "utf-8", "replace")
    if dtype.kind in "iu" and values.min(initial=0) < 0:
        return None
    return [str(value) for value in values.tolist()]


class Reader:
    """Index -> bytes of a PNG file, over several arrays; fast only forward in compressed ones."""

    def __init__(self, path, arrays):
        self.path, self.arrays = path, arrays
        self.starts = np.cumsum([0, *(array.shape[0] for array in arrays)])
        self._file, self._stream, self._lock = FileReader(path), (None, None), threading.Lock()

    def __call__(self, index):
        k = int(np.searchsorted(self.starts, index, side="right")) - 1
        array, row = self.arrays[k], int(index - self.starts[k])
        if array.start is None:
            data = self._decompress(array, row)
        else:
            data = self._file.at(array.start + row * array.row, array.row)
        file = io.BytesIO()
        Image.fromarray(array.pixels(data)).save(file, "PNG", compress_level=1)
        return file.getvalue()

    def _decompress(self, array, row):
        # What follows a damaged byte cannot be told from what is sound: the whole file is refused,
        # not one image.
        with self._lock, reading(self.path, DAMAGE):
            member, stream = self._stream
            if member != array.member:
                stream = zipfile.ZipFile(self.path).open(array.member)
                self._stream = array.member, stream
            stream.seek(array.skip + row * array.row)
            data = stream.read(array.row)
            if len(data) != array.row:
                raise EOFError("it is cut off")
        return data

    def close(self):
        with self._lock:
            self._stream = None, None
        self._file.close()

    def __getstate__(self):
        return {**self.__dict__, "_stream": (None, None), "_lock": None}

    def __setstate__(self, state):
        self.__dict__.update(state, _lock=threading.Lock())
