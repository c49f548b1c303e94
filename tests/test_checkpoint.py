"""What is restored is what was saved, bit for bit, or the next older step, by name.

Nothing in between, and nothing is lost.
"""

import dataclasses
import json
import logging
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dlc_jax import checkpoint, checksum
from dlc_jax.checkpoint import Checkpoints, seal
from dlc_jax.errors import UserError

IDENTITY = {"model": {"width": 8, "heads": (2, 2)}, "data": "shapes"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: jax.Array
    params: dict
    opt_state: tuple
    ema: dict | None
    extra: dict


class Iterator:
    def __init__(self, state=None):
        self.state = {"global_next_index": 0} if state is None else state

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = state


def make_state(step, *, width=8, ema=True, seed=0):
    key = jax.random.fold_in(jax.random.key(seed), step)
    dense = {
        "kernel": jax.random.normal(key, (16, width)),
        "bias": jnp.full(width, step, jnp.bfloat16),
    }
    params = {"dense": dense, "list": [jnp.ones(3)]}
    opt_state = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-3), optax.identity()
    ).init(params)
    extra = {
        "empty": {},
        "none": None,
        "key": key,
        "zero": jnp.zeros((0, 4)),
        "flag": jnp.array([True, False]),
    }
    return State(
        jnp.int32(step),
        params,
        opt_state,
        jax.tree.map(lambda x: x * 2, params) if ema else None,
        extra,
    )


def abstract(state, sharding=None):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), state
    )


def bits(tree):
    def number(leaf):
        return (
            jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        )

    return [
        (str(leaf.dtype), leaf.shape, np.asarray(number(leaf)).tobytes())
        for leaf in jax.tree.leaves(tree)
    ]


def same(one, other):
    return jax.tree.structure(one) == jax.tree.structure(other) and bits(one) == bits(other)


def saved(directory, *steps, keep=3):
    checkpoints = Checkpoints(directory, keep=keep)
    for step in steps:
        checkpoints.save(
            step, make_state(step), Iterator({"global_next_index": step}), {"identity": IDENTITY}
        )
    checkpoints.close()
    return directory


def restored(directory, identity=IDENTITY, iterator=None, keep=3):
    return Checkpoints(directory, keep=keep).restore(abstract(make_state(0)), iterator, identity)


def listing(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def files_of(step_directory):
    """Its largest data files first."""
    files = [
        path for path in step_directory.rglob("*") if path.is_file() and "/d/" in path.as_posix()
    ]
    return sorted(files, key=lambda path: -path.stat().st_size)


# What is saved comes back.


@pytest.mark.parametrize(
    "position", [{"global_next_index": np.int64(7)}, b"\x00\xffgrain", [1, {"a": None}]]
)
def test_round_trip(tmp_path, position):
    state, iterator = make_state(7), Iterator()
    checkpoints = Checkpoints(tmp_path / "deep" / "checkpoints")
    checkpoints.save(7, state, Iterator(position), {"identity": IDENTITY, "commit": "abc"})
    checkpoints.close()
    found, step, meta = Checkpoints(tmp_path / "deep" / "checkpoints").restore(
        abstract(make_state(0)), iterator, IDENTITY
    )
    assert same(found, state) and step == 7 and iterator.state == position
    assert meta["commit"] == "abc" and meta["step"] == 7 and "jax" in meta["versions"]


def test_without_iterator_and_average(tmp_path):
    state = make_state(1, ema=False)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, None, {"identity": {}})
    checkpoints.close()
    iterator = Iterator()
    found, _, _ = Checkpoints(tmp_path).restore(abstract(state), iterator, {})
    assert same(found, state) and found.ema is None and iterator.state == {"global_next_index": 0}


def test_nothing_saved(tmp_path):
    assert restored(tmp_path / "none") is None and Checkpoints(tmp_path / "none").latest() is None
    assert not (tmp_path / "none").exists()


