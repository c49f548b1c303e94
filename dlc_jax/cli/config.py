"""dlc config FILE[:VARIANT] [--all]: a recipe's own lines, or every field of its full config."""

from pathlib import Path

from dlc_jax import command
from dlc_jax.recipe import expansion, fields

EXAMPLE = "dlc config configs/quickstart.py:tiny --all"


def arguments(parser) -> None:
    parser.add_argument(
        "file", metavar="FILE", help="recipe, with an optional variant, or a run's config.json"
    )
    parser.add_argument(
        "--all", action="store_true", help="every field: value, default, type, one line about it"
    )


def run(arguments, rest) -> None:
    config, _ = command.parse(["dlc", f"--config={arguments.file}", *rest])  # refuses mistakes
    _, lines = command.read(arguments.file)
    if not arguments.all:
        for name, value in lines.items():
            print(f"{name} = {value!r}")
        for argument in rest:
            print(argument.removeprefix("--config.").replace("=", " = ", 1))
        return
    section = None
    for name, kind, value, default, doc in expansion.described(config.to_dict()):
        above = name.rpartition(".")[0]
        if above != section:
            print(f"\n[{above or Path(arguments.file).name}]")
            section = above
        usual = "required" if default is fields.REQUIRED else f"default {default!r}"
        usual = "" if value == default else f" ({usual})"
        print(f"{name.rpartition('.')[2]} = {value!r}{usual}  # {kind}: {doc}")
