"""Labels that lie in tars beside the images, as WebDataset has them."""

import io
import json
import tarfile

import pytest

from dlc_jax.data import archives, files, records, sources
from dlc_jax.data.convert import convert, verify
from dlc_jax.errors import UserError


def write(path, members, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def labels(path, cache, **options):
    """{name: class} of a place."""
    found = files.open_files(path, cache=cache, **options)
    return {name: found.classes[found.label(k)] for k, name in enumerate(found.names)}


NUMBERS = {
    "0.jpg": b"0",
    "0.cls": b"2\n",
    "0.txt": b"a caption",
    "1.cls": b" 0",
    "1.jpg": b"11",
    "2.PNG": b"2",
    "2.cls": b"02",
}


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_numbers_are_labels(name, tmp_path):
    path = write(tmp_path / name, NUMBERS, "w:gz" if name.endswith("gz") else "w")
    found = files.open_files(path, cache=tmp_path / "cache")
    assert found.names == ["0.jpg", "1.jpg", "2.PNG"] and found.labels.tolist() == [2, 0, 2]
    assert found.classes == ["0", "1", "2"]
    assert [found.read(k) for k in range(3)] == [
        b"0",
        b"11",
        b"2",
    ]
    # The caption.
    assert files.scan(path, cache=tmp_path / "cache").skipped == {"not an image by its name": 1}


@pytest.mark.parametrize(
    ("members", "wanted"),
    [
        ({"x.cls": b"tabby cat"}, "tabby cat"),
        ({"x.CLS": b"dog"}, "dog"),
        ({"x.json": {"cls": 3, "label": "no", "class": "no"}}, "3"),
        ({"x.json": {"width": 9, "label": "dog", "class": 4}}, "dog"),
        ({"x.json": {"class": "dog"}}, "dog"),
        ({"x.json": {"cls": "dog"}, "x.cls": b"cat"}, "cat"),
        ({"x.cls": b"cat", "x.json": {"cls": "dog"}}, "cat"),
        ({"x.cls": b"cat", "x.CLS": b"dog"}, "dog"),
        ({"x.json": {"caption": "a dog"}}, None),
        ({"x.json": {"label": ["dog", "cat"]}}, None),
        ({"x.json": {"label": True}}, None),
        ({"x.json": {"label": -1}}, None),
        ({"x.json": ["label"]}, None),
        ({"x.json": b"{"}, None),
        ({"x.json": b"[" * 100_000}, None),
        ({"x.cls": b""}, None),
        ({"x.cls": b"-1"}, None),
        ({"x.cls": b"\xff\xfe"}, None),
        ({"x.cls": b"cat\ndog"}, None),
        ({"x.cls.txt": b"cat"}, None),
        ({"y.cls": b"cat"}, None),
        ({"._x.cls": b"cat"}, None),
        ({"../x.cls": b"cat"}, None),
        ({"x.json": b" " * 2**20 + b'{"cls": 3}'}, None),
    ],
)
def test_what_is_a_label(members, wanted, tmp_path):
    members = {
        name: data if isinstance(data, bytes) else json.dumps(data).encode()
        for name, data in members.items()
    }
    path = write(tmp_path / "a.tar", {"x.png": b"0"} | members)
    found = files.scan(path, cache=tmp_path / "cache")
    assert found.names == ["x.png"]
    assert (found.classes[found.label(0)] if found.classes else None) == wanted


def test_they_win_over_folders_and_belong_to_all_images_of_a_sample(tmp_path):
    members = {
        "b/1.left.png": b"0",
        "b/1.cls": b"x",
        "b/1.right.png": b"0",
        "c/1.png": b"0",
        "c/1.cls": b"y",
    }
    wanted = {"b/1.left.png": "x", "b/1.right.png": "x", "c/1.png": "y"}
    assert labels(write(tmp_path / "a.tar", members), tmp_path / "cache") == wanted
    plain = {name: data for name, data in members.items() if not name.endswith("cls")}
    assert set(labels(write(tmp_path / "b.tar", plain), tmp_path / "cache").values()) == {"b", "c"}


def test_shards_of_a_folder_share_their_classes_and_samples_without_one_are_left_out(tmp_path):
    place = tmp_path / "shards"
    write(place / "train" / "0.tar", {"1.png": b"0", "1.cls": b"3", "2.png": b"0", "2.cls": b"0"})
    write(place / "train" / "1.tar", {"1.png": b"0", "1.cls": b"1", "9.png": b"0"})
    write(place / "val" / "0.tar", {"1.png": b"0", "1.cls": b"1"})
    found = files.scan(place, cache=tmp_path / "cache")
    assert dict(zip(found.names, found.labels.tolist())) == {
        "train/0/1.png": 3,
        "train/0/2.png": 0,
        "train/1/1.png": 1,
        "val/0/1.png": 1,
    }
    assert found.classes == ["0", "1", "2", "3"]
    assert found.skipped == {"without a label, where others have one": 1}
    assert labels(place, tmp_path / "cache", split="validation") == {"val/0/1.png": "1"}
    write(place / "val" / "0.tar", {"1.png": b"0", "1.cls": b"cat"})  # a name: then all are names
    assert files.scan(place, cache=tmp_path / "cache").classes == ["0", "1", "3", "cat"]


def test_the_index_keeps_them_and_an_older_one_is_made_again(tmp_path, monkeypatch):
    path, cache = write(tmp_path / "a.tar", NUMBERS), tmp_path / "cache"
    wanted = labels(path, cache)
    (index,) = cache.iterdir()
    kept = json.loads(index.read_text())
    assert kept["format"] == 2
    index.write_text(
        json.dumps({key: value for key, value in kept.items() if key != "labels"} | {"format": 1})
    )
    assert labels(path, cache) == wanted
    monkeypatch.setattr(archives, "_index_tar", lambda *a: pytest.fail("read again"))
    assert labels(path, cache) == wanted


def test_conversions_have_them(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write(tmp_path / "a.tar", NUMBERS)
    convert(path, tmp_path / "records", shard_size=2)
    assert labels(tmp_path / "records", None) == labels(path, None)
    assert verify(path, tmp_path / "records") == 3
    packed = write(tmp_path / "a.tar.gz", NUMBERS, "w:gz")
    with monkeypatch.context() as before:  # converted when labels were not read
        before.setattr(archives.webdataset, "may_be_label", lambda *a: False)
        assert files.open_files(packed).classes == []
    for index in (tmp_path / "cache" / "dlc_jax").glob("*.json"):
        index.unlink()
    assert labels(packed, None) == labels(path, None)
    assert sources.source("images", "train", path=packed, image=8, validation=0).source.classes == [
        "0",
        "1",
        "2",
    ]
    records.verify(tmp_path / "records")


def test_one_label_and_no_image(tmp_path):
    path = write(tmp_path / "a.tar", {"1.png": b"0", "1.cls": b"1", "2.png": b"0"})
    assert labels(path, tmp_path / "cache") == {"1.png": "1"}
    with pytest.raises(UserError, match="no images in .*1 left out: not an image"):
        files.scan(
            write(tmp_path / "b.tar", {"1.cls": b"1", "1.txt": b""}), cache=tmp_path / "cache"
        )
