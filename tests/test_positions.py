"""Positions: sine-cosine tables, rotary angles along two axes, both of torch's bicubic resizes."""

import jax.numpy as jnp
import numpy as np
import pytest
from packages import import_or_skip
from small_models import normal

from dlc_jax.errors import UserError
from dlc_jax.kernels.reference import rotate
from dlc_jax.models import positions


def test_sincos_2d():
    table = positions.sincos_2d(3, 2, 8)
    for row in range(3):
        for col in range(2):
            parts = [
                f(position * w)
                for position in (col, row)
                for f in (np.sin, np.cos)
                for w in (1, 0.01)
            ]
            np.testing.assert_allclose(table[row * 2 + col], parts, atol=1e-6)
    # a grid of half the size, stretched: its first cell lies between the first two of the full one
    np.testing.assert_allclose(
        positions.sincos_2d(2, 2, 8, extent=4)[0, :2], np.sin([0.5, 0.005]), atol=1e-6
    )
    with pytest.raises(UserError, match="18"):
        positions.sincos_2d(2, 2, 18)


def turned(side, *, before=0):
    """The same query and key at every token: [n, k] each."""
    q, k = normal(0, 8), normal(1, 8)
    angles = positions.axial_rotary(side, 8, before=before)
    return rotate(jnp.broadcast_to(q, (before + side**2, 8)), *angles), rotate(
        jnp.broadcast_to(k, (before + side**2, 8)), *angles
    )


def test_axial_rotary_sees_differences_along_both_axes():
    q, k = turned(4)
    scores = np.asarray(q @ k.T).reshape(4, 4, 4, 4)
    for offset in ((0, 0), (1, 0), (0, 1), (2, 1), (1, -2)):
        pairs = [
            scores[y, x, y + offset[0], x + offset[1]]
            for y in range(4)
            for x in range(4)
            if 0 <= y + offset[0] < 4 and 0 <= x + offset[1] < 4
        ]
        np.testing.assert_allclose(pairs, pairs[0], atol=1e-5)
    assert (
        len(np.unique(scores[1, 1].round(4))) == 16
    )  # every offset from a patch has a score of its own


def test_axial_rotary_angles():
    cos, sin = positions.axial_rotary(4, 8, before=3)
    assert cos.shape == sin.shape == (3 + 16, 4)
    np.testing.assert_array_equal(cos[:3], np.ones((3, 4)))
    np.testing.assert_array_equal(sin[:3], np.zeros((3, 4)))
    # row 1, column 2: centers at -1/4 and 1/4 of -1..1, periods 1 and 10
    angle = 2 * np.pi * np.array([-0.25, -0.025, 0.25, 0.025])
    np.testing.assert_allclose(cos[3 + 6], np.cos(angle), atol=1e-6)
    np.testing.assert_allclose(sin[3 + 6], np.sin(angle), atol=1e-6)
    with pytest.raises(UserError, match="heads of width 6"):
        positions.axial_rotary(4, 6)


def test_cubic_matrix_by_hand():
    # twice as many: number 3 lies at 1.25, between sources 1 and 2
    row = positions.cubic_matrix(8, 4, antialias=False)[3]
    t = 0.25
    near, far = (
        lambda x: 1.25 * x**3 - 2.25 * x**2 + 1,
        lambda x: -0.75 * (x**3 - 5 * x**2 + 8 * x - 4),
    )
    np.testing.assert_allclose(row, [far(1 + t), near(t), near(1 - t), far(2 - t)], atol=1e-12)
    # at the edge, what would lie outside goes to the number at the edge
    row = positions.cubic_matrix(8, 4, antialias=False)[0]
    np.testing.assert_allclose(
        row, [far(1.75) + near(0.75) + near(0.25), far(1.25), 0, 0], atol=1e-12
    )


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("target, source", [(7, 37), (16, 37), (37, 16), (37, 37), (1, 4), (5, 1)])
def test_cubic_matrix_keeps_constants_and_mirrors(target, source, antialias):
    weight = positions.cubic_matrix(target, source, antialias=antialias)
    np.testing.assert_allclose(weight.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(weight, weight[::-1, ::-1], atol=1e-9)
    if target == source:
        np.testing.assert_allclose(weight, np.eye(source), atol=1e-12)


@pytest.mark.torch
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(
    "target, source", [(7, 37), (16, 37), (37, 16), (37, 37), (7, 16), (9, 10), (23, 3)]
)
def test_resize_is_that_of_torch(target, source, antialias):
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(0).uniform(-1, 1, (source**2, 5)).astype(np.float32)
    found = positions.resize(jnp.asarray(table), target, antialias=antialias)
    for dtype, error in (
        (torch.float64, 1e-6),
        (torch.float32, 5e-6),
    ):  # in float32 torch rounds the places themselves
        grid = torch.from_numpy(table).to(dtype).reshape(1, source, source, 5).permute(0, 3, 1, 2)
        expected = torch.nn.functional.interpolate(
            grid, (target, target), mode="bicubic", antialias=antialias
        )
        np.testing.assert_allclose(
            found, expected.permute(0, 2, 3, 1).reshape(-1, 5).numpy(), rtol=0, atol=error
        )


@pytest.mark.torch
@pytest.mark.parametrize("target", [7, 16])
def test_resize_with_an_offset_is_that_of_torch_by_a_factor(target):
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(0).uniform(-1, 1, (37**2, 5)).astype(np.float32)
    found = positions.resize(jnp.asarray(table), target, antialias=False, offset=0.1)
    grid = torch.from_numpy(table).double().reshape(1, 37, 37, 5).permute(0, 3, 1, 2)
    factor = (target + 0.1) / 37
    expected = torch.nn.functional.interpolate(
        grid, scale_factor=(factor, factor), mode="bicubic", antialias=False
    )
    np.testing.assert_allclose(
        found, expected.permute(0, 2, 3, 1).reshape(-1, 5).numpy(), rtol=0, atol=1e-6
    )


@pytest.mark.torch
@pytest.mark.parametrize("side, k", [(4, 16), (14, 64)])
def test_axial_rotary_is_that_of_dinov3(side, k):
    torch = pytest.importorskip("torch")
    dinov3 = import_or_skip("transformers.models.dinov3_vit.modeling_dinov3_vit")
    config = dinov3.DINOv3ViTConfig(
        hidden_size=2 * k,
        num_attention_heads=2,
        patch_size=16,
        image_size=16 * side,
        rope_theta=100.0,
    )
    angles = dinov3.DINOv3ViTRopePositionEmbedding(config).eval()(
        torch.zeros(1, 3, 16 * side, 16 * side)
    )
    q = np.random.default_rng(0).normal(size=(5 + side**2, k)).astype(np.float32)
    expected, _ = dinov3.apply_rotary_pos_emb(torch.from_numpy(q), torch.from_numpy(q), *angles)
    found = rotate(jnp.asarray(q), *positions.axial_rotary(side, k, before=5))
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