def test_state_may_be_donated_while_it_is_saved(tmp_path):
    advance = jax.jit(lambda x: x + 1, donate_argnums=0)
    array, checkpoints = advance(jnp.zeros((512, 1024))), Checkpoints(tmp_path)
    for step in (1, 2):
        value = float(array[0, 0])
        checkpoints.save(step, {"params": array}, None, {"identity": {}})
        for _ in range(3):
            array = advance(array)
        array.block_until_ready()
        target = {"params": jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)}
        checkpoints.wait()
        found = Checkpoints(tmp_path).restore(target, None, {})[0]["params"]
        assert float(found.min()) == float(found.max()) == value
    checkpoints.close()


def test_restore_on_another_mesh(tmp_path):
    def mesh(*shape):
        return jax.make_mesh(
            shape,
            ("data", "fsdp"),
            axis_types=(AxisType.Auto,) * 2,
            devices=jax.devices()[: np.prod(shape)],
        )

    values = jnp.arange(64.0).reshape(8, 8)
    place = NamedSharding(mesh(4, 2), P("data", "fsdp"))
    state = {
        "params": {"w": jax.device_put(values, place)},
        "step": jax.device_put(jnp.int32(3), NamedSharding(mesh(4, 2), P())),
    }
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state, None, {"identity": {}})
    checkpoints.close()
    for other, spec in (
        (mesh(2, 4), P("fsdp", "data")),
        (mesh(8, 1), P(None, "data")),
        (mesh(1, 1), P()),
    ):
        target = NamedSharding(other, spec)
        shapes = {"params": {"w": target}, "step": NamedSharding(other, P())}
        shapes = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            state,
            shapes,
        )
        found, _, _ = Checkpoints(tmp_path).restore(shapes, None, {})
        assert found["params"]["w"].sharding == target and np.array_equal(
            found["params"]["w"], values
        )
        params = checkpoint.load_params(tmp_path, shapes["params"], collection="params")
        assert params["w"].sharding == target and np.array_equal(params["w"], values)


# Saving.


