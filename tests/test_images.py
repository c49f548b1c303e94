"""One source for every kind of place: the same images, in the same order, in the same batches."""

import gzip
import io
import json
import pathlib
import struct
import sys
import tarfile
import zipfile

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from dlc_jax.data import code_writer, codes, files, record_writer, sources
from dlc_jax.data.loader import Resilient, batches
from dlc_jax.data.transforms import MultiCrop
from dlc_jax.errors import UserError

CLASSES = ("ant", "bee", "cat")


def encode(pixels, format="PNG", mode=None):
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(file, format)
    return file.getvalue()


def picture(number):
    """The bytes of an image: JPEG, gray or PNG, of any size."""
    rng = np.random.default_rng(number)
    height, width = rng.integers(20, 60, 2)
    pixels = np.kron(rng.integers(0, 256, (5, 5, 3)), np.ones((12, 12, 1))).astype(np.uint8)[
        :height, :width
    ]
    return encode(pixels, ["JPEG", "PNG"][number % 2], ["RGB", "L"][number % 5 == 0])


def content():
    """{relative name: bytes} of 24 images in three classes and two splits; one is damaged."""
    found = {}
    for k in range(24):
        split = "val" if k % 4 == 3 else "train"
        found[f"{split}/{CLASSES[k % 3]}/{k:02d}.{'jpg' if k % 2 == 0 else 'png'}"] = picture(k)
    name = sorted(found)[5]
    return found | {name: found[name][:50]}


def write_folder(place, images):
    for name, data in images.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    return place


def write_tar(path, images, mode):
    with tarfile.open(path, mode) as tar:
        for name in reversed(sorted(images)):  # not the order in which they are read
            info = tarfile.TarInfo(f"./top/{name}")
            info.size = len(images[name])
            tar.addfile(info, io.BytesIO(images[name]))
    return path


def write_zip(path, images):
    with zipfile.ZipFile(path, "w") as archive:
        for k, name in enumerate(reversed(sorted(images))):
            archive.writestr(
                f"top/{name}", images[name], zipfile.ZIP_DEFLATED if k % 2 else zipfile.ZIP_STORED
            )
    return path


def write_parquet(place, images, *, paths):
    place.mkdir()
    for split in ("train", "val"):
        names = [name for name in sorted(images) if name.startswith(split)]
        struct_type = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        column = [
            {"bytes": images[name], "path": name.split("/", 1)[1] if paths else None}
            for name in names
        ]
        labels = [CLASSES.index(name.split("/")[1]) for name in names]
        table = pyarrow.table(
            {
                "image": pyarrow.array(column, struct_type),
                "label": pyarrow.array(labels, pyarrow.int64()),
            }
        )
        label = {"names": CLASSES, "_type": "ClassLabel"}
        meta = json.dumps({"info": {"features": {"label": label}}}).encode()
        table = table.replace_schema_metadata({b"huggingface": meta})
        for part, start in enumerate(range(0, len(names), 7)):
            name = f"{split}-{part:05d}-of-00003.parquet"
            parquet.write_table(table.slice(start, 7), place / name, row_group_size=3)
    return place


def write_tfds(place, images):
    import tensorflow_datasets as tfds

    class Copied(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=CLASSES),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {
                "train": self._generate_examples("train"),
                "validation": self._generate_examples("val"),
            }

        def _generate_examples(self, split):
            for k, name in enumerate(name for name in sorted(images) if name.startswith(split)):
                yield k, {"image": io.BytesIO(images[name]), "label": name.split("/")[1]}

    builder = Copied(data_dir=place, file_format="array_record")
    builder.download_and_prepare()
    return pathlib.Path(builder.data_dir)


KINDS = {
    "folder": lambda place, images: write_folder(place / "folder", images),
    "tar": lambda place, images: write_tar(place / "a.tar", images, "w"),
    "zip": lambda place, images: write_zip(place / "a.zip", images),
    "tar.xz": lambda place, images: write_tar(place / "a.tar.xz", images, "w:xz"),
    "tar.gz": lambda place, images: write_tar(place / "a.tgz", images, "w:gz"),
    "parquet": lambda place, images: write_parquet(place / "parquet", images, paths=True),
    "parquet without names": lambda place, images: write_parquet(
        place / "parquet", images, paths=False
    ),
    "tfds": write_tfds,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("images") / "folder", content())


def convert(folder, place):
    record_writer.write(place, files.open_files(folder), shard_size=5)
    return place


def draw(path, cache, transform, *, split="train", image=None, fields=("image", "label", "index")):
    source = sources.source("images", split, path=path, image=image, cache=str(cache))
    assert isinstance(source, Resilient)
    iterator = batches(
        source,
        batch=6,
        seed=1,
        transform=transform,
        threads=2,
        fields=fields,
    )
    found = [next(iterator) for _ in range(6)]  # two epochs
    iterator.close()
    return found


