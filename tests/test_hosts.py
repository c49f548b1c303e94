"""Several real processes: they find each other, agree, stop at one point, and end together."""

import os
import pathlib
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time

import pytest

from dlc_jax.errors import UserError
from dlc_jax.hosts import cluster

ROOT = pathlib.Path(__file__).resolve().parents[1]
start = runpy.run_path(str(ROOT / "launch" / "local_multiprocess.py"))["start"]
HEARTBEAT = 20  # seconds; what is asked of an end is much less
SCRIPT = """
import os, pathlib, sys, time
from dlc_jax import command, stop
from dlc_jax.errors import UserError
from dlc_jax.hosts import cluster
def say(*words):
    print(*words, flush=True)
def run():
    cluster.join()
    import jax
    from dlc_jax.hosts import agreement, likeness, sharing
    me = jax.process_index()
    agreement.meet("begin")
    say("ready")
    agreement.meet("said")
    {body}
    cluster.leave()
sys.exit(command.outcome(run, alone=True))
"""


def job(body, *arguments, n=2, **environment):
    """`n` processes of the script with a body."""
    body = textwrap.dedent(body).strip("\n").replace("\n", "\n    ")
    line = [sys.executable, "-c", SCRIPT.replace("{body}", body), *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(ROOT), cluster.HEARTBEAT: str(HEARTBEAT)} | environment
    pipe = subprocess.PIPE
    return start(n, 1, line, env, stdout=pipe, stderr=pipe, text=True)


def ready(processes):
    for process in processes:
        line = process.stdout.readline()
        assert line == "ready\n", process.communicate()[1]


def ended(process, seconds=HEARTBEAT):
    """(exit code, our own lines of stderr) of a process that ends in time."""
    said = process.communicate(timeout=seconds)[1]
    return process.returncode, [line for line in said.splitlines() if line.startswith("dlc_jax")]


# ---- joining


@pytest.mark.parametrize(
    "environment, by",
    [
        ({}, ""),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, ""),
        ({"SLURM_NTASKS": "8"}, ""),  # in an allocation, but not started by srun
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8"}, "SLURM"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}, "Open MPI"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, ""),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "a TPU pod"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, ""),
    ],
)
def test_what_starts_several_processes_is_seen_in_the_environment(environment, by):
    assert cluster.detected(environment | {"JAX_PLATFORMS": "cpu"}) == by


@pytest.mark.parametrize(
    "values",
    [("host:1", "2", ""), ("host:1", "2", "2"), ("host", "2", "0"), ("host:1", "two", "0")],
)
def test_variables_that_do_not_go_together_are_refused(values, monkeypatch):
    for name, value in zip(cluster.NAMES, values, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="several processes need an address HOST:PORT .* says JAX"):
        cluster.join()


