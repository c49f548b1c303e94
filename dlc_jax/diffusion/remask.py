"""Codes by revealing positions and hiding some of them again, so that mistakes can be mended.

Methods (chain) -> Drawn of `code_sampler`. Each is one table of chances, step by step: how much is
hidden, the chance to be revealed, and the chance to be hidden again. Sources: ReMDM (arXiv
2503.00307); the remasking of arXiv 2507.12318, section 4.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax.diffusion import schedules
from dlc_jax.diffusion.chain import Chain, Drawn

ETAS = {"remdm_cap": 0.008, "remdm_loop": 0.02, "remask": 0.01}
WINDOWS = {"remdm_loop": (0.05, 0.55), "remask": (0.3, 0.55)}


def remdm_cap(chain: Chain) -> Drawn:
    """ReMDM with the chance `eta` to be hidden again, where the process leaves room for it."""
    hidden = _hidden(chain, schedules.grid(chain.sampler.times, chain.calls))
    now, after = hidden[:-1], hidden[1:]
    room = np.minimum(1, after / np.maximum(1 - now, 1e-12))
    again = np.minimum(_eta(chain), room)
    return _walk(chain, now, *_remdm(now, after, again))


def remdm_loop(chain: Chain) -> Drawn:
    """ReMDM's loop: down to a few hidden, many steps of mending there, then the rest.

    Within the window of t the share of hidden positions stays at 1 - `kept`, and `eta` of the
    others are hidden again in every step.
    """
    stop, start = _window(chain)
    times = schedules.grid("uniform", chain.calls)
    low = 1 - chain.sampler.kept
    inside = [1.0, start, stop, 0.0]
    hidden = np.interp(times, inside[::-1], [1.0, low, low, 0.0][::-1])
    now, after = hidden[:-1], hidden[1:]
    level = np.isclose(now, after)
    again = np.where(level, np.minimum(_eta(chain), low / (1 - low)), 0.0)
    return _walk(chain, now, *_remdm(now, after, again))


def remask(chain: Chain) -> Drawn:
    """The paper's: within a window of t a share `eta` of the visible is hidden again.

    There a step also reveals what it hides again, eta times the visible share, and where a value is
    likelier than staying hidden the likeliest value has eta less of the chance to be revealed.
    Source: the released sampler of arXiv 2507.12318, whose schedule is nearly linear; in shares of
    noise instead of times, as here, the share stays that of any schedule.
    """
    stop, start = _window(chain)
    eta = _eta(chain)
    times = schedules.grid(chain.sampler.times, chain.calls).round(12)  # the ends are not within
    inside = (stop < times[:-1]) & (times[:-1] < start)
    hidden = _hidden(chain, times)
    now, after = hidden[:-1], hidden[1:]
    target = np.where(inside, np.maximum(after - eta * (1 - now), 0), after)
    reveal = (now - target) / now
    return _walk(chain, now, reveal, np.where(inside, eta, 0.0), lessened=eta * inside)


def _remdm(now, after, again):
    """(chance to be revealed, chance to be hidden again); ReMDM, equation 6."""
    return ((1 - after) - (1 - again) * (1 - now)) / now, again


def _hidden(chain, times):
    hidden = chain.process.noise.hidden(times, np)
    return np.where(times <= 0, 0.0, hidden)


def _eta(chain):
    return chain.sampler.eta or ETAS[chain.sampler.method]


def _window(chain):
    return chain.sampler.window or WINDOWS[chain.sampler.method]


def _walk(chain: Chain, level, reveal, again, *, lessened=None) -> Drawn:
    """Steps whose chances are tables; in the last one everything is revealed.

    Args:
      level: share of noise that the network is told.
      lessened: what the likeliest value loses, see `remask`.
    """
    reveal = np.minimum(reveal, 1)
    reveal[-1], again[-1] = 1, 0
    tables = level, reveal, again, np.zeros_like(level) if lessened is None else lessened
    tables = jnp.asarray(np.stack(tables, 1), jnp.float32)

    def step(codes, row):
        index, (level, reveal, again, less) = row
        hidden = codes == chain.values
        log_p, mass = chain.belief(codes, chain.told(level))
        chance = reveal if mass is None else jnp.minimum(reveal * jnp.exp(mass), 1)
        chance = jnp.broadcast_to(chance, hidden.shape)
        if lessened is not None:
            log_p, chance = _lessened(log_p, chance, less)
        draw = chain.uniform(index)
        last = index == len(tables) - 1
        shown = jnp.where((draw < chance) | last, chain.draw(log_p, index), codes)
        hide = jnp.where(chain.open & (draw < again), chain.values, codes)
        return jnp.where(hidden, shown, hide), None

    codes, _ = jax.lax.scan(step, chain.start, (jnp.arange(len(tables)), tables))
    calls = jnp.where(chain.open.any(-1), len(tables), 0).astype(jnp.int32)
    return Drawn(codes, calls)


def _lessened(log_p, chance, eta):
    """The joint draw of the released sampler, as a chance to be revealed and one of values."""
    p = jnp.exp(log_p)
    best = p.max(-1)
    is_value = chance * best > 1 - chance
    less = (p - eta * (p == best[..., None])) / (1 - eta)
    p = jnp.where(is_value[..., None], jnp.maximum(less, 0), p)
    shown = jnp.where(is_value, chance * (1 - eta), chance / (1 + eta * chance))
    log_p = jnp.log(p) - jnp.log(p.sum(-1, keepdims=True))
    return log_p, shown
