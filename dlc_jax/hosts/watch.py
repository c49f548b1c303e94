"""Watches the other processes: all stop at one point, and none lives on when another has ended.

JAX aborts (exit code 134, a page of text) when the coordination service tells it that a process was
silent for too long. This is quicker and says it in a line:

* A process that ends says why, through the service, and the others end with its line and its code.
* A process that cannot say so, killed by -9 or with its machine, loses its connection to process 0.
  The system closes it at once; a machine that is gone is missed by TCP's keepalive.
* For a process that hangs JAX's own heartbeat remains, with its text and our exit code.
"""

import atexit
import contextlib
import ctypes
import json
import os
import secrets
import selectors
import signal
import socket
import threading
import time

import jax

from dlc_jax import stop
from dlc_jax.hosts.agreement import client, gather, meet

GOES_ON = "the same command, in all of them, goes on"
TURN = 2000  # milliseconds; what is said is heard at once, and this process's own end within it
LEAVE = 10  # seconds that process 0 waits for the others to have heard why it ends


class Watch:
    """Of this process, one of several; it registers itself with `stop`.

    Args:
      heartbeat: seconds without an answer after which another machine is gone.
    """

    def __init__(self, heartbeat: int):
        self._heartbeat, self._closing, self._code = heartbeat, False, stop.CODE
        self._me, self._count = jax.process_index(), jax.process_count()
        self._service, self._peers = client(), {}  # {process: its connection}, in process 0
        self._connect()
        self._ears = [
            threading.Thread(target=function, daemon=True)
            for function in (self._hear_ends, self._hear_stops)
        ]
        for thread in self._ears:
            thread.start()
        # Before JAX leaves the service: what was begun last ends first.
        atexit.register(self._quiet)
        self._soften_abort()
        stop.join(self)

    def ask(self) -> None:
        """Makes all processes agree on a point at which to stop, see `stop.agree`."""
        self._say("stop", "")

    def tell(self, code: int, line: str, *, agreed: bool) -> None:
        """Says why this process ends; process 0 gives the others the time to hear it."""
        if self._closing:  # the others know, or are gone
            return
        self._closing, self._code = True, code
        if agreed:  # so all have it to say themselves
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._service.wait_at_barrier("dlc_jax/stopped", 1000 * LEAVE)
            return
        self._say("end", json.dumps({"process": self._me, "code": code, "line": line}))
        late = time.monotonic() + LEAVE
        while self._me == 0 and self._peers and time.monotonic() < late:
            time.sleep(0.05)

    def close(self) -> None:
        """No end is a fault from here on. Waits for all processes to have come here."""
        self._closing = True
        meet("leave")

    def _quiet(self) -> None:
        """Nothing of Python is called any more: it is about to end."""
        self._closing = True
        for thread in self._ears:
            thread.join()
        ctypes.CDLL(None).signal(int(signal.SIGABRT), ctypes.c_void_p(0))

    def _say(self, what: str, value: str) -> None:
        # Another was first, or the service is gone.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._service.key_value_set(f"dlc_jax/{what}", value)

    def _heard(self, what: str) -> str | None:
        """What a process has said, or None if this one ends before.

        Raises:
          JaxRuntimeError: the service is gone.
        """
        while not self._closing:
            try:
                return self._service.blocking_key_value_get(f"dlc_jax/{what}", TURN)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
        return None

    def _hear_ends(self) -> None:
        try:
            found = json.loads(self._heard("end") or "null")
        except jax.errors.JaxRuntimeError:
            self._lost(0)
            return
        if found and found["process"] != self._me:
            self._end(f"process {found['process']} ended: {found['line']}", found["code"])

    def _hear_stops(self) -> None:
        try:
            if self._heard("stop") is not None:
                stop.agree(lambda passed: max(gather("stop here", passed)) + 1)
        except (jax.errors.JaxRuntimeError, stop.Interrupted):
            return  # the service is gone: the other thread says so

    def _lost(self, process: int) -> None:
        line = f"process {process} of {self._count} was killed, or its machine is gone; {GOES_ON}"
        if not self._closing and self._me == 0:
            self._say("end", json.dumps({"process": 0, "code": stop.CODE, "line": line}))
        self._end(line, stop.CODE)

    def _end(self, line: str, code: int) -> None:
        if not self._closing:
            self._closing, self._code = True, code
            stop.end(line, code)

    # ---- connections, which close when a process is gone

    def _connect(self) -> None:
        """All connect to process 0; whoever cannot is watched by JAX's heartbeat alone."""
        if self._me == 0:
            listener = socket.create_server(("", 0), backlog=self._count)
            where = {"port": listener.getsockname()[1], "token": secrets.token_hex(8)}
            where["hosts"] = _own_addresses()
            self._service.key_value_set("dlc_jax/watch", json.dumps(where))
            thread = threading.Thread(target=self._serve, args=(listener, where["token"]))
        else:
            where = json.loads(self._service.blocking_key_value_get("dlc_jax/watch", 60_000))
            connection = reach(where["hosts"], where["port"], where["token"], self._me)
            if connection is None:
                return
            self._keep_alive(connection)
            thread = threading.Thread(target=self._follow, args=(connection,))
        thread.daemon = True
        thread.start()

    def _serve(self, listener: socket.socket, token: str) -> None:
        selector = selectors.DefaultSelector()
        selector.register(listener, selectors.EVENT_READ, None)
        while True:
            for key, _ in selector.select():
                if key.data is None:
                    connection, _ = listener.accept()
                    self._keep_alive(connection)
                    selector.register(connection, selectors.EVENT_READ, [])
                    continue
                text = _received(key.fileobj)
                if text.startswith(token.encode()):  # anything else is nobody's
                    key.data.append(int(text.split()[1]))
                    self._peers[key.data[0]] = key.fileobj
                    with contextlib.suppress(OSError):  # it is gone already
                        key.fileobj.sendall(token.encode())
                elif not text:
                    selector.unregister(key.fileobj)
                    for process in key.data:
                        self._peers.pop(process, None)
                        # Whoever ends in order has said why: its line is heard first.
                        threading.Timer(1, self._lost, (process,)).start()

    def _follow(self, connection: socket.socket) -> None:
        while _received(connection):
            pass
        self._lost(0)  # at once: JAX is about to abort

    def _keep_alive(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        each = max(1, self._heartbeat // 4)
        for name, value in {"TCP_KEEPIDLE": each, "TCP_KEEPINTVL": each, "TCP_KEEPCNT": 3}.items():
            if hasattr(socket, name):  # not on every system
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def _soften_abort(self) -> None:
        """JAX's abort, should it come first, ends in a line and our exit code too.

        A handler of Python's runs too late. This one runs in the thread that aborts.
        """

        line = f"dlc_jax: JAX ended this process, one of {self._count}, see above; {GOES_ON}\n"

        def handle(number):
            if not self._closing:
                os.write(2, line.encode())
            os._exit(self._code)

        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)  # kept, C calls it
        ctypes.CDLL(None).signal(int(signal.SIGABRT), self._handler)


def _received(connection) -> bytes:
    try:
        return connection.recv(64)
    except OSError:  # keepalive has given it up
        return b""


def _own_addresses() -> list[str]:
    """Names and numbers by which others may reach this machine, the likeliest first."""
    found = [os.environ.get("JAX_COORDINATOR_ADDRESS", "").rpartition(":")[0]]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; the system chooses the interface
            found.append(probe.getsockname()[0])
        except OSError:
            pass
    found += [socket.gethostname(), "127.0.0.1"]
    return [host.strip("[]") for host in dict.fromkeys(found) if host]


def reach(hosts: list[str], port: int, token: str, process: int) -> socket.socket | None:
    """A connection of this process to process 0, at the first of the hosts where it answers.

    Another program may have the port there, such as on this machine under 127.0.0.1: its end is not
    process 0's. So whoever answers has to know the token.
    """
    for host in hosts:
        with contextlib.suppress(OSError):
            connection = socket.create_connection((host, port), timeout=5)
            connection.sendall(f"{token} {process}\n".encode())
            if connection.recv(64) == token.encode():
                connection.settimeout(None)
                return connection
            connection.close()
    return None
