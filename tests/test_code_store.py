"""The code store: what is written is read, kills leave no trace, damage and mix-ups are named."""

import json
import os
import pickle
import threading
from concurrent import futures

import ml_dtypes
import numpy as np
import pytest

from dlc_jax.data import shard
from dlc_jax.data.code_writer import write
from dlc_jax.data.codes import CodeStore, WithCodes
from dlc_jax.data.loader import batches
from dlc_jax.errors import UserError

TOTAL, L, V = 23, 4, 32
ABOUT = dict(
    total=TOTAL,
    positions=L,
    values=V,
    identity={"model": "vit", "seed": 1},
    source={"name": "tiny"},
    shard_size=5,
)
CODES = np.random.default_rng(0).integers(0, V, (TOTAL, L))
LATENT = np.random.default_rng(1).normal(size=(TOTAL, 2, 3)).astype(ml_dtypes.bfloat16)
FIELDS = {"latent": ("bfloat16", (2, 3)), "flip": ("bool", ())}


class Encoder:
    """Knows the codes; counts its calls and dies at one of them."""

    def __init__(self, *, dies_at=None, latent=False):
        self.calls, self.dies_at, self.latent = [], dies_at, latent

    def __call__(self, start, stop):
        if start == self.dies_at:
            raise KeyboardInterrupt
        self.calls.append((start, stop))
        out = {"codes": CODES[start:stop], "index": np.arange(start, stop)}
        if self.latent:
            out |= {"latent": LATENT[start:stop], "flip": np.arange(start, stop) % 2 == 0}
        return out


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_round_trip(tmp_path):
    manifest = write(tmp_path, Encoder(), **ABOUT)
    store = CodeStore(tmp_path, identity=ABOUT["identity"])
    assert len(store) == TOTAL and store.manifest == manifest
    assert store.codes().dtype == np.uint8 and not store.codes().flags.writeable
    np.testing.assert_array_equal(store.codes(), CODES)
    for i in (0, 4, 5, 22):
        assert store[i]["codes"].dtype == np.int32
        np.testing.assert_array_equal(store[i]["codes"], CODES[i])
    with pytest.raises(IndexError):
        store[TOTAL]
    store.verify()
    assert [shard["count"] for shard in manifest["shards"]] == [5, 5, 5, 5, 3]
    expected = dict(
        positions=L,
        values=V,
        count=TOTAL,
        dtype="uint8",
        identity={"model": "vit", "seed": 1},
        drawn="argmax",
    )
    assert expected.items() <= manifest.items() and manifest["source"] == {"name": "tiny"}
    assert manifest["view"]
    assert sorted(contents(tmp_path)) == sorted(
        ["manifest.json", *(shard["file"] for shard in manifest["shards"])]
    )
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(store))[7]["codes"], CODES[7])


@pytest.mark.parametrize("latent", [False, True])
def test_a_closed_store_holds_nothing_and_reads_again(tmp_path, latent):
    write(tmp_path, Encoder(latent=latent), fields=FIELDS if latent else None, **ABOUT)

    def open_files():
        inside = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        return [path for path in inside if path.startswith(f"{tmp_path}{os.sep}")]

    store = CodeStore(tmp_path)
    for _ in range(2):
        np.testing.assert_array_equal(store[7]["codes"], CODES[7])
        assert bool(open_files()) == latent  # codes alone are kept in memory
        store.close()
        store.close()
        assert not open_files() and store._memory is None


def test_other_fields_ride_along(tmp_path):
    write(tmp_path, Encoder(latent=True), fields=FIELDS, **ABOUT)
    store = CodeStore(tmp_path)
    np.testing.assert_array_equal(store.codes(), CODES)
    for i in (0, 13, 22):
        record = store[i]
        np.testing.assert_array_equal(record["codes"], CODES[i])
        np.testing.assert_array_equal(record["latent"], LATENT[i])
        assert record["latent"].dtype == ml_dtypes.bfloat16 and record["flip"] == (i % 2 == 0)
    loader = batches(store, batch=4, seed=0, shuffle=False, threads=3)
    np.testing.assert_array_equal(
        np.concatenate([next(loader)["latent"] for _ in range(5)]), LATENT[:20]
    )
    loader.close()


