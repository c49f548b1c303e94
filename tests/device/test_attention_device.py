"""Every implementation of attention at the models' sizes, on the device that is here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_errors import OPTIONS, errors, gradients, inputs

from dlc_jax.errors import UserError
from dlc_jax.kernels.attention import IMPLEMENTATIONS, attention

pytestmark = pytest.mark.device
implementations = pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))
# They normalize within. Of the others the gradient of what was normalized is rounded to bfloat16,
# and that of qk_scale, a sum of thousands of them, is off by 1.1e-2 (xla, at DiT-XL/2's size).
FUSED = {"pallas_tpu", "pallas_gpu"}
CASES = {  # n, h, k, options
    "DiT-XL/2": (256, 16, 72, ()),
    "DiT-XL/2, normalized and rotated": (256, 16, 72, ("rotary", "qk_scale")),
    "DiT-XL/2, 512 px": (1024, 16, 72, ()),
    "9 heads": (256, 9, 128, ("rotary", "qk_scale")),
    "ViT-L, global crop": (261, 16, 64, ()),
    "ViT-L, local crop": (54, 16, 64, ()),
    "SEDD-medium": (512, 16, 64, ("rotary",)),
    "short": (16, 12, 64, ("mask",)),
    "one token": (1, 2, 64, ()),
    "everything": (49, 3, 72, OPTIONS),
}


def named(implementation):
    """`attention` by that name; skips, with the reason, what it refuses."""

    def run(qkv, **given):
        try:
            return attention(qkv, implementation=implementation, **given)
        except UserError as error:
            pytest.skip(str(error))

    return run


@implementations
@pytest.mark.parametrize("case", CASES)
def test_equals_float64(implementation, case):
    n, h, k, options = CASES[case]
    batch = max(1, 1024 // max(n, 256))
    found = errors(named(implementation), *inputs(batch, n, h, k, jnp.bfloat16, options))
    assert max(found[:2]) < 1e-2
    assert max(found[2:], default=0) < (1e-2 if implementation in FUSED else 2e-2)


@implementations
@pytest.mark.parametrize("case", ["DiT-XL/2", "ViT-L, local crop", "everything"])
def test_equals_float64_in_float32(implementation, case):
    n, h, k, options = CASES[case]
    with jax.default_matmul_precision("highest"):
        found = errors(named(implementation), *inputs(2, n, h, k, jnp.float32, options))
    assert max(found) < 1e-5


@implementations
@pytest.mark.parametrize("case", ["DiT-XL/2", "ViT-L, local crop", "9 heads"])
def test_each_example_of_a_batch_is_its_own(implementation, case):
    """128 examples and more: the last are those of a batch of four."""
    n, h, k, options = CASES[case]
    qkv, out_grad, given = inputs(-(-2048 // h), n, h, k, jnp.bfloat16, options)
    whole = gradients(named(implementation), qkv, out_grad, **given)
    few = gradients(named(implementation), qkv[-4:], out_grad[-4:], **given)
    for part, alone in zip(whole[:2], few):
        part, alone = np.asarray(part[-4:], np.float32), np.asarray(alone, np.float32)
        np.testing.assert_allclose(part, alone, atol=1e-2 * np.abs(alone).max())


@implementations
def test_masked_keys_are_not_read(implementation):
    qkv, out_grad, given = inputs(4, 54, 4, 64, jnp.bfloat16, ("mask",))
    hidden = ~given["mask"][:, :, None, None, None] & jnp.array([False, True, True])[:, None, None]
    changed = jnp.where(hidden, 1e4, qkv).astype(qkv.dtype)
    found, after = (named(implementation)(x, **given) for x in (qkv, changed))
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(after, np.float32))
