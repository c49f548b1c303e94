"""Can a generator learn 16 real images by heart? Every process, in pixels and in latents.

    python benchmarks/overfit.py PLACE [--autoencoder DIR [--name tiny] [--image 256]]
        [--steps 3000] [--processes linear,ddpm,edm] [--pixels 0]

PLACE is any place of images. Each image has a code of its own, drawn at random. The table has the
peak signal-to-noise ratio of what is drawn from the codes, in latents beside what the autoencoder
itself keeps of the images. `dlc import vae` makes DIR.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from dlc_jax import parallel
from dlc_jax.data.sources import DataSet
from dlc_jax.diffusion.processes import PROCESSES
from dlc_jax.diffusion.sample import Sampler
from dlc_jax.models.dit import DiT
from dlc_jax.networks.autoencoder import AutoencoderNetwork
from dlc_jax.networks.generator import example, sized, to_uint8
from dlc_jax.networks.network import keys
from dlc_jax.stages.generator.objective import Objective, Task, loss, to_pixels

COUNT, LENGTH, VALUES = 16, 8, 16
PROCESS = {
    "linear": {"prediction": "x"},
    "ddpm": {},
    "edm": {},
}


def psnr(a, b):
    """Of uint8 images, in dB, the mean of each image's."""
    error = np.square(a.astype(float) - b.astype(float)).mean((1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / np.maximum(error, 1e-9))))


def fit(name, x, patch, width, depth, steps, rate, draws):
    """(draws [n, ...] of every code after training on x, seconds); every image is draws times in a
    batch, at times of their own."""
    process = PROCESSES[name](**PROCESS[name])
    size = {"image": x.shape[1], "channels": x.shape[-1], "patch": patch}
    sizes = {"width": width, "depth": depth, "heads": 4, "remat": "none", "unroll": 0}
    code = {"positions": LENGTH, "values": VALUES}
    model = sized(DiT(**size, **sizes, **code, qk_norm=True), process)
    batch = draws * COUNT
    task = Task(model, process, Objective(drop=0.0), batch)
    codes = jax.random.randint(jax.random.key(1), (COUNT, LENGTH), 0, VALUES)
    records = {"latent": x * process.deviation, "codes": codes}
    records = {
        name: jnp.tile(each, (draws, *[1] * (each.ndim - 1))) for name, each in records.items()
    }
    batch = records | {"position": jax.random.permutation(jax.random.key(3), batch)}
    first = jnp.zeros((1, *x.shape[1:])), jnp.zeros((1,)), example(model)
    params = model.init(jax.random.key(0), *first)["params"]
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.warmup_cosine_decay_schedule(0, rate, 100, steps, 0.01 * rate), b2=0.99),
    )

    @jax.jit
    def step(carry, number):
        params, state, average = carry
        key = jax.random.fold_in(jax.random.key(2), number)

        def value(params):
            return loss(task, params, {}, batch, {}, number, key)[0]

        updates, state = tx.update(jax.grad(value)(params), state, params)
        params = optax.apply_updates(params, updates)
        decay = jnp.minimum(0.998, (1 + number) / (10 + number))
        average = optax.incremental_update(params, average, 1 - decay)
        return params, state, average

    begin = time.monotonic()
    carry = params, tx.init(params), params
    for number in range(steps):
        carry = step(carry, jnp.int32(number))
    params = carry[2]

    @jax.jit
    def draw(params):
        def predict(x, t):
            inputs = process.inputs(x, t)
            return process.predict(model.apply({"params": params}, *inputs, codes), x, t)

        method = "ddim" if name == "ddpm" else "heun"
        return Sampler(method=method, steps=50).draw(process, predict, keys(0, COUNT), x.shape[1:])

    drawn = draw(params) / process.deviation
    return np.asarray(drawn), time.monotonic() - begin


def images(path, size):
    source = DataSet(name="images", path=path, image=size, validation=0.0).source("train")
    rows = np.linspace(0, len(source) - 1, COUNT).astype(int)
    return np.stack([source[int(row)]["image"] for row in rows])


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("place")
    parser.add_argument("--autoencoder")
    parser.add_argument("--name", default="tiny", choices=("tiny", "kl"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--processes", default=",".join(PROCESS))
    parser.add_argument("--pixels", type=int, default=1)
    parser.add_argument("--image", type=int, default=256, help="pixels, of latents")
    arguments = parser.parse_args()
    print("| what is drawn | process | PSNR | autoencoder alone | seconds |\n|---|---|---|---|---|")
    names = arguments.processes.split(",")
    real = images(arguments.place, 32)
    for name in names if arguments.pixels else ():
        drawn, seconds = fit(name, to_pixels(real), 8, 256, 4, arguments.steps, 2e-3, 4)
        found = psnr(np.asarray(to_uint8(drawn)), real)
        print(f"| 32 x 32 pixels | {name} | {found:.1f} dB | | {seconds:.0f} |", flush=True)
    if arguments.autoencoder:
        of = {"tiny": {"name": "tiny", "channels": 64, "blocks": 3, "latent": 32, "groups": 4}}
        model = {**of["tiny"], "scaling": 1.0}
        config = ConfigDict({"ae": {"path": arguments.autoencoder, "model": model}})
        network = AutoencoderNetwork(config, "ae", parallel.make_mesh())
        real = images(arguments.place, arguments.image)
        moments = jax.jit(network.encode)(network.params, real)
        latents = np.asarray(network.scaling * moments["mean"])
        mean, std = latents.mean((0, 1, 2)), latents.std((0, 1, 2))
        decode = jax.jit(lambda x: to_uint8(network.decode(network.params, x)))
        alone = psnr(np.asarray(decode(latents)), real)
        for name in names:
            normal = jnp.asarray((latents - mean) / std)
            drawn, seconds = fit(name, normal, 2, 256, 4, arguments.steps, 2e-3, 1)
            found = psnr(np.asarray(decode(drawn * std + mean)), real)
            row = f"| {arguments.image} pixels by latents | {name} | {found:.1f} dB"
            print(f"{row} | {alone:.1f} dB | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
