"""dlc config FILE[:VARIANT] [--all]: a recipe's own lines, or every field of its full config."""

from dlc_jax import command, recipe

EXAMPLE = "dlc config configs/quickstart.py:tiny --all"


def arguments(parser) -> None:
    parser.add_argument(
        "file", metavar="FILE", help="recipe, with an optional variant, or a run's config.json"
    )
    parser.add_argument(
        "--all", action="store_true", help="every field: value, type, default, one line about it"
    )


def run(arguments, rest) -> None:
    words = ["dlc", f"--config={arguments.file}", *rest]
    command.parse(words)  # refuses mistakes
    _, lines, _ = command.read_line(words)
    if arguments.all:
        print("\n".join(recipe.listing(recipe.expanded(lines))))
        return
    for name, value in lines.items():
        print(f"{name} = {value}" if isinstance(value, recipe.Text) else f"{name} = {value!r}")