@pytest.mark.parametrize("small", [True, False])
def test_codes_of_some_records(tmp_path, small, monkeypatch):
    """In the order asked for; of a store with other fields, or one that is too large to be kept,
    nothing else is read.
    """
    write(tmp_path, Encoder(latent=not small), fields={} if small else FIELDS, **ABOUT)
    store, rows = CodeStore(tmp_path), np.array([22, 3, 4, 4, 17, 0, 2])
    asked, read = [], store._read
    monkeypatch.setattr(store, "_read", lambda k, rows: asked.append((k, rows)) or read(k, rows))
    found = store.codes(rows)
    np.testing.assert_array_equal(found, CODES[rows])
    assert found.dtype == np.uint8
    if not small:
        assert asked == [(0, [3, 4, 4, 0, 2]), (3, [2]), (4, [2])]
    for wrong in ([TOTAL], [-1, 3]):
        with pytest.raises(IndexError):
            CodeStore(tmp_path).codes(wrong)


@pytest.mark.parametrize(
    "values,dtype", [(2, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16")]
)
def test_smallest_dtype(tmp_path, values, dtype):
    ids = np.full((TOTAL, L), values - 1)
    write(tmp_path, lambda start, stop: {"codes": ids[start:stop]}, **{**ABOUT, "values": values})
    store = CodeStore(tmp_path)
    assert store.codes().dtype == dtype and (store.codes() == values - 1).all()
    assert (store[0]["codes"] == values - 1).all()


@pytest.mark.parametrize("dies_at", [0, 10, 20])
def test_killed_between_shards_ends_with_the_same_bytes(tmp_path, dies_at):
    write(tmp_path / "whole", Encoder(latent=True), fields=FIELDS, **ABOUT)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "killed", Encoder(latent=True, dies_at=dies_at), fields=FIELDS, **ABOUT)
    with pytest.raises(UserError, match="no complete code store"):
        CodeStore(tmp_path / "killed")
    (tmp_path / "killed" / "codes-00004-of-00005.arrayrecord.tmp").write_bytes(b"half a shard")
    encoder = Encoder(latent=True)
    write(tmp_path / "killed", encoder, fields=FIELDS, **ABOUT)
    assert encoder.calls == [(start, min(TOTAL, start + 5)) for start in range(dies_at, TOTAL, 5)]
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("text", ["[]", "null", "3", "half a mani"])
def test_a_damaged_manifest_is_made_anew(tmp_path, text):
    write(tmp_path, Encoder(), **ABOUT)
    want = contents(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    write(tmp_path, Encoder(), **ABOUT)
    assert contents(tmp_path) == want


def test_complete_store_is_left_alone_and_a_damaged_shard_repaired(tmp_path):
    write(tmp_path, Encoder(), **ABOUT)
    want = contents(tmp_path)
    encoder = Encoder()
    write(tmp_path, encoder, **ABOUT)
    assert encoder.calls == [] and contents(tmp_path) == want
    shard = tmp_path / "codes-00002-of-00005.arrayrecord"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    (tmp_path / "codes-00003-of-00005.arrayrecord").unlink()
    write(tmp_path, encoder, **ABOUT)
    assert encoder.calls == [(10, 15), (15, 20)] and contents(tmp_path) == want


def test_several_processes_write_their_shards(tmp_path):
    write(tmp_path / "one", Encoder(), **ABOUT)
    encoders, barrier = [Encoder(), Encoder()], threading.Barrier(2, timeout=20)

    def run(p):
        return write(
            tmp_path / "two",
            encoders[p],
            process_index=p,
            process_count=2,
            barrier=barrier.wait,
            **ABOUT,
        )

    with futures.ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, range(2))
    assert first == second
    assert encoders[1].calls == [(5, 10), (15, 20)]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    with pytest.raises(UserError, match="lacks shard codes-00001-of-00005"):
        write(
            tmp_path / "alone",
            Encoder(),
            process_index=0,
            process_count=2,
            barrier=lambda: None,
            **ABOUT,
        )
    with pytest.raises(ValueError, match="barrier"):
        write(tmp_path / "alone", Encoder(), process_index=0, process_count=2, **ABOUT)


def test_what_the_encoder_must_not_give(tmp_path):
    def refuse(match, **change):
        given = {"codes": CODES[:5], **change}
        with pytest.raises(UserError, match=match):
            write(
                tmp_path,
                lambda start, stop: {k: v for k, v in given.items() if v is not None},
                **ABOUT,
            )

    refuse("codes outside 0 to 31", codes=np.full((5, L), V))
    refuse("codes outside 0 to 31", codes=np.full((5, L), -1))
    refuse("not integers", codes=np.zeros((5, L), np.float32))
    refuse(r"shape \[4, 4\]; expected \[5, 4\]", codes=CODES[:4])
    refuse("another order", index=np.arange(5)[::-1])
    refuse("expected codes", codes=None)
    refuse("expected codes", latent=LATENT[:5])
    with pytest.raises(UserError, match="gave latent as float32; expected bfloat16"):
        write(
            tmp_path,
            lambda a, b: {"codes": CODES[a:b], "latent": LATENT[a:b].astype(np.float32)},
            fields={"latent": FIELDS["latent"]},
            **ABOUT,
        )
    with pytest.raises(UserError, match="1 to 65536"):
        write(tmp_path, Encoder(), **{**ABOUT, "values": 65537})
    assert not (tmp_path / "manifest.json").exists()


def test_other_codes_in_the_directory_are_kept_and_named(tmp_path):
    write(tmp_path, Encoder(), **ABOUT)
    want = contents(tmp_path)
    other = {**ABOUT, "identity": {"model": "vit", "seed": 2}}
    with pytest.raises(UserError, match="identity: seed: 1 there, 2 here"):
        write(tmp_path, Encoder(), **other)
    with pytest.raises(UserError, match="shard_size: 5 there, 6 here"):
        write(tmp_path, Encoder(), **{**ABOUT, "shard_size": 6})
    assert contents(tmp_path) == want
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "unfinished", Encoder(dies_at=10), **ABOUT)
    with pytest.raises(UserError, match="seed"):
        write(tmp_path / "unfinished", Encoder(), **other)


