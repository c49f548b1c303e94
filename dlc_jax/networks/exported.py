"""Networks as functions that `jax.export` can write down: arrays in, an array out.

The noise of a draw depends on the seed and on the draw's number alone, as everywhere here, so the
results are those of the pipeline.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dlc_jax.diffusion.code_sampler import CodeSampler
from dlc_jax.diffusion.sample import Sampler
from dlc_jax.errors import UserError
from dlc_jax.networks.encoder import EncoderNetwork
from dlc_jax.networks.generator import GeneratorNetwork
from dlc_jax.networks.prior import PriorNetwork

NUMBER = (), jnp.int32  # one for each example
DRAW = {"seed": (None, jnp.int32), "numbers": NUMBER}


class Function(NamedTuple):
    """What is exported.

    Attributes:
      call: (params, *arrays) -> array [b, ...].
      params: nested, as they are used.
      arguments: {name: (shape of an example, dtype)} of the arrays; the shape None is a scalar.
    """

    call: Callable
    params: Any
    arguments: dict[str, tuple]


def encode(network: EncoderNetwork) -> Function:
    """Images uint8 [b, y, x, 3] of the encoder's size to codes int32 [b, l]."""
    arguments = {"images": ((network.size, network.size, 3), jnp.uint8)}
    return Function(network.codes, network.params, arguments)


def sample_codes(network: PriorNetwork, sampler: CodeSampler) -> Function:
    """A seed, numbers int32 [b] and labels, if it has classes, to new codes int32 [b, l]."""
    names = ("keys", "label") if network.model.classes else ("keys",)

    def call(params, seed, numbers, *label):
        given = _keys(seed, numbers), *label
        return network._sample(params, *given, sampler=sampler, names=names)[:, :-1]

    arguments = DRAW | ({"labels": NUMBER} if network.model.classes else {})
    return Function(call, network.params, arguments)


def decode(network: GeneratorNetwork, sampler: Sampler) -> Function:
    """A seed, numbers int32 [b], and what the generator reads, to images uint8 [b, y, x, 3].

    That is codes int32 [b, l], labels int32 [b] or embeddings float32 [b, e].

    Raises:
      UserError: guidance leans away from another run, or latents have no autoencoder.
    """
    how, model = sampler.guidance, network.model
    if how.base not in ("", "internal") and how.scale != 1:
        raise UserError(
            f"sampler.guidance.base={how.base}: a generator of another run cannot be exported with "
            "this one"
        )
    arguments, names = dict(DRAW), ()
    if model.positions:
        arguments["codes"], names = ((model.positions,), jnp.int32), ("codes",)
    if model.classes:
        arguments["labels"], names = NUMBER, (*names, "label")
    if model.embedding:
        arguments["embeddings"] = ((model.embedding,), jnp.float32)
        names = (*names, "embedding")
    pictures, params = None, {"generator": network.params}
    if network.section.latents:
        pictures, params["autoencoder"] = network._decoder

    def call(params, seed, numbers, *given):
        settings = {"sampler": sampler, "names": names}
        drawn = network._draw(params["generator"], _keys(seed, numbers), *given, **settings)
        return drawn if pictures is None else pictures(params["autoencoder"], drawn)

    return Function(call, params, arguments)


def _keys(seed, numbers):
    """Those of `network.keys`, of a traced seed."""
    key = jax.random.key(seed)
    return jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)
