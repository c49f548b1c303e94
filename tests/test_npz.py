"""Arrays of images in .npz files: the same as a folder of the same pixels, read in place, refused
in one line.
"""

import io
import pickle
import struct
import zipfile

import numpy as np
import pytest
from PIL import Image
from test_images import draw, write_folder

from dlc_jax.data import files, sources
from dlc_jax.data.convert import convert, verify
from dlc_jax.data.survey import survey
from dlc_jax.data.transforms import MultiCrop
from dlc_jax.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 9, 7, 3), np.uint8)
LABELS = np.arange(12) % 3


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def save(path, *arrays, compressed=False, **named):
    (np.savez_compressed if compressed else np.savez)(path, *arrays, **named)
    return path


def pixels_of(found):
    return [np.asarray(Image.open(io.BytesIO(found.read(k)))) for k in range(len(found))]


def refused(path, **options):
    with pytest.raises(UserError) as caught:
        found = files.open_files(path, **options)
        [found.read(k) for k in range(len(found))]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("compressed", [False, True])
def test_it_gives_the_batches_of_a_folder(compressed, tmp_path, capsys):
    """Of MedMNIST's names; also as records of it, and from another process's copy."""
    split = {"train": slice(0, 8), "val": slice(8, 12)}
    images = {}
    for word, rows in split.items():
        for k, (pixels, label) in enumerate(zip(PIXELS[rows], LABELS[rows])):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            images[f"{word}/{label}/{k}.png"] = file.getvalue()

    def row_of(name):
        image = Image.open(io.BytesIO(images[name]))
        return int(np.flatnonzero(np.all(PIXELS == image, (1, 2, 3)))[0])

    names = sorted(images)
    order = {word: [row_of(name) for name in names if name.startswith(word)] for word in split}
    arrays = {f"{word}_images": PIXELS[rows] for word, rows in order.items()}
    arrays |= {
        f"{word}_labels": LABELS[rows][:, None].astype(np.uint8) for word, rows in order.items()
    }
    folder, path = (
        write_folder(tmp_path / "folder", images),
        save(tmp_path / "a.npz", compressed=compressed, **arrays),
    )
    convert(path, tmp_path / "records", shard_size=5)
    assert verify(path, tmp_path / "records") == 12
    crops = MultiCrop(global_size=8, local_crops=1, local_size=4)
    for place in (path, tmp_path / "records"):
        for options in (
            dict(transform=None, image=8),
            dict(transform=None, image=8, split="validation"),
            dict(transform=crops, fields=("global", "local", "label"), image="encoded"),
        ):
            want, got = (draw(p, tmp_path / "cache", **options) for p in (folder, place))
            for a, b in zip(got, want, strict=True):
                for name in a:
                    np.testing.assert_array_equal(a[name], b[name])
    assert ("converting" in capsys.readouterr().out) == compressed
    both = [
        sources.identity("images", "train", path=p, image=8) for p in (path, tmp_path / "records")
    ]
    assert both[0] == both[1]
    source = pickle.loads(
        pickle.dumps(sources.source("images", "train", path=path, image=None).source)
    )
    np.testing.assert_array_equal(source[3]["image"], PIXELS[order["train"][3]])


def test_names_and_layouts(tmp_path):
    gray, alpha = PIXELS[..., 0], np.concatenate([PIXELS, PIXELS[..., :1]], -1)
    cases = [
        (dict(arr_0=PIXELS, arr_1=LABELS, mu=np.zeros(3)), PIXELS, ["0", "1", "2"]),
        (dict(images=PIXELS, labels=np.array(["b", "a", "c"] * 4)), PIXELS, ["a", "b", "c"]),
        (dict(images=PIXELS, labels=np.array([b"b", b"a", b"c"] * 4)), PIXELS, ["a", "b", "c"]),
        (dict(arr_0=gray), gray, []),
        (dict(arr_0=gray[..., None]), gray, []),
        (dict(arr_0=alpha), alpha, []),
        (dict(arr_0=np.ascontiguousarray(PIXELS.transpose(0, 3, 1, 2))), PIXELS, []),
        (dict(X_train=PIXELS, y_train=LABELS), PIXELS, ["0", "1", "2"]),
        (dict(image=PIXELS), PIXELS, []),
    ]
    for k, (arrays, want, classes) in enumerate(cases):
        for compressed in (False, True):
            path = save(tmp_path / f"{k}{compressed}.npz", compressed=compressed, **arrays)
            found = files.scan(path)
            assert (found.kind, found.classes, found.sequential, found.size) == (
                "npz",
                classes,
                compressed,
                want.size,
            ), k
            np.testing.assert_array_equal(pixels_of(found), want)
    found = files.scan(save(tmp_path / "other.npz", mine=PIXELS, arr_0=gray), field="mine")
    np.testing.assert_array_equal(pixels_of(found), PIXELS)
    assert found.skipped == {"arrays of other names": 1}
    assert (
        "no array of images called arr_0, images, train_images, x_train; it has mu; say which by "
        "`field`" in refused(save(tmp_path / "none.npz", mu=PIXELS))
    )


