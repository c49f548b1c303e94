"""dlc data, as a person runs it: what it prints, and that nothing is lost when it is stopped."""

import io
import os
import pathlib
import resource
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from dlc_jax.data import records

ROOT = pathlib.Path(__file__).resolve().parents[1]


def encoded(number, size=(16, 12)):
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


IMAGES = {
    f"{name}/{k}.png": encoded(10 * i + k)
    for i, name in enumerate(("cat", "dog"))
    for k in range(6)
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def place(tmp_path):
    for name, data in IMAGES.items():
        file = tmp_path / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return tmp_path / "images"


def dlc(*arguments, code=0, before="", limit=None, cwd=ROOT):
    """Runs dlc data and checks its exit code.

    Args:
      before: Python that runs first, in the same process.
      limit: of bytes per file.
    """
    script = f"import sys\n{before}\nfrom dlc_jax.cli import main\nsys.exit(main())"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        [sys.executable, "-c", script, "data", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=limited if limit else None,
    )
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def refused(*arguments, **options):
    """One line, exit code 2, nothing on stdout."""
    done = dlc(*arguments, code=2, **options)
    assert done.stdout == "" and done.stderr.count("\n") == 1, done
    return done.stderr


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["info", "convert", "dlc data convert photographs.zip records/"]),
        (
            ["info", "--help"],
            ["dlc data info photographs/ --out contact.png", "--sample", ".tar.xz"],
        ),
        (
            ["convert", "--help"],
            ["dlc data convert photographs.zip records/ --workers 8", "--shard-size", "--verify"],
        ),
    ],
)
def test_help_has_an_example(arguments, words):
    out = " ".join(dlc(*arguments).stdout.split())
    assert all(word in out for word in words), out


def test_info(place, tmp_path):
    (place / "cat" / "0.png").write_bytes(b"")
    (place / "dog" / "\x1b[31mred\udcff.png").write_bytes(encoded(1)[:80])
    out = tmp_path / "sheet.png"
    text = dlc("info", place, "--out", out).stdout
    lines = [line.strip() for line in text.splitlines()]
    assert lines[0].startswith(f"{place}: folder, 13 images, ")
    assert "cat 6, dog 7" in lines and "2 classes of 6 to 7 images each" in lines
    assert "formats: PNG 12; modes: RGB 12" in lines
    assert "width: 16 smallest, 16 median, 16 largest" in lines
    assert "height: 12 smallest, 12 median, 12 largest" in lines
    assert "width / height: 1.33 smallest, 1.33 median, 1.33 largest" in lines
    assert lines[lines.index("broken: 2") + 1 :][:1] == ["cat/0.png: no bytes"]
    assert lines[lines.index("broken: 2") + 2].startswith(r"dog/\x1b[31mred\udcff.png: ")
    assert "\x1b" not in text
    assert lines[-1] == f"wrote {out}, a contact sheet"
    with Image.open(out) as sheet:
        assert np.asarray(sheet).std() > 20


def test_broken_images_are_counted_and_the_first_ten_named(tmp_path):
    (tmp_path / "images").mkdir()
    for k in range(15):
        (tmp_path / "images" / f"{k:02d}.jpg").write_bytes(b"text")
    lines = dlc("info", "images", cwd=tmp_path).stdout.splitlines()
    start = lines.index("  broken: 15, the first 10:")
    assert lines[start + 1 :] == [
        f"    {k:02d}.jpg: not an image of a known format" for k in range(10)
    ] + ["wrote contact.png, a contact sheet"]
    assert (tmp_path / "contact.png").exists()


def test_convert_and_verify(place, tmp_path):
    out = dlc("convert", place, tmp_path / "records", "--shard-size", 5, "--workers", 2).stdout
    size = sum(path.stat().st_size for path in (tmp_path / "records").glob("*.arrayrecord")) / 1e6
    assert size > 0.1
    wrote = f"wrote {tmp_path / 'records'}: 12 images of 2 classes in 3 shards"
    assert out == f"{wrote}, {size:.1f} MB, read back\n"
    found = records.open_records(tmp_path / "records")
    assert {found.names[k]: found.read(k) for k in range(12)} == IMAGES
    before = contents(tmp_path / "records")
    out = dlc("convert", place, tmp_path / "records", "--verify").stdout
    assert "12 images" in out and "nothing was written" in out
    assert contents(tmp_path / "records") == before
    again = dlc("convert", place, tmp_path / "records", "--shard-size", 5).stdout
    assert again.splitlines()[0] == "3 of 3 shards were complete"
    assert contents(tmp_path / "records") == before
    shard = tmp_path / "records" / "images-00001-of-00003.arrayrecord"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert f"{shard} has changed" in refused("convert", place, tmp_path / "records", "--verify")
    assert (
        f"{shard} has changed"
        in dlc("info", tmp_path / "records", "--out", tmp_path / "sheet.png").stdout
    )
    assert (
        "2 of 3 shards were complete"
        in dlc("convert", place, tmp_path / "records", "--shard-size", 5).stdout
    )
    assert contents(tmp_path / "records") == before


