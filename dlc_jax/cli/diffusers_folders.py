"""dlc export diffusers: a generator of classes as a folder that diffusers' DiTPipeline loads."""

import json
from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from dlc_jax import recipe
from dlc_jax.cli import autoencoders, generators, weights
from dlc_jax.cli import diffusers_settings as settings
from dlc_jax.errors import UserError
from dlc_jax.interop import files, hub_config

EXPORT = "dlc export diffusers -w runs/classes --out dit/"
STEP = generators.STEP
FREQUENCIES = (
    "diffusers' class spaces the frequencies of time by 1e4^(1/127), and DiT's weights are trained "
    "with 1e4^(1/128): after loading, set block.norm1.emb.time_proj.downscale_freq_shift = 0 of "
    "every block of transformer.transformer_blocks"
)


def give(arguments) -> None:
    """dlc export diffusers."""
    out, workdir = weights.absent(arguments.out), Path(arguments.workdir)
    config = recipe.of_run(workdir)
    weights.check_complete(config, workdir, STEP)
    check(config, STEP)
    model = config[STEP].model
    if model.positions:
        raise UserError(
            f"{workdir}: {STEP} reads codes ({STEP}.model.positions={model.positions}), which "
            "DiTTransformer2DModel does not; dlc export torch or official has them"
        )
    if not model.classes:
        raise UserError(
            f"{workdir}: {STEP}.model.classes=0, and DiTTransformer2DModel always reads a class"
        )
    if not config[recipe.autoencoder(config, STEP)].path:
        raise UserError(f"{workdir}: its autoencoder has no weights to export")
    found, metadata, network, _ = generators.written(workdir, "diffusers")
    with weights.whole(out) as partial:
        folder = weights.made(partial / "transformer")
        files.save(folder / f"{files.NAMES[1]}.safetensors", found, metadata)
        write(folder / "config.json", settings.transformer_config(network))
        said = write_rest(config, STEP, partial)
        parts = {"scheduler": "DDPMScheduler", "transformer": "DiTTransformer2DModel"}
        parts |= {"vae": "AutoencoderKL"}
        index = {"_class_name": "DiTPipeline", "id2label": {}}
        write(
            partial / "model_index.json",
            index | {key: ["diffusers", name] for key, name in parts.items()},
        )
    print("\n".join([f"wrote {out}: DiTPipeline", f"transformer: {len(found)} tensors", *said]))
    print(FREQUENCIES)


def check(config: ConfigDict, step: str, *, is_plain: bool = False) -> None:
    """Refuses a generator that a pipeline of others cannot draw with.

    Args:
      is_plain: its steps and variances must be those of DiT.

    Raises:
      UserError: what it has, and what was expected.
    """
    section, process = config[step], config[step].process
    wanted = {"process.name": "ddpm", "latents": True, "normalize": False}
    found = {"process.name": process.name, "latents": section.latents}
    found |= {"normalize": section.normalize}
    if is_plain and process.name == "ddpm":
        wanted |= {f"process.{key}": value for key, value in settings.DDPM.items()}
        found |= {f"process.{key}": process[key] for key in settings.DDPM}
    for key, value in wanted.items():
        if found[key] != value:
            raise UserError(
                f"{step}.{key}={found[key]!r}: pipelines of this format draw with {key}={value!r}; "
                "such a generator cannot be exported"
            )
    if config[recipe.autoencoder(config, step)].model.name != "kl":
        raise UserError(f"{step} draws latents of a tiny autoencoder, which this format has not")


def write_rest(config: ConfigDict, step: str, out: Path) -> list[str]:
    """Writes vae/ and scheduler/ of a pipeline's folder; what it wrote, in words.

    Raises:
      UserError: the autoencoder has no weights, or they were not imported here.
    """
    section = config[recipe.autoencoder(config, step)]
    said = []
    if section.path:
        found, metadata, model = autoencoders.written(section.path)
        folder = weights.made(out / "vae")
        files.save(folder / f"{files.NAMES[1]}.safetensors", found, metadata)
        write(folder / "config.json", hub_config.kl(model, config.data.image))
        said.append(f"vae: {len(found)} tensors")
    write(
        weights.made(out / "scheduler") / settings.SCHEDULER,
        settings.scheduler_config(config[step].process),
    )
    return said


def write(path: Path, found: Mapping) -> None:
    """Writes settings as JSON."""
    path.write_text(f"{json.dumps(found, indent=2)}\n")
