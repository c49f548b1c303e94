"""What the verb evaluate and its sweep share: networks, references, results as text and files."""

from collections.abc import Mapping
from pathlib import Path

from dlc_jax.evaluation import names


def networks_of(arguments, kinds):
    """(Scorer or None, Lpips or None): what these metrics need."""
    from dlc_jax import features
    from dlc_jax.evaluation.scoring import Scorer
    from dlc_jax.features import lpips

    scorer = distance = None
    if "lpips" in kinds:
        distance = lpips.load(
            arguments.lpips, weights=arguments.lpips_weights, heads=arguments.lpips_heads
        )
        for part in (part for part, same in distance.published.items() if not same):
            say(f"warning: the {part} of LPIPS is not the published file")
    if not kinds or set(kinds) - {"lpips"}:
        found = features.load(
            arguments.network, weights=arguments.weights, protocol=arguments.protocol
        )
        scorer = Scorer(found, batch=arguments.batch)
        if found.published is False:
            say(f"warning: {arguments.weights} is not the published file of {found.name}")
    return scorer, distance


def reference_of(arguments, kinds, path: str, scorer):
    """The reference in a place."""
    from dlc_jax.evaluation import reference

    return reference.open_reference(
        path,
        scorer,
        made_with=arguments.made_with,
        features=names.needs_features(kinds),
        **images_as(arguments),
    )


def images_as(arguments) -> dict:
    """How images are opened: options of `open_set`."""
    fields = ("image", "gray", "cache", "field")
    return {field: getattr(arguments, field) for field in fields}


def table(result: Mapping) -> str:
    """Values with their errors, and warnings, as text."""
    lines = [f"{result['samples']}: {result['count']} images"]
    for name, found in result["metrics"].items():
        error = "" if found["error"] is None else f" ± {found['error']:.2g}"
        bias = f"   (bias about {found['bias']:.2g})" if "bias" in found else ""
        lines.append(f"  {name:<12} {found['value']:.5g}{error}{bias}")
    return "\n".join([*lines, *(f"  warning: {line}" for line in result["warnings"])])


def say(text: str) -> None:
    """Prints in process 0."""
    import jax

    if jax.process_index() == 0:
        print(text, flush=True)


def write(arguments, document) -> None:
    """Writes results if --out says where."""
    from dlc_jax import workdir

    if arguments.out:
        workdir.write(Path(arguments.out), document)
        say(f"wrote {arguments.out}")
