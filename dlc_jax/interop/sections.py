"""The `model` section of an encoder, read off the shapes of a file's tensors; what they leave open is said."""

import math
import re
from collections.abc import Mapping, Sequence

from dlc_jax.errors import UserError

HEAD = 64  # width of an attention head, in every DINOv2
MLP_RATIO = 4.0

Found = Mapping[str, tuple[int, ...]]


def vit(found: Found, where: str, *, heads: int | None = None) -> dict:
    """The keyword arguments of `Encoder` that are the vision transformer's, from {clean name: shape} of either layout.

    Registers go with the antialiased bicubic, as in DINOv2's own code; the models without them were made with the plain one.

    Args:
      heads: their number, if it is known from elsewhere; no shape tells it, and in every DINOv2 they are 64 wide.

    Raises:
      UserError: it is no DINOv2, or of a shape that our model cannot have.
    """
    tokens = _shape(found, ("cls_token", "embeddings.cls_token"), 3, where)
    positions = _shape(found, ("pos_embed", "embeddings.position_embeddings"), 3, where)
    _, channels, patch, _ = _shape(found, ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight"), 4, where)
    width, side = tokens[-1], math.isqrt(positions[1] - 1)
    if side * side != positions[1] - 1 or not side:
        raise UserError(f"{where} has {positions[1] - 1} positions of patches, which make no square")
    if heads is None and width % HEAD:
        raise UserError(f"{where} is {width} wide, which does not divide into heads of {HEAD}: no DINOv2 that is known here")
    if heads is not None and (heads < 1 or width % heads):
        raise UserError(f"{where} is {width} wide, which does not divide into {heads} heads")
    blocks = [int(match[1]) for name in found if (match := re.match(r"(?:blocks|encoder\.layer)\.(\d+)\.", name))]
    if not blocks:
        raise UserError(f"{where} holds no DINOv2 encoder: there is no blocks.0")
    extra = [name for name in ("register_tokens", "embeddings.register_tokens") if name in found]
    registers = _shape(found, extra, 3, where)[1] if extra else 0
    return {
        "image": side * patch,
        "patch": patch,
        "width": width,
        "depth": max(blocks) + 1,
        "heads": heads or width // HEAD,
        "channels": channels,
        "registers": registers,
        **_mlp(found, width, where),
        "pos": "learned",
        "pos_resize": "antialias" if registers else "plain",
        "layer_scale": 1e-5 if any(name.endswith(("ls1.gamma", "layer_scale1.lambda1")) for name in found) else None,
        "qk_norm": False,
    }


def _mlp(found: Found, width: int, where: str) -> dict:
    first = [name for name in found if name.endswith((".mlp.fc1.bias", ".mlp.w12.bias", ".mlp.weights_in.bias"))][:1]
    (units,) = _shape(found, first or ("blocks.0.mlp.fc1.bias",), 1, where)
    if first[0].endswith("fc1.bias"):
        return {"mlp": "gelu", "mlp_ratio": units / width}
    hidden = (int(int(MLP_RATIO * width) * 2 / 3) + 7) // 8 * 8
    if units != 2 * hidden:
        raise UserError(f"{where} has a gated MLP of {units // 2} hidden units, not the {hidden} that DINOv2 has")
    return {"mlp": "swiglu", "mlp_ratio": MLP_RATIO}


def simplicial(found: Found, positions: int | None, values: int | None, where: str) -> dict:
    """The keyword arguments of `Encoder` that are the simplicial head's.

    Shapes tell L and V of the shared readouts, and of the plain one their product alone.

    Args:
      positions, values: L and V if they are known from elsewhere.

    Raises:
      UserError: there is no such head; L and V stay open, or contradict the shapes.
    """
    if "sem_embed.weight" not in found:
        raise UserError(f"{where} holds no simplicial head (sem_embed.weight); dlc import dinov2 takes an encoder without one")
    joint, _ = _shape(found, ("sem_embed.weight",), 2, where)
    _, read = _shape(found, ("sem_out.weight",), 2, where)
    readout, told = "plain", {}
    if "sem_bias" in found:
        readout, told = "pos-shared", {"positions": _shape(found, ("sem_bias",), 2, where)[0], "values": read}
    elif read != joint:
        readout, told = "shared", {"positions": joint // read, "values": read}
    if told and told["positions"] * told["values"] != joint:
        others = f"{told['positions']} x {told['values']}" if readout == "pos-shared" else f"a multiple of {read}"
        raise UserError(f"{where}: sem_embed.weight has {joint} rows, not {others} as sem_out.weight and sem_bias have; give a whole file")
    given = {"positions": positions, "values": values}
    for name, number in told.items():
        if given[name] not in (None, number):
            raise UserError(f"{where}: its tensors have {number} {name}, not {given[name]}; leave --{name} out")
        given[name] = number
    if given["positions"] is None and given["values"] is None:
        raise UserError(f"{where} has {joint} numbers before the softmax, L x V: give --positions or --values")
    for name, other in (("positions", "values"), ("values", "positions")):
        if given[name] is None:
            given[name] = joint // given[other] if given[other] > 0 else 0
    if given["positions"] * given["values"] != joint:
        raise UserError(
            f"{where} has L x V = {joint}, not {given['positions']} x {given['values']}; correct --positions or --values"
        )
    return {**given, "readout": readout}


def head(found: Found, where: str) -> dict:
    """The keyword arguments of `Encoder` that are the DINO heads'; none if the file has no such head."""
    if not any(name.startswith("dino_head.") for name in found):
        return {}
    prototypes, bottleneck = _shape(found, ("dino_head.last_layer.weight_v",), 2, where)
    hidden, _ = _shape(found, ("dino_head.mlp.0.weight",), 2, where)
    separate = any(name.startswith("ibot_head.") for name in found)
    return {"prototypes": prototypes, "hidden": hidden, "bottleneck": bottleneck, "separate_head": separate}


def _shape(found: Found, names: Sequence[str], rank: int, where: str) -> tuple[int, ...]:
    """Of the one of these names that is there."""
    shape = next((tuple(found[name]) for name in names if name in found), None)
    if shape is None:
        some = f"; it has {', '.join(list(found)[:5])}" + ", …" * (len(found) > 5) if found else ""
        raise UserError(f"{where} does not hold this kind of model: {names[0]} is missing{some}; dlc import --help has the kinds")
    if len(shape) != rank or not all(shape):
        raise UserError(f"{where} does not hold this kind of model: {names[0]} is {shape}, not of {rank} dimensions")
    return shape
