"""Which checkpoints stay: the newest, every n-th, and the best by a metric."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from dlc_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retention:
    """What is kept.

    Attributes:
      keep: newest steps, at least 2: one stays until a newer one is sealed.
      keep_period: steps that are multiples of it are never deleted; 0 is none.
      keep_best: a metric, such as "validation/loss": the step where it was smallest stays; with "-"
        before it, as in "-monitor/probe/shape", the step where it was largest; "" is none.
    """

    keep: int = 2
    keep_period: int = 0
    keep_best: str = ""

    def __post_init__(self):
        if self.keep < 2:
            raise UserError(f"keep={self.keep} must be at least 2: the newest may turn out damaged")

    @property
    def metric(self) -> str:
        """The name alone."""
        return self.keep_best.removeprefix("-")

    def reasons(
        self, steps: Sequence[int], measured: Callable[[int], Mapping[str, float]]
    ) -> dict[int, list[str]]:
        """{step that stays: why, of "last", "every", "best"}.

        Args:
          steps: those with a seal, newest first.
          measured: (step) -> its metrics; asked only for `keep_best`. Of equals the newest is best.
        """
        kept = {step: ["last"] for step in steps[: self.keep]}
        if self.keep_period:
            for step in steps:
                if step % self.keep_period == 0:
                    kept.setdefault(step, []).append("every")
        if self.keep_best:
            sign = -1 if self.keep_best.startswith("-") else 1
            values = {step: measured(step).get(self.metric) for step in steps}
            values = {
                step: sign * value
                for step, value in values.items()
                if isinstance(value, int | float) and math.isfinite(value)
            }
            if values:
                kept.setdefault(min(values, key=values.__getitem__), []).append("best")
        return kept

    def check(self, measured: Mapping[str, float]) -> None:
        """Refuses a metric that is not among those its evaluator has just given.

        Raises:
          UserError: it is not; the line names those that there are.
        """
        source = self.metric.partition("/")[0]
        known = [name for name in measured if name.startswith(f"{source}/")]
        if self.keep_best and known and self.metric not in known:
            raise UserError(
                f"train.keep_best={self.keep_best!r}: {source} does not measure it, but "
                f"{', '.join(sorted(known))}; set it to one of these"
            )