def test_keeps_the_newest_and_tidies_what_kills_left(tmp_path):
    for name in ("3.orbax-checkpoint-tmp", "2.deleting", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    saved(tmp_path, 1, 2, 4, 5, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {
        "4",
        "4.sha256.json",
        "5",
        "5.sha256.json",
        "notes",
    }
    with pytest.raises(UserError, match="at least 2"):
        Checkpoints(tmp_path, keep=1)


def test_saving_what_was_restored_does_nothing_but_another_step_is_refused(tmp_path):
    saved(tmp_path, 1, 2)
    before = listing(tmp_path)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.restore(abstract(make_state(0)), None, IDENTITY)
    checkpoints.save(2, make_state(2), None, {"identity": IDENTITY})
    checkpoints.close()
    assert listing(tmp_path) == before
    with pytest.raises(UserError, match="2 exists already"):
        Checkpoints(tmp_path).save(2, make_state(9), None, {"identity": IDENTITY})
    assert listing(tmp_path) == before


# of TensorStore; filtered outside of pytest
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("room", [0, 2000])
def test_full_disk_leaves_the_checkpoint_before(tmp_path, room):
    saved(tmp_path, 1)
    before = listing(tmp_path)
    checkpoints = Checkpoints(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(
            UserError, match=r"step 2 could not be written under .*: File too large"
        ) as caught:
            checkpoints.save(2, make_state(2, width=4096), None, {"identity": IDENTITY})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpoints.close()
    assert "\n" not in str(caught.value)
    assert {name: text for name, text in listing(tmp_path).items() if "tmp" not in name} == before
    assert restored(tmp_path)[1] == 1


def test_seal_that_cannot_be_written_is_an_error_too(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(seal, "seal", full)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), None, {"identity": IDENTITY})
    with pytest.raises(UserError, match="No space left"):
        checkpoints.wait()
    with pytest.raises(UserError, match="1 exists already"):  # it is not taken for saved
        checkpoints.save(1, make_state(1), None, {"identity": IDENTITY})
    checkpoints.close()


def test_place_that_is_no_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        Checkpoints(tmp_path / "file" / "checkpoints").save(
            1, make_state(1), None, {"identity": IDENTITY}
        )


# Damage.


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "bit flipped in data": (lambda step: flip(files_of(step)[0]), "SHA-256"),
    "bit flipped in meta": (lambda step: flip(step / "meta" / "metadata"), "SHA-256"),
    "truncated": (lambda step: os.truncate(files_of(step)[0], 100), "bytes and not"),
    "file deleted": (lambda step: files_of(step)[0].unlink(), "is missing"),
    "item deleted": (lambda step: shutil.rmtree(step / "state"), "state is missing"),
    "emptied": (lambda step: (shutil.rmtree(step), step.mkdir()), "it is empty"),
    "seal deleted": (lambda step: step.with_name("3.sha256.json").unlink(), "no seal"),
    "seal torn": (lambda step: os.truncate(step.with_name("3.sha256.json"), 60), "cannot be read"),
    "seal of another kind": (
        lambda step: step.with_name("3.sha256.json").write_text('{"files": []}'),
        "cannot be read",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_falls_back_by_name_and_loses_nothing(tmp_path, kind, caplog):
    harm, reason = DAMAGE[kind]
    saved(tmp_path, 1, 2, 3)
    harm(tmp_path / "3")
    before = listing(tmp_path)
    iterator, checkpoints = Iterator(), Checkpoints(tmp_path)
    with caplog.at_level(logging.WARNING):
        state, step, _ = checkpoints.restore(abstract(make_state(0)), iterator, IDENTITY)
    assert same(state, make_state(2)) and step == 2 and iterator.state == {"global_next_index": 2}
    skipped, taken = [record.getMessage() for record in caplog.records]
    assert str(tmp_path / "3") in skipped and reason in skipped and str(tmp_path / "2") in taken
    assert "\n" not in skipped
    assert sorted(listing(tmp_path).values()) == sorted(before.values())  # moved, not deleted
    assert not (tmp_path / "3").exists() and (tmp_path / "3.damaged").is_dir()
    # the same number again
    checkpoints.save(3, make_state(3, seed=1), iterator, {"identity": IDENTITY})
    checkpoints.close()
    state, step, _ = restored(tmp_path)
    assert step == 3 and same(state, make_state(3, seed=1)) and (tmp_path / "3.damaged").is_dir()


def test_every_file_counts(tmp_path):
    saved(tmp_path, 1)
    for path in (tmp_path / "1").rglob("*"):
        if path.is_file() and path.stat().st_size:
            data = path.read_bytes()
            flip(path)
            assert Checkpoints(tmp_path).latest() is None, path
            path.write_bytes(data)
            os.utime(path)  # a clock that ticks in milliseconds may not have moved since
    assert Checkpoints(tmp_path).latest() == 1


def test_damaged_twice_keeps_both(tmp_path):
    saved(tmp_path, 1)
    for _ in range(2):
        checkpoints = Checkpoints(tmp_path)
        checkpoints.restore(abstract(make_state(0)), None, IDENTITY)
        checkpoints.save(3, make_state(3), None, {"identity": IDENTITY})
        checkpoints.close()
        flip(files_of(tmp_path / "3")[0])
    assert restored(tmp_path)[1] == 1
    for name in ("3.damaged", "3.damaged.sha256.json", "3.damaged.1", "3.damaged.1.sha256.json"):
        assert (tmp_path / name).exists()


def test_all_damaged_is_an_error_and_changes_nothing(tmp_path):
    saved(tmp_path, 1, 2)
    flip(files_of(tmp_path / "1")[0])
    files_of(tmp_path / "2")[0].unlink()
    (tmp_path / "9").mkdir()
    before = listing(tmp_path)
    with pytest.raises(UserError, match=f"no checkpoint under {tmp_path} is good") as caught:
        restored(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no good checkpoint"):
        checkpoint.identity_of(tmp_path)
    assert listing(tmp_path) == before and (tmp_path / "9").is_dir()


@pytest.mark.parametrize("steps", [(), (1, 2)])
def test_strange_names_do_not_confuse(tmp_path, steps):
    saved(tmp_path, *steps)
    for name in (
        "9",
        "9.orbax-checkpoint-tmp",
        "11.orbax-checkpoint-tmp-17",
        "12.damaged",
        "best",
        "007",
        "-3",
    ):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "15").touch()
    (tmp_path / "16.sha256.json").touch()
    assert Checkpoints(tmp_path).latest() == max(steps, default=None)
    checkpoints = Checkpoints(tmp_path)
    found = checkpoints.restore(abstract(make_state(0)), None, IDENTITY)
    assert (found and found[1]) == (2 if steps else None)
    for step in (5, 9, 16):
        checkpoints.save(step, make_state(step), None, {"identity": IDENTITY})
    checkpoints.close()
    assert restored(tmp_path)[1] == 16


def test_a_step_under_another_number_is_not_taken(tmp_path, caplog):
    """Renamed with its seal it would be the newest for ever."""
    saved(tmp_path, 1, 2)
    (tmp_path / "2").rename(tmp_path / "999")
    (tmp_path / "2.sha256.json").rename(tmp_path / "999.sha256.json")
    assert Checkpoints(tmp_path).latest() == 1
    assert restored(tmp_path)[1] == 1
    assert "999 skipped: its seal is of step 2: it was renamed" in caplog.text
    assert (tmp_path / "999.damaged").is_dir() and (tmp_path / "999.damaged.sha256.json").exists()


def test_a_seal_that_names_no_step_is_taken(tmp_path):
    saved(tmp_path, 1)
    path = tmp_path / "1.sha256.json"
    path.write_text(json.dumps({"files": json.loads(path.read_text())["files"]}))
    assert Checkpoints(tmp_path).latest() == 1


def test_a_step_without_a_seal_says_its_number_itself(tmp_path):
    saved(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / f"{step}.sha256.json").unlink()
    (tmp_path / "2").rename(tmp_path / "999")
    assert restored(tmp_path)[1] == 1


def test_what_a_kill_left_half_deleted_goes_at_the_next_start(tmp_path):
    saved(tmp_path, 1, 2, 3)
    for name in ("1.deleting", "0.deleting", "4.orbax-checkpoint-tmp-17", "x.deleting"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    shutil.rmtree(tmp_path / "1")  # the kill came before its seal was deleted
    assert restored(tmp_path)[1] == 3
    seals = {"2.sha256.json", "3.sha256.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"2", "3", "x.deleting", *seals}


def test_first_save_killed_before_its_seal_is_taken_and_sealed(tmp_path, caplog):
    saved(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / f"{step}.sha256.json").unlink()
    # complete by the names of its items, but it does not restore
    shutil.rmtree(tmp_path / "2" / "state" / "d")
    assert restored(tmp_path)[1] == 1
    assert "does not restore" in caplog.text
    assert (tmp_path / "1.sha256.json").exists() and Checkpoints(tmp_path).latest() == 1


# A newer version's.


def newer(directory, step, number=2):
    """Makes a step one of another format, sealed as it is."""
    path = directory / str(step) / "meta" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": number}))
    seal.seal(directory, step)


def test_a_checkpoint_of_a_newer_version_is_refused_and_nothing_is_changed(tmp_path):
    """It is not damaged: to pass over it would go back in time, and move it aside."""
    saved(tmp_path, 1, 2)
    newer(tmp_path, 2)
    before = listing(tmp_path)
    wanted = abstract(make_state(0)).params
    for read in (
        lambda: restored(tmp_path),
        lambda: checkpoint.load_params(tmp_path, wanted),
        lambda: checkpoint.check_start(tmp_path, make_state(5).params),
        lambda: checkpoint.warm_start(tmp_path, make_state(5).params),
    ):
        with pytest.raises(UserError, match=r"/2 was saved by a newer version .*format 2; .* 1\)"):
            read()
    assert listing(tmp_path) == before


def test_a_checkpoint_that_names_no_format_is_of_the_first(tmp_path):
    saved(tmp_path, 1)
    path = tmp_path / "1" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    assert meta.pop("format") == 1
    path.write_text(json.dumps(meta))
    seal.seal(tmp_path, 1)
    assert restored(tmp_path)[1] == 1


# Identity and shapes.


def test_another_identity_is_refused_by_names(tmp_path):
    saved(tmp_path, 1, 2)
    before = listing(tmp_path)
    new = {"model": {"width": 16, "heads": [2, 2], "depth": 3}, "data": "shapes"}
    with pytest.raises(UserError, match=r'model.depth: "absent" -> 3; model.width: 8 -> 16\)'):
        restored(tmp_path, new)
    with pytest.raises(
        UserError, match=r'data: "shapes" -> "other"; k00: .*; k08: "absent" -> 8; and 4 more'
    ):
        restored(tmp_path, IDENTITY | {"data": "other"} | {f"k{i:02}": i for i in range(13)})
    assert listing(tmp_path) == before
    assert (
        restored(tmp_path, {"data": "shapes", "model": {"heads": [2, 2], "width": np.int32(8)}})[1]
        == 2
    )


def test_an_identity_of_before_is_compared_in_its_present_form(tmp_path):
    saved(tmp_path, 1)
    new = {"model": {"width": 8, "heads": (2, 2), "depth": 1}, "source": "shapes"}

    def former(saved):
        return {"model": {"depth": 1, **saved["model"]}, "source": saved["data"]}

    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(abstract(make_state(0)), None, new, former=former)[1] == 1
    other = {**new, "source": "other"}
    with pytest.raises(
        UserError, match=r'is of another model or data \(source: "shapes" -> "other"\)'
    ):
        Checkpoints(tmp_path).restore(abstract(make_state(0)), None, other, former=former)


def test_weights_alone_are_no_state_to_go_on_from(tmp_path):
    """Of an imported encoder whose train.steps were raised."""
    checkpoints = Checkpoints(tmp_path / "encoder" / "checkpoints")
    checkpoints.save(3, {"ema": make_state(1).ema}, None, {"identity": {}})
    checkpoints.close()
    with pytest.raises(UserError, match=r"3 has weights only.*train.init_from=.*encoder$"):
        Checkpoints(tmp_path / "encoder" / "checkpoints").restore(
            abstract(make_state(0)), None, {"crops": {"all": 1}}
        )


def test_another_shape_is_refused_by_names(tmp_path):
    saved(tmp_path, 1)
    with pytest.raises(UserError, match=r"params\.dense\.kernel is \(16, 8\) and not \(16, 9\)"):
        Checkpoints(tmp_path).restore(abstract(make_state(0, width=9)), None, IDENTITY)
    with pytest.raises(UserError, match=r"ema\.dense\.bias has no place here"):
        Checkpoints(tmp_path).restore(abstract(make_state(0, ema=False)), None, IDENTITY)
    half = abstract(jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_state(0).params))
    with pytest.raises(
        UserError, match="float32 and not bfloat16"
    ):  # a cast would not be the same run
        Checkpoints(tmp_path).restore(
            dataclasses.replace(abstract(make_state(0)), params=half), None, IDENTITY
        )


# Downstream.


def test_load_params(tmp_path):
    saved(tmp_path, 1, 2)
    wanted = abstract(make_state(0)).params
    assert same(checkpoint.load_params(tmp_path, wanted), make_state(2).ema)
    assert same(checkpoint.load_params(tmp_path, wanted, collection="params"), make_state(2).params)
    assert same(checkpoint.load_params(tmp_path, wanted, step=1), make_state(1).ema)
    # no sharding: the first device
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), wanted)
    assert same(
        checkpoint.load_params(tmp_path, half),
        jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_state(2).ema),
    )
    with pytest.raises(UserError, match=r"dense\.bias is \(8,\) and not \(9,\)"):
        checkpoint.load_params(tmp_path, abstract(make_state(0, width=9)).params)
    with pytest.raises(UserError, match="more.* is not in the checkpoint"):
        checkpoint.load_params(tmp_path, wanted | {"more": wanted["list"]})
    with pytest.raises(UserError, match="dense.kernel has no place"):
        checkpoint.load_params(tmp_path, {"list": wanted["list"]})
    with pytest.raises(UserError, match="no good checkpoint of step 5"):
        checkpoint.load_params(tmp_path, wanted, step=5)
    with pytest.raises(UserError, match="train this step first"):
        checkpoint.load_params(tmp_path / "none", wanted)


def test_load_params_falls_back_and_identity_tells(tmp_path, caplog):
    saved(tmp_path, 1, 2)
    two = checkpoint.identity_of(tmp_path)
    assert two == checkpoint.identity_of(tmp_path) and len(two) == 16
    flip(files_of(tmp_path / "2")[0])
    before = listing(tmp_path)
    assert same(checkpoint.load_params(tmp_path, abstract(make_state(0)).params), make_state(1).ema)
    assert str(tmp_path / "2") in caplog.text
    assert checkpoint.identity_of(tmp_path) != two
    with pytest.raises(UserError, match="step 2 .*SHA-256"):
        checkpoint.load_params(tmp_path, abstract(make_state(0)).params, step=2)
    assert listing(tmp_path) == before  # reading moves nothing


def test_no_average(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1, ema=False), None, {"identity": {}})
    checkpoints.close()
    with pytest.raises(UserError, match="no 'ema'.*collection='params'"):
        checkpoint.load_params(tmp_path, abstract(make_state(0)).params)
    assert same(checkpoint.warm_start(tmp_path, make_state(5).params), make_state(1).params)