def test_splits(tmp_path):
    found = files.scan(
        save(
            tmp_path / "a.npz", x_train=PIXELS, x_test=PIXELS[:5], y_train=LABELS, y_test=LABELS[:5]
        )
    )
    assert found.names[11:13] == ["train/00000011.png", "test/00000000.png"]
    assert found.labels[-1] == 1
    assert len(files.open_files(tmp_path / "a.npz", split="test")) == 5
    alone = files.scan(
        save(tmp_path / "b.npz", val_images=PIXELS, test_images=PIXELS[:5], val_labels=LABELS)
    )
    assert alone.names[0] == "00000000.png" and alone.names[-1] == "00000016.png"
    assert alone.classes == []


def test_labels_that_are_none_are_said(tmp_path):
    for labels in (np.eye(3)[LABELS], np.eye(3, dtype=int)[LABELS], LABELS - 1, np.zeros(12)):
        found = files.scan(save(tmp_path / "a.npz", PIXELS, labels))
        assert found.classes == []
        assert found.skipped == {"arrays of labels that are not one number or name an image": 1}
    assert "11 labels for 12 images" in refused(save(tmp_path / "a.npz", PIXELS, LABELS[:11]))


def test_only_the_rows_that_are_asked_for_are_read(tmp_path, monkeypatch):
    """The file is sparse: 10 GB of zeros, and a few rows."""
    count, shape = 50_000, (256, 256, 3)
    row = int(np.prod(shape))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
    )
    path, size = tmp_path / "large.npz", len(header.getvalue()) + count * row
    extra = struct.pack("<HHQQ", 1, 16, size, size)
    name, wide = b"arr_0.npy", 0xFFFFFFFF
    with open(path, "wb") as file:
        file.write(
            struct.pack(
                "<4sHHHHHIIIHH", b"PK\3\4", 45, 0, 0, 0, 0, 7, wide, wide, len(name), len(extra)
            )
            + name
            + extra
        )
        start = file.tell() + len(header.getvalue())
        file.write(header.getvalue())
        file.seek(start + (count - 1) * row)
        file.write(bytes([9]) * row)
        at = file.tell()
        file.write(
            struct.pack(
                "<4sHHHHHHIIIHHHHHII",
                b"PK\1\2",
                45,
                45,
                0,
                0,
                0,
                0,
                7,
                wide,
                wide,
                len(name),
                len(extra),
                0,
                0,
                0,
                0,
                0,
            )
        )
        file.write(name + extra)
        length = file.tell() - at
        file.write(struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, length, at))
        file.write(
            struct.pack(
                "<4sIQI4sHHHHIIH",
                b"PK\6\7",
                0,
                at + length,
                1,
                b"PK\5\6",
                0,
                0,
                1,
                1,
                length,
                wide,
                0,
            )
        )
    found = files.scan(path)
    assert len(found) == count and found.size == count * row
    assert (np.asarray(Image.open(io.BytesIO(found.read(count - 1)))) == 9).all()
    assert not np.asarray(Image.open(io.BytesIO(found.read(7)))).any()


