"""What the functions of an encoder's stage read beside their arguments, and what a step costs."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from dlc_jax.composition import groups
from dlc_jax.data import masks
from dlc_jax.models.encoder import Encoder
from dlc_jax.stages.encoder.objective import Objective


@dataclasses.dataclass(frozen=True)
class Setup:
    """A stage's settings.

    Attributes:
      model, objective: of the section.
      crops: {kind: the section of `MultiCrop`}.
      steps: of the run.
    """

    model: Encoder
    objective: Objective
    crops: Mapping[str, Any]
    steps: int

    @functools.cached_property
    def kinds(self) -> list[str]:
        """Kinds of crops, in the order in which they share the positions out."""
        return sorted(self.crops)

    @functools.cached_property
    def ranges(self) -> dict[str, tuple[int, int]]:
        """{kind: (from, below)} of its positions."""
        shares = groups.shared_out(self.crops, self.model.simplicial.positions)
        return {kind: (share.start, share.stop) for kind, share in shares.items()}

    @property
    def size(self) -> int:
        """Side in pixels of an image that is not augmented."""
        return max(crops.global_size for crops in self.crops.values())

    def side(self, kind: str) -> int:
        """Patches on a side of a global crop."""
        return self.crops[kind].global_size // self.model.backbone.stride

    def number(self, kind: str, local: bool) -> int:
        """Of a kind's global or local crops: their draws are apart by it."""
        return 2 * self.kinds.index(kind) + local

    def buffer(self, kind: str) -> int:
        """Masked patches of a group of examples, at most."""
        return masks.buffer(
            images=self.objective.mask_group * self.crops[kind].global_crops,
            patches=self.side(kind) ** 2,
            share=self.objective.mask_share,
            ratio=self.objective.mask_ratio,
        )


def flops(setup: Setup) -> float:
    """Model FLOPs of a step for one image.

    Three forward passes of every crop for the student, one of the global crops for the teacher,
    both with registers, simplicial head and DINO head; and as many of the masked patches through
    their head. Drop path leaves the student's blocks their share of the work. Masked patches are
    counted as many as are hidden on the average; the buffer has a little room beyond. In the
    paper's sizes (2 crops of 261 tokens, 8 of 54) 1.64 TF, of which masked patches are 0.02;
    without drop path 2.18.
    """
    found = sum(_flops(setup, kind) for kind in setup.kinds)
    plain = 3 * setup.model.flops(setup.size, codes=True) if setup.objective.plain else 0.0
    return found + plain


def _flops(setup: Setup, kind: str) -> float:
    """Of one kind of crops."""
    model, objective, crops = setup.model, setup.objective, setup.crops[kind]
    teacher = crops.global_crops * model.flops(crops.global_size)
    if not objective.reads_crops:
        return teacher
    drop = objective.drop_path
    student = crops.global_crops * model.flops(crops.global_size, drop_path=drop)
    local = crops.local_crops * model.flops(crops.local_size, drop_path=drop)
    patches = 0.0
    if objective.ibot:
        hidden = objective.mask_share * sum(objective.mask_ratio) / 2
        patches = crops.global_crops * setup.side(kind) ** 2 * hidden
        patches *= model.dino.flops(model.backbone.width)
    return 3 * (student + local + patches) + teacher + patches