def test_warm_start(tmp_path, caplog):
    saved(tmp_path / "checkpoints", 1, 2)
    fresh = make_state(5).params
    assert same(checkpoint.warm_start(tmp_path, fresh), make_state(2).ema)
    more = fresh | {"cross": {"kernel": jnp.full(3, 7.0)}}
    found = checkpoint.warm_start(tmp_path, more, new=(r"cross\..*",))
    assert same({key: found[key] for key in fresh}, make_state(2).ema) and np.array_equal(
        found["cross"]["kernel"], [7, 7, 7]
    )
    assert "cross.kernel" in caplog.text
    for params, new, words in (
        (more, (), "cross.kernel is not in the checkpoint"),
        (more, ("kernel",), "'kernel' names no parameter"),  # a whole name
        ({"list": fresh["list"]}, (), "dense.bias has no place"),
        (make_state(5, width=9).params, (".*",), "dense.kernel is"),
        (more, ("cross.*", "crss.*"), "init_new: 'crss.*' names no parameter of this model"),
        (more, ("cross(",), r"init_new: 'cross\(' is an invalid regular expression"),
    ):
        with pytest.raises(UserError, match=words):
            checkpoint.warm_start(tmp_path, params, new=new)
    with pytest.raises(
        UserError,
        match="init_from=.*elsewhere: no good checkpoint .*; give the folder of a trained step",
    ):
        checkpoint.warm_start(tmp_path / "elsewhere", fresh)


