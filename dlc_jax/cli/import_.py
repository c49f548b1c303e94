"""dlc import ACTION: weights of other programs.

Every tensor of a file is used, or named as unused.
"""

from dlc_jax.cli import autoencoders, encoders, generators, import_torch, official, priors
from dlc_jax.errors import UserError

EXAMPLES = (encoders.DINOV2, encoders.SEM)
EXAMPLES += (autoencoders.IMPORT, generators.IMPORT, priors.IMPORT, official.IMPORT)
EXAMPLES += (import_torch.IMPORT,)
EXAMPLE = "\n  ".join(EXAMPLES)
VERBS = {
    "dinov2": encoders.dinov2,
    "sem": encoders.sem,
    "dit": generators.take,
    "sedd": priors.take,
    "vae": autoencoders.take,
    "official": official.take,
    "torch": import_torch.take,
}
WITH_RECIPE = ("sem", "sedd", "official")  # the others take no --config


def arguments(parser) -> None:
    parser.epilog = f"examples:\n  {EXAMPLE}"
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name, what, example, out, files=None):
        said = f"{what[0].upper()}{what[1:]}."
        settings = {"description": said, "epilog": f"example: {example}", "allow_abbrev": False}
        made = actions.add_parser(name, help=what, **settings)
        file = ".safetensors, .pth, .pt or .bin; one from before PyTorch 1.6 needs PyTorch. Or the "
        file += "folder that has it, or the index of its shards"
        if files != 0:
            made.add_argument("file", metavar="FILE", nargs=files, help=file)
        made.add_argument("--out", required=True, metavar="DIR", help=out)
        return made

    what = "a DINOv2 vision transformer, by its own names or transformers', to start training from"
    action("dinov2", what, encoders.DINOV2, "a new folder")
    what = "an encoder with a simplicial head, as a run whose encoder is complete"
    encoders.take_flags(action("sem", what, encoders.SEM, "folder of the run"))
    what = "a DiT by the names of DLC, of the public DiT or of diffusers, to start training from"
    generators.take_flags(action("dit", what, generators.IMPORT, "a new folder"))
    what = (
        "SEDD over codes, published or as its training wrote it, as a run whose prior is complete"
    )
    priors.take_flags(action("sedd", what, priors.IMPORT, "folder of the run"))
    what = "an autoencoder: diffusers' AutoencoderKL, or the two files of a tiny one (TAEF2)"
    vae = f"{autoencoders.IMPORT}\n  {autoencoders.TINY}"
    action("vae", what, vae, "a new folder", files="+")
    what = "the published networks, or some of them, as one run to sample, compose and encode from"
    made = action("official", what, official.IMPORT, "folder of a new run", files=0)
    official.take_flags(made)
    what = "a folder that dlc export torch wrote, as a run to sample, compose and encode from"
    made = action("torch", what, import_torch.IMPORT, "folder of a new run", files=0)
    made.add_argument("folder", metavar="DIR", help="folder that dlc export torch wrote")


def run(arguments, rest) -> None:
    if rest and arguments.action not in WITH_RECIPE:
        verb = f"dlc import {arguments.action}"
        raise UserError(f"{verb}: unexpected argument {rest[0]!r}; see dlc import --help")
    from absl import logging

    logging.set_verbosity(logging.ERROR)
    VERBS[arguments.action](arguments, rest)
