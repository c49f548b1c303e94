"""A data set is opened once, and what is closed holds neither threads nor files."""

import os
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dlc_jax.data import files, sources
from dlc_jax.data.convert import convert
from dlc_jax.data.loader import batches
from dlc_jax.errors import UserError


def write_folder(place, count=12):
    for k in range(count):
        path = place / ("ant", "bee")[k % 2] / f"{k:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 9, 3), k, np.uint8)).save(path)
    return place


def write_zip(place):
    folder = write_folder(place.parent / "packed")
    with zipfile.ZipFile(place, "w") as archive:
        for path in sorted(folder.rglob("*.png")):
            archive.write(path, path.relative_to(folder))
    return place


@pytest.fixture
def listed(monkeypatch):
    """The folders that were listed, in order."""
    found, list_folder = [], files.list_folder
    monkeypatch.setattr(files, "list_folder", lambda path: found.append(path) or list_folder(path))
    return found


def test_a_data_set_lists_its_folder_once(tmp_path, listed):
    place = write_folder(tmp_path / "images")
    with sources.DataSet("images", path=str(place), image=8) as data:
        assert listed == []  # nothing is opened before it is needed
        train, unseen = data.source("train"), data.source("validation")
        assert data.factors() == {"label": ["ant", "bee"]} and data.judge() is None
        whole = data.source("train", image=None)
        assert len(train) + len(unseen) == 12 and len(whole) == len(train)
        assert train[0]["image"].shape == (8, 8, 3) and whole[0]["image"].shape == (9, 9, 3)
        assert data.source("train") is train and data.source("train", image=8) is train
        identities = [data.identity("train"), data.identity("validation"), data.identity("train")]
        assert listed == [place]
    options = dict(path=str(place), image=8)
    assert identities[0] == identities[2] == sources.identity("images", "train", **options)
    assert identities[1] == sources.identity("images", "validation", **options)
    assert train[0]["index"] == 0  # who still reads, reads on


def test_another_opening_sees_what_has_changed(tmp_path, listed):
    place = write_folder(tmp_path / "images")
    options = dict(path=str(place), image=8, validation=0.0)
    data = sources.DataSet("images", **options)
    assert len(data.source("train")) == 12
    write_folder(place, 20)
    assert len(data.source("train")) == 12
    assert len(sources.source("images", "train", **options)) == 20
    data.close()
    assert len(data.source("train")) == 20


def test_options_are_checked_before_anything_is_opened():
    for refuse in (
        lambda: sources.DataSet("images", split="train"),
        lambda: sources.DataSet("images", place=None),
        lambda: sources.DataSet("shapes").source("train", colour=1),
    ):
        with pytest.raises(UserError, match="has no option (split|place|colour); it has "):
            refuse()


def test_a_data_set_that_is_drawn_is_rendered_once():
    data = sources.DataSet("shapes", image=16, count=5)
    assert data.source("train") is data.source("train") is not data.source("validation")
    assert data.identity("train") == sources.identity("shapes", "train", image=16, count=5)
    assert list(data.factors()) == ["shape", "color", "background", "size"]


@pytest.mark.parametrize("kind", ["folder", "zip", "records"])
def test_what_is_closed_holds_no_thread_and_no_file(kind, tmp_path):
    place = tmp_path / "images"
    (write_zip if kind == "zip" else write_folder)(place)
    if kind == "zip":
        place = place.rename(tmp_path / "images.zip")
    if kind == "records":
        convert(place, tmp_path / "records", shard_size=4)
        place = tmp_path / "records"

    others = set(threading.enumerate())

    def threads():
        return set(threading.enumerate()) - others

    def open_files():
        inside = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        return [path for path in inside if Path(path).is_relative_to(place)]

    assert not open_files()
    for _ in range(5):  # such as a run's validations
        data = sources.DataSet("images", path=str(place), image=8)
        split = dict(seed=0, threads=2)
        iterator = batches(data.source("train"), batch=4, **split)
        first = next(iterator)
        assert threads() and (kind == "folder" or open_files())
        iterator.close()
        iterator.close()
        end = time.monotonic() + 10
        while threads() and time.monotonic() < end:
            time.sleep(0.01)  # a thread ends when its batch does
        data.close()
        assert not threads() and not open_files()
    next(iterator)  # goes on where it was
    assert iterator.get_state() == {"global_next_index": 8} and len(first["index"]) == 4
    iterator.close()


def test_an_epoch_that_ends_closes_itself():
    others = set(threading.enumerate())
    split = dict(seed=0, threads=2, repeat=False)
    iterator = batches(sources.source("shapes", "train", count=8), batch=4, **split)
    assert len(list(iterator)) == 2
    assert iterator._iterator is None
    end = time.monotonic() + 10
    while set(threading.enumerate()) - others and time.monotonic() < end:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - others
