"""Places that hold images, by path; and those that do not: one line each."""

import io
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from dlc_jax.data import files, records
from dlc_jax.errors import UserError


def touch(place, *names):
    for k, name in enumerate(names):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(b"%d" % k)
    return place


def refused(path, **options):
    with pytest.raises(UserError) as caught:
        files.open_files(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_places_without_images(tmp_path):
    assert "does not exist" in refused(tmp_path / "nothing")
    assert "no images in" in refused(tmp_path)
    touch(tmp_path / "text", "a.txt", "b/c.txt", "._hidden.png", ".git/a.png", "__MACOSX/a.png")
    assert "2 left out: not an image by its name" in refused(tmp_path / "text")
    assert "is no folder, archive" in refused(touch(tmp_path, "a.png") / "a.png")
    for path in ("gs://bucket/folder", "s3://bucket/a.tar", "https://host/a.zip"):
        assert "mount the bucket" in refused(path)


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    touch(tmp_path, "closed/a.png")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read everything
    assert "Permission denied" in refused(tmp_path)


def test_a_folder(tmp_path):
    names = ["x/2.png", "x/10.JPG", "y/deep/1.webp", "z/a b.png", "z/ünï.png"]
    touch(tmp_path, *names, "notes.txt", "x/.hidden.png")
    found = files.open_files(tmp_path)
    assert found.kind == "folder" and found.names == sorted(names) and found.classes == ["x", "y", "z"]
    assert [found.read(k) for k in range(5)] == [b"1", b"0", b"2", b"3", b"4"]
    assert found.labels.tolist() == [0, 0, 1, 2, 2] and found.skipped == {"not an image by its name": 1}
    assert pickle.loads(pickle.dumps(found)).read(2) == b"2"
    train, held = (files.open_files(tmp_path, split=split, validation=0.4) for split in ("train", "validation"))
    assert sorted(train.names + held.names) == sorted(names) and train.classes == held.classes == found.classes


def test_names_that_are_no_text(tmp_path):
    touch(tmp_path, "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff.png")
    found = files.open_files(tmp_path)
    assert found.read(0) == b"0" and found.digest()
    records.write(tmp_path / "records", found)
    assert files.open_files(tmp_path / "records").names == found.names


def test_links_in_a_folder(tmp_path):
    touch(tmp_path / "else", "inside.png")
    place = touch(tmp_path / "place", "x/1.png")
    (place / "x" / "2.png").symlink_to(tmp_path / "else" / "inside.png")
    (place / "y").symlink_to(tmp_path / "else")
    (place / "x" / "up").symlink_to(place)  # around and around
    (place / "x" / "gone.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(place / "x" / "pipe.png")
    found = files.open_files(place)
    assert {"x/1.png", "x/2.png", "y/inside.png"} <= set(found.names) and len(found) < 10
    assert found.skipped["broken link"] >= 1 and found.skipped["special file"] >= 1


def test_a_file_too_large_for_an_image(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_BYTES", 0)
    found = files.open_files(touch(tmp_path, "a.png"))
    with pytest.raises(ValueError, match="more than 0 bytes"):
        found.read(0)


def test_a_set_of_records(tmp_path):
    images = files.open_files(touch(tmp_path / "images", *(f"{top}/{k}.png" for top in "xy" for k in range(9))))
    records.write(tmp_path / "records", images, shard_size=4)
    found = files.open_files(tmp_path / "records")
    assert (found.kind, found.names, found.classes) == ("records", images.names, ["x", "y"])
    assert [found.read(k) for k in range(18)] == [images.read(k) for k in range(18)]
    assert found.labels.tolist() == images.labels.tolist() and found.digest() == images.digest()
    assert pickle.loads(pickle.dumps(found)).read(17) == images.read(17)
    manifest = tmp_path / "records" / "manifest.json"
    text = manifest.read_text()
    manifest.unlink()
    assert "without their manifest.json" in refused(tmp_path / "records")
    manifest.write_text(text)
    index = tmp_path / "records" / "index.json"
    index.write_text(index.read_text().replace("x/3.png", "x/4.png"))
    assert "index.json does not match" in refused(tmp_path / "records")


def test_idx_files_that_are_damaged(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte"
    header = np.array([0x803, 3, 4, 4], ">u4").tobytes()
    path.write_bytes(header + bytes(range(48)))
    found = files.open_files(path)
    assert (found.kind, found.names[2], found.classes) == ("idx", "train/00000002.png", [])
    assert np.asarray(Image.open(io.BytesIO(found.read(2)))).ravel().tolist() == list(range(32, 48))
    other = files.open_files(path).digest()
    path.write_bytes(header + bytes(range(1, 49)))
    assert files.open_files(path).digest() != other
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(np.array([0x801, 2], ">u4").tobytes() + b"\0\1")
    assert "2 labels for 3 images" in refused(path)
    labels.write_bytes(path.read_bytes())
    assert "not an IDX file of labels" in refused(path)
    labels.write_bytes(np.array([0x801, 3], ">u4").tobytes() + b"\0\1\2")
    assert files.open_files(path).labels.tolist() == [0, 1, 2]
    for data in (b"", header[:9], b"text" * 20, np.array([0x803, 2**31, 2**15, 2**15], ">u4").tobytes()):
        path.write_bytes(data)
        assert "cannot read" in refused(path)
    path.write_bytes((header + bytes(48))[:-1])
    with pytest.raises(UserError, match="cut off"):
        files.open_files(path).read(0)
    gz = tmp_path / "gz"
    (touch(gz, "train-images-idx3-ubyte.gz") / "train-images-idx3-ubyte.gz").write_bytes(header)
    assert "cannot read" in refused(gz)


def test_tfds_by_name_or_folder(tmp_path):
    assert "cannot read TFDS data set nothing_here" in refused("tfds:nothing_here")
    touch(tmp_path, "dataset_info.json")
    assert "cannot read TFDS data set" in refused(tmp_path)
