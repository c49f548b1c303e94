"""The checkpoints of one training run: its whole state, saved and restored."""

import importlib.metadata
import math
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from dlc_jax import remote
from dlc_jax.checkpoint import arrays, clearing, seal
from dlc_jax.checkpoint.retention import Retention
from dlc_jax.checkpoint.together import Elsewhere, Together
from dlc_jax.errors import Interrupted, UserError
from dlc_jax.hosts.agreement import agreed
from dlc_jax.typing import Tree


class Checkpoints:
    """The checkpoints of one training run.

    With several processes all of them call every method, in the same order, on a shared directory.
    """

    def __init__(
        self, directory: str | Path, *, keep: int = 2, keep_period: int = 0, keep_best: str = ""
    ):
        """Which steps stay: see retention.py."""
        self._retention = Retention(keep=keep, keep_period=keep_period, keep_best=keep_best)
        self._directory = Path(directory).absolute()
        self._writer, self._thread, self._error = None, None, None
        self._together = None  # the meetings of the save in progress
        self._at = None  # the step restored or saved last: on disk it is as it is in memory

    def save(
        self,
        step: int,
        state: Tree,
        iterator: Any,
        meta: Mapping[str, Any],
        *,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts saving, and returns once the arrays are copied: they may be donated then.

        The step that was just restored is not saved again.

        Args:
          iterator: anything with `get_state()`, JSON or bytes alike in every process; or None.
          meta: JSON; `restore` compares its "identity". Versions and array shapes are added here.
          metrics: what was measured at this step, by name; `keep_best` reads one of them.

        Raises:
          UserError: this or the save before could not be written, in whichever process; the step
            exists already; `keep_best` is not among the metrics (the save goes on).
        """
        self.wait()
        if step == self._at:
            return
        refused = self._refusal(step) if jax.process_index() == 0 else None
        if refused := agreed("save", refused):
            raise UserError(refused)
        metrics = metrics or {}
        named = arrays.flat(state)
        versions = {name: importlib.metadata.version(name) for name in ("jax", "orbax-checkpoint")}
        own = {"identity": meta["identity"], "step": step, "arrays": arrays.shapes(named)}
        own |= {"format": arrays.FORMAT, "metrics": _finite(metrics)}
        items = {
            # Orbax refuses arrays of no entries; they are made anew on restore.
            "state": ocp.args.StandardSave({k: leaf for k, leaf in named.items() if leaf.size}),
            "meta": ocp.args.JsonSave(arrays.plain({"versions": versions, **meta, **own})),
        }
        if iterator is not None:
            items["iterator"] = ocp.args.JsonSave(arrays.pack(iterator.get_state()))
        path, failed = self._directory / str(step), None
        self._together = Together(f"{self._directory.parent.name}/save", path)
        try:
            if self._writer is None:
                # Directories made in the background leave threads waiting for 20 minutes when a
                # full disk stops the save.
                background = ocp.AsyncOptions(
                    create_directories_asynchronously=False,
                    barrier_sync_fn=lambda **barrier: self._together.barrier(**barrier),
                )
                self._writer = ocp.AsyncCheckpointer(
                    ocp.CompositeCheckpointHandler(), async_options=background
                )
            self._together.begin(["state"])
            self._writer.save(path, args=ocp.args.Composite(**items))
        except Exception as error:
            failed = error
        self._at = step
        arguments, name = (step, self._together, failed), f"seal-{step}"
        self._thread = threading.Thread(target=self._finish, args=arguments, name=name)
        self._thread.start()
        if failed is not None:
            self.wait()
        self._retention.check(metrics)

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
          UserError: there are checkpoints but none is good; a newer version saved the newest; the
            identity or the arrays differ. Nothing is changed.
        """
        refused: dict[int, str] = {}
        targets = arrays.flat(abstract)
        while (step := seal.newest(self._directory, refused)) is not None:
            path = self._directory / str(step)
            try:
                meta = arrays.read_meta(path)
                saved_identity, saved = meta["identity"], meta["arrays"]
                if meta.get("step", step) != step:  # no seal has said so
                    raise ValueError(f"it is step {meta['step']} and was renamed")
                position = None
                if (path / "iterator").is_dir():
                    position = arrays.unpack(arrays.read_json(path / "iterator"))
            except UserError:
                raise
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
        lost = {seal.EMPTY} | ({seal.UNSEALED} if remote.is_copy(self._directory) else set())
        if agreed("refused", not lost.issuperset(refused.values())):
            reasons = arrays.listed([f"{step}: {why}" for step, why in refused.items()])
            raise UserError(
                f"no checkpoint under {self._directory} is good ({reasons}); nothing was changed: "
                "put a copy back, or move the directory away to start afresh"
            )
        self._settle(None, refused)
        return None

    def check(self) -> None:
        """Raises like `wait` if the save in progress has failed; waits for nobody."""
        if self._error is not None:
            self.wait()

    def wait(self) -> None:
        """Waits until the save in progress is sealed.

        Raises:
          UserError: it could not be written, in whichever process; the checkpoints before it are
            as they were.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            self._at = None
            raise error

    def latest(self) -> int | None:
        """The newest step that verifies, or None. It does not wait for a save in progress."""
        return seal.newest(self._directory, {}, log_refused=False)

    def close(self) -> None:
        """Waits, then frees what Orbax holds. Raises like `wait`."""
        try:
            self.wait()
        finally:
            writer, self._writer = self._writer, None
            if writer is not None:
                try:
                    writer.close()
                except Exception as error:  # a failed save's once more; `wait` or `save` raised it
                    seal.log.debug("closing: %s", error)

    def _finish(self, step: int, together: Together, failed: Exception | None) -> None:
        """In the background; at its end all processes know how the save ended in all of them."""
        try:
            if failed is not None:
                raise failed
            self._writer.wait_until_finished()
            seal.seal(self._directory, step, together)
            try:
                if jax.process_index() == 0:
                    clearing.prune(self._directory, self._retention)
                together.clear()
            except remote.StoreError as error:  # the step is there; the next save tries again
                seal.log.warning("%s", error)
            together()
        except BaseException as error:  # raised by `wait`, in the thread that can act on it
            self._error = self._explained(step, error, together)

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
            clearing.settle(self._directory, step, refused)
        except OSError as error:
            raise UserError(
                f"{self._directory}: {error.strerror}; make it writable, then run the same command"
            ) from error

    def _refusal(self, step: int) -> str | None:
        """Why a step cannot be saved, as far as one process can see before all of them begin."""
        if (path := self._directory / str(step)).exists():
            return f"{path} exists already and this run did not come from it; move it away"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._directory) as file:
                file.write(bytes(512))
        except OSError as error:
            return self._unwritable(step, error.strerror or str(error))
        return None

    def _explained(self, step: int, error: BaseException, together: Together) -> BaseException:
        """What this process raises: the same UserError in all if one of them failed by storage."""
        reason = seal.storage_reason(error)
        passing = isinstance(error, remote.Unreachable)
        said = [reason is not None, reason or f"{type(error).__name__}: {error}", passing]
        try:
            failures = together.fail(said)
        except Interrupted as ended:
            return ended
        full = {who: why for who, (is_storage, why, _) in failures.items() if is_storage}
        who = min(full or failures)
        by = f" by process {who}" if jax.process_count() > 1 else ""
        if full:
            kind = Interrupted if failures[who][2] else UserError  # 75: try again, or 2
            explained: BaseException = kind(self._unwritable(step, full[who], by))
        elif isinstance(error, Elsewhere):
            explained = RuntimeError(f"step {step} could not be saved{by}: {failures[who][1]}")
        else:
            return error
        explained.__cause__ = error
        return explained

    def _unwritable(self, step: int, reason: str, by: str = "") -> str:
        return (
            f"the checkpoint of step {step} could not be written under {self._directory}{by}: "
            f"{reason}; make room, then run the same command: the checkpoints before it are "
            "untouched"
        )


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    numbers = {name: float(value) for name, value in metrics.items()}
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def _unreadable(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"it does not restore ({type(error).__name__}: {lines[0][:160] if lines else ''})"
