"""Batches: the same for any number of processes, threads and restarts; sources and bad records."""

import ast
import inspect
import io
import json
import re
from pathlib import Path

import grain
import numpy as np
import pytest
from PIL import Image

from dlc_jax.data import sources
from dlc_jax.data.loader import Resilient, batches
from dlc_jax.data.transforms import MultiCrop
from dlc_jax.errors import UserError


class Tiny:
    """20 records; record i is full of i."""

    def __init__(self, count=20, broken=()):
        self.count, self.broken = count, broken

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.broken:
            raise OSError(f"cannot read {index}")
        return {
            "image": np.full((4, 4, 3), index, np.uint8),
            "index": index,
            "weight": index / 2,
            "name": f"n{index}",
        }


def noisy(record, rng):
    return {"image": record["image"], "index": record["index"], "draw": rng.random(3)}


def share(process, processes, batch=8):
    """The rows of one of several processes whose devices are neighbors on the mesh."""
    return np.array_split(np.arange(batch), processes)[process]


def take(iterator, count):
    out = [next(iterator) for _ in range(count)]
    iterator.close()
    return out


def assert_same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


def make(source=None, **options):
    options = {
        "batch": 8,
        "seed": 3,
        "transform": noisy,
        **options,
    }
    return batches(Tiny() if source is None else source, **options)


def test_fields_and_types():
    (batch,) = take(make(transform=None), 1)
    assert batch["image"].shape == (8, 4, 4, 3) and batch["image"].dtype == np.uint8
    assert batch["index"].dtype == np.int32 and batch["weight"].dtype == np.float32
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["index"])
    np.testing.assert_array_equal(batch["position"], np.arange(8, dtype=np.int32))
    assert batch["position"].dtype == np.int32
    (batch,) = take(make(transform=None, fields=("image",)), 1)
    assert set(batch) == {"image", "position"}
    with pytest.raises(UserError, match="no field label"):
        next(make(fields=("label",)))


def test_every_epoch_has_every_record_once_in_another_order():
    order = np.concatenate([b["index"] for b in take(make(), 10)])  # 80 records: 4 epochs
    epochs = order.reshape(4, 20)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(20), (4, 1)))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    other = np.concatenate([b["index"] for b in take(make(seed=4), 10)]).reshape(4, 20)
    assert not {tuple(e) for e in other.tolist()} & {tuple(e) for e in epochs.tolist()}


@pytest.mark.parametrize("processes", [2, 4])
def test_global_batch_does_not_depend_on_processes(processes):
    whole = take(make(), 6)
    parts = [take(make(rows=share(p, processes)), 6) for p in range(processes)]
    joined = [
        {name: np.concatenate([part[k][name] for part in parts]) for name in whole[k]}
        for k in range(6)
    ]
    assert_same(joined, whole)


def test_draws_differ_between_records_and_epochs_but_not_between_threads():
    want = take(make(threads=0), 8)
    draws = np.concatenate([b["draw"] for b in want])
    assert len(np.unique(draws)) == draws.size
    for threads in (1, 3):
        assert_same(take(make(threads=threads), 8), want)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_resume_gives_the_same_batches(threads):
    want = take(make(), 9)
    first = make(threads=threads)
    for _ in range(4):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    assert state == {"global_next_index": 32}
    fresh = make(threads=threads)
    fresh.set_state(state)
    assert fresh.get_state() == state
    assert_same(take(fresh, 5), want[4:])
    first.set_state({"global_next_index": 8})  # back, with batches read ahead
    assert_same(take(first, 8), want[1:])


def test_order_and_draws_are_seeded_apart(monkeypatch):
    """What an epoch begins with must not say how it is cut. Outputs hide it: the calls are read."""
    seeds = []

    def watch(name):
        method = getattr(grain.MapDataset, name)

        def call(*args, seed):
            seeds.append(seed)
            return method(*args, seed=seed)

        monkeypatch.setattr(grain.MapDataset, name, call)

    watch("shuffle")
    watch("random_map")
    make(seed=3)
    make(seed=4)
    assert len(seeds) == len({*seeds, 3, 4}) - 2 == 4


def test_state_before_the_first_batch():
    want = take(make(), 2)
    iterator = make()
    assert iterator.get_state() == {"global_next_index": 0}
    iterator.set_state(iterator.get_state())
    assert_same(take(iterator, 2), want)
    with pytest.raises(UserError, match="not the state"):
        iterator.set_state({"next": 3})


