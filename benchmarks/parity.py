"""The encoder beside transformers' DINOv2 in PyTorch, block by block and code by code.

    JAX_PLATFORMS=cpu python benchmarks/parity.py [--sizes S B L] [--bfloat16 64]

A Dinov2Model and a Dinov2WithRegistersModel with random weights, none of them zero or alike
(LayerScale in 0.1..1), are saved by transformers and read as `dlc import dinov2` reads them. Images
are noise. A block's error is the largest of its outputs, as a share of their largest and of their
root mean square; the table has the worst block. One simplicial head, 512 positions of 64 values,
stands on both. A code is too near a tie where PyTorch's two largest logits differ by less than ten
times the largest error of a logit.

The second table is about bfloat16: how many codes of N images of 98 pixels differ from PyTorch's in
float32, for each size and six variants of block and head. "all bfloat16" casts every parameter and
with them the residual stream, as codes were made before they had a `dtype`. "kernels" is what
`codes.dtype="bfloat16"` does. The last is torch.autocast, its last norm in float32 as on a GPU.

Prints two markdown tables. Needs the extra `torch`.
"""

import argparse
import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from dlc_jax.interop import sections, slots, torch_names
from dlc_jax.interop.weights import Weights
from dlc_jax.models.encoder import Encoder
from dlc_jax.models.layers import compute_dtypes
from dlc_jax.models.simplicial import DinoHead, Simplicial
from dlc_jax.models.vit import SIZES, ViT

IMAGES = {224: 8, 98: 8, 518: 4}  # pixels on a side: how many
POSITIONS, VALUES = 512, 64
SIDE = 98  # of the images of the second table
VARIANTS = [  # registers, mlp, positions, values
    (0, "gelu", 512, 64),
    (4, "gelu", 512, 64),
    (0, "swiglu", 512, 64),
    (4, "swiglu", 512, 64),
    (4, "gelu", 512, 256),
    (4, "gelu", 128, 1024),
]


def reference(size, registers, mlp=None):
    shape = SIZES[size] | ({"mlp": mlp} if mlp else {})
    config = dict(
        hidden_size=shape["width"],
        num_hidden_layers=shape["depth"],
        num_attention_heads=shape["heads"],
        image_size=518,
        patch_size=14,
        use_swiglu_ffn=shape.get("mlp") == "swiglu",
    )
    config |= {"num_register_tokens": registers} if registers else {}
    name = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, f"{name}Config")(**config)
    model = getattr(transformers, f"{name}Model")(config).eval()
    random = np.random.default_rng(0)
    for path, leaf in model.named_parameters():
        value = random.standard_normal(leaf.shape, np.float32)
        if "lambda1" in path:
            value = random.uniform(0.1, 1, leaf.shape)
        elif "norm" in path:
            value = path.endswith("weight") + 0.2 * value
        elif path.endswith("weight"):
            value = value / np.prod(leaf.shape[1:]) ** 0.5
        else:
            value = 0.3 * value
        leaf.data = torch.from_numpy(np.asarray(value, np.float32))
    return model


