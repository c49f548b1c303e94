"""Archives are read in place, also those that mean harm; the compressed ones are converted once."""

import concurrent.futures
import io
import json
import os
import pickle
import stat
import struct
import tarfile
import zipfile

import pytest

from dlc_jax.data import files, record_writer
from dlc_jax.errors import UserError

IMAGES = {
    f"{folder}/{k:02d}.png": f"{folder} {k} ".encode() * (50 + k)
    for folder in ("cat", "dog")
    for k in range(8)
}


def add(tar, name, data=b"", **about):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in about.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def write_tar(path, images=None, mode="w", **options):
    with tarfile.open(path, mode, **options) as tar:
        for name, data in (IMAGES if images is None else images).items():
            add(tar, name, data)
    return path


def write_zip(path, images=None):
    with zipfile.ZipFile(path, "w") as archive:
        for k, (name, data) in enumerate((IMAGES if images is None else images).items()):
            archive.writestr(name, data, zipfile.ZIP_DEFLATED if k % 2 else zipfile.ZIP_STORED)
    return path


def read(path, cache, **options):
    found = files.open_files(path, cache=cache, **options)
    return dict(zip(found.names, map(found.read, range(len(found)))))


@pytest.mark.parametrize(
    "name", ["a.tar", "a.zip", "a.tar.gz", "a.tgz", "a.tar.xz", "a.TXZ", "a.tar.bz2"]
)
def test_members_are_the_images(name, tmp_path):
    ending = name.lower().split(".")[-1]
    mode = {
        "tar": "w",
        "gz": "w:gz",
        "tgz": "w:gz",
        "xz": "w:xz",
        "txz": "w:xz",
        "bz2": "w:bz2",
    }.get(ending)
    path = write_tar(tmp_path / name, mode=mode) if mode else write_zip(tmp_path / name)
    assert read(path, tmp_path / "cache") == IMAGES
    found = files.open_files(path, cache=tmp_path / "cache")
    assert found.classes == ["cat", "dog"] and found.names == sorted(IMAGES)
    write = [path.name for path in tmp_path.iterdir()]
    assert sorted(write) == sorted([name, "cache"])  # nothing beside it
    copy = pickle.loads(pickle.dumps(found))
    assert copy.read(3) == found.read(3)


