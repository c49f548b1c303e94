"""What a place of images holds: counts, sizes, what is broken, and the contact sheet."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dlc_jax.data import sources
from dlc_jax.data.convert import convert
from dlc_jax.data.survey import GAP, TILE, spread, survey
from dlc_jax.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def encoded(color, *, size=(20, 10), mode="RGB", form="PNG"):
    file = io.BytesIO()
    Image.new("RGB", size, color).convert(mode).save(file, form)
    return file.getvalue()


def huge():
    """A PNG file that says 12000 x 12000."""
    chunks = [
        b"IHDR" + struct.pack(">IIBBBBB", 12000, 12000, 8, 2, 0, 0, 0),
        b"IDAT" + zlib.compress(bytes(100)),
    ]
    packed = [
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


GOOD = {
    "train/cat/1.png": encoded((200, 0, 0)),
    "train/cat/2.jpg": encoded((0, 200, 0), size=(40, 40), mode="CMYK", form="JPEG"),
    "train/dog/1.png": encoded((0, 0, 200), size=(10, 30), mode="L"),
    "validation/dog/1.png": encoded((9, 9, 9)),
}
BROKEN = {
    "train/cat/cut.png": encoded((1, 2, 3), size=(100, 100))[:60],
    "train/cat/empty.png": b"",
    "train/cat/huge.png": huge(),
    "train/cat/long.png": encoded((1, 2, 3), size=(1, 10000)),
    "train/cat/text.jpg": b"this is no image",
}
REASONS = {
    "empty": "no bytes",
    "huge": "12000 x 12000",
    "long": "1 x 10000",
    "text": "not an image of a known format",
    "cut": "",
}


def write(path, images):
    for name, data in images.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return path


def test_counts_sizes_and_what_is_broken(tmp_path):
    place = write(tmp_path / "images", {**GOOD, **BROKEN, "notes.txt": b"x"})
    found, _ = survey(place, workers=3)
    assert (found.kind, found.count, found.looked) == ("folder", 9, 9)
    assert found.bytes == sum(len(data) for data in (GOOD | BROKEN).values())
    assert found.splits == {"train": 8, "validation": 1} and found.classes == {"cat": 7, "dog": 2}
    assert found.formats == {"PNG": 6, "JPEG": 1} and found.modes == {"RGB": 5, "CMYK": 1, "L": 1}
    sizes = [(100, 100), (12000, 12000), (1, 10000), (20, 10), (40, 40), (10, 30), (20, 10)]
    assert sorted(zip(found.widths.tolist(), found.heights.tolist())) == sorted(sizes)
    assert [name for name, _ in found.broken] == sorted(BROKEN)
    for name, reason in found.broken:
        assert (
            REASONS[name.split("/")[-1].split(".")[0]] in reason and reason and "\n" not in reason
        ), (name, reason)
    assert found.skipped == {"not an image by its name": 1} and found.damage is None


def test_broken_is_what_training_replaces(tmp_path):
    place = write(tmp_path / "images", {**GOOD, **BROKEN})
    source = sources.source("images", "train", path=str(place), image=8)
    for k in range(len(source)):
        source[k]
    replaced = {source.source.names[k] for k in source.bad}
    assert replaced == {name for name, _ in survey(place)[0].broken}


def test_contact_sheet_spreads_over_the_names_and_leaves_out_what_is_broken(tmp_path):
    shades = np.linspace(0, 250, 100).astype(int).tolist()
    images = {
        f"{k:03d}.png": encoded((shade, shade, shade), size=(30, 20))
        for k, shade in enumerate(shades)
    }
    place = write(tmp_path / "images", images)
    sheet = survey(place)[1]
    assert sheet.size == (GAP + 8 * (TILE + GAP),) * 2
    centers = [GAP + TILE // 2 + k * (TILE + GAP) for k in range(8)]
    seen = [sheet.getpixel((x, y))[0] for y in centers for x in centers]
    assert seen == [shades[k * 100 // 64] for k in range(64)]
    (place / "000.png").write_bytes(b"")
    found, sheet = survey(place)
    assert [name for name, _ in found.broken] == ["000.png"]
    assert sheet.getpixel((centers[0],) * 2)[0] == shades[1]
    assert sheet.getpixel((centers[7],) * 2) == (238, 238, 238)  # paper, 63 images


def test_few_images_make_a_small_sheet(tmp_path):
    sheet = survey(write(tmp_path / "images", GOOD))[1]
    assert sheet.size == (GAP + 4 * (TILE + GAP), GAP + TILE + GAP)
    assert survey(write(tmp_path / "broken", BROKEN))[1].getextrema() == ((238, 238),) * 3


def test_a_sample_looks_at_some(tmp_path):
    place = write(
        tmp_path / "images",
        {f"{k:02d}.png": encoded((k, k, k)) for k in range(50)} | {"25.png": b"", "26.png": b""},
    )
    found, sheet = survey(place, sample=10)
    assert (found.count, found.looked, len(found.widths)) == (50, 10, 9)
    assert [name for name, _ in found.broken] == ["25.png"]
    assert sheet.size[0] == GAP + 8 * (TILE + GAP)


@pytest.mark.parametrize(("length", "count"), [(10, 3), (3, 10), (64, 64), (1000, 64), (5, 1)])
def test_spread(length, count):
    chosen = spread(list(range(length)), count)
    gaps = np.diff([*chosen, length])
    assert len(chosen) == min(length, count) and chosen[0] == 0 and gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


def test_records_also_by_their_checksums(tmp_path):
    convert(write(tmp_path / "images", GOOD), tmp_path / "records", shard_size=2)
    told = []
    found, _ = survey(tmp_path / "records", progress=lambda *now: told.append(now))
    assert (found.kind, found.count, found.damage, found.broken) == ("records", 4, None, [])
    assert told[-1] == (8, 8) and told == sorted(told)  # every image is read twice
    shard = tmp_path / "records" / "images-00001-of-00002.arrayrecord"
    data = bytearray(shard.read_bytes())
    data[-40] ^= 1  # in what pads the file: every image can still be read
    shard.write_bytes(data)
    found, _ = survey(tmp_path / "records")
    assert found.broken == [] and "images-00001-of-00002.arrayrecord has changed" in found.damage
    data[data.index(GOOD["validation/dog/1.png"])] ^= 1
    shard.write_bytes(data)
    found, _ = survey(tmp_path / "records")
    assert found.broken and all("images-00001-of-00002" in reason for _, reason in found.broken)


def test_no_images(tmp_path):
    with pytest.raises(UserError, match="no images in"):
        survey(write(tmp_path / "texts", {"a.txt": b"x"}))
