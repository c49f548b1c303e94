"""The page's numbers: a paragraph of headlines, every result, times, and versions."""

import importlib.metadata
import platform
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dlc_jax.report.words import duration, finite, number, percent, text, words
from dlc_jax.workdir import commit

# What each group of results is, in the order of the table; other groups follow by name.
_GROUPS = {
    "reconstruction": "Image → code → new image, for unseen images of combinations that training "
    "saw: what the new image kept.",
    "reconstruction_held_out": "Image → code → new image, for combinations of factors that "
    "training never saw.",
    "unconditional": "Sampled codes → new images. Entropies are relative to all values being "
    "equally frequent.",
    "composition": "Codes of two images that differ in every factor, composed: what the new image "
    "has from them. Success: it is valid, every factor with more values than parents is one of "
    "theirs, and all of them show in these. Bits: how unlikely a position's value is given the "
    "others; auc bits: how often a success has fewer of them than a failure, 0.5 if they say "
    "nothing.",
    "composition_of_three": "The same with three images, which differ in every factor that has "
    "enough values.",
    "without_codes": "The same generator, trained with the same budget but without codes.",
    "probe": "A linear reading of the codes, on images not seen in training: what the codes know.",
    "probe_best_on_validation": "The same with the learning rate chosen on these very images, as "
    "the paper reports it.",
    "probe_knn": "The same, by the vote of the nearest training codes.",
    "probe_untrained": "A linear reading of the codes of an encoder that has learned nothing: "
    "what is above it was learned.",
    "probe_features": "A linear reading of the class token that the codes are made of.",
    "probe_features_patches": "The same with the mean of the patches beside it.",
    "probe_features_knn": "The vote of the nearest class tokens; the number is that of voters.",
    "probe_pixels": "A linear reading of the pixels.",
    "probe_held_out": "A linear reading of the codes, on images of combinations of factors that "
    "training never saw.",
    "probe_held_out_knn": "On those combinations, by the vote of the nearest training codes.",
    "agreement": "Two augmented views of an image: share of the positions with the same value, "
    "and times the share by chance.",
    "codes": "How codes use their values: perplexity is 1 where all are equally frequent, dead is "
    "the share of values never used.",
    "prior_scores": "How likely codes are to the prior: at most so many bits each, of those it was "
    "trained on and of others. How codes that it draws differ from real ones: total variation of a "
    "position's values and of pairs, and the area under the curve of a classifier, 0.5 if it sees "
    "no difference. The floor is what training codes have instead of drawn ones.",
    "judge": "The judge reads the factors off an image. Here it is tested itself, on images whose "
    "answer is known.",
}
# groups that a reader has to open
_FOLDED = {"judge", "health", "probe_features_knn", "probe_held_out_features_knn"}
_ELSEWHERE = {"seconds"}  # groups with a section of their own
_ABOUT = ("commit", "device")  # results that say how the others were made
# groups of rates begin with one of these
_RATES = (
    *("agreement", "judge", "probe", "reconstruction"),
    *("unconditional", "composition", "without_codes"),
)
_NOT_A_RATE = re.compile(
    "count|times|values|distance|rms|threshold|nats|bits|guidance|scale|steps|seed|seconds"
    "|temperature|loss"
)
_PACKAGES = ("dlc_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def summary(results: Mapping[str, Any]) -> str:
    """One paragraph of the headline numbers, of those there are."""

    def rates(prefix: str, suffix: str = "") -> str:
        found = []
        for key, value in results.items():
            match = re.fullmatch(f"{prefix}/(?!chance_|all$|valid$)([a-z_]+){suffix}", key)
            if match and _is_rate(key, value):
                found.append(f"{words(match[1])} {percent(value)}")
        return ", ".join(found)

    sentences = []
    if kept := rates("reconstruction"):
        sentences.append(
            "Images that training never saw, turned into a code and back into an image, "
            f"kept: {kept}."
        )
    if kept := rates("reconstruction_held_out"):
        sentences.append(f"For combinations of factors that training never saw: {kept}.")
    if _is_rate("unconditional/valid", valid := results.get("unconditional/valid")):
        count = results.get("unconditional/count")
        of = f"Of {number(count)} samples" if finite(count) else "Of the samples"
        sentences.append(f"{of} drawn without any condition, {percent(valid)} are valid.")
    if kept := rates("composition", "_from_parents"):
        sentences.append(f"Images composed of two others have from one of them: {kept}.")
    if _is_rate("composition/success", success := results.get("composition/success")):
        chance = results.get("composition/chance_success")
        by = f", where chance gives {percent(chance)}" if finite(chance) else ""
        sentences.append(f"{percent(success)} of the compositions succeed{by}.")
    if _is_rate("composition/both_parents", both := results.get("composition/both_parents")):
        sentences.append(f"In {percent(both)} of the compositions both parents show.")
    if finite(total := results.get("seconds/total")):
        sentences.append(f"The whole run took {duration(total)}.")
    return f"<p>{text(' '.join(sentences))}</p>" if sentences else ""


def tables(results: Mapping[str, Any]) -> list[str]:
    """Every result, a table for each group, in HTML."""
    groups: dict[str, list[str]] = {}
    for key in results:
        group = key.partition("/")[0] if "/" in key else ""
        is_shown = group not in _ELSEWHERE and key not in _ABOUT
        if is_shown and not isinstance(results[key], (dict, list)):
            groups.setdefault(group, []).append(key)
    known = [name for name in _GROUPS if name in groups and name not in _FOLDED]
    others = sorted(name for name in groups if name and name not in _GROUPS)
    folded = [name for name in groups if name in _FOLDED]
    order = [*known, *others, *folded, *([""] if "" in groups else [])]
    parts = ["<h2>Results</h2>"] if groups else []
    for group in order:
        found = _table(group, groups[group], results)
        if group in _FOLDED:
            heading = f"{text(words(group))}: {len(groups[group])} numbers"
            found = f"<details><summary>{heading}</summary>\n{found}\n</details>"
        parts.append(found)
    return parts


def _table(group: str, keys: Sequence[str], results: Mapping[str, Any]) -> str:
    """One group's table: measure, value, and where known the chance level and the count."""
    rows = []
    for key in keys:
        parent, _, name = key.rpartition("/")
        beside = f"{parent}/" if parent else ""
        is_chance = name.startswith("chance_") and beside + name[len("chance_") :] in results
        if name.endswith("count") or is_chance:
            continue  # shown in the row of its measure
        chance, count = results.get(f"{beside}chance_{name}"), _count(beside, name, results)
        if not _is_rate(key, results[key]):
            chance = count = None
        label = words(key.removeprefix(f"{group}/") if group else key)
        level = percent(chance) if finite(chance) else ""
        images = number(count) if finite(count) else ""
        rows.append((label, _value(key, results[key]), level, images))
    if not rows:  # a group of nothing but a count
        rows = [(words(key.partition("/")[2]), number(results[key]), "", "") for key in keys]
    used = [True, True, any(row[2] for row in rows), any(row[3] for row in rows)]
    head, *rows = (
        [cell for cell, use in zip(row, used) if use]
        for row in [("measure", "value", "by chance", "images"), *rows]
    )
    lines = [f"<h3>{text(words(group).capitalize() or 'Other')}</h3>"]
    if group in _GROUPS:
        lines.append(f'<p class="note">{text(_GROUPS[group])}</p>')
    return "\n".join([*lines, _grid(head, rows)])


def _count(beside: str, name: str, results: Mapping[str, Any]) -> Any:
    """Of `judge/seen_shape` the first of `judge/seen_shape_count`, `seen_count` and `count`."""
    parts = name.split("_")
    names = [f"{beside}{'_'.join(parts[:size])}_count" for size in range(len(parts), 0, -1)]
    return next((results[key] for key in [*names, f"{beside}count"] if key in results), None)


def timings(results: Mapping[str, Any]) -> str:
    """How long each step took, and its share of the whole."""
    found = {
        key.partition("/")[2]: value
        for key, value in results.items()
        if key.startswith("seconds/") and finite(value)
    }
    if not found:
        return ""
    total = found.pop("total", None) or sum(found.values())
    rows = [
        (words(name), duration(value), percent(value / total) if total else "")
        for name, value in found.items()
    ]
    rows.append(("total", duration(total), ""))
    where = f'<p class="note">On {text(results["device"])}.</p>\n' if results.get("device") else ""
    return f"<h2>Time</h2>\n{where}{_grid(('step', 'time', 'share'), rows)}"


def versions(results: Mapping[str, Any]) -> str:
    """The commit of the run, and the packages that are installed where the report is written."""
    rows = [("python", platform.python_version())]
    for name in _PACKAGES:
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            pass
    if found := results.get("commit") or commit():
        rows.insert(0, ("commit", found))
    return f"<h2>Versions</h2>\n{_grid((), rows)}"


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in HTML; without a head if that is empty."""
    titles = "".join(f"<th>{text(cell)}</th>" for cell in head)
    top = f"<thead><tr>{titles}</tr></thead>" if head else ""
    lines = ("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in rows)
    return "\n".join([f"<table>{top}<tbody>", *lines, "</tbody></table>"])


def _cell(value: str) -> str:
    """A cell; one that holds a number stays on one line."""
    kind = ' class="number"' if re.match(r"[-><\d]", value) and len(value) < 20 else ""
    return f"<td{kind}>{text(value)}</td>"


def _is_rate(key: str, value: Any) -> bool:
    if not isinstance(value, float) or not 0 <= value <= 1:
        return False
    return key.startswith(_RATES) and not _NOT_A_RATE.search(key.partition("/")[2])


def _value(key: str, value: Any) -> str:
    if _is_rate(key, value):
        return percent(value)
    if finite(value) and (key.startswith("seconds/") or "seconds" in key.rpartition("/")[2]):
        return duration(value)
    if finite(value) and key.endswith("_gb"):
        return f"{value:.2f} GB"
    return number(value)
