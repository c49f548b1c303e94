"""dlc plan --config=FILE.py --topology=T: compiles what `main` would run, for another machine.

Exit codes: 0 everything fits, 1 something does not, 2 a mistake of the user.
"""

import dataclasses
import json
import sys

from dlc_jax import command
from dlc_jax.errors import UserError

EXAMPLE = "dlc plan --config configs/imagenet256.py:generator --topology v5p:4x4x8"


def arguments(parser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="recipe, with an optional variant; --config.NAME=VALUE sets a field",
    )
    parser.add_argument(
        "--topology", metavar="T", help="machine: v5e:8x16, v5p:4x4x8, 2*v6e:16x16, h200:8 …"
    )
    parser.add_argument(
        "--step",
        metavar="NAME",
        help="only this step of the recipe; by default all of them, in turn",
    )
    parser.add_argument(
        "--program", metavar="NAME", help="only this program of a job, such as decode"
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="try remat, fsdp, batch and layers in a turn, and print the table",
    )
    parser.add_argument(
        "--shardings", action="store_true", help="print where every array lives; compiles nothing"
    )
    parser.add_argument(
        "--list-topologies",
        action="store_true",
        help="print the machines that can be asked for here",
    )
    parser.add_argument(
        "--json", action="store_true", help="print a list of estimates as JSON, bytes and seconds"
    )


def run(arguments, rest) -> int:
    from dlc_jax.plan import machine

    if arguments.list_topologies:
        print(machine.listing())
        return 0
    if not arguments.topology:
        raise UserError("dlc plan: no machine; give --topology=v5p:4x4x8, or see --list-topologies")
    recipe = [*command.given(arguments), *rest]
    config, _ = command.parse(recipe)
    machine.environment()  # from here on jax may be imported
    target = machine.find(arguments.topology)
    from dlc_jax.plan import estimate

    steps = [arguments.step] if arguments.step else config.steps
    known = [(step, name) for step in steps for name in estimate.programs(config, step)]
    work = [(step, name) for step, name in known if arguments.program in (None, name)]
    if not work:
        there = (
            ", ".join(sorted({name for _, name in known}))
            or "none, they are jobs without a large computation"
        )
        raise UserError(f"dlc plan: nothing to compile; programs of these steps: {there}")
    for step, name in work:
        estimate.check(config, step=step, name=name, machine=target)
    if arguments.shardings:
        _shardings(config, work, target)
        return 0
    if arguments.search:
        return _search(recipe[1:], config, work, target)
    found = []
    for step, name in work:
        found.append(estimate.estimate(config, step=step, name=name, machine=target))
        if not arguments.json:
            _show(found[-1], target)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(each) for each in found], indent=1))
    return 0 if all(each.fits for each in found) else 1


def _show(found, target) -> None:
    from dlc_jax.plan import words

    print(words.paragraph(found, target) + "\n", flush=True)


def _shardings(config, work, target) -> None:
    from dlc_jax import parallel
    from dlc_jax.plan import estimate, words

    mesh = parallel.make_mesh(**config.mesh, devices=target.devices)
    for step, name in work:
        print(
            f"{step}, {name}, mesh "
            + " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        )
        print(words.shardings(estimate.programs(config, step)[name].state(mesh)) + "\n")


def _search(recipe, config, work, target) -> int:
    from dlc_jax.plan import search

    fits = True
    for step, name in work:
        print(f"{step}, {name}, on {target.name}", flush=True)
        found, best = search.search(
            recipe,
            config=config,
            step=step,
            name=name,
            machine=target,
            say=lambda line: print(f"  {line}", file=sys.stderr, flush=True),
        )
        print(search.table(found, best))
        print(
            "* most examples a second of those that fit, by the static estimate\n"
            if best
            else "nothing fits\n",
            flush=True,
        )
        fits = fits and best is not None
    return 0 if fits else 1