# What is hashed, and when.


@pytest.fixture
def hashed(monkeypatch):
    """The files hashed since it was asked last."""
    names, of_file = [], checksum.of_file

    def counted(path):
        names.append(pathlib.Path(path).name)
        return of_file(path)

    def since():
        found = sorted(names)
        names.clear()
        return found

    monkeypatch.setattr(checksum, "of_file", counted)
    return since


def test_a_step_is_hashed_once_and_again_when_it_changes(tmp_path, hashed, monkeypatch):
    saved(tmp_path, 1)
    every = sorted(path.name for path in (tmp_path / "1").rglob("*") if path.is_file())
    assert hashed() == every  # for its seal

    def read():
        checkpoint.load_params(tmp_path, abstract(make_state(0)).params)
        checkpoint.warm_start(tmp_path, make_state(5).params)
        return restored(tmp_path)

    read()
    assert hashed() == []  # by the process that wrote it
    monkeypatch.setattr(seal, "_hashed", {})  # as in another process
    identity = checkpoint.identity_of(tmp_path)
    checkpoint.check_start(tmp_path, make_state(5).params)
    assert hashed() == []
    read()
    assert hashed() == every
    os.utime(files_of(tmp_path / "1")[0], ns=(0, 0))
    read()
    assert hashed() == every
    assert checkpoint.identity_of(tmp_path) == identity and hashed() == []