@pytest.mark.parametrize("kind", [*KINDS, "records", "records of a tar"])
def test_every_kind_gives_the_same_batches(kind, folder, tmp_path):
    if kind.startswith("records"):
        place = convert(
            folder if kind == "records" else KINDS["tar"](tmp_path, content()), tmp_path / "records"
        )
    else:
        place = KINDS[kind](tmp_path, content())
    crops = MultiCrop(global_size=16, local_crops=2, local_size=8)
    for options in [
        dict(transform=None, image=24),
        dict(transform=None, image=24, split="validation"),
        dict(transform=crops, fields=("global", "local", "label")),
        dict(transform=crops, fields=("global", "local", "label"), image="encoded"),
    ]:
        want, found = (
            draw(folder, tmp_path / "cache", **options),
            draw(place, tmp_path / "cache", **options),
        )
        for a, b in zip(found, want, strict=True):
            assert a.keys() == b.keys()
            for name in a:
                np.testing.assert_array_equal(a[name], b[name])
    same = [
        sources.identity("images", "train", path=p, image=24, cache=str(tmp_path / "cache"))
        for p in (folder, place)
    ]
    # These keep no file sizes.
    assert (same[0] == same[1]) == (kind not in ("parquet", "parquet without names", "tfds"))
    assert "tensorflow" not in sys.modules


def test_records_of_the_source(folder):
    source = sources.source("images", "train", path=str(folder), image=16)
    names = sorted(name for name in content() if name.startswith("train"))
    assert source.source.names == names and len(source) == 18
    record = source[2]
    assert record["image"].shape == (16, 16, 3) and record["image"].dtype == np.uint8
    assert (record["index"], record["label"], record["factors"].tolist()) == (2, 0, [0])
    np.testing.assert_array_equal(
        record["image"], sources.decode_image(content()[names[2]], image=16)
    )
    assert sources.factors("images", path=folder, image=16) == {"label": list(CLASSES)}
    native = sources.source("images", "train", path=folder, image=None)
    assert len({native[index]["image"].shape for index in range(4)}) > 1
    assert sources.source("images", "train", path=folder, image=16, crop="stretch")[2][
        "image"
    ].shape == (16, 16, 3)
    with pytest.raises(UserError, match="unknown crop 'centre'; use one of center, stretch"):
        sources.source("images", "train", path=folder, image=16, crop="centre")


def test_without_classes(tmp_path):
    write_folder(tmp_path, {f"{k}.png": picture(2 * k + 1) for k in range(6)})
    options = dict(path=tmp_path, image=16, validation=0.5)
    assert set(sources.source("images", "train", **options)[0]) == {"image", "index"}
    assert sources.factors("images", **options) == {}
    write_folder(tmp_path / "one", {f"only/{k}.png": picture(2 * k + 1) for k in range(6)})
    # One class says nothing.
    assert sources.factors("images", path=tmp_path / "one", image=16) == {}


BROKEN = {
    "train/zero.jpg": b"",
    "train/text.jpg": b"hello, this is no picture",
    "train/cut.png": picture(1)[:-60],
    "train/dot.png": encode(np.zeros((1, 1), np.uint8)),
    "train/line.png": encode(np.zeros((10000, 1), np.uint8)),
}


def test_broken_images_are_replaced_and_counted(tmp_path, capsys):
    file = io.BytesIO()
    Image.new("1", (12000, 12000)).save(file, "PNG")
    broken = BROKEN | {"train/huge.png": file.getvalue()}
    good = {f"train/good{k}.png": picture(2 * k + 1) for k in range(10)} | {"val/1.png": picture(1)}
    write_folder(tmp_path, good | broken)
    options = dict(path=tmp_path, image=16)
    source = sources.source("images", "train", **options, limit=6)
    images = [source[index] for index in range(len(source))]
    assert {source.source.names[index] for index in source.bad} == set(broken)
    again = sources.source("images", "train", **options, limit=6)
    for index in reversed(range(len(again))):
        np.testing.assert_array_equal(again[index]["image"], images[index]["image"])
        assert (
            f"train/good{index}" not in again.source.names[index] or images[index]["index"] == index
        )
    assert "replaced by others: 4, last" in capsys.readouterr().err
    few = sources.source("images", "train", **options, limit=5)
    with pytest.raises(UserError) as caught:
        [few[index] for index in range(len(few))]
    message = str(caught.value)
    assert "6 of 16 records cannot be read (limit 5)" in message and "\n" not in message
    assert all(name in message for name in broken) and "12000 x 12000" in message
    assert "1 x 10000" in message