def test_hostile_tar(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "x/good.png", b"good")
        add(tar, "x/twice.png", b"first")
        add(tar, "../up.png", b"up")
        add(tar, "x/../../up.png", b"up")
        add(tar, "/tmp/absolute.png", b"absolute")
        add(tar, "x/soft.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "x/hard.png", type=tarfile.LNKTYPE, linkname="x/good.png")
        add(tar, "x/pipe.png", type=tarfile.FIFOTYPE)
        add(tar, "x/device.png", type=tarfile.CHRTYPE)
        add(tar, "x/folder.png", type=tarfile.DIRTYPE)
        add(tar, "x/._good.png", b"hidden")
        add(tar, "x/readme.txt", b"text")
        add(tar, "./x//twice.png", b"second")
        add(tar, "../evil.tar", b"\0" * 10240)
    found = files.scan(tmp_path / "a.tar", cache=tmp_path / "cache")
    assert read(tmp_path / "a.tar", tmp_path / "cache") == {
        "good.png": b"good",
        "twice.png": b"second",
    }
    assert found.skipped == {
        'name with ".."': 3,
        "absolute name": 1,
        "link": 2,
        "special member": 2,
        "hidden": 1,
        "not an image by its name": 1,
        "same name as a later one": 1,
    }
    assert {path.name for path in tmp_path.rglob("*")} - {"a.tar", "cache"} == {
        p.name for p in (tmp_path / "cache").iterdir()
    }


def test_hostile_zip(tmp_path):
    link = zipfile.ZipInfo("x/soft.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with (
        zipfile.ZipFile(tmp_path / "a.zip", "w") as archive,
        pytest.warns(UserWarning, match="Duplicate"),
    ):
        archive.writestr("x/good.png", b"good")
        archive.writestr("x/twice.png", b"first")
        archive.writestr("x/twice.png", b"second")
        archive.writestr("../up.png", b"up")
        archive.writestr("..\\up.png", b"up")
        archive.writestr("/absolute.png", b"absolute")
        archive.writestr("C:\\absolute.png", b"absolute")
        archive.writestr(link, "/etc/passwd")
        archive.writestr("x/method.png", b"text" * 50, zipfile.ZIP_BZIP2)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    found = files.scan(tmp_path / "a.zip", cache=tmp_path / "cache")
    assert read(tmp_path / "a.zip", tmp_path / "cache") == {
        "good.png": b"good",
        "twice.png": b"second",
    }
    assert found.skipped == {
        'name with ".."': 2,
        "absolute name": 2,
        "link": 1,
        "unknown zip method": 1,
        "same name as a later one": 1,
    }
    data[data.index(b"PK\1\2") + 8] |= 1  # says that the first member is encrypted
    (tmp_path / "b.zip").write_bytes(data)
    assert files.scan(tmp_path / "b.zip", cache=tmp_path / "cache").skipped["encrypted"] == 1


def test_a_zip_member_that_is_not_what_the_directory_says(tmp_path):
    path = write_zip(
        tmp_path / "a.zip", {"bomb.png": b"0", "b.png": b"\0" * 10**6, "c.png": b"sound"}
    )
    data = bytearray(path.read_bytes())
    place = data.index(b"PK\1\2", data.index(b"PK\1\2") + 4)  # of b.png
    struct.pack_into("<I", data, place + 24, 10)  # its size, which is 10**6
    data[data.index(b"sound")] ^= 1
    path.write_bytes(data)
    found = files.open_files(path, cache=tmp_path / "cache")
    for name in ("b.png", "c.png"):
        with pytest.raises(ValueError, match="damaged zip member"):
            found.read(found.names.index(name))
    assert found.read(found.names.index("bomb.png")) == b"0"


def test_a_member_too_large_for_an_image(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_BYTES", 320)
    sound = {name: data for name, data in IMAGES.items() if len(data) <= 320}
    assert 0 < len(sound) < len(IMAGES)
    for path in (write_tar(tmp_path / "a.tar"), write_zip(tmp_path / "a.zip")):
        assert read(path, tmp_path / "cache") == sound
        left = len(IMAGES) - len(sound)
        assert files.scan(path, cache=tmp_path / "cache").skipped == {"more than 320 bytes": left}


def test_tars_in_a_tar_and_in_a_folder_are_classes(tmp_path):
    (tmp_path / "folder").mkdir()
    with tarfile.open(tmp_path / "outer.tar", "w") as outer:
        for name in ("cat", "dog"):
            inside = {
                member.split("/")[1]: data
                for member, data in IMAGES.items()
                if member.startswith(name)
            }
            data = write_tar(tmp_path / "folder" / f"{name}.tar", inside).read_bytes()
            add(outer, f"{name}.tar", data)
    assert read(tmp_path / "outer.tar", tmp_path / "cache") == IMAGES
    assert read(tmp_path / "folder", tmp_path / "cache") == IMAGES
    assert files.open_files(tmp_path / "folder", cache=tmp_path / "cache").classes == ["cat", "dog"]
    write_tar(tmp_path / "folder" / "bird.tar.gz", {"1.png": b"1"}, "w:gz")
    with pytest.raises(
        UserError, match=r"compressed archives: give the path of one, such as .*bird\.tar\.gz"
    ):
        files.scan(tmp_path / "folder", cache=tmp_path / "cache")


@pytest.mark.parametrize("name", ["a.tar", "a.tar.xz", "a.tar.gz", "a.zip"])
def test_archives_that_are_cut_off(name, tmp_path):
    path = tmp_path / name
    images = {name: os.urandom(5000) for name in IMAGES}
    whole = (
        write_zip(path, images) if name == "a.zip" else write_tar(path, images, "w:" + name[6:])
    ).read_bytes()
    for length in (0, 100, len(whole) // 3, len(whole) // 2 + 7, len(whole) - 11000):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="cannot read .*; is it complete") as caught:
            files.scan(path, cache=tmp_path / "cache")
        assert "\n" not in str(caught.value)


def test_a_damaged_header_is_not_the_end(tmp_path):
    path = write_tar(tmp_path / "a.tar")
    data = bytearray(path.read_bytes())
    data[data.index(b"dog/03.png") + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged at byte"):
        files.scan(path, cache=tmp_path / "cache")
    path.write_bytes(b"this is text" * 100)
    with pytest.raises(UserError, match="cannot read"):
        files.scan(path, cache=tmp_path / "cache")
    (tmp_path / "b.zip").write_bytes(b"this is text" * 100)
    with pytest.raises(UserError, match="cannot read"):
        files.scan(tmp_path / "b.zip", cache=tmp_path / "cache")


@pytest.mark.parametrize("name", ["a.tar", "a.zip"])
def test_the_index_is_kept_until_the_archive_changes(name, tmp_path, monkeypatch):
    write = write_zip if name == "a.zip" else write_tar
    path, cache = write(tmp_path / name), tmp_path / "cache"
    opened = []
    for module, function in [(tarfile, "open"), (zipfile, "ZipFile")]:
        real = getattr(module, function)
        monkeypatch.setattr(
            module, function, lambda *a, real=real, **k: opened.append(1) or real(*a, **k)
        )
    for _ in range(2):
        assert read(path, cache) == IMAGES
    assert len(opened) == 1
    (index,) = cache.iterdir()
    index.write_text(index.read_text()[:100])  # cut off
    assert read(path, cache) == IMAGES and len(opened) == 2
    changed = {name: bytes(reversed(data)) for name, data in IMAGES.items()}
    write(path, changed)  # of the same size
    os.utime(path, ns=(1, 1))
    opened.clear()
    assert read(path, cache) == changed and len(opened) == 1
    write(path, {**IMAGES, "new.png": b"new"})
    assert len(read(path, cache)) == len(IMAGES) + 1


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path):
    path = write_tar(tmp_path / "a.tar")
    (tmp_path / "file").write_text("")
    assert read(path, tmp_path / "file" / "cache") == IMAGES
    compressed = write_tar(tmp_path / "a.tar.xz", mode="w:xz")
    with pytest.raises(UserError, match="cannot write the cache"):
        files.open_files(compressed, cache=tmp_path / "file" / "cache")


@pytest.mark.parametrize("name", ["a.tar", "a.zip", "a.tar.xz"])
def test_many_threads_read_at_once(name, tmp_path):
    images = {f"{k:03d}.png": os.urandom(3000 + k) for k in range(100)}
    path = tmp_path / name
    write_zip(path, images) if name == "a.zip" else write_tar(path, images, "w:" + name[6:])
    found = files.open_files(path, cache=tmp_path / "cache")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        rows = [k * 37 % 100 for k in range(1000)]
        assert list(pool.map(found.read, rows)) == [images[found.names[row]] for row in rows]


def test_a_compressed_archive_is_converted_once_and_said(tmp_path, capsys):
    path = write_tar(tmp_path / "a.tar.xz", mode="w:xz")
    assert read(path, tmp_path / "cache") == IMAGES
    said = capsys.readouterr().out
    assert "converting" in said and "16 images, 0.0 MB" in said and said.count("\n") == 1
    assert read(path, tmp_path / "cache") == IMAGES and capsys.readouterr().out == ""


def test_a_conversion_is_of_one_archive(tmp_path):
    path, sizes = tmp_path / "a.tar.gz", set()
    for second in (1, 2):
        images = {"a.bmp": os.urandom(5000), "b.bmp": os.urandom(5000)}  # same names, same sizes
        write_tar(path, images, "w:gz", compresslevel=0)
        os.utime(path, ns=(second, second))
        sizes.add(path.stat().st_size)
        assert read(path, tmp_path / "cache") == images
    assert len(sizes) == 1


def test_a_conversion_goes_on_after_a_kill(tmp_path, monkeypatch):
    path, cache = write_tar(tmp_path / "a.tar.xz", mode="w:xz"), tmp_path / "cache"
    write = record_writer.write

    class Killed(BaseException):
        pass

    def kill(done, total):
        if done == 11:
            raise Killed

    monkeypatch.setattr(
        record_writer, "write", lambda *a, progress: write(*a, shard_size=4, progress=kill)
    )
    with pytest.raises(Killed):
        files.open_files(path, cache=cache)
    assert not list(cache.glob("*/manifest.json"))
    before = {shard: shard.stat().st_mtime_ns for shard in cache.glob("*/*.arrayrecord")}
    assert len(before) == 2
    monkeypatch.setattr(
        record_writer, "write", lambda *a, progress: write(*a, shard_size=4, progress=progress)
    )
    assert read(path, cache) == IMAGES
    after = {shard: shard.stat().st_mtime_ns for shard in cache.glob("*/*.arrayrecord")}
    assert len(after) == 4 and before.items() <= after.items()
    damaged = min(after)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert read(path, cache) == IMAGES  # mended


def test_a_conversion_is_capped(tmp_path):
    path = write_tar(tmp_path / "a.tar.xz", mode="w:xz")
    with pytest.raises(UserError, match="decompresses to more than 1e-05 GB; raise cache_gb"):
        files.open_files(path, cache=tmp_path / "cache", cache_gb=1e-5)
    bomb = write_tar(tmp_path / "bomb.tar.xz", {"a.png": bytes(3 * 10**6)}, "w:xz")
    assert bomb.stat().st_size < 10**4
    with pytest.raises(UserError, match="decompresses to more than 0.001 GB"):
        files.open_files(bomb, cache=tmp_path / "cache", cache_gb=1e-3)
    assert not list((tmp_path / "cache").glob("*/*"))


def test_an_index_in_the_cache_of_another_kind_is_not_taken(tmp_path):
    path, cache = write_tar(tmp_path / "a.tar"), tmp_path / "cache"
    files.scan(path, cache=cache)
    (index,) = cache.iterdir()
    index.write_text(json.dumps(json.loads(index.read_text()) | {"format": 0, "names": ["x"]}))
    assert read(path, cache) == IMAGES
