"""Checkpoints: written by Orbax, sealed by a list of hashes, verified before they are read.

Orbax commits a step atomically but stores no checksum of its arrays: a flipped byte comes back as a
wrong weight. So each step's folder gets a `SHA256SUMS` after the commit (`sha256sum -c` reads it
too). A folder without one was cut off while being written; one that differs from it is damaged.
"""

import contextlib
import dataclasses
import gc
import hashlib
import logging
import os
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import Array

from ._errors import CheckpointError
from ._processes import from_first_process, is_first_process, wait_for_all
from ._step import TrainState

_SEAL = "SHA256SUMS"
_PAUSES = (1.0, 5.0)  # seconds before a failed save is tried again
_FORMAT = 1


class Checkpoints:
    """The newest `keep` states of a run, in `folder/<step>`.

    On several processes each makes one of these with the same folder, on a file system that they
    share, and every call is made by all of them.
    """

    def __init__(self, folder: Path, *, keep: int = 2):
        """**Arguments:**

        - `folder`: made if absent. Steps cut off while being written are removed from it.
        - `keep`: older ones are deleted once a newer one is complete.
        """
        self._folder = folder.absolute()
        if is_first_process():
            self._folder.mkdir(parents=True, exist_ok=True)
            for cut_off in set(_steps(self._folder)) - set(_sealed(self._folder)):
                shutil.rmtree(self._folder / str(cut_off))
        wait_for_all("checkpoints opened")
        self._keep = keep
        self._manager = self._open()
        self._writing: threading.Thread | None = None
        self._failure: CheckpointError | None = None

    def start(self, state: TrainState, loop: dict[str, Any]) -> None:
        """Copies a state, and writes and seals a checkpoint of it in the background.

        Waits for the one before, and if that failed, does the work of `save`. What becomes of this
        one, `failed` says.

        **Arguments, Raises:** as of `save`.
        """
        self.wait()
        if self.failed():
            self.save(state, loop)
        else:
            self._start(state, loop)

    def save(self, state: TrainState, loop: dict[str, Any]) -> None:
        """Writes and seals a checkpoint; returns when it is on disk.

        **Arguments:**

        - `state`: names the step.
        - `loop`: what the loop must know to go on; JSON.

        **Raises:** `CheckpointError` if it fails again and again.
        """
        self.wait()
        for pause in (0.0, *_PAUSES):
            if self._failure is not None:
                warnings.warn(f"{self._failure}; trying again", stacklevel=2)
                time.sleep(pause)
                self._reopen()
            self._failure = None
            self._start(state, loop)
            self.wait()
            if self._failure is None:
                return
        failure, self._failure = self._failure, None
        assert failure is not None  # else the loop would have returned
        raise failure

    def _start(self, state: TrainState, loop: dict[str, Any]) -> None:
        step, items = self._items(state, loop)
        try:
            _attempt(lambda: self._begin(step, items), *self._said(step))
        except CheckpointError as error:
            self._failure = error
            return
        self._writing = threading.Thread(
            target=self._finish, args=(step,), name="elastictok-checkpoint"
        )
        self._writing.start()

    def failed(self) -> bool:
        """Whether the last checkpoint that was started could not be written: `save` one now."""
        return self._failure is not None

    def wait(self) -> None:
        """Returns when nothing is being written."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None

    def newest(self) -> int | None:
        """The newest step whose files are what was written; None if there is no checkpoint.

        Damaged ones are moved to `damaged` beside the folder, with a warning.

        **Raises:** `CheckpointError` if there are checkpoints and all are damaged.
        """
        good, damaged = self._verified() if is_first_process() else (None, False)
        found = from_first_process([-1 if good is None else good, int(damaged)])
        good, damaged = (None if found[0] < 0 else found[0]), bool(found[1])
        if damaged:
            self._reopen()
        if damaged and good is None:
            raise CheckpointError(
                f"every checkpoint in {self._folder} was damaged; start a new run, from this one's "
                "model.safetensors if that still loads"
            )
        return good

    def _verified(self) -> tuple[int | None, bool]:
        """The newest good step, and whether there were damaged ones, which are moved aside."""
        damaged = []
        good = None
        for step in reversed(_steps(self._folder)):
            fault = _fault(self._folder / str(step))
            if fault is None:
                good = step
                break
            damaged.append((step, fault))
        for step, fault in damaged:
            aside = _move_aside(self._folder / str(step))
            warnings.warn(
                f"checkpoint {step} is damaged ({fault}); moved to {aside}, "
                + ("going back to an earlier one" if good is None else f"going back to {good}"),
                stacklevel=3,
            )
        return good, bool(damaged)

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Reads a checkpoint.

        **Arguments:**

        - `step`: one that `newest` gave.
        - `like`: a state of the same run; gives shapes, types and devices, its values are unused.

        **Returns:** the state and what `save` was given as `loop`.

        **Raises:** `CheckpointError` naming what differs between the checkpoint and `like`.
        """
        place = f"checkpoint {step} in {self._folder}"
        wanted = _arrays(like)
        meta = self._read(step, "meta", ocp.args.JsonRestore())
        if meta["format"] != _FORMAT:
            raise CheckpointError(
                f"{place} has format {meta['format']}, this library reads {_FORMAT}: use the "
                "version of elastictok that wrote it"
            )
        _refuse_differences(place, meta["settings"], dict(_settings(like.model)))
        _refuse_differences(place, meta["arrays"], _kinds(wanted))
        template = {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
            for name, array in wanted.items()
        }
        arrays = self._read(step, "state", ocp.args.StandardRestore(template))
        return _with_arrays(like, arrays), meta["loop"]

    def close(self) -> None:
        """Waits for what is being written, and ends Orbax's threads."""
        self.wait()
        self._end()

    def _end(self) -> None:
        with contextlib.suppress(CheckpointError):  # a failed save once more, which was reported
            _attempt(self._manager.close, "closing")

    def _items(self, state: TrainState, loop: dict[str, Any]) -> tuple[int, Any]:
        arrays = _arrays(state)
        if jax.default_backend() == "cpu":
            # Elsewhere Orbax copies them to the host; here it would go on reading the memory that
            # the next step overwrites.
            arrays = {name: array.copy() for name, array in arrays.items()}
        meta = {
            "format": _FORMAT,
            "arrays": _kinds(arrays),
            "settings": dict(_settings(state.model)),
            "loop": loop,
        }
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta)
        )
        return int(state.step), items

    def _said(self, step: int) -> tuple[str, str]:
        return (
            f"step {step} could not be saved in {self._folder}",
            "; earlier checkpoints are untouched: make room or permit writing, then resume",
        )

    def _begin(self, step: int, items: Any) -> None:
        if not self._manager.save(step, args=items, force=True):
            raise OSError("Orbax skipped it")

    def _finish(self, step: int) -> None:
        """In a thread of its own: Orbax commits, then the step is sealed."""

        def finish() -> None:
            self._manager.wait_until_finished()
            if is_first_process():
                _seal(self._folder / str(step))

        try:
            _attempt(finish, *self._said(step))
        except CheckpointError as error:
            self._failure = error

    def _read(self, step: int, item: str, how: ocp.args.CheckpointArgs) -> Any:
        items = _attempt(
            lambda: self._manager.restore(step, args=ocp.args.Composite(**{item: how})),
            f"checkpoint {step} in {self._folder} could not be read",
        )
        return cast(Any, items)[item]

    def _reopen(self) -> None:
        """After a failure: what was not sealed must not count among the newest."""
        self._end()
        if is_first_process():
            for cut_off in set(_steps(self._folder)) - set(_sealed(self._folder)):
                shutil.rmtree(self._folder / str(cut_off), ignore_errors=True)
        wait_for_all("checkpoints opened again")
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep,
            save_interval_steps=1,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )
        return ocp.CheckpointManager(self._folder, options=options)


