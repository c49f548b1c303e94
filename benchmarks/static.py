"""Attention on TPUs without one: XLA's against the kernel's, by the compilers' own counts.

    python benchmarks/static.py [--only v5e] [--no-step]

The first table is of the attention sub-block (projection, attention, projection back) of 32
examples in bfloat16: bytes accessed, estimated cycles, temporaries. The second is of the whole
train step of DiT-XL/2 with 16 images a chip. The compilers' cycles leave out the inside of a
kernel; it is added as `dlc plan` adds it. Nothing is run, so no accelerator is needed; two cores
take a quarter of an hour.
"""

import argparse
import dataclasses

from dlc_jax.plan import machine, program

MIB = 2**20
SHAPES = {  # name -> (tokens, heads, size of a head, normalized queries and keys with rotation)
    "DiT-XL/2": (256, 16, 72, False),
    "DiT-XL/2, modern": (256, 16, 72, True),
    "wide heads": (256, 9, 128, False),
    "ViT-L/14": (261, 16, 64, False),
}
MACHINES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
STEPS = {"v5e": "v5e:4x4", "v5p": "v5p:2x2x4"}  # 16 devices, fsdp 16
WORD = {True: "kernel", False: "XLA"}


@dataclasses.dataclass
class Counts:
    """Of one device: bytes accessed and of temporaries, cycles outside of and inside kernels."""

    accessed: float
    temporaries: int
    cycles: int | None
    inside: float

    @property
    def total(self) -> float | None:
        return self.cycles and self.cycles + self.inside


def count(compiled, target) -> Counts:
    text = program.text(compiled)
    return Counts(
        accessed=compiled.cost_analysis()["bytes accessed"],
        temporaries=program.memory(compiled).temporaries,
        cycles=program.cycles(text),
        inside=program.kernel_cycles(text, target),
    )


def sub_block(target, shape, *, kernel: bool, backward: bool, examples: int = 32):
    """The compiled attention sub-block, without or with the gradients of input and parameters."""
    import jax
    import jax.numpy as jnp

    from dlc_jax import parallel
    from dlc_jax.models.layers import Attention
    from dlc_jax.models.positions import rotary

    n, h, k, modern = shape
    name = "pallas_tpu" if kernel else "xla"
    layer = Attention(h, qk_norm=modern, implementation=name)
    mesh = parallel.make_mesh(devices=target.devices[:1])
    placed = parallel.replicated(mesh)
    x = jax.ShapeDtypeStruct((examples, n, h * k), jnp.bfloat16, sharding=placed)
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=placed),
        jax.eval_shape(Attention(h, qk_norm=modern).init, jax.random.key(0), x),
    )

    def forward(params, x):
        return layer.apply(params, x, rotary=rotary(n, k) if modern else None)

    def both(params, x, dout):
        out, pull = jax.vjp(forward, params, x)
        return out, pull(dout)

    with jax.set_mesh(mesh):
        lowered = (
            jax.jit(both).lower(params, x, x) if backward else jax.jit(forward).lower(params, x)
        )
        return lowered.compile()


def step(target, *, kernel: bool, images: int = 16):
    """The compiled train step of DiT-XL/2, `images` on each device."""
    from dlc_jax import command, parallel
    from dlc_jax.plan import estimate

    name = "pallas_tpu" if kernel else "xla"
    fields = {"mesh.data": 1, "mesh.fsdp": -1, "generator.model.implementation": name}
    fields |= {"generator.train.batch": images * len(target.devices)}
    config = "--config=configs/imagenet256.py:generator"
    recipe = ["static", config, *(f"--config.{field}={value}" for field, value in fields.items())]
    config, _ = command.parse(recipe)
    mesh = parallel.make_mesh(**config.mesh, devices=target.devices)
    return estimate.programs(config, "generator")["train"].lower(mesh).compile()


HEAD = "| {} | machine | | GiB accessed | of XLA | M cycles | of XLA | temporaries MiB |"


def rows(name: str, target, pair) -> list[str]:
    """Two lines: XLA's counts, then the kernel's with the share of XLA's."""
    lines = []
    for kernel, found in zip((False, True), pair):
        total, first = found.total, pair[0].total
        cells = [name, target.kind, WORD[kernel], f"{found.accessed / 2**30:.2f}"]
        cells += [f"{found.accessed / pair[0].accessed:.2f}" if kernel else ""]
        cells += [f"{total / 1e6:.2f}" if total else "unread"]
        cells += [f"{total / first:.2f}" if kernel and total and first else ""]
        lines.append("| " + " | ".join([*cells, f"{found.temporaries / MIB:.0f}"]) + " |")
    return lines


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--only", default="", help="this machine")
    parser.add_argument("--no-step", action="store_true", help="no train steps")
    arguments = parser.parse_args()
    machine.environment()
    print(HEAD.format("sub-block") + "\n" + "|---" * 8 + "|")
    for kind in filter(lambda kind: arguments.only in kind, MACHINES):
        target = machine.find(MACHINES[kind])
        for shape, backward in (
            (shape, backward) for shape in SHAPES for backward in (False, True)
        ):
            pair = [
                count(
                    sub_block(target, SHAPES[shape], kernel=kernel, backward=backward),
                    target,
                )
                for kernel in (False, True)
            ]
            words = "forward and backward" if backward else "forward"
            print(*rows(f"{shape}, {words}", target, pair), sep="\n", flush=True)
    kinds = [] if arguments.no_step else [kind for kind in STEPS if arguments.only in kind]
    print("\n" + HEAD.format("train step") + "\n" + "|---" * 8 + "|")
    for kind in kinds:
        target = machine.find(STEPS[kind])
        pair = [count(step(target, kernel=kernel), target) for kernel in (False, True)]
        print(*rows("DiT-XL/2, 16 images a chip", target, pair), sep="\n", flush=True)


if __name__ == "__main__":
    main()
