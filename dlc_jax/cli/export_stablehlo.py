"""dlc export stablehlo: encode, sample_codes and decode as functions that need jax and no dlc_jax.

W/DIR/decode.stablehlo       the function, as jax.export serializes it, without weights
W/DIR/decode.safetensors     its weights, the first argument: {path: array}
W/DIR/functions.json         what the others of its arguments are
W/DIR/example.py, README.txt
"""

import argparse
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dlc_jax import recipe
from dlc_jax import workdir as home
from dlc_jax.cli import weights
from dlc_jax.errors import UserError
from dlc_jax.interop import files, slots

if TYPE_CHECKING:
    from jax.export import Exported

EXPORT = "dlc export stablehlo -w runs/imagenet256 --out functions/ --platforms cpu,cuda,tpu"
PLATFORMS = ("cpu", "cuda", "tpu")
SYMBOLIC = "symbolic"
PACKAGE = "flatbuffers"  # with which jax.export writes and reads

EXAMPLE = '''\
"""One image's codes, two new images, and the first again: python example.py (jax, safetensors)."""

import jax, jax.numpy as jnp
from safetensors.flax import load_file

def load(name):
    with open(f"{{name}}.stablehlo", "rb") as file:
        function = jax.export.deserialize(bytearray(file.read()))
    weights = load_file(f"{{name}}.safetensors")
    return lambda *arguments: function.call(weights, *arguments)

BATCH, SEED = {batch}, 0
numbers = jnp.arange(BATCH, dtype=jnp.int32)  # another number is another draw
{body}'''
BODY = {
    "encode": """\
codes = load("encode")(jnp.zeros((BATCH, {size}, {size}, 3), jnp.uint8))
print("codes of a black image:", codes[0])
""",
    "sample_codes": """\
codes = load("sample_codes")(jnp.int32(SEED), numbers{labels})
print("new codes:", codes.shape)
""",
    "decode": """\
images = load("decode")(jnp.int32(SEED + 1), numbers{codes}{labels})
print("images:", images.shape, images.dtype)
""",
}
README = """\
Functions of a trained Discrete Latent Code, written by `dlc export stablehlo`. They run wherever
jax does, on {platforms}, without dlc_jax. Reading them needs the packages jax, safetensors and
flatbuffers.

A function NAME is two files. NAME.stablehlo is the program, as `jax.export` serializes it.
NAME.safetensors has the weights, which are its first argument, a flat dict: the program stays
small, and serves any weights of the same shapes. example.py calls all of them.

{functions}
Batch: {batch}.
A draw depends on the seed and on its number alone, not on the batch: numbers 0..n are those that
`dlc sample` draws with the same seed. It draws codes with SEED and images with SEED + 1.
Samplers, guidance and dtypes are those of the run's recipe and are part of the program.
Attention is that of XLA on every platform: kernels written for one platform cannot be exported for
all of them, and need a device to be chosen.
jax reads such programs for at least six months after the version that wrote them ({version}).
"""


def give_flags(parser) -> None:
    """Flags of dlc export stablehlo beside the run."""
    parser.add_argument(
        "--platforms",
        type=_platforms,
        default=PLATFORMS,
        metavar="A,B",
        help=f"on which the functions run; {','.join(PLATFORMS)}. None needs to be here",
    )
    parser.add_argument(
        "--batch",
        type=_batch,
        default=SYMBOLIC,
        metavar="N",
        help=f"examples of a call, or {SYMBOLIC} for any number of them; {SYMBOLIC}",
    )


def give(arguments) -> None:
    """dlc export stablehlo."""
    out, workdir = weights.absent(arguments.out), Path(arguments.workdir)
    if importlib.util.find_spec(PACKAGE) is None:
        raise UserError(
            f"dlc export stablehlo: jax.export writes with {PACKAGE}; pip install '.[stablehlo]'"
        )
    functions, size = _functions(recipe.of_run(workdir), workdir)
    told, platforms = {}, list(arguments.platforms)
    with weights.whole(out) as partial:
        for name, function in functions.items():
            told[name] = _write(partial, name, function, platforms, arguments.batch)
        (partial / "functions.json").write_text(f"{json.dumps(told, indent=2)}\n")
        _explain(partial, told, platforms, arguments.batch, size)
    print(f"wrote {out}: {', '.join(told)} for {', '.join(platforms)}, batch {arguments.batch}")
    for name, facts in told.items():
        program, kept = (
            (out / f"{name}.{end}").stat().st_size / 1e6 for end in ("stablehlo", "safetensors")
        )
        shown = ", ".join(facts["arguments"])
        print(f"{name}({shown}): {program:.1f} MB, weights {kept:.1f} MB")


def _functions(config, workdir: Path) -> tuple[dict, int]:
    """({name: Function} of the complete steps of a run, side of the encoder's images or 0).

    Raises:
      UserError: no step is complete, or its function cannot be exported.
    """
    from dlc_jax import pipeline
    from dlc_jax.networks import exported

    loaded = pipeline.load(workdir, batch=1, config=_plain(config))
    makers = {
        "encode": (loaded.encoder, exported.encode, ()),
        "sample_codes": (loaded.prior, exported.sample_codes, (loaded.code_sampler,)),
        "decode": (loaded.generator, exported.decode, (loaded.sampler,)),
    }
    found = {}
    for name, (step, make, how) in makers.items():
        if step in config and home.done(recipe.trained(config, workdir, step)) is not None:
            found[name] = make(loaded.networks[step], *how)
    if not found:
        raise UserError(
            f"{workdir} has no encoder, prior or generator that is complete; finish one by dlc "
            f"train --config={workdir}/config.json"
        )
    return found, loaded.size if "encode" in found else 0


