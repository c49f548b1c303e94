"""What earlier versions wrote, a run's config.json and a checkpoint's identity, in today's names.

Only names change here. Fields that are new since are filled in by `expand` and `complete`: their
defaults mean what was before them.
"""

from collections.abc import Mapping
from typing import Any

SIMPLICIAL = ("positions", "values", "relaxation", "readout")
DINO = ("prototypes", "hidden", "bottleneck")
ENCODER = ("separate_head",)


def config(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A run's config.json in the fields of this version.

    Before, an encoder's `model` was one flat section, `view` held fields of `data`, a sampler was
    spread over its step, and codes had no `dtype`: they were computed in that of training.
    """
    found = {}
    for name, section in saved.items():
        if isinstance(section, Mapping) and "stage" in section:
            section = dict(section)
            section = STAGES.get(section["stage"], lambda same: same)(section)
            if isinstance(section.get("train"), Mapping):
                section["train"] = _renamed(section["train"], clip_apart="clip_separately")
        found[name] = section
    return found


def encoder_model(saved: Mapping[str, Any]) -> dict[str, Any]:
    """An encoder's `model`, in parts: backbone, simplicial and dino."""
    if "backbone" in saved:
        return dict(saved)
    parts: dict[str, Any] = {"backbone": {}, "simplicial": {}, "dino": {}}
    for name, value in saved.items():
        if name in ENCODER:
            parts[name] = value
        elif name in SIMPLICIAL:
            parts["simplicial"][name] = value
        else:
            parts["dino" if name in DINO else "backbone"][name] = value
    return parts


def _encoder(section):
    section["model"] = encoder_model(section["model"])
    if "view" in section:
        section["encoded"] = section.pop("view").get("image") == "encoded"
    return section


def _codes(section):
    section.setdefault("dtype", "")
    if "view" in section:
        section["image"] = section.pop("view").get("image")
    return section


def _generator(section):
    section["grid"] = _sampler(section.get("grid", {}))
    if "process" not in section:
        section["process"], section["objective"] = _process(section.get("objective", {}))
    return section


def _process(objective):
    """(process, objective) of when there was one process, and it had fields of the objective."""
    objective = dict(objective)
    own = ("prediction", "floor")
    process = {name: objective.pop(name) for name in own if name in objective}
    if "time" in objective:
        process["mean"], process["spread"] = objective.pop("time")
    return {"name": "linear", **process}, objective


def _samples(section):
    section = _sampler(section)
    section.pop("prefix", None)  # follows from the generator's name
    section.pop("held_out", None)  # follows from the splits of the codes
    if "calls" in section:
        section["code_sampler"] = {"calls": section.pop("calls")}
    if section.get("code_sampler", {}).get("order") == "random":  # there was no other
        section["code_sampler"] = dict(section["code_sampler"])
        section["code_sampler"].pop("order")
    return section


def _sampler(section):
    section = dict(section)
    sampler = {
        new: section.pop(old)
        for old, new in (("sampling_steps", "steps"), ("method", "method"))
        if old in section
    }
    if "guidance" in section:
        sampler["guidance"] = {"scale": section.pop("guidance")}
    return section | {"sampler": sampler} if sampler else section


def _renamed(section, **names):
    """A section whose fields of old names, `old=new`, have the new ones."""
    return {names.get(name, name): value for name, value in section.items()}


STAGES = {"encoder": _encoder, "codes": _codes, "generator": _generator, "samples": _samples}
