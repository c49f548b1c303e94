"""Parquet tables of images: columns as people write them."""

import pyarrow
import pytest
from pyarrow import parquet

from dlc_jax.data import files
from dlc_jax.errors import UserError

STRUCT = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def write(path, count=5, *, start=0, field="image", kind=None, names=None, **columns):
    data = [b"image %d" % k for k in range(start, start + count)]
    if kind is None:
        kind, data = (
            STRUCT,
            [{"bytes": item, "path": names and names[k]} for k, item in enumerate(data)],
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(
        pyarrow.table({field: pyarrow.array(data, kind), **columns}), path, row_group_size=2
    )
    return path


def read(path, tmp_path, **options):
    found = files.open_files(path, cache=tmp_path / "cache", **options)
    return found, dict(zip(found.names, map(found.read, range(len(found)))))


@pytest.mark.parametrize("kind", [pyarrow.binary(), pyarrow.large_binary(), None])
def test_a_file_of_bytes_or_structs(kind, tmp_path):
    found, images = read(
        write(tmp_path / "a.parquet", kind=kind, label=["b", "a", "b", "a", "a"]), tmp_path
    )
    assert images == {f"{k:08d}": b"image %d" % k for k in range(5)}
    assert found.classes == ["a", "b"] and found.labels.tolist() == [1, 0, 1, 0, 0]


def test_names_of_the_paths(tmp_path):
    names = ["b/3.png", "b/1.png", "a/2.png", "a/0.png", "a/4.png"]
    found, images = read(write(tmp_path / "a.parquet", names=names), tmp_path)
    assert found.names == sorted(names) and images["b/1.png"] == b"image 1"
    assert found.classes == ["a", "b"]  # by the folders, for want of a label
    for bad in (["../x.png", *names[1:]], [names[1], *names[1:]], [None, *names[1:]]):
        path = write(tmp_path / f"{len(str(bad))}{bad[0] is None}.parquet", names=bad)
        assert read(path, tmp_path)[0].names[0] == "00000000"


def test_splits_of_the_file_names(tmp_path):
    for k, name in enumerate(
        ["data/train-00000-of-00002", "data/train-00001-of-00002", "data/test-00000-of-00001"]
    ):
        write(tmp_path / "hub" / f"{name}.parquet", start=5 * k, label=pyarrow.array([k] * 5))
    train, test = (
        read(tmp_path / "hub", tmp_path, split=split)[1] for split in ("train", "validation")
    )
    assert list(train.values()) == [b"image %d" % k for k in range(10)]
    assert list(train)[0] == "train/00000000"
    assert list(test.values()) == [b"image %d" % k for k in range(10, 15)]
    assert read(tmp_path / "hub", tmp_path)[0].classes == ["0", "1", "2"]
    (only,) = (tmp_path / "hub").glob("data/test*")
    found, _ = read(only, tmp_path, split="train")  # one file: a share of it is held out
    assert found.names[0].startswith("0000") and len(found) == 4


def test_tables_that_are_refused(tmp_path):
    path = write(tmp_path / "a.parquet", field="img", text=["x"] * 5)
    with pytest.raises(UserError, match="no image column image; it has img; say which by `field`"):
        files.scan(path)
    assert len(files.scan(path, field="img")) == 5
    with pytest.raises(UserError, match="no image column text"):
        files.scan(path, field="text")
    data = path.read_bytes()
    for damaged in (b"", data[:50], data[:-20], b"PAR1" + b"x" * 50 + b"PAR1"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"cannot read .*a\.parquet"):
            files.scan(path, field="img")
    empty = write(tmp_path / "empty.parquet", count=0)
    with pytest.raises(UserError, match="no images in"):
        files.scan(empty)


def test_an_image_without_bytes_is_damaged(tmp_path):
    table = pyarrow.table(
        {
            "image": pyarrow.array(
                [{"bytes": None, "path": "x"}, {"bytes": b"1", "path": None}], STRUCT
            )
        }
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    _, images = read(tmp_path / "a.parquet", tmp_path)
    assert list(images.values()) == [b"", b"1"]


def test_content_and_cache_follow_the_file(tmp_path):
    path = write(tmp_path / "a.parquet")
    first, images = read(path, tmp_path)
    write(path, start=5)
    second, others = read(path, tmp_path)
    assert set(images.values()) & set(others.values()) == set()
    assert first.digest() != second.digest()
    with pytest.raises(UserError, match="to be converted"):
        files.open_files(path, cache=tmp_path / "fresh", cache_gb=1e-9)
