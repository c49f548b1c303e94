"""A training step of each model at its real size, against the machine's own matmul rate.

    python benchmarks/train_step.py --models XL encoder --batch 128 --attention none xla
    JAX_PLATFORMS=cpu python benchmarks/train_step.py --rehearse

What runs is what `main` would run: the stages of configs/imagenet256.py, compiled by
`train.compile_step`, with optimizer and average, on random data that lie in memory. FLOPs are those
of the model (`Stage.flops`), so that what remat computes again does not count. "of matmul" is
their rate over that of large matrix products, taken in turn with the steps: model FLOPs
utilization against what the machine can do, not against its data sheet. Several implementations of
attention take turns too, on one state. Memory is what the compiler plans, state included.
"""

import absent  # noqa: F401, before dlc_jax
import jax
import numpy as np
import timing

from dlc_jax import command, memory, parallel, train
from dlc_jax.plan import program
from dlc_jax.stages import STAGES
from dlc_jax.step import make_init

# name -> (step, words of the recipe, batch)
MODELS = {
    "S": ("generator", "S", 256),
    "B": ("generator", "B", 256),
    "L": ("generator", "L", 128),
    "XL": ("generator", "XL", 128),
    "encoder": ("encoder", "", 64),
    "prior": ("prior", "sedd", 64),
}
TITLES = {"encoder": "ViT-L/14 SSL", "prior": "SEDD-medium"}
SIZES = {"width": 128, "depth": 2, "heads": 2, "positions": 4, "values": 8}
SMALL = {f"model*.{name}": size for name, size in SIZES.items()}
TINY = {
    "generator": {"model.image": 8},
    "prior": {},
    "encoder": {
        "model.backbone.image": 28,
        "crops.all.global_size": 28,
        "crops.all.local_size": 14,
        "crops.all.local_crops": 2,
        "model.dino.prototypes": 32,
        "model.dino.hidden": 16,
        "model.dino.bottleneck": 8,
    },
}
COLUMNS = ("step", "attention", "batch", "ms", "examples/s", "TFLOP/s", "of matmul", "memory GiB")


def main() -> None:
    parser = timing.parser(__doc__)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, metavar="M", help=", ".join(MODELS))
    add("--attention", nargs="+", default=["none"], metavar="A", help="none chooses by itself")
    add("--field", action="append", default=[], metavar="NAME=VALUE", help="of the step's section")
    arguments = parser.parse_args()
    memory.reserve()
    print(timing.about() + "\n\n" + timing.head(*COLUMNS), flush=True)
    usual = ("XL", "encoder", "prior") if arguments.rehearse else MODELS
    for name in arguments.models or usual:
        for line in rows(name, arguments):
            print(line, flush=True)
    print("\n" + timing.memory())


def rows(name: str, arguments):
    """The lines of a model, one for each implementation of attention."""
    step, words, batch = MODELS[name]
    batch = arguments.batch or (8 if arguments.rehearse else batch)
    title = TITLES.get(name, f"DiT-{name}/2")
    mesh = parallel.make_mesh(data=1, fsdp=-1, tensor=1)
    steps = {}
    for attention in arguments.attention:
        fields = recipe(step, attention, batch, arguments)
        try:
            stage = made(step, words, fields)
            steps[attention] = stage, train.lower(stage, mesh).compile()
        except Exception as error:  # the other cases are worth having
            yield timing.failed(f"{title}, {attention}", error, len(COLUMNS))
    if not steps:
        return
    try:
        taken, matmul_flops = measure(steps, mesh, arguments)
    except Exception as error:
        yield timing.failed(title, error, len(COLUMNS))
        return
    limit = timing.rate(matmul_flops, taken["matmul"])
    for attention, (stage, compiled) in steps.items():
        seconds = taken[attention]
        reached = timing.rate(stage.flops, seconds)
        yield timing.row(
            title,
            attention,
            str(batch),
            timing.milliseconds(seconds),
            f"{batch / np.median(seconds):.1f}",
            f"{reached / 1e12:.3g}",
            f"{reached / limit:.2f}",
            f"{program.memory(compiled).peak / 2**30:.2f}",
        )
    products = timing.milliseconds(taken["matmul"]), "", f"{limit / 1e12:.3g}", "1.00", ""
    yield timing.row("large products", "", "", *products)


def recipe(step: str, attention: str, batch: int, arguments) -> dict:
    """The lines of a step's section beside those of its recipe."""
    fields = dict(each.split("=", 1) for each in arguments.field)
    if arguments.rehearse:
        fields = SMALL | TINY[step] | fields
        if step == "encoder":  # all examples are one group
            groups = ("mask_group", "koleo_group", "drop_path_group")
            fields |= {f"objective.{group}": batch for group in groups}
    if attention != "none":
        fields["model*implementation"] = attention
    if jax.default_backend() == "cpu":  # whose bfloat16 is slower
        fields["train.dtype"] = "float32"
    return fields | {"train.batch": batch}


def made(step: str, words: str, fields: dict):
    """The stage of a step of configs/imagenet256.py."""
    variant = ",".join(filter(None, [step, words]))
    lines = [f"--config.{step}.{name}={value}" for name, value in fields.items()]
    config, _ = command.parse(["", f"--config=configs/imagenet256.py:{variant}", *lines])
    return STAGES[config[step].stage](config, step=step, workdir="unused")


def measure(steps: dict, mesh, arguments) -> tuple[dict, float]:
    """(seconds of each case, FLOPs of the matmuls' case). All steps go on from one state."""
    stage, _ = next(iter(steps.values()))
    abstract, key = train.abstract_state(stage, mesh), jax.random.key(0)
    placements = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    with jax.set_mesh(mesh):
        state = jax.jit(make_init(stage), out_shardings=placements)(key)
        batch = parallel.to_global(batch_of(stage), mesh, stage.plan.batch)
        root = parallel.spread(key, parallel.replicated(mesh))
        held = [state]  # a step gives back the memory of the state that it takes
        del state

        def case(compiled):
            def call():
                held[0], metrics = compiled(held[0], batch, stage.frozen_spec, root)
                return metrics

            return call

        product, flops = timing.matmul()
        cases = {name: case(compiled) for name, (_, compiled) in steps.items()}
        how = {"rounds": arguments.rounds, "repeat": arguments.repeat}
        taken = timing.alternate(cases | {"matmul": product}, **how)
        if int(held[0].skipped[0]):
            raise ArithmeticError("the loss or a gradient is not finite")
    return taken, flops


def batch_of(stage) -> dict[str, np.ndarray]:
    """Random records: latents normal, a sixth of the patches masked."""
    generator, found = np.random.default_rng(0), {}
    for name, spec in stage.batch_spec.items():
        shape = spec.shape
        if name == "position":
            found[name] = np.arange(shape[0], dtype=np.int32)
        elif spec.dtype == np.bool_:
            found[name] = generator.random(shape) < 0.15
        elif spec.dtype == np.float32:
            found[name] = generator.standard_normal(shape, np.float32)
        else:
            model = stage.identity["model"]
            top = {"codes": model.get("values"), "label": model.get("classes")}.get(name, 256)
            found[name] = generator.integers(0, top, shape).astype(spec.dtype)
    return found


if __name__ == "__main__":
    main()
