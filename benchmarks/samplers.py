"""Samplers on a mixture of normals whose denoiser is known: python benchmarks/samplers.py

100,000 draws in the plane for each case, against the mixture's own moments and shares. What is left
is the steps' error and chance. Prints a Markdown table.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax.diffusion.process import Prediction
from dlc_jax.diffusion.processes import PROCESSES
from dlc_jax.diffusion.sample import Sampler

SHARES = np.array([0.4, 0.3, 0.2, 0.1])
MEANS = np.array([[1.0, 0.5], [-0.8, 0.9], [-0.6, -1.0], [0.9, -0.9]])
SPREADS = np.array(
    [
        [[0.09, 0.03], [0.03, 0.05]],
        [[0.06, -0.02], [-0.02, 0.08]],
        [[0.10, 0.0], [0.0, 0.04]],
        [[0.05, 0.02], [0.02, 0.07]],
    ]
)
MEAN = SHARES @ MEANS
COVARIANCE = np.einsum("k,kij->ij", SHARES, SPREADS) + (SHARES * (MEANS - MEAN).T) @ (MEANS - MEAN)
DRAWS = 100_000

# (process, method, steps, further fields of the sampler); "learned": with the best variance.
CASES = [
    ("linear", "euler", 150, {}),
    ("linear", "heun", 25, {}),
    ("linear", "heun", 40, {"churn": 20.0}),
    ("linear", "ddim", 150, {"eta": 0.5}),
    ("linear", "ancestral", 200, {}),
    ("linear", "sde", 100, {}),
    ("ddpm", "euler", 200, {}),
    ("ddpm", "heun", 50, {}),
    ("ddpm", "ddim", 250, {"eta": 0.5}),
    ("ddpm", "ancestral", 400, {}),
    ("ddpm learned", "ancestral", 100, {}),
    ("ddpm", "sde", 150, {}),
    ("edm", "euler", 250, {}),
    ("edm", "heun", 64, {}),
    ("edm", "heun", 64, {"churn": 20.0, "churn_interval": (0.1, 0.9)}),
    ("edm", "ddim", 250, {"eta": 0.2}),
    ("edm", "ancestral", 400, {}),
    ("edm", "sde", 200, {}),
]


def denoiser(process, *, learned: bool = False):
    """(x [b, 2], t [b]) -> the exact `Prediction`, for data scaled by the process's deviation.

    With `learned`, a DDPM step's variance is that of the mixture's own reverse step, the mean of
    the two coordinates'.
    """
    means, spreads = MEANS * process.deviation, SPREADS * process.deviation**2

    def predict(x, t):
        alpha, sigma = process.path(t[0])
        inverse = jnp.linalg.inv(alpha**2 * spreads + sigma**2 * jnp.eye(2))
        away = x[:, None] - alpha * means
        pull = jnp.einsum("kij,bkj->bki", inverse, away)
        logits = jnp.log(SHARES) + jnp.linalg.slogdet(inverse)[1] / 2
        logits -= (away * pull).sum(-1) / 2
        share = jax.nn.softmax(logits)
        found = means + alpha * jnp.einsum("kij,bkj->bki", spreads, pull)
        data = jnp.einsum("bk,bki->bi", share, found)
        noise = sigma * jnp.einsum("bk,bki->bi", share, pull)
        if not learned:
            return Prediction(data, noise)
        within = spreads - alpha**2 * spreads @ inverse @ spreads
        within = share @ jnp.trace(within, axis1=1, axis2=2)
        between = jnp.einsum("bk,bki->b", share, jnp.square(found - data[:, None]))
        variance = (within + between) / 2  # of x0 given x, and in units of the noise given x:
        variance *= jnp.square(alpha / sigma)
        row = jnp.round(t[0] * process.steps).astype(jnp.int32)
        mean, lower, gap = (jnp.asarray(each)[row] for each in process.tables[2:])
        mix = jnp.log1p(variance * mean**2 * jnp.exp(-lower)) / gap
        return Prediction(data, noise, jnp.broadcast_to(mix[:, None], x.shape))

    return predict


def measure(name: str, method: str, steps: int, fields: dict) -> tuple[float, float, float]:
    """Of `DRAWS` samples: errors of mean, covariance and shares.

    The mean's is in standard deviations, the larger of both coordinates'; the covariance's is
    relative, by the Frobenius norm; the shares' is the total variation, where a sample counts for
    each mode with its probability of being from there.
    """
    process = PROCESSES[name.split()[0]]()
    predict = denoiser(process, learned="learned" in name)
    sampler = Sampler(method=method, steps=steps, **fields)
    draw = jax.jit(functools.partial(sampler.draw, process, predict, shape=(2,)))
    x = draw(jax.random.split(jax.random.key(0), DRAWS))
    x = np.asarray(x, np.float64) / process.deviation
    mean = np.abs(x.mean(0) - MEAN) / np.sqrt(np.diag(COVARIANCE))
    covariance = np.linalg.norm(np.cov(x.T) - COVARIANCE) / np.linalg.norm(COVARIANCE)
    away = x[:, None] - MEANS
    logits = np.log(SHARES) - np.log(np.linalg.det(SPREADS)) / 2
    logits = logits - np.einsum("bki,kij,bkj->bk", away, np.linalg.inv(SPREADS), away) / 2
    chance = np.exp(logits - logits.max(1, keepdims=True))
    chance = (chance / chance.sum(1, keepdims=True)).mean(0)
    return mean.max(), covariance, np.abs(chance - SHARES).sum() / 2


def main() -> None:
    print("| process | method | steps | mean, sd | covariance, % | shares, TV | s |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for name, method, steps, fields in CASES:
        start = time.monotonic()
        mean, covariance, shares = measure(name, method, steps, fields)
        how = ", ".join([method, *(f"{key} {value}" for key, value in fields.items())])
        cells = [name, how, str(steps), f"{mean:.4f}", f"{covariance:.2%}", f"{shares:.4f}"]
        print(f"| {' | '.join([*cells, f'{time.monotonic() - start:.1f}'])} |", flush=True)


if __name__ == "__main__":
    main()
