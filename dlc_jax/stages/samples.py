"""The samples job: what the trained networks make, as pictures and as numbers.

    unconditional    prior -> codes -> images
    reconstruction   images of every split but train -> codes -> images
    composition      codes of two and of three images, composed by an operator -> images; of two
                     alone, if the operator names what each of two gives

With `codes=""` the generator was trained without codes and only draws; its numbers stand under the
name of its step.
"""

import dataclasses
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import jax
import numpy as np

from dlc_jax import recipe
from dlc_jax import workdir as home
from dlc_jax.composition.groups import FILE, known
from dlc_jax.composition.operators import OPERATORS, Coin, Operator, Soft
from dlc_jax.data import sources
from dlc_jax.data.codes import CodeStore
from dlc_jax.data.sources import DataSet
from dlc_jax.diffusion.code_processes import CODE_PROCESSES
from dlc_jax.diffusion.code_sampler import CodeSampler
from dlc_jax.diffusion.guidance import Guidance
from dlc_jax.diffusion.processes import PROCESSES
from dlc_jax.diffusion.sample import Sampler
from dlc_jax.errors import UserError
from dlc_jax.evals import composition, pictures
from dlc_jax.evals.factors import Factors
from dlc_jax.models.dit import DiT
from dlc_jax.models.masked_transformer import MaskedTransformer
from dlc_jax.networks import Networks, program
from dlc_jax.networks.generator import sized
from dlc_jax.networks.samplers import check_sampler
from dlc_jax.stage import Job

SHOWN = 32  # images of a picture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """The section of a samples job.

    Attributes:
      encoder: step whose codes the generator reads.
      prior: step that draws codes.
      generator: step that draws images.
      codes: step whose store has the codes of real images; "" of a generator without codes.
      count: images drawn, and real ones reconstructed.
      pairs: compositions of two images, and of three unless the operator names what two give.
      batch: images per call, over all devices.
      code_sampler: how codes are drawn.
      sampler: how images are drawn.
      operator: how codes are composed.
    """

    encoder: str = "encoder"
    prior: str = "prior"
    generator: str = "generator"
    codes: str = "codes"
    count: int = 512
    pairs: int = 512
    batch: int = 128
    code_sampler: CodeSampler = CodeSampler()
    sampler: Sampler = Sampler(steps=50, guidance=Guidance(scale=1.5))
    operator: Annotated[Operator, OPERATORS] = Coin()


@dataclasses.dataclass(frozen=True)
class Studio:
    """Where samples are made: what `draw`, `rebuild` and `compose` read and write.

    Attributes:
      config, workdir, section: of the job.
      data: the data set.
      networks: of the workdir.
      rates: of factors, where the data set can judge them.
      directory: of the job; pictures go below it.
      results: {name: number} so far.
      captions: {picture: sentence} so far.
    """

    config: object
    workdir: Path
    section: Section
    data: DataSet
    networks: Networks
    rates: Factors
    directory: Path
    results: dict = dataclasses.field(default_factory=dict)
    captions: dict = dataclasses.field(default_factory=dict)

    def note(self, prefix: str, found: dict) -> None:
        """Adds results under a prefix."""
        self.results.update({f"{prefix}{key}": value for key, value in found.items()})

    def show(self, name: str, picture: np.ndarray, sentence: str) -> None:
        """Writes a picture with its caption."""
        if jax.process_index() == 0:
            pictures.save_png(self.directory / "pictures" / f"{name}.png", picture)
        self.captions[f"{name}.png"] = sentence

    def decode(self, codes, *, seed: int, count: int | None = None) -> np.ndarray:
        """Images of codes, with a seed of their own above the recipe's."""
        generator, labels = self.networks[self.section.generator], None
        seed, sampler = self.config.seed + seed, self.section.sampler
        if codes is None and generator.model.classes:
            labels = generator.random_labels(count, seed=seed)
        return generator.decode(codes, labels=labels, seed=seed, count=count, sampler=sampler)

    def read(self, split: str):
        """Real images, their codes, and their factors or None; `count` of a split."""
        source = self.data.source(split)
        rows = sources.choose(source, self.section.count)
        records = [source[int(index)] for index in rows]
        images = np.stack([record["image"] for record in records])
        factors = None
        if "factors" in records[0]:
            factors = np.stack([record["factors"] for record in records])
        place = recipe.place(self.config, self.workdir, self.section.codes)
        return images, CodeStore(place / split).codes(rows), factors


