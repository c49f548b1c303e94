"""Checkpoints: saved in the background, sealed with checksums, restored newest first if they verify. Alone in knowing Orbax.

    <directory>/1000/                 written by Orbax, which renames it into place when it is whole
    <directory>/1000.sha256.json      its seal: size and SHA-256 of every file of it, written by process 0 after that
    <directory>/2000.damaged/         a step that did not verify, moved aside when an older one was restored; never deleted

The rule. A step without its seal was cut short, and is skipped: the run goes on from the step before and, being deterministic,
makes the same step again. Only where no step has a seal (the very first save was cut short, or the seals were not copied along)
the newest step that is complete and restores is taken, and sealed then. So kill -9 at any time leaves something to go on from,
or nothing saved at all; and an older step is deleted only after `keep` newer ones were sealed.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from dlc_jax.checkpoint import arrays, seal
from dlc_jax.checkpoint.seal import clear, meet  # noqa: F401  part of this package's face
from dlc_jax.errors import UserError
from dlc_jax.typing import Tree


def _silence():
    """Orbax tells its whole life through absl, and what is left of a failed save goes on complaining, a traceback each time.

    All that matters reaches the caller as one exception; nobody else's messages are touched.
    """

    def spoken_by_others(record):
        text = record.pathname
        if record.name == "asyncio":
            text += record.getMessage() + "".join(traceback.format_exception(*record.exc_info) if record.exc_info else ())
        return "orbax" not in text

    def unraisable(report, show=sys.unraisablehook):
        if str(report.exc_value) != "Event loop is closed":
            show(report)

    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(spoken_by_others)
    warnings.filterwarnings("ignore", "coroutine 'async_serialize", RuntimeWarning)
    sys.unraisablehook = unraisable


_silence()


class Checkpoints:
    """The checkpoints of one training run.

    With several processes all of them call every method, in the same order, on a shared directory; process 0 decides and seals.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2):
        """Keeps the newest `keep` steps, at least 2: the one before stays until the newer is sealed."""
        if keep < 2:
            raise UserError(f"keep={keep} must be at least 2: the newest checkpoint may turn out damaged")
        self._directory, self._keep = Path(directory).absolute(), keep
        self._manager, self._thread, self._error = None, None, None
        self._at = None  # the step restored or saved last: on disk it is as it is in memory

    def save(self, step: int, state: Tree, iterator: Any, meta: Mapping[str, Any]) -> None:
        """Starts saving and returns once the arrays are copied: they may be donated then. What was just restored is not saved.

        Args:
          iterator: anything with `get_state()` giving JSON or bytes, the same in every process; or None.
          meta: JSON; its "identity" is compared on restore. Versions and array shapes are added here.

        Raises:
          UserError: this or the save before could not be written; the step exists already.
        """
        self.wait()
        if step == self._at:
            return
        if (self._directory / str(step)).exists():
            raise UserError(f"{self._directory / str(step)} exists already and this run did not come from it; move it away")
        named = arrays.flat(state)
        versions = {name: importlib.metadata.version(name) for name in ("jax", "orbax-checkpoint")}
        meta = {"versions": versions, **meta, "identity": meta["identity"], "step": step, "arrays": arrays.shapes(named)}
        items = {
            # Orbax refuses arrays of no entries; they are made anew on restore.
            "state": ocp.args.StandardSave({name: leaf for name, leaf in named.items() if leaf.size}),
            "meta": ocp.args.JsonSave(arrays.plain(meta)),
        }
        if iterator is not None:
            items["iterator"] = ocp.args.JsonSave(arrays.pack(iterator.get_state()))
        try:
            if self._manager is None:  # not before `restore` has moved damaged steps aside: the manager lists steps only once
                # Directories made in the background leave threads waiting for 20 minutes when a full disk stops the save.
                background = ocp.AsyncOptions(create_directories_asynchronously=False)
                options = ocp.CheckpointManagerOptions(max_to_keep=None, async_options=background)
                self._manager = ocp.CheckpointManager(self._directory, options=options)
            # force: the caller decides when to save; without it a refusal would be a silent False.
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as error:
            raise self._explained(step, error) from error
        self._at = step
        self._thread = threading.Thread(target=self._finish, args=(step,), name=f"seal-{step}")
        self._thread.start()

    def restore(self, abstract: Tree, iterator: Any, identity: Mapping[str, Any]) -> tuple[Tree, int, dict] | None:
        """(state, step, meta) of the newest good checkpoint, or None if nothing was saved. Sets the iterator's state.

        A damaged step is skipped with one logged line that says why, and moved aside once an older one has been restored.

        Args:
          abstract: the state as jax.ShapeDtypeStruct with shardings, of any mesh.
          identity: nested dict of what must be as it was at saving.

        Raises:
          UserError: there are checkpoints but none is good (nothing is changed); the identity differs; the arrays differ.
        """
        refused: dict[int, str] = {}
        while (step := seal.newest(self._directory, refused)) is not None:
            path = self._directory / str(step)
            try:
                meta = arrays.read_json(path / "meta")
                was, found = meta["identity"], meta["arrays"]
                if meta.get("step", step) != step:  # no seal has said so
                    raise ValueError(f"it is step {meta['step']} and was renamed")
                position = arrays.unpack(arrays.read_json(path / "iterator")) if (path / "iterator").is_dir() else None
            except Exception as error:
                seal.refuse(self._directory, refused, step, _unreadable(error))
                continue
            targets = arrays.flat(abstract)
            if arrays.part(targets, "params") and not arrays.part(found, "params"):  # as dlc import writes it
                raise UserError(
                    f"{path} has weights alone, nothing to go on training from: set train.steps back, or start another run from them "
                    f"with train.init_from={self._directory.parent}"
                )
            if changed := arrays.changes(was, arrays.plain(identity)):
                what = arrays.listed(changed)
                raise UserError(f"{path} is of another model or data ({what}); use another --workdir, or set the fields back")
            if wrong := arrays.mismatch(found, targets, dtypes=True):
                what = arrays.listed(wrong)
                raise UserError(f"{path} does not fit this model ({what}); use another --workdir, or the code that saved it")
            try:
                named = arrays.read(path / "state", targets)
            except (MemoryError, jax.errors.JaxRuntimeError):  # of the device, not of the files
                raise
            except Exception as error:
                seal.refuse(self._directory, refused, step, _unreadable(error))
                continue
            if iterator is not None and position is not None:
                iterator.set_state(position)
            self._settle(step, refused)
            self._at = step
            return arrays.unflat(abstract, named), step, meta
        if seal.agreed(any(reason != seal.EMPTY for reason in refused.values())):
            reasons = arrays.listed([f"{step}: {why}" for step, why in refused.items()])
            raise UserError(
                f"no checkpoint under {self._directory} is good ({reasons}); nothing was changed: put a copy back, or move the "
                "directory away to start afresh"
            )
        self._settle(None, refused)
        return None

    def wait(self) -> None:
        """Waits until the save in progress is sealed.

        Raises:
          UserError: it could not be written; the checkpoints before it are as they were.
        """
        if self._thread is None:
            return
        step = int(self._thread.name.split("-")[1])
        self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            self._at = None
            raise self._explained(step, error) from error
        seal.barrier("sealed")  # so that no process looks for a seal that process 0 has not written yet

    def latest(self) -> int | None:
        """The newest step that verifies, or None. It does not wait for a save in progress."""
        return seal.newest(self._directory, {}, log_refused=False)

    def close(self) -> None:
        """Waits, then frees what Orbax holds. Raises like `wait`."""
        try:
            self.wait()
        finally:
            manager, self._manager = self._manager, None
            if manager is not None:
                try:
                    manager.close()
                except Exception as error:  # a failed save's error once more; `wait` or `save` has raised it
                    seal.log.debug("closing: %s", error)

    def _finish(self, step: int) -> None:
        try:
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                seal.seal(self._directory, step)
                seal.prune(self._directory, self._keep)
        except BaseException as error:  # raised again by `wait`, in the thread that can do something about it
            self._error = error

    def _settle(self, step: int | None, refused: Mapping[int, str]) -> None:
        try:
            seal.settle(self._directory, step, refused)
        except OSError as error:
            raise UserError(f"{self._directory}: {error.strerror}; make it writable, then run the same command") from error

    def _explained(self, step: int, error: BaseException) -> BaseException:
        """A UserError of one line if it is about storage, else the error itself."""
        reason = seal.storage_reason(error)
        if reason is None:
            return error
        return UserError(
            f"the checkpoint of step {step} could not be written under {self._directory}: {reason}; make room, then run the "
            "same command: the checkpoints before it are untouched"
        )


