"""Which implementation of attention was found the fastest on GPUs, by benchmarks/attention.py."""

import jax
import jax.numpy as jnp

CHIPS = ("NVIDIA H100", "NVIDIA H200")  # one chip with two memories; others are not measured
# size class -> name, for forward and backward in bfloat16, as the benchmark prints them; it has not
# run on such a chip yet
FASTEST: dict[tuple[int, int], str] = {}


def size_class(shape: tuple[int, ...]) -> tuple[int, int]:
    """(width of a head, tokens rounded up to a power of two) of a projection [b, n, 3, h, k]."""
    return shape[-1], 1 << (shape[1] - 1).bit_length()


def fastest(qkv) -> tuple[str, ...]:
    """The name that was measured for these sizes on the chip of the mesh in context, or none."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    if qkv.dtype != jnp.bfloat16 or not device.device_kind.startswith(CHIPS):
        return ()
    name = FASTEST.get(size_class(qkv.shape))
    return () if name is None else (name,)
