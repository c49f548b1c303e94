"""dlc data info PATH, dlc data convert SRC DST: look at a place of images, or convert it.

A place is whatever `data.images` reads; it is converted to ArrayRecord shards.
"""

import argparse
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dlc_jax import stop
from dlc_jax.data.progress import Progress
from dlc_jax.errors import UserError

INFO = "dlc data info photographs/ --out contact.png"
CONVERT = "dlc data convert photographs.zip records/ --workers 8"
EXAMPLE = f"{INFO}\n  {CONVERT}"
PLACES = (
    "a folder of images or of archives, .tar, .zip, .tar.xz, .tar.gz, .tar.bz2, "
    "a pair of IDX files, Parquet, .npz, ArrayRecord shards that dlc data convert wrote, "
    "or tfds:NAME"
)
SHOWN = 100  # classes that are listed
BROKEN = 10  # broken images that are named


def arguments(parser) -> None:
    parser.epilog = f"examples:\n  {EXAMPLE}"
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name, what, example):
        action = actions.add_parser(
            name,
            help=what,
            description=f"{what[0].upper()}{what[1:]}. A place is {PLACES}.",
            epilog=f"example: {example}",
            allow_abbrev=False,
        )
        column = "column of Parquet, feature of TFDS or array of .npz with the images; image"
        action.add_argument("--field", default="image", metavar="NAME", help=column)
        action.add_argument("--workers", type=whole, metavar="N", help="threads; one for each core")
        return action.add_argument

    add = action("info", "counts, classes, sizes, formats, broken images, a contact sheet", INFO)
    add("path", metavar="PATH", help="the place")
    add("--sample", type=whole, metavar="N", help="decode only N images, evenly spread; all")
    add("--out", default="contact.png", metavar="FILE.png", help="the contact sheet; contact.png")
    what = "write images as ArrayRecord shards; if it is stopped, the same command continues"
    add = action("convert", what, CONVERT)
    add("source", metavar="SRC", help="the place")
    add("destination", metavar="DST", help="a folder: new, empty, or of this conversion unfinished")
    splits = ("train", "validation", "test")
    add("--split", choices=splits, help="only the folder of this split; everything")
    add("--shard-size", type=whole, default=1024, metavar="N", help="images per shard; 1024")
    add("--verify", action="store_true", help="write nothing: compare every byte of DST with SRC")


def run(arguments, rest) -> None:
    if arguments.action == "convert":
        stop.promise("what is complete is kept, the same command goes on")
    {"info": info, "convert": convert}[arguments.action](arguments)


def info(arguments) -> None:
    from dlc_jax.data.survey import survey

    out = Path(arguments.out)
    if out.suffix.lower() != ".png":
        raise UserError(f"dlc data info: --out={out} is not a .png file")
    if not os.access(out.parent, os.W_OK):  # known before the long work
        problem = "is not writable" if out.parent.exists() else "does not exist"
        raise UserError(f"cannot write {out}: {out.parent} {problem}")
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
    print("\n".join(f"  {line}" for line in described(found)))
    try:
        partial = out.with_name(f"{out.name}.partial")
        sheet.save(partial, "PNG")
        partial.replace(out)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {out}: {reason}; make room or give another --out") from error
    print(f"wrote {out}, a contact sheet")


def described(found) -> Iterator[str]:
    """Lines on a place, of what `survey` found."""
    if found.splits:
        yield f"splits: {counts(found.splits)}"
    if len(found.classes) > 1:
        fewest, most = min(found.classes.values()), max(found.classes.values())
        each = f"{most} images each" if fewest == most else f"{fewest} to {most} images each"
        yield f"{len(found.classes)} classes of {each}"
        more = f", and {len(found.classes) - SHOWN} more" if len(found.classes) > SHOWN else ""
        listed = counts(dict(list(found.classes.items())[:SHOWN])) + more
        yield from (f"  {line}" for line in textwrap.wrap(listed, 96))
    if found.looked < found.count:
        yield f"the rest is of {found.looked} images, evenly spread:"
    if len(found.widths):
        yield f"formats: {counts(found.formats)}; modes: {counts(found.modes)}"
        aspect = found.widths / found.heights
        sides = (("width", found.widths, ".0f"), ("height", found.heights, ".0f"))
        for what, values, form in (*sides, ("width / height", aspect, ".3g")):
            numbers = (values.min(), np.median(values), values.max())
            low, middle, high = (format(value, form) for value in numbers)
            yield f"{what}: {low} smallest, {middle} median, {high} largest"
    if found.skipped:
        yield f"left out: {counts(found.skipped)}"
    first = f", the first {BROKEN}:" if len(found.broken) > BROKEN else ""
    yield f"broken: {len(found.broken) or 'none'}{first}"
    for name, reason in found.broken[:BROKEN]:
        yield f"  {plain(name)}: {plain(reason)}"
    if found.damage:
        yield found.damage


def convert(arguments) -> None:
    from dlc_jax.data import convert as library

    source, destination = arguments.source, arguments.destination
    shared = {"split": arguments.split, "field": arguments.field, "workers": arguments.workers}
    if arguments.verify:
        with Progress("comparing", "reads") as progress:
            count = library.verify(source, destination, progress=progress, **shared)
        has = f"has not changed, and has the {count} images of {plain(source)}"
        print(f"{plain(destination)} {has}; nothing was written")
        return
    with Progress("converting", "images") as progress:
        done = library.convert(
            source, destination, shard_size=arguments.shard_size, progress=progress, **shared
        )
    if done["skipped"]:
        print(f"left out: {counts(done['skipped'])}")
    if done["unreadable"]:
        damaged = (
            f"{done['unreadable']} images are damaged in {plain(source)} and have no bytes now"
        )
        print(f"{damaged}; dlc data info names them")
    if done["resumed"]:
        print(f"{done['resumed']} of {done['shards']} shards were complete")
    of = f" of {done['classes']} classes" if done["classes"] > 1 else ""
    shards = f"{done['shards']} shard{'s' if done['shards'] > 1 else ''}"
    size = in_bytes(done["bytes"])
    print(f"wrote {plain(destination)}: {done['images']} images{of} in {shards}, {size}, read back")


def counts(found: dict[str, int]) -> str:
    return ", ".join(f"{plain(name)} {count}" for name, count in found.items())


def plain(text: str) -> str:
    """Escapes what would act on a terminal or cannot be printed; names may be anybody's."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(text))


def in_bytes(size: int) -> str:
    units = {"GB": (1e9, 1e9), "MB": (1e6, 1e5), "kB": (1e3, 0)}  # unit: (bytes, from how many on)
    return next(
        f"{size / unit:.1f} {name}" for name, (unit, least) in units.items() if size >= least
    )


def whole(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)
