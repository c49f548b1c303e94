"""Turns among the processes that run tests beside each other."""

import contextlib
import fcntl


@contextlib.contextmanager
def taken(folder, *, alone):
    """A turn in `folder`, which all of them share: beside others' or, `alone`, beside nobody's.

    Who waits for a turn alone is passed by nobody: all come in through one door, and it waits
    there. Without a folder there are no others.
    """
    if folder is None:
        yield
        return
    with open(folder / "room.lock", "w") as room:
        with open(folder / "door.lock", "w") as door:
            fcntl.flock(door, fcntl.LOCK_EX)
            fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield
