"""Our DiT training step and ViT forward pass against good PyTorch, in turn, in one run.

    JAX_PLATFORMS=cpu python benchmarks/vs_torch.py --models S ViT-S
    python benchmarks/vs_torch.py --models XL --batch 64 --compile

Both train a class-conditional DiT on latents by flow matching with AdamW and an average of the
parameters (`torch_models.Training`: fused attention, fused AdamW, foreach average; on a GPU
bfloat16 autocast; with --compile torch.compile). Ours is the generator's stage and does what a run
does beside: the gradient's norm, the check that it is finite, draws by example. First the weights
are copied over, and loss and gradient must agree. Ratios are our time over theirs: below 1 ours is
faster.
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two libraries share the device

import absent  # noqa: E402, F401, before dlc_jax
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import timing  # noqa: E402
import torch  # noqa: E402
import torch_models  # noqa: E402
import train_step  # noqa: E402

from dlc_jax import parallel, train  # noqa: E402
from dlc_jax.diffusion.linear import Linear  # noqa: E402
from dlc_jax.models.dit import DiT  # noqa: E402
from dlc_jax.models.vit import ViT  # noqa: E402
from dlc_jax.step import make_init  # noqa: E402
from dlc_jax.typing import Given  # noqa: E402

DITS = {
    "S": {"width": 384, "depth": 12, "heads": 6},
    "B": {"width": 768, "depth": 12, "heads": 12},
    "L": {"width": 1024, "depth": 24, "heads": 16},
    "XL": {"width": 1152, "depth": 28, "heads": 16},
}
VITS = {f"ViT-{name}": size for name, size in DITS.items() if name != "XL"}
TINY = {"width": 64, "depth": 2, "heads": 2}
CLASSES = 1000
PLAIN = {
    "process.name": "linear",
    "model.positions": 0,
    "model.values": 0,
    "model.classes": CLASSES,
}
COLUMNS = ("case", "against", "batch", "ours, ms", "theirs, ms", "ratio", "of least", "of matmul")
ON_GPU = jax.default_backend() == "gpu"
DEVICE = "cuda" if ON_GPU else "cpu"


def main() -> None:
    parser = timing.parser(__doc__)
    add = parser.add_argument
    add("--models", nargs="+", default=["S", "ViT-S"], choices=[*DITS, *VITS], metavar="M")
    add("--compile", action="store_true", help="against torch.compile too")
    add("--attention", default="none", help="ours; none chooses by itself")
    add("--field", action="append", default=[], metavar="NAME=VALUE", help="of our section")
    arguments = parser.parse_args()
    print(timing.about() + f", torch with {torch.get_num_threads()} threads", flush=True)
    for name in arguments.models:
        make = forward_cases if name in VITS else training_cases
        batch = arguments.batch or (64 if ON_GPU else 8)
        cases, flops, checked = make(name, batch, arguments)
        print(f"\n{checked}\n\n" + timing.head(*COLUMNS), flush=True)
        cases["matmul"], products = timing.matmul()
        taken = timing.alternate(cases, rounds=arguments.rounds, repeat=arguments.repeat)
        reached = timing.rate(flops, taken["ours"]) / timing.rate(products, taken["matmul"])
        for theirs in [name for name in cases if name.startswith("torch")]:
            line = compared(taken["ours"], taken[theirs])
            kind = "forward" if name in VITS else "step"
            title = f"{name if name in VITS else f'DiT-{name}/2'}, {kind}"
            print(timing.row(title, theirs, str(batch), *line, f"{reached:.2f}"), flush=True)
    print("\n" + timing.memory())


def compared(ours, theirs) -> tuple[str, ...]:
    ratio = np.median(ours) / np.median(theirs), ours.min() / theirs.min()
    both = timing.milliseconds(ours), timing.milliseconds(theirs)
    return (*both, *(f"{each:.2f}" for each in ratio))


def training_cases(name: str, batch: int, arguments):
    """({case: a step}, FLOPs of one, how far both agree)."""
    size = TINY if arguments.rehearse else DITS[name]
    fields = PLAIN | {f"model.{field}": value for field, value in size.items()}
    fields |= dict(each.split("=", 1) for each in arguments.field)
    fields |= {"train.batch": batch, "train.dtype": "bfloat16" if ON_GPU else "float32"}
    if arguments.attention != "none":
        fields["model.implementation"] = arguments.attention
    stage = train_step.made("generator", "", fields)
    mesh = parallel.make_mesh(data=1, fsdp=-1, tensor=1)
    records = train_step.batch_of(stage)
    said = agreement(size, records)
    batch_here = jax.device_put(records)
    with jax.set_mesh(mesh):
        step = train.lower(stage, mesh).compile()
        held = [jax.jit(make_init(stage))(jax.random.key(0))]

    def ours():
        held[0], metrics = step(held[0], batch_here, stage.frozen_spec, root)
        return metrics

    root = jax.random.key(1)
    x = torch.from_numpy(records["latent"]).to(DEVICE)
    label = torch.from_numpy(records["label"]).long().to(DEVICE)
    cases = {"ours": ours}
    for how in ["torch eager"] + ["torch.compile"] * arguments.compile:
        model = torch_models.DiT(**size, classes=CLASSES).to(DEVICE)
        training = torch_models.Training(model, compile=how == "torch.compile")
        cases[how] = lambda training=training: training(x, label)
    return cases, stage.flops, said


def agreement(size: dict, records: dict) -> str:
    """Loss and norm of the gradient of both, on the same weights and draws, in float32.

    Raises:
      ArithmeticError: they differ by more than a part in 10,000, or 1,000 on a GPU.
    """
    draw = np.random.default_rng(1)
    ours = DiT(**size, classes=CLASSES, positions=0, values=0)
    x, label = records["latent"], records["label"] % CLASSES
    t = draw.random(len(x), np.float32)
    noise = draw.standard_normal(x.shape, np.float32)
    made = jax.jit(ours.init)(jax.random.key(0), x[:1], t[:1], _given(label[:1]))["params"]
    made = jax.tree.map(lambda leaf: leaf + 0.02 * draw.standard_normal(leaf.shape), made)
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32), made)

    def loss(params):
        process = Linear()
        x_t = process.noised(x, noise, t)
        output = ours.apply({"params": params}, x_t, t, _given(label))
        return process.loss(output, x, noise, t).mean()

    with jax.default_matmul_precision("highest"):
        value, grads = jax.jit(jax.value_and_grad(loss))(params)
    norm = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(grads)))
    theirs = torch_models.DiT(**size, classes=CLASSES)
    torch_models.copy(params, theirs)  # on the CPU, in float32
    at = torch.from_numpy(t)[:, None, None, None]
    x, noise = torch.from_numpy(x), torch.from_numpy(noise)
    output = theirs((1 - at) * x + at * noise, torch.from_numpy(t), torch.from_numpy(label).long())
    found = torch.nn.functional.mse_loss(output, noise - x)
    found.backward()
    their_norm = float(torch.stack([p.grad.norm() for p in theirs.parameters()]).norm())
    apart = (abs(float(value) / found.item() - 1), abs(norm / their_norm - 1))
    if max(apart) > (1e-3 if ON_GPU else 1e-4):
        raise ArithmeticError(f"the two differ: loss and gradient by {apart}")
    return (
        f"on the same weights the loss is {float(value):.5f} in both, to {apart[0]:.0e}; the norm "
        f"of the gradient {norm:.4f}, to {apart[1]:.0e}"
    )


def _given(label):
    return Given(label=jnp.asarray(label))


def forward_cases(name: str, batch: int, arguments):
    """({case: a forward pass}, FLOPs of one, how far both agree)."""
    size = TINY if arguments.rehearse else VITS[name]
    image = 64 if arguments.rehearse else 224
    attention = None if arguments.attention == "none" else arguments.attention
    how = {"image": image, "patch": 16, "registers": 0, "layer_scale": None}
    ours = ViT(**size, **how, implementation=attention)
    images = np.random.default_rng(0).standard_normal((batch, image, image, 3), np.float32)
    made = jax.jit(ours.init)(jax.random.key(0), images[:1])["params"]
    draw = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: leaf + 0.02 * draw.standard_normal(leaf.shape), made)
    theirs = torch_models.ViT(**size, image=image)
    torch_models.copy(params, theirs)
    kind = jnp.bfloat16 if ON_GPU else jnp.float32
    params = jax.tree.map(lambda leaf: leaf.astype(kind), params)
    theirs = theirs.to(DEVICE, torch.bfloat16 if ON_GPU else torch.float32).eval()
    pixels = torch.from_numpy(images).to(DEVICE, next(theirs.parameters()).dtype)
    run = jax.jit(lambda params, images: ours.apply({"params": params}, images)["vector"])
    given = jnp.asarray(images, kind)

    def case(model):
        def call():
            with torch.inference_mode():
                return model(pixels)

        return call

    cases = {"ours": lambda: run(params, given), "torch eager": case(theirs)}
    if arguments.compile:
        cases["torch.compile"] = case(torch.compile(theirs))
    found, wanted = np.asarray(cases["ours"](), np.float32), cases["torch eager"]()
    wanted = wanted.float().cpu().numpy()
    apart = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    if apart > (0.05 if ON_GPU else 1e-4):
        raise ArithmeticError(f"the two differ: class tokens by {apart}")
    return cases, batch * ours.flops(), f"class tokens on the same weights agree to {apart:.0e}"


if __name__ == "__main__":
    main()
