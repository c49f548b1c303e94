"""Names, and what they say: splits, classes, the share that is held out."""

import pickle

import numpy as np
import pytest

from dlc_jax.data import listing, naming
from dlc_jax.data.listing import Listing
from dlc_jax.data.naming import check_name, choose_rows, classify, common_folder, split_of
from dlc_jax.errors import UserError


def chosen(names, split, validation=0.1):
    return [names[row] for row in choose_rows(names, split, validation=validation)]


@pytest.mark.parametrize(
    ("name", "kept", "reason"),
    [
        ("./a//b.JPG", "a/b.JPG", None),
        ("a/b.jpeg", "a/b.jpeg", None),
        ("a/../b.jpg", "a/../b.jpg", 'name with ".."'),
        ("../b.jpg", "../b.jpg", 'name with ".."'),
        ("/etc/b.jpg", "/etc/b.jpg", "absolute name"),
        ("C:/b.jpg", "C:/b.jpg", "absolute name"),
        ("C:\\b.jpg", "C:\\b.jpg", "absolute name"),
        ("a/._b.jpg", "a/._b.jpg", "hidden"),
        ("__MACOSX/b.jpg", "__MACOSX/b.jpg", naming.SYSTEM_FOLDER),
        ("a/@EAdir/b.jpg", "a/@EAdir/b.jpg", naming.SYSTEM_FOLDER),
        ("a/@eaDir", "a/@eaDir", "not an image by its name"),
        (".", ".", "hidden"),
        ("a/b.txt", "a/b.txt", "not an image by its name"),
        ("jpg", "jpg", "not an image by its name"),
    ],
)
def test_check_name(name, kept, reason):
    assert check_name(name) == (kept, reason)


def test_splits_are_folders():
    names = ["val/x/1.png", "train/y/3.png", "train/x/2.png", "train/x/1.png"]
    assert chosen(names, "train") == ["train/x/1.png", "train/x/2.png", "train/y/3.png"]
    assert chosen(names, "validation") == chosen(names, "test") == ["val/x/1.png"]
    assert classify(names)[1] == ["x", "y"] and classify(names)[0].tolist() == [0, 1, 0, 0]
    three = [*names, "test/x/9.png"]
    assert chosen(three, "test") == ["test/x/9.png"]
    assert chosen(three, "validation") == ["val/x/1.png"]
    other = Listing("folder", [*names, "extra/x/9.png", "0.png"], None, content="x").settled()
    assert other.names == names and other.classes == ["x", "y"]
    assert other.skipped == {"outside of the folders for training and validation": 2}


def test_a_class_may_be_called_like_a_split():
    names = [f"{top}/{k}.png" for top in ("boat", "plane", "train") for k in range(40)]
    assert split_of(names) is None and classify(names)[1] == ["boat", "plane", "train"]
    assert {name.split("/")[0] for name in chosen(names, "train")} == {"boat", "plane", "train"}
    only = [f"train/{name}" for name in names]
    assert classify(only)[1] == ["boat", "plane", "train"]
    assert set(chosen(only, "train")) | set(chosen(only, "validation")) == set(only)


def test_plain_files_have_no_classes():
    assert classify(["1.png", "2.png"]) == (None, [])
    assert classify(["x/1.png", "2.png"]) == (None, [])
    labels, classes = classify(["b/c/1.png", "a/d/2.png"])
    assert labels.tolist() == [1, 0] and labels.dtype == np.int32 and classes == ["a", "b"]


def test_the_held_out_share_stays_when_images_are_added():
    names = [f"{k}.png" for k in range(2000)]
    held = set(chosen(names, "validation"))
    assert 150 < len(held) < 250 and not held & set(chosen(names, "train"))
    more = set(chosen([*names, *(f"new{k}.png" for k in range(500))], "validation"))
    assert held == more & set(names) and len(more) > len(held)
    # The same images under train/.
    below = chosen([f"train/{name}" for name in names], "validation")
    assert {name.removeprefix("train/") for name in below} == held
    assert len(chosen(names, "validation", 0.5)) > 900


def test_small_sets_still_have_both_splits():
    assert (
        len(chosen(["1.png", "2.png"], "validation", 1e-9))
        == len(chosen(["1.png", "2.png"], "train", 1e-9))
        == 1
    )
    assert chosen(["1.png", "2.png"], "train", 0) == ["1.png", "2.png"]
    for split, share in [("validation", 0), ("train", 1.5), ("validation", 1)]:
        with pytest.raises(UserError, match="no share between 0 and 1"):
            chosen(["1.png", "2.png"], split, share)
    with pytest.raises(UserError, match="unknown split 'dev'"):
        chosen(["1.png"], "dev")


def test_common_folder():
    assert common_folder(["a/b/1.png", "a/b/c/2.png"]) == "a/b/"
    assert common_folder(["a/b/1.png", "a/d/2.png"]) == "a/"
    assert common_folder(["train/x/1.png", "train/x/2.png"]) == ""  # says something
    assert (
        common_folder(["ab/1.png", "a/2.png"])
        == ""
        == common_folder(["1.png"])
        == common_folder([])
    )


def test_content_knows_names_and_sizes_but_not_the_order():
    one = listing.content_of(["a", "b"], [1, 2])
    assert one == listing.content_of(["b", "a"], [2, 1])
    assert (
        len({one, listing.content_of(["a", "b"], [2, 1]), listing.content_of(["a", "c"], [1, 2])})
        == 3
    )
    assert listing.digest(["ab", "c"]) != listing.digest(["a", "bc"])
    listing.digest(["broken \udcff name"])


def test_classes_written_as_numbers_or_names():
    labels, classes = naming.number_classes(["2", None, "0", "2"])
    assert labels.tolist() == [2, -1, 0, 2] and labels.dtype == np.int32
    assert classes == ["0", "1", "2"]
    assert naming.number_classes(["dog", "3", None, "cat"])[0].tolist() == [2, 0, -1, 1]
    # No five million classes.
    assert naming.number_classes(["5000000", "7"])[1] == [
        "5000000",
        "7",
    ]
    assert naming.number_classes([])[1] == []


def test_select():
    whole = Listing(
        "folder",
        ["a", "b", "c"],
        [b"0", b"1", b"2"].__getitem__,
        content="x",
        labels=[0, 1, 0],
        classes=["k", "l"],
    )
    part = whole.select([2, 1])
    assert part.names == ["c", "b"] and part.read(0) == b"2" and part.labels.tolist() == [0, 1]
    assert part.classes == ["k", "l"]
    assert (part.label(1), len(part)) == (1, 2)
    assert part.digest() != whole.digest() == whole.select([0, 1, 2]).digest()
    lazy = Listing(
        "tfds", ["a", "b"], None, content="x", labels=[4, 5].__getitem__, classes=["k"]
    ).select([1])
    assert lazy.label(0) == 5 and lazy.labels.tolist() == [5] and lazy.label(0) == 5
    assert pickle.loads(
        pickle.dumps(Listing("folder", ["a"], len, content="x").select([0]))
    ).names == ["a"]