def load_params(directory: str | Path, abstract: Tree, *, collection: str = "ema", step: int | None = None) -> Tree:
    """One part of a saved state, "ema" or "params", of the newest step that verifies, or of `step`; nothing else is read.

    Args:
      directory: of the checkpoints.
      abstract: the part as jax.ShapeDtypeStruct with shardings; a dtype other than the saved one casts.

    Raises:
      UserError: no good checkpoint; no such part in it; other names or shapes.
    """
    directory = Path(directory).absolute()
    path = directory / str(_chosen(directory, step))
    found = arrays.part(arrays.read_json(path / "meta")["arrays"], collection)
    if not found:
        raise UserError(f"{path} holds no {collection!r}; load collection='params' of a step trained without an average")
    targets = arrays.flat(abstract)
    if wrong := arrays.mismatch(found, targets, dtypes=False):
        raise UserError(f"{collection!r} of {path} does not fit ({arrays.listed(wrong)}); use the config it was trained with")
    named = arrays.read(path / "state", {f"{collection}.{name}": leaf for name, leaf in targets.items()})
    return arrays.unflat(abstract, arrays.part(named, collection))


def check_start(directory: str | Path, params: Tree, *, new: Sequence[str] = ()) -> tuple[Path, str, list[str]]:
    """(checkpoint, its collection, names that are not in it and so new) of what `warm_start` would do; params may be shapes.

    Raises:
      UserError: as `warm_start`.
    """
    where, directory = f"train.init_from={directory}", Path(directory).absolute()
    directory = directory / "checkpoints" if (directory / "checkpoints").is_dir() else directory
    try:
        path = directory / str(_chosen(directory, None))
    except UserError as error:
        what = str(error).removesuffix("; train this step first")
        raise UserError(f"{where}: {what}; give the folder of a trained step, such as W/encoder, or one of dlc import") from error
    saved, fresh = arrays.read_json(path / "meta")["arrays"], arrays.flat(params)
    collection = "ema" if arrays.part(saved, "ema") else "params"
    found, added = arrays.part(saved, collection), []
    for pattern in new:
        try:
            matched = [name for name in fresh if re.fullmatch(pattern, name)]
        except re.error as error:
            raise UserError(f"train.init_new: {pattern!r} is no regular expression ({error}); correct it") from error
        if not matched:
            raise UserError(f"train.init_new: {pattern!r} names no parameter of this model; one is {next(iter(fresh))}")
        added += [name for name in matched if name not in found]
    if wrong := arrays.mismatch(found, {name: leaf for name, leaf in fresh.items() if name not in added}, dtypes=False):
        raise UserError(
            f"{where}: {path} does not fit this model ({arrays.listed(wrong)}); set the model's fields as it has them, or name what "
            "may be absent there in train.init_new"
        )
    return path, collection, sorted(set(added))


