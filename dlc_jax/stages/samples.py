"""The samples job: what the trained networks make, as pictures and as numbers.

    unconditional    prior -> codes -> images
    reconstruction   unseen images -> codes -> images, of combinations seen in training and of held-out ones
    composition      codes of two and of three images mixed position by position -> images

With `codes=""` the generator was trained without codes and only draws; its numbers stand under `prefix`.
"""

import functools

import numpy as np

from dlc_jax import recipe
from dlc_jax.data import sources
from dlc_jax.data.codes import CodeStore
from dlc_jax.data.shapes import HELD_OUT
from dlc_jax.diffusion.sample import Sampler
from dlc_jax.evals import composition, pictures
from dlc_jax.evals import judge as judging
from dlc_jax.evals.factors import Factors
from dlc_jax.models.dit import DiT
from dlc_jax.models.masked_transformer import MaskedTransformer
from dlc_jax.pipeline import Pipeline, programs
from dlc_jax.stage import Job

SHOWN = 32  # images of a picture


class Judge(judging.Judge):
    """The judge of the embedded data set, with what `Factors` asks of one."""

    held_out = HELD_OUT

    def proof(self, count):
        return judging.proof(self, count=count)


def make(config, *, step: str, workdir) -> Job:
    """The job of a recipe's section `step`."""
    section = config[step]
    settings = {"calls": section.calls, "steps": section.sampling_steps, "guidance": section.guidance, "method": section.method}
    networks = {network: section[network] for network in ("encoder", "prior", "generator")}
    pipeline = functools.partial(Pipeline, config, workdir, batch=section.batch, **networks, **settings)

    def read(split, count):
        """Real images, their codes, and their factors if the data set knows them."""
        source = sources.source(split=split, **config.data)
        rows = sources.choose(source, count)
        records = [source[int(index)] for index in rows]
        images = np.stack([record["image"] for record in records])
        factors = np.stack([record["factors"] for record in records]) if "factors" in records[0] else None
        codes = CodeStore(recipe.place(config, workdir, section.codes) / split).codes(rows) if section.codes else None
        return images, codes, factors

    def run(mesh, directory):
        networks = pipeline(mesh=mesh)
        results, captions = {}, {}
        labels = sources.factors(**config.data)  # {factor: its values' names}
        ours = config.data.name == "shapes"  # the judge knows no other images
        judge = Judge(image=config.data.image, positions=config.data.positions) if ours else None
        classes = [len(values) for values in labels.values()]
        rates = Factors(judge, list(labels), classes)

        def note(prefix, found):
            results.update({f"{prefix}{key}": value for key, value in found.items()})

        def picture(name, array, sentence):
            pictures.save_png(directory / "pictures" / f"{name}.png", array)
            captions[f"{name}.png"] = sentence

        def draw():
            codes = networks.sample_codes(section.count, seed=config.seed) if section.codes else None
            images = networks.decode(codes, seed=config.seed + 1, count=section.count)
            how = "sampled codes, decoded" if section.codes else "drawn without codes"
            picture("unconditional", pictures.grid(images[: 2 * SHOWN]), f"Images that never existed: {how}.")
            note(f"{section.prefix}unconditional/", rates.unconditional(images))

        def rebuild(split, prefix):
            images, codes, factors = read(split, section.count)
            decoded = networks.decode(codes, seed=config.seed + 2)
            some = sources.choose(images, SHOWN)  # not the first: files are sorted by class
            shown = pictures.enlarge(images[some])
            values = config[section.generator].model["values"]
            cells = pictures.code_cells(codes[some], values=values, size=shown.shape[1])
            rows = {"real": shown, "its code": cells, "from its code": pictures.enlarge(decoded[some])}
            picture(
                prefix,
                pictures.labelled_rows(rows),
                f"Unseen images ({split.replace('_', ' ')}), their codes ({codes.shape[1]} positions, a color for each of {values} "
                "values), and what comes back from the codes alone.",
            )
            found, own = rates.reconstruction(factors, images, decoded)
            note(f"{prefix}/", found)
            note(f"judge/{split}_", own)

        def compose(parents, prefix):
            images, codes, factors = read("validation", section.count)
            if factors is None:
                groups = np.random.default_rng(config.seed).integers(0, len(images), (section.pairs, parents))
            else:
                # A factor with fewer values than parents cannot differ between all of them: with three, size is left out.
                columns = [column for column, count in enumerate(classes) if count >= parents]
                groups = composition.choose_parents(factors[:, columns], section.pairs, parents=parents, seed=config.seed)
            mixed = networks.compose([codes[groups[:, parent]] for parent in range(parents)], seed=config.seed)
            children = networks.decode(mixed, seed=config.seed + 3)
            rows = {f"parent {'ABC'[parent]}": images[groups[:SHOWN, parent]] for parent in range(parents)}
            picture(
                prefix,
                pictures.labelled_rows(rows | {"composed": children[:SHOWN]}),
                f"Codes of {parents} images mixed position by position, decoded below their parents.",
            )
            if factors is not None:
                note(f"{prefix}/", rates.composition(np.moveaxis(factors[groups], 1, 0), children))

        draw()
        if section.codes:
            note("judge/", rates.proof(min(200, section.count)))
            rebuild("validation", "reconstruction")
            if section.held_out:
                rebuild("held_out", "reconstruction_held_out")
            compose(2, "composition")
            compose(3, "composition_of_three")
        pictures.save_captions(directory / "pictures", captions)
        return results

    calls = Sampler(method=section.method, steps=section.sampling_steps).calls
    passes = calls * (2 if section.codes and section.guidance != 1 else 1)  # the null condition too
    counted = {"decode": passes * DiT(**config[section.generator].model).flops()}
    if section.codes:
        prior = MaskedTransformer(**config[section.prior].model)
        counted["sample_codes"] = (section.calls or prior.positions) * prior.flops()
    changeable = ("held_out", "count", "pairs", "calls", "sampling_steps", "guidance", "method")
    return Job(run=run, programs=programs(pipeline, batch=section.batch, flops=counted), settings=changeable)
