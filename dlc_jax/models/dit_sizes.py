"""What follows from a DiT's fields alone: which do not fit, FLOPs, layers below the head."""

import numpy as np

from dlc_jax.errors import UserError
from dlc_jax.models.dit_block import dit_block_flops
from dlc_jax.models.dit_parts import EDGE
from dlc_jax.models.layers import block_layer
from dlc_jax.models.time_embedding import time_embedding_flops


def check(model) -> None:
    """Refuses fields that do not fit together.

    Raises:
      UserError: it names them.
    """
    if model.image % model.patch:
        raise UserError(
            f"images of {model.image} pixels cannot be cut into patches of {model.patch}; "
            "change image or patch"
        )
    if bool(model.positions) != bool(model.values):
        raise UserError(
            f"positions={model.positions}, values={model.values}: give both, "
            "or 0 and 0 for a model without codes"
        )
    if bool(model.head_width) != bool(model.head_depth):
        raise UserError(
            f"head_width={model.head_width}, head_depth={model.head_depth}: give both, "
            "or 0 and 0 for a model without a wide head"
        )
    if bool(model.align) != bool(model.align_width):
        raise UserError(
            f"align={model.align}, align_width={model.align_width}: give both, "
            "or 0 and 0 for a model without alignment"
        )
    for field in ("context", "cross"):
        tokens = getattr(model, field)
        if tokens and (not model.positions or model.positions % tokens):
            raise UserError(
                f"{field}={tokens} tokens of codes of {model.positions} positions; "
                f"give a number that divides the positions, or {field}=0"
            )
    for field, last in (("early", model.depth - 1), ("align", model.depth)):
        if not 0 <= getattr(model, field) <= last:
            raise UserError(f"{field}={getattr(model, field)} is not a block in 1..{last}, nor 0")
    if model.route and model.depth <= 2 * EDGE:
        raise UserError(
            f"route=True needs more than {2 * EDGE} blocks, since {EDGE} before and {EDGE} after "
            f"see all patches; depth={model.depth} has no others"
        )
    for width, field in ((model.width, "width"), (model.head_width, "head_width")):
        if width % model.heads:
            raise UserError(
                f"{field}={width} is not a multiple of {model.heads} heads; change one of them"
            )


def check_given(model, given) -> None:
    """Refuses parts of a condition that the model does not read.

    Raises:
      UserError: it says what to set.
    """
    if given.codes is not None and not model.positions:
        raise UserError(
            "this DiT has no code table, so it takes codes=None; "
            "set positions and values to give it one"
        )
    for part, field in (("label", "classes"), ("embedding", "embedding")):
        if getattr(given, part) is not None and not getattr(model, field):
            raise UserError(f"this DiT reads no {part}; set {field} to give it one")


def check_inputs(model, condition, keep) -> None:
    """Refuses a condition or kept patches that the model does not read.

    Raises:
      UserError: it says what to set.
    """
    for field, found in (("context", condition.context), ("cross", condition.tokens)):
        if (getattr(model, field) > 0) != (found is not None):
            given = "has" if found is not None else "lacks"
            raise UserError(
                f"the condition {given} {field} tokens, but the DiT has {field}="
                f"{getattr(model, field)}; make it with this model's `embed`, or set {field}"
            )
    if keep is not None and not model.route:
        raise UserError("keep needs the parameters that route=True makes")


def flops(model, *, training: bool = False, kept: int | None = None) -> float:
    """FLOPs of a forward pass of one image, without or with hard codes; see `block_flops`.

    L (24 n d^2 + 4 n^2 d + 12 d^2) for the usual MLP, plus patches in and out, time and the last
    modulation; and what options add.

    Args:
      training: with the early head and the alignment projector.
      kept: patches that the middle blocks see; None is all.
    """
    width, tokens = model.width, (model.image // model.patch) ** 2
    pixels = model.patch**2 * model.channels
    features = model.patch**2 * (model.out_channels or model.channels)
    cross = model.cross + 1 if model.cross else 0
    options = {"mlp_ratio": model.mlp_ratio, "kind": model.block}

    def blocks(depth, tokens):
        tokens += model.context
        return depth * dit_block_flops(tokens, width, cross=cross, **options)

    def final(tokens, width, conditions=1):
        return 2.0 * tokens * width * features + 4.0 * conditions * width**2

    total = time_embedding_flops(width) + 2.0 * tokens * width * pixels
    total += 2.0 * (model.context + model.cross) * width**2 + 2.0 * model.embedding * width
    middle = max(model.depth - 2 * EDGE, 0) if model.route else 0
    total += blocks(model.depth - middle, tokens) + blocks(middle, kept or tokens)
    joined = int(model.route)
    if training and model.route:
        inner = {model.early, model.align} & set(range(EDGE + 1, model.depth - EDGE))
        joined += len(inner)
    total += joined * 4.0 * (tokens + model.context) * width**2
    if training and model.early:
        total += final(tokens, width)
    if training and model.align:
        total += 2.0 * 9 * tokens * width * model.align_width
    if not model.head_width:
        return total + final(tokens, width)
    wide = model.head_width
    total += 2.0 * tokens * wide * (width + pixels)
    total += model.head_depth * dit_block_flops(tokens, wide, conditions=tokens, **options)
    return total + final(tokens, wide, tokens)


def layer(model, name: str) -> np.ndarray | int:
    """Layers between a parameter and the output, see `DiT.layer`."""
    if name in ("patch_embed/kernel", "patch_embed/bias"):
        return model.depth + model.head_depth + 1
    if name.startswith("head/blocks/"):
        return block_layer(name.removeprefix("head/"), (), depth=model.head_depth)
    if name.startswith("blocks/"):
        return block_layer(name, (), depth=model.depth) + model.head_depth
    return model.head_depth + 1 if name.startswith("head/patch_embed/") else 0
