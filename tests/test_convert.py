"""Conversion to records: the bytes of every kind of place, killed at any step, verified, and what
it refuses.
"""

import gzip
import io
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image

from dlc_jax.data import files, records, shard, sources
from dlc_jax.data.convert import convert, verify
from dlc_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def encoded(number, *, size=(9, 7), form="PNG"):
    file = io.BytesIO()
    Image.fromarray(
        np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    ).save(file, form)
    return file.getvalue()


IMAGES = {
    f"{split}/{name}/{k}.{end}": encoded(100 * i + k, form=form)
    for split, n in (("train", 3), ("test", 2))
    for i, (name, end, form) in enumerate([("cat", "png", "PNG"), ("dog", "jpg", "JPEG")])
    for k in range(n)
}


def write_folder(path, images=IMAGES):
    for name, data in images.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return path


def write_tar(path, images=IMAGES, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in images.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_zip(path, images=IMAGES):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in images.items():
            archive.writestr(name, data)
    return path


def write_nested(path, images=IMAGES):
    """As ImageNet's: a tar of a tar for each class."""
    inner = {}
    for folder in sorted({name.rpartition("/")[0] for name in images}):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            for name, data in images.items():
                if name.startswith(folder + "/"):
                    member = tarfile.TarInfo(name.rpartition("/")[2])
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        inner[f"{folder}.tar"] = file.getvalue()
    return write_tar(path, inner)


def write_class_tars(path, images=IMAGES):
    for folder in {name.rpartition("/")[0] for name in images}:
        (path / folder).parent.mkdir(parents=True, exist_ok=True)
        inside = {
            name.rpartition("/")[2]: data
            for name, data in images.items()
            if name.startswith(folder + "/")
        }
        write_tar(path / f"{folder}.tar", inside)
    return path


def write_parquet(path, images=IMAGES, classes=("cat", "dog")):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    names = sorted(images)
    column = pyarrow.array([{"bytes": images[name], "path": name} for name in names])
    labels = [classes.index(name.split("/")[1]) for name in names]
    features = {"info": {"features": {"label": {"names": ["cat", "dog"]}}}}
    table = pyarrow.table({"image": column, "label": labels}).replace_schema_metadata(
        {"huggingface": json.dumps(features)}
    )
    parquet.write_table(table, path, row_group_size=3)
    return path


PLACES = {
    "folder": lambda place: write_folder(place / "images"),
    "tar": lambda place: write_tar(place / "images.tar"),
    "zip": lambda place: write_zip(place / "images.zip"),
    "tar.xz": lambda place: write_tar(place / "images.tar.xz", mode="w:xz"),
    "nested": lambda place: write_nested(place / "images.tar"),
    "class_tars": lambda place: write_class_tars(place / "images"),
    "parquet": lambda place: write_parquet(place / "images.parquet"),
}


def contents(directory):
    """{name: (bytes, class)} of a set of records."""
    found = records.open_records(directory)
    return {
        found.names[k]: (found.read(k), found.classes[found.label(k)]) for k in range(len(found))
    }


@pytest.mark.parametrize("kind", PLACES)
def test_bytes_names_and_classes_stay(kind, tmp_path):
    source = PLACES[kind](tmp_path)
    done = convert(source, tmp_path / "records", shard_size=4, workers=3)
    assert contents(tmp_path / "records") == {
        name: (data, name.split("/")[1]) for name, data in IMAGES.items()
    }
    assert (
        done["images"],
        done["shards"],
        done["resumed"],
        done["classes"],
        done["unreadable"],
    ) == (10, 3, 0, 2, 0)
    assert done["bytes"] == sum(
        file.stat().st_size for file in (tmp_path / "records").glob("*.arrayrecord")
    )
    assert verify(source, tmp_path / "records", workers=2) == 10
    for split in ("train", "validation"):
        ours = sources.source("images", split, path=str(tmp_path / "records"), image=8)
        theirs = sources.source("images", split, path=str(source), image=8)
        assert len(ours) == len(theirs) == {"train": 6, "validation": 4}[split]
        for k in range(len(ours)):
            assert ours[k]["label"] == theirs[k]["label"]
            assert np.array_equal(ours[k]["image"], theirs[k]["image"])


def test_idx_becomes_png(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 4), np.uint8)
    (tmp_path / "idx").mkdir()
    with gzip.open(tmp_path / "idx" / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(struct.pack(">IIII", 0x803, 5, 6, 4) + pixels.tobytes())
    with gzip.open(tmp_path / "idx" / "train-labels-idx1-ubyte.gz", "wb") as file:
        file.write(struct.pack(">II", 0x801, 5) + bytes([1, 0, 1, 2, 2]))
    convert(tmp_path / "idx", tmp_path / "records")
    found = records.open_records(tmp_path / "records")
    for k in range(5):
        with Image.open(io.BytesIO(found.read(k))) as image:
            assert image.format == "PNG" and np.array_equal(np.asarray(image), pixels[k])
    assert found.labels.tolist() == [1, 0, 1, 2, 2]
    assert verify(tmp_path / "idx", tmp_path / "records") == 5


def test_records_into_other_shards(tmp_path):
    convert(write_folder(tmp_path / "images"), tmp_path / "three", shard_size=4)
    convert(tmp_path / "three", tmp_path / "one")
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert len(list((tmp_path / "one").glob("*.arrayrecord"))) == 1


def test_tfds(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")

    class Pair(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            label = tfds.features.ClassLabel(names=["cat", "dog"])
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {"image": tfds.features.Image(), "label": label}
                ),
            )

        def _split_generators(self, _):
            return {
                "train": self._generate_examples("train"),
                "test": self._generate_examples("test"),
            }

        def _generate_examples(self, split):
            for name, data in IMAGES.items():
                if name.startswith(split):
                    yield name, {"image": io.BytesIO(data), "label": name.split("/")[1]}

    builder = Pair(data_dir=tmp_path / "tfds", file_format="array_record")
    builder.download_and_prepare()
    convert(builder.data_path, tmp_path / "records")
    found = contents(tmp_path / "records")
    assert sorted(found.values()) == sorted(
        (data, name.split("/")[1]) for name, data in IMAGES.items()
    )
    assert {name.split("/")[0] for name in found} == {"train", "test"}


def test_one_split(tmp_path):
    source = write_folder(tmp_path / "images")
    convert(source, tmp_path / "records", split="test")
    assert sorted(contents(tmp_path / "records")) == sorted(
        name for name in IMAGES if name.startswith("test/")
    )
    assert verify(source, tmp_path / "records", split="test") == 4
    with pytest.raises(UserError, match="no folder for the split validation; it has test, train"):
        convert(source, tmp_path / "other", split="validation")
    assert not (tmp_path / "other").exists()


# The process dies at its n-th rename or removal of a file: between any two of these nothing changes
# that the next run could see but a temporary file. A fork for each n; nothing has started a thread
# before.
KILLS = """
import os, pathlib, shutil, sys
from dlc_jax.data.convert import convert
source, reference, place = map(pathlib.Path, sys.argv[1:])

def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}

def run(directory, kill=None):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = kill
    def counted(function):
        def call(*arguments, **options):
            nonlocal left
            if left is not None:
                if left == 0:
                    os.kill(os.getpid(), 9)
                left -= 1
            return function(*arguments, **options)
        return call
    pathlib.Path.rename = counted(pathlib.Path.rename)
    pathlib.Path.unlink = counted(pathlib.Path.unlink)
    convert(source, directory, shard_size=4, workers=1)
    os._exit(0)

assert run(reference) == 0
kills = 0
while (code := run(place, kills)) != 0:
    assert code == -9, code
    done = [path.name.removesuffix(".json") for path in place.glob("*.arrayrecord.json")]
    done = {name: (place / name).stat().st_ino for name in done if (place / name).exists()}
    assert run(place) == 0
    assert files(place) == files(reference), kills
    assert {name: (place / name).stat().st_ino for name in done} == done, kills
    shutil.rmtree(place)
    kills += 1
print(kills)
"""


def test_killed_at_every_step_it_goes_on_to_the_same_bytes(tmp_path):
    source = write_zip(tmp_path / "images.zip")
    command = [sys.executable, "-c", KILLS, source, tmp_path / "reference", tmp_path / "killed"]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    # Of 3 shards: the shard, its own file, its removal; index and manifest.
    assert int(done.stdout) >= 3 * 3 + 2


def test_complete_shards_are_not_written_again_and_damaged_ones_are(tmp_path):
    source, place = write_folder(tmp_path / "images"), tmp_path / "records"
    convert(source, place, shard_size=4)
    before = {
        path.name: (path.stat().st_ino, path.read_bytes()) for path in place.glob("*.arrayrecord")
    }
    damaged, cut, absent = sorted(before)
    data = bytearray(before[damaged][1])
    data[len(data) // 2] ^= 1
    (place / damaged).write_bytes(data)
    with pytest.raises(UserError, match=f"{damaged} has changed"):
        verify(source, place)
    done = convert(source, place, shard_size=4)
    assert done["resumed"] == 2
    with open(place / cut, "r+b") as file:
        file.truncate(100)
    with pytest.raises(UserError, match=f"{cut} has 100 bytes"):
        verify(source, place)
    (place / absent).unlink()
    assert convert(source, place, shard_size=4)["resumed"] == 1
    assert {path.name: path.read_bytes() for path in place.glob("*.arrayrecord")} == {
        name: data for name, (_, data) in before.items()
    }
    assert (place / damaged).stat().st_ino != before[damaged][0] or (
        place / absent
    ).stat().st_ino != before[absent][0]
    assert convert(source, place, shard_size=4)["resumed"] == 3


def test_a_disk_that_changes_what_is_written_is_found(tmp_path, monkeypatch):
    class Careless(shard.ArrayRecordWriter):
        def write(self, record):
            super().write(record[:-1] + bytes([record[-1] ^ 1]))

    monkeypatch.setattr(shard, "ArrayRecordWriter", Careless)
    with pytest.raises(UserError, match="other records arrived than were written"):
        convert(write_folder(tmp_path / "images"), tmp_path / "records")
    assert list((tmp_path / "records").iterdir()) == []


def test_verify_names_what_differs(tmp_path):
    source, place = write_folder(tmp_path / "images"), tmp_path / "records"
    convert(source, place)
    (source / "train/cat/1.png").write_bytes(IMAGES["train/cat/2.png"])
    with pytest.raises(UserError, match="1 images differ, such as train/cat/1.png"):
        verify(source, place)
    (source / "train/cat/new.png").write_bytes(IMAGES["train/cat/2.png"])
    with pytest.raises(
        UserError, match=r"1 images are in one of them only, such as train/cat/new.png in \S+images"
    ):
        verify(source, place)


def test_verify_compares_classes(tmp_path):
    """The same files in the classes of each other."""
    source = write_parquet(tmp_path / "images.parquet")
    convert(source, tmp_path / "records")
    write_parquet(source, classes=("dog", "cat"))
    with pytest.raises(UserError, match="10 images differ"):
        verify(source, tmp_path / "records")


def test_a_damaged_member_stays_as_a_record_without_bytes(tmp_path):
    """So that the images after it keep their numbers, and training puts the same other one in its
    place.
    """
    source = write_zip(
        tmp_path / "images.zip",
        {name: data for name, data in IMAGES.items() if name.endswith("png")},
    )
    data = bytearray(source.read_bytes())
    with zipfile.ZipFile(source) as archive:
        offset = archive.getinfo("train/cat/1.png").header_offset
    data[offset + 30 + len("train/cat/1.png") + 20] ^= 255
    source.write_bytes(data)
    done = convert(source, tmp_path / "records")
    assert done["unreadable"] == 1 and done["images"] == 5
    assert {name for name, (data, _) in contents(tmp_path / "records").items() if not data} == {
        "train/cat/1.png"
    }
    assert verify(source, tmp_path / "records") == 5


def test_a_source_that_refuses_stops_it(tmp_path, monkeypatch):
    """No record without bytes for a disk that is gone for a moment."""
    source = write_folder(tmp_path / "images")
    inner = files.FolderReader.__call__

    def read(self, index):
        if self.names[index] == "train/cat/1.png":
            raise PermissionError(13, "Permission denied")
        return inner(self, index)

    monkeypatch.setattr(files.FolderReader, "__call__", read)
    with pytest.raises(UserError, match="cannot read image train/cat/1.png: Permission denied"):
        convert(source, tmp_path / "records", shard_size=2, workers=2)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    convert(source, tmp_path / "records", shard_size=2)
    assert len(contents(tmp_path / "records")) == 10


def another_set(place):
    convert(
        write_folder(place.parent / "others", {"a/1.png": encoded(1), "b/2.png": encoded(2)}), place
    )


def code_store(place):
    place.mkdir()
    (place / "manifest.json").write_text(json.dumps({"format": 1, "identity": "x", "shards": []}))


def photographs(place):
    write_folder(place, {"mine.png": encoded(0)})


def index(place):
    place.mkdir()
    (place / "index.json").write_text("mine")


def bare_shards(place):
    convert(
        write_folder(place.parent / "others", {"a/1.png": encoded(1), "b/2.png": encoded(2)}), place
    )
    (place / "manifest.json").unlink()
    (place / "index.json").unlink()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (another_set, "holds other records of images .*count: 2 there, 10 here"),
        (
            lambda place: convert(place.parent / "images", place, shard_size=3),
            "shard_size: 3 there, 1024 here",
        ),
        (code_store, r"holds something else \(manifest.json\)"),
        (photographs, r"holds something else \(mine.png\)"),
        (index, r"holds something else \(index.json\)"),
        (bare_shards, r"holds something else \(images-00000-of-00001.arrayrecord\)"),
        (lambda place: place.write_text("a file"), "cannot write"),
    ],
    ids="set shards codes photographs index bare file".split(),
)
def test_a_destination_of_something_else_is_refused_and_stays(make, words, tmp_path):
    source, place = write_folder(tmp_path / "images"), tmp_path / "records"
    make(place)
    before = {path: path.read_bytes() for path in [place, *place.rglob("*")] if path.is_file()}
    with pytest.raises(UserError, match=words) as error:
        convert(source, place)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    assert {
        path: path.read_bytes() for path in [place, *place.rglob("*")] if path.is_file()
    } == before


