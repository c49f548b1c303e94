"""Joins the other processes of a run: of a TPU pod, of Kubernetes, SLURM, Open MPI, or by name."""

import contextlib
import importlib.util
import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from dlc_jax import stop
from dlc_jax.errors import UserError

# The address of process 0, how many processes there are, and which this is.
NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
FLAGS = ("--coordinator", "--processes", "--process")  # of the command line, for the same
JOIN_TIMEOUT, HEARTBEAT = "DLC_JOIN_TIMEOUT", "DLC_HEARTBEAT"
SECONDS = {JOIN_TIMEOUT: 600, HEARTBEAT: 60}
PATIENCE = 10  # seconds of waiting after which it is said what is waited for

_watch: Any = None  # of the other processes


def may_be_several() -> bool:
    """Whether the environment looks as if this is one of several processes; without jax."""
    alone = os.environ.get(NAMES[1]) == "1"
    return not alone and (any(map(os.environ.get, NAMES)) or bool(detected(os.environ)))


def detected(environment: Mapping[str, str]) -> str:
    """What starts several processes here, as far as the environment says; "" if nothing does."""
    several = {
        "SLURM": environment.get("SLURM_NTASKS") if "SLURM_PROCID" in environment else None,
        "Open MPI": environment.get("OMPI_COMM_WORLD_SIZE"),
    }
    for name, count in several.items():
        if (count or "1") != "1":
            return name
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "Kubernetes"
    names = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    chips = any(map(os.path.exists, ("/dev/accel0", "/dev/vfio/0")))
    is_tpu = environment.get("JAX_PLATFORMS", "tpu") in ("", "tpu") and chips
    return "a TPU pod" if "," in names or (is_tpu and importlib.util.find_spec("libtpu")) else ""


def join() -> None:
    """Makes this process one of several, if there are others; before devices are used.

    They are found by JAX from the metadata of a TPU pod, GKE, SLURM or Open MPI, or named by three
    variables (or flags): JAX_COORDINATOR_ADDRESS=HOST:PORT, a free port of process 0's host,
    JAX_NUM_PROCESSES, of which 1 keeps a process alone, and JAX_PROCESS_ID. It waits for the others
    for DLC_JOIN_TIMEOUT seconds. From then on a process that ends takes the others with it, see
    `watch`: at once, or where its machine fell silent within DLC_HEARTBEAT seconds.

    Raises:
      UserError: only some of the three are set, or not to numbers that go together; process 0's
        port is taken. If the others do not come in time, the process ends with exit code 75.
    """
    global _watch
    import jax

    named = _named(os.environ)
    if jax.distributed.is_initialized() or os.environ.get(NAMES[1]) == "1":
        return
    by = "" if named else detected(os.environ)
    if not named and not by:
        return
    # It swallows SIGTERM, and knows of no other signal; see stop.py.
    jax.config.update("jax_enable_preemption_service", False)
    timeout, heartbeat = (_seconds(name) for name in (JOIN_TIMEOUT, HEARTBEAT))
    # JAX aborts when its time is over; ours is over before, see `_patience`.
    settings = {"initialization_timeout": timeout + 60}
    # A process whose sockets close is noticed at once, see `watch`. This is for one that hangs.
    settings["heartbeat_timeout_seconds"] = max(10, heartbeat)
    if by == "Open MPI" and "OMPI_MCA_orte_hnp_uri" not in os.environ:  # of Open MPI 5
        settings["cluster_detection_method"] = "mpi4py"
    if named:
        settings |= dict(zip(("coordinator_address", "num_processes", "process_id"), named))
        _check_port(*named)
    who = f"process {named[2]} of {named[1]}" if named else f"this process of {by}"
    where = named[0] if named else "the coordinator"
    try:
        with _patience(who, where, timeout):
            jax.distributed.initialize(**settings)
    except ValueError as error:
        if by == "a TPU pod":  # chips, but no pod
            return
        more = "pip install kubernetes, " if by == "Kubernetes" else ""
        raise UserError(f"{by or where}: {_first(error)}; {more}{_by_name()}") from error
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{who} cannot meet the others at {where}: {_first(error)}; {_by_name()}"
        ) from error
    if jax.process_count() > 1:
        from dlc_jax.hosts.watch import Watch

        _watch = Watch(heartbeat)


def leave() -> None:
    """The end of a run that is complete: all wait for each other, and no end is a fault now."""
    if _watch is not None:
        _watch.close()


def _named(environment: Mapping[str, str]) -> tuple[str, int, int] | None:
    """(address, count, index) of the three variables; None if they do not say."""
    address, *numbers = (environment.get(name, "") for name in NAMES)
    if not any((address, *numbers)) or (numbers == ["1", ""] and not address):
        return None
    is_number = all(number.isdecimal() for number in numbers)
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not is_number or int(numbers[1]) >= int(numbers[0]):
        said = " ".join(f"{name}={environment.get(name, '')}" for name in NAMES)
        raise UserError(
            "several processes need an address HOST:PORT and the numbers from 0 in each; the "
            f"environment says {said}"
        )
    return address, int(numbers[0]), int(numbers[1])


def _check_port(address: str, count: int, index: int) -> None:
    """Refuses a port of process 0's own host that is taken: JAX would not say so in a line."""
    if index == 0:
        with contextlib.closing(socket.socket(socket.AF_INET)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            port = int(address.rpartition(":")[2])
            try:
                probe.bind(("", port))
            except OSError as error:
                raise UserError(
                    f"process 0 of {count} cannot listen at {address}: {error.strerror}; give all "
                    f"of them another port in {NAMES[0]}"
                ) from error


def _seconds(name: str) -> int:
    text = os.environ.get(name, str(SECONDS[name]))
    if not text.isdecimal() or not int(text):
        raise UserError(
            f"the environment says {name}={text}; give seconds, such as {SECONDS[name]}"
        )
    return int(text)


@contextlib.contextmanager
def _patience(who: str, where: str, timeout: int) -> Iterator[None]:
    """Says what is waited for, and after the time-out ends the process: JAX would abort it."""
    late = f"waits for the others at {where}, up to {timeout} seconds"
    over = (
        f"cannot meet the others at {where} within {timeout} seconds ({JOIN_TIMEOUT}); start all "
        "of them with the address of process 0, then the same command goes on"
    )
    timers = [
        threading.Timer(PATIENCE, lambda: print(f"dlc_jax: {who} {late}", file=sys.stderr)),
        threading.Timer(timeout, lambda: stop.end(f"{who} {over}")),
    ]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _by_name() -> str:
    return f"name the processes by {', '.join(FLAGS)}, or give --processes=1 to run alone"
