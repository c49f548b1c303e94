"""The published networks as tiny folders: encoder, prior, and a pipeline of diffusers.

Entries are random, and nothing is zero.
"""

import json

import foreign_dit
import foreign_sedd
import foreign_weights
import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax.interop import files, slots, vae_names
from dlc_jax.interop.weights import tensors
from dlc_jax.models.autoencoder import Autoencoder

L, V = foreign_sedd.L, foreign_sedd.V
VAE = {"channels": (8, 16), "residuals": 1, "groups": 4, "scaling": 0.5}
LATENT, IMAGE = 8, 16  # sides
BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
SCHEDULER = {"num_train_timesteps": 1000, "prediction_type": "epsilon", "clip_sample": False}


def vae():
    """The state of an AutoencoderKL of VAE's sizes."""
    model, image = Autoencoder(**VAE), jnp.zeros((1, IMAGE, IMAGE, 3))
    shapes = slots.shapes_of(jax.eval_shape(model.init, jax.random.key(0), image)["params"])
    random = np.random.default_rng(7)
    params = {
        path: (float(path.endswith("scale")) + 0.1 * random.normal(size=shape)).astype(np.float32)
        for path, shape in shapes.items()
    }
    return tensors(params, vae_names.table(shapes), "here")


def vae_settings():
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": list(VAE["channels"]),
        "layers_per_block": VAE["residuals"],
        "norm_num_groups": VAE["groups"],
        "scaling_factor": VAE["scaling"],
        "latent_channels": 4,
        "act_fn": "silu",
    }


def put(folder, name, state, settings=None, config="config.json"):
    """Writes a state and the settings beside it; the file."""
    folder.mkdir(parents=True, exist_ok=True)
    if settings is not None:
        (folder / config).write_text(json.dumps(settings))
    files.save(folder / name, state, {"format": "pt"})
    return folder / name


def encoder(folder, layout="official"):
    state = foreign_weights.official(readout="plain", positions=L, values=V)
    if layout == "transformers":
        sem = {name: tensor for name, tensor in state.items() if name.startswith("sem_")}
        rest = {name: tensor for name, tensor in state.items() if name not in sem}
        state = foreign_weights.transformers(rest) | sem
        put(folder, "model.safetensors", state, {"dlc_L": L, "num_attention_heads": 2})
    else:
        put(folder, "model.safetensors", state)
    return state


def generator(folder, *, classes=0, codes=(), scheduler=None):
    """A pipeline's folder; of classes alone by diffusers' names, of codes by the published ones."""
    name = "diffusion_pytorch_model.safetensors"
    settings = {"num_attention_heads": 4, "in_channels": 4}
    if classes and not codes:
        state = foreign_dit.diffusers(classes=classes, image=LATENT)
        settings["sample_size"] = LATENT
    else:
        state = foreign_dit.official(codes=codes or (L, V), classes=classes, image=LATENT)
        settings |= {"input_size": LATENT, "L": L, "V": V}
    put(folder / "transformer", name, state, settings)
    put(folder / "vae", name, vae(), vae_settings())
    (folder / "scheduler").mkdir()
    found = BETAS | SCHEDULER | (scheduler or {})
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(found))
    return state


def published(here, layout="official", classes=0):
    """Flags of dlc import official for all three parts, written under `here`."""
    encoder(here / "sem", layout)
    put(here / "sedd", "model.safetensors", foreign_sedd.state())
    generator(here / "dit", codes=(L, V), classes=classes)
    return ["--encoder", here / "sem", "--prior", here / "sedd", "--generator", here / "dit"]