def test_what_is_not_read(tmp_path):
    for wrong, words in [
        (PIXELS / np.float32(255), "arr_0 is float32 [12, 9, 7, 3]; images are read from uint8"),
        (PIXELS.astype(np.uint16), "arr_0 is uint16"),
        (PIXELS > 9, "arr_0 is bool"),
        (np.asfortranarray(PIXELS), "in Fortran order"),
        (PIXELS.reshape(12, -1), "arr_0 is uint8 [12, 189]"),
        (PIXELS[..., :2], "arr_0 is uint8 [12, 9, 7, 2]"),
        (PIXELS[:, :0], "arr_0 is uint8 [12, 0, 7, 3]"),
    ]:
        assert words in refused(save(tmp_path / "a.npz", wrong))
    assert "no images in" in refused(save(tmp_path / "a.npz", PIXELS[:0]))
    (tmp_path / "a.npz").write_bytes(b"text" * 99)
    assert "cannot read" in refused(tmp_path / "a.npz")
    assert "it has none" in refused(save(tmp_path / "a.npz"))


class Trap:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def test_nothing_is_unpickled(tmp_path):
    trap = np.array([Trap()] * 12, object)
    for compressed in (False, True):
        assert "arr_0 is object [12]" in refused(
            save(tmp_path / "a.npz", trap, compressed=compressed)
        )
        found = files.scan(save(tmp_path / "a.npz", PIXELS, trap, compressed=compressed))
        assert found.classes == []


@pytest.mark.parametrize("compressed", [False, True])
def test_files_that_are_damaged(compressed, tmp_path):
    path = save(tmp_path / "a.npz", PIXELS, LABELS, compressed=compressed)
    whole = path.read_bytes()
    for length in (0, 100, len(whole) // 2, len(whole) - 9):
        path.write_bytes(whole[:length])
        assert "is it complete" in refused(path)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        data = archive.read("arr_0.npy")
    with zipfile.ZipFile(
        path, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    ) as archive:
        archive.writestr("arr_0.npy", data[:-9])
    assert "arr_0 has 2259 bytes of numbers and says [12, 9, 7, 3]" in refused(path)
    if compressed:
        damaged = bytearray(whole)
        damaged[len(whole) // 3] ^= 255
        path.write_bytes(damaged)
        assert "cannot read" in refused(path)
        with pytest.raises(UserError, match="cannot read"):
            survey(path)


def test_a_folder_of_them(tmp_path):
    """One is the place itself, several are folders, as archives are."""
    place = tmp_path / "place"
    place.mkdir()
    save(place / "b.npz", PIXELS[:4], LABELS[:4])
    (place / "notes.txt").write_text("x")
    found = files.scan(place)
    assert found.names[0] == "00000000.png" and found.classes == ["0", "1", "2"]
    assert found.skipped == {"not an image by its name": 1}
    save(place / "a.npz", PIXELS[4:], LABELS[4:] + 2, compressed=True)
    found = files.scan(place)
    assert (found.kind, found.sequential, found.names[0], found.names[8]) == (
        "npz",
        True,
        "a/00000000.png",
        "b/00000000.png",
    )
    assert found.classes == ["0", "1", "2", "3", "4"]
    np.testing.assert_array_equal(
        pixels_of(files.open_files(place)), np.concatenate([PIXELS[4:], PIXELS[:4]])
    )
    assert files.open_files(place).labels.tolist() == [*(LABELS[4:] + 2), *LABELS[:4]]


def test_the_cache_has_room_or_the_way_out_is_said(tmp_path):
    path = save(tmp_path / "a.npz", PIXELS, compressed=True)
    assert "to be converted to read them at random, and cache_gb allows 1e-06" in refused(
        path, cache_gb=1e-6
    )
    assert len(files.open_files(save(tmp_path / "b.npz", PIXELS), cache_gb=1e-6)) == 12


def test_a_conversion_in_the_cache_is_of_its_labels_too(tmp_path):
    """In a folder as well, where the arrays of images stay the same."""
    (tmp_path / "place").mkdir()
    for labels in (LABELS, (LABELS + 1) % 3):
        path = save(tmp_path / "place" / "a.npz", PIXELS, labels, compressed=True)
        for place in (path, tmp_path / "place"):
            assert files.open_files(place).labels.tolist() == labels.tolist()
