"""Children of two images under `baselines.py`: how they are made, and tables of what they show."""

from types import SimpleNamespace

import numpy as np

from dlc_jax.data import shapes
from dlc_jax.evals.factors import Factors

KNOWN = 3  # shape, color and background: what a success asks for, and what is held out
SEEN = shapes.combinations(held_out=False)


def slerp(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The middle of the arc between rows [n, d]: of the mean direction, and of the mean length."""
    lengths = [np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b)]
    direction = a / lengths[0] + b / lengths[1]
    direction = direction / np.linalg.norm(direction, axis=-1, keepdims=True)
    return direction * (lengths[0] + lengths[1]) / 2


def assigned(first: np.ndarray, second: np.ndarray, seed: int) -> np.ndarray:
    """Factors [n, f], each from a parent by lot, of the first `KNOWN` at least one from each."""
    random = np.random.default_rng(seed)
    pick = random.integers(0, 2, first.shape)
    while (one := (pick[:, :KNOWN] == pick[:, :1]).all(1)).any():
        pick[one] = random.integers(0, 2, (one.sum(), first.shape[1]))
    return np.where(pick == 0, first, second)


def label_of(factors: np.ndarray) -> np.ndarray:
    """The class [n] of factors [n, f]: the number of their combination among those seen."""
    match = (factors[:, None, :KNOWN] == SEEN).all(-1)
    if not match.any(1).all():
        raise ValueError("a combination that training never showed has no label")
    return match.argmax(1)


def held_out(triples: np.ndarray) -> np.ndarray:
    """Whether training never showed these (shape, color, background), bool [...] of [..., 3]."""
    return (triples[..., None, :] == np.array(shapes.HELD_OUT)).all(-1).any(-1)


def interval(values: np.ndarray) -> tuple[float, float]:
    """Of the mean of one value a pair, 95 %, by drawing pairs anew."""
    rows = np.random.default_rng(0).integers(0, len(values), (2000, len(values)))
    low, high = np.percentile(values[rows].mean(1), [2.5, 97.5])
    return float(low), float(high)


def distinct(factors: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """How many different factors [d, n, f] a pair's draws show where `counts` [d, n]; int [n]."""
    return np.array(
        [
            len({tuple(row) for row in factors[counts[:, n], n].tolist()})
            for n in range(counts.shape[1])
        ]
    )


def reconstruction(found: dict, names: list[str]) -> str:
    """Markdown of {(condition, guidance): one reading a seed}: means over seeds, %."""
    columns = [*names, "all", "valid"]
    lines = [["condition", "guidance", *columns], ["---", *["---:"] * (len(columns) + 1)]]
    for (condition, scale), rows in found.items():
        shares = [f"{100 * np.mean([row[name] for row in rows]):.1f}" for name in columns]
        lines.append([condition, f"{scale:g}", *shares])
    return markdown("Unseen images from their own condition, %", lines)


def composition(found: dict, parents: list[np.ndarray], rates: Factors, *, chance: float) -> str:
    """Markdown of {(condition, operator, guidance): one row of `Bench.compose` a seed}.

    Args:
      parents: factors int [n, f] of the first and of the second.
      chance: of a success, of children whose factors are drawn uniformly.
    """
    columns = ["condition", "operator", "guidance", "success", "95 %", "by seed", "valid"]
    columns += [f"{name}: A / B / neither" for name in rates.names]
    columns += ["distinct", "distinct successes", "new combination", "asked: new", "asked: seen"]
    lines = [columns, ["---", "---", *["---:"] * (len(columns) - 2)]]
    for (condition, operator, scale), rows in found.items():
        cells = measured(rows, parents, rates)
        lines.append([condition, operator, f"{scale:g}", *cells])
    title = (
        f"Children of {len(parents[0])} pairs, %; chance of success {100 * chance:.1f} (uniform "
        "factors). Distinct: different factors among the draws of a pair, at most their number. "
        "New: of the successes, those with a combination that training never showed; and success "
        "where such a one, or a seen one, was asked for by name"
    )
    return markdown(title, lines)


def measured(rows: list[dict], parents: list[np.ndarray], rates: Factors) -> list[str]:
    """The cells of a line, over all seeds and draws; pairs are what the interval is over."""
    factors = np.array([row["factors"] for row in rows])  # [seed, draw, pair, factor]
    valid = np.array([row["valid"] for row in rows], bool)
    readings = zip(map(list, factors), map(list, valid), strict=True)
    success = np.array(
        [
            [rates.success(parents, SimpleNamespace(factors=f, valid=v)) for f, v in zip(*seed)]
            for seed in readings
        ]
    )
    low, high = interval(success.mean((0, 1)))
    cells = [percent(success), f"{100 * low:.1f} to {100 * high:.1f}"]
    cells += [" ".join(percent(each) for each in success), percent(valid)]
    from_a, from_b = (factors == parent for parent in parents)
    for column in range(len(rates.names)):
        origins = (from_a, from_b, ~(from_a | from_b))
        cells.append(" / ".join(percent(origin[..., column]) for origin in origins))
    for counts in (np.ones_like(valid), success):
        each = [distinct(*pair).mean() for pair in zip(factors, counts, strict=True)]
        cells.append(f"{np.mean(each):.2f}")
    cells.append(percent(held_out(factors[..., :KNOWN])[success]))
    if rows[0]["asked"] is None:
        return [*cells, "", ""]
    new = held_out(np.array([row["asked"] for row in rows]))
    return [*cells, percent(success[new]), percent(success[~new])]


def percent(values: np.ndarray) -> str:
    """The mean of some shares; "" of none."""
    return f"{100 * np.mean(values):.1f}" if np.size(values) else ""


def markdown(title: str, lines: list[list[str]]) -> str:
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return f"\n{title}.\n\n{table}"