def test_one_split_and_another_field(place, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    (tmp_path / "tables").mkdir()
    for split, name in (("train", "cat"), ("test", "dog")):
        data = [IMAGES[f"{name}/{k}.png"] for k in range(6)]
        parquet.write_table(
            pyarrow.table({"picture": data}),
            tmp_path / "tables" / f"{split}-00000-of-00001.parquet",
        )
    assert "has no image column image; it has picture" in refused("info", tmp_path / "tables")
    chosen = ("--field", "picture", "--split", "train")
    assert (
        ": 6 images in 1 shard"
        in dlc("convert", tmp_path / "tables", tmp_path / "records", *chosen).stdout
    )
    assert (
        "the 6 images"
        in dlc("convert", tmp_path / "tables", tmp_path / "records", "--verify", *chosen).stdout
    )
    assert "6 images are in one of them only" in refused(
        "convert", tmp_path / "tables", tmp_path / "records", "--verify", "--field", "picture"
    )
    lines = dlc(
        "info",
        tmp_path / "tables",
        "--field",
        "picture",
        "--sample",
        5,
        "--out",
        tmp_path / "sheet.png",
    ).stdout.splitlines()
    assert "  splits: train 6, test 6" in lines
    assert "  the rest is of 5 images, evenly spread:" in lines


# At the fourth time that a file takes its final name: one shard of three is complete, the second
# has only its own file.
AT_FOURTH = """
import os, pathlib, signal, time
# a shell starts what is in the background with interrupts ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
left, rename = 4, pathlib.Path.rename
def counted(*arguments):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), {signal})
        time.sleep(3)  # for the main thread to hear of it, also on a loaded machine
    return rename(*arguments)
pathlib.Path.rename = counted
"""


@pytest.mark.parametrize(("signal", "code"), [(9, -9), (2, 75)], ids=["kill", "interrupt"])
def test_stopped_and_the_same_command_again(signal, code, place, tmp_path):
    command = ("convert", place, tmp_path / "records", "--shard-size", 4, "--workers", 1)
    stopped = dlc(*command, code=code, before=AT_FOURTH.format(signal=signal))
    if signal == 2:
        assert (
            stopped.stderr
            == "dlc_jax: stopped; what is complete is kept, the same command goes on\n"
        )
    unfinished = refused("info", tmp_path / "records", "--out", tmp_path / "sheet.png")
    assert "run dlc data convert again" in unfinished
    complete = {path: path.stat().st_ino for path in (tmp_path / "records").glob("*.arrayrecord")}
    assert 1 <= len(complete) <= 2
    assert f"{len(complete)} of 3 shards were complete" in dlc(*command).stdout
    assert {path: path.stat().st_ino for path in complete} == complete
    dlc("convert", place, tmp_path / "whole", "--shard-size", 4)
    assert contents(tmp_path / "records") == contents(tmp_path / "whole")


def test_full_disk_keeps_complete_shards(place, tmp_path):
    """The last shard is too large for the limit."""
    (place / "zebra").mkdir()
    (place / "zebra" / "large.png").write_bytes(encoded(0, (1000, 300)))
    command = ("convert", place, tmp_path / "records", "--shard-size", 4, "--workers", 1)
    line = refused(*command, limit=500_000)
    assert f"cannot write records of images {tmp_path / 'records'}: " in line
    assert "File too large" in line and "is kept" in line
    kept = {path.name: path.stat().st_ino for path in (tmp_path / "records").glob("*.arrayrecord")}
    assert len(kept) == 3 and not list((tmp_path / "records").glob("*.tmp"))
    assert "3 of 4 shards were complete" in dlc(*command).stdout
    assert {name: (tmp_path / "records" / name).stat().st_ino for name in kept} == kept
    records.verify(tmp_path / "records")


def test_hostile_archives(tmp_path):
    """Nothing outside of the destination is touched, and what was left out is counted."""
    inside, archive = tmp_path / "inside", tmp_path / "inside" / "hostile.tar"
    inside.mkdir()
    with tarfile.open(archive, "w") as tar:

        def add(name, data=None, **about):
            member = tarfile.TarInfo(name)
            member.size = len(data or b"")
            for key, value in about.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(data or b""))

        add("../escaped.png", encoded(0))
        add("a/../../escaped.png", encoded(0))
        add(str(tmp_path / "absolute.png"), encoded(0))
        add("link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add("hard.png", type=tarfile.LNKTYPE, linkname="good.png")
        add("good.png", encoded(1))
        add("good.png", encoded(2))
        add("other.png", encoded(3))
    before = sorted(tmp_path.rglob("*"))
    out = dlc("convert", archive, inside / "records").stdout
    assert "left out: " in out
    assert all(
        word in out
        for word in ('name with ".." 2', "absolute name 1", "link 2", "same name as a later one 1")
    )
    after = [
        path
        for path in sorted(tmp_path.rglob("*"))
        if inside / "records" not in (path, *path.parents)
    ]
    assert after == before
    found = records.open_records(inside / "records")
    assert {found.names[k]: found.read(k) for k in range(len(found))} == {
        "good.png": encoded(2),
        "other.png": encoded(3),
    }
    with zipfile.ZipFile(inside / "hostile.zip", "w") as packed:
        packed.writestr("../escaped.png", encoded(0))
    assert "no images" in refused("convert", inside / "hostile.zip", inside / "more")
    assert not (inside / "more").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "ACTION"),
        (["look"], "invalid choice: 'look'"),
        (["info"], "PATH"),
        (["info", "nowhere"], "nowhere does not exist"),
        (["info", "empty"], "no images in empty"),
        (["info", "text.zip"], "cannot read"),
        (["info", "images", "--out", "sheet.jpg"], "sheet.jpg is not a .png file"),
        (["info", "images", "--out", "no/sheet.png"], "no does not exist"),
        (["info", "images", "--sample", "0"], "'0' is not a whole number above 0"),
        (["info", "https://host/images"], "https:// is unknown"),
        (["info", "images", "--samples", "3"], "unexpected argument '--samples'"),
        (["convert", "images"], "DST"),
        (["convert", "images", "images/records"], "is inside of"),
        (["convert", "images", "full"], "holds something else (mine.txt)"),
        (["convert", "images", "full/mine.txt"], "cannot write"),
        (["convert", "images", "records", "--split", "train"], "no folder for the split train"),
        (["convert", "images", "records", "--verify"], "cannot read images in records"),
    ],
)
def test_mistakes(arguments, words, place, tmp_path):
    for folder in ("empty", "full"):
        (tmp_path / folder).mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "text.zip").write_text("no archive")
    before = sorted(tmp_path.rglob("*"))
    assert words in refused(*arguments, cwd=tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


SLOW = """
import time
from dlc_jax.data import files
inner = files.FolderReader.__call__
def slow(self, index):
    time.sleep(0.05)
    return inner(self, index)
files.FolderReader.__call__ = slow
clock = time.monotonic
time.monotonic = lambda: 100 * clock()
"""


def test_long_work_tells_how_much_is_left(place, tmp_path):
    """The clock runs a hundred times as fast."""
    told = dlc(
        "convert", place, tmp_path / "records", "--workers", 1, before=SLOW
    ).stderr.splitlines()
    assert 0 < len(told) <= 12 and all(
        line.startswith("converting: ") and line.endswith(" left") for line in told[1:]
    ), told


def test_real_data(shared_data, tmp_path):
    text = dlc("info", shared_data / "kodak", "--out", tmp_path / "sheet.png").stdout
    assert "8 images" in text and "broken: none" in text
    assert "width: 512 smallest, 768 median, 768 largest" in text
    out = dlc("convert", shared_data / "kodak", tmp_path / "records").stdout
    assert out.splitlines()[-1].startswith(f"wrote {tmp_path / 'records'}: 8 images in 1 shard, 5.")
    assert (
        "the 8 images"
        in dlc("convert", shared_data / "kodak", tmp_path / "records", "--verify").stdout
    )
