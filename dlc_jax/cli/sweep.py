"""Draws images of a run at several guidance scales, and scores them: dlc evaluate -w W.

Image n is drawn from the same code and the same noise at every scale. Codes are drawn by the prior,
or are those of held-out images (the oracle), which shows what the generator alone can do.
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
CODES = {"prior": ("prior",), "oracle": ("oracle",), "both": ("oracle", "prior")}


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
    found = []
    for origin in CODES[arguments.codes]:
        codes = _codes(loaded, count, arguments.seed, origin)
        for scale in wanted or [loaded.sampler.guidance.scale]:
            guidance = dataclasses.replace(loaded.sampler.guidance, scale=scale)
            sampler = dataclasses.replace(loaded.sampler, guidance=guidance)
            name = f"{arguments.workdir} at scale {scale:g}" + ", oracle" * (origin == "oracle")
            with tempfile.TemporaryDirectory(prefix="dlc_samples_") as folder:
                images = _drawn(loaded, count, arguments.seed, sampler, codes, name, Path(folder))
                result = results.scored(images, kinds, batch=arguments.batch, **shared)
            about = {"scale": scale, "codes": origin, "sampler": dataclasses.asdict(sampler)}
            found.append({**about, **result})
            scoring.say(scoring.table(found[-1]))
            drawn = {"workdir": str(arguments.workdir), "image": arguments.image}
            drawn["code_sampler"] = dataclasses.asdict(loaded.code_sampler)
            scoring.write(arguments, results.document(found, **shared, **drawn))
            if arguments.out and wanted:
                _draw(Path(arguments.out).with_suffix(".png"), found)


def _codes(loaded, count: int, seed: int, origin: str) -> np.ndarray | None:
    """Codes [count, l] of the prior, or of held-out images; None of a generator without codes.

    Raises:
      UserError: there are not so many held-out codes, or none are read.
    """
    from dlc_jax import recipe
    from dlc_jax.data import sources
    from dlc_jax.data.codes import CodeStore

    model, config = loaded.networks[loaded.generator].model, loaded.config
    if origin == "prior":
        if not model.positions:
            return None
        parts = networks.parts(count, loaded.batch, "codes")
        return np.concatenate([loaded.sample_codes(b - a, seed=seed, first=a) for a, b in parts])
    if not model.positions:
        raise UserError("dlc evaluate: --codes=oracle is for a generator that reads codes")
    place = recipe.place(config, loaded.networks.workdir, config[loaded.generator].codes)
    store = CodeStore(place / "validation")
    if len(store) < count:
        raise UserError(
            f"dlc evaluate: there are codes of {len(store)} held-out images for --codes=oracle; "
            f"give --count={len(store)} or less"
        )
    return store.codes(sources.choose(store, count))


def _drawn(loaded, count: int, seed: int, sampler, codes, name: str, folder: Path):
    """The ImageSet: images in a file, since 50,000 of 256 pixels are 10 GB."""
    from dlc_jax.evaluation.images import of_pixels

    pixels = None
    for start, stop in networks.parts(count, loaded.batch, name):
        given = None if codes is None else codes[start:stop]
        how = {"seed": seed + 1, "first": start, "sampler": sampler}  # as Pipeline.sample
        images = loaded.decode(given, count=stop - start, **how)
        if pixels is None:
            shape = (count, *images.shape[1:])
            pixels = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, shape)
        pixels[start:stop] = images
    return of_pixels(name, pixels.__getitem__, count)


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
    origins = dict.fromkeys(each["codes"] for each in found)
    series = {
        f"{name}, {origin}" if len(origins) > 1 else name: [
            (each["scale"], each["metrics"][name]["value"], each["metrics"][name]["error"])
            for each in found
            if each["codes"] == origin
        ]
        for name in found[0]["metrics"]
        for origin in origins
    }
    with networks.writing(path):
        pictures.save_png(
            path, figure.panels(series, under="guidance scale; bars: ± standard error")
        )
    if len(found) > 1:
        scoring.say(f"wrote {path}")
