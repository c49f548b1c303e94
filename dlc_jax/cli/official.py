"""dlc import official, dlc export official: the published networks as one run, and back."""

from collections.abc import Collection, Mapping
from pathlib import Path

from ml_collections import ConfigDict

from dlc_jax import command, recipe
from dlc_jax import workdir as home
from dlc_jax.cli import (
    autoencoders,
    diffusers_folders,
    diffusers_settings,
    encoder_exports,
    encoders,
    generators,
    priors,
    weights,
)
from dlc_jax.errors import UserError
from dlc_jax.interop import files

FILES = "--encoder SEM_dinov2_L512 --prior DLC_SEDD_L512 --generator DLC_DiT_L512"
IMPORT = f"dlc import official {FILES} --out runs/published"
EXPORT = "dlc export official -w runs/published --out published/"
PARTS = ("encoder", "prior", "generator")  # steps of a run, as a recipe names them


def take_flags(parser) -> None:
    """Flags of dlc import official."""
    what = {
        "encoder": "with a simplicial head, by the names of its training or of transformers",
        "prior": "SEDD over codes, published or as its training wrote it",
        "generator": "a DiT; or a folder of diffusers with transformer/, vae/ and scheduler/",
        "vae": "diffusers' AutoencoderKL, or what dlc import vae made; --generator's own",
    }
    for name, said in what.items():
        parser.add_argument(f"--{name}", metavar="PATH", help=f"file or folder: {said}")
    encoders.take_flags(parser)


def give_flags(parser) -> None:
    """Flags of dlc export official beside the run."""
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        help="of the run to export; those that it has",
    )
    encoder_exports.give_flags(parser)


def take(arguments, rest) -> None:
    """dlc import official."""
    out = weights.absent(arguments.out)
    given = {name: getattr(arguments, name) for name in (*PARTS, "vae")}
    if not any(given.values()):
        raise UserError("dlc import official: give --encoder, --prior, --generator or --vae")
    config, _ = command.parse([*command.given(arguments), *rest])
    opened = _opened(given, arguments.positions, arguments.values)
    config = _fitted(config, opened, given, out)
    said = []
    with weights.whole(out) as partial:
        with weights.run(partial, config):
            for name, (found, found_as) in opened.items():
                said.append(_put(name, found, found_as, config, partial))
    print("\n".join([f"wrote {out}", *said]))
    if "generator" in opened and not config[_autoencoder(config)].path:
        print("images need an autoencoder: import again with --vae")
    print("\n".join(uses(config, opened, out)))


def uses(config: ConfigDict, parts: Collection[str], out: Path) -> list[str]:
    """Lines that say which verbs a run of these parts can do."""
    needs = {"encode": {"encoder"}, "sample": {"generator"}}
    if "generator" in parts and config.generator.model.positions:
        needs |= {"sample": {"prior", "generator"}, "compose": {"encoder", "generator"}}
    able = [f"dlc {verb} -w {out}" for verb, asked in needs.items() if asked <= set(parts)]
    return ["to use it:", *able] if able else ["nothing runs from it alone yet"]


def _opened(given: Mapping, positions: int | None, values: int | None) -> dict:
    """{part: (tensors, what they say of the recipe)}, the encoder last to know L and V.

    Raises:
      UserError: some file is not of its part, or codes of two parts have different sizes.
    """
    found, sizes = {}, {}
    if given["generator"]:
        found["generator"] = generators.read(given["generator"])
        lines = found["generator"][1]
        if lines["model.positions"]:
            sizes["generator"] = lines["model.positions"], lines["model.values"]
        folder = diffusers_settings.pipeline(given["generator"])
        given = {**given, "vae": given["vae"] or (folder and folder.vae)}
    if given["prior"]:
        found["prior"] = priors.read(given["prior"])
        lines = found["prior"][1]
        sizes["prior"] = lines["model.positions"], lines["model.values"]
    if given["encoder"]:
        known = {"positions": positions, "values": values}
        other = next(iter(sizes.values()), (None, None))[0]
        found["encoder"] = encoders.read(given["encoder"], **known, otherwise=other)
        code = found["encoder"][1]["simplicial"]
        sizes["encoder"] = code["positions"], code["values"]
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{name} {length} x {top}" for name, (length, top) in sizes.items())
        raise UserError(
            f"dlc import official: these are not of one model, their codes differ ({said}); give "
            "parts of the same codes"
        )
    if given["vae"] and weights.record(Path(given["vae"])) is None:
        found["vae"] = autoencoders.read([given["vae"]])
    return found


