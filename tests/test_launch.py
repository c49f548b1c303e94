"""launch/local.sh and .ci/run, with stand-ins for python and uv that log what they are asked.

Nothing is downloaded. `.ci/run` itself is the test of the true install.
"""

import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOOLS = "bash cat cksum chmod dirname echo env find mkdir rm sleep touch true"

# Stands in for every python: answers the version probe, makes an environment, logs installs.
PYTHON = r"""#!/usr/bin/env bash
case "$*" in
  *version_info*) [[ -n "${FAKE_OLD-}" ]] || echo "$FAKE_BIN/python3" ;;
  *flock*) exec "$REAL_PYTHON" "$@" ;;
  "-m venv"*)
    echo "$*" >>"$FAKE_LOG"
    mkdir -p "$3/bin"; cat "$0" >"$3/bin/python"; chmod +x "$3/bin/python" ;;
  "-m ensurepip"*) ;;
  "-m pip"*) echo "$*" >>"$FAKE_LOG"; sleep "${FAKE_SECONDS-0}"; exit "${FAKE_FAILS-0}" ;;
esac
"""
UV = r"""#!/usr/bin/env bash
echo "uv $*" >>"$FAKE_LOG"
if [[ $1 == venv ]]; then
  for last; do :; done
  mkdir -p "$last/bin"; touch "$last/bin/python"; chmod +x "$last/bin/python"
fi
"""


class Clone:
    """A checkout with the launcher, and a PATH with the few tools that it may use."""

    def __init__(self, path):
        self.root, self.bin, self.log = path / "a clone", path / "bin", path / "log"
        for name in ("launch/local.sh", ".ci/run", "pyproject.toml"):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        self.bin.mkdir()
        for tool in TOOLS.split():
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.program("python3", PYTHON)
        self.log.touch()
        self.env = {
            "PATH": str(self.bin),
            "FAKE_BIN": str(self.bin),
            "FAKE_LOG": str(self.log),
            "REAL_PYTHON": sys.executable,
        }

    def program(self, name, text):
        path = self.bin / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def start(self, *command, program="launch/local.sh", cwd=None, **env):
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [self.root / program, *command],
            env=self.env | env,
            cwd=cwd,
            stdout=pipe,
            stderr=pipe,
            text=True,
        )

    def run(self, *command, **options):
        process = self.start(*command, **options)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def asked(self):
        """The installs asked for since the last call."""
        lines = self.log.read_text().splitlines()
        self.log.write_text("")
        return lines


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path)


def test_first_start_installs_and_the_next_does_nothing(clone):
    assert clone.run("echo", "two  words", "*")[:2] == (0, "two  words *\n")
    venv, pip = clone.asked()
    assert venv == f"-m venv {clone.root}/.venv"
    assert pip.startswith("-m pip install") and pip.endswith(f"-e {clone.root}[dev]")
    assert clone.run("echo", "x") == (0, "x\n", "")
    assert clone.asked() == []


@pytest.mark.alone
def test_a_later_start_adds_less_than_half_a_second(clone):
    clone.run("true")
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        clone.run("true")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5


def test_command_runs_in_the_environment_where_the_user_is(clone, tmp_path):
    code, out, _ = clone.run(
        "bash", "-c", "echo $PWD; echo $VIRTUAL_ENV; echo ${PATH%%:*}", cwd=tmp_path
    )
    assert (code, out.split("\n")[:3]) == (
        0,
        [str(tmp_path), f"{clone.root}/.venv", f"{clone.root}/.venv/bin"],
    )


@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_exit_code_is_the_commands(clone, code):
    assert clone.run("bash", "-c", f"exit {code}")[0] == code


def test_glibc_takes_huge_pages_unless_told_otherwise(clone):
    ask = "bash", "-c", 'echo "$GLIBC_TUNABLES"'
    assert clone.run(*ask)[1] == "glibc.malloc.hugetlb=1\n"
    assert clone.run(*ask, GLIBC_TUNABLES="glibc.malloc.perturb=1")[1] == "glibc.malloc.perturb=1\n"
    assert clone.run(*ask, GLIBC_TUNABLES="")[1] == "\n"


