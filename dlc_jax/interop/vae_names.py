"""Names of the autoencoder's tensors in diffusers' AutoencoderKL, and its settings from shapes."""

import re
from collections.abc import Mapping

from dlc_jax.errors import UserError
from dlc_jax.interop.slots import Slot, slot

# before 2023 the attention's tensors had names of their own; `sd-vae-ft-ema` still has them
_FORMER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def clean(name: str) -> str:
    """A name as present files have it."""
    former = r"(attentions\.0\.)(query|key|value|proj_attn)\."
    return re.sub(former, lambda found: f"{found[1]}{_FORMER[found[2]]}.", name)


def section(found: Mapping[str, tuple[int, ...]], where: str) -> dict:
    """The keyword arguments of `Autoencoder` that shapes tell: channels, residuals, latent.

    Raises:
      UserError: there is no autoencoder in the file.
    """
    channels = []
    while shape := found.get(f"encoder.down_blocks.{len(channels)}.resnets.0.conv1.weight"):
        channels.append(shape[0])
    if not channels or "post_quant_conv.weight" not in found:
        raise UserError(
            f"{where} holds no autoencoder of latent diffusion "
            "(encoder.down_blocks.…, post_quant_conv.weight); of a tiny one give both files"
        )
    residual = re.compile(r"encoder\.down_blocks\.0\.resnets\.\d+\.conv1\.weight")
    return {
        "channels": tuple(channels),
        "residuals": sum(bool(residual.fullmatch(name)) for name in found),
        "latent": found["post_quant_conv.weight"][0],
    }


def table(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Slot]:
    """{name: Slot} for an autoencoder of these parameters, {path: shape}."""
    rows = {}

    def norm(name, path):
        rows[f"{name}.weight"] = slot(shapes, f"{path}/scale")
        rows[f"{name}.bias"] = slot(shapes, f"{path}/bias")

    def conv(name, path):
        rows[f"{name}.weight"] = slot(shapes, f"{path}/kernel", form="conv")
        rows[f"{name}.bias"] = slot(shapes, f"{path}/bias")

    def residual(name, path):
        for number in (1, 2):
            norm(f"{name}.norm{number}", f"{path}/norm{number}")
            conv(f"{name}.conv{number}", f"{path}/conv{number}")
        if f"{path}/shortcut/kernel" in shapes:
            conv(f"{name}.conv_shortcut", f"{path}/shortcut")

    def middle(name, path):
        residual(f"{name}.resnets.0", f"{path}/residual0")
        residual(f"{name}.resnets.1", f"{path}/residual1")
        attention = f"{name}.attentions.0"
        norm(f"{attention}.group_norm", f"{path}/norm")
        for part, letter in enumerate("qkv"):
            qkv, there = f"{path}/attention/qkv", f"{attention}.to_{letter}"
            kernel = slot(shapes, f"{qkv}/kernel", slice(None), part, form="linear")
            rows[f"{there}.weight"] = kernel
            shape = shapes[f"{qkv}/bias"][-1:]
            rows[f"{there}.bias"] = slot(shapes, f"{qkv}/bias", part, shape=shape)
        out, there = f"{path}/attention/out", f"{attention}.to_out.0"
        rows[f"{there}.weight"] = slot(shapes, f"{out}/kernel", form="linear")
        rows[f"{there}.bias"] = slot(shapes, f"{out}/bias")

    for side, ours, way, sampler in (
        ("encoder.down_blocks", "down", "smaller", "downsamplers"),
        ("decoder.up_blocks", "up", "larger", "upsamplers"),
    ):
        for path in {path.rpartition("/")[0] for path in shapes}:
            if found := re.fullmatch(rf"{ours}_(\d+)_(\d+)/conv1", path):
                residual(f"{side}.{found[1]}.resnets.{found[2]}", f"{ours}_{found[1]}_{found[2]}")
            elif found := re.fullmatch(rf"{way}_(\d+)", path):
                conv(f"{side}.{found[1]}.{sampler}.0.conv", path)
    for side in ("encoder", "decoder"):
        conv(f"{side}.conv_in", f"{side}_in")
        middle(f"{side}.mid_block", f"{side}_middle")
        norm(f"{side}.conv_norm_out", f"{side}_norm")
        conv(f"{side}.conv_out", f"{side}_out")
    conv("quant_conv", "quant")
    conv("post_quant_conv", "post_quant")
    return rows
