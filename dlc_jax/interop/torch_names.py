"""Names of an encoder's tensors in the files of DINOv2 and of transformers.

DINOv2's table has the simplicial and the DINO heads too. Both give {name: Slot} for the parameters
that are there: without registers, LayerScale or heads the table has no such rows.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping

from dlc_jax.interop.slots import Slot, slot

# what compilers, parallel wrappers and DINOv2's teacher put before the names
PREFIXES = ("_orig_mod.", "module.", "backbone.")
UNUSED = ("sem_cls_norm.weight", "sem_cls_norm.bias")  # in the published files, and read by nothing
# the second where patches have a head of their own
HEADS = {"dino_head": "head", "ibot_head": "patch_head"}
CHANNELS = 3
_LATER = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}
_LATER |= {"o_proj": "output.dense"}

Shapes = Mapping[str, tuple[int, ...]]


def clean(name: str) -> str:
    """A name without prefixes, and with blocks counted through: blocks.CHUNK.N is blocks.N.

    The names that the modules of transformers 5 have are those of its files.
    """
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    name = re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name)
    later = r"^(encoder\.layer\.\d+\.attention\.)([qkvo]_proj)\."
    return re.sub(later, lambda found: f"{found[1]}{_LATER[found[2]]}.", name)


def official(shapes: Shapes) -> dict[str, Slot]:
    """DINOv2's names, for parameters {path: shape}."""
    table = _Table(shapes)
    width = shapes["vit/cls_token"][-1]
    table.same("cls_token", "vit/cls_token")
    table.same("pos_embed", "vit/pos_embed", shape=(1, *shapes["vit/pos_embed"]))
    table.same("register_tokens", "vit/register_tokens")
    table.same("mask_token", "vit/mask_token", shape=(1, width))
    table.patches("patch_embed.proj")
    for number in range(shapes["vit/blocks/norm1/scale"][0]):
        block = f"blocks.{number}"
        table.norm(f"{block}.norm1", "vit/blocks/norm1", number)
        table.norm(f"{block}.norm2", "vit/blocks/norm2", number)
        table.linear(f"{block}.attn.qkv", "vit/blocks/attention/qkv", number)
        table.linear(f"{block}.attn.proj", "vit/blocks/attention/out", number)
        table.same(f"{block}.ls1.gamma", "vit/blocks/gamma1", number)
        table.same(f"{block}.ls2.gamma", "vit/blocks/gamma2", number)
        first, second = ("w12", "w3") if table.gated else ("fc1", "fc2")
        table.linear(f"{block}.mlp.{first}", "vit/blocks/mlp/fc1", number)
        table.linear(f"{block}.mlp.{second}", "vit/blocks/mlp/fc2", number)
    table.norm("norm", "vit/norm")
    table.simplicial()
    for name, path in HEADS.items():
        for layer in range(3):
            table.linear(f"{name}.mlp.{2 * layer}", f"{path}/fc{layer + 1}")
        if f"{path}/gain" in shapes:
            shape = (*shapes[f"{path}/gain"], 1)
            table.same(f"{name}.last_layer.weight_g", f"{path}/gain", shape=shape)
        table.matrix(f"{name}.last_layer.weight_v", f"{path}/direction")
    return table.rows


def transformers(shapes: Shapes) -> dict[str, Slot]:
    """The names of Dinov2Model and Dinov2WithRegistersModel.

    A subclass of the latter with a simplicial head has its tensors by the names of `official`; none
    has a DINO head.
    """
    table = _Table(shapes)
    width = shapes["vit/cls_token"][-1]
    table.same("embeddings.cls_token", "vit/cls_token")
    positions = (1, *shapes["vit/pos_embed"])
    table.same("embeddings.position_embeddings", "vit/pos_embed", shape=positions)
    table.same("embeddings.register_tokens", "vit/register_tokens")
    table.same("embeddings.mask_token", "vit/mask_token", shape=(1, width))
    table.patches("embeddings.patch_embeddings.projection")
    for number in range(shapes["vit/blocks/norm1/scale"][0]):
        block = f"encoder.layer.{number}"
        table.norm(f"{block}.norm1", "vit/blocks/norm1", number)
        table.norm(f"{block}.norm2", "vit/blocks/norm2", number)
        for part, name in enumerate(("query", "key", "value")):
            there, qkv = f"{block}.attention.attention.{name}", "vit/blocks/attention/qkv"
            table.matrix(f"{there}.weight", f"{qkv}/kernel", number, slice(None), part)
            table.same(f"{there}.bias", f"{qkv}/bias", number, part, shape=(width,))
        table.linear(f"{block}.attention.output.dense", "vit/blocks/attention/out", number)
        table.same(f"{block}.layer_scale1.lambda1", "vit/blocks/gamma1", number)
        table.same(f"{block}.layer_scale2.lambda1", "vit/blocks/gamma2", number)
        first, second = ("weights_in", "weights_out") if table.gated else ("fc1", "fc2")
        table.linear(f"{block}.mlp.{first}", "vit/blocks/mlp/fc1", number)
        table.linear(f"{block}.mlp.{second}", "vit/blocks/mlp/fc2", number)
    table.norm("layernorm", "vit/norm")
    table.simplicial()
    return table.rows


def kind(names: Iterable[str]) -> str:
    """Which of LAYOUTS these names are of."""
    return "transformers" if any(name.startswith("embeddings.") for name in names) else "official"


def layout(names: Iterable[str]) -> Callable[[Shapes], dict[str, Slot]]:
    """The table that these names are of."""
    return LAYOUTS[kind(names)]


LAYOUTS = {"official": official, "transformers": transformers}


class _Table:
    """Rows for the parameters that there are."""

    def __init__(self, shapes: Shapes):
        self.shapes, self.rows = shapes, {}
        self.gated = len(shapes["vit/blocks/mlp/fc1/bias"]) == 3  # gate and value, packed

    def _add(self, name: str, path: str, *index, form: str, shape: tuple[int, ...] = ()) -> None:
        if path in self.shapes:
            self.rows[name] = slot(self.shapes, path, *index, form=form, shape=shape)

    def same(self, name: str, path: str, *index, shape: tuple[int, ...] = ()) -> None:
        self._add(name, path, *index, form="same", shape=shape)

    def matrix(self, name: str, path: str, *index) -> None:
        self._add(name, path, *index, form="linear")

    def linear(self, name: str, path: str, *index) -> None:
        self.matrix(f"{name}.weight", f"{path}/kernel", *index)
        if f"{path}/bias" in self.shapes:
            bias = self.shapes[f"{path}/bias"][len(index) :]
            self.same(f"{name}.bias", f"{path}/bias", *index, shape=(math.prod(bias),))

    def norm(self, name: str, path: str, *index) -> None:
        self.same(f"{name}.weight", f"{path}/scale", *index)
        self.same(f"{name}.bias", f"{path}/bias", *index)

    def simplicial(self) -> None:
        self.linear("sem_embed", "simplicial/embed")
        self.norm("sem_norm", "simplicial/norm")
        self.linear("sem_out", "simplicial/out")
        self.same("sem_bias", "simplicial/bias")

    def patches(self, name: str) -> None:
        pixels, width = self.shapes["vit/patch_embed/kernel"]
        side = math.isqrt(pixels // CHANNELS)
        shape = (width, CHANNELS, side, side)
        self._add(f"{name}.weight", "vit/patch_embed/kernel", form="conv", shape=shape)
        self.same(f"{name}.bias", "vit/patch_embed/bias")