def test_signals_reach_the_command(clone):
    process = clone.start(
        "bash",
        "-c",
        "trap 'echo saved; exit 75' TERM; echo ready; for i in {1..200}; do sleep 0.05; done",
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert (process.communicate(timeout=30)[0], process.returncode) == ("saved\n", 75)


def test_uv_is_used_when_present_with_the_path_of_an_interpreter(clone):
    clone.program("uv", UV)
    assert clone.run("true")[0] == 0
    venv, install = clone.asked()
    assert (
        venv == f"uv venv --quiet --allow-existing --python {clone.bin}/python3 {clone.root}/.venv"
    )
    assert (
        install
        == f"uv pip install --quiet --python {clone.root}/.venv/bin/python -e {clone.root}[dev]"
    )


@pytest.mark.parametrize("change", ["pyproject", "extras"])
def test_a_change_is_installed_on_top(clone, change):
    clone.run("true")
    clone.asked()
    (clone.root / ".venv" / "kept").touch()
    if change == "pyproject":
        with (clone.root / "pyproject.toml").open("a") as file:
            file.write("# changed\n")
    extras = {"DLC_EXTRAS": "dev,torch"} if change == "extras" else {}
    assert clone.run("true", **extras)[0] == 0
    assert [line.split("[")[-1] for line in clone.asked()] == ["dev,torch]" if extras else "dev]"]
    assert (clone.root / ".venv" / "kept").exists()


def test_a_failed_install_is_said_and_made_again(clone):
    code, out, err = clone.run("echo", "x", FAKE_FAILS="1")
    assert (code, out) == (2, "") and "the next start tries again" in err
    (clone.root / ".venv" / "half").touch()
    clone.asked()
    assert clone.run("echo", "x")[:2] == (0, "x\n")
    assert len(clone.asked()) == 2 and not (clone.root / ".venv" / "half").exists()


def test_a_killed_install_is_made_again_after_its_last_process_ended(clone):
    process = clone.start("true", FAKE_SECONDS="1")
    while "-m pip" not in clone.log.read_text():
        time.sleep(0.02)
    process.kill()
    (clone.root / ".venv" / "half").touch()
    start = time.perf_counter()
    assert clone.run("echo", "x")[:2] == (0, "x\n")
    assert time.perf_counter() - start > 0.5  # waited for the pip that the kill left behind
    assert len(clone.asked()) == 4 and not (clone.root / ".venv" / "half").exists()
    process.communicate()


def test_two_first_starts_at_once_install_once(clone):
    processes = [clone.start("echo", "x", FAKE_SECONDS="0.3") for _ in range(3)]
    assert [process.communicate(timeout=60)[0] for process in processes] == ["x\n"] * 3
    assert len(clone.asked()) == 2  # one venv, one pip


def test_a_moved_clone_is_installed_again(clone):
    clone.run("true")
    clone.asked()
    clone.root = clone.root.rename(clone.root.parent / "moved")
    assert clone.run("true")[0] == 0
    assert len(clone.asked()) == 2


def test_an_environment_made_by_hand_is_not_deleted(clone):
    (clone.root / ".venv").mkdir()
    (clone.root / ".venv" / "mine").touch()
    assert clone.run("true")[0] == 0
    assert (clone.root / ".venv" / "mine").exists()


def test_no_arguments(clone):
    code, out, err = clone.run()
    assert (code, out, err.count("\n")) == (2, "", 1) and "usage" in err


@pytest.mark.parametrize("old", [False, True])
def test_no_python(clone, old):
    if not old:
        (clone.bin / "python3").unlink()
    code, out, err = clone.run("true", **({"FAKE_OLD": "1"} if old else {}))
    assert (code, out, err.count("\n")) == (2, "", 1) and "no Python >= 3.11" in err
    assert not (clone.root / ".venv").exists()


@pytest.mark.parametrize("code", [0, 1])
def test_ci_runs_every_test_in_an_environment_of_its_own(clone, code):
    clone.program(
        "pytest",
        f'#!/usr/bin/env bash\necho "$JAX_PLATFORMS|$1|$2|$3|"\necho closing line\nexit {code}\n',
    )
    assert clone.run(program=".ci/run")[:2] == (code, "cpu|-m||--durations=20|\nclosing line\n")
    venv, *_ = clone.asked()
    assert not os.path.exists(venv.removeprefix("-m venv ")) and not (clone.root / ".venv").exists()