def test_resume_on_other_processes_and_with_another_batch():
    want = take(make(), 6)
    state = {"global_next_index": 16}
    parts = []
    for p in range(4):
        part = make(rows=share(p, 4))
        part.set_state(state)
        parts.append(take(part, 4))
    joined = [
        {name: np.concatenate([part[k][name] for part in parts]) for name in want[0]}
        for k in range(4)
    ]
    assert_same(joined, want[2:])
    half = make(batch=4)
    half.set_state({"global_next_index": 20})
    np.testing.assert_array_equal(next(half)["draw"], want[2]["draw"][4:])
    half.close()


@pytest.mark.parametrize("processes", [1, 2])
def test_one_epoch_in_order_with_a_filled_last_batch(processes):
    options = dict(transform=None, shuffle=False, repeat=False)
    parts = [list(make(rows=share(p, processes), **options)) for p in range(processes)]
    assert {len(part) for part in parts} == {3} == {make(**options).steps}
    assert all(batch["index"].shape == (8 // processes,) for part in parts for batch in part)
    index = np.concatenate([np.concatenate([part[k]["index"] for part in parts]) for k in range(3)])
    valid = np.concatenate([np.concatenate([part[k]["valid"] for part in parts]) for k in range(3)])
    np.testing.assert_array_equal(index, [*range(20), 0, 1, 2, 3])
    np.testing.assert_array_equal(valid, np.arange(24) < 20)
    iterator = make(**options)
    iterator.set_state({"global_next_index": 16})
    assert [b["index"][0] for b in iterator] == [16]
    iterator.set_state({"global_next_index": 24})
    assert list(iterator) == []


def test_batch_larger_than_the_source():
    (batch,) = list(make(batch=48, transform=None, shuffle=False, repeat=False))
    assert batch["valid"].sum() == 20
    np.testing.assert_array_equal(batch["index"], np.arange(48) % 20)


def test_multi_crop_through_the_loader():
    options = dict(transform=MultiCrop(global_size=4, local_crops=0), fields=("global",))
    (want,) = take(make(**options), 1)
    assert want["global"].shape == (8, 2, 4, 4, 3)
    assert_same(take(make(threads=2, **options), 1), [want])


def test_bad_arguments():
    with pytest.raises(UserError, match="a global batch of 0 is empty"):
        make(batch=0)
    with pytest.raises(UserError, match="empty"):
        make(Tiny(0))

    class Ragged(Tiny):
        def __getitem__(self, index):
            return {"image": np.zeros((index + 1, 2))}

    with pytest.raises(UserError, match="image differs in shape"):
        next(make(Ragged(), transform=None))

    class Wide(Tiny):
        def __getitem__(self, index):
            return {"hash": 2**40 + index}

    with pytest.raises(UserError, match="hash has values beyond 32 bits"):
        next(make(Wide(), transform=None))


def test_bad_records_are_replaced_deterministically_and_counted():
    source = Resilient(Tiny(broken=(3, 7)), limit=2)
    want = take(make(source), 5)
    assert sorted(source.bad) == [3, 7] and "cannot read 7" in source.bad[7]
    index = np.concatenate([b["index"] for b in want])
    assert not {3, 7} & set(index.tolist())
    again = Resilient(Tiny(broken=(3, 7)), limit=2)
    parts = [take(make(again, rows=share(p, 2), threads=2), 5) for p in range(2)]
    np.testing.assert_array_equal(
        np.concatenate([np.concatenate([p[k]["index"] for p in parts]) for k in range(5)]), index
    )
    clean = np.concatenate([b["index"] for b in take(make(), 5)])
    good = ~np.isin(clean, (3, 7))
    np.testing.assert_array_equal(index[good], clean[good])  # the others are where they were


def test_replacements_of_neighbors_are_spread_over_the_source():
    source = Resilient(Tiny(broken=range(10)))
    assert len({source[index]["index"] for index in range(10)}) > 3


def test_a_failing_transform_is_a_bad_record():
    def picky(record, rng):
        if record["index"] == 5:
            raise ValueError("too small")
        return record

    source = Resilient(Tiny(), limit=1)
    index = np.concatenate([b["index"] for b in take(make(source, transform=picky), 5)])
    assert list(source.bad) == [5] and 5 not in index


def test_too_many_bad_records_stop_the_run():
    words = r"3 of 20 records cannot be read \(limit 2\), such as 0 \(OSError: cannot read 0\); 1"
    with pytest.raises(UserError, match=words):
        list(make(Resilient(Tiny(broken=(0, 1, 2)), limit=2), shuffle=False, repeat=False))
    with pytest.raises(UserError, match="20 of 20"):
        next(make(Resilient(Tiny(broken=range(20)), limit=1000)))
    with pytest.raises(OSError):  # without it, the error arrives as it is
        next(make(Tiny(broken=range(20))))


def test_sources_by_name():
    shapes = sources.source("shapes", "train", image=16, count=5)
    assert len(shapes) == 5 and shapes[0]["image"].shape == (16, 16, 3)
    with pytest.raises(
        UserError, match="unknown data source 'cifar'; use one of images, shapes, tfds"
    ):
        sources.source("cifar", "train")
    with pytest.raises(UserError, match="no option colour"):
        sources.source("shapes", "train", colour=1)
    with pytest.raises(UserError, match="no images: say where they are, --config.data.path=PATH"):
        sources.source("images", "train")
    assert sources.identity("tfds", "train", dataset="d", data_dir="a") == sources.identity(
        "tfds", "train", dataset="d"
    )


TYPES = {"int", "float", "str", "bool", "None", "tuple"}


@pytest.mark.parametrize("kind", [*sources.SOURCES.values(), MultiCrop])
def test_every_field_of_a_recipe_has_a_type_a_default_and_a_line(kind):
    """A recipe's sections are expanded from the source alone."""
    (found,) = [
        inner
        for inner in ast.walk(ast.parse(Path(inspect.getfile(kind)).read_text()))
        if isinstance(inner, ast.FunctionDef)
        and inner.name == "__init__"
        and "Args:" in kind.__doc__
        and inner.lineno == kind.__init__.__code__.co_firstlineno
    ]
    documented = inspect.cleandoc(kind.__doc__).partition("Args:")[2]
    for argument, default in zip(found.args.kwonlyargs, found.args.kw_defaults, strict=True):
        if argument.arg in ("split", "place"):
            continue
        assert set(re.findall(r"\w+", ast.unparse(argument.annotation))) <= TYPES, argument.arg
        ast.literal_eval(default)
        assert re.search(rf"^  {argument.arg}: .", documented, re.M), argument.arg


def png(pixels, mode=None, format="PNG"):
    file, image = io.BytesIO(), Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(file, format)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decode_image():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    np.testing.assert_array_equal(sources.decode_image(png(pixels)), pixels)
    assert sources.decode_image(png(pixels), image=4).shape == (4, 4, 3)
    for mode, format in [("L", "PNG"), ("P", "PNG"), ("CMYK", "JPEG"), ("LA", "PNG"), ("1", "PNG")]:
        out = sources.decode_image(png(pixels, mode, format))
        assert out.shape == (6, 9, 3) and out.dtype == np.uint8
    clear = np.concatenate([pixels, np.zeros((6, 9, 1), np.uint8)], -1)
    assert sources.decode_image(png(clear)).max() == 0
    for bad in (b"", b"text", png(pixels)[:60]):
        with pytest.raises((OSError, ValueError, SyntaxError)):
            sources.decode_image(bad)
    bomb = io.BytesIO()
    Image.new("1", (10000, 10000)).save(bomb, "PNG")
    with pytest.raises(ValueError, match="10000 x 10000"):
        sources.decode_image(bomb.getvalue())


def test_tfds_without_tensorflow(tmp_path):
    import sys

    import tensorflow_datasets as tfds

    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 6, 3), dtype=np.uint8)

    class Few(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                "label": tfds.features.Scalar(np.int64),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, image in enumerate(pixels):
                yield i, {"image": io.BytesIO(png(image)), "label": i}

    Few(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    source = sources.source(
        "tfds", "train", dataset="few", image=None, data_dir=str(tmp_path), validation="train[:1]"
    )
    assert len(source) == 4
    for i in range(4):
        np.testing.assert_array_equal(source[i]["image"], pixels[source[i]["label"]])
        assert source[i]["index"] == i
    assert (
        len(
            sources.source(
                "tfds", "validation", dataset="few", data_dir=str(tmp_path), validation="train[:1]"
            )
        )
        == 1
    )
    small = sources.source("tfds", "train[:50%]", dataset="few", data_dir=str(tmp_path), image=4)
    assert len(small) == 2 and small[0]["image"].shape == (4, 4, 3)
    files = sources.source("tfds", "train", dataset="few", data_dir=str(tmp_path), image="encoded")
    assert files[2].keys() == source[2].keys()
    np.testing.assert_array_equal(sources.decode_image(files[2]["image"]), source[2]["image"])
    (batch,) = take(make(small, batch=2, transform=None), 1)
    assert batch["label"].dtype == np.int32
    assert "tensorflow" not in sys.modules
    with pytest.raises(UserError, match="nothing_here"):
        sources.source("tfds", "train", dataset="nothing_here", data_dir=str(tmp_path))
    with pytest.raises(UserError, match="split missing of TFDS data set few"):
        sources.source("tfds", "missing", dataset="few", data_dir=str(tmp_path))
    with pytest.raises(UserError, match="no field picture; it has image, label"):
        sources.source("tfds", "train", dataset="few", data_dir=str(tmp_path), field="picture")