def test_sizes_alone_do_not_make_a_damaged_step_a_start(tmp_path, monkeypatch):
    """What `check_start` cannot read it hashes, and `warm_start` hashes what it reads."""
    saved(tmp_path, 1, 2)
    flip(files_of(tmp_path / "2")[0])
    fresh = make_state(5).params
    assert checkpoint.check_start(tmp_path, fresh)[0].name == "2"
    assert same(checkpoint.warm_start(tmp_path, fresh), make_state(1).ema)
    assert checkpoint.check_start(tmp_path, fresh)[0].name == "1"  # it is known now
    monkeypatch.setattr(seal, "_hashed", {})
    (meta,) = (tmp_path / "2" / "meta").rglob("metadata")
    meta.write_text("{" * meta.stat().st_size)
    assert checkpoint.check_start(tmp_path, fresh)[0].name == "1"


SEVERAL = """
import json, pathlib, sys, time
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import multihost_utils
from dlc_jax import checkpoint, checksum, parallel
from dlc_jax.checkpoint import seal
from dlc_jax.hosts import agreement, cluster

cluster.join()
directory, me, names, of_file = pathlib.Path(sys.argv[1]), jax.process_index(), [], checksum.of_file
checksum.of_file = lambda path: (names.append(str(path.relative_to(directory))), of_file(path))[1]

def hashed():
    found = sorted(names)
    names.clear()
    return found

mesh = parallel.make_mesh()
place = jax.sharding.NamedSharding(mesh, parallel.BATCH)
values = np.arange(2**16, dtype=np.float32).reshape(2, -1)
w = jax.make_array_from_callback(values.shape, place, lambda index: values[index])
state = {"params": {"w": w}}
abstract = {"params": {"w": jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=w.sharding)}}

checkpoints = checkpoint.Checkpoints(directory)
for step in (1, 2):
    checkpoints.save(step, state, None, {"identity": {}})
checkpoints.close()
told = {"sealed": hashed()}
seal._hashed.clear()
found = [agreement.gather("rounds", me * 10 + number) for number in range(12)]  # "1" begins "11"
assert found == [[number, 10 + number] for number in range(12)], found
if me == 0:
    files = [path for path in (directory / "2" / "state").rglob("*") if path.is_file()]
    data = max(files, key=lambda path: path.stat().st_size)
    data.write_bytes(bytes(byte ^ 1 for byte in data.read_bytes()))
if me == 1:
    time.sleep(1)  # nobody gives up
agreement.meet("damaged")
params = checkpoint.load_params(directory, abstract["params"], collection="params")
assert all((part.data == values[part.index]).all() for part in params["w"].addressable_shards)
told["loaded"] = hashed()
told["identity"] = checkpoint.identity_of(directory)  # all know what one has seen
restored, step, _ = checkpoint.Checkpoints(directory).restore(abstract, None, {})
told["restored"], told["step"] = hashed(), step
print(json.dumps(told))
"""


