"""Parts of an encoder's `model` section, from the shapes of a file's tensors.

What shapes leave open is refused, with the flag that settles it.
"""

import math
import re
from collections.abc import Mapping, Sequence

from dlc_jax.errors import UserError

HEAD = 64  # width of an attention head, in every DINOv2
MLP_RATIO = 4.0

Found = Mapping[str, tuple[int, ...]]


def vit(found: Found, where: str, *, heads: int | None = None) -> dict:
    """The section `backbone`: arguments of `ViT`, from {clean name: shape} of either layout.

    With registers, positions are resized by the antialiased bicubic, as in DINOv2's own code.
    Models without them were made with the plain one.

    Args:
      heads: their number, if it is known. No shape tells it; in every DINOv2 they are 64 wide.

    Raises:
      UserError: not a DINOv2, or of a shape that our model cannot have.
    """
    tokens = _shape(found, ("cls_token", "embeddings.cls_token"), 3, where)
    positions = _shape(found, ("pos_embed", "embeddings.position_embeddings"), 3, where)
    kernel = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight")
    _, channels, patch, _ = _shape(found, kernel, 4, where)
    width, side = tokens[-1], math.isqrt(positions[1] - 1)
    if side * side != positions[1] - 1 or not side:
        number = positions[1] - 1
        raise UserError(f"{where} has {number} positions of patches, which do not make a square")
    if heads is None and width % HEAD:
        raise UserError(
            f"{where} is {width} wide, which does not divide into heads of {HEAD}, as DINOv2's are"
        )
    if heads is not None and (heads < 1 or width % heads):
        raise UserError(f"{where} is {width} wide, which does not divide into {heads} heads")
    numbers = (re.match(r"(?:blocks|encoder\.layer)\.(\d+)\.", name) for name in found)
    blocks = [int(match[1]) for match in numbers if match]
    if not blocks:
        raise UserError(f"{where} does not hold a DINOv2 encoder: there is no blocks.0")
    extra = [name for name in ("register_tokens", "embeddings.register_tokens") if name in found]
    registers = _shape(found, extra, 3, where)[1] if extra else 0
    scaled = any(name.endswith(("ls1.gamma", "layer_scale1.lambda1")) for name in found)
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
        "layer_scale": 1e-5 if scaled else None,
        "qk_norm": False,
    }


def _mlp(found: Found, width: int, where: str) -> dict:
    endings = (".mlp.fc1.bias", ".mlp.w12.bias", ".mlp.weights_in.bias")
    first = next((name for name in found if name.endswith(endings)), "blocks.0.mlp.fc1.bias")
    (units,) = _shape(found, (first,), 1, where)
    if first.endswith("fc1.bias"):
        return {"mlp": "gelu", "mlp_ratio": units / width}
    hidden = (int(int(MLP_RATIO * width) * 2 / 3) + 7) // 8 * 8
    if units != 2 * hidden:
        raise UserError(
            f"{where} has a gated MLP of {units // 2} hidden units, not the {hidden} of DINOv2"
        )
    return {"mlp": "swiglu", "mlp_ratio": MLP_RATIO}


def simplicial(
    found: Found,
    positions: int | None,
    values: int | None,
    where: str,
    *,
    otherwise: int | None = None,
) -> dict:
    """The section `simplicial`, without its relaxation.

    Shapes tell L and V of the shared readouts, and of the plain one only their product.

    Args:
      positions, values: L and V if they are known.
      otherwise: L where nothing else tells it.

    Raises:
      UserError: there is no such head; L and V stay open, or contradict the shapes.
    """
    if "sem_embed.weight" not in found:
        raise UserError(
            f"{where} has no simplicial head (sem_embed.weight); "
            "dlc import dinov2 takes an encoder without one"
        )
    joint, _ = _shape(found, ("sem_embed.weight",), 2, where)
    _, read = _shape(found, ("sem_out.weight",), 2, where)
    readout, known = "plain", {}
    if "sem_bias" in found:
        length, _ = _shape(found, ("sem_bias",), 2, where)
        readout, known = "pos-shared", {"positions": length, "values": read}
        expected = f"{length} x {read}"
    elif read != joint:
        readout, known = "shared", {"positions": joint // read, "values": read}
        expected = f"a multiple of {read}"
    if known and known["positions"] * known["values"] != joint:
        raise UserError(
            f"{where}: sem_embed.weight has {joint} rows, not {expected} as sem_out.weight and "
            "sem_bias have; give a whole file"
        )
    given = {"positions": positions, "values": values}
    for name, number in known.items():
        if given[name] not in (None, number):
            raise UserError(
                f"{where}: its tensors have {number} {name}, not {given[name]}; leave --{name} out"
            )
        given[name] = number
    if given["positions"] is None and given["values"] is None:
        given["positions"] = otherwise
    if given["positions"] is None and given["values"] is None:
        raise UserError(
            f"{where} has {joint} numbers before the softmax, L x V: give --positions or --values"
        )
    for name, other in (("positions", "values"), ("values", "positions")):
        if given[name] is None:
            given[name] = joint // given[other] if given[other] > 0 else 0
    if given["positions"] * given["values"] != joint:
        raise UserError(
            f"{where} has L x V = {joint}, not {given['positions']} x {given['values']}; "
            "correct --positions or --values"
        )
    return {**given, "readout": readout}


def head(found: Found, where: str) -> dict:
    """The sections `dino` and `separate_head`; {} if the file has no DINO head."""
    if not any(name.startswith("dino_head.") for name in found):
        return {}
    prototypes, bottleneck = _shape(found, ("dino_head.last_layer.weight_v",), 2, where)
    hidden, _ = _shape(found, ("dino_head.mlp.0.weight",), 2, where)
    separate = any(name.startswith("ibot_head.") for name in found)
    dino = {"prototypes": prototypes, "hidden": hidden, "bottleneck": bottleneck}
    return {"dino": dino, "separate_head": separate}


def _shape(found: Found, names: Sequence[str], rank: int, where: str) -> tuple[int, ...]:
    """The shape of the first of these names that is there."""
    shape = next((tuple(found[name]) for name in names if name in found), None)
    refused = f"{where} does not hold this kind of model: {names[0]}"
    if shape is None:
        some = f"; it has {', '.join(list(found)[:5])}" + ", …" * (len(found) > 5) if found else ""
        raise UserError(f"{refused} is missing{some}; dlc import --help has the kinds")
    if len(shape) != rank or not all(shape):
        raise UserError(f"{refused} is {shape}, not of {rank} dimensions")
    return shape