def test_one_process_is_alone_whatever_the_environment_says(monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert cluster.may_be_several()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    assert not cluster.may_be_several()
    cluster.join()  # and does not wait


def test_a_port_that_is_taken_and_a_coordinator_that_does_not_answer():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        flags = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
        text = SCRIPT.replace("{body}", "")
        env = os.environ | {"PYTHONPATH": str(ROOT), "DLC_JOIN_TIMEOUT": "3"} | flags
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        first, second = (
            subprocess.Popen(
                [sys.executable, "-c", text], env=env | {"JAX_PROCESS_ID": str(number)}, **pipe
            )
            for number in range(2)
        )
        code, lines = ended(first, 60)
        assert code == 2 and re.search(r"process 0 of 2 cannot listen at .* in use; give", lines[0])
        code, lines = ended(second, 60)
        assert code == 75, lines
        assert "process 1 of 2 cannot meet the others at" in lines[-1]
        assert "within 3 seconds (DLC_JOIN_TIMEOUT)" in lines[-1]


def test_another_program_at_the_port_is_not_process_0():
    """It closes the connection, and nobody takes that for the end of process 0."""
    from dlc_jax.hosts import watch

    def answer(server, text):
        connection, _ = server.accept()
        connection.recv(64)
        connection.sendall(text)
        connection.close()

    for text, is_ours in [(b"", False), (b"HTTP/1.1 400\r\n", False), (b"token", True)]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            threading.Thread(target=answer, args=(server, text), daemon=True).start()
            found = watch.reach(["127.0.0.1"], server.getsockname()[1], "token", 1)
            assert (found is not None) == is_ours
            if found:
                found.close()


# ---- ending


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_in_a_line(victim):
    processes = job("time.sleep(60)")
    ready(processes)
    processes[victim].kill()
    began = time.monotonic()
    code, lines = ended(processes[1 - victim])
    assert code == 75 and len(lines) == 1 and time.monotonic() - began < 5
    assert lines[0].startswith(f"dlc_jax: process {victim} of 2 was killed")


@pytest.mark.parametrize(
    "fault, code, line",
    [
        ("raise UserError('a mistake')", 2, "a mistake"),
        ("raise ValueError", 1, "an error of the program, see what it printed"),
    ],
    ids=["mistake", "error"],
)
@pytest.mark.parametrize("first", [0, 1])
def test_whoever_ends_says_why_and_the_other_ends_with_it(first, fault, code, line):
    processes = job(f"if me == {first}:\n    {fault}\ntime.sleep(60)")
    ready(processes)
    assert ended(processes[1 - first]) == (code, [f"dlc_jax: process {first} ended: {line}"])
    assert ended(processes[first])[0] == code


def test_a_signal_in_one_process_stops_both_at_one_point():
    """Where nothing is to be saved at once, in a loop at the first point that none has passed."""
    loop = """
    with stop.Loop() as loop:
        loop.hold()
        turns = 0
        while not loop.reached():
            turns += 1
            time.sleep(0.002 + 0.003 * me)  # one runs ahead, as far as it may
            if turns % 100 == 0: agreement.meet("together")
        say(turns)
        raise stop.Interrupted("saved")
    """
    processes = job(loop)
    ready(processes)
    time.sleep(1.2)
    processes[1].send_signal(signal.SIGTERM)
    turns = [process.stdout.readline() for process in processes]
    assert turns[0] == turns[1] and int(turns[0]) > 10
    assert [ended(process) for process in processes] == [(75, ["dlc_jax: saved"])] * 2
    processes = job("time.sleep(60)")
    ready(processes)
    processes[1].send_signal(signal.SIGTERM)
    assert ended(processes[1]) == (75, ["dlc_jax: stopped"])
    assert ended(processes[0]) == (75, ["dlc_jax: process 1 ended: stopped"])


@pytest.mark.parametrize("victim", [0, 1])
def test_a_collective_that_fails_because_of_an_end_is_no_error_of_the_program(victim):
    """What jax raises then is no news: whoever ended has said why, or is about to."""
    body = """
    while pathlib.Path(sys.argv[1]).exists(): time.sleep(0.001)
    raise RuntimeError("Gloo AllGather failed: Connection closed by peer")
    """
    with tempfile.NamedTemporaryFile() as flag:
        processes = job(body, flag.name)
        ready(processes)
        time.sleep(0.5)
        processes[victim].send_signal(signal.SIGTERM)
        os.unlink(flag.name)
        codes = [ended(process)[0] for process in processes]
        pathlib.Path(flag.name).touch()
    assert codes == [75, 75]


def test_a_complete_run_ends_quietly():
    processes = job("time.sleep(1.0 * me)", n=3)
    assert [ended(process, 60) for process in processes] == [(0, [])] * 3


# ---- comparing


def test_what_differs_between_processes_is_refused_in_all(tmp_path):
    body = "likeness.check_alike('version', {'jax': me // 2, 'numpy': 1})"
    line = (
        "dlc_jax: process 2 has another version than process 0 (jax: 0 there, 1 here); start all "
        "of them with the same code, packages and command"
    )
    found = [ended(process, 60) for process in job(body, n=3)]
    assert {code for code, _ in found} == {2}
    assert all(lines and lines[-1].endswith(line.removeprefix("dlc_jax: ")) for _, lines in found)
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    body = "sharing.check_shared(pathlib.Path(sys.argv[1 + me]))"
    for places, code in [(folders, 2), ([folders[0]] * 2, 0)]:
        found = [ended(process, 60) for process in job(body, *places)]
        assert {each for each, _ in found} == {code}
        assert not list(tmp_path.rglob(".shared*"))
        if code:
            assert "is not the same folder in process 1 as in process 0" in found[0][1][0]


def test_configs_and_flags_of_two_processes(tmp_path):
    """By flags, and one of them with another seed: refused by both before anything is written."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    usual = [sys.executable, "-m", "dlc_jax.main", "--config=configs/quickstart.py:tiny"]
    usual += [f"--workdir={tmp_path / 'W'}", f"--coordinator={address}", "--processes=2"]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    processes = [
        subprocess.Popen([*usual, f"--process={n}", f"--config.seed={n}"], env=env, **pipe)
        for n in range(2)
    ]
    for process in processes:
        code, lines = ended(process, 100)
        assert code == 2
        assert "another config than process 0 (seed: 0 there, 1 here)" in lines[-1]
    assert not (tmp_path / "W" / "config.json").exists()
