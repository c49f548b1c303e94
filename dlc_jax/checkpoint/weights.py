"""What others read of a trained step: its weights, and which ones they are."""

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax

from dlc_jax import checksum, remote
from dlc_jax.checkpoint import arrays, seal
from dlc_jax.errors import UserError
from dlc_jax.hosts.agreement import meet
from dlc_jax.typing import Tree


def load_params(
    directory: str | Path, abstract: Tree, *, collection: str = "ema", step: int | None = None
) -> Tree:
    """One part of a saved state, of the newest step that verifies, or of `step`.

    Args:
      directory: of the checkpoints.
      abstract: the part as jax.ShapeDtypeStruct with shardings; another dtype casts.
      collection: the part, "ema" or "params"; nothing else is read.

    Raises:
      UserError: no good checkpoint; no such part in it; other names or shapes.
    """
    directory = remote.local(directory).absolute()
    path = directory / str(_chosen(directory, step))
    saved = arrays.part(arrays.read_meta(path)["arrays"], collection)
    if not saved:
        raise UserError(
            f"{path} holds no {collection!r}; load collection='params' of a step trained without "
            "an average"
        )
    targets = arrays.flat(abstract)
    if wrong := arrays.mismatch(saved, targets, dtypes=False):
        raise UserError(
            f"{collection!r} of {path} does not fit ({arrays.listed(wrong)}); use the config it "
            "was trained with"
        )
    wanted = {f"{collection}.{name}": leaf for name, leaf in targets.items()}
    return arrays.unflat(abstract, arrays.part(arrays.read(path / "state", wanted), collection))


def check_start(
    directory: str | Path, params: Tree, *, new: Sequence[str] = ()
) -> tuple[Path, str, list[str]]:
    """What `warm_start` would do, by seals, sizes and names: no file is hashed.

    Args:
      params: arrays or shapes.

    Returns:
      (checkpoint, its collection, names that are not in it and so new).

    Raises:
      UserError: as `warm_start`.
    """
    return _start(directory, params, new, hashed=False)


def warm_start(directory: str | Path, params: Tree, *, new: Sequence[str] = ()) -> Tree:
    """`params` with every array of a trained step in place of the fresh one, placed alike.

    Args:
      directory: of a trained step, or of its checkpoints; its average is read if it keeps one.
      new: regular expressions of whole dotted names that may be absent there: those keep their
        fresh values and are logged.

    Raises:
      UserError: no good checkpoint; arrays absent and not `new`, of another shape, or without a
        place here; `new` names nothing.
    """
    path, collection, added = _start(directory, params, new, hashed=True)

    def read(kept):
        wanted = {f"{collection}.{name}": leaf for name, leaf in kept.items()}
        return arrays.part(arrays.read(path / "state", wanted), collection)

    return filled(params, added, read, path=path)


def identity_of(directory: str | Path) -> str:
    """A short hash of the checkpoint that `load_params` would load: of its bytes, as sealed.

    Seals and sizes are read, and no file is hashed. So load the parameters first: damage that
    their loading found is remembered here.

    Raises:
      UserError: no good checkpoint.
    """
    directory = remote.local(directory).absolute()
    return _identity(seal.path_of(directory, _chosen(directory, None, hashed=False)))


def identities(directory: str | Path) -> set[str]:
    """`identity_of` of every step that has a seal: by the seals alone, without other processes."""
    directory = remote.local(directory).absolute()
    remote.fetch(directory)
    paths = [seal.path_of(directory, step) for step in seal.steps(directory)]
    hashes = set()
    for path in paths:
        with contextlib.suppress(OSError, ValueError):  # no seal, or a damaged one
            hashes.add(_identity(path))
    return hashes


def _identity(path: Path) -> str:
    return checksum.of_text(json.dumps(json.loads(path.read_text()), sort_keys=True))[:16]


def _start(directory: str | Path, params: Tree, new: Sequence[str], *, hashed: bool):
    where, directory = f"train.init_from={directory}", remote.local(directory).absolute()
    if (directory / "checkpoints").is_dir():
        directory = directory / "checkpoints"
    try:
        path = directory / str(_chosen(directory, None, hashed=hashed))
    except UserError as error:
        what = str(error).removesuffix("; train this step first")
        raise UserError(
            f"{where}: {what}; give the folder of a trained step, such as W/encoder, or one of "
            "dlc import"
        ) from error
    try:
        saved = arrays.read_meta(path)["arrays"]
    except Exception:
        if hashed:
            raise
        return _start(directory, params, new, hashed=True)  # which passes over a damaged step
    collection = "ema" if arrays.part(saved, "ema") else "params"
    added = fit(arrays.part(saved, collection), params, new, where=where, path=path)
    return path, collection, added


def fit(
    present: Mapping[str, list], params: Tree, new: Sequence[str], *, where: str, path: Path
) -> list[str]:
    """Names of `params` that are not in what is saved, and so new; all else must fit.

    Args:
      present: {dotted name: [shape, dtype]} of what is saved at `path`.
      params, new: see `warm_start`.
      where: how the field is written that names the place.

    Raises:
      UserError: see `warm_start`.
    """
    fresh, added = arrays.flat(params), set()
    for pattern in new:
        try:
            matched = [name for name in fresh if re.fullmatch(pattern, name)]
        except re.error as error:
            raise UserError(
                f"train.init_new: {pattern!r} is an invalid regular expression ({error}); "
                "correct it"
            ) from error
        if not matched:
            raise UserError(
                f"train.init_new: {pattern!r} names no parameter of this model; one is "
                f"{next(iter(fresh))}"
            )
        added |= {name for name in matched if name not in present}
    kept = {name: leaf for name, leaf in fresh.items() if name not in added}
    if wrong := arrays.mismatch(present, kept, dtypes=False):
        raise UserError(
            f"{where}: {path} does not fit this model ({arrays.listed(wrong)}); set the model's "
            "fields as it has them, or name what may be absent there in train.init_new"
        )
    return sorted(added)


def filled(params: Tree, added: Sequence[str], read: Callable, *, path: Path) -> Tree:
    """`params` with what is saved at `path` in place of all but those `added`, which are logged.

    Args:
      read: ({dotted name: fresh array}) -> {dotted name: saved array, placed alike}.
    """
    if added and jax.process_index() == 0:
        seal.log.warning("not in %s, so new: %s", path, ", ".join(added))
    fresh = arrays.flat(params)
    kept = {name: leaf for name, leaf in fresh.items() if name not in added}
    return arrays.unflat(params, fresh | read(kept))


def _chosen(directory: Path, step: int | None, *, hashed: bool = True) -> int:
    """The newest step that verifies, or `step` if it does; sealed, if no step had a seal."""
    refused = {}
    if step is not None:
        refused = {other: "" for other in seal.steps(directory) if other != step}
    chosen = seal.newest(directory, refused, hashed=hashed)
    if chosen is None:
        listed = [f"{number}: {why}" for number, why in refused.items() if why]
        reasons = f" ({arrays.listed(listed)})" if listed else ""
        which = "" if step is None else f" of step {step}"
        raise UserError(
            f"no good checkpoint{which} under {directory}{reasons}; train this step first"
        )
    seal.seal_if_none(directory, chosen)
    meet("chosen")
    return chosen