@pytest.mark.parametrize(
    ("source", "destination", "options", "words"),
    [
        ("images", "images/records", {}, "is inside of"),
        ("images", "images", {}, "is inside of"),
        ("images", "gs://bucket/records", {}, "not a folder of this machine"),
        ("images", "tfds:records", {}, "not a folder of this machine"),
        ("nowhere", "records", {}, "nowhere does not exist"),
        ("images", "records", {"shard_size": 0}, "must be 1 or more"),
        ("images", "records", {"workers": 0}, "must be 1 or more"),
    ],
)
def test_refused_before_anything_is_made(
    source, destination, options, words, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "images")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=words):
        convert(source, destination, **options)
    assert sorted(tmp_path.rglob("*")) == before


def test_one_conversion_at_a_time(tmp_path):
    source, refusals = write_folder(tmp_path / "images"), []

    def progress(done, total):
        with pytest.raises(UserError, match="another conversion is writing"):
            convert(source, tmp_path / "records")
        refusals.append(done)

    convert(source, tmp_path / "records", workers=1, progress=progress)
    assert refusals == list(range(1, 11))
    convert(source, tmp_path / "records")


def test_left_over_parts_of_a_conversion_that_never_completed_a_shard_go(tmp_path):
    source, place = write_folder(tmp_path / "images"), tmp_path / "records"
    place.mkdir()
    (place / "images-00000-of-00099.arrayrecord.tmp").write_bytes(b"cut")
    (place / ".hidden").write_bytes(b"mine")
    convert(source, place)
    assert sorted(path.name for path in place.iterdir()) == [
        ".hidden",
        "images-00000-of-00001.arrayrecord",
        "index.json",
        "manifest.json",
    ]


