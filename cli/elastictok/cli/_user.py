"""Python files of the user's own: presets to train, and the classes that such models are made of.

A file is imported where the command line names it, and nowhere else: what a model folder says is
never imported.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import equinox as eqx
from jaxtyping import Array, Key

import elastictok.models
import elastictok.quantizers
from elastictok.models import ElasticTok, ModelFileError, Preset, load
from elastictok.quantizers import AbstractQuantizer

from ._names import SETTINGS, find

_IS = "a preset is a function of key that returns an ElasticTok, or an elastictok.models.Preset"


def names_file(preset: str) -> bool:
    """Whether a preset is named as `FILE.py:NAME`."""
    return ":" in preset or preset.endswith(".py")


def file_of(preset: str) -> Path:
    """`FILE.py` of `FILE.py:NAME`."""
    return Path(_split(preset)[0])


def user_preset(preset: str) -> Preset:
    """The preset of a file, whose `make` says in which line it failed.

    **Arguments:**

    - `preset`: `FILE.py:NAME`.

    **Raises:** `ValueError` if there is no such file, it cannot be imported or has no such preset.
    """
    file, name = _split(preset)
    module = load_file(Path(file))
    known = {name: value for name, value in vars(module).items() if _is_preset(value, module)}
    if not name:
        raise ValueError(f"{file}: say which preset, {file}:NAME ({_listed(list(known))})")
    if name in vars(module) and name not in known:
        value = vars(module)[name]
        kind = "takes no key" if isinstance(value, FunctionType) else f"is {type(value).__name__}"
        raise ValueError(f"{file}: {name} {kind}; {_IS}")
    if not known:
        raise ValueError(f"{file} has no preset {name!r}, nor another; {_IS}")
    value = find("preset", name, known, where=f"{file}: ")
    if not isinstance(value, Preset):
        about = (inspect.getdoc(value) or "").partition("\n\n")[0]
        value = Preset(value, about=" ".join(about.split()), source=file)
    return dataclasses.replace(value, make=_guarded(value.make, Path(file), name))


def user_classes(files: Sequence[Path]) -> tuple[type[eqx.Module], ...]:
    """All module classes that files have, their own and those that they import.

    **Raises:** `ValueError` for a file that is not there or cannot be imported.
    """
    found = {
        value: None
        for file in files
        for value in vars(load_file(file)).values()
        if isinstance(value, type) and issubclass(value, eqx.Module)
    }
    return tuple(found)


def load_model(folder: Path, code: Sequence[Path]) -> ElasticTok:
    """A model whose classes may be the user's.

    **Arguments:**

    - `folder`: model or run folder, or `hf:owner/name`.
    - `code`: the Python files with the classes.

    **Raises:** `ModelFileError`, `ValueError` as of `user_classes`.
    """
    try:
        return load(folder, classes=user_classes(code))
    except ModelFileError as error:
        what, found, _ = str(error).partition("; pass your own classes")
        if not found:
            raise
        raise ModelFileError(
            f"{what}; name the Python file that defines it: --code {_trained_from(folder)}"
        ) from error


def load_file(path: Path) -> ModuleType:
    """The module that a file makes; imported once, with what lies beside it importable too.

    **Raises:** `ValueError` if there is no such file, if it fails, in which line and why, and for a
    class with the name of one of the library's: a model folder could not tell them apart.
    """
    if path.suffix != ".py":
        raise ValueError(f"{path} is no Python file; write FILE.py")
    if not path.is_file():
        raise ValueError(f"there is no file {path}, seen from {Path.cwd()}")
    file = str(path.resolve())
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get("__file__") == file:
            return module
    spec = importlib.util.spec_from_file_location(path.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(Path(file).parent) not in sys.path:
        sys.path.insert(0, str(Path(file).parent))
    # Under its own name, for files beside it that import it, unless another one has that name.
    names = [file, *([] if path.stem in sys.modules else [path.stem])]
    sys.modules |= dict.fromkeys(names, module)
    try:
        with _where(path):
            spec.loader.exec_module(module)
        _check_names(path, module)
    except BaseException:
        for name in names:
            del sys.modules[name]
        raise
    return module


def _check_names(path: Path, module: ModuleType) -> None:
    for library in (elastictok.models, elastictok.quantizers):
        for name in vars(library).keys() & vars(module).keys():
            value = vars(module)[name]
            own = isinstance(value, type) and value.__module__ == module.__name__
            if own and issubclass(value, eqx.Module):
                raise ValueError(
                    f"{path} has a class {name}, and so has {library.__name__}: a model folder "
                    "could not tell them apart; rename yours"
                )


def _split(preset: str) -> tuple[str, str]:
    if preset.endswith(".py"):
        return preset, ""
    file, _, name = preset.rpartition(":")
    return file, name


def _is_preset(value: Any, module: ModuleType) -> bool:
    if isinstance(value, Preset):
        return True
    own = isinstance(value, FunctionType) and value.__module__ == module.__name__
    return own and "key" in inspect.signature(value).parameters


def _guarded(make: Callable[..., ElasticTok], path: Path, name: str) -> Callable[..., ElasticTok]:
    @functools.wraps(make)  # its arguments can still be asked for
    def guarded(*, key: Key[Array, ""], quantizer: AbstractQuantizer | None = None) -> ElasticTok:
        with _where(path):
            model = make(key=key) if quantizer is None else make(key=key, quantizer=quantizer)
        if not isinstance(model, ElasticTok):
            raise ValueError(f"{path}: {name} returns {type(model).__name__}, not an ElasticTok")
        return model

    return guarded


@contextlib.contextmanager
def _where(path: Path) -> Iterator[None]:
    """Says of whatever goes wrong in the file in which line it does."""
    try:
        yield
    except (Exception, SystemExit) as error:
        file = str(path.resolve())
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == file
        ]
        said = str(error)
        if isinstance(error, SyntaxError) and error.filename == file:
            lines.append(error.lineno)
            said = error.msg
        line = f", line {lines[-1]}" if lines else ""
        said = next(iter(said.splitlines()), "")
        raise ValueError(f"{path}{line}: {type(error).__name__}: {said}") from error


def _listed(names: Sequence[str]) -> str:
    return f"it has {', '.join(names)}" if names else f"it has none: {_IS}"


def _trained_from(folder: Path) -> str:
    """The file that a run folder says it was trained from, to be named in a message only."""
    try:
        preset = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))["preset"]
    except (OSError, ValueError, LookupError, TypeError):
        return "FILE.py"
    known = isinstance(preset, str) and names_file(preset) and preset.isprintable()
    return str(file_of(preset)) if known else "FILE.py"
