"""What must be the same in every process, compared before anything is computed."""

import json
from collections.abc import Mapping
from typing import Any

import jax

from dlc_jax.errors import UserError
from dlc_jax.hosts.agreement import agreed, gather

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