def test_workers_read_at_the_same_time(tmp_path, monkeypatch):
    source, meeting = write_folder(tmp_path / "images"), threading.Barrier(2)
    inner = files.FolderReader.__call__

    def read(self, index):
        meeting.wait(timeout=20)
        return inner(self, index)

    monkeypatch.setattr(files.FolderReader, "__call__", read)
    assert convert(source, tmp_path / "records", shard_size=5, workers=2)["unreadable"] == 0


def test_few_files_are_open_however_many_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_OPEN", 3)
    convert(write_folder(tmp_path / "images"), tmp_path / "records", shard_size=1)
    found = records.open_records(tmp_path / "records")
    for k in [*range(10), *range(10)]:
        assert found.read(k) == IMAGES[found.names[k]]
        assert len(found.read._readers) <= 3


def test_the_cap_of_the_cache_is_not_for_conversion(tmp_path, monkeypatch):
    source, limits = write_tar(tmp_path / "images.tar.gz", mode="w:gz"), []
    inner = files.archives.open_archive
    monkeypatch.setattr(
        files.archives,
        "open_archive",
        lambda *a, limit, **b: limits.append(limit) or inner(*a, limit=limit, **b),
    )
    convert(source, tmp_path / "records")
    assert limits[0] >= 1e12


def test_memory_holds_a_few_images(tmp_path):
    megabyte = os.urandom(10**6)
    source = write_folder(tmp_path / "images", {f"{k:02d}.jpg": megabyte for k in range(40)})
    tracemalloc.start()
    convert(source, tmp_path / "records", shard_size=10, workers=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6
    shutil.rmtree(source)
