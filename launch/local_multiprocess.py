#!/usr/bin/env python3
"""Run a command as one job of N processes on this machine, each with M simulated CPU devices.

    ./launch/local.sh launch/local_multiprocess.py -n 2 -d 4 \\
        python -m dlc_jax.main --config=configs/quickstart.py:tiny

Each line of output begins with its process, as in `[0] `. SIGTERM, SIGINT and SIGHUP go to every
process. The exit code is 0 if all ended with 0; otherwise 2 if any did, otherwise 75 if any did,
otherwise the first other one; a process that signal n ended counts as 128 + n. A process that ends
does not end the others: as on a cluster, that is the command's own affair.
"""

import argparse
import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO, Any

DEVICES = "--xla_force_host_platform_device_count"


def variables(n: int, devices: int, flags: str = "") -> list[dict[str, str]]:
    """What each of `n` processes has in its environment, with a port that is free now.

    `flags` is the XLA_FLAGS from before; the number of devices in it is replaced.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{re.sub(rf' *{DEVICES}=[^ ]*', '', flags)} {DEVICES}={devices}".strip(),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(n),
    }
    return [{**shared, "JAX_PROCESS_ID": str(i)} for i in range(n)]


def start(
    n: int, devices: int, command: Sequence[str], env: dict[str, str] | None = None, **options: Any
) -> list[subprocess.Popen]:
    """Starts the `n` processes of one job and returns them in order.

    `env` is the environment to build on (default: this process's); `options` go to Popen. Raises
    OSError if the command cannot be started.
    """
    before = dict(os.environ if env is None else env)
    added = variables(n, devices, before.get("XLA_FLAGS", ""))
    return [subprocess.Popen(command, env=before | each, **options) for each in added]


def exit_code(codes: Sequence[int]) -> int:
    """The job's code from its processes' return codes, negative for signals."""
    failed = [code if code >= 0 else 128 - code for code in codes if code]
    return next((code for code in (2, 75) if code in failed), (failed or [0])[0])


def copy(source: IO[bytes], target: IO[bytes], prefix: bytes) -> None:
    """Writes each line of `source` to `target` as soon as it is there."""
    for line in source:
        with contextlib.suppress(BrokenPipeError):  # goes on reading: the process must not block
            target.write(prefix + line.removesuffix(b"\n") + b"\n")
            target.flush()


def run(n: int, devices: int, command: Sequence[str]) -> int:
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: asked.append(number))
    # Groups of their own: Ctrl-C in a terminal reaches them once, through this process.
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "process_group": 0}
    processes = start(n, devices, command, **pipes)
    streams = [(p.stdout, sys.stdout.buffer, f"[{i}] ".encode()) for i, p in enumerate(processes)]
    streams += [(p.stderr, sys.stderr.buffer, f"[{i}] ".encode()) for i, p in enumerate(processes)]
    copies = [threading.Thread(target=copy, args=each, daemon=True) for each in streams]
    for thread in copies:
        thread.start()
    while any([process.poll() is None for process in processes]):
        while asked:
            number = asked.pop(0)
            for process in processes:
                process.send_signal(number)
        time.sleep(0.02)
    for thread in copies:
        thread.join(timeout=5)  # a process that outlives its parent may hold the pipe
    return exit_code([process.returncode for process in processes])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-n", type=int, required=True, help="how many processes")
    parser.add_argument("-d", type=int, default=1, help="devices of each process (default: 1)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="CMD")
    given = parser.parse_args()
    if min(given.n, given.d) < 1 or not given.command:
        parser.error("give -n of at least 1, -d of at least 1, and a command")
    if given.dry_run:
        for added in variables(given.n, given.d, os.environ.get("XLA_FLAGS", "")):
            words = [f"{name}={value}" for name, value in added.items()]
            print(shlex.join(["env", *words, *given.command]))
        return 0
    try:
        return run(given.n, given.d, given.command)
    except OSError as error:
        print(f"local_multiprocess.py: cannot start {given.command[0]}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
