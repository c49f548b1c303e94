"""Searches remat, mesh, layers per turn of the loop and batch, by compiling a few programs.

Each is compiled in a process of its own:

    1. remat x fsdp, at the batch of the recipe
    2. the best of these with more layers in a turn of the loop over layers
    3. the best of these with twice the batch, and twice again, while it fits

The best is the one with the most examples a second by the static estimate, of those that fit.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dlc_jax import recipe, stop
from dlc_jax.errors import UserError
from dlc_jax.plan import words
from dlc_jax.plan.machine import Machine

LARGEST = 4  # doublings of the batch


def search(
    arguments: Sequence[str],
    *,
    config,
    step: str,
    name: str,
    machine: Machine,
    say: Callable[[str], None],
) -> tuple[list[Mapping[str, Any]], Mapping[str, Any] | None]:
    """Tries settings of one program: (every estimate with its `settings`, the best that fits).

    The best is None if nothing fits.

    Args:
      arguments: of the command line, the recipe and its fields; what is tried follows them.
      say: called with a line before each program is compiled, which takes a while.

    Raises:
      UserError: the first program cannot be built at all.
    """
    tried: dict[tuple, Mapping[str, Any]] = {}
    section, training = config[step], name == "train"
    names = {
        "remat": f"{step}.model*.remat",
        "turn": f"{step}.model*.unroll",
        "fsdp": "mesh.fsdp",
        "batch": f"{step}.train.batch" if training else f"{step}.batch",
    }

    def attempt(**settings):
        key = tuple(sorted(settings.items()))
        if key not in tried:
            listed = ", ".join(f"{field} {value}" for field, value in settings.items())
            say(f"{len(tried) + 1}: {listed}")
            fields = {names[field]: value for field, value in settings.items()}
            fields = {"mesh.data": -1} | fields
            found = _compile(arguments, fields, step=step, name=name, machine=machine)
            if "error" in found and not tried:
                raise UserError(found["error"])
            tried[key] = found | {"settings": settings}
        return tried[key]

    batch = section.train.batch if training else section.batch
    most = len(machine.devices) // config.mesh.tensor
    sizes = sorted({size for size in (1, 8, 16, 64, most) if most and most % size == 0})
    for remat in ("none", "dots", "full") if training else ("",):
        for size in sizes:
            attempt(**({"remat": remat} if remat else {}), fsdp=size, batch=batch)
    if training and (best := _best(tried.values())):
        fields = recipe.flat(section.model.to_dict())  # of the network or of its backbone
        depth = next(fields[field] for field in fields if field.split(".")[-1] == "depth")
        for turn in (2, 4):
            if depth % turn == 0:
                attempt(**best["settings"] | {"turn": turn})
    for doubled in range(1, LARGEST + 1):
        best = _best(tried.values())
        if best is None:
            break
        if not attempt(**best["settings"] | {"batch": batch * 2**doubled}).get("fits"):
            break
    return list(tried.values()), _best(tried.values())


def table(found: Sequence[Mapping[str, Any]], best: Mapping[str, Any] | None) -> str:
    """What was tried, the best marked."""
    rows = []
    for each in found:
        settings = each["settings"]
        row = ["*" if each is best else ""]
        row += [str(settings.get(field, "")) for field in ("remat", "fsdp", "turn", "batch")]
        if "error" in each:
            rows.append([*row, each["error"][:60], "", "", ""])
            continue
        row += [f"{words.size(each['wanted'])} of {words.size(each['available'])}"]
        row += ["yes" if each["fits"] else "no"]
        row += [f"{each['batch'] / each['seconds']:,.0f}" if each["seconds"] else ""]
        rows.append([*row, f"{each['compile_seconds']:.0f} s"])
    head = ("", "remat", "fsdp", "layers/turn", "batch")
    head += ("memory a device", "fits", "examples/s", "compile")
    return words.table(head, rows)


def _best(found) -> Mapping[str, Any] | None:
    fitting = [each for each in found if each.get("fits") and each["seconds"]]
    return max(fitting, key=lambda each: each["batch"] / each["seconds"], default=None)


def _compile(arguments, fields, *, step: str, name: str, machine: Machine) -> Mapping[str, Any]:
    """An estimate as JSON, made in another process.

    Its memory is given back at its end, and a compiler that dies takes nothing with it.
    """
    command = [sys.executable, "-m", "dlc_jax.cli", "plan", "--json"]
    command += ["--topology", machine.name, "--step", step, "--program", name]
    command += [*arguments, *(f"--config.{field}={value}" for field, value in fields.items())]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        with stop.helper(process.kill):
            out, err = process.communicate()
    if process.returncode in (0, 1) and out.strip():
        return json.loads(out)[0]
    lines = err.strip().splitlines() or [f"the compiler died with {process.returncode}"]
    return {"error": lines[-1].removeprefix("dlc_jax: ")}
