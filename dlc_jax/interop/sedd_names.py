"""Names of SEDD's tensors (arXiv 2310.16834) in the files of DLC, and the order of its EMA's list.

A published file has the parameters by name. What training writes has them twice: `model` by name,
and `ema` as a list without names, in the order in which PyTorch registers parameters. It is the
average that samples are drawn with, and that is read.
"""

import ast
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dlc_jax.errors import UserError
from dlc_jax.interop import files
from dlc_jax.interop.slots import Slot, slot

HEADS = {768: 12, 1024: 16}  # of SEDD's small and medium, by width
PREFIXES = ("ema.", "_orig_mod.", "module.")
LAYOUTS = ("hf", "local")
BUFFER = "rotary_emb.inv_freq"  # no parameter: it follows from the width of a head
RAW = "model."  # before the names of the tensors that are not the average
NUMBERS = ("decay", "num_updates")  # of the EMA

Shapes = Mapping[str, tuple[int, ...]]


def clean(name: str) -> str:
    """A name without prefixes."""
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    return name


def load(path: str | Path) -> files.Tensors:
    """A file's tensors; of a file of training `ema.NAME`, `model.NAME`, and the buffer.

    Numbers of its EMA and its step are metadata.

    Raises:
      UserError: see `files.load`; an EMA whose list does not fit the names beside it.
    """
    numbers = {}

    def pick(found):
        parts = [found.get(name) for name in ("model", "ema")] if isinstance(found, dict) else [0]
        if not all(isinstance(part, dict) for part in parts):
            return files.state(found)
        told = {name: parts[1].get(name) for name in NUMBERS} | {"step": found.get("step")}
        numbers.update(
            {name: repr(n) if isinstance(n, int | float) else "0" for name, n in told.items()}
        )
        return _named(*parts, path)

    found = files.load(path, pick)
    return found._replace(metadata={**found.metadata, **numbers})


def _named(model: dict, ema: dict, path) -> dict:
    """{name: tensor} of a file of training; the list takes its names from the model beside it."""
    averages = ema.get("shadow_params", [])
    names = [name for name in model if clean(name) != BUFFER]
    if len(names) != len(averages):
        raise UserError(
            f"{path}: its EMA is a list of {len(averages)} tensors, and its model has "
            f"{len(names)} parameters; give a file of SEDD as its training wrote it"
        )
    if names == sorted(names):
        raise UserError(
            f"{path}: the names of its model are sorted, so that they no longer tell the order of "
            "the EMA's list; give the file as training wrote it"
        )
    buffers = {name: tensor for name, tensor in model.items() if clean(name) == BUFFER}
    raw = {f"{RAW}{name}": model[name] for name in names}
    return {f"ema.{name}": tensor for name, tensor in zip(names, averages)} | buffers | raw


def section(found: Shapes, where: str, heads: int | None = None) -> dict:
    """The keyword arguments of `MaskedTransformer`, from {clean name: shape}.

    Args:
      heads: their number, if it is known. The buffer tells it where it is in the file; SEDD's own
        sizes are known by width.

    Raises:
      UserError: there is no SEDD, or nothing tells the heads.
    """
    table = found.get("vocab_embed.embedding_table", found.get("vocab_embed.embedding", ()))
    positions, hidden = found.get("pos_embed", ()), found.get("blocks.0.mlp.0.weight", ())
    if len(positions) != 2 or len(hidden) != 2 or len(table) not in (2, 3) or min(hidden) < 1:
        raise UserError(
            f"{where} holds no SEDD of codes (pos_embed, vocab_embed.…, blocks.…, output_layer.…)"
        )
    length, width = positions
    buffer = found.get(BUFFER, ())
    told = width // (2 * buffer[0]) if len(buffer) == 1 and buffer[0] else HEADS.get(width)
    heads = heads or told
    if not heads or width % (2 * heads):
        raise UserError(f"{where} is {width} wide, and nothing tells its heads; give --heads")
    numbers = [int(match[1]) for name in found if (match := re.match(r"blocks\.(\d+)\.", name))]
    return {
        "positions": length,
        "values": table[-2] - 1,
        "width": width,
        "depth": 1 + max(numbers),
        "heads": heads,
        "mlp_ratio": hidden[0] / width,
        "per_position": len(table) == 3,
        "sigma_conditioning": True,
        "dropout": 0.1,
    }


def table(shapes: Shapes) -> dict[str, Slot]:
    """{name: Slot} of a network of these parameters {path: shape}, in the order of the EMA's list.

    Raises:
      UserError: a network without sigma, which SEDD's files have.
    """
    if "sigma_embed/fc1/kernel" not in shapes:
        raise UserError("SEDD's files have names for a prior with sigma_conditioning=True alone")
    per_position = len(shapes["token_embed"]) == 3
    names = f"vocab_embed.embedding{'_table' if per_position else ''}"
    rows = {"pos_embed": slot(shapes, "pos_embed"), names: slot(shapes, "token_embed")}

    def linear(there, path, *index, bias=True):
        rows[f"{there}.weight"] = slot(shapes, f"{path}/kernel", *index, form="linear")
        if bias:
            rows[f"{there}.bias"] = slot(shapes, f"{path}/bias", *index)

    def norm(there, path, *index):
        rows[f"{there}.weight"] = slot(shapes, f"{path}/scale", *index)

    linear("sigma_map.mlp.0", "sigma_embed/fc1")
    linear("sigma_map.mlp.2", "sigma_embed/fc2")
    for number in range(shapes["blocks/modulation/bias"][0]):
        block = f"blocks.{number}"
        norm(f"{block}.norm1", "blocks/norm1", number)
        linear(f"{block}.attn_qkv", "blocks/attention/qkv", number, bias=False)
        linear(f"{block}.attn_out", "blocks/attention/out", number, bias=False)
        norm(f"{block}.norm2", "blocks/norm2", number)
        linear(f"{block}.mlp.0", "blocks/mlp/fc1", number)
        linear(f"{block}.mlp.2", "blocks/mlp/fc2", number)
        linear(f"{block}.adaLN_modulation", "blocks/modulation", number)
    norm("output_layer.norm_final", "final_norm")
    linear("output_layer.linear", "final")
    linear("output_layer.adaLN_modulation", "final_modulation")
    return rows


def local(params: Mapping, raw: Mapping, numbers: Mapping[str, str]) -> dict:
    """What a file of training holds, but for the optimizer's state.

    Args:
      params: {name: array} of the average, in the order of its list.
      raw: {name: array} of the parameters beside it, and of the buffer.
      numbers: text by name, see `load`.
    """
    told = {name: ast.literal_eval(text) for name, text in numbers.items()}
    ema = {name: told[name] for name in NUMBERS} | {"shadow_params": list(params.values())}
    return {"model": dict(raw), "ema": ema, "step": told["step"]}


def buffer(head: int) -> np.ndarray:
    """The frequencies of rotary positions of heads of this width, [head / 2]."""
    return (1e4 ** (-np.arange(0, head, 2) / head)).astype(np.float32)


def check_buffer(tensor: np.ndarray, head: int, where: str) -> None:
    """Refuses other frequencies than the network's.

    Raises:
      UserError: see above.
    """
    known = buffer(head)
    near = 1e-5 if tensor.dtype.itemsize > 2 else 1e-2
    if tensor.shape != known.shape or not np.allclose(tensor.astype(np.float32), known, rtol=near):
        raise UserError(
            f"{where}: {BUFFER} is not 10000^(-2 i / {head}), which the network turns positions by"
        )