def test_the_codes_of_damaged_data_belong_to_the_replacements(folder, tmp_path):
    """What the codes job and the generator do."""
    source = sources.source("images", "train", path=folder, image=8)
    identity = sources.identity("images", "train", path=folder, image=8)

    def encode_rows(start, stop):
        return {
            "codes": np.stack(
                [source[index]["image"].reshape(-1)[:3] for index in range(start, stop)]
            )
        }

    code_writer.write(
        tmp_path,
        encode_rows,
        total=len(source),
        positions=3,
        values=256,
        identity="e",
        source=identity,
    )
    fresh = sources.source("images", "train", path=folder, image=8)
    both = codes.WithCodes(fresh, codes.CodeStore(tmp_path), identity=identity)
    for index in range(len(both)):
        np.testing.assert_array_equal(both[index]["codes"], both[index]["image"].reshape(-1)[:3])
    assert len(fresh.bad) == 1


def test_identity_is_of_what_is_there_not_of_where(tmp_path):
    images = {f"train/{k}.png": picture(2 * k + 1) for k in range(5)} | {"val/1.png": picture(1)}

    def identity(name, images, **options):
        write_folder(tmp_path / name, images)
        return sources.identity(
            "images", "train", **(dict(path=tmp_path / name, image=16, limit=3) | options)
        )

    first = identity("a", images)
    assert first == identity("b", images, cache="c", limit=9, cache_gb=1.0)
    assert first["count"] == 5 and str(tmp_path) not in str(first)
    others = [
        identity("more", images | {"train/9.png": picture(1)}),
        identity("renamed", {name.replace("3", "7"): data for name, data in images.items()}),
        identity("other", images | {"train/3.png": picture(1)}),
        identity("a", images, image=8),
        identity("a", images, crop="stretch"),
    ]
    assert all(other != first for other in others)
    with pytest.raises(UserError, match="no option colour"):
        sources.identity("images", "train", path="x", image=1, colour=2)


def test_choose_rows_of_all_classes():
    class Sorted:
        def __len__(self):
            return 10

    assert sources.choose(Sorted(), 4).tolist() == [0, 2, 5, 7]
    assert sources.choose(Sorted(), 20).tolist() == list(range(10))
    assert sources.choose(sources.source("shapes", "train", count=10), 4).tolist() == [0, 1, 2, 3]


def test_idx_pair_and_its_conversion(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 9, 7), dtype=np.uint8)
    for name, part in [("train", pixels[:20]), ("t10k", pixels[20:])]:
        with gzip.open(tmp_path / f"{name}-images-idx3-ubyte.gz", "wb") as file:
            file.write(struct.pack(">IIII", 0x803, len(part), 9, 7) + part.tobytes())
        with gzip.open(tmp_path / f"{name}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(
                struct.pack(">II", 0x801, len(part)) + bytes(k % 10 for k in range(len(part)))
            )
    source = sources.source("images", "train", path=tmp_path, image=None)
    assert len(source) == 20 and source[7]["label"] == 7
    np.testing.assert_array_equal(source[7]["image"], np.repeat(pixels[7][..., None], 3, -1))
    copy = convert(tmp_path, tmp_path / "copy")
    for split in ("train", "validation"):
        want, found = (draw(p, tmp_path / "cache", None, split=split) for p in (tmp_path, copy))
        for a, b in zip(found, want, strict=True):
            np.testing.assert_array_equal(a["image"], b["image"])
            np.testing.assert_array_equal(a["label"], b["label"])
    assert sources.identity("images", "train", path=copy, image=None) == sources.identity(
        "images", "train", path=tmp_path, image=None
    )


def test_real_sets(shared_data, tmp_path):
    fashion = dict(path=shared_data / "fashion_mnist", image=28)
    source = sources.source("images", "train", **fashion)
    assert len(source) == 60000 and len(sources.source("images", "validation", **fashion)) == 10000
    assert source[0]["label"] == 9 and len(sources.factors("images", **fashion)["label"]) == 10
    pixels = np.stack([source[int(index)]["image"] for index in sources.choose(source, 3000)])
    assert abs(pixels.mean() / 255 - 0.286) < 0.01  # the published mean


def test_real_archive(shared_data, tmp_path, capsys):
    path = shared_data / "cifar10_jpeg" / "cifar10_train50k_test5k.tar.xz"
    options = dict(path=path, image=32, cache=str(tmp_path))
    source = sources.source("images", "train", **options)
    assert (len(source), len(source.source.classes)) == (
        50000,
        10,
    )
    assert "55000 images, 50.6 MB" in capsys.readouterr().out
    assert len(sources.source("images", "validation", **options)) == 5000
    assert capsys.readouterr().out == ""
    labels = [source[int(index)]["label"] for index in sources.choose(source, 100)]
    assert labels == sorted(labels) and len(set(labels)) == 10
