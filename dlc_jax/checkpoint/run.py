"""The checkpoints of one training run: its whole state, saved and restored."""

import importlib.metadata
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from dlc_jax.checkpoint import arrays, seal
from dlc_jax.errors import UserError
from dlc_jax.hosts.agreement import agreed, meet
from dlc_jax.typing import Tree


class Checkpoints:
    """The checkpoints of one training run.

    With several processes all of them call every method, in the same order, on a shared directory.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2):
        """Keeps the newest `keep` steps, at least 2: one stays until a newer one is sealed."""
        if keep < 2:
            raise UserError(f"keep={keep} must be at least 2: the newest may turn out damaged")
        self._directory, self._keep = Path(directory).absolute(), keep
        self._manager, self._thread, self._error = None, None, None
        self._at = None  # the step restored or saved last: on disk it is as it is in memory

    def save(self, step: int, state: Tree, iterator: Any, meta: Mapping[str, Any]) -> None:
        """Starts saving, and returns once the arrays are copied: they may be donated then.

        The step that was just restored is not saved again.

        Args:
          iterator: anything with `get_state()`, JSON or bytes alike in every process; or None.
          meta: JSON; `restore` compares its "identity". Versions and array shapes are added here.

        Raises:
          UserError: this or the save before could not be written; the step exists already.
        """
        self.wait()
        if step == self._at:
            return
        if (path := self._directory / str(step)).exists():
            raise UserError(
                f"{path} exists already and this run did not come from it; move it away"
            )
        named = arrays.flat(state)
        versions = {name: importlib.metadata.version(name) for name in ("jax", "orbax-checkpoint")}
        own = {"identity": meta["identity"], "step": step, "arrays": arrays.shapes(named)}
        items = {
            # Orbax refuses arrays of no entries; they are made anew on restore.
            "state": ocp.args.StandardSave({k: leaf for k, leaf in named.items() if leaf.size}),
            "meta": ocp.args.JsonSave(arrays.plain({"versions": versions, **meta, **own})),
        }
        if iterator is not None:
            items["iterator"] = ocp.args.JsonSave(arrays.pack(iterator.get_state()))
        try:
            if self._manager is None:
                # Not before `restore` has moved damaged steps aside: it lists steps only once.
                # Directories made in the background leave threads waiting for 20 minutes when a
                # full disk stops the save.
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

    def restore(
        self,
        abstract: Tree,
        iterator: Any,
        identity: Mapping[str, Any],
        *,
        former: Callable[[dict], dict] = lambda saved: saved,
    ) -> tuple[Tree, int, dict] | None:
        """(state, step, meta) of the newest good checkpoint, or None if nothing was saved.

        Sets the iterator's state. A damaged step is skipped with one logged line that says why, and
        moved aside once an older one has been restored.

        Args:
          abstract: the state as jax.ShapeDtypeStruct with shardings, of any mesh.
          identity: nested dict of what must be as it was at saving.
          former: (saved identity) -> its present form, where fields were since renamed or added.

        Raises:
          UserError: there are checkpoints but none is good (nothing is changed); the identity or
            the arrays differ.
        """
        refused: dict[int, str] = {}
        targets = arrays.flat(abstract)
        while (step := seal.newest(self._directory, refused)) is not None:
            path = self._directory / str(step)
            try:
                meta = arrays.read_json(path / "meta")
                saved_identity, saved = meta["identity"], meta["arrays"]
                if meta.get("step", step) != step:  # no seal has said so
                    raise ValueError(f"it is step {meta['step']} and was renamed")
                position = None
                if (path / "iterator").is_dir():
                    position = arrays.unpack(arrays.read_json(path / "iterator"))
            except Exception as error:
                seal.refuse(self._directory, refused, step, _unreadable(error))
                continue
            before, now = (arrays.plain(each) for each in (former(saved_identity), identity))
            self._check(path, before, now, saved, targets)
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
        if agreed("refused", any(reason != seal.EMPTY for reason in refused.values())):
            reasons = arrays.listed([f"{step}: {why}" for step, why in refused.items()])
            raise UserError(
                f"no checkpoint under {self._directory} is good ({reasons}); nothing was changed: "
                "put a copy back, or move the directory away to start afresh"
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
        meet("sealed")  # so that no process looks for a seal that process 0 has not written yet

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
                except Exception as error:  # a failed save's once more; `wait` or `save` raised it
                    seal.log.debug("closing: %s", error)

    def _finish(self, step: int) -> None:
        try:
            self._manager.wait_until_finished()
            seal.seal(self._directory, step)
            if jax.process_index() == 0:
                seal.prune(self._directory, self._keep)
        except BaseException as error:  # raised by `wait`, in the thread that can act on it
            self._error = error

    def _check(
        self, path: Path, saved_identity, identity, saved: Mapping, targets: Mapping
    ) -> None:
        # dlc import writes weights only.
        if arrays.part(targets, "params") and not arrays.part(saved, "params"):
            raise UserError(
                f"{path} has weights only, so training cannot resume from it; set train.steps "
                f"back, or start another run with train.init_from={self._directory.parent}"
            )
        if changed := arrays.changes(saved_identity, identity):
            raise UserError(
                f"{path} is of another model or data ({arrays.listed(changed)}); use another "
                "--workdir, or set the fields back"
            )
        if wrong := arrays.mismatch(saved, targets, dtypes=True):
            raise UserError(
                f"{path} does not fit this model ({arrays.listed(wrong)}); use another --workdir, "
                "or the code that saved it"
            )

    def _settle(self, step: int | None, refused: Mapping[int, str]) -> None:
        try:
            seal.settle(self._directory, step, refused)
        except OSError as error:
            raise UserError(
                f"{self._directory}: {error.strerror}; make it writable, then run the same command"
            ) from error

    def _explained(self, step: int, error: BaseException) -> BaseException:
        """A UserError of one line if it is about storage, else the error itself."""
        reason = seal.storage_reason(error)
        if reason is None:
            return error
        return UserError(
            f"the checkpoint of step {step} could not be written under {self._directory}: "
            f"{reason}; make room, then run the same command: the checkpoints before it are "
            "untouched"
        )


def _unreadable(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"it does not restore ({type(error).__name__}: {lines[0][:160] if lines else ''})"
