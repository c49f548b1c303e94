"""Pictures that a generator draws on the way: the `grid` section."""

import dataclasses

import jax
import numpy as np

from dlc_jax.data import sources
from dlc_jax.diffusion.guidance import Guidance
from dlc_jax.diffusion.sample import Sampler
from dlc_jax.errors import UserError
from dlc_jax.evals import pictures


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """The `grid` section: pictures drawn on the way, always of the same codes with the same noise.

    Attributes:
      every: steps between two; 0 is only at the end.
      count: images.
      sampler: how they are drawn.
    """

    every: int = 0
    count: int = 16
    sampler: Sampler = Sampler(steps=50, guidance=Guidance(scale=1.5))

    def __post_init__(self):
        if self.every < 0 or self.count < 1:
            raise UserError(
                f"generator.grid: every={self.every} must be at least 0, count={self.count} at "
                "least 1"
            )


def draw_images(data, network, store, state, *, seed: int, count: int, sampler: Sampler):
    """(rows of the validation split, images uint8 [count, y, x, 3] drawn from what it says).

    Always of the same condition with the same noise; without one rows are None.
    """
    params = state.params if state.ema is None else state.ema
    how = {"params": params, "seed": seed, "sampler": sampler}
    model = network.model
    if not _is_conditional(model):
        return None, network.decode(None, count=count, **how)
    source = data.source("validation")
    rows, codes = np.resize(sources.choose(source, count), count), None
    if model.positions:
        codes = store("validation").codes(rows)
    if model.classes:
        how["labels"] = np.array([source[int(row)]["label"] for row in rows])
    if model.embedding:
        how["embeddings"] = store("validation").embeddings(rows)
    return rows, network.decode(codes, count=count, **how)


def draw_grid(grid: Grid, seed: int, data, network, store, state, frozen, mesh, directory):
    """The evaluator's picture: validation images above what is drawn from their codes."""
    network, count = network(mesh, grid.count), grid.count
    if _is_conditional(network.model):
        count = min(count, len(data.source("validation")))
    how = {"seed": seed, "count": count, "sampler": grid.sampler}
    rows, drawn = draw_images(data, network, store, state, **how)
    if rows is None:
        picture, what = pictures.grid(drawn), "what the generator draws"
    else:
        source = data.source("validation")
        real = np.stack([source[int(row)]["image"] for row in rows])
        one, all_ = _condition(network.model)
        picture = pictures.labelled_rows({"real": real, f"from its {one}": drawn})
        what = f"unseen images above what the generator draws from their {all_}"
    if jax.process_index() == 0:
        folder = directory / "pictures"
        pictures.save_png(folder / f"step_{int(state.step)}.png", picture)
        steps = sorted(int(path.stem.removeprefix("step_")) for path in folder.glob("step_*.png"))
        sentences = {
            f"step_{at}.png": f"After {at} steps: {what}; always the same codes and noise."
            for at in steps
        }
        pictures.save_captions(folder, sentences)
    return {"samples": picture}


def _is_conditional(model) -> bool:
    return bool(model.positions or model.classes or model.embedding)


def _condition(model) -> tuple[str, str]:
    """What images are drawn from, in words: of one, of several."""
    if model.positions:
        return "code", "codes"
    return ("embedding", "embeddings") if model.embedding else ("class", "classes")
