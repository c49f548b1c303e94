"""Names of the metrics, and what they need; without jax, so that a mistake is told at once."""

from collections.abc import Iterable

from dlc_jax.errors import UserError

MANIFOLD = ("precision", "recall", "density", "coverage")
# name -> kind. Only Inception's features have the first names: their distances are not others'.
INCEPTION = {"fid": "frechet", "sfid": "spatial", "is": "score", "kid": "kernel"}
ANY = {name: name for name in (*MANIFOLD, "vendi", "lpips")}
REFERRING = {"frechet", "spatial", "kernel", *MANIFOLD}  # kinds that need a reference


def known(network: str) -> dict[str, str]:
    """{name of a metric: kind} of a network; the first of a kind is what it is called."""
    if network == "inception":
        return INCEPTION | ANY
    own = {f"fd_{network}": "frechet", f"kd_{network}": "kernel", "fd": "frechet", "kd": "kernel"}
    return own | ANY


def called(network: str) -> dict[str, str]:
    """{kind: what it is called} of a network."""
    return {kind: name for name, kind in reversed(known(network).items())}


def usual(network: str) -> str:
    """Names of the metrics that are taken if none are given."""
    own = "fid,sfid,is" if network == "inception" else f"fd_{network}"
    return f"{own},precision,recall"


def parse(text: str, network: str) -> list[str]:
    """Kinds of the metrics in a text such as "fid,is", each once.

    Raises:
      UserError: an unknown one, or one of another network.
    """
    there, kinds = known(network), []
    for name in filter(None, text.lower().replace(" ", "").split(",")):
        if name in INCEPTION and name not in there:
            ours = {"fid": "fd", "kid": "kd"}.get(name)
            instead = f"{network}'s is called {ours}" if ours else "leave it out"
            raise UserError(f"metric {name} is of Inception's features; {instead}")
        if name not in there:
            raise UserError(f"metric {name!r} is unknown; with {network} use {', '.join(there)}")
        kinds.append(there[name])
    if not kinds:
        raise UserError(f"no metric in {text!r}; with {network} use {', '.join(there)}")
    return [*dict.fromkeys(kinds)]


def refers(kinds: Iterable[str]) -> bool:
    """Whether one of the metrics needs a reference."""
    return not REFERRING.isdisjoint(kinds)


def needs_features(kinds: Iterable[str]) -> bool:
    """Whether one of the metrics needs features of the reference, not only moments."""
    return not {"kernel", *MANIFOLD}.isdisjoint(kinds)
