"""DiT as other programs have it: states by hand from the published names, and a way to read them.

Their entries are random, and nothing is zero.
"""

import numpy as np

from dlc_jax.cli import weights
from dlc_jax.interop import dit_names, files, slots
from dlc_jax.interop.weights import Weights
from dlc_jax.models.dit import DiT
from dlc_jax.models.positions import sincos_2d


def official(
    *, width=64, depth=2, image=16, patch=2, codes=(), classes=0, embedding=0, dtype=np.float32
):
    """The public DiT's names; with codes=(L, V) those of DLC."""
    d, tokens = width, (image // patch) ** 2
    shapes = {
        "x_embedder.proj": (d, 4, patch, patch),
        "t_embedder.mlp.0": (d, 256),
        "t_embedder.mlp.2": (d, d),
        **{
            f"blocks.{number}.{name}": shape
            for number in range(depth)
            for name, shape in {
                "attn.qkv": (3 * d, d),
                "attn.proj": (d, d),
                "mlp.fc1": (4 * d, d),
                "mlp.fc2": (d, 4 * d),
                "adaLN_modulation.1": (6 * d, d),
            }.items()
        },
        "final_layer.linear": (patch**2 * 8, d),
        "final_layer.adaLN_modulation.1": (2 * d, d),
    }
    random = np.random.default_rng(0)
    state = {}
    for name, shape in shapes.items():
        spread = np.prod(shape[1:]) ** -0.5
        state[f"{name}.weight"] = spread * random.normal(size=shape)
        state[f"{name}.bias"] = 0.3 * random.normal(size=shape[:1])
    if codes:
        length, values = codes
        state["sem_embedder.embedding_table"] = random.normal(size=(length, values + 1, d))
    if classes:
        state["y_embedder.embedding_table.weight"] = random.normal(size=(classes + 1, d))
    if embedding:
        state["y_embedder.fake_latent"] = random.normal(size=(1, embedding))
        state["y_embedder.embedding_table.weight"] = random.normal(size=(d, embedding))
    side = image // patch
    state["pos_embed"] = sincos_2d(side, side, d).reshape(1, tokens, d)
    return {name: tensor.astype(dtype) for name, tensor in state.items()}


def diffusers(*, classes, depth=2, **settings):
    """The same weights by the names of DiTTransformer2DModel, whose blocks have copies."""
    state = official(classes=classes, depth=depth, **settings)
    renamed = {}
    for kind in ("weight", "bias"):
        renamed[f"pos_embed.proj.{kind}"] = state[f"x_embedder.proj.{kind}"]
        renamed[f"proj_out_1.{kind}"] = state[f"final_layer.adaLN_modulation.1.{kind}"]
        renamed[f"proj_out_2.{kind}"] = state[f"final_layer.linear.{kind}"]
        for number in range(depth):
            there, here = f"transformer_blocks.{number}", f"blocks.{number}"
            for part, letter in zip(np.split(state[f"{here}.attn.qkv.{kind}"], 3), "qkv"):
                renamed[f"{there}.attn1.to_{letter}.{kind}"] = part
            for theirs, ours in (
                ("attn1.to_out.0", "attn.proj"),
                ("ff.net.0.proj", "mlp.fc1"),
                ("ff.net.2", "mlp.fc2"),
                ("norm1.linear", "adaLN_modulation.1"),
            ):
                renamed[f"{there}.{theirs}.{kind}"] = state[f"{here}.{ours}.{kind}"]
            embed = f"{there}.norm1.emb"
            for layer in (0, 2):
                name = f"{embed}.timestep_embedder.linear_{layer // 2 + 1}.{kind}"
                renamed[name] = state[f"t_embedder.mlp.{layer}.{kind}"]
            table = state["y_embedder.embedding_table.weight"]
            renamed[f"{embed}.class_embedder.embedding_table.weight"] = table
    return renamed


def from_state(state, **known):
    """(DiT, its parameters) of {name: array}."""
    shapes = {name: tensor.shape for name, tensor in state.items()}
    tensors = files.Tensors(shapes, state.__getitem__, {})
    found = Weights("here", dit_names.clean, lambda _: tensors)
    model = DiT(**dit_names.section(found.shapes, "here", **known))
    shapes = weights.shapes(model, (1, model.image, model.image, model.channels), (1,))
    layout = layout_of(model, shapes, dit_names.kind(found.shapes, "here"))
    return model, slots.nested(dit_names.read(found, layout, shapes))


def layout_of(model, shapes, name):
    side = model.image // model.patch
    positions = sincos_2d(side, side, model.width)
    settings = {"patch": model.patch, "channels": model.channels, "positions": positions}
    return dit_names.layout(shapes, name, **settings)