def make(config, *, step: str, workdir) -> Job:
    """The job of a recipe's section `step`."""
    section = recipe.build(Section, config[step])
    if config[section.generator].model["embedding"]:
        raise UserError(
            f"{step}: {section.generator} reads embeddings, and no step draws new ones; leave it "
            "out of steps, and decode embeddings of images by dlc_jax.pipeline"
        )
    check_operator(config, section, Path(workdir))

    def networks(mesh):
        return Networks(config, workdir, mesh, batch=section.batch)

    def run(mesh, directory):
        with networks(mesh) as opened, DataSet(**config.data) as data:
            labels = data.factors()  # {factor: its values' names}
            classes = [len(values) for values in labels.values()]
            rates = Factors(data.judge(), list(labels), classes)
            return fill(Studio(config, workdir, section, data, opened, rates, directory))

    changeable = ("count", "pairs", "code_sampler", "sampler", "operator")
    programs = plan(config, section, networks, step)
    return Job(run=run, programs=programs, settings=changeable)


def named(config, section: Section, workdir: Path) -> dict:
    """Groups of positions that the operator may name."""
    encoder = config[section.encoder] if section.encoder in config else None
    return known(encoder, home.read(workdir / FILE))


def check_operator(config, section: Section, workdir: Path) -> None:
    """Refuses an operator that cannot compose so many images, before anything is drawn."""
    if reads_codes(config, section):
        read = config[section.generator].model["positions"]
        given = config[section.encoder].model.simplicial if section.encoder in config else {}
        shape = (1, given.get("positions", read))  # if they differ, the generator says so
        soft = (*shape, 1) if isinstance(section.operator, Soft) else shape
        dry = SimpleNamespace(
            sample=lambda count, *, prompt, **how: prompt,
            redraw=lambda codes, **how: codes,
            surprise=lambda codes, **how: np.zeros(codes.shape),
        )
        groups = named(config, section, workdir)
        parents = 3 if section.operator.gives_all(3) else 2
        section.operator([np.zeros(soft, np.int32)] * parents, dry, seed=0, groups=groups)


def plan(config, section: Section, networks, step: str = "samples") -> dict:
    """The job's large computations."""
    generator = config[section.generator]
    process = recipe.build(PROCESSES, generator.process)
    model = sized(recipe.build(DiT, generator.model), process)
    check_sampler(section.sampler, generator, f"{step}.sampler")
    guidance = section.sampler.guidance
    conditional = reads_codes(config, section) or model.classes or guidance.base
    is_guided = conditional and guidance.scale != 1
    twice = is_guided and guidance.base != "internal"  # the null condition or the base too
    passes = section.sampler.calls * (2 if twice else 1)
    make = functools.partial(program, networks, batch=section.batch)
    images = make(section.generator, flops=passes * model.flops(), sampler=section.sampler)
    if not reads_codes(config, section):
        return {"decode": images}
    prior = config[section.prior]
    model = recipe.build(MaskedTransformer, prior.model)
    process = recipe.build(CODE_PROCESSES, prior.process)
    calls = section.code_sampler.steps(process, model.positions)
    codes = make(section.prior, flops=calls * model.flops(), sampler=section.code_sampler)
    return {"decode": images, "sample_codes": codes}


def reads_codes(config, section: Section) -> bool:
    """Whether there are codes, and the generator reads them."""
    return bool(section.codes and config[section.generator].model["positions"])


