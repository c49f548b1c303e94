"""dlc data info PATH, dlc data convert SRC DST: what is in a place of images, and the same images as ArrayRecord shards."""

import argparse
import os
import textwrap
from pathlib import Path

import numpy as np

from dlc_jax import stop
from dlc_jax.data.progress import Progress
from dlc_jax.errors import UserError

INFO = "dlc data info photographs/ --out contact.png"
CONVERT = "dlc data convert photographs.zip records/ --workers 8"
EXAMPLE = f"{INFO}\n  {CONVERT}"
PLACES = (
    "a folder of images or of archives, .tar, .zip, .tar.xz, .tar.gz, .tar.bz2, a pair of IDX files, Parquet, .npz,"
    " ArrayRecord shards that dlc data convert wrote, or tfds:NAME"
)
SHOWN = 100  # classes that are listed
BROKEN = 10  # broken images that are named


def arguments(parser) -> None:
    parser.epilog = f"examples:\n  {EXAMPLE}"
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name, what, example):
        made = actions.add_parser(
            name,
            help=what,
            description=f"{what[0].upper()}{what[1:]}. A place is {PLACES}.",
            epilog=f"example: {example}",
            allow_abbrev=False,
        )
        made.add_argument(
            "--field",
            default="image",
            metavar="NAME",
            help="image column of Parquet, feature of TFDS, array of .npz; image",
        )
        made.add_argument(
            "--workers", type=whole, metavar="N", help="threads; as many as there are cores"
        )
        return made

    info = action(
        "info", "counts, classes, sizes, formats, what is broken, and a contact sheet", INFO
    )
    info.add_argument("path", metavar="PATH", help="the place")
    info.add_argument(
        "--sample", type=whole, metavar="N", help="decode only N images, evenly spread; all"
    )
    info.add_argument(
        "--out", default="contact.png", metavar="FILE.png", help="the contact sheet; contact.png"
    )
    convert = action(
        "convert",
        "write images as ArrayRecord shards; the same command goes on after a kill",
        CONVERT,
    )
    convert.add_argument("source", metavar="SRC", help="the place")
    convert.add_argument(
        "destination",
        metavar="DST",
        help="a folder, new or empty, or with this conversion unfinished",
    )
    convert.add_argument(
        "--split",
        choices=("train", "validation", "test"),
        help="only the folder of this split; everything",
    )
    convert.add_argument(
        "--shard-size", type=whole, default=1024, metavar="N", help="images per shard; 1024"
    )
    convert.add_argument(
        "--verify",
        action="store_true",
        help="write nothing: compare DST with SRC, checksums and every byte",
    )


def run(arguments, rest) -> None:
    if arguments.action == "convert":
        stop.promise("what is complete is kept, the same command goes on")
    {"info": info, "convert": convert}[arguments.action](arguments)


def info(arguments) -> None:
    from dlc_jax.data.survey import survey

    out = Path(arguments.out)
    if out.suffix.lower() != ".png":
        raise UserError(f"dlc data info: --out={out} is no .png file")
    if not os.access(out.parent, os.W_OK):  # known before the long work
        raise UserError(
            f"cannot write {out}: {out.parent} {'is not writable' if out.parent.exists() else 'does not exist'}"
        )
    with Progress("looking", "reads") as progress:
        found, sheet = survey(
            arguments.path,
            field=arguments.field,
            sample=arguments.sample,
            workers=arguments.workers,
            progress=progress,
        )
    size = "" if found.bytes is None else f", {in_bytes(found.bytes)}"
    print(f"{plain(arguments.path)}: {found.kind}, {found.count} images{size}")
    if found.splits:
        print("  splits: " + counts(found.splits))
    if len(found.classes) > 1:
        fewest, most = min(found.classes.values()), max(found.classes.values())
        each = f"{most} images each" if fewest == most else f"{fewest} to {most} images each"
        print(f"  {len(found.classes)} classes of {each}")
        more = f", and {len(found.classes) - SHOWN} more" if len(found.classes) > SHOWN else ""
        first = dict(list(found.classes.items())[:SHOWN])
        print(
            textwrap.fill(
                counts(first) + more, 100, initial_indent="    ", subsequent_indent="    "
            )
        )
    if found.looked < found.count:
        print(f"  the rest is of {found.looked} images, evenly spread:")
    if len(found.widths):
        print(f"  formats: {counts(found.formats)}; modes: {counts(found.modes)}")
        aspect = found.widths / found.heights
        for what, values, form in (
            ("width", found.widths, ".0f"),
            ("height", found.heights, ".0f"),
            ("width / height", aspect, ".3g"),
        ):
            low, middle, high = (
                format(value, form) for value in (values.min(), np.median(values), values.max())
            )
            print(f"  {what}: {low} smallest, {middle} median, {high} largest")
    if found.skipped:
        print(f"  left out: {counts(found.skipped)}")
    print(
        f"  broken: {len(found.broken) or 'none'}"
        + (f", the first {BROKEN}:" if len(found.broken) > BROKEN else "")
    )
    for name, reason in found.broken[:BROKEN]:
        print(f"    {plain(name)}: {plain(reason)}")
    if found.damage:
        print(f"  {found.damage}")
    try:
        partial = out.with_name(f"{out.name}.partial")
        sheet.save(partial, "PNG")
        partial.replace(out)
    except OSError as error:
        raise UserError(
            f"cannot write {out}: {error.strerror or error}; make room or give another --out"
        ) from error
    print(f"wrote {out}, a contact sheet")


def convert(arguments) -> None:
    from dlc_jax.data import convert as library

    source, destination = arguments.source, arguments.destination
    shared = {"split": arguments.split, "field": arguments.field, "workers": arguments.workers}
    if arguments.verify:
        with Progress("comparing", "reads") as progress:
            count = library.verify(source, destination, progress=progress, **shared)
        print(
            f"{plain(destination)} is as it was written, and has the {count} images of {plain(source)}; nothing was written"
        )
        return
    with Progress("converting", "images") as progress:
        done = library.convert(
            source, destination, shard_size=arguments.shard_size, progress=progress, **shared
        )
    if done["skipped"]:
        print(f"left out: {counts(done['skipped'])}")
    if done["unreadable"]:
        print(
            f"{done['unreadable']} images are damaged in {plain(source)} and have no bytes now; dlc data info names them"
        )
    if done["resumed"]:
        print(f"{done['resumed']} of {done['shards']} shards were complete")
    of = f" of {done['classes']} classes" if done["classes"] > 1 else ""
    shards = f"{done['shards']} shard{'s' if done['shards'] > 1 else ''}"
    print(
        f"wrote {plain(destination)}: {done['images']} images{of} in {shards}, {in_bytes(done['bytes'])}, read back"
    )


def counts(found: dict[str, int]) -> str:
    return ", ".join(f"{plain(name)} {count}" for name, count in found.items())


def plain(text: str) -> str:
    """Names come from other people's files: what would act on a terminal, or cannot be printed, is spelled out."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(text))


def in_bytes(size: int) -> str:
    return (
        f"{size / 1e9:.1f} GB"
        if size >= 1e9
        else f"{size / 1e6:.1f} MB"
        if size >= 1e5
        else f"{size / 1e3:.1f} kB"
    )


def whole(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)
