"""A prior that was trained: new codes, codes completed, and how likely codes are."""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax import recipe
from dlc_jax.data import inputs
from dlc_jax.diffusion import chain, noise
from dlc_jax.diffusion.code_processes import CODE_PROCESSES
from dlc_jax.diffusion.code_sampler import CodeSampler
from dlc_jax.diffusion.flow import Flow
from dlc_jax.diffusion.masked import Masked
from dlc_jax.errors import UserError
from dlc_jax.models.masked_transformer import MaskedTransformer
from dlc_jax.networks import weights
from dlc_jax.networks.network import Network, key_dtype, keys

DRAWS = ("sample", "redraw")
COMPLETE, REDRAW = 1, 2  # purposes of keys: what is drawn again must not get the noise it has


class PriorNetwork(Network):
    """Codes by their number: a draw depends on the seed and on that, not on the batch.

    Attributes:
      drawn: how many codes it has drawn so far.
      called: calls that these needed.
    """

    drawn = called = 0

    @functools.cached_property
    def process(self):
        """How codes become noise, see `diffusion.code_processes`."""
        return recipe.build(CODE_PROCESSES, self.section.process)

    @functools.cached_property
    def model(self) -> MaskedTransformer:
        return recipe.build(MaskedTransformer, self.section.model)

    @property
    def tells(self) -> bool:
        """Whether it is trained, and of a process that says how likely single positions are."""
        is_there = "params" in vars(self) or weights.are_in(self.directory)
        return isinstance(self.process, Masked) and is_there

    def inputs(self):
        return example(self.model)

    def sample(self, count: int, **how) -> np.ndarray:
        """`count` new codes int32 [count, l]; see `sample_counted`."""
        return self.sample_counted(count, **how)[0]

    def sample_counted(
        self,
        count: int,
        *,
        seed: int,
        first: int | np.ndarray = 0,
        sampler: CodeSampler = CodeSampler(),  # noqa: B008, it is frozen
        prompt: np.ndarray | None = None,
        known: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        purpose: int = COMPLETE,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(codes int32 [count, l], calls int32 [count]): those of the numbers from `first` on.

        Calls are those that a code needed; a batch makes the most of any of its codes.

        Args:
          first: of an array, int [count], they are the codes' own numbers; so in all methods.
          prompt, known: codes [count, l] that are kept where `known`, bool [count, l].
          labels: class of each code, int [count], of a prior with classes. None is any class.
          purpose: of a prompt's draws, which are others than those of the same seed without one.

        Raises:
          UserError: a prompt or labels that do not fit, a sampler that the process has not, or a
            prompt of a flow.
        """
        if prompt is not None and isinstance(self.process, Flow):
            raise UserError(f"{self.step}: process.name=flow keeps no positions; masked does")
        sampler.resolved(self.process, self.model.positions)
        given = {"keys": _keys(seed, count, first)}
        if prompt is not None:
            known, shape = np.asarray(known), (count, self.model.positions)
            if known.shape != shape or known.dtype != bool:
                raise UserError(
                    f"{self.step}: known is bool {list(shape)}, whether a position is kept; got "
                    f"{known.dtype} {list(known.shape)}"
                )
            prompt = np.where(known, prompt, 0) if np.shape(prompt) == shape else prompt
            given |= {"prompt": self._checked(prompt, count, "prompt"), "known": known}
            given["keys"] = chain.folded(given["keys"], purpose)
        given |= self.labels(labels, count)
        found = self.run(self._sample, *given.values(), sampler=sampler, names=tuple(given))
        codes, calls = found[:, :-1], found[:, -1]
        self.drawn, self.called = self.drawn + count, self.called + int(calls.sum())
        return codes, calls

    def likelihood(
        self,
        codes: np.ndarray,
        *,
        seed: int = 0,
        first: int | np.ndarray = 0,
        draws: int = 16,
        labels: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(bits [n], error [n]): at most so likely is each code [n, l], -log2 p, and how uncertain.

        The bound of `Masked.bound` at `draws` times that are spread evenly, with masks of their
        own; the error is the standard error of their mean, and too large rather than too small.

        Raises:
          UserError: codes or labels that do not fit, or fewer than two draws.
        """
        if draws < 2:
            raise UserError(
                f"{self.step}: draws={draws} must be at least 2, for there to be an error"
            )
        codes = self._checked(codes, len(codes), "likelihood")
        given = {"keys": _keys(seed, len(codes), first), "codes": codes}
        given |= self.labels(labels, len(codes))
        nats = self.run(self._likelihood, *given.values(), names=tuple(given), draws=draws)
        bits = nats.astype(np.float64) / np.log(2)
        return bits.mean(1), bits.std(1, ddof=1) / np.sqrt(draws)

    def surprise(
        self,
        codes: np.ndarray,
        *,
        seed: int = 0,
        first: int | np.ndarray = 0,
        calls: int = 8,
        labels: np.ndarray | None = None,
    ) -> np.ndarray:
        """-log2 p of every value given the others, float32 [n, l], of codes [n, l].

        Every position is hidden once, with 1 / calls of the others; as many calls as positions
        hide each alone.

        Raises:
          UserError: codes or labels that do not fit, calls out of range, or another process than
            the masked one.
        """
        if not isinstance(self.process, Masked):
            raise UserError(
                f"{self.step}: only a masked process tells how likely single positions are"
            )
        if not 1 <= calls <= self.model.positions:
            raise UserError(f"{self.step}: calls={calls} must be in 1..{self.model.positions}")
        codes = self._checked(codes, len(codes), "surprise")
        given = {"keys": _keys(seed, len(codes), first), "codes": codes}
        given |= self.labels(labels, len(codes))
        return self.run(self._surprise, *given.values(), names=tuple(given), calls=calls)

    def redraw(
        self,
        codes: np.ndarray,
        *,
        positions: int,
        seed: int,
        first: int | np.ndarray = 0,
        sampler: CodeSampler = CodeSampler(),  # noqa: B008
        calls: int = 8,
        labels: np.ndarray | None = None,
        keep: np.ndarray | None = None,
    ) -> np.ndarray:
        """Codes whose `positions` least likely values are drawn anew, given the others.

        The same seed draws the same values for the same positions: another round takes another.

        Args:
          calls: see `surprise`.
          keep: bool [n, l], positions that stay however unlikely; None is none.

        Raises:
          UserError: as `surprise`, or positions out of range.
        """
        length = self.model.positions
        if not 0 <= positions <= length:
            raise UserError(
                f"{self.step}: positions={positions} to draw anew must be in 0..{length}"
            )
        bits = self.surprise(codes, seed=seed, first=first, calls=calls, labels=labels)
        keep = np.zeros(bits.shape, bool) if keep is None else keep
        order = np.argsort(np.where(keep, np.inf, -bits), 1, kind="stable")
        known = (np.argsort(order, 1, kind="stable") >= positions) | keep
        how = {"seed": seed, "first": first, "sampler": sampler, "labels": labels}
        return self.sample(len(codes), prompt=codes, known=known, purpose=REDRAW, **how)

    def redraw_share(self, codes: np.ndarray, share: float, **how) -> np.ndarray:
        """`redraw` of a share of the positions, rounded up.

        Raises:
          UserError: as `redraw`, or a share that is none.
        """
        if not 0 <= share <= 1:
            raise UserError(f"redraw: share={share} of the positions must be in 0..1")
        length = self.model.positions
        how = {"calls": min(8, length)} | how
        return self.redraw(codes, positions=math.ceil(round(share * length, 6)), **how)

    def drawing(self, sampler: CodeSampler) -> types.SimpleNamespace:
        """Its `sample`, `redraw` and `surprise`, as `composition` uses them, by a sampler."""
        draw = {name: functools.partial(getattr(self, name), sampler=sampler) for name in DRAWS}
        return types.SimpleNamespace(surprise=self.surprise, **draw)

    def lower(self, *, sampler: CodeSampler):
        """`sample` of a batch, lowered from shapes alone."""
        names, shapes = ("keys",), [((), key_dtype())]
        if self.model.classes:
            names, shapes = (*names, "label"), [*shapes, ((), jnp.int32)]
        return self._lower(self._sample, *shapes, sampler=sampler, names=names)

    def _sample(self, params, *given, sampler, names):
        given = dict(zip(names, given, strict=True))
        predict = functools.partial(self._predict, params, given.pop("label", None))
        length, values = self.model.positions, self.model.values
        draws = given.pop("keys")
        codes, calls = sampler.draw(self.process, predict, draws, length, values, **given)
        return jnp.concatenate([codes, calls[:, None]], 1)

    def _likelihood(self, params, *given, names, draws):
        given = dict(zip(names, given, strict=True))
        codes, values = given["codes"], self.model.values
        process = self.process
        if isinstance(process, Masked):  # every schedule has the same bound; this one hides all
            objective = "score" if process.objective == "score" else "elbo"
            process = dataclasses.replace(process, noise=noise.Noise(), objective=objective)
        offset = jax.vmap(jax.random.uniform)(chain.folded(given["keys"], draws))

        def draw(_, index):
            t = (index + offset) / draws
            noisy = process.corrupt(codes, t, chain.folded(given["keys"], index), values=values)
            hidden = process.noise.hidden(t)
            outputs = self._predict(params, given.get("label"), noisy, hidden)
            return None, process.bound(outputs, codes, noisy, t, values=values)

        return jax.lax.scan(draw, None, jnp.arange(draws))[1].T

    def _surprise(self, params, *given, names, calls):
        given = dict(zip(names, given, strict=True))
        codes, values, length = given["codes"], self.model.values, self.model.positions
        order = jax.vmap(lambda key: jax.random.permutation(key, length))(given["keys"])

        def call(found, index):
            hidden = order % calls == index
            noisy = jnp.where(hidden, values, codes)
            outputs = self._predict(params, given.get("label"), noisy, hidden.mean(-1))
            belief = self.process.belief(outputs, values=values)
            each = -jnp.take_along_axis(belief.log_p, codes[..., None], -1)[..., 0]
            return jnp.where(hidden, each, found), None

        nats, _ = jax.lax.scan(call, jnp.zeros(codes.shape), jnp.arange(calls))
        return nats / np.float32(np.log(2))

    def _predict(self, params, label, noisy, hidden):
        """The network's outputs of codes of which a share is noise."""
        outputs = functools.partial(apply, self.model, params, noisy)
        sigma = noise.total(jnp.minimum(hidden, self.process.noise.hidden(1.0)))
        return outputs(sigma, label)

    def _checked(self, codes, count: int, where: str) -> np.ndarray:
        shape = {"length": self.model.positions, "values": self.model.values}
        codes = inputs.check_codes(codes, where=f"{self.step}: {where}", **shape)
        if codes.ndim != 2 or len(codes) != count:
            raise UserError(
                f"{self.step}: {where} is hard codes [{count}, {self.model.positions}]; got "
                f"{list(codes.shape)}"
            )
        return codes


def example(model: MaskedTransformer) -> tuple:
    """What one code's call has: codes, sigma and a label where the model reads them."""
    return (
        jnp.zeros((1, model.positions), jnp.int32),
        jnp.zeros((1,)) if model.sigma_conditioning else None,
        jnp.zeros((1,), jnp.int32) if model.classes else None,
    )


def apply(model: MaskedTransformer, params, noisy, sigma, label, **how):
    """The model's outputs; it is told sigma and the label only if it reads them."""
    sigma = sigma if model.sigma_conditioning else None
    return model.apply({"params": params}, noisy, sigma, label, **how)


def _keys(seed: int, count: int, first: int | np.ndarray):
    """A key for each of `count` codes, of the numbers from `first` on, or of those in `first`."""
    return keys(seed, count, first if np.ndim(first) == 0 else first - np.arange(count))
