"""Optimizers and learning-rate schedules, all of them optax; which parameters decay is decided by name."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import optax

from dlc_jax.errors import UserError
from dlc_jax.typing import Tree


class Optimizer(NamedTuple):
    """An optax transformation, and the learning rate by step, for the log."""

    tx: optax.GradientTransformation
    learning_rate: Callable


def decays(params: Tree) -> Tree:
    """True for the matrices that weight decay shrinks: leaves named `kernel`. Biases, norms, tables, tokens and scales are left alone.

    Decided by name, because scanned layers give even a bias two dimensions.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def make(
    *,
    steps: int,
    learning_rate: float = 1e-3,
    schedule: str = "constant",
    warmup: int = 0,
    final: float = 0.0,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> Optimizer:
    """AdamW with a linear warm-up.

    Args:
      steps: length of the run, at which a decaying schedule ends.
      schedule: after the warm-up: "constant", "cosine" or "linear" towards `final * learning_rate`.
      warmup: steps over which the rate rises from 0.
      weight_decay: decoupled, on kernels only (see `decays`).

    Raises:
      UserError: an unknown schedule.
    """
    rest = max(1, steps - warmup)
    schedules = {
        "constant": lambda: optax.constant_schedule(learning_rate),
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, rest, alpha=final),
        "linear": lambda: optax.linear_schedule(learning_rate, final * learning_rate, rest),
    }
    if schedule not in schedules:
        raise UserError(f"optimizer.schedule={schedule!r} is unknown; known: {', '.join(schedules)}")
    rate = schedules[schedule]()
    if warmup:
        rate = optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup), rate], [warmup])
    return Optimizer(optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decays), rate)