def warm_start(directory: str | Path, params: Tree, *, new: Sequence[str] = ()) -> Tree:
    """`params` with every array that a trained step has (its average, if it keeps one) in place of the fresh one, placed alike.

    Args:
      directory: of a trained step, or of its checkpoints.
      new: regular expressions of whole dotted names that may be absent there: those keep their fresh values and are logged.

    Raises:
      UserError: no good checkpoint; arrays absent and not `new`, of another shape, or without a place here; `new` names nothing.
    """
    path, collection, added = check_start(directory, params, new=new)
    if added and jax.process_index() == 0:
        seal.log.warning("not in %s, so new: %s", path, ", ".join(added))
    fresh = arrays.flat(params)
    named = arrays.read(path / "state", {f"{collection}.{name}": leaf for name, leaf in fresh.items() if name not in added})
    return arrays.unflat(params, fresh | arrays.part(named, collection))


def identity_of(directory: str | Path) -> str:
    """A short hash of the checkpoint that `load_params` would load: of its bytes on disk, as sealed.

    Raises:
      UserError: no good checkpoint.
    """
    directory = Path(directory).absolute()
    return _identity(seal.path_of(directory, _chosen(directory, None)))


def identities(directory: str | Path) -> set[str]:
    """`identity_of` of every step that has a seal: by the seals alone, so at once and without other processes, and damage goes unseen."""
    directory = Path(directory).absolute()
    paths = [seal.path_of(directory, step) for step in seal.steps(directory)]
    found = set()
    for path in paths:
        with contextlib.suppress(OSError, ValueError):  # no seal, or a damaged one
            found.add(_identity(path))
    return found


def _identity(path: Path) -> str:
    return hashlib.sha256(json.dumps(json.loads(path.read_text()), sort_keys=True).encode()).hexdigest()[:16]


def _chosen(directory: Path, step: int | None) -> int:
    """The newest step that verifies, or `step` if it does; sealed, if no step had a seal."""
    refused = {} if step is None else {other: "" for other in seal.steps(directory) if other != step}
    chosen = seal.newest(directory, refused)
    if chosen is None:
        reasons = arrays.listed([f"{number}: {why}" for number, why in refused.items() if why])
        which = "" if step is None else f" of step {step}"
        raise UserError(f"no good checkpoint{which} under {directory}{reasons and f' ({reasons})'}; train this step first")
    if jax.process_index() == 0 and not seal.path_of(directory, chosen).exists():
        seal.seal(directory, chosen)
    seal.barrier("chosen")
    return chosen


def _unreadable(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"it does not restore ({type(error).__name__}: {lines[0][:160] if lines else ''})"
