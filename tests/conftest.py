"""For every test: eight simulated CPU devices, one cache of compiled programs, checked shapes."""

import importlib.metadata
import os

# Before jax starts. Eight devices so that every sharding test runs anywhere; a JAX_PLATFORMS set
# outside is respected.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: without LLVM's optimizations and XLA's fusion emitters they
# compile in a third of the time.
FLAGS = {
    "xla_force_host_platform_device_count": 8,
    "xla_backend_optimization_level": 0,
}
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 12):
    FLAGS["xla_cpu_use_fusion_emitters"] = "false"  # later versions know no such flag, and end
given = os.environ.get("XLA_FLAGS", "")
added = (f"--{flag}={value}" for flag, value in FLAGS.items() if flag not in given)
os.environ["XLA_FLAGS"] = " ".join([given, *added]).strip()

import fcntl  # noqa: E402
import importlib.util  # noqa: E402
import json  # noqa: E402
import pathlib  # noqa: E402
import resource  # noqa: E402
import shutil  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402

# A program is compiled once a run, by the worker or the command that needs it first. The folder is
# the run's own, so that nothing of another version of the code, of jax or of a flag is ever found
# in it. Workers inherit it from the process that made it.
OWN_CACHE = "JAX_COMPILATION_CACHE_DIR" not in os.environ
if OWN_CACHE:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="dlc_jax_compiled_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import commands  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402
import turn  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[1]

# The jaxtyping annotations of these rooms are checked at run time, in the tests only. Not of the
# whole package: elsewhere fields that are annotated as arrays also hold their abstract shapes. An
# int is accepted where a float is expected. A machine with a device may lack the package.
if importlib.util.find_spec("beartype"):
    jaxtyping.install_import_hook(
        ["dlc_jax.models", "dlc_jax.diffusion", "dlc_jax.losses", "dlc_jax.kernels"],
        "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
    )


def pytest_addoption(parser):
    parser.addoption(
        "--costs",
        metavar="FILE",
        help="append what each test cost, a line of JSON a test: see benchmarks/budget.py",
    )


def pytest_collection_modifyitems(items):
    """Skips device tests where there is no device, and moves those marked `alone` to the end."""
    for item in items:
        # asking starts the backend
        if item.get_closest_marker("device") and jax.default_backend() == "cpu":
            reason = f"no GPU or TPU with JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}"
            item.add_marker(pytest.mark.skip(reason=reason))
    items.sort(key=lambda item: item.get_closest_marker("alone") is not None)


def pytest_configure(config):
    if config.option.costs:
        config.option.costs = os.path.abspath(config.option.costs)
        os.makedirs(os.path.dirname(config.option.costs), exist_ok=True)
        jax.monitoring.register_event_duration_secs_listener(_compiled)


def pytest_sessionstart(session):
    session.started = time.monotonic()


def pytest_sessionfinish(session):
    workers = os.environ.get("PYTEST_XDIST_WORKER_COUNT")
    workers = int(workers or getattr(session.config.option, "numprocesses", None) or 1)
    if session.config.option.costs and not hasattr(session.config, "workerinput"):
        _note(session.config, {"session_s": time.monotonic() - session.started, "workers": workers})


def pytest_unconfigure(config):
    if OWN_CACHE:  # a worker found it in its environment
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


# ---- what a test costs

_spent = {"compiles": 0, "compile_s": 0.0}


def _compiled(event, seconds, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        _spent["compiles"] += 1
        _spent["compile_s"] += seconds


def _costs():
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    cpu = sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, whose))
    return {"wall_s": time.monotonic(), "cpu_s": cpu, **_spent}


def _note(config, costs):
    with open(config.option.costs, "a") as file:
        file.write(json.dumps(costs) + "\n")


@pytest.hookimpl(wrapper=True, tryfirst=True)  # a test's time limit begins with its turn
def pytest_runtest_protocol(item):
    """Notes what the test and its fixtures cost. Beside a test marked `alone` no other runs."""
    folder = _run_folder(item.config) if "PYTEST_XDIST_WORKER" in os.environ else None
    with turn.taken(folder, alone=item.get_closest_marker("alone") is not None):
        before = _costs()
        result = yield
        if item.config.option.costs:
            after = {key: round(value - before[key], 3) for key, value in _costs().items()}
            is_slow = item.get_closest_marker("slow") is not None
            _note(item.config, {"test": item.nodeid, "slow": is_slow, **after})
    return result


def _run_folder(config):
    """The temporary folder that the workers of this run share."""
    own = config._tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


# ---- fixtures


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real images and weights, `../shared/data`; skips where it is absent."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no real data: {path} does not exist")
    return path


@pytest.fixture
def tmp_workdir(tmp_path) -> str:
    """A workdir that does not exist yet; a run makes it."""
    return str(tmp_path / "workdir")


@pytest.fixture(autouse=True)
def own_cache(pytestconfig, monkeypatch):
    """Indexes and conversions of images, of subprocesses too, go into a folder of this run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(_run_folder(pytestconfig) / "cache"))


@pytest.fixture(scope="session")
def once(pytestconfig):
    """(name, make) -> a folder that `make` has filled in the first worker that asked.

    All workers read it; a test that changes it takes a copy.
    """

    def made(name, make):
        folder = _run_folder(pytestconfig) / name
        with open(folder.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the other workers wait here
            if not folder.with_suffix(".made").exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                folder.with_suffix(".made").touch()
        return folder

    return made


@pytest.fixture(scope="session")
def quickstart(once) -> pathlib.Path:
    """The quickstart's `:tiny`, complete: its workdir `run`, and the command's `out` and `err`."""

    def make(folder):
        done = subprocess.run(**commands.train(folder / "run"), timeout=800)
        assert done.returncode == 0, done.stderr
        (folder / "out").write_text(done.stdout)
        (folder / "err").write_text(done.stderr)

    return once("quickstart", make)
