"""A signal ends a command in one line and with code 75; a loop saves what it has before that."""

import os
import pty
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dlc_jax import command, stop

ROOT = Path(__file__).resolve().parents[1]
# These tests may run under nohup, or in the background of a shell.
USUAL = "import signal; [signal.signal(number, signal.SIG_DFL) for number in stop.SIGNALS]"
COMMAND = """
import hashlib, subprocess, sys, time
from dlc_jax import command, stop
{usual}
def ready(word="ready"):
    print(word, flush=True)
def run():
    stop.promise("it goes on")
    {body}
code = command.outcome(run, alone=True)
{after}
sys.exit(code)
"""
LOOP = """
    with stop.Loop() as loop:
        loop.hold()
        ready()
        while not loop.reached(): time.sleep(0.01)
        {saving}
        raise stop.Interrupted("saved")
"""


def start(body, *, after="", usual=USUAL, **options):
    text = COMMAND.format(body=body, after=after, usual=usual)
    pipe = subprocess.PIPE
    options = {"stdin": pipe, "stdout": pipe, "stderr": pipe} | options
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", text], text=True, env=environment, **options)


def ended(process, number, word="ready\n"):
    """(exit code, stderr) of a process that is sent a signal when it has said the word."""
    assert process.stdout.readline() == word, process.communicate()[1]
    process.send_signal(number)
    return process.communicate(timeout=20)[1], process.returncode


@pytest.mark.parametrize("number", stop.SIGNALS, ids=lambda number: number.name)
def test_a_signal_ends_a_command_in_a_line(number):
    assert ended(start("ready(); time.sleep(60)"), number) == ("dlc_jax: stopped; it goes on\n", 75)


@pytest.mark.parametrize(
    "busy",
    [
        "ready(); hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",
        "ready()\n    while True:\n        try: time.sleep(60)\n        except BaseException: pass",
    ],
    ids=["in_a_compiler", "where_exceptions_are_swallowed"],
)
def test_it_does_not_wait_for_the_main_thread(busy):
    assert ended(start(busy), signal.SIGINT) == ("dlc_jax: stopped; it goes on\n", 75)


def test_a_loop_saves_before_it_ends_and_a_second_interrupt_does_not_wait():
    body = LOOP.format(saving="ready('saving'); time.sleep(0.2)")
    assert ended(start(body), signal.SIGHUP) == ("dlc_jax: saved\n", 75)
    process = start(LOOP.format(saving="ready('saving'); time.sleep(60)"))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    found = ended(process, signal.SIGINT, "saving\n")
    assert found == ("dlc_jax: stopped at once, without saving; it goes on\n", 75)


def test_a_loop_with_nothing_to_save_ends_at_once():
    body = LOOP.format(saving="").replace("loop.hold()", "pass")
    assert ended(start(body), signal.SIGTERM) == ("dlc_jax: stopped; it goes on\n", 75)


def test_a_loop_whose_terminal_is_gone_saves_too():
    """Whatever it still prints would be an error; it must not come before the saving."""
    master, slave = pty.openpty()
    body = LOOP.format(saving="ready('more')")
    process = start(body, after="ready('after')", stdout=slave, start_new_session=True)
    os.close(slave)
    said = b""
    while not said.endswith(b"\n"):  # to its end: a terminal gone while it prints is another case
        said += os.read(master, 1)
    assert said == b"ready\r\n"
    # the terminal hangs up; the system sends the signal to whoever has it for its own
    os.close(master)
    process.send_signal(signal.SIGHUP)
    assert (process.communicate(timeout=20)[1], process.returncode) == ("dlc_jax: saved\n", 75)


def test_what_is_ignored_stays_so():
    """By nohup, or by a shell that put the command into the background."""
    quiet = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    process = start("ready(); sys.stdin.readline()", usual=quiet)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    assert (process.communicate("on\n", timeout=20)[1], process.returncode) == ("", 0)


def test_a_command_that_has_ended_is_not_ended_again():
    process = start("raise stop.Interrupted('saved')", after="ready(); sys.stdin.readline()")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    said = process.communicate("on\n", timeout=20)[1]
    assert (said, process.returncode) == ("dlc_jax: saved\n", 75)


def test_nor_is_it_by_a_signal_that_is_only_now_heard_of():
    """One that came while the command was ending; and ignored ones stay so to the process's end."""
    late = """
import os
assert {signal.getsignal(number) for number in stop.SIGNALS} == {signal.SIG_IGN}
os.write(signal.set_wakeup_fd(-1), bytes([signal.SIGTERM]))
time.sleep(0.2)
"""
    process = start("raise stop.Interrupted('saved')", after=late)
    assert (process.communicate(timeout=20)[1], process.returncode) == ("dlc_jax: saved\n", 75)


def test_helpers_end_too():
    """One that lived on would hold this test's pipe."""
    started = "subprocess.Popen(['sleep', '60']) as other, stop.helper(other.kill)"
    body = f"with {started}: ready(); other.wait()"
    assert ended(start(body), signal.SIGTERM) == ("dlc_jax: stopped; it goes on\n", 75)


@pytest.mark.parametrize(
    "arguments",
    ["main --config=configs/quickstart.py:tiny", "cli train --config=configs/quickstart.py:tiny"],
)
def test_while_jax_is_imported(arguments, tmp_path):
    (tmp_path / "jax.py").write_text("print('importing', flush=True)\nimport time\ntime.sleep(60)")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    module, *rest = arguments.split()
    line = [sys.executable, "-m", f"dlc_jax.{module}", *rest, f"--workdir={tmp_path / 'W'}"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)
    found = ended(process, signal.SIGTERM, "importing\n")
    assert found == ("dlc_jax: stopped; what is complete is kept, the same command goes on\n", 75)


def test_nothing_is_changed_where_the_command_is_not_the_whole_process():
    before = [signal.getsignal(number) for number in stop.SIGNALS]

    def inside():
        return 3 if [signal.getsignal(number) for number in stop.SIGNALS] == before else 4

    assert command.outcome(inside) == 3
    assert [signal.getsignal(number) for number in stop.SIGNALS] == before
    found = []

    def elsewhere():
        with stop.Loop() as loop:
            loop.hold()
            found.append((inside(), loop.reached()))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [(3, False)]