def test_damage_and_mix_ups_are_named(tmp_path):
    with pytest.raises(UserError, match="no complete code store"):
        CodeStore(tmp_path)
    write(tmp_path, Encoder(latent=True), fields=FIELDS, **ABOUT)
    with pytest.raises(UserError, match="another encoder .seed: 1 there, 2 here"):
        CodeStore(tmp_path, identity={"model": "vit", "seed": 2})
    shard = tmp_path / "codes-00001-of-00005.arrayrecord"
    whole = shard.read_bytes()
    store = CodeStore(tmp_path)

    damaged = bytearray(whole)
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(UserError, match="codes-00001-of-00005.arrayrecord has changed"):
        store.verify()

    shard.write_bytes(bytes(len(whole)))
    with pytest.raises(UserError, match="codes-00001-of-00005.arrayrecord"):
        CodeStore(tmp_path)[7]
    with pytest.raises(UserError, match="codes-00001-of-00005.arrayrecord"):
        CodeStore(tmp_path).codes()

    shard.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="codes-00001-of-00005.arrayrecord has"):
        CodeStore(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match="codes-00001-of-00005.arrayrecord is missing"):
        CodeStore(tmp_path)
    shard.write_bytes(whole)

    manifest = tmp_path / "manifest.json"
    text = manifest.read_text()
    for broken in (text[:100], "[]", json.dumps({"format": 1})):
        manifest.write_text(broken)
        with pytest.raises(UserError, match="not a manifest"):
            CodeStore(tmp_path)
    manifest.write_text(json.dumps({**json.loads(text), "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        CodeStore(tmp_path)


def test_a_disk_that_refuses(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write code store"):
        write(tmp_path / "file", Encoder(), **ABOUT)

    class Full:
        def __init__(self, *_):
            pass

        def write(self, _):
            raise RuntimeError("write() failed: No space left on device; writing")

        def close(self):
            pass

    monkeypatch.setattr(shard, "ArrayRecordWriter", Full)
    with pytest.raises(UserError, match="No space left on device"):
        write(tmp_path / "full", Encoder(), **ABOUT)


class Tiny:
    def __init__(self, count=TOTAL):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"image": np.full((2, 2, 3), index, np.uint8), "index": index}


def test_with_codes(tmp_path):
    write(tmp_path, Encoder(), **ABOUT)
    store = CodeStore(tmp_path)
    joined = WithCodes(Tiny(), store, identity={"name": "tiny"})
    assert len(joined) == TOTAL
    loader = batches(joined, batch=6, seed=0)
    for _ in range(8):
        batch = next(loader)
        np.testing.assert_array_equal(batch["codes"], CODES[batch["index"]])
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["index"])
    loader.close()
    with pytest.raises(UserError, match="other data .name: .tiny. there, .huge. here"):
        WithCodes(Tiny(), store, identity={"name": "huge"})
    with pytest.raises(UserError, match="has 23 records, the data 22"):
        WithCodes(Tiny(22), store)
