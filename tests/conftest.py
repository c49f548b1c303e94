"""What every test stands on: eight simulated CPU devices, shapes checked at run time, and the few shared fixtures."""

import os

# Before jax starts. Eight devices so that every sharding test runs anywhere; a JAX_PLATFORMS set outside is respected.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()
# Tests compile much and compute little: without LLVM's optimizations the encoder's step compiles in half the time.
if "xla_backend_optimization_level" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"

import pathlib  # noqa: E402

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# The jaxtyping annotations of these rooms are checked at run time, in the tests only. Not of the whole package: elsewhere fields
# that are annotated as arrays also hold their abstract shapes. An int is accepted where a float is expected.
jaxtyping.install_import_hook(
    ["dlc_jax.models", "dlc_jax.diffusion", "dlc_jax.losses", "dlc_jax.kernels"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)


def pytest_collection_modifyitems(items):
    """Skips device tests, with the reason, where there is no device. Asking starts the backend: only if one was collected."""
    for item in items:
        if item.get_closest_marker("device") and jax.default_backend() == "cpu":
            item.add_marker(pytest.mark.skip(reason=f"no GPU or TPU with JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}"))


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real images and weights, `../shared/data` beside the checkout; skips where it is absent."""
    path = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no real data: {path} does not exist")
    return path


@pytest.fixture
def tmp_workdir(tmp_path) -> str:
    """A workdir that does not exist yet; a run makes it."""
    return str(tmp_path / "workdir")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Indexes and conversions of images go into a folder of this session, also those of subprocesses."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
