"""Object stores: what is sent and fetched, in which order, who may write, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
import time

import fsspec
import jax.numpy as jnp
import numpy as np
import pytest
from buckets import KINDS, bucket

from dlc_jax import remote, workdir
from dlc_jax.checkpoint import Checkpoints, clear, load_params
from dlc_jax.data import codes, files
from dlc_jax.data.code_writer import write
from dlc_jax.errors import UserError
from dlc_jax.remote import copies, lease
from dlc_jax.remote.store import Store, StoreError


@pytest.fixture(scope="module", params=KINDS)
def served(request):
    with bucket(request.param) as (url, _):
        yield url


@pytest.fixture
def url(served, tmp_path, monkeypatch):
    """A folder of its own in the bucket; copies are forgotten afterwards, as by another process."""
    monkeypatch.setenv("DLC_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setattr(copies, "_copies", {})
    return f"{served}/{tmp_path.name}"


def anew(url):
    """The copy of another process that starts now."""
    copies._copies.clear()
    return remote.local(url)


def names(url):
    return sorted(Store(url).versions())


# ---- the store


def test_objects_are_written_read_listed_and_removed(url, tmp_path):
    store = Store(url)
    assert store.versions() == {} and store.read("none") is None
    store.write({"a": b"one", "b/c.json": b"two", "b/d": b""})
    before = store.versions()
    assert {name: size for name, (size, _) in before.items()} == {"a": 3, "b/c.json": 3, "b/d": 0}
    assert sorted(store.versions("b")) == ["b/c.json", "b/d"]
    store.write({"a": b"six"})
    after = store.versions()
    assert after["a"] != before["a"] and after["b/d"] == before["b/d"]
    store.get(["a", "b/c.json"], tmp_path / "got")
    assert (tmp_path / "got/b/c.json").read_bytes() == b"two"
    (tmp_path / "got/a").write_bytes(b"x" * 1000)
    store.put(["a"], tmp_path / "got")
    assert store.read("a") == b"x" * 1000
    store.remove(["a", "absent", "b/d"])
    assert list(store.versions()) == ["b/c.json"]


def test_of_two_who_create_an_object_one_does(url):
    store, other = Store(url), Store(url)
    assert store.create("lock", b"mine")
    assert not other.create("lock", b"yours") and store.read("lock") == b"mine"


def test_what_cannot_be_reached_is_one_line(served, monkeypatch):
    scheme = served.partition(":")[0]
    with pytest.raises(StoreError, match=f"{scheme}://none/run: there is no such bucket; make it"):
        remote.local(f"{scheme}://none/run")
    with pytest.raises(UserError, match="ftp:// is unknown; known: gs://bucket/…, s3://bucket/…"):
        remote.local("ftp://bucket/run")
    with pytest.raises(UserError, match=f"names no bucket; give {scheme}://bucket/folder"):
        remote.local(f"{scheme}://")

    def absent(scheme):
        raise ImportError(scheme)

    monkeypatch.setattr(fsspec, "get_filesystem_class", absent)
    package = {"s3": "s3fs", "gs": "gcsfs"}[scheme]
    with pytest.raises(UserError, match=f"needs the package {package}: pip install {package}"):
        Store(f"{served}/run")


def test_no_credentials_is_one_line(monkeypatch):
    pytest.importorskip("s3fs")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("HOME", "/nonexistent")
    with pytest.raises(
        StoreError, match="s3://bucket/run cannot be reached .*credentials"
    ) as error:
        Store("s3://bucket/run").versions()
    assert "\n" not in str(error.value)


# ---- the copy


def test_what_is_new_is_sent_and_what_vouches_for_it_comes_last(url, monkeypatch):
    folder, order = remote.local(url), []
    put, wrote = Store.put, Store.write
    monkeypatch.setattr(
        Store, "put", lambda self, some, at: order.extend(some) or put(self, some, at)
    )
    monkeypatch.setattr(Store, "write", lambda self, some: order.extend(some) or wrote(self, some))
    for name in ("step/checkpoints/8.sha256.json", "step/checkpoints/8/state/d", "step/done.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "step/metrics.jsonl").write_text("1\n")
    (folder / "step/results.json.tmp").write_text("half")
    (folder / "step/checkpoints/9.orbax-checkpoint-tmp").mkdir()
    (folder / "step/checkpoints/9.orbax-checkpoint-tmp/d").write_text("half")
    remote.send(folder)
    assert order[2:] == ["step/checkpoints/8.sha256.json", "step/done.json"]
    assert sorted(order[:2]) == ["step/checkpoints/8/state/d", "step/metrics.jsonl"]
    order.clear()
    remote.send(folder)
    assert order == []
    with open(folder / "step/metrics.jsonl", "a") as file:
        file.write("2\n")
    remote.send(folder / "step")
    assert order == ["step/metrics.jsonl"] and Store(url).read(order[0]) == b"1\n2\n"
    shutil.rmtree(folder / "step")  # by whoever cleans temporary folders
    remote.send(folder)
    assert "step/done.json" in names(url)


def test_what_does_not_arrive_whole_is_an_error_before_its_seal(url, monkeypatch):
    folder, write = remote.local(url), Store.write
    cut = {"x": b"ab"}
    monkeypatch.setattr(Store, "write", lambda self, some: write(self, some | cut))
    for name in ("x", "done.json"):
        (folder / name).write_text("abc")
    with pytest.raises(StoreError, match="/x has 2 bytes after 3 were sent"):
        remote.send(folder)
    assert names(url) == ["x"]


def test_what_is_large_comes_when_it_is_asked_for(url):
    store = Store(url)
    store.write(
        {"a/checkpoints/8/d": b"1", "a/checkpoints/8.sha256.json": b"{}", "a/x.json": b"{}"}
    )
    store.write({"codes/train/c.arrayrecord": b"1", "codes/train/manifest.json": b"{}"})
    folder = remote.local(url)
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == [
        "8.sha256.json",
        "manifest.json",
        "x.json",
    ]
    assert (folder / "a/checkpoints/8").is_dir()
    remote.fetch(folder / "a/checkpoints/8", whole=True)
    remote.fetch(folder / "codes/train", whole=True)
    assert (folder / "a/checkpoints/8/d").exists()
    assert (folder / "codes/train/c.arrayrecord").exists()
    store.write({"a/x.json": b'{"changed": 1}'})
    store.remove(["codes/train/c.arrayrecord"])
    (folder / "mine").write_text("unsent")
    remote.fetch(folder, whole=True)
    assert json.loads((folder / "a/x.json").read_text()) == {"changed": 1}
    assert not (folder / "codes/train/c.arrayrecord").exists() and (folder / "mine").exists()


def test_what_is_removed_while_it_is_fetched_does_not_matter(url, monkeypatch):
    store, versions = Store(url), Store.versions
    store.write({"a": b"1", "b": b"2"})

    def listing(self, *prefix):
        found = versions(self, *prefix)
        self.remove(["b"])  # by another process
        return found

    monkeypatch.setattr(Store, "versions", listing)
    folder = remote.local(url)
    assert [path.name for path in folder.iterdir()] == ["a"]


def test_what_came_of_a_fetch_that_failed_is_not_sent_back(url, monkeypatch):
    store, get = Store(url), Store.get
    store.write({"a": b"1", "b": b"2"})
    folder = remote.local(url)

    def failing(self, names, place):
        get(self, names[:1], place)
        store.remove(names)  # by another process
        get(self, names, place)

    store.write({"c": b"3", "d": b"4"})
    monkeypatch.setattr(Store, "get", failing)
    remote.fetch(folder)
    remote.send(folder)
    assert names(url) == ["a", "b"] == sorted(path.name for path in folder.iterdir())


def test_a_folder_of_a_copy_is_in_it_and_messages_show_urls(url, tmp_path):
    folder = remote.local(url)
    assert remote.local(f"{url}/encoder") == folder / "encoder" and remote.is_copy(folder / "x/y")
    assert remote.shown(f"{folder}/encoder is damaged") == f"{url}/encoder is damaged"
    assert not remote.is_copy(tmp_path) and remote.local(tmp_path) == tmp_path
    for what in (remote.send, remote.fetch, remote.remove):
        what(tmp_path)


# ---- who may write


def test_a_second_run_is_refused_and_a_dead_one_outlived(url):
    store, quick = Store(url), {"renewed": 0.05, "dead": 4.0, "say": lambda line: None}
    held = lease.Lease(store, **quick)
    facts = json.loads(store.read(".lock"))
    with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on "):
        lease.Lease(Store(url), **quick)
    held._left.set()  # as if it were killed, or the machine gone
    held._thread.join()
    start = time.monotonic()
    after = lease.Lease(Store(url), **quick)
    assert time.monotonic() - start > 4.0
    after.release()
    assert store.read(".lock") is None
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=-1)
    store.write({".lock": json.dumps(facts | {"pid": int(ended.stdout)}).encode()})
    start = time.monotonic()
    lease.Lease(Store(url), **quick).release()  # killed on this machine: at once
    assert time.monotonic() - start < 4.0


def test_who_has_lost_the_right_writes_no_more(url):
    """It reads the lock before each write, and does not wait for its next sign of life."""
    folder = remote.local(url)
    with workdir.lock(folder):
        remote.send(folder)
        Store(url).write({".lock": b"another's"})
        (folder / "x").write_text("late")
        with pytest.raises(UserError, match="was taken over by another run"):
            remote.send(folder)
        with pytest.raises(UserError, match="was taken over by another run"):
            remote.remove(folder / "x")
    assert names(url) == [".lock"] and Store(url).read(".lock") == b"another's"


# ---- checkpoints and stores


def state(value):
    return {"params": {"w": jnp.full((64, 8), value, jnp.float32)}, "step": jnp.int32(value)}


def abstract():
    import jax

    return jax.eval_shape(lambda: state(0.0))


def saved(url, *steps, **retention):
    checkpoints = Checkpoints(anew(url) / "net" / "checkpoints", **retention)
    for step in steps:
        checkpoints.save(step, state(step), None, {"identity": {}})
    checkpoints.close()


def restored(url):
    found = Checkpoints(anew(url) / "net" / "checkpoints").restore(abstract(), None, {})
    return None if found is None else (found[1], float(found[0]["params"]["w"][0, 0]))


def test_checkpoints_are_saved_pruned_and_restored(url):
    assert restored(url) is None
    saved(url, 1, 2, 3, keep=2)
    there = names(url)
    assert {name.split("/")[2] for name in there} == {"2", "3", "2.sha256.json", "3.sha256.json"}
    assert restored(url) == (3, 3.0)
    params = load_params(f"{url}/net/checkpoints", abstract()["params"], collection="params")
    assert float(params["w"][0, 0]) == 3


def test_a_step_that_was_cut_short_or_altered_in_the_store_is_skipped_and_kept(url, caplog):
    saved(url, 1, 2, 3, keep=3)
    store = Store(url)
    store.remove(["net/checkpoints/3.sha256.json"])  # killed before it was sent
    array = max(
        (name for name in names(url) if name.startswith("net/checkpoints/2/")),
        key=lambda name: store.versions()[name][0],
    )
    content = bytearray(store.read(array))
    content[len(content) // 2] ^= 1
    store.write({array: bytes(content)})
    assert restored(url) == (1, 1.0)
    assert "3 skipped: it has no seal" in caplog.text and "SHA-256 differs" in caplog.text
    kept = {name.split("/")[2] for name in names(url)}
    assert {"1", "1.sha256.json", "2.damaged", "3.damaged"} <= kept and not {"2", "3"} & kept
    assert restored(url) == (1, 1.0)


@pytest.mark.parametrize("sent", ["no seal", "half", "no note"])
def test_a_first_step_that_was_cut_short_is_no_step(url, sent):
    """Killed while it was sent: the next run begins anew, and a reader does not seal it."""
    saved(url, 1)
    store = Store(url)
    store.remove(["net/checkpoints/1.sha256.json"])
    if sent == "half":
        store.remove([name for name in names(url) if name.endswith("manifest.ocdbt")])
    if sent != "no note":
        store.write({"net/checkpoints/1.begun": b"{}"})
    with pytest.raises(UserError, match="no good checkpoint"):
        load_params(f"{url}/net/checkpoints", abstract()["params"], collection="params")
    assert "net/checkpoints/1.sha256.json" not in names(url)
    clear(anew(url) / "net/checkpoints")
    assert Checkpoints(remote.local(url) / "net/checkpoints").restore(abstract(), None, {}) is None
    left = {name.split("/")[2] for name in names(url)}
    assert left == ({"1.damaged"} if sent == "no note" else set())
    saved(url, 1)
    assert restored(url) == (1, 1.0)


def test_what_was_pruned_by_halves_goes_at_the_next_start(url):
    removed = Store.remove
    with pytest.MonkeyPatch.context() as patch:  # killed before the end
        patch.setattr(Store, "remove", lambda self, some: removed(self, some[:1]))
        patch.setattr(remote, "end", lambda path: None)
        saved(url, 1, 2, 3, keep=2)
    assert "net/checkpoints/1.begun" in names(url)
    clear(anew(url) / "net/checkpoints")
    assert {name.split("/")[2] for name in names(url)} == {
        "2",
        "3",
        "2.sha256.json",
        "3.sha256.json",
    }


def test_a_save_that_cannot_be_sent_is_an_error(url, monkeypatch):
    saved(url, 1)
    checkpoints = Checkpoints(anew(url) / "net" / "checkpoints")
    assert checkpoints.restore(abstract(), None, {})[1] == 1

    def refused(self, *_):
        raise StoreError(f"{self.url}: access is denied")

    monkeypatch.setattr(Store, "put", refused)
    checkpoints.save(2, state(2), None, {"identity": {}})
    with pytest.raises(UserError, match="step 2 could not be written .*access is denied"):
        checkpoints.wait()
    monkeypatch.undo()
    assert not [name for name in names(url) if "2.sha256" in name]


def test_a_code_store_is_made_and_read(url):
    def encode(start, stop):
        return {"codes": np.arange(start, stop)[:, None] % 4 + np.zeros((1, 3), int)}

    about = {"total": 10, "positions": 3, "values": 4, "identity": "e", "shard_size": 4}
    folder = anew(url) / "codes/train"
    write(folder, encode, barrier=lambda: remote.fetch(folder, whole=True), **about)
    assert [name for name in names(url) if name.endswith(".json")] == ["codes/train/manifest.json"]
    remote.send(remote.local(url))
    assert [name for name in names(url) if name.endswith(".json")] == ["codes/train/manifest.json"]
    store = codes.CodeStore(anew(url) / "codes/train")
    assert np.array_equal(store.codes([5, 9])[:, 0], [1, 1])


def test_images_are_downloaded_once_and_again_when_they_change(url, tmp_path, capsys):
    from PIL import Image

    for name in "ab":
        Image.new("RGB", (8, 8), (9, 9, ord(name))).save(tmp_path / f"{name}.png")
    store = Store(f"{url}/pictures")
    store.put(["a.png"], tmp_path)
    seen = [len(files.scan(f"{url}/pictures", cache=tmp_path / "cache")) for _ in range(2)]
    assert seen == [1, 1] and capsys.readouterr().out.count("downloading") == 1
    store.put(["b.png"], tmp_path)
    assert len(files.scan(f"{url}/pictures", cache=tmp_path / "cache")) == 2
    with pytest.raises(UserError, match="GB, to be downloaded, and cache_gb allows 1e-09"):
        files.scan(f"{url}/pictures", cache=tmp_path / "cache", cache_gb=1e-9)
    with pytest.raises(UserError, match="no images: .*/none does not exist"):
        files.scan(f"{url}/none", cache=tmp_path / "cache")
    shutil.make_archive(tmp_path / "both", "zip", tmp_path, ".")
    Store(url).put(["both.zip"], tmp_path)
    assert len(files.scan(f"{url}/both.zip", cache=tmp_path / "cache")) >= 2
