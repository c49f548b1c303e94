"""dlc encode -w W IMAGE… [--out codes.npz]: the codes of images, printed or in a file."""

from pathlib import Path

import numpy as np

from dlc_jax.cli import networks
from dlc_jax.data import inputs
from dlc_jax.errors import UserError

EXAMPLE = "dlc encode -w runs/quickstart photographs/ --out codes.npz"
FEW = 8  # images whose codes are printed beside a file


def arguments(parser) -> None:
    networks.add_workdir(parser)
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="a file, or a folder of them; of a folder, broken ones are left out",
    )
    parser.add_argument(
        "--out",
        metavar="FILE.npz",
        help="codes, int32 [images, positions], and names; printed if not given",
    )


def run(arguments, rest) -> None:
    out = arguments.out and Path(arguments.out)
    if out and out.suffix != ".npz":
        raise UserError(f"dlc encode: --out={out} is not a .npz file")
    named, found = inputs.files(arguments.images)
    paths, optional = named + found, set(found)
    networks.check(arguments)
    if out:
        networks.prepare(out, out.parent)
    loaded = networks.load(arguments, len(paths))
    names, codes, broken, resized = [], [], [], 0
    for start, stop in networks.parts(len(paths), loaded.batch, "encode"):
        images, of = [], []
        for path in paths[start:stop]:
            try:
                images.append(inputs.read(path))
                of.append(str(path))
            except UserError as error:
                if path not in optional:
                    raise
                broken.append(str(error))
        if not images:
            continue
        resized += networks.resized(images, loaded.size)
        names += of
        codes += list(loaded.encode(images))
    networks.say_resized(resized, len(names), loaded.size)
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        print(f"left out {len(broken)} of {len(paths)}: {'; '.join(broken[:3])}{more}")
    if not names:
        raise UserError("dlc encode: none of the images can be read")
    if not out or len(names) <= FEW:
        for name, code in zip(names, codes, strict=True):
            print(f"{name}: {' '.join(map(str, code))}")
    if out:
        partial = out.with_name(f"{out.name}.partial")
        with networks.writing(out):
            with open(partial, "wb") as file:
                np.savez(file, codes=np.stack(codes), names=np.array(names))
            partial.replace(out)
        print(f"wrote {out}: codes of {len(names)} images, {len(codes[0])} positions each")
