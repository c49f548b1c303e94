"""What must be the same in every process, compared before anything is computed."""

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from dlc_jax.errors import UserError
from dlc_jax.hosts.agreement import agreed, gather, meet

LISTED = 5  # differences that a line names


def check_alike(what: str, facts: Mapping[str, Any]) -> None:
    """Refuses to go on if `facts` are not those of process 0.

    Args:
      what: is compared, in words.
      facts: {name: JSON}.

    Raises:
      UserError: in all processes the same one, of the first that differs: what differs, and how.
    """
    if jax.process_count() == 1:
        return
    mine = json.loads(json.dumps(dict(facts), sort_keys=True, default=str))
    first = agreed(what, mine)
    names = [name for name in sorted(first | mine) if first.get(name) != mine.get(name)]
    lines = [f"{name}: {first.get(name)} there, {mine.get(name)} here" for name in names]
    more = f"; and {len(lines) - LISTED} more" if len(lines) > LISTED else ""
    said = gather(f"{what} compared", "; ".join(lines[:LISTED]) + more if lines else "")
    for process, text in enumerate(said):
        if text:
            raise UserError(
                f"process {process} has another {what} than process 0 ({text}); start all of them "
                "with the same code, packages and command"
            )


def check_shared(directory: Path) -> None:
    """Refuses a directory that is not the same one in all processes.

    Raises:
      UserError: in all processes; process 0 wrote a file there that another does not see.
    """
    if jax.process_count() == 1:
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
