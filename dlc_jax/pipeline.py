"""The Python face of a workdir: images to codes, codes to images, new codes, mixtures.

    from dlc_jax import pipeline
    p = pipeline.load("runs/quickstart")
    codes = p.encode(images)                                 # uint8 [b, y, x, c] -> int32 [b, l]
    images = p.decode(codes, seed=0)                         # back
    images = p.decode(embeddings=p.embed(images))            # of a generator trained on embeddings
    images = p.sample(16, seed=0)                            # new ones
    mixed, bits = p.compose([a, b], weights=(1, 3))          # a and b: images, or their codes
    images = p.decode(mixed)

How images are drawn is a value; `p.sampler` is that of the run's recipe:

    fast = Sampler(method="euler", steps=12, guidance=Guidance(scale=1.5))
    images = p.decode(codes, sampler=fast)

The prior also says how likely codes are, and draws any part of them given the rest:

    bits, error = p.likelihood(codes)                        # -log2 p of each, at most
    codes = p.complete(codes, keep=range(12))                # other positions drawn anew
    codes = p.redraw(codes, 0.1)                             # the least likely tenth drawn anew

Soft codes are points of the simplices instead of their corners. The generator reads both:

    s = p.simplices(images, temperature=0.3)                 # float32 [b, l, v]
    images = p.decode(0.5 * s[:8] + 0.5 * s[8:])             # half of each at every position
    mixed, bits = p.compose([a, b], operator=Soft(temperature=0.3))  # values drawn from that mean

Every draw has its own key, folded from the seed and the sample's number. So results do not depend
on the batch size, and a long job can be done in parts (`first`). `close`, or `with`, frees all.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dlc_jax import composition, parallel, recipe
from dlc_jax import workdir as home
from dlc_jax.composition import OPERATORS, Composed, groups
from dlc_jax.composition.mix import kept
from dlc_jax.composition.operators import Coin, Operator, Soft
from dlc_jax.diffusion.code_sampler import CodeSampler
from dlc_jax.diffusion.guidance import Guidance as Guidance
from dlc_jax.diffusion.sample import Sampler
from dlc_jax.networks import Networks

Images = np.ndarray | Sequence[np.ndarray]


def load(workdir: str | Path, *, batch: int = 128, config=None) -> "Pipeline":
    """The pipeline of a run, which samples as the `samples` section of its recipe does.

    A network is loaded when first used. "demo" is the run that comes with the package.

    Args:
      batch: examples per call of a network, rounded up to what the devices here divide.
      config: expanded; None is that of the run.

    Raises:
      UserError: `workdir` holds no run, or its config.json is damaged.
    """
    config = recipe.of_run(workdir) if config is None else config
    mesh = parallel.make_mesh()
    batch = -(-max(1, batch) // parallel.shares(mesh)) * parallel.shares(mesh)
    networks = Networks(config, home.locate(workdir), mesh, batch=batch)
    if "samples" not in config:
        return Pipeline(networks)
    section = config.samples
    names = {network: section[network] for network in ("encoder", "prior", "generator")}
    samplers = {
        "sampler": recipe.build(Sampler, section.sampler),
        "code_sampler": recipe.build(CodeSampler, section.code_sampler),
        "operator": recipe.build(OPERATORS, section.operator),
    }
    return Pipeline(networks, **names, **samplers)


class Pipeline:
    """The networks of a workdir under one roof.

    Attributes:
      networks: see `networks.Networks`.
      encoder, prior, generator: which steps of the recipe are used.
      sampler: how images are drawn unless a call says otherwise.
      code_sampler: how codes are.
      operator: how codes are composed.
    """

    def __init__(
        self,
        networks: Networks,
        *,
        encoder: str = "encoder",
        prior: str = "prior",
        generator: str = "generator",
        sampler: Sampler = Sampler(),  # noqa: B008, it is frozen
        code_sampler: CodeSampler = CodeSampler(),  # noqa: B008
        operator: Operator = Coin(),  # noqa: B008
    ):
        self.networks, self.sampler, self.code_sampler = networks, sampler, code_sampler
        self.operator = operator
        self.encoder, self.prior, self.generator = encoder, prior, generator

    @property
    def config(self):
        """Of the run, expanded."""
        return self.networks.config

    @property
    def size(self) -> int:
        """Side of the images that the encoder reads."""
        return self._encoder.size

    @property
    def batch(self) -> int:
        """Examples per call of a network."""
        return self.networks.batch

    def encode(self, images: Images, *, params=None) -> np.ndarray:
        """Images uint8 [b, y, x, c] to codes int32 [b, l]: the likeliest value of every position.

        Gray is repeated; another size than the encoder's is scaled and center-cropped. A list may
        hold several sizes.

        Args:
          params: of the encoder; None are those saved in the workdir.

        Raises:
          UserError: these are not such images.
        """
        return self._encoder.encode(images, params=params)

    def features(self, images: Images, *, params=None) -> np.ndarray:
        """Features float32 [b, 2 d]: normalized class token, and mean of the patches'."""
        return self._encoder.features(images, params=params)

    def embed(self, images: Images, *, kind: str = "") -> np.ndarray:
        """Embeddings float32 [b, e], as the codes step stores them; see `EncoderNetwork.embed`."""
        return self._encoder.embed(images, kind=kind)

    def simplices(self, images: Images, *, temperature: float = 1.0) -> np.ndarray:
        """Soft codes float32 [b, l, v]: softmax of logits / temperature (above 0), no noise."""
        return self._encoder.simplices(images, temperature=temperature)

    def sample_codes(
        self, count: int, *, seed: int = 0, sampler: CodeSampler | None = None, **how
    ) -> np.ndarray:
        """`count` new codes int32 [count, l]; `how` is as in `PriorNetwork.sample_counted`."""
        return self._prior.sample(count, seed=seed, sampler=sampler or self.code_sampler, **how)

    def complete(self, codes: np.ndarray, keep: Sequence[int] | np.ndarray, **how) -> np.ndarray:
        """Codes int32 [b, l] whose positions outside of `keep` are drawn given the others.

        Args:
          keep: positions, or bool [l] or [b, l]. What codes [b, l] have elsewhere is not read.
          how: as in `sample_codes`.

        Raises:
          UserError: codes or positions that do not fit.
        """
        known = kept(keep, (len(codes), self._prior.model.positions))
        return self.sample_codes(len(codes), prompt=codes, known=known, **how)

    def likelihood(self, codes: np.ndarray, **how) -> tuple[np.ndarray, np.ndarray]:
        """(bits [b], error [b]) of codes int [b, l]; see `PriorNetwork.likelihood`."""
        return self._prior.likelihood(codes, **how)

    def surprise(self, codes: np.ndarray, **how) -> np.ndarray:
        """-log2 p of each value given the others, float32 [b, l]; see `PriorNetwork.surprise`."""
        return self._prior.surprise(codes, **how)

    def redraw(
        self, codes: np.ndarray, share: float = 0.1, *, sampler: CodeSampler | None = None, **how
    ) -> np.ndarray:
        """Codes int32 [b, l], a share of their positions, the least likely, drawn anew."""
        how = {"seed": 0, "sampler": sampler or self.code_sampler} | how
        return self._prior.redraw_share(codes, share, **how)

    def decode(
        self, codes: np.ndarray | None = None, *, sampler: Sampler | None = None, **how
    ) -> np.ndarray:
        """Codes int [b, l], soft ones float [b, l, v] or `embeddings` to uint8 images [b, y, x, c].

        Args:
          sampler: None is the pipeline's.
          how: `seed`, `first`, `embeddings` and what else `GeneratorNetwork.decode` takes.

        Raises:
          UserError: codes of another shape or type, outside [0, V), or no points of simplices.
        """
        return self._generator.decode(codes, sampler=sampler or self.sampler, **how)

    def decode_all(
        self, parents: Sequence[np.ndarray], *, sampler: Sampler | None = None, **how
    ) -> np.ndarray:
        """Images that fit several codes at once; `how` as in `GeneratorNetwork.decode_all`."""
        return self._generator.decode_all(parents, sampler=sampler or self.sampler, **how)

    def sample(
        self,
        count: int,
        *,
        seed: int = 0,
        first: int = 0,
        sampler: Sampler | None = None,
        code_sampler: CodeSampler | None = None,
        labels: np.ndarray | None = None,
    ) -> np.ndarray:
        """New images uint8 [count, y, x, c]: codes as `sample_codes` draws them, decoded.

        Args:
          labels: class of each image, int [count], for a generator or a prior trained with
            classes. A generator that reads no codes draws them at random if they are None.
          first: number of the first image. Images [n, n + count) of a seed are these of any longer
            call.
        """
        codes, model = None, self._generator.model
        if model.positions:
            how = {"labels": labels if self._prior.model.classes else None, "first": first}
            codes = self.sample_codes(count, seed=seed, sampler=code_sampler, **how)
            labels = labels if model.classes or how["labels"] is None else None
        elif model.classes and labels is None:
            labels = self._generator.random_labels(count, seed=seed, first=first)
        how = {"seed": seed + 1, "count": count, "first": first, "sampler": sampler}
        return self.decode(codes, labels=labels, **how)

    def compose(
        self,
        parents: Sequence[np.ndarray],
        *,
        operator: Operator | None = None,
        weights: Sequence[float] | None = None,
        keep: Sequence[int | str] | np.ndarray = (),
        seed: int = 0,
        first: int = 0,
        best: int = 1,
    ) -> Composed:
        """(codes int32 [b, l], bits [b]) put together from parents: images, codes or simplices.

        Args:
          operator: how, one of `composition.operators`; None is that of the run's recipe.
          weights: how often a position is from each parent; None is equally often.
          keep: positions always from the first parent, "0-11", names of `groups`, or a mask.
          best: of so many draws of each example, by its number from `first`, the likeliest is kept.

        Raises:
          UserError: parents, weights or positions that do not fit; no prior where one is needed.
        """
        operator = self.operator if operator is None else operator
        codes = [self._read(np.asarray(parent), operator) for parent in parents]
        if not isinstance(keep, np.ndarray) and any(isinstance(each, str) for each in keep):
            keep = groups.positions(keep, self.groups, self._generator.model.positions, "keep")
        how = {"seed": seed, "weights": weights, "keep": keep, "groups": self.groups}
        how["position"] = first + np.arange(len(codes[0]) if codes else 0)
        prior = self._likely(operator.needs_prior or best > 1)
        return composition.best(operator, codes, prior, n=best, **how)

    @functools.cached_property
    def groups(self) -> dict[str, tuple[int, ...]]:
        """{name: positions}: kinds of crops, and clusters that `dlc positions` found."""
        section = self.config[self.encoder] if self.encoder in self.config else None
        return groups.known(section, home.read(self.networks.workdir / groups.FILE))

    def close(self) -> None:
        """Frees the networks; one that is used again is loaded again."""
        self.networks.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _read(self, parent: np.ndarray, operator: Operator) -> np.ndarray:
        """A parent's codes or simplices."""
        if parent.ndim != 4:
            return self._generator.checked(parent, "compose")
        if isinstance(operator, Soft):
            return self.simplices(parent, temperature=operator.temperature)
        return self.encode(parent)

    def _likely(self, needed: bool):
        """The prior as operators use it; None where there is none and none is needed."""
        is_there = self.prior in self.config and (needed or self._prior.tells)
        return self._prior.drawing(self.code_sampler) if is_there else None

    @property
    def _encoder(self):
        return self.networks[self.encoder]

    @property
    def _prior(self):
        return self.networks[self.prior]

    @property
    def _generator(self):
        return self.networks[self.generator]
