"""One folder for all processes: on a file system that they share, or in an object store."""

import secrets
from pathlib import Path

import jax

from dlc_jax import remote
from dlc_jax.errors import UserError
from dlc_jax.hosts.agreement import agreed, gather, meet


def check_shared(directory: Path) -> None:
    """Refuses a directory that is not the same one in all processes.

    Raises:
      UserError: in all processes; process 0 wrote a file there that another does not see.
    """
    if jax.process_count() == 1 or remote.is_copy(directory):
        return
    path = directory / agreed("shared", f".shared-{secrets.token_hex(8)}")
    if jax.process_index() == 0:
        path.touch()
    meet("written")
    seen = path.exists()
    blind = [process for process, sees in enumerate(gather("seen", seen)) if not sees]
    if jax.process_index() == 0:
        path.unlink(missing_ok=True)
    meet("removed")  # before anyone ends, which would end process 0 too
    if blind:
        raise UserError(
            f"{directory} is not the same folder in process {blind[0]} as in process 0; give a "
            "--workdir on a file system that all of them share"
        )


def share(directory: Path, what: str, *, whole: bool = False) -> None:
    """Where all processes meet so that each sees what the others have written in `directory`.

    On a file system that is all. Of an object store's folder each has a copy: what is new in it
    goes to the store before they meet, and what is new in the store comes here after that.

    Args:
      what: names the meeting.
      whole: see `remote.fetch`.
    """
    remote.send(directory)
    meet(what)
    remote.fetch(directory, whole=whole)
