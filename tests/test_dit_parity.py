"""DiT against diffusers' DiTTransformer2DModel in float32, with nothing at zero.

Two settings of diffusers' are DiT's own here, which its defaults are not: the epsilon of norms is
1e-6, and the frequencies of time go down by 1e4^(1/128) and not by 1e4^(1/127). DiT's weights were
trained with these, and so the network that reads them has these.
"""

import foreign_dit
import jax.numpy as jnp
import numpy as np
import pytest
from packages import import_or_skip
from small_models import apply

from dlc_jax.typing import Given

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
diffusers = import_or_skip("diffusers")

CLASSES = 10


def reference(heads, head_dim, **settings):
    """A model of diffusers with random weights everywhere; its blocks share their embedders."""
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
        **{"norm_eps": 1e-6, **settings},
    ).eval()
    random = np.random.default_rng(0)
    for path, leaf in model.named_parameters():
        spread = 1 / np.prod(leaf.shape[1:]) ** 0.5 if path.endswith("weight") else 0.3
        spread = 1.0 if "embedding_table" in path else spread
        drawn = spread * random.normal(size=leaf.shape)
        leaf.data = torch.from_numpy(drawn.astype(np.float32))
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model


@pytest.mark.parametrize("heads, head_dim", [(4, 16), (2, 72)])
def test_equals_diffusers(heads, head_dim):
    model = reference(heads, head_dim)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    assert state.keys() == foreign_dit.diffusers(classes=CLASSES).keys()
    ours, params = foreign_dit.from_state(state, heads=heads, image=16)
    random = np.random.default_rng(1)
    x = random.normal(size=(6, 4, 16, 16)).astype(np.float32)
    times, labels = np.array([0, 1, 250, 500, 777, 999]), np.array([0, 3, 9, 10, 5, 1])
    with torch.no_grad():
        inputs = (torch.from_numpy(array) for array in (x, times, labels))
        there = model(*inputs, return_dict=False)[0].numpy().transpose(0, 2, 3, 1)
    given = Given(label=jnp.asarray(labels))
    t = jnp.asarray(times / 1000, jnp.float32)
    here = apply(ours, {"params": params}, jnp.asarray(x.transpose(0, 2, 3, 1)), t, given)
    error = np.abs(here - there).max() / np.abs(there).max()
    assert error <= 1e-5, error
