"""The encoder beside transformers' DINOv2 in PyTorch, block by block and code by code: prints a markdown table. Needs the extra `torch`.

    JAX_PLATFORMS=cpu python benchmarks/parity.py [--sizes S B L]

A Dinov2Model and a Dinov2WithRegistersModel with random weights, none of them zero or alike (LayerScale in 0.1..1), are saved by
transformers and read as `dlc import dinov2` reads them. Images are noise. A block's error is the largest of its outputs, as a share of their
largest and of their root mean square; the table has the worst block. One simplicial head, 512 positions of 64 values, stands on both. A code
is too near a tie where PyTorch's two largest logits are apart by less than ten times the largest error of a logit.
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
from dlc_jax.models.simplicial import Encoder
from dlc_jax.models.vit import SIZES

IMAGES = {224: 8, 98: 8, 518: 4}  # pixels on a side: how many
POSITIONS, VALUES = 512, 64


def reference(size, registers):
    shape = SIZES[size]
    config = dict(hidden_size=shape["width"], num_hidden_layers=shape["depth"], num_attention_heads=shape["heads"])
    config |= dict(image_size=518, patch_size=14, use_swiglu_ffn="mlp" in shape)
    config |= {"num_register_tokens": registers} if registers else {}
    name = "Dinov2WithRegisters" if registers else "Dinov2"
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**config)).eval()
    random = np.random.default_rng(0)
    for path, leaf in model.named_parameters():
        value = random.standard_normal(leaf.shape, np.float32)
        if "lambda1" in path:
            value = random.uniform(0.1, 1, leaf.shape)
        elif "norm" in path:
            value = path.endswith("weight") + 0.2 * value
        else:
            value = value / np.prod(leaf.shape[1:]) ** 0.5 if path.endswith("weight") else 0.3 * value
        leaf.data = torch.from_numpy(np.asarray(value, np.float32))
    return model


def imported(model):
    """(Our encoder, its parameters, zero but for the vision transformer's) from the file that transformers writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        found = Weights(Path(folder) / "model.safetensors", torch_names.clean)
        section = sections.vit(found.shapes, found.where)
        encoder = Encoder(**section, positions=POSITIONS, values=VALUES, prototypes=8, hidden=8, bottleneck=4, remat="none")
        shapes = jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, 14, 14, 3)))["params"]
        params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
        named = slots.shapes_of({"vit": shapes["vit"]})
        return encoder, params | slots.nested(found.params(torch_names.layout(found.shapes)(named), named))


def head(inputs):
    random, joint = np.random.default_rng(1), POSITIONS * VALUES
    kernel = random.uniform(-1, 1, (inputs, joint)).astype(np.float32) / inputs**0.5
    scale, bias = (1 + 0.2 * random.normal(size=joint)).astype(np.float32), 0.2 * random.normal(size=joint).astype(np.float32)
    return kernel, scale, bias


def expect(model, pixels, weights):
    """Outputs of every block [depth, b, n, d], and logits [b, l, v], as PyTorch has them."""
    kernel, scale, bias = map(torch.from_numpy, weights)
    with torch.no_grad():
        states = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True).hidden_states[1:]
        tokens = states[-1][:, : len(kernel) // model.config.hidden_size].flatten(1)
        logits = torch.nn.functional.layer_norm(tokens @ kernel, scale.shape, scale, bias, 1e-6)
    return np.stack([state.numpy() for state in states]), logits.reshape(-1, POSITIONS, VALUES).numpy()


def rows(size, registers):
    model = reference(size, registers)
    encoder, params = imported(model)
    weights = head((1 + registers) * encoder.width)
    kernel, scale, bias = weights
    params["simplicial"] |= {"embed": {"kernel": kernel}, "norm": {"scale": scale, "bias": bias}}
    narrow = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    blocks = jax.jit(functools.partial(encoder.apply, method=lambda network, x: network.vit(x, every=True)["blocks"]))
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


HEADER = (
    "model, random weights", "px", "block error / largest", "/ rms", "logit error", "codes", "too near a tie",
    "other codes: clear, near a tie", "bfloat16 agrees",
)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=[*SIZES], default=["S"])
    print("| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER), flush=True)
    for size in parser.parse_args().sizes:
        for registers in (0, 4):
            for row in rows(size, registers):
                print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
