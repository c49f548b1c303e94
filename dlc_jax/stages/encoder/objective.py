"""What an encoder is trained for: the `objective` section, and its schedules."""

import dataclasses

import jax.numpy as jnp

from dlc_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """The `objective` section. What rises does so linearly: (start, end, steps).

    Attributes:
      teacher: how the teacher's scores become targets, "centering" or "sinkhorn".
      student_temperature: of the student's prototype softmax.
      teacher_temperature: of the teacher's; it rises.
      simplex_temperature: of the simplicial embedding: (student's, teacher's), and each rises.
      center_momentum: of the running means of teacher logits, one of crops and one of patches.
      momentum: (start, end) of the teacher's decay, a cosine over the run.
      dino: weight of the prototypes' cross-entropy; 1 in the paper.
      ibot: weight of the cross-entropy of masked patches; 1 in the paper, 0 draws no masks.
      mask_share: share of the global crops that have a mask.
      mask_ratio: range of the share of patches that one mask hides.
      mask_group: examples among which share and ratio are spread evenly.
      koleo: weight of the KoLeo term.
      koleo_group: examples in which nearest neighbors are looked for, see `ssl.koleo`; 0 is all.
      drop_path: share of the student's residuals that are left out; 0.3 in the paper.
      drop_path_group: examples, with all their crops, among which those are chosen. See
        `layers.drop_subsets`.
      consistency: weight of the positions' own cross-entropy between crops; 0 in the paper. Each
        position is a set of V prototypes whose targets are balanced over the batch (Sinkhorn).
      consistency_temperature: (student, teacher) of that term.
      plain: weight of the positions' cross-entropy between the image itself, not augmented, and
        the teacher's mean over its global crops, with that term's temperatures; 0 in the paper.
        Codes are taken from such images. What a crop changes is noise among crops, but in the
        image itself it is information, and positions keep some of it that crops do not agree on.
    """

    teacher: str = "centering"
    student_temperature: float = 0.1
    teacher_temperature: tuple[float, float, int] = (0.04, 0.07, 37_500)
    simplex_temperature: tuple[tuple[float, float, int], tuple[float, float, int]] = (
        (1.0, 1.0, 1),
        (1.0, 1.0, 1),
    )
    center_momentum: float = 0.9
    momentum: tuple[float, float] = (0.992, 1.0)
    dino: float = 1.0
    ibot: float = 1.0
    mask_share: float = 0.5
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    mask_group: int = 64
    koleo: float = 0.1
    koleo_group: int = 64
    drop_path: float = 0.3
    drop_path_group: int = 64
    consistency: float = 0.0
    consistency_temperature: tuple[float, float] = (1.0, 0.5)
    plain: float = 0.0

    def __post_init__(self):
        if self.teacher not in ("centering", "sinkhorn"):
            raise UserError(
                f"encoder.objective.teacher={self.teacher!r} is unknown; known: centering, sinkhorn"
            )
        if not 0 <= self.drop_path < 1:
            raise UserError(
                f"encoder.objective.drop_path={self.drop_path} must be at least 0 and below 1"
            )

    @property
    def reads_crops(self) -> bool:
        """Whether the student sees crops, and not the images themselves alone."""
        return any((self.dino, self.ibot, self.koleo, self.consistency))

    def groups(self) -> dict[str, int]:
        """The groups of examples that a microbatch must have whole, by the name of their field."""
        used = {
            "koleo_group": self.koleo and self.koleo_group,
            "mask_group": self.ibot,
            "drop_path_group": self.drop_path,
        }
        return {name: getattr(self, name) for name, weight in used.items() if weight}


def rise(schedule, step):
    """(start, end, steps) at a step: a straight line, and then its end."""
    start, end, steps = schedule
    return start + (end - start) * jnp.clip(step / max(1, steps), 0.0, 1.0)
