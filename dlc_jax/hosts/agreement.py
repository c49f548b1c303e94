"""What several processes agree on without their devices, however long one of them takes.

A collective of devices would not do: it times out while a process reads files, and must not come
from a background thread.
"""

import collections
import json
import time
from typing import Any

import jax

from dlc_jax.errors import Interrupted

_MONTH = 30 * 24 * 3600 * 1000  # milliseconds
_rounds: collections.Counter[str] = collections.Counter()


def client() -> Any:
    """JAX's client of the coordination service; jax has no public name for it."""
    from jax._src import distributed

    return distributed.global_state.client


def meet(name: str) -> None:
    """Waits for all processes, for as long as they take.

    Raises:
      Interrupted: one of them has ended.
    """
    gather(name, None)


def agreed(name: str, value: Any) -> Any:
    """Process 0's value, JSON."""
    return gather(name, value if jax.process_index() == 0 else None)[0]


def gather(name: str, value: Any) -> list:
    """The value of every process, JSON, in their order. All of them call it, with the same name.

    Raises:
      Interrupted: one of them has ended.
    """
    if jax.process_count() == 1:
        return [value]
    service, me = client(), jax.process_index()
    key = f"dlc_jax/{name}/{_rounds[name]}"
    before = f"dlc_jax/{name}/{_rounds[name] - 1}/{me}"
    _rounds[name] += 1
    try:
        service.key_value_set(f"{key}/{me}", json.dumps(value))
        service.wait_at_barrier(key, _MONTH)
        values = dict(service.key_value_dir_get(f"{key}/"))
        if _rounds[name] > 1:
            service.key_value_delete(before)  # all have read it: they have come here since
    except jax.errors.JaxRuntimeError as error:
        time.sleep(5)  # whoever watches the others knows more, and ends this process meanwhile
        line = f"{name}: another process has ended; the same command, in all of them, goes on"
        raise Interrupted(line) from error
    return [json.loads(values[f"{key}/{process}"]) for process in range(jax.process_count())]
