"""Inception-v3 as the Fréchet Inception distance has it (arXiv 1706.08500, 1512.00567).

The network of TensorFlow's file of 2015-12-05, 1008 classes, under torchvision's names. Where it
differs from torchvision's: 3x3 averages count no padding (blocks A, C and the first E), the branch
of the last block takes the maximum, and batch normalization adds 1e-3.

Outputs:
  pool: 2048 averages of the last block, `pool_3:0` of the graph.
  spatial: 17 x 17 x 7 = 2023, flattened in this order: the first 7 channels of `mixed_6/conv:0` of
    the graph, for sFID (arXiv 2103.03841) as ADM computes it. That is the 1x1 branch, after its
    ReLU, of the block which torchvision calls Mixed_6d: `mixed` is Mixed_5b, `mixed_3` Mixed_6a.
    The block's output begins with this branch.
  logits: 1008, the pool times the classifier's matrix. The bias is left out, as in ADM and
    torch-fidelity's "logits_unbiased".

Protocols are those of `resize`, to 299 pixels. Then adm and clean take (x - 128) / 128, and torch
2 (x / 255) - 1, as the programs that they are named after.
"""

from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp

from dlc_jax.features import resize, weights
from dlc_jax.features.extractor import stacked
from dlc_jax.features.layers import ConvNorm, max_pool
from dlc_jax.typing import Array, Float

PROTOCOLS = ("adm", "torch", "clean")
OUTPUTS = {"pool": 2048, "spatial": 17 * 17 * 7, "logits": 1008}
SIDE = 299
# our parameter -> layer and tensor of the file
TENSORS = {
    "kernel": "conv.weight",
    "scale": "bn.weight",
    "bias": "bn.bias",
    "mean": "bn.running_mean",
    "variance": "bn.running_var",
}
UNUSED = r"fc\.bias|.*\.num_batches_tracked"

Images = Float[Array, "n y x c"]


class Block(nn.Module):
    """Branches side by side, and a branch of a pool last.

    Attributes:
      branches: each a chain of (name, channels, kernel); a list instead of a link at its end is
        several convolutions of the same input, side by side. In a block that halves the image the
        last link of each has stride 2, and there is no padding.
      pool: "average" or "max" with a 1x1 convolution after it; "halve" is the maximum alone.
      pooled: channels of that convolution.
    """

    branches: tuple
    pool: str
    pooled: int = 0

    @nn.compact
    def __call__(self, x: Images) -> Images:
        outputs = []
        for chain in self.branches:
            y = x
            for number, link in enumerate(chain, start=1):
                if isinstance(link[0], tuple):
                    outputs += [_unit(*part)(y) for part in link[:-1]]
                    link = link[-1]
                last = self.pool == "halve" and number == len(chain)
                y = _unit(*link, **({"stride": 2, "padding": "VALID"} if last else {}))(y)
            outputs.append(y)
        if self.pool == "halve":
            outputs.append(max_pool(x))
        else:
            window, strides = (3, 3), (1, 1)
            if self.pool == "max":
                y = nn.max_pool(x, window, strides, "SAME")
            else:
                y = nn.avg_pool(x, window, strides, "SAME", count_include_pad=False)
            outputs.append(_unit("branch_pool", self.pooled)(y))
        return jnp.concatenate(outputs, axis=-1)


class Inception(nn.Module):
    """The network; its parameters have torchvision's names of layers."""

    @nn.compact
    def __call__(self, x: Float[Array, "n 299 299 3"]) -> dict[str, Array]:
        """Features of images in about -1..1."""
        x = _unit("Conv2d_1a_3x3", 32, (3, 3), stride=2, padding="VALID")(x)
        x = _unit("Conv2d_2a_3x3", 32, (3, 3), padding="VALID")(x)
        x = max_pool(_unit("Conv2d_2b_3x3", 64, (3, 3))(x))
        x = _unit("Conv2d_3b_1x1", 80)(x)
        x = max_pool(_unit("Conv2d_4a_3x3", 192, (3, 3), padding="VALID")(x))
        for name, branches, pool, pooled in _blocks():
            x = Block(branches, pool, pooled, name=name)(x)
            if name == "Mixed_6d":
                spatial = x[..., :7].reshape(len(x), -1)
        pool = x.mean((1, 2))
        logits = nn.Dense(OUTPUTS["logits"], use_bias=False, name="fc")(pool)
        return {"pool": pool, "spatial": spatial, "logits": logits}


