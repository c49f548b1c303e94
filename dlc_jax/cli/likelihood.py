"""dlc likelihood -w W IMAGE…|CODES.npz: how likely codes are to a run's prior, in bits."""

import zipfile
from pathlib import Path

import numpy as np

from dlc_jax import recipe
from dlc_jax import workdir as home
from dlc_jax.cli import networks
from dlc_jax.data import inputs
from dlc_jax.errors import UserError

EXAMPLE = "dlc likelihood -w runs/quickstart a.png b.png --draws 64 --surprise"
HELD_OUT = 256  # codes of the run's own, beside which others are shown


def arguments(parser) -> None:
    networks.add_workdir(parser)
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="images, or folders of them, or one .npz of codes as dlc encode writes it",
    )
    parser.add_argument(
        "--draws",
        type=networks.whole,
        default=16,
        metavar="N",
        help="noise levels at which a code is judged, two or more; 16",
    )
    parser.add_argument(
        "--surprise",
        action="store_true",
        help="also bits of each position's value given the values of the others",
    )
    parser.add_argument(
        "--seed", type=networks.seed, default=0, metavar="S", help="of the masks; 0"
    )


def run(arguments, rest) -> None:
    if arguments.draws < 2:
        raise UserError("dlc likelihood: --draws=1 leaves no error to tell; give 2 or more")
    packed = [path for path in arguments.paths if path.endswith(".npz")]
    if packed and len(arguments.paths) > 1:
        raise UserError(f"dlc likelihood: give {packed[0]} alone, or images")
    networks.check(arguments)
    if packed:
        names, codes = read_codes(Path(packed[0]))
        loaded = networks.load(arguments, max(len(codes), HELD_OUT))
    else:
        paths = [path for found in inputs.files(arguments.paths) for path in found]
        images = [inputs.read(path) for path in paths]
        names = [str(path) for path in paths]
        loaded = networks.load(arguments, max(len(paths), HELD_OUT))
        networks.say_resized(networks.resized(images, loaded.size), len(images), loaded.size)
        codes = loaded.encode(images)
    bits, error = loaded.likelihood(codes, draws=arguments.draws, seed=arguments.seed)
    for name, mean, deviation in zip(names, bits, error, strict=True):
        print(f"{name}: {mean:.1f} ± {deviation:.1f} bits")
    if held := held_out(loaded, arguments):
        print(f"held-out codes of the run, mean: {held[0]:.1f} ± {held[1]:.1f} bits")
    if arguments.surprise:
        calls = min(8, codes.shape[1])
        found = loaded.surprise(codes, calls=calls, seed=arguments.seed)
        for name, row in zip(names, found, strict=True):
            print(f"{name}, position by position: {' '.join(f'{each:.1f}' for each in row)}")


def read_codes(path: Path) -> tuple[list[str], np.ndarray]:
    """(names, codes [n, l]) of an .npz.

    Raises:
      UserError: it cannot be read, or has no `codes` [n, l].
    """
    try:
        with np.load(path) as saved:
            codes = saved["codes"]
            names = saved["names"].tolist() if "names" in saved else []
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or "it is no .npz with an array `codes`"
        raise UserError(f"dlc likelihood: cannot read {path}: {reason}") from error
    if codes.ndim != 2 or not len(codes):
        raise UserError(f"dlc likelihood: codes of {path} are [n, l], not {list(codes.shape)}")
    return names if len(names) == len(codes) else [str(n) for n in range(len(codes))], codes


def held_out(loaded, arguments) -> tuple[float, float] | None:
    """Mean bits of codes of the validation split, and its error; None where there are none.

    They are those of a prior_scores step of this prior, if it was run, or else computed here.
    """
    from dlc_jax.data import sources
    from dlc_jax.data.codes import CodeStore

    config, workdir = loaded.config, loaded.networks.workdir
    results = home.read(workdir / "results.json") or {}
    for step in recipe.of_stage(config, "prior_scores"):
        key = f"{step}/bits_per_code/validation"
        if config[step].prior == loaded.prior and key in results:
            return results[key], results[f"{key}_error"]
    place = recipe.place(config, workdir, config[loaded.prior].codes) / "validation"
    if not (place / "manifest.json").is_file():
        return None
    store = CodeStore(place)
    codes = store.codes(sources.choose(store, HELD_OUT)).astype(np.int32)
    bits, _ = loaded.likelihood(codes, draws=arguments.draws, seed=arguments.seed)
    return bits.mean(), bits.std() / np.sqrt(len(bits))