def fill(studio: Studio) -> dict[str, float]:
    """Everything that the section asks for; returns the results."""
    section = studio.section
    draw(studio)
    if reads_codes(studio.config, section):
        studio.note("judge/", studio.rates.proof(min(200, section.count)))
        for split in studio.config[section.codes].splits:
            if split != "train":
                after = "" if split == "validation" else f"_{split}"
                rebuild(studio, split, f"reconstruction{after}")
        compose(studio, 2, "composition")
        if section.operator.gives_all(3):
            compose(studio, 3, "composition_of_three")
    if jax.process_index() == 0:
        pictures.save_captions(studio.directory / "pictures", studio.captions)
    return studio.results


def draw(studio: Studio) -> None:
    """New images."""
    section, codes, how = studio.section, None, "drawn without codes"
    if reads_codes(studio.config, section):
        prior, seed = studio.networks[section.prior], studio.config.seed
        drawing = {"seed": seed, "sampler": section.code_sampler}
        codes, calls = prior.sample_counted(section.count, **drawing)
        studio.note("unconditional/", {"calls": float(calls.mean())})
        how = "sampled codes, decoded"
    images = studio.decode(codes, seed=1, count=section.count)
    sentence = f"Images that never existed: {how}."
    studio.show("unconditional", pictures.grid(images[: 2 * SHOWN]), sentence)
    above = "" if reads_codes(studio.config, section) else f"{section.generator}/"
    studio.note(f"{above}unconditional/", studio.rates.unconditional(images))


def rebuild(studio: Studio, split: str, prefix: str) -> None:
    """Real images from their codes alone."""
    images, codes, factors = studio.read(split)
    decoded = studio.decode(codes, seed=2)
    some = sources.choose(images, SHOWN)  # not the first: files are sorted by class
    shown = pictures.enlarge(images[some])
    values = studio.config[studio.section.generator].model["values"]
    cells = pictures.code_cells(codes[some], values=values, size=shown.shape[1])
    drawn = pictures.enlarge(decoded[some])
    rows = {"real": shown, "its code": cells, "from its code": drawn}
    studio.show(
        prefix,
        pictures.labelled_rows(rows),
        f"Unseen images ({split.replace('_', ' ')}), their codes ({codes.shape[1]} positions, a "
        f"color for each of {values} values), and what comes back from the codes alone.",
    )
    found, own = studio.rates.reconstruction(factors, images, decoded)
    studio.note(f"{prefix}/", found)
    studio.note(f"judge/{split}_", own)


def compose(studio: Studio, parents: int, prefix: str) -> None:
    """Images of codes put together of several images' codes."""
    images, codes, factors = studio.read("validation")
    section, seed = studio.section, studio.config.seed
    if factors is None:
        shape = (section.pairs, parents)
        groups = np.random.default_rng(seed).integers(0, len(images), shape)
    else:
        # A factor with fewer values than parents cannot differ between all of them: with three,
        # size is left out.
        enough = [n for n, count in enumerate(studio.rates.classes) if count >= parents]
        groups = composition.choose_parents(
            factors[:, enough], section.pairs, parents=parents, seed=seed
        )
    if isinstance(section.operator, Soft):
        encoder = studio.networks[section.encoder]
        codes = encoder.simplices(images, temperature=section.operator.temperature)
    prior = studio.networks[section.prior]
    likely = section.operator.needs_prior or prior.tells
    mixed, bits = section.operator(
        [codes[groups[:, n]] for n in range(parents)],
        prior.drawing(section.code_sampler) if likely else None,
        seed=seed,
        groups=named(studio.config, section, studio.workdir),
    )
    children = studio.decode(mixed, seed=3)
    rows = {f"parent {'ABC'[n]}": images[groups[:SHOWN, n]] for n in range(parents)}
    studio.show(
        prefix,
        pictures.labelled_rows(rows | {"composed": children[:SHOWN]}),
        f"Codes of {parents} images composed by {type(section.operator).__name__.lower()}, decoded "
        "below their parents.",
    )
    if factors is not None:
        inherited = np.moveaxis(factors[groups], 1, 0)
        studio.note(f"{prefix}/", studio.rates.composition(inherited, children, bits))
    elif bits is not None:
        studio.note(f"{prefix}/", {"bits": float(bits.mean())})
