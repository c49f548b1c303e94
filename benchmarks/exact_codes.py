"""Samplers of codes with the exact network of a joint distribution that can be written down.

    python benchmarks/exact_codes.py [--count 1000000] [--only METHOD]
    python benchmarks/exact_codes.py --rare       values of chance 1e-5, and a joint draw beside

Codes of 3 positions with 3 values, 27 in all. The table has the total variation distance of what
is drawn from the joint distribution, and how far as many true draws are from it.
"""

import argparse
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax.diffusion.code_sampler import CodeSampler
from dlc_jax.diffusion.masked import Masked

LENGTH, VALUES, BATCH = 3, 3, 100_000
CODES = np.array(list(itertools.product(range(VALUES), repeat=LENGTH)))
SAMPLERS = [
    CodeSampler(),
    CodeSampler(calls=1),
    *(CodeSampler(method="ancestral", calls=calls) for calls in (4, 64, 1024)),
    *(CodeSampler(method="remdm_loop", calls=calls) for calls in (16, 128, 1024)),
    *(CodeSampler(method="remdm_cap", calls=1024, eta=eta) for eta in (0.008, 0.02)),
    CodeSampler(method="remask", calls=1024),
    CodeSampler(method="remdm_cap", calls=128, eta=0.99),
    CodeSampler(method="remask", calls=128, eta=0.5),
    *(CodeSampler(method=method) for method in ("maskgit", "low_confidence", "entropy")),
]


def joint():
    p = np.random.default_rng(0).dirichlet(np.full(len(CODES), 0.4))
    return 0.9 * p + 0.1 / len(CODES)


def network(p):
    """noisy codes [b, l] to the exact logits of every position, given what is visible."""
    table = np.zeros((VALUES + 1,) * LENGTH + (LENGTH, VALUES))
    for noisy in itertools.product(range(VALUES + 1), repeat=LENGTH):
        fits = np.all((CODES == noisy) | (np.array(noisy) == VALUES), axis=1)
        for position, value in itertools.product(range(LENGTH), range(VALUES)):
            table[noisy][position, value] = p[fits & (CODES[:, position] == value)].sum()
    table = jnp.asarray(np.log(table / table.sum(-1, keepdims=True) + 1e-30), jnp.float32)
    return lambda noisy, share: table[tuple(noisy[:, i] for i in range(LENGTH))]


def distance(counts, p):
    return 0.5 * np.abs(counts / counts.sum() - p).sum()


def rare(values=4096, count=4000, chance=1e-5, steps=512, length=32):
    """The rate of rare values under ancestral sampling, and under one joint draw over all."""
    p = np.full(values, chance)
    p[count:] = (1 - count * chance) / (values - count)
    log_p = jnp.log(jnp.asarray(p, jnp.float32))
    sampler = CodeSampler(method="ancestral", calls=steps)

    def predict(noisy, share):
        return jnp.broadcast_to(log_p, (*noisy.shape, values))

    draw = jax.jit(lambda keys: sampler.draw(Masked(), predict, keys, length, values).codes)
    keys = jax.random.split(jax.random.key(0), 160)
    codes = np.concatenate([draw(keys[i : i + 40]) for i in range(0, 160, 40)])

    @jax.jit
    def joint_draw(key):  # all steps of one position, each one draw over V + 1 outcomes
        def step(carry, index):
            value, key = carry
            key, own = jax.random.split(key)
            reveal = 1 / (steps - index)
            whole = jnp.log(jnp.append(jnp.exp(log_p) * reveal, 1 - reveal))
            found = jnp.argmax(whole + jax.random.gumbel(own, (values + 1,), mode="low"))
            return (jnp.where(value == values, found, value), key), None

        return jax.lax.scan(step, (jnp.int32(values), key), jnp.arange(steps))[0][0]

    naive = jax.lax.map(joint_draw, jax.random.split(jax.random.key(1), 1000), batch_size=100)
    wanted = count * chance
    print(f"rare values should come at {wanted:.4f}\n| draw | positions | rate | ± |")
    print("|---|---|---|---|")
    for name, found in (("values apart", codes), ("joint", np.asarray(naive))):
        error = np.sqrt(wanted * (1 - wanted) / found.size)
        print(f"| {name} | {found.size} | {(found < count).mean():.4f} | {error:.4f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--only", default="")
    parser.add_argument("--rare", action="store_true")
    arguments = parser.parse_args()
    if arguments.rare:
        return rare()
    p, random = joint(), np.random.default_rng(1)
    predict = network(p)
    true = [distance(random.multinomial(arguments.count, p), p) for _ in range(20)]
    print("| sampler | steps | eta | calls made | total variation |\n|---|---|---|---|---|")
    print(f"| true draws | | | | {np.mean(true):.5f} ± {np.std(true):.5f} |")
    for sampler in SAMPLERS:
        if arguments.only not in sampler.method:
            continue
        draw = jax.jit(
            lambda keys, sampler=sampler: sampler.draw(Masked(), predict, keys, LENGTH, VALUES)
        )
        counts, calls = np.zeros(len(CODES)), 0
        for part in range(arguments.count // BATCH):
            codes, made = draw(jax.random.split(jax.random.key(part), BATCH))
            index = np.ravel_multi_index(np.asarray(codes).T, (VALUES,) * LENGTH)
            counts += np.bincount(index, minlength=len(CODES))
            calls += int(made.sum())
        row = [sampler.method, sampler.calls or LENGTH, sampler.eta or ""]
        row += [f"{calls / counts.sum():.2f}", f"{distance(counts, p):.5f}"]
        print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()
