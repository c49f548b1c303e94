"""Who writes to a folder of an object store: one run, which says again and again that it lives."""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable

from dlc_jax.errors import UserError
from dlc_jax.remote.store import Store, StoreError

NAME = ".lock"
RENEWED = 15.0  # seconds between two signs of life
DEAD = 60.0  # seconds without one


class Lease:
    """The right to write to a store. Until `release` a thread renews it.

    No clock of another machine, or of the store, is read: whoever finds the lock of a run that may
    be dead watches for `DEAD` seconds whether it changes.
    """

    def __init__(
        self, store: Store, *, renewed: float = RENEWED, dead: float = DEAD, say: Callable = print
    ):
        """Takes the lease, at once if nobody has it or if its process ended on this machine.

        Args:
          say: told in a line when it waits.

        Raises:
          UserError: another live run has it.
          StoreError: see `Store`.
        """
        self._store, self._renewed, self._dead, self._say = store, renewed, dead, say
        self._token, self._count = secrets.token_hex(8), 0
        self._lost, self._left = "", threading.Event()
        self._since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        while not store.create(NAME, self._text()):
            if (seen := store.read(NAME)) is not None:
                self._outlive(seen)
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Reads who has the lease.

        Raises:
          UserError: another run has taken it, so nothing must be written.
        """
        if not self._lost and not self._is_mine(self._store.read(NAME)):
            self._lost = (
                f"{self._store.url} was taken over by another run, since this one gave no sign of "
                f"life for {self._dead:.0f} s; stop one of them"
            )
        if self._lost:
            raise UserError(self._lost)

    def release(self) -> None:
        self._left.set()
        self._thread.join()
        if not self._lost and self._is_mine(self._store.read(NAME)):
            self._store.remove([NAME])

    def _outlive(self, seen: bytes) -> None:
        """Removes the lock of a dead run; of a live one it raises."""
        if not has_ended(seen):
            self._say(
                f"{self._store.url} is locked by {named(seen)}; waiting {self._dead:.0f} s for a "
                "sign of life"
            )
            deadline = time.monotonic() + self._dead
            while time.monotonic() < deadline:
                time.sleep(min(1.0, self._dead / 10))
                now = self._store.read(NAME)
                if now is None:
                    return
                if now != seen:
                    raise UserError(
                        f"{self._store.url} is in use by {named(now)}; wait for it, stop it, or "
                        "give another --workdir"
                    )
        if self._store.read(NAME) == seen:
            self._store.remove([NAME])

    def _renew(self) -> None:
        while not self._left.wait(self._renewed):
            try:
                self.check()
                self._store.write({NAME: self._text()})
            except StoreError:
                continue  # whoever writes hears of it
            except UserError:
                return

    def _text(self) -> bytes:
        self._count += 1
        facts = {"pid": os.getpid(), "host": socket.gethostname(), "started": self._since}
        facts |= {"machine": machine(), "token": self._token, "sign": self._count}
        return json.dumps(facts).encode()

    def _is_mine(self, text: bytes | None) -> bool:
        return self._token.encode() in (text or b"")


def named(text: bytes) -> str:
    """Who wrote a lock, in words."""
    try:
        facts = json.loads(text)
        return f"process {facts['pid']} on {facts['host']} since {facts['started']}"
    except (ValueError, KeyError, TypeError):
        return "another run"


def has_ended(text: bytes) -> bool:
    """Whether the run that wrote a lock was on this machine and is no more."""
    try:
        facts = json.loads(text)
        here = machine()
        if not here or facts["machine"] != here:
            return False
        os.kill(int(facts["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return False


def machine() -> str:
    """Names this start of this machine, and the group of processes whose ids are seen here."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return ""
