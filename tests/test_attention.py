"""Every implementation of attention against one written with numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlc_jax.errors import UserError
from dlc_jax.kernels.attention import IMPLEMENTATIONS, attention
from dlc_jax.models.positions import rotary

B, N, H, K = 2, 7, 3, 8
implementations = pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))


def numpy_attention(qkv, mask=None, rotary=None, qk_scale=None, causal=False):
    """One example and one head at a time, with rotation by complex numbers."""
    qkv = np.asarray(qkv, np.float64)
    out = np.zeros(qkv.shape[:2] + qkv.shape[3:])
    half = qkv.shape[-1] // 2
    for b in range(qkv.shape[0]):
        for h in range(qkv.shape[3]):
            q, k, v = qkv[b, :, 0, h], qkv[b, :, 1, h], qkv[b, :, 2, h]
            if qk_scale is not None:
                q, k = (
                    x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * s
                    for x, s in zip((q, k), qk_scale)
                )
            if rotary is not None:
                turn = rotary[0] + 1j * rotary[1]
                q, k = ((x[:, :half] + 1j * x[:, half:]) * turn for x in (q, k))
                q, k = (np.concatenate([x.real, x.imag], -1) for x in (q, k))
            keys = np.arange(len(k)) if mask is None else np.flatnonzero(mask[b])
            weight = np.exp(q @ k[keys].T / np.sqrt(2 * half))
            if causal:
                weight = weight * (keys <= np.arange(len(q))[:, None])
            out[b, :, h] = weight / weight.sum(-1, keepdims=True) @ v[keys]
    return out


def inputs(seed=0):
    random = np.random.default_rng(seed)
    mask = random.random((B, N)) < 0.6
    mask[:, 0] = True
    return {
        "qkv": jnp.asarray(2 * random.normal(size=(B, N, 3, H, K)), jnp.float32),
        "mask": jnp.asarray(mask),
        "rotary": rotary(N, K),
        "causal": True,
        "qk_scale": tuple(jnp.asarray(random.uniform(0.5, 2, size=(2, K)), jnp.float32)),
    }


@implementations
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("mask",),
        ("rotary",),
        ("qk_scale",),
        ("causal",),
        ("mask", "rotary", "qk_scale", "causal"),
    ],
)
def test_equals_float64(implementation, options):
    data = inputs()
    chosen = {name: data[name] for name in options}
    out = jax.jit(lambda qkv: attention(qkv, implementation=implementation, **chosen))(data["qkv"])
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, numpy_attention(data["qkv"], **chosen), atol=3e-6)


@implementations
def test_masked_keys_are_not_read(implementation):
    data = inputs()
    hidden = ~data["mask"][:, :, None, None, None] & np.array([False, True, True])[:, None, None]
    changed = jnp.where(hidden, 1e4, data["qkv"])
    out, after = (
        attention(x, mask=data["mask"], implementation=implementation)
        for x in (data["qkv"], changed)
    )
    np.testing.assert_array_equal(out, after)


@implementations
def test_an_example_without_keys_stays_finite(implementation):
    data = inputs()
    mask = jnp.zeros((B, N), bool)
    out, grad = jax.value_and_grad(
        lambda x: attention(x, mask=mask, implementation=implementation).sum()
    )(data["qkv"])
    assert np.isfinite(out) and np.isfinite(grad).all()


@implementations
def test_rotary_reads_offsets_only(implementation):
    data = inputs()
    cos, sin = rotary(N + 5, K)

    def run(start):
        return attention(
            data["qkv"], rotary=(cos[start:][:N], sin[start:][:N]), implementation=implementation
        )

    np.testing.assert_allclose(run(0), run(5), atol=1e-5)
    assert np.abs(run(0) - attention(data["qkv"], implementation=implementation)).max() > 0.1


@implementations
def test_qk_norm_ignores_the_scale_of_queries_and_keys(implementation):
    data = inputs()
    scaled = data["qkv"] * np.array([7.0, 0.3, 1.0], np.float32)[:, None, None]
    out, after = (
        attention(x, qk_scale=data["qk_scale"], implementation=implementation)
        for x in (data["qkv"], scaled)
    )
    np.testing.assert_allclose(out, after, atol=1e-4)


@implementations
def test_bfloat16(implementation):
    data = inputs()
    chosen = {name: data[name] for name in ("mask", "rotary", "qk_scale")}
    out = attention(data["qkv"].astype(jnp.bfloat16), implementation=implementation, **chosen)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        out.astype(np.float32), numpy_attention(data["qkv"], **chosen), atol=0.08
    )


def test_unknown_implementation_is_named():
    with pytest.raises(UserError, match="'fast'.*xla"):
        attention(jnp.zeros((1, 2, 3, 1, 4)), implementation="fast")
