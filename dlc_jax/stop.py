"""A signal (SIGTERM, SIGINT, SIGHUP) ends a command in a line with code 75; training saves first.

What is written here is whole or not there, as after a kill, so ending at once loses nothing that is
complete. Nothing is raised in the main thread: an exception may arrive anywhere, in an import, in
`__del__`, in a callback from C++, where it is swallowed or fatal; and the main thread may be in a
compiler for minutes. So a thread of its own hears the signals, and ends the process.

Of several processes each counts the points at which it could stop: the turns of a loop, and the
batches of what is measured on the way. All pass the same points in the same order, one a little
ahead of another. Whoever gets a signal tells the others; all then stop at the first point that none
has passed yet. How they talk is `hosts`' affair, see `join`.
"""

import contextlib
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from typing import Any

from dlc_jax.errors import Interrupted

CODE = 75  # EX_TEMPFAIL: the same command may succeed
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_listening = False
_kept = ""  # what the command promises whoever stops it
_saving = False  # a loop is going on that has something to save first
_asked = False  # and has been asked to
_helpers: list[Callable[[], None]] = []  # end the processes that this one has started
_end_once = threading.Lock()  # either a signal ends the process or the command itself does
_others: Any = None  # the other processes, see `join`
_counting = threading.Lock()  # held while a point is passed, and while all agree on one
_passed = 0  # points so far
_last: int | None = None  # the point at which all stop
_measuring = False  # what is done now may be given up, and done again


def listen() -> None:
    """From here on signals end this process; to be called before anything slow is imported.

    For a process that is a command and nothing else: in a notebook or a test Ctrl-C stays what it
    is there. A signal that is ignored stays so: by nohup, or by a shell that has put the command
    into the background.
    """
    global _listening
    if _listening:
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_hear, args=(reading,), name="signals", daemon=True).start()
    _handle(lambda number, frame: None)  # the thread does it; the system must not
    _listening = True


def promise(kept: str) -> None:
    """What is said of the work when the command is stopped, such as "what is complete is kept"."""
    global _kept
    _kept = kept


def done() -> None:
    """The command's end is not to change any more: signals are ignored from here on."""
    if _listening:
        _end_once.acquire()  # for ever, or never if the thread is ending the process right now
        _handle(signal.SIG_IGN)


@contextlib.contextmanager
def helper(end: Callable[[], None]) -> Iterator[None]:
    """Within it, `end` is called before a signal ends this process: it ends another one."""
    _helpers.append(end)
    try:
        yield
    finally:
        _helpers.remove(end)


def join(others: Any) -> None:
    """From here on this process stops together with others.

    Args:
      others: has `ask()`, which makes every process call `agree`, and `tell(code, line, agreed)`,
        which says why this process ends, just before it does; `agreed` is whether all end here.
        Neither raises.
    """
    global _others
    _others = others


def agree(choose: Callable[[int], int]) -> None:
    """Sets the point at which all stop: choose(the points that this process has passed)."""
    global _last, _asked
    with _counting:  # no point is passed meanwhile
        _last = choose(_passed)
    _asked = True


def end(line: str, code: int = CODE) -> None:
    """Ends this process at once, from whatever thread, with a line and nothing saved."""
    _end(line, code)


def tell(code: int, line: str) -> None:
    """Says to the other processes, if there are any, why this one is about to end."""
    if _others is not None:
        _others.tell(code, line, agreed=_last is not None and code == CODE)


class Asked(Exception):
    """What is measured is given up: all processes are to stop, and to save first."""


@contextlib.contextmanager
def measuring() -> Iterator[None]:
    """Within it `breathe` may raise Asked. For what can be done again after a restart."""
    global _measuring
    _measuring = True
    try:
        yield
    finally:
        _measuring = False


def breathe() -> None:
    """A point at which what is measured may be given up; it does nothing elsewhere.

    Raises:
      Asked: all processes stop here.
    """
    if _measuring and _reached():
        raise Asked


def _reached() -> bool:
    global _passed
    with _counting:
        _passed += 1
        return _asked if _others is None else _last is not None and _passed >= _last


class Loop:
    """As a context, a loop that saves what it has before it ends.

    Until `hold` it has nothing that is not saved, and a signal ends the process at once, be it in a
    compiler. From then on `reached`, called once a turn, says whether to stop here: the loop is
    then to save and to raise Interrupted. A second SIGINT, by hand, ends the process at once. Where
    nothing listens (see `listen`) and this is the main thread, `hold` takes the signals over until
    the context ends.
    """

    def __enter__(self):
        global _asked
        self._before, _asked = {}, False
        return self

    def hold(self) -> None:
        global _saving
        if not _saving:
            _saving = True
            if not _listening:
                self._before = _handle(_ask)

    def reached(self) -> bool:
        """Whether a signal came; of several processes, whether all of them stop at this turn."""
        return _reached()

    def __exit__(self, kind, *_):
        global _saving, _asked
        _saving, _asked = False, _asked and kind is None
        for number, handler in self._before.items():
            signal.signal(number, handler)


def check() -> None:
    """Raises Interrupted if the loop before was asked to stop too late: it was complete."""
    global _asked
    if _asked:
        _asked = False
        raise Interrupted(_line("stopped"))


def _ask(number, frame) -> None:
    global _asked
    if _asked and number == signal.SIGINT:
        raise KeyboardInterrupt
    _asked = True


def _handle(handler) -> dict:
    """Sets a handler for signals not ignored, in the main thread; {signal: the one before}."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    return before


def _hear(reading: int) -> None:
    global _asked
    while True:
        for number in os.read(reading, 64):
            if number == signal.SIGHUP:
                _leave_terminal()
            if number in SIGNALS:
                again, _asked = _asked, True
                if not _saving:
                    _end(_line("stopped"))
                elif again and number == signal.SIGINT:
                    _end(_line("stopped at once, without saving"))
                elif _others is not None:
                    _others.ask()


def _end(line: str, code: int = CODE) -> None:
    _end_once.acquire()
    for end in list(_helpers):
        with contextlib.suppress(Exception):
            end()
    with contextlib.suppress(OSError):
        # Not through sys.stderr, whose lock the main thread may hold. On a terminal, below the
        # line of progress that may stand there.
        os.write(2, ("\n" * os.isatty(2) + f"dlc_jax: {line}\n").encode())
    tell(code, line)
    os._exit(code)


def _line(what: str) -> str:
    return what + (f"; {_kept}" if _kept else "")


def _leave_terminal() -> None:
    """If the terminal is gone, prints go nowhere: else an error would come before the save."""
    for number in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(number).st_mode) and not os.isatty(number):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
