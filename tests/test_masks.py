"""Block masks: how many, how large, of what shape; what they depend on, and the buffer that holds
what they hide.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlc_jax.data import loader, masks
from dlc_jax.errors import UserError
from dlc_jax.losses import masked

PAPER = {"images": 128, "side": 16}


def paper(seed):
    return masks.stratified(np.random.default_rng(seed), **PAPER)


def test_half_of_the_crops_hide_ratios_spread_over_the_range():
    counts = np.array([paper(seed).sum(1) for seed in range(8)])
    assert ((counts > 0).sum(1) == 64).all()
    bins = np.linspace(0.1, 0.5, 65)
    targets = np.sort(counts)[:, 64:]
    low, high = (256 * bins[:-1]).astype(int), (256 * bins[1:]).astype(int)
    assert (targets <= high).all()  # never more than was asked
    # Blocks may stop a little short, and then the order of the next ones shifts.
    assert np.mean(targets >= low) > 0.9
    assert 256 * 0.28 < targets.mean() < 256 * 0.3
    where = np.nonzero(counts[0])[0]
    # Dealt out over the group, not the first half of it.
    assert (np.diff(where) > 1).any() and where[0] < 64 < where[-1]
    assert abs(np.corrcoef(where, counts[0][where])[0, 1]) < 0.4


def test_masks_are_blocks_all_over_the_image():
    drawn = np.concatenate([paper(seed) for seed in range(16)]).reshape(-1, 16, 16)
    drawn = drawn[drawn.any((1, 2))]
    neighbors = (drawn[:, 1:] & drawn[:, :-1]).sum() + (drawn[..., 1:] & drawn[..., :-1]).sum()
    assert neighbors / drawn.sum() > 1.4  # 2 inside a block, 0.6 for single patches at this share
    share = drawn.mean(0)
    assert share.min() > 0.02 and share.max() < 0.6  # few boxes reach a corner
    # Boxes that lie within the image cover its middle more often.
    assert share[4:12, 4:12].mean() > share.mean()


def test_one_block_has_the_shapes_it_should():
    shapes = []
    for seed in range(300):
        mask = np.zeros((16, 16), bool)
        masks._hide(mask, np.random.default_rng(seed), 12)
        rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        if height * width == mask.sum() > 6:  # a single block
            shapes.append(width / height)
    assert len(shapes) > 30 and min(shapes) < 0.5 and max(shapes) > 2
    # 0.3 to 1 / 0.3, sides rounded to whole patches.
    assert 1 / 6 <= min(shapes) and max(shapes) <= 6
    assert abs(np.log(shapes).mean()) < 0.25


@pytest.mark.parametrize("seed", range(3))
def test_no_block_is_larger_than_half_and_no_mask_than_asked(seed):
    mask = np.zeros((4, 4), bool)
    masks._hide(mask, np.random.default_rng(seed), 16)
    assert mask.sum() > 8  # so it took several
    small = np.zeros((4, 4), bool)
    masks._hide(small, np.random.default_rng(seed), 3)
    assert 0 < small.sum() <= 3
    none = np.zeros((4, 4), bool)
    masks._hide(none, np.random.default_rng(seed), 0)
    assert not none.any()


def test_buffer_is_the_most_that_a_group_hides():
    size = masks.buffer(images=128, patches=256, share=0.5, ratio=(0.1, 0.5))
    assert size == sum(int(256 * high) for high in np.linspace(0.1, 0.5, 65)[1:]) == 4941
    assert all(0.9 * size < paper(seed).sum() <= size for seed in range(8))
    assert masks.buffer(images=3, patches=16, share=0.0, ratio=(0.1, 0.5)) == 0


@pytest.mark.parametrize(
    "share, ratio", [(1.5, (0.1, 0.5)), (0.5, (0.5, 0.1)), (0.5, (-0.1, 0.5)), (0.5, (0.1, 1.5))]
)
def test_shares_that_are_none(share, ratio):
    with pytest.raises(UserError, match="mask_share"):
        masks.GroupMasks({"all": (2, 4)}, group=2, seed=0, share=share, ratio=ratio)


class Numbers:
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return {"x": np.float32(index)}


def collect(steps, *, batch=8, processes=1, start=0, seed=0):
    """The masks of some batches, rows of all processes joined."""
    grouped = masks.GroupMasks({"b": (1, 4), "a": (2, 3)}, group=4, seed=seed)
    parts = []
    for process in range(processes):
        batches = loader.batches(
            Numbers(),
            batch=batch,
            seed=seed,
            grouped=grouped,
            rows=np.array_split(np.arange(batch), processes)[process],
        )
        batches.set_state({"global_next_index": start})
        parts.append([next(batches) for _ in range(steps)])
        batches.close()
    return [
        {
            name: np.concatenate([part[i][name] for part in parts])
            for name in ("a/masked", "b/masked", "x")
        }
        for i in range(steps)
    ]


def same(one, other):
    for a, b in zip(one, other, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_masks_are_the_groups_own():
    """They depend neither on processes, even where a group lies on two, nor on the size of the
    batch, nor on a restart.
    """
    whole = collect(4)
    assert whole[0]["a/masked"].shape == (8, 2, 9) and whole[0]["b/masked"].shape == (8, 1, 16)
    assert whole[0]["a/masked"].dtype == bool
    for processes in (2, 4, 8):
        same(whole, collect(4, processes=processes))
    same(whole[2:], collect(2, start=16))
    wide = collect(2, batch=16)
    for name in ("a/masked", "b/masked"):
        np.testing.assert_array_equal(
            np.concatenate([b[name] for b in whole]), np.concatenate([b[name] for b in wide])
        )
    assert (whole[0]["a/masked"] != whole[1]["a/masked"]).any()
    assert (whole[0]["a/masked"][:4] != whole[0]["a/masked"][4:]).any()
    assert (collect(1, seed=1)[0]["a/masked"] != whole[0]["a/masked"]).any()


def test_buffer_of_places_and_shares():
    hidden = np.zeros((4, 2, 5), bool)
    hidden[0, 1, [1, 3]] = hidden[1, 0, 4] = hidden[3, 1] = True
    place, share = masked.fill(jnp.asarray(hidden), group=2, size=6)
    assert place.tolist() == [[6, 8, 14, 0, 0, 0], [15, 16, 17, 18, 19, 0]]
    np.testing.assert_allclose(share, [[0.5, 0.5, 1, 0, 0, 0], [0.2] * 5 + [0]], rtol=1e-6)
    patches = np.arange(8 * 5 * 3, dtype=np.float32).reshape(8, 5, 3)
    taken = masked.take(jnp.asarray(patches), place)
    flat = patches.reshape(2, 20, 3)
    np.testing.assert_array_equal(taken, [flat[i][place[i]] for i in (0, 1)])


def test_every_masked_patch_is_in_the_buffer_and_the_shares_sum_to_the_images():
    drawn = np.stack([paper(seed) for seed in range(2)]).reshape(128, 2, 256)
    size = masks.buffer(images=128, patches=256, share=0.5, ratio=(0.1, 0.5))
    place, share = jax.jit(masked.fill, static_argnames=("group", "size"))(
        drawn, group=64, size=size
    )
    assert (share > 0).sum(1).tolist() == drawn.reshape(2, -1).sum(1).tolist()
    np.testing.assert_allclose(share.sum(1), 64, rtol=1e-5)