def test_two_processes_hash_a_share_each_and_agree(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    usual = os.environ | {
        "XLA_FLAGS": "",
        "PYTHONPATH": str(pathlib.Path(__file__).resolve().parents[1]),
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
    }
    command, pipe = [sys.executable, "-c", SEVERAL, str(tmp_path)], subprocess.PIPE
    started = [
        subprocess.Popen(
            command, env=usual | {"JAX_PROCESS_ID": str(p)}, stdout=pipe, stderr=pipe, text=True
        )
        for p in range(2)
    ]
    ended = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    one, two = (json.loads(out.splitlines()[-1]) for out, _ in ended)
    sealed = {
        step: json.loads((tmp_path / f"{step}.sha256.json").read_text())
        for step in ("1", "2.damaged")
    }
    files = {
        step[0]: sorted(f"{step[0]}/{name}" for name in facts["files"])
        for step, facts in sealed.items()
    }
    both = sorted(files["1"] + files["2"])
    for what in ("sealed", "loaded"):
        assert sorted(one[what] + two[what]) == both and abs(len(one[what]) - len(two[what])) <= 2
    assert one["restored"] == two["restored"] == [] and one["step"] == two["step"] == 1
    assert one["identity"] == two["identity"] == checkpoint.identity_of(tmp_path)
    assert seal.altered(tmp_path, 1) is None  # what the processes sealed together is true


# Kills, in processes of their own.

CHILD = """
import resource, sys, jax, jax.numpy as jnp, numpy as np
from dlc_jax.checkpoint import Checkpoints
from dlc_jax.errors import UserError

class Iterator:
    def get_state(self): return {"next": self.next}
    def set_state(self, state): self.next = state["next"]

def value(step):
    return {"params": jnp.arange(2**20, dtype=jnp.float32) + step, "step": jnp.int32(step)}

def shape(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

last, iterator, checkpoints = int(sys.argv[2]), Iterator(), Checkpoints(sys.argv[1])
abstract = jax.tree.map(shape, value(0))
found = checkpoints.restore(abstract, iterator, {})
first = found[1] if found else 0
if found:
    assert iterator.next == first
    assert jax.tree.all(jax.tree.map(np.array_equal, found[0], value(first)))
print("from", first, flush=True)
for step in range(first + 1, last + 1):
    iterator.next = step
    if len(sys.argv) > 3:  # a disk with room for so many bytes per file
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
    try:
        checkpoints.save(step, value(step), iterator, {"identity": {}})
        if len(sys.argv) > 3:
            checkpoints.wait()
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(2)
    print("saving", step, flush=True)
checkpoints.close()
print("end", flush=True)
"""


def child(directory, last, *room):
    environment = os.environ | {
        "XLA_FLAGS": "",
        "PYTHONPATH": str(pathlib.Path(__file__).resolve().parents[1]),
    }
    command = [sys.executable, "-c", CHILD, str(directory), str(last), *map(str, room)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_kill_9_while_saving(tmp_path):
    draw, before = random.Random(0), 0
    for _ in range(4):
        process = child(tmp_path, 10**6)
        first = int(process.stdout.readline().split()[1])
        assert first >= before  # nothing that was restored once is ever lost
        before = first
        for _ in range(draw.randint(2, 5)):
            process.stdout.readline()
        time.sleep(draw.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        _, error = process.communicate()
        assert "Error" not in error, error
    last = max(seal.steps(tmp_path)) + 2
    out, error = child(tmp_path, last).communicate(timeout=60)
    assert out.splitlines()[-1] == "end", error
    assert all(
        "skipped: it has no seal" in line or "going on from" in line for line in error.splitlines()
    ), error
    assert [
        step
        for step in seal.steps(tmp_path)
        if not (seal.damage(tmp_path, step) or seal.altered(tmp_path, step))
    ] == [last, last - 1]
    assert not [path for path in tmp_path.iterdir() if "tmp" in path.name]


@pytest.mark.parametrize("room", [0, 2000])
def test_full_disk_is_one_line_and_the_process_ends(tmp_path, room):
    """Orbax's own threads and tracebacks outlive a failed save.

    Then the same command goes on where there is room.
    """
    assert child(tmp_path, 1).wait(60) == 0
    process = child(tmp_path, 2, room)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out, error.count("\n")) == (
        2,
        "from 1\n",
        1,
    ) and "File too large" in error, error
    out, error = child(tmp_path, 2).communicate(timeout=60)
    assert out == "from 1\nsaving 2\nend\n" and error == ""


def test_console_stays_clean(tmp_path):
    """Also with the set-up of logging that a command line makes."""
    code = f"""
import jax.numpy as jnp
from absl import logging
logging.use_absl_handler(); logging.set_verbosity(logging.INFO)
from dlc_jax.checkpoint import Checkpoints
checkpoints = Checkpoints({str(tmp_path)!r})
for step in (1, 2, 3):
    checkpoints.save(step, {{"a": jnp.ones(3)}}, None, {{"identity": {{}}}})
checkpoints.close()
Checkpoints({str(tmp_path)!r}).latest()
"""
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, cwd=root
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_seal_lists_every_file(tmp_path):
    saved(tmp_path, 1)
    files = json.loads((tmp_path / "1.sha256.json").read_text())["files"]
    sizes = {name: len(text) for name, text in listing(tmp_path / "1").items()}
    assert {name: size for name, (size, _) in files.items()} == sizes
