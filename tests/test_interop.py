"""Names and files of other programs: every parameter has a place, nothing is used twice.

What is damaged or foreign is refused.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign_weights import DEPTH, POSITIONS, VALUES, WIDTH, official, transformers

from dlc_jax.cli.weights import abstract
from dlc_jax.errors import UserError
from dlc_jax.interop import files, sections, slots, torch_names, weights
from dlc_jax.models.encoder import Encoder
from dlc_jax.models.simplicial import DinoHead, Simplicial
from dlc_jax.models.vit import ViT

VARIANTS = {
    "plain": dict(readout="plain", head=True),
    "shared": dict(readout="shared", head=2),
    "pos-shared": dict(readout="pos-shared", head=True, registers=0),
    "swiglu": dict(readout="plain", head=True, mlp="swiglu"),
}


def parts(found):
    """The encoder that shapes ask for."""
    head = sections.head(found, "here")
    return Encoder(
        ViT(**sections.vit(found, "here")),
        Simplicial(**sections.simplicial(found, None, VALUES, "here")),
        DinoHead(**head.get("dino", {})),
        head.get("separate_head", False),
    )


def encoder(state):
    """(Encoder, {path: shape}) that a state dict's shapes ask for."""
    model = parts({name: tensor.shape for name, tensor in state.items()})
    images = jnp.zeros((1, model.backbone.image, model.backbone.image, 3))
    return model, slots.shapes_of(jax.eval_shape(model.init, jax.random.key(0), images)["params"])


def weights_of(tmp_path, state, metadata=None):
    files.save(tmp_path / "state.safetensors", state, metadata)
    return weights.Weights(tmp_path / "state.safetensors", torch_names.clean)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_table_of_the_official_names_is_the_published_state_and_covers_the_model(variant):
    state = official(**VARIANTS[variant])
    model, shapes = encoder(state)
    head = model.simplicial
    assert (head.positions, head.values) == (POSITIONS, VALUES)
    assert head.readout == VARIANTS[variant]["readout"]
    table = torch_names.official(shapes)
    unused = {"sem_cls_norm.weight", "sem_cls_norm.bias"}
    assert {name: slot.shape for name, slot in table.items()} == {
        name: tensor.shape for name, tensor in state.items() if name not in unused
    }
    # each entry of our parameters exactly once
    counts = {path: np.zeros(shape, int) for path, shape in shapes.items()}
    for slot in table.values():
        counts[slot.path][slot.index] += 1
    assert all((count == 1).all() for count in counts.values())


@pytest.mark.parametrize("registers, mlp", [(4, "gelu"), (0, "gelu"), (4, "swiglu")])
def test_both_layouts_give_the_same_parameters(tmp_path, registers, mlp):
    state = official(registers=registers, mlp=mlp)
    found = []
    for theirs in (state, transformers(state)):
        given = weights_of(tmp_path, theirs)
        section = sections.vit(given.shapes, "here")
        sizes = {"image": 12, "patch": 4, "width": 128, "depth": 2, "heads": 2}
        assert section | sizes | {"mlp": mlp, "mlp_ratio": 4.0} == section
        assert section["registers"] == registers
        assert section["pos_resize"] == ("antialias" if registers else "plain")
        shapes = slots.shapes_of({"vit": abstract(ViT(**section), (1, 12, 12, 3))})
        table = torch_names.layout(given.shapes)(shapes)
        found.append(given.params(table, shapes))
        back = weights.tensors(found[-1], table, "here")
        assert back.keys() == theirs.keys() and all(
            (back[name] == theirs[name]).all() for name in theirs
        )
    assert found[0].keys() == found[1].keys() and all(
        (found[0][path] == found[1][path]).all() for path in found[0]
    )


def test_where_single_entries_go(tmp_path):
    state = official(readout="pos-shared", head=True)
    _, shapes = encoder(state)
    given = weights_of(tmp_path, state)
    ours = given.params(torch_names.official(shapes), shapes, unused=torch_names.UNUSED)
    # rows of the packed projection: queries, keys, values; then heads; then entries of a head
    row, qkv = 2 * WIDTH + 64 + 5, "vit/blocks/attention/qkv"
    assert ours[f"{qkv}/kernel"][1, 7, 2, 1, 5] == state["blocks.1.attn.qkv.weight"][row, 7]
    assert ours[f"{qkv}/bias"][1, 2, 1, 5] == state["blocks.1.attn.qkv.bias"][row]
    # patches are flattened as row, column, channel
    kernel = ours["vit/patch_embed/kernel"]
    assert kernel[(2 * 4 + 3) * 3 + 1, 9] == state["patch_embed.proj.weight"][9, 1, 2, 3]
    # row i * V + v of the embedding, column of the second register
    row, column = 3 * VALUES + 5, 2 * WIDTH + 11
    assert ours["simplicial/embed/kernel"][column, row] == state["sem_embed.weight"][row, column]
    assert ours["simplicial/bias"][4, 3] == state["sem_bias"][4, 3]
    assert ours["head/direction"][3, 17] == state["dino_head.last_layer.weight_v"][17, 3]
    assert ours["head/gain"][17] == state["dino_head.last_layer.weight_g"][17, 0]
    assert ours["head/fc2/kernel"][3, 4] == state["dino_head.mlp.2.weight"][4, 3]


