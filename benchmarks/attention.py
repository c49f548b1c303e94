"""Every implementation of attention that runs here, in turn, at the sizes of the paper's models.

    python benchmarks/attention.py
    JAX_PLATFORMS=cpu python benchmarks/attention.py --rehearse

Each is first compared with "xla", which names what differs and is not timed then. Ratios are of
medians within this run: above 1.00x it is faster than the one named. The last lines are those of
FASTEST in dlc_jax/kernels/measured.py, if the machine of this run is one of CHIPS there.
"""

import concurrent.futures
import functools

import absent  # noqa: F401, before dlc_jax
import jax
import jax.numpy as jnp
import numpy as np
import timing

from dlc_jax.kernels.attention import IMPLEMENTATIONS, attention
from dlc_jax.kernels.measured import size_class
from dlc_jax.models.positions import rotary

# name: tokens, heads, width of a head, what comes with them
CASES = {
    "DiT-XL/2": (256, 16, 72, ()),
    "ViT-L, global crop": (261, 16, 64, ()),
    "ViT-L, local crop": (54, 16, 64, ()),
    "SEDD-medium": (512, 16, 64, ("rotary",)),
    "DiT-XL/2, 9 heads": (256, 9, 128, ()),
    "DiT-XL/2, QK norm and RoPE": (256, 16, 72, ("rotary", "qk_scale")),
}
PAIRS, TOKENS = 2048, 32768  # at least: examples times heads, and tokens of a batch
BOUND = 2e-2  # of the largest number; each rounds to bfloat16 in its own places
COLUMNS = ("case", "implementation", "forward ms", "TFLOP/s", "to xla", "to cudnn")
COLUMNS += ("forward and backward ms", "to xla", "to cudnn")


def main() -> None:
    parser = timing.parser(__doc__)
    add = parser.add_argument
    add("--cases", nargs="+", default=list(CASES), choices=CASES, metavar="CASE")
    add("--implementations", nargs="+", default=list(IMPLEMENTATIONS), choices=IMPLEMENTATIONS)
    parser.set_defaults(repeat=20)
    arguments = parser.parse_args()
    if arguments.rehearse:
        arguments.rounds = arguments.repeat = 2
    print(timing.about() + "\n\n" + timing.head(*COLUMNS), flush=True)
    fastest = {}  # by the first case of a class
    for name in arguments.cases:
        n, h, k, options = CASES[name]
        batch = arguments.batch or max(-(-PAIRS // h), -(-TOKENS // n))
        if arguments.rehearse:
            n, h, batch = min(n, 24), 2, 1
        case = f"{name}: {batch} x {n} x {h} x {k}"
        both = measure(case, (batch, n, 3, h, k), options, arguments)
        best = min(both, key=lambda each: np.median(both[each]))
        fastest.setdefault(size_class((batch, n, 3, h, k)), best)
    print("\nFASTEST = {")
    for size, best in fastest.items():
        print(f'    {size}: "{best}",')
    print("}")


def measure(case, shape, options, arguments) -> dict[str, np.ndarray]:
    """Prints a row for each implementation; {name: seconds forward and backward}."""
    b, n, _, h, k = shape
    qkv, out_grad = (
        jax.random.normal(jax.random.key(seed), each, jnp.bfloat16)
        for seed, each in enumerate((shape, (b, n, h, k)))
    )
    given = {"rotary": rotary(n, k), "qk_scale": (jnp.full(k, 1.1), jnp.full(k, 0.9))}
    given = {name: given[name] for name in options}
    names = ["xla", *(each for each in arguments.implementations if each != "xla")]
    with concurrent.futures.ThreadPoolExecutor() as pool:  # they take longer than to be timed
        made = pool.map(lambda name: compiled(name, given, qkv, out_grad), names)
    forward, both, expected = {}, {}, None
    for name, (run, back, error) in zip(names, made):
        if error is None:
            found = [np.asarray(x, np.float32) for x in (run(qkv), back(qkv, out_grad))]
            expected = expected or found
            worst = max(np.abs(x - y).max() / np.abs(y).max() for x, y in zip(found, expected))
            if not worst < BOUND:
                error = ValueError(f"differs from xla by {worst:.1e} of the largest number")
        if error is not None:
            print(timing.failed(f"{case} | {name}", error, len(COLUMNS) - 1), flush=True)
            continue
        forward[name] = functools.partial(run, qkv)
        both[name] = functools.partial(back, qkv, out_grad)
    forward, both = (
        timing.alternate(cases, rounds=arguments.rounds, repeat=arguments.repeat)
        for cases in (forward, both)
    )
    flops = 4.0 * b * h * n * n * k
    for name in forward:
        tera = f"{timing.rate(flops, forward[name]) / 1e12:.1f}"
        cells = [timing.milliseconds(forward[name]), tera, *ratios(forward, name)]
        cells += [timing.milliseconds(both[name]), *ratios(both, name)]
        print(timing.row(case, name, *cells), flush=True)
    return both


def compiled(name: str, given: dict, qkv, out_grad):
    """(attention, the gradient of the projection by that of the output, None), or the error."""

    def run(qkv):
        return attention(qkv, implementation=name, **given)

    def back(qkv, out_grad):
        return jax.vjp(run, qkv)[1](out_grad)[0]

    try:
        run, back = jax.jit(run).lower(qkv), jax.jit(back).lower(qkv, out_grad)
        return run.compile(), back.compile(), None
    except Exception as error:  # a refusal, or that of another's compiler: a row, not the end
        return None, None, error


def ratios(seconds, name) -> list[str]:
    medians = {each: float(np.median(taken)) for each, taken in seconds.items()}
    others = (medians.get(other) for other in ("xla", "cudnn"))
    return [f"{other / medians[name]:.2f}x" if other else "" for other in others]


if __name__ == "__main__":
    main()
