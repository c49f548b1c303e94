"""Draws images of a run at several guidance scales, and scores them: dlc evaluate -w W.

Image n is drawn from the same code and the same noise at every scale.
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dlc_jax.cli import networks, scoring
from dlc_jax.errors import UserError

COUNT = 1000  # images of a scale, if not given
TRAINING = 50_000  # images of the run's own, at most, that are the reference


def scales(text: str | None) -> list[float]:
    """Of --sweep scale=1,1.5; [] if it is not given.

    Raises:
      UserError: anything else.
    """
    if not text:
        return []
    name, _, listed = text.partition("=")
    try:
        found = sorted({float(value) for value in listed.split(",")})
        if name == "scale" and np.isfinite(found).all():
            return found
    except ValueError:
        pass
    raise UserError(f"dlc evaluate: --sweep={text!r} is not scale=A,B,…, with numbers")


def run(arguments, kinds: Sequence[str], place: str | None, wanted: Sequence[float], rest) -> None:
    """Scores the run at each scale; --out and a figure beside it grow with every one."""
    from dlc_jax.evaluation import names, results

    count = arguments.count or COUNT
    loaded = networks.load(arguments, count, rest)
    scorer, lpips = scoring.networks_of(arguments, kinds)
    reference = None
    if place:
        reference = scoring.reference_of(arguments, kinds, place, scorer)
    elif names.refers(kinds):
        reference = _training(arguments, loaded, scorer)
    shared = {"reference": reference, "scorer": scorer, "lpips": lpips, "seed": arguments.seed}
    codes, found = None, []
    for scale in wanted or [loaded.sampler.guidance.scale]:
        guidance = dataclasses.replace(loaded.sampler.guidance, scale=scale)
        sampler = dataclasses.replace(loaded.sampler, guidance=guidance)
        with tempfile.TemporaryDirectory(prefix="dlc_samples_") as folder:
            codes, images = _drawn(loaded, count, arguments, sampler, codes, Path(folder))
            result = results.scored(images, kinds, batch=arguments.batch, **shared)
        found.append({"scale": scale, "sampler": dataclasses.asdict(sampler), **result})
        scoring.say(scoring.table(found[-1]))
        drawn = {"workdir": str(arguments.workdir), "image": arguments.image}
        drawn["code_sampler"] = dataclasses.asdict(loaded.code_sampler)
        scoring.write(arguments, results.document(found, **shared, **drawn))
        if arguments.out and wanted:
            _draw(Path(arguments.out).with_suffix(".png"), found)


def _drawn(loaded, count: int, arguments, sampler, codes, folder: Path):
    """(codes, ImageSet): images in a file, since 50,000 of 256 pixels are 10 GB."""
    from dlc_jax.evaluation.images import of_pixels

    generator, pixels = loaded.networks[loaded.generator], None
    name = f"{arguments.workdir} at scale {sampler.guidance.scale:g}"
    if codes is None and generator.model.positions:
        parts = networks.parts(count, loaded.batch, "codes")
        drawn = [loaded.sample_codes(b - a, seed=arguments.seed, first=a) for a, b in parts]
        codes = np.concatenate(drawn)
    for start, stop in networks.parts(count, loaded.batch, name):
        given = None if codes is None else codes[start:stop]
        how = {"seed": arguments.seed + 1, "first": start, "sampler": sampler}  # as Pipeline.sample
        images = loaded.decode(given, count=stop - start, **how)
        if pixels is None:
            shape = (count, *images.shape[1:])
            pixels = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, shape)
        pixels[start:stop] = images
    return codes, of_pixels(name, pixels.__getitem__, count)


def _training(arguments, loaded, scorer):
    """The reference of the run's own training images."""
    from dlc_jax.data import sources
    from dlc_jax.evaluation import reference
    from dlc_jax.evaluation.images import of_pixels

    with sources.DataSet(**loaded.config.data) as data:
        source = data.source("train")
        rows = sources.choose(source, TRAINING).tolist()
        name = f"training images of {arguments.workdir}"
        images = of_pixels(name, lambda number: source[rows[number]]["image"], len(rows))
        return reference.of_images(images, scorer, cache=arguments.cache)


def _draw(path: Path, found: Sequence[dict]) -> None:
    import jax

    from dlc_jax.evals import pictures
    from dlc_jax.report import figure

    if jax.process_index():
        return
    series = {
        name: [
            (each["scale"], each["metrics"][name]["value"], each["metrics"][name]["error"])
            for each in found
        ]
        for name in found[0]["metrics"]
    }
    with networks.writing(path):
        pictures.save_png(
            path, figure.panels(series, under="guidance scale; bars: ± standard error")
        )
    if len(found) > 1:
        scoring.say(f"wrote {path}")
