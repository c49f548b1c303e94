"""Places that hold images, by path; and those that do not: one line each."""

import io
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from dlc_jax.data import files, folder, naming, record_writer
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
    assert "is not a folder, archive" in refused(touch(tmp_path, "a.png") / "a.png")
    assert "https:// is unknown; known: gs://bucket/…" in refused("https://host/a.zip")


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
    assert found.kind == "folder" and found.names == sorted(names)
    assert found.classes == ["x", "y", "z"]
    assert [found.read(k) for k in range(5)] == [b"1", b"0", b"2", b"3", b"4"]
    assert found.labels.tolist() == [0, 0, 1, 2, 2]
    assert found.skipped == {"not an image by its name": 1}
    assert pickle.loads(pickle.dumps(found)).read(2) == b"2"
    train, held = (
        files.open_files(tmp_path, split=split, validation=0.4) for split in ("train", "validation")
    )
    assert sorted(train.names + held.names) == sorted(names)
    assert train.classes == held.classes == found.classes


def test_names_that_are_no_text(tmp_path):
    touch(tmp_path, "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff.png")
    found = files.open_files(tmp_path)
    assert found.read(0) == b"0" and found.digest()
    record_writer.write(tmp_path / "records", found)
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
    assert found.names == ["x/1.png", "x/2.png", "y/inside.png"]
    assert found.skipped == {
        "link to a folder that it is in (such as x/up)": 1,
        "broken link (such as x/gone.png)": 1,
        "special file": 1,
    }


def test_a_folder_that_is_linked_is_read_once(tmp_path):
    """By its own name where it is inside, else by the first link; what cannot be followed is named
    and costs nothing else.
    """
    place = touch(tmp_path / "place", "real/1.png", "real/deep/2.png")
    touch(tmp_path / "else", "3.png", "deep/4.png")
    (place / "again").symlink_to(place / "real" / "deep")
    (place / "here").symlink_to(".")
    (place / "real" / "above").symlink_to(tmp_path)
    (place / "linked").symlink_to(tmp_path / "else")
    (place / "later").symlink_to(tmp_path / "else" / "deep")
    (tmp_path / "else" / "back").symlink_to(tmp_path / "else")
    (place / "ring").symlink_to("gnir")
    (place / "gnir").symlink_to("ring")
    (place / "gone").symlink_to(tmp_path / "nowhere")
    for way in (place, tmp_path / "place" / "here"):
        found = files.open_files(way)
        assert found.names == ["later/4.png", "linked/3.png", "real/1.png", "real/deep/2.png"]
        assert found.skipped == {
            "link to a folder that it is in (such as here)": 2,
            "link to a folder that is read already (such as again)": 2,
            "link in a ring (such as gnir)": 2,
            "broken link (such as gone)": 1,
        }
    assert [found.read(k) for k in range(4)] == [b"1", b"0", b"0", b"1"]
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "a.png").symlink_to("a.png")
    assert refused(tmp_path / "only").endswith("; 1 left out: link in a ring (such as a.png)")


SYSTEMS = [
    "System Volume Information",
    *"@eaDir #recycle .@__thumb .thumbnails .picasaoriginals __MACOSX .AppleDouble".split(),
    *"$RECYCLE.BIN lost+found .Trash-1000 @Recycle".split(),
]


def test_folders_of_servers_and_systems_are_no_classes(tmp_path):
    names = [f"cat/{folder}/1.jpg/SYNOFILE_THUMB_M.jpg" for folder in SYSTEMS]
    names += ["@eaDir/cat/1.png", "@eaDir/cat/2.png", "#recycle/2.png"]
    place = touch(
        tmp_path / "place", *names, "cat/1.png", "dog/1.png", ".git/1.png", "dog/lost+found.png"
    )
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(place, "top")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for file in place.rglob("*.*"):
            if file.is_file():
                archive.write(file, file.relative_to(place))
    for path in (place, tmp_path / "a.tar", tmp_path / "a.zip"):
        found = files.open_files(path)
        assert found.names == [
            "cat/1.png",
            "dog/1.png",
            "dog/lost+found.png",
        ]
        assert found.classes == ["cat", "dog"]
        assert found.skipped["folders of thumbnails, trash or a system"] == len(SYSTEMS) + 2


def test_photographs_that_an_extra_reads_are_named_without_it(tmp_path, monkeypatch):
    place = touch(tmp_path / "place", "a.HEIC", "b.heif", "c.hif", "d.png", "e.jxl", "f.avif")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(place, "top")
    for there in (False, True, False):  # the index of an archive is made again
        monkeypatch.setattr(naming, "reads_heic", lambda there=there: there)
        for path in (place, tmp_path / "a.tar"):
            found = files.open_files(path, cache=tmp_path / "cache")
            assert found.names == ["a.HEIC", "b.heif", "c.hif"] * there + ["d.png", "f.avif"]
            wanted = (
                {} if there else {"photographs in HEIC (pip install 'dlc_jax[heic]' reads them)": 3}
            )
            assert found.skipped == wanted | {
                "images in JPEG XL (not read: convert them to PNG)": 1
            }
    touch(tmp_path / "only", "a.heic")
    assert "; 1 left out: photographs in HEIC (pip install 'dlc_jax[heic]' reads them)" in refused(
        tmp_path / "only"
    )


def test_a_file_too_large_for_an_image(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "MAX_BYTES", 0)
    found = files.open_files(touch(tmp_path, "a.png"))
    with pytest.raises(ValueError, match="more than 0 bytes"):
        found.read(0)


def test_a_set_of_records(tmp_path):
    images = files.open_files(
        touch(tmp_path / "images", *(f"{top}/{k}.png" for top in "xy" for k in range(9)))
    )
    record_writer.write(tmp_path / "records", images, shard_size=4)
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
    for data in (
        b"",
        header[:9],
        b"text" * 20,
        np.array([0x803, 2**31, 2**15, 2**15], ">u4").tobytes(),
    ):
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