@pytest.mark.parametrize(
    "name, known",
    [
        ("module._orig_mod.backbone.blocks.0.ls1.gamma", "blocks.0.ls1.gamma"),
        ("backbone.blocks.2.17.attn.qkv.weight", "blocks.17.attn.qkv.weight"),
        ("blocks.3.mlp.fc1.weight", "blocks.3.mlp.fc1.weight"),
        ("dino_head.mlp.0.weight", "dino_head.mlp.0.weight"),
        ("encoder.layer.1.mlp.fc1.bias", "encoder.layer.1.mlp.fc1.bias"),
        ("my.backbone.norm.weight", "my.backbone.norm.weight"),  # a prefix is one only in front
    ],
)
def test_clean(name, known):
    assert torch_names.clean(name) == known


def test_codes_are_of_the_shape_that_tensors_or_the_caller_tell():
    shapes = {name: tensor.shape for name, tensor in official(readout="plain").items()}
    both = {"positions": POSITIONS, "values": VALUES, "readout": "plain"}
    for given in ((POSITIONS, None), (None, VALUES), (POSITIONS, VALUES)):
        assert sections.simplicial(shapes, *given, "here") == both
    for given, words in (
        ((None, None), "give --positions or --values"),
        ((5, None), "48, not 5 x 9"),
        ((6, 9), "not 6 x 9"),
    ):
        with pytest.raises(UserError, match=words):
            sections.simplicial(shapes, *given, "here")
    shared = {name: tensor.shape for name, tensor in official(readout="shared").items()}
    assert sections.simplicial(shared, None, None, "here") == both | {"readout": "shared"}
    with pytest.raises(UserError, match="have 6 positions, not 3; leave --positions out"):
        sections.simplicial(shared, 3, None, "here")
    # tensors that contradict each other are no matter of the flags
    for odd, words in (
        ({"sem_out.weight": (128, 7)}, "48 rows, not a multiple of 7"),
        ({"sem_bias": (5, 128)}, "48 rows, not 5 x 8"),
    ):
        with pytest.raises(UserError, match=words):
            sections.simplicial(shared | odd, None, None, "here")


def test_the_depth_is_counted():
    shapes = {name: tensor.shape for name, tensor in official(depth=DEPTH + 1).items()}
    assert sections.vit(shapes, "here")["depth"] == DEPTH + 1


# ---- what is refused


def changed(change):
    state = official(readout="plain", head=True)
    if change == "missing":
        del state["blocks.1.attn.qkv.bias"]
    elif change == "hole":  # a block between others
        state = {
            name: tensor
            for name, tensor in official(depth=3).items()
            if not name.startswith("blocks.1.")
        }
    elif change == "extra":
        state["sem_bias2"] = np.zeros((2, 2), np.float32)
    elif change == "misshaped":
        state["blocks.0.mlp.fc2.weight"] = state["blocks.0.mlp.fc2.weight"].T.copy()
    elif change == "double":
        state["norm.weight"] = state["norm.weight"].astype(np.float64)
    elif change == "nan":
        state["norm.weight"][3] = np.nan
    elif change == "twice":
        state["module.norm.weight"] = state["norm.weight"]
    elif change == "foreign":
        state = {
            "conv1.weight": np.zeros((4, 3, 3, 3), np.float32),
            "fc.bias": np.zeros(4, np.float32),
        }
    elif change == "empty":
        state = {}
    elif change == "no blocks":
        state = {name: tensor for name, tensor in state.items() if not name.startswith("blocks")}
    elif change == "no square":
        state["pos_embed"] = state["pos_embed"][:, :8]
    elif change == "width":
        state["cls_token"] = state["cls_token"][..., :100]
    elif change == "flat":
        state["cls_token"] = state["cls_token"].reshape(-1)
    elif change == "half":
        state["blocks.0.mlp.fc1.bias"] = np.zeros((2, 3), np.float32)
    return state


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing", r"blocks.1.attn.qkv.bias is missing\); give all of its tensors"),
        ("hole", "blocks.1.norm1.weight is missing; .*; and 4 more"),
        ("extra", r"sem_bias2 has no place in this model\)"),
        ("misshaped", r"blocks.0.mlp.fc2.weight is \(512, 128\) and not \(128, 512\)\)"),
        ("double", "norm.weight is float64; convert it"),
        ("nan", "norm.weight is not finite everywhere; the file is damaged"),
        (
            "twice",
            "holds two models: norm.weight and module.norm.weight|"
            "holds two models: module.norm.weight and norm.weight",
        ),
        ("foreign", "cls_token is missing; it has conv1.weight, fc.bias"),
        ("empty", "cls_token is missing; dlc import"),
        ("no blocks", "there is no blocks.0"),
        ("no square", "7 positions of patches, which do not make a square"),
        ("width", "100 wide"),
        ("flat", r"cls_token is \(128,\), not of 3 dimensions"),
        ("half", r"blocks.0.mlp.fc1.bias is \(2, 3\)"),
    ],
)
def test_a_state_that_is_not_the_models_is_refused_in_one_line_that_names_tensors(
    tmp_path, change, words
):
    with pytest.raises(UserError, match=words) as refused:
        given = weights_of(tmp_path, changed(change))
        backbone = ViT(**sections.vit(given.shapes, "here"))
        dino = DinoHead(**sections.head(given.shapes, "here").get("dino", {}))
        head = Simplicial(1, 2)
        if change != "hole":
            head = Simplicial(**sections.simplicial(given.shapes, POSITIONS, VALUES, "here"))
        images = jnp.zeros((1, 12, 12, 3))
        init = Encoder(backbone, head, dino).init
        shapes = slots.shapes_of(jax.eval_shape(init, jax.random.key(0), images)["params"])
        if change == "hole":
            shapes = {path: shape for path, shape in shapes.items() if path.startswith("vit/")}
        given.params(torch_names.official(shapes), shapes, unused=torch_names.UNUSED)
    assert "\n" not in str(refused.value) and str(refused.value).count(" is missing") <= 10
