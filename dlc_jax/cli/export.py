"""dlc export ACTION: networks for other programs."""

from dlc_jax.cli import (
    autoencoders,
    diffusers_folders,
    encoder_exports,
    export_stablehlo,
    export_torch,
    generators,
    official,
    priors,
)

EXAMPLES = (export_torch.EXPORT, encoder_exports.SEM, encoder_exports.DINOV2)
EXAMPLES += (autoencoders.EXPORT, generators.EXPORT, priors.EXPORT, official.EXPORT)
EXAMPLES += (diffusers_folders.EXPORT, export_stablehlo.EXPORT)
EXAMPLE = "\n  ".join(EXAMPLES)
VERBS = {
    "torch": export_torch.give,
    "sem": encoder_exports.sem,
    "dinov2": encoder_exports.dinov2,
    "dit": generators.give,
    "sedd": priors.give,
    "vae": autoencoders.give,
    "official": official.give,
    "diffusers": diffusers_folders.give,
    "stablehlo": export_stablehlo.give,
}


def arguments(parser) -> None:
    parser.epilog = f"examples:\n  {EXAMPLE}"
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    what = "a run as a folder that PyTorch loads alone: networks, samplers and a model card"
    example = export_torch.EXPORT
    made = _action(actions, "torch", what, example, "DIR", "a new folder", where="-w")
    export_torch.give_flags(made)
    what = "the encoder, by the published names; an imported one as it came, byte by byte"
    sem = _action(actions, "sem", what, encoder_exports.SEM, "FILE", "a .safetensors file")
    encoder_exports.give_flags(sem)
    what = "its vision transformer, as a folder that transformers loads"
    _action(actions, "dinov2", what, encoder_exports.DINOV2, "FOLDER", "a new folder")
    what = "its image generator; an imported one (W is its folder) as it came, byte by byte"
    dit = _action(actions, "dit", what, generators.EXPORT, "FILE", "a .safetensors file")
    generators.give_flags(dit)
    what = "its prior, by the names of SEDD; an imported one as it came, byte by byte"
    priors.give_flags(_action(actions, "sedd", what, priors.EXPORT, "FILE", "the file"))
    what = "an autoencoder as it came: by the names and in the types of the imported files"
    out = "a .safetensors file, or two of a tiny one: its encoder and its decoder"
    where = {"where": "dir", "of": "folder that dlc import vae made", "count": "+"}
    _action(actions, "vae", what, autoencoders.EXPORT, "FILE", out, **where)
    what = "encoder, prior and generator by the published names; imported ones as they came"
    official.give_flags(
        _action(actions, "official", what, official.EXPORT, "DIR", "a new folder", where="-w")
    )
    what = "a generator of classes, with its autoencoder, as a folder of diffusers' DiTPipeline"
    _action(actions, "diffusers", what, diffusers_folders.EXPORT, "DIR", "a new folder", where="-w")
    what = "encode, sample_codes and decode as functions for programs with jax and no dlc_jax"
    out, example = "a new folder", export_stablehlo.EXPORT
    made = _action(actions, "stablehlo", what, example, "DIR", out, where="-w")
    export_stablehlo.give_flags(made)


def _action(
    actions,
    name: str,
    what: str,
    example: str,
    metavar: str,
    out: str,
    *,
    where: str = "workdir",
    of: str = "folder of a run",
    count: str | None = None,
):
    """The parser of an action; `where` is a positional, or "-w" for the option of other verbs."""
    said = f"{what[0].upper()}{what[1:]}."
    settings = {"description": said, "epilog": f"example: {example}", "allow_abbrev": False}
    action = actions.add_parser(name, help=what, **settings)
    if where == "-w":
        action.add_argument("-w", "--workdir", metavar="W", required=True, help=of)
    else:
        action.add_argument(where, metavar="W" if where == "workdir" else "DIR", help=of)
    action.add_argument("--out", required=True, metavar=metavar, nargs=count, help=out)
    return action


def run(arguments, rest) -> None:
    from absl import logging

    logging.set_verbosity(logging.ERROR)
    VERBS[arguments.action](arguments)