def latest_step(run: str | os.PathLike[str]) -> int | None:
    """The newest step that a run folder has a complete checkpoint of (not verified), or None."""
    return max(_sealed(Path(run) / "checkpoints"), default=None)


_Result = TypeVar("_Result")


def _attempt(action: Callable[[], _Result], failure: str, advice: str = "") -> _Result:
    """What `action` returns. Whatever it raises becomes a `CheckpointError` of one line.

    Orbax logs a failure with pages of its insides and goes on in other threads, which complain
    themselves, some of them not before the program ends. What matters of it is in our own error.
    """
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = _without_closed_loops(hook)
    try:
        try:
            result = action()
        except Exception as error:  # Orbax and tensorstore raise many kinds
            reason = _short(error)
        else:
            sys.unraisablehook = hook
            return result
        # Only here, where nothing refers to the error any more, can its coroutines be collected.
        _settle()
    finally:
        logger.setLevel(level)
    raise CheckpointError(f"{failure}: {reason}{advice}")


def _without_closed_loops(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """After a failure tensorstore reports dozens of times to event loops that Orbax has closed."""

    def filtered(what: Any) -> None:
        if str(what.exc_value) != "Event loop is closed":
            hook(what)

    return filtered


def _settle() -> None:
    """Waits for Orbax's threads after a failure; not for ever: some wait for one that failed."""
    deadline = time.monotonic() + 10
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            # Not their own join, which raises what the thread raised.
            threading.Thread.join(thread, timeout=max(0.0, deadline - time.monotonic()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # coroutines that were never awaited
        gc.collect()
    sys.unraisablehook = hook


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def _sealed(folder: Path) -> list[int]:
    """The steps that were written to the end."""
    return [step for step in _steps(folder) if (folder / str(step) / _SEAL).exists()]


def _sums(folder: Path) -> str:
    """One line per file, as sha256sum writes them: a function of the folder's content alone."""
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != _SEAL:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            lines.append(f"{digest}  {path.relative_to(folder).as_posix()}\n")
    return "".join(lines)


def _seal(folder: Path) -> None:
    scratch = folder.parent / f".{folder.name}.{_SEAL}"
    with open(scratch, "w", encoding="utf-8") as file:
        file.write(_sums(folder))
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, folder / _SEAL)


def _fault(folder: Path) -> str | None:
    """What is wrong with a sealed folder; None if its bytes are those that were sealed."""
    try:
        written, found = (folder / _SEAL).read_bytes(), _sums(folder).encode()
    except OSError as error:
        return _short(error)
    if written == found:
        return None
    changed = set(written.splitlines()) ^ set(found.splitlines())
    names = sorted({line.split(b"  ", 1)[-1].decode(errors="replace") for line in changed})
    return "changed: " + ", ".join(names[:3]) if names else f"changed: {_SEAL}"


def _move_aside(folder: Path) -> Path:
    shelf = folder.parent.parent / "damaged"
    shelf.mkdir(exist_ok=True)
    count = sum(path.name.split("-")[0] == folder.name for path in shelf.iterdir())
    return folder.rename(shelf / f"{folder.name}-{count + 1}")


def _arrays(state: TrainState) -> dict[str, Array]:
    """The state's arrays by path. Keys as their numbers, which outlive changes of jax."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(eqx.filter(state, eqx.is_array))
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): _plain(leaf)
        for path, leaf in leaves
    }


def _with_arrays(state: TrainState, arrays: dict[str, Array]) -> TrainState:
    old, rest = eqx.partition(state, eqx.is_array)
    leaves, structure = jax.tree.flatten(old)
    new = [
        jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else array
        for leaf, array in zip(leaves, (arrays[name] for name in _arrays(state)), strict=True)
    ]
    return eqx.combine(jax.tree.unflatten(structure, new), rest)


def _is_key(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf: Array) -> Array:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _kinds(arrays: dict[str, Array]) -> dict[str, str]:
    return {name: f"{array.dtype}{list(array.shape)}" for name, array in arrays.items()}


def _settings(value: Any, path: str = "model") -> Iterator[tuple[str, str]]:
    """What a model is besides its arrays: heads, order and the like, which shapes do not show."""
    if isinstance(value, eqx.Module):
        yield path, type(value).__name__
        for field in dataclasses.fields(cast(Any, value)):
            yield from _settings(getattr(value, field.name), f"{path}.{field.name}")
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value):
            yield from _settings(item, f"{path}.{i}")
    elif not eqx.is_array(value):
        yield path, repr(value)


def _refuse_differences(place: str, saved: dict[str, str], wanted: dict[str, str]) -> None:
    differences = [
        f"{name} is {saved.get(name, 'absent')} there and {wanted.get(name, 'absent')} here"
        for name in sorted(saved | wanted)
        if saved.get(name) != wanted.get(name)
    ]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise CheckpointError(
            f"{place} is of another model or optimizer: {'; '.join(differences[:3])}{more}; resume "
            "with the settings that the run was started with, or start a new run from its weights"
        )


def _short(error: Exception) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:300]}"
