"""Folders of diffusers: what their settings say of ours, and ours written as theirs."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from dlc_jax.cli import weights
from dlc_jax.errors import UserError

SCHEDULER = "scheduler_config.json"
# {setting of a scheduler: what it must be}; absent it is that
PLAIN = {
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "trained_betas": None,
    "clip_sample": False,
    "thresholding": False,
    "rescale_betas_zero_snr": False,
}
DDPM = {"steps": 1000, "beta_first": 1e-4, "beta_last": 0.02, "learned_variance": True}  # DiT's
# {setting of a transformer: what it must be}
GELU = {"activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero", "attention_bias": True}
# {setting of an autoencoder: what it must be}
SMOOTH = {"act_fn": "silu", "shift_factor": None, "latents_mean": None, "latents_std": None}


class Folder(NamedTuple):
    """A folder of a pipeline: its transformer's, its scheduler's settings, its autoencoder's."""

    transformer: Path
    scheduler: Path
    vae: Path | None


def pipeline(path: str | Path) -> Folder | None:
    """The parts of a pipeline's folder, or None of another path."""
    path = Path(path)
    if not (path / "transformer").is_dir():
        return None
    vae = path / "vae"
    return Folder(
        path / "transformer", path / "scheduler" / SCHEDULER, vae if vae.is_dir() else None
    )


def process(path: Path) -> dict:
    """{field: value} of the process of a scheduler's settings, {} if there are none.

    Raises:
      UserError: it is not DDPM's with noise as prediction and variances that rise linearly.
    """
    found = weights.settings(path)
    _check(found, PLAIN, path, "DDPM here has")
    fields = {"steps": "num_train_timesteps", "beta_first": "beta_start", "beta_last": "beta_end"}
    return {f"process.{ours}": found[key] for ours, key in fields.items() if key in found}


def transformer(path: Path) -> dict:
    """The settings of a transformer, {} if there are none.

    Raises:
      UserError: its layers are not DiT's.
    """
    found = weights.settings(path)
    _check(found, GELU, path, "DiT has")
    return found


def autoencoder(path: Path, model: Mapping) -> dict:
    """Fields of an autoencoder's `model` that its settings tell beside those of shapes.

    Args:
      path: of the config.json; {} if it is not there.
      model: what the shapes told.

    Raises:
      UserError: they contradict the shapes, or are of another kind of autoencoder.
    """
    found = weights.settings(path)
    _check(found, SMOOTH, path, "the autoencoder here has")
    shapes = {"block_out_channels": list(model["channels"]), "latent_channels": model["latent"]}
    shapes |= {"layers_per_block": model["residuals"]}
    _check(found, {key: shapes[key] for key in shapes if key in found}, path, "its tensors have")
    names = {"scaling": "scaling_factor", "groups": "norm_num_groups"}
    return {ours: found[key] for ours, key in names.items() if key in found}


def transformer_config(network) -> dict:
    """The config.json of a DiT as DiTTransformer2DModel."""
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": network.heads,
        "attention_head_dim": network.width // network.heads,
        "in_channels": network.channels,
        "out_channels": network.out_channels or network.channels,
        "num_layers": network.depth,
        "sample_size": network.image,
        "patch_size": network.patch,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": network.classes,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
    }


def scheduler_config(process: ConfigDict) -> dict:
    """The settings of a process as DDPMScheduler."""
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": process.steps,
        "beta_start": process.beta_first,
        "beta_end": process.beta_last,
        "beta_schedule": "linear",
        "prediction_type": "epsilon",
        "variance_type": "learned_range" if process.learned_variance else "fixed_small",
        "clip_sample": False,
    }


def _check(found: Mapping, wanted: Mapping, path: Path, whose: str) -> None:
    for key, value in wanted.items():
        if (other := found.get(key, value)) != value:
            raise UserError(f"{path}: {key}={other!r}, and {whose} {value!r}; it cannot be loaded")