def make(path: Path, protocol: str) -> dict:
    """Fields of the Extractor.

    Raises:
      UserError: the file is not of this network.
    """
    network = Inception()

    def apply(params, prepared):
        x = prepared.astype(jnp.float32)
        if protocol == "torch":
            x = 2 * resize.bilinear(x / 255, SIDE, centers=True) - 1
        else:  # "clean" comes in this size
            x = (resize.bilinear(x, SIDE, centers=False) - 128) / 128
        return network.apply({"params": params}, x)

    shapes = weights.abstract(network, 1, SIDE, SIDE, 3)
    return {
        "params": weights.read(weights.open_file(path), shapes, _name, unused=UNUSED),
        "prepare": stacked if protocol != "clean" else lambda images: resize.clean(images, SIDE),
        "apply": apply,
        "outputs": OUTPUTS,
    }


def _unit(name, features, kernel=(1, 1), **options):
    layer = ConvNorm(features, kernel, eps=1e-3, name=name, **options)
    return lambda x: nn.relu(layer(x))


def _name(path: str) -> str:
    """A parameter's name in the file: of Mixed_5b/branch1x1/scale, Mixed_5b.branch1x1.bn.weight."""
    *layer, tensor = path.split("/")
    return ".".join([*layer, "weight" if layer == ["fc"] else TENSORS[tensor]])


def _blocks():
    """(name, branches, pool, channels of its convolution) of each block, in order."""
    for name, pooled in (("5b", 32), ("5c", 64), ("5d", 64)):
        yield f"Mixed_{name}", _branches_a(), "average", pooled
    reduced = (
        (("branch3x3", 384, (3, 3)),),
        (
            ("branch3x3dbl_1", 64),
            ("branch3x3dbl_2", 96, (3, 3)),
            ("branch3x3dbl_3", 96, (3, 3)),
        ),
    )
    yield "Mixed_6a", reduced, "halve", 0
    for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        yield f"Mixed_{name}", _branches_c(width), "average", 192
    reduced = (
        (("branch3x3_1", 192), ("branch3x3_2", 320, (3, 3))),
        (
            ("branch7x7x3_1", 192),
            ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)),
            ("branch7x7x3_4", 192, (3, 3)),
        ),
    )
    yield "Mixed_7a", reduced, "halve", 0
    yield "Mixed_7b", _branches_e(), "average", 192
    yield "Mixed_7c", _branches_e(), "max", 192


def _branches_a():
    return (
        (("branch1x1", 64),),
        (("branch5x5_1", 48), ("branch5x5_2", 64, (5, 5))),
        (
            ("branch3x3dbl_1", 64),
            ("branch3x3dbl_2", 96, (3, 3)),
            ("branch3x3dbl_3", 96, (3, 3)),
        ),
    )


def _branches_c(width):
    return (
        (("branch1x1", 192),),
        (
            ("branch7x7_1", width),
            ("branch7x7_2", width, (1, 7)),
            ("branch7x7_3", 192, (7, 1)),
        ),
        (
            ("branch7x7dbl_1", width),
            ("branch7x7dbl_2", width, (7, 1)),
            ("branch7x7dbl_3", width, (1, 7)),
            ("branch7x7dbl_4", width, (7, 1)),
            ("branch7x7dbl_5", 192, (1, 7)),
        ),
    )


def _branches_e():
    return (
        (("branch1x1", 320),),
        (
            ("branch3x3_1", 384),
            (("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))),
        ),
        (
            ("branch3x3dbl_1", 448),
            ("branch3x3dbl_2", 384, (3, 3)),
            (("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))),
        ),
    )
