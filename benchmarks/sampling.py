"""Drawing latents with each generator at its real size, against the machine's own matmul rate.

    python benchmarks/sampling.py --models XL --steps 50 --guidance 1 1.4 --attention none xla
    JAX_PLATFORMS=cpu python benchmarks/sampling.py --rehearse

What runs is the program `decode` of the samples job of configs/imagenet256.py, on random parameters
and codes that lie in memory. FLOPs are those of the model in all its calls; with guidance (a scale
other than 1) there are two in each step. "of matmul" is their rate over that of large matrix
products, taken in turn. The autoencoder, which makes images of latents, is not part of it.
"""

import functools

import absent  # noqa: F401, before dlc_jax
import jax
import jax.numpy as jnp
import numpy as np
import timing
import train_step

from dlc_jax import command, memory, parallel
from dlc_jax.plan import estimate, program

BATCH = 64
COLUMNS = ("draws", "guidance", "attention", "batch", "ms", "images/s", "TFLOP/s", "of matmul")


def main() -> None:
    parser = timing.parser(__doc__)
    add = parser.add_argument
    add("--models", nargs="+", default=["XL"], choices=("S", "B", "L", "XL"), metavar="M")
    add("--steps", type=int, help="of the sampler, 50 by default")
    add("--method", default="ancestral", help="of the sampler")
    add("--guidance", nargs="+", type=float, default=[1.0, 1.4], metavar="SCALE")
    add("--attention", nargs="+", default=["none"], metavar="A", help="none chooses by itself")
    arguments = parser.parse_args()
    memory.reserve()
    print(timing.about() + "\n\n" + timing.head(*COLUMNS, "memory GiB"), flush=True)
    for name in arguments.models:
        for line in rows(name, arguments):
            print(line, flush=True)
    print("\n" + timing.memory())


def rows(name: str, arguments):
    """The lines of a model: guidance by implementation of attention, all in turn."""
    mesh = parallel.make_mesh(data=1, fsdp=-1, tensor=1)
    batch = arguments.batch or (8 if arguments.rehearse else BATCH)
    steps = arguments.steps or (3 if arguments.rehearse else 50)
    title, found, cases = f"DiT-{name}/2, {steps} {arguments.method} steps", {}, {}
    for scale in arguments.guidance:
        for attention in arguments.attention:
            try:
                config = recipe(name, steps, scale, attention, batch, arguments)
                made = estimate.programs(config, "samples")["decode"]
                lowered = made.lower(mesh)
                compiled = lowered.compile()
                if not cases:
                    given = inputs(lowered, compiled, config.generator.model["values"])
            except Exception as error:  # the other cases are worth having
                yield timing.failed(f"{title}, {scale}, {attention}", error, len(COLUMNS) + 1)
                continue
            found[scale, attention] = made, compiled
            cases[scale, attention] = functools.partial(compiled, *given)
    if not cases:
        return
    product, flops = timing.matmul()
    how = {"rounds": arguments.rounds, "repeat": arguments.repeat}
    try:
        taken = timing.alternate(cases | {"matmul": product}, **how)
    except Exception as error:
        yield timing.failed(title, error, len(COLUMNS) + 1)
        return
    limit = timing.rate(flops, taken["matmul"])
    for (scale, attention), (made, compiled) in found.items():
        seconds = taken[scale, attention]
        reached = timing.rate(made.flops, seconds)
        yield timing.row(
            title,
            f"{scale:g}",
            attention,
            str(batch),
            timing.milliseconds(seconds),
            f"{batch / np.median(seconds):.2f}",
            f"{reached / 1e12:.3g}",
            f"{reached / limit:.2f}",
            f"{program.memory(compiled).peak / 2**30:.2f}",
        )
    products = timing.milliseconds(taken["matmul"]), "", f"{limit / 1e12:.3g}", "1.00", ""
    yield timing.row("large products", "", "", "", *products)


def recipe(name: str, steps: int, scale: float, attention: str, batch: int, arguments):
    """The expanded recipe of one case."""
    fields = {
        "samples.sampler.steps": steps,
        "samples.sampler.method": arguments.method,
        "samples.sampler.guidance.scale": scale,
        "samples.batch": batch,
    }
    if attention != "none":
        fields["generator.model.implementation"] = attention
    if jax.default_backend() == "cpu":  # whose bfloat16 is slower
        fields["generator.train.dtype"] = "float32"
    if arguments.rehearse:
        fields |= {f"generator.{field}": size for field, size in train_step.SMALL.items()}
        fields["generator.model.image"] = 8
    lines = [f"--config.{field}={value}" for field, value in fields.items()]
    return command.parse(["", f"--config=configs/imagenet256.py:samples,{name}", *lines])[0]


def inputs(lowered, compiled, values: int) -> tuple:
    """Random arguments of a program: parameters of deviation 0.02, keys, codes."""
    numbers = iter(range(10**6))

    def one(info, sharding):
        key = jax.random.key(next(numbers))
        if jax.dtypes.issubdtype(info.dtype, jax.dtypes.prng_key):
            made = jax.random.split(key, info.shape)
        elif jnp.issubdtype(info.dtype, jnp.integer):
            made = jax.random.randint(key, info.shape, 0, values, info.dtype)
        else:
            made = 0.02 * jax.random.normal(key, info.shape, info.dtype)
        return jax.device_put(made, sharding)

    return jax.tree.map(one, lowered.args_info[0], compiled.input_shardings[0])


if __name__ == "__main__":
    main()