def _fitted(config: ConfigDict, opened: Mapping, given: Mapping, out: Path) -> ConfigDict:
    """The recipe with all that the parts say."""
    if "encoder" in opened:
        config = encoders.fitted(config, opened["encoder"][1])
    if "prior" in opened:
        config = priors.fitted(config, opened["prior"][1])
    place, model = "", None
    if "vae" in opened:
        place, model = out / "autoencoder", opened["vae"][1]
    elif given["vae"]:  # made by dlc import vae
        place, model = Path(given["vae"]), autoencoders.record(given["vae"])["model"]
    if "generator" in opened:
        config = generators.fitted(config, opened["generator"][1])
    section = _autoencoder(config) if model or "generator" in opened else ""
    if model is None:
        return config
    changes = {f"{section}.path": str(Path(place).absolute())}
    changes |= {f"{section}.model.{key}": value for key, value in model.items()}
    config = recipe.changed(config, changes)
    if "generator" in opened:
        stride = recipe.latents.stride(config[section].model)
        config = recipe.changed(config, {"data.image": stride * config.generator.model.image})
    return config


def _autoencoder(config: ConfigDict) -> str:
    """The section of the recipe's autoencoder."""
    name = config[config.generator.codes].autoencoder if "generator" in config else ""
    if not name or name not in config:
        raise UserError(
            "dlc import official: the recipe has no generator of latents and no autoencoder; give "
            "another --config, such as configs/imagenet256.py"
        )
    return name


def _put(name: str, found, found_as, config: ConfigDict, out: Path) -> str:
    """Writes a part into the run; how many tensors of it there were."""
    aside: Mapping = {}
    if name == "encoder":
        arrays, aside, fresh = encoders.params(found, config)
        encoders.put(found, config, out / name, arrays, aside)
        return f"{name}: {found.where}: {weights.told(found, aside)}" + (
            f"\n{encoders.UNTRAINED}" if fresh else ""
        )
    if name == "prior":
        arrays, aside = priors.params(found, config)
        priors.put(found, config, out / name, arrays, aside)
    elif name == "generator":
        arrays, aside, facts = generators.params(found, found_as)
        weights.step(out / name, arrays, config[name], facts=facts, aside=aside)
    else:
        arrays = autoencoders.params(found, found_as)
        autoencoders.put(found, found_as, out / "autoencoder", arrays)
        home.mark_done(out / "autoencoder", {})
    return f"{name}: {found.where}: {weights.told(found, aside)}"


def give(arguments) -> None:
    """dlc export official."""
    out, workdir = weights.absent(arguments.out), Path(arguments.workdir)
    config = recipe.of_run(workdir)
    there = [
        name for name in PARTS if name in config and recipe.trained(config, workdir, name).is_dir()
    ]
    parts = arguments.parts or there
    if not parts:
        raise UserError(f"{workdir} has no encoder, prior or generator yet")
    for name in parts:
        weights.check_complete(config, workdir, name)
    if "generator" in parts:
        diffusers_folders.check(config, "generator", is_plain=True)
    said = []
    with weights.whole(out) as partial:
        for name in parts:
            said += GIVE[name](config, workdir, partial, arguments)
    print("\n".join([f"wrote {out}", *said]))


def _give_encoder(config, workdir: Path, out: Path, arguments) -> list[str]:
    found, metadata, settings = encoder_exports.simplicial(workdir, arguments.layout)
    file = weights.made(out / "encoder") / "model.safetensors"
    files.save(file, found, metadata)
    diffusers_folders.write(file.with_name("config.json"), settings)
    return [f"encoder/{file.name}: {len(found)} tensors, {encoder_exports.readable(found)}"]


def _give_prior(config, workdir: Path, out: Path, arguments) -> list[str]:
    layout = (weights.record(recipe.trained(config, workdir, "prior")) or {}).get("layout", "hf")
    name = {"hf": "model.safetensors", "local": "checkpoint.pth"}[layout]
    count, _ = priors.write(workdir, weights.made(out / "prior") / name, layout)
    return [f"prior/{name}: {count} tensors"]


def _give_generator(config, workdir: Path, out: Path, arguments) -> list[str]:
    found, metadata, network, name = generators.written(workdir)
    folder = weights.made(out / "generator" / "transformer")
    files.save(folder / f"{files.NAMES[1]}.safetensors", found, metadata)
    settings = {"input_size": network.image, "in_channels": network.channels}
    settings |= {"L": network.positions, "V": network.values, "patch_size": network.patch}
    settings |= {"num_attention_heads": network.heads}
    if name == "diffusers":
        settings = diffusers_settings.transformer_config(network)
    diffusers_folders.write(folder / "config.json", settings)
    said = [f"generator/transformer: {len(found)} tensors, {name} names"]
    return said + diffusers_folders.write_rest(config, "generator", out / "generator")


GIVE = {"encoder": _give_encoder, "prior": _give_prior, "generator": _give_generator}
