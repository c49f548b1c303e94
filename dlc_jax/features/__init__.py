"""Networks that turn images into the features that metrics compare.

Weights are files that people fetch: nothing is downloaded. To add a network: a module with
`PROTOCOLS` and `make`, and a line in `NETWORKS`.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dlc_jax import checksum
from dlc_jax.errors import UserError
from dlc_jax.features import dinov2, inception, resnet, squeezenet
from dlc_jax.features.extractor import Extractor, highest
from dlc_jax.features.weights import Published, check_there, expecting

__all__ = ["NETWORKS", "Extractor", "Network", "load"]


class Network(NamedTuple):
    """A network that can be loaded.

    Attributes:
      make: (path, protocol) -> the other fields of its Extractor.
      protocols: how images may be resized; the first is the default.
      published: the file of its weights.
    """

    make: Callable[[Path, str], dict]
    protocols: tuple[str, ...]
    published: Published


def _resnet(depth, sha256):
    made = functools.partial(resnet.make, depth=depth)
    file, where = f"resnet{depth}-{sha256[:8]}.th", "github.com/akamaster/pytorch_resnet_cifar10"
    return Network(made, resnet.PROTOCOLS, Published(file, where, sha256))


NETWORKS = {
    "inception": Network(
        inception.make,
        inception.PROTOCOLS,
        Published(
            "pt_inception-2015-12-05-6726825d.pth",
            "github.com/mseitzer/pytorch-fid, release fid_weights",
            "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        ),
    ),
    "squeezenet": Network(
        squeezenet.make,
        squeezenet.PROTOCOLS,
        Published(
            "squeezenet_v1.0_decoded_OIHW.npz",
            "github.com/songhan/SqueezeNet-Deep-Compression, as .net to decode",
            "4cdb3c8440cd199a6f6125de3f94540e07ef7bdcb5a6d99f36aafd5154f1c608",
        ),
    ),
    "dinov2": Network(
        dinov2.make,
        dinov2.PROTOCOLS,
        Published("dinov2_vitl14_pretrain.pth", "github.com/facebookresearch/dinov2"),
    ),
    "resnet20": _resnet(20, "12fca82f0bebc4135bf1f32f6e3710e61d5108578464b84fd6d7f5c1b04036c8"),
    "resnet56": _resnet(56, "4bfd97631478d6b638d2764fd2baff3edb1d7d82252d54439343b6596b9b5367"),
}


def load(name: str, *, weights: str | Path | None, protocol: str | None = None) -> Extractor:
    """A network with the weights of a file.

    Args:
      name: of NETWORKS.
      weights: path of the file: what is published, or the same tensors as safetensors. PyTorch's
        own files need PyTorch.
      protocol: how images are resized; None is the network's first.

    Raises:
      UserError: no such network, protocol or file, or a file of something else; it says which one
        is wanted and where it is published.
    """
    if name not in NETWORKS:
        raise UserError(f"features {name!r} are unknown; known are {', '.join(NETWORKS)}")
    make, protocols, published = NETWORKS[name]
    if (protocol := protocol or protocols[0]) not in protocols:
        raise UserError(
            f"{name} has no protocol {protocol!r}; choose one of {', '.join(protocols)}"
        )
    path = check_there(weights, name, published)
    with expecting(published):
        fields = make(path, protocol)
    found = checksum.of_file(path)
    known = found == published.sha256 if published.sha256 else None
    fields |= {"weights_sha256": found, "published": known, "apply": highest(fields["apply"])}
    return Extractor(name=name, protocol=protocol, **fields)
