"""Block masks of patches for iBOT (arXiv 2111.07832), as DINOv2 trains it.

The student does not see what is masked, and must name it.

Masks are stratified: among the crops of a group of examples a fixed share has one, and the ratios
that they hide are spread evenly. So a group is drawn as a whole, from its number in the run and
nothing else, on whatever process its examples are.
"""

import math

import numpy as np

from dlc_jax.errors import UserError

MASKS = 0x6D61736B  # keeps these draws apart from those of crops


def buffer(*, images: int, patches: int, share: float, ratio: tuple[float, float]) -> int:
    """The most patches that the masks of a group of `images` crops can hide."""
    return sum(int(patches * high) for high in _bins(images, share, ratio)[1:])


def stratified(
    rng: np.random.Generator,
    *,
    images: int,
    side: int,
    share: float = 0.5,
    ratio: tuple[float, float] = (0.1, 0.5),
) -> np.ndarray:
    """Masks of a group of crops, bool [images, side * side].

    int(images * share) of them hide something. The range of `ratio` is cut into as many equal bins;
    a ratio is drawn in each, and the masks are dealt out in random order.
    """
    bins = _bins(images, share, ratio)
    out = np.zeros((images, side, side), bool)
    for mask, low, high in zip(out, bins, bins[1:]):
        _hide(mask, rng, int(side * side * rng.uniform(low, high)))
    rng.shuffle(out)
    return out.reshape(images, side * side)


class GroupMasks:
    """Draws the masks of every kind of crops for a group: a `grouped` of `loader.batches`.

    Args:
      kinds: {kind: (global crops, patches on a side of one)}; each gives a field `kind/masked`,
        bool [group, crops, patches].
      group: examples that are drawn together.
      share, ratio: see `stratified`.
      seed: of the run.

    Raises:
      UserError: a share or ratio outside 0 to 1.
    """

    def __init__(
        self,
        kinds: dict[str, tuple[int, int]],
        *,
        group: int,
        seed: int,
        share: float = 0.5,
        ratio: tuple[float, float] = (0.1, 0.5),
    ):
        if not 0 <= share <= 1 or not 0 <= ratio[0] <= ratio[1] <= 1:
            raise UserError(
                f"masks need shares from 0 to 1, low before high; got mask_share={share} "
                f"mask_ratio={ratio}"
            )
        self.kinds = dict(sorted(kinds.items()))
        self.group, self._seed, self._share, self._ratio = group, seed, share, ratio

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        """The masks of the `number`-th group of the run."""
        rng = np.random.default_rng([MASKS, self._seed, number])
        out = {}
        for kind, (crops, side) in self.kinds.items():
            masks = stratified(
                rng, images=self.group * crops, side=side, share=self._share, ratio=self._ratio
            )
            out[f"{kind}/masked"] = masks.reshape(self.group, crops, side * side)
        return out


def _bins(images, share, ratio):
    return np.linspace(*ratio, int(images * share) + 1)


def _hide(mask, rng, patches):
    """Sets about `patches` entries, never more, in blocks.

    A block has at least 4 entries and at most half of all, and width / height 0.3 to 1 / 0.3.

    Blocks may overlap. It ends early when ten tries find no block that fits and hides something
    new.
    """
    side, log_aspect = len(mask), math.log(0.3)
    while (left := patches - int(mask.sum())) > 0:
        most = min(left, mask.size // 2)
        for _ in range(10):
            area = rng.uniform(min(4, most), most)
            aspect = math.exp(rng.uniform(log_aspect, -log_aspect))
            height, width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if height > side or width > side:
                continue
            top, start = rng.integers(side - height + 1), rng.integers(side - width + 1)
            block = mask[top : top + height, start : start + width]
            if 0 < block.size - int(block.sum()) <= most:
                block[:] = True
                break
        else:
            return