def imported(model, positions=POSITIONS, values=VALUES):
    """(our encoder, its parameters) from the file that transformers writes; the heads' are zero."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        found = Weights(Path(folder) / "model.safetensors", torch_names.clean)
        backbone = ViT(**sections.vit(found.shapes, found.where), remat="none")
        dino = DinoHead(prototypes=8, hidden=8, bottleneck=4)
        encoder = Encoder(backbone, Simplicial(positions, values), dino)
        made = jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, 14, 14, 3)))
        shapes = made["params"]
        params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
        named = slots.shapes_of({"vit": shapes["vit"]})
        read = found.params(torch_names.layout(found.shapes)(named), named)
        return encoder, params | slots.nested(read)


def head(inputs, joint=POSITIONS * VALUES):
    random = np.random.default_rng(1)
    kernel = (2 * random.random((inputs, joint), np.float32) - 1) / np.float32(inputs**0.5)
    scale = (1 + 0.2 * random.normal(size=joint)).astype(np.float32)
    return kernel, scale, 0.2 * random.normal(size=joint).astype(np.float32)


def expect(model, pixels, weights, positions=POSITIONS, values=VALUES, autocast=False):
    """Outputs of every block [depth, b, n, d], and logits [b, l, v], as PyTorch has them."""
    kernel, scale, bias = map(torch.from_numpy, weights)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            images = torch.from_numpy(pixels.transpose(0, 3, 1, 2))
            states = model(images, output_hidden_states=True).hidden_states[1:]
            tokens = states[-1][:, : len(kernel) // model.config.hidden_size].flatten(1)
            joint = tokens @ kernel
        logits = torch.nn.functional.layer_norm(joint.float(), scale.shape, scale, bias, 1e-6)
    states = np.stack([state.float().numpy() for state in states])
    return states, logits.reshape(-1, positions, values).numpy()


def rows(size, registers):
    model = reference(size, registers)
    encoder, params = imported(model)
    weights = head((1 + registers) * encoder.backbone.width)
    kernel, scale, bias = weights
    params["simplicial"] |= {"embed": {"kernel": kernel}, "norm": {"scale": scale, "bias": bias}}
    narrow = cast(params, compute_dtypes(params, "bfloat16"))
    each = functools.partial(encoder.apply, method=lambda net, x: net.vit(x, every=True)["blocks"])
    blocks = jax.jit(each)
    logits = jax.jit(lambda variables, x: encoder.apply(variables, x)["logits"])
    codes = jax.jit(functools.partial(encoder.apply, method="codes"))
    for side, count in IMAGES.items():
        pixels = np.random.default_rng(side).normal(size=(count, side, side, 3)).astype(np.float32)
        states, wanted = expect(model, pixels, weights)
        error = np.abs(np.asarray(blocks({"params": params}, pixels)) - states).max((1, 2, 3))
        off = np.abs(np.asarray(logits({"params": params}, pixels)) - wanted).max()
        second, first = np.sort(wanted, axis=-1)[..., -2:].transpose(2, 0, 1)
        clear, best = first - second > 10 * off, wanted.argmax(-1)
        differ = np.asarray(codes({"params": params}, pixels)) != best
        yield (
            f"{model.config.model_type}, {size}",
            side,
            f"{(error / np.abs(states).max((1, 2, 3))).max():.1e}",
            f"{(error / np.sqrt(np.square(states).mean((1, 2, 3)))).max():.1e}",
            f"{off:.1e}",
            f"{best.size}",
            f"{1 - clear.mean():.3%}",
            f"{(differ & clear).sum()}, {(differ & ~clear).sum()}",
            f"{(np.asarray(codes({'params': narrow}, pixels)) == best).mean():.2%}",
        )


def cast(params, dtypes):
    return jax.tree.map(lambda leaf, dtype: jnp.asarray(leaf, dtype), params, dtypes)


def bfloat16(size, count):
    pixels = np.random.default_rng(SIDE).normal(size=(count, SIDE, SIDE, 3)).astype(np.float32)
    total = np.zeros(4, int)
    for registers, mlp, positions, values in VARIANTS:
        model = reference(size, registers, mlp)
        encoder, params = imported(model, positions, values)
        weights = head((1 + registers) * encoder.backbone.width, positions * values)
        kernel, scale, bias = weights
        parts = {"embed": {"kernel": kernel}, "norm": {"scale": scale, "bias": bias}}
        params["simplicial"] |= parts
        logits = (expect(model, pixels, weights, positions, values, on)[1] for on in (False, True))
        best, auto = (each.argmax(-1) for each in logits)
        codes = jax.jit(functools.partial(encoder.apply, method="codes"))
        wide = jax.tree.map(lambda leaf: jnp.float32, params)
        narrow = jax.tree.map(lambda leaf: jnp.bfloat16, params)
        ways = (wide, narrow, compute_dtypes(params, "bfloat16"))
        found = [np.asarray(codes({"params": cast(params, way)}, pixels)) for way in ways]
        differ = np.array([(one != best).sum() for one in (*found, auto)])
        total += differ
        name = f"{size}, {registers} registers, {mlp}, {positions} x {values}"
        yield name, best.size, *(f"{number}, {number / best.size:.2%}" for number in differ)
    yield f"{size}, all", "", *total


HEADER_BFLOAT16 = (
    *("model, random weights", "codes", "float32"),
    *("all bfloat16", "kernels bfloat16", "autocast"),
)
HEADER = (
    *("model, random weights", "px", "block error / largest", "/ rms", "logit error"),
    *("codes", "too near a tie", "other codes: clear, near a tie", "bfloat16 agrees"),
)


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--sizes", nargs="+", choices=[*SIZES], default=["S"])
    second = "images of the second table; 0 leaves it out"
    parser.add_argument("--bfloat16", type=int, default=64, metavar="N", help=second)
    parser.add_argument("--only-bfloat16", action="store_true", help="the second table alone")
    given = parser.parse_args()
    if not given.only_bfloat16:
        models = [(size, registers) for size in given.sizes for registers in (0, 4)]
        table(HEADER, (row for model in models for row in rows(*model)))
    if given.bfloat16:
        found = (row for size in given.sizes for row in bfloat16(size, given.bfloat16))
        table(HEADER_BFLOAT16, found)


def table(header, rows):
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header), flush=True)
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
    print()


if __name__ == "__main__":
    main()
