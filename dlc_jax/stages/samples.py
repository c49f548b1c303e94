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
from dlc_jax.evals import composition, samples
from dlc_jax.models import dit, masked_transformer
from dlc_jax.models.dit import DiT
from dlc_jax.models.masked_transformer import MaskedTransformer
from dlc_jax.pipeline import Pipeline, programs
from dlc_jax.stage import Job

SHOWN = 32  # images of a picture


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
        judge = sources.judge(**config.data)
        names, classes = list(labels), [len(values) for values in labels.values()]

        def picture(name, array, sentence):
            samples.save_png(directory / "pictures" / f"{name}.png", array)
            captions[f"{name}.png"] = sentence

        def draw():
            codes = networks.sample_codes(section.count, seed=config.seed) if section.codes else None
            images = networks.decode(codes, seed=config.seed + 1, count=section.count)
            how = "sampled codes, decoded" if section.codes else "drawn without codes"
            picture("unconditional", samples.grid(images[: 2 * SHOWN]), f"Images that never existed: {how}.")
            if judge:
                reading = judge.read(images)
                found = samples.unconditional(reading.factors, reading.valid, names=names, classes=classes, held_out=judge.held_out)
                results.update({f"{section.prefix}unconditional/{key}": value for key, value in found.items()})
                results[f"{section.prefix}unconditional/distance"] = float(np.mean(reading.distance))

        def rebuild(split, prefix):
            images, codes, factors = read(split, section.count)
            decoded = networks.decode(codes, seed=config.seed + 2)
            some = sources.choose(images, SHOWN)  # not the first: files are sorted by class
            shown = samples.enlarge(images[some])
            values = config[section.generator].model["values"]
            cells = samples.code_cells(codes[some], values=values, size=shown.shape[1])
            rows = {"real": shown, "its code": cells, "from its code": samples.enlarge(decoded[some])}
            picture(
                prefix,
                samples.labelled_rows(rows),
                f"Unseen images ({split.replace('_', ' ')}), their codes ({codes.shape[1]} positions, a color for each of {values} "
                "values), and what comes back from the codes alone.",
            )
            if judge:
                reading = judge.read(decoded)
                found = samples.reconstruction(factors, reading.factors, names=names)
                results.update({f"{prefix}/{key}": value for key, value in found.items()})
                results[f"{prefix}/valid"] = float(np.mean(reading.valid))
                results[f"{prefix}/distance"] = float(np.mean(reading.distance))
                real = judge.read(images)
                own = samples.reconstruction(factors, real.factors, names=names)
                results.update({f"judge/{split}_{key}": value for key, value in own.items()})
                results[f"judge/{split}_valid"] = float(np.mean(real.valid))
                results[f"judge/{split}_distance"] = float(np.mean(real.distance))

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
                samples.labelled_rows(rows | {"composed": children[:SHOWN]}),
                f"Codes of {parents} images mixed position by position, decoded below their parents.",
            )
            if judge:
                reading = judge.read(children)
                found = composition.score(
                    [factors[groups[:, parent]] for parent in range(parents)], reading.factors, names=names, classes=classes
                )
                results.update({f"{prefix}/{key}": value for key, value in found.items()})
                results[f"{prefix}/valid"] = float(np.mean(reading.valid))

        draw()
        if judge and section.codes:
            results.update({f"judge/{key}": value for key, value in judge.proof(min(200, section.count)).items()})
        if section.codes:
            rebuild("validation", "reconstruction")
            if section.held_out:
                rebuild("held_out", "reconstruction_held_out")
            compose(2, "composition")
            compose(3, "composition_of_three")
        samples.save_captions(directory / "pictures", captions)
        return results

    # Heun's last step ends at t=0 and is one call; guidance runs the null condition too.
    calls = {"euler": section.sampling_steps, "heun": 2 * section.sampling_steps - 1}[section.method]
    passes = calls * (2 if section.codes and section.guidance != 1 else 1)
    counted = {"decode": passes * dit.flops(DiT(**config[section.generator].model))}
    if section.codes:
        prior = MaskedTransformer(**config[section.prior].model)
        counted["sample_codes"] = (section.calls or prior.positions) * masked_transformer.flops(prior)
    changeable = ("held_out", "count", "pairs", "calls", "sampling_steps", "guidance", "method")
    return Job(run=run, programs=programs(pipeline, batch=section.batch, flops=counted), settings=changeable)
