"""Checkpoints: saved in the background, sealed with checksums, restored newest first.

No other room knows Orbax.

    <directory>/1000/               written by Orbax, which renames it into place once complete
    <directory>/1000.sha256.json    its seal, written after that: size and SHA-256 of its files
    <directory>/2000.damaged/       a step that did not verify, moved aside when an older one was
                                    restored; never deleted

The rule. A step without its seal was cut short, and is skipped: the run goes on from the step
before and, being deterministic, makes the same step again. Only where no step has a seal (the very
first save was cut short, or the seals were not copied along) the newest step that is complete and
restores is taken, and sealed then. So kill -9 at any time leaves something to go on from, or
nothing saved at all; and an older step is deleted only after `keep` newer ones were sealed, and if
neither `keep_period` nor `keep_best` keeps it (retention.py).

A save ends alike in all processes: sealed, or with the same error, which the next step of training
raises (together.py). A step whose meta has a larger `format` than this code knows is refused, not
skipped.
"""

import logging
import sys
import traceback
import warnings

from dlc_jax.checkpoint.clearing import clear
from dlc_jax.checkpoint.run import Checkpoints
from dlc_jax.checkpoint.weights import (
    check_start,
    filled,
    fit,
    identities,
    identity_of,
    load_params,
    warm_start,
)

__all__ = [
    "Checkpoints",
    "check_start",
    "clear",
    "filled",
    "fit",
    "identities",
    "identity_of",
    "load_params",
    "warm_start",
]


def _silence():
    """Orbax logs all it does through absl, and a failed save goes on complaining in tracebacks.

    All that matters reaches the caller as one exception; nobody else's messages are touched.
    """

    def spoken_by_others(record):
        text = record.pathname
        if record.name == "asyncio":
            text += record.getMessage()
            text += "".join(traceback.format_exception(*record.exc_info) if record.exc_info else ())
        return "orbax" not in text

    def unraisable(report, show=sys.unraisablehook):
        if str(report.exc_value) != "Event loop is closed":
            show(report)

    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(spoken_by_others)
    warnings.filterwarnings("ignore", "coroutine 'async_serialize", RuntimeWarning)
    sys.unraisablehook = unraisable


_silence()