def _plain(config):
    """The recipe with XLA's attention, which can be lowered for a platform that is not here."""
    flat = recipe.flat(config.to_dict())
    names = [name for name in flat if name.endswith(".implementation") and ".model." in name]
    return recipe.changed(config, dict.fromkeys(names, "xla"))


def program(function, platforms: Sequence[str], batch: int | str) -> tuple["Exported", list[str]]:
    """(the program of a `networks.exported.Function`, names of the parameters that it takes).

    Parameters that it does not use, such as heads of training, are left out.

    Args:
      batch: examples of a call, or SYMBOLIC.
    """
    import jax
    import jax.numpy as jnp

    params = slots.flat(function.params)
    scalars = [shape is None for shape, _ in function.arguments.values()]

    def export(names, call, size, platforms):
        def whole(params_, *arrays):
            unused = params.keys() - params_.keys()
            nothing = {key: jnp.zeros_like(params[key]) for key in unused}
            return call(slots.nested(params_ | nothing), *arrays)

        given = {key: jax.ShapeDtypeStruct(params[key].shape, params[key].dtype) for key in names}
        shapes = [
            jax.ShapeDtypeStruct(() if shape is None else (size, *shape), dtype)
            for shape, dtype in function.arguments.values()
        ]
        return jax.export.export(jax.jit(whole), platforms=platforms)(given, *shapes)

    names = sorted(params)
    used = export(names, function.call, 1, platforms[:1]).module_kept_var_idx
    names = [key for index, key in enumerate(names) if index in used]
    if batch != SYMBOLIC:
        return export(names, function.call, batch, platforms), names
    (size,) = jax.export.symbolic_shape("b")
    return export(names, _mapped(function.call, scalars), size, platforms), names


def _write(out: Path, name: str, function, platforms: list[str], batch: int | str) -> dict:
    """Writes a function and its weights, reads it back, and tells of its arguments and result."""
    import jax

    exported, names = program(function, platforms, batch)
    data = exported.serialize()
    again = jax.export.deserialize(data)
    if str((again.in_avals, again.out_avals)) != str((exported.in_avals, exported.out_avals)):
        raise UserError(f"{name} is not read back as it was written; install another {PACKAGE}")
    params = slots.flat(function.params)
    files.save(out / f"{name}.safetensors", {key: np.asarray(params[key]) for key in names})
    (out / f"{name}.stablehlo").write_bytes(data)

    def described(leaf):
        return {"shape": [str(side) for side in leaf.shape], "dtype": leaf.dtype.name}

    leaves = exported.in_avals[len(names) :]
    arguments = {key: described(leaf) for key, leaf in zip(function.arguments, leaves, strict=True)}
    facts = {"arguments": {"weights": f"{name}.safetensors"} | arguments}
    return facts | {"result": described(exported.out_avals[0])}


def _mapped(call, scalars: list[bool]):
    """A function of batches of one as a function of any batch, whose size stays unknown."""
    import jax

    def of_one(params, *arrays):
        rows = (row if alone else row[None] for row, alone in zip(arrays, scalars, strict=True))
        return call(params, *rows)[0]

    return jax.vmap(of_one, in_axes=(None, *(None if alone else 0 for alone in scalars)))


def _explain(out: Path, told: dict, platforms: list[str], batch, size: int) -> None:
    """Writes README.txt and example.py."""
    import jax

    def shown(leaf):
        return leaf if isinstance(leaf, str) else f"{leaf['dtype']} [{', '.join(leaf['shape'])}]"

    lines = []
    for name, facts in told.items():
        lines.append(f"{name} -> {shown(facts['result'])}")
        lines += [f"    {key}: {shown(leaf)}" for key, leaf in facts["arguments"].items()]
    any_size = (
        "b is any number" if batch == SYMBOLIC else f"{batch}; fewer are padded by the caller"
    )
    words = {"functions": "\n".join([*lines, ""]), "batch": any_size, "version": jax.__version__}
    (out / "README.txt").write_text(README.format(platforms=", ".join(platforms), **words))
    body = ""
    for name, facts in told.items():
        reads = facts["arguments"]
        codes = ", codes" if "codes" in reads else ""
        if codes and not body:  # of a run without encoder and prior
            body = f"codes = jnp.zeros((BATCH, {reads['codes']['shape'][1]}), jnp.int32)\n"
        labels = ", jnp.zeros(BATCH, jnp.int32)" if "labels" in reads else ""
        body += BODY[name].format(size=size, codes=codes, labels=labels)
    number = 2 if batch == SYMBOLIC else batch
    (out / "example.py").write_text(EXAMPLE.format(batch=number, body=body))


def _platforms(text: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(text.split(",")))
    if not set(found) <= set(PLATFORMS):
        raise argparse.ArgumentTypeError(f"{text!r}: platforms are {', '.join(PLATFORMS)}")
    return found


def _batch(text: str) -> int | str:
    if text == SYMBOLIC:
        return text
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor {SYMBOLIC}")
    return int(text)
