"""Models as folders: `config.json` says what the model is, `model.safetensors` holds its arrays.

The config is the tree of modules: class names from a closed table and static fields. Nothing is
ever unpickled or evaluated, and every array is compared with what the config announces.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

import elastictok.quantizers as quantizers

from . import _elastictok, _order, _patching, _place, _rope, _transformer
from ._elastictok import ElasticTok

FORMAT = "elastictok-model"
VERSION = 1
_DTYPES = {str(np.dtype(name)): np.dtype(name) for name in ("float32", "int32", "uint32", "bool")}
_DTYPES |= {str(jnp.dtype(jnp.bfloat16)): jnp.dtype(jnp.bfloat16)}


class ModelFileError(ValueError):
    """A model folder that cannot be read: missing, damaged, foreign or from a newer version."""


def class_table(classes: Sequence[type[eqx.Module]] = ()) -> dict[str, type[eqx.Module]]:
    """The classes that a saved model may name: this library's final ones and the user's own."""
    table: dict[str, type[eqx.Module]] = {}
    for module in (_elastictok, _order, _patching, _place, _rope, _transformer, quantizers):
        for name, value in vars(module).items():
            if isinstance(value, type) and issubclass(value, eqx.Module):
                table[name] = value
    for value in classes:
        if table.get(value.__name__, value) is not value:
            raise ValueError(
                f"a class named {value.__name__} is already in the table; rename yours"
            )
        table[value.__name__] = value
    return table


def describe(model: eqx.Module) -> dict[str, Any]:
    """The JSON description of a module: its class, static fields and the shapes of its arrays."""
    return _describe(model, "")


def fingerprint(model: eqx.Module) -> str:
    """SHA-256 over a model's description and its arrays' bytes: names the maker of a token file."""
    digest = hashlib.sha256(json.dumps(describe(model), sort_keys=True).encode())
    for name, array in sorted(_arrays(model)):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def save(model: ElasticTok, folder: str | os.PathLike[str]) -> None:
    """Writes a model folder; what was there stays readable until the new files are complete.

    **Arguments:**

    - `model`: any `ElasticTok`; classes that are not the library's must be passed to `load`.
    - `folder`: made if absent.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {"format": FORMAT, "version": VERSION, "model": describe(model)}
    sha = fingerprint(model)
    target = folder / "config.json"
    # Two files cannot be renamed at once. While the weights are being replaced, the config vouches
    # for the old and the new ones, if they are weights of the same model.
    before: list[str] = []
    if target.exists():
        try:
            old = _read_config(folder)
        except ModelFileError:
            old = {}
        if old.get("model") == config["model"]:
            before = old["sha256"]
    _write_json(target, config | {"sha256": [sha, *before]})
    arrays = {name: np.ascontiguousarray(array) for name, array in _arrays(model)}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
        weights = Path(scratch) / "model.safetensors"
        save_file(arrays, weights, metadata={"format": FORMAT, "version": str(VERSION)})
        os.replace(weights, folder / "model.safetensors")
    _write_json(target, config | {"sha256": [sha]})


def load(folder: str | os.PathLike[str], *, classes: Sequence[type[eqx.Module]] = ()) -> ElasticTok:
    """Reads a model folder (a run folder is one) and checks every shape and the hash.

    **Arguments:**

    - `folder`: holds `config.json` and `model.safetensors`.
    - `classes`: your own module classes that the model uses.

    **Raises:** `ModelFileError` naming the file, what is wrong with it and what to do.
    """
    folder = Path(folder)
    config = _read_config(folder)
    weights = folder / "model.safetensors"
    try:
        arrays = load_file(weights)
    except FileNotFoundError:
        raise ModelFileError(f"{weights} is missing; copy the whole model folder") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelFileError(f"{weights} is damaged ({error}); copy or train it again") from error
    unused = set(arrays)
    model = _build(config["model"], "", class_table(classes), arrays, unused, weights)
    if unused:
        raise ModelFileError(f"{weights} holds tensors the model lacks: {sorted(unused)[:5]}")
    if not isinstance(model, ElasticTok):
        raise ModelFileError(f"{folder} holds a {type(model).__name__}, not an ElasticTok")
    if fingerprint(model) not in config["sha256"]:
        raise ModelFileError(
            f"{weights} does not have the sha256 that config.json gives; one of them is damaged or "
            "from another model: copy the folder again"
        )
    return model


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFileError(
            f"{folder} is not a model folder: it has no config.json; give the output folder of "
            "elastictok train or elastictok demo"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ModelFileError(f"{path} is not an {FORMAT} config")
    if config.get("version") != VERSION:
        raise ModelFileError(
            f"{path} has format version {config.get('version')}; this library reads {VERSION}: "
            "update elastictok"
        )
    if not isinstance(config.get("sha256"), list) or "model" not in config:
        raise ModelFileError(f"{path} lacks the model's description or its sha256")
    return config


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=".saving-")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
    os.chmod(scratch, 0o644)
    os.replace(scratch, path)


def _describe(value: Any, path: str) -> Any:
    if isinstance(value, eqx.Module):
        fields = {
            field.name: _describe(getattr(value, field.name), f"{path}.{field.name}".lstrip("."))
            for field in dataclasses.fields(cast(Any, value))
        }
        return {"class": type(value).__name__} | fields
    if eqx.is_array(value) or isinstance(value, np.ndarray):
        if str(value.dtype) not in _DTYPES:
            raise ValueError(
                f"{path} has dtype {value.dtype}, which model folders do not hold; they hold "
                f"{', '.join(_DTYPES)}"
            )
        return {"array": list(value.shape), "dtype": str(value.dtype)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return {"tuple": [_describe(item, f"{path}.{i}") for i, item in enumerate(value)]}
    if isinstance(value, np.dtype):
        return {"dtype": str(value)}
    raise ValueError(
        f"{path} is a {type(value).__name__}, which cannot be saved; use modules, arrays, tuples, "
        "numbers, strings and dtypes"
    )


def _arrays(value: Any, path: str = "") -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(value, eqx.Module):
        for field in dataclasses.fields(cast(Any, value)):
            yield from _arrays(getattr(value, field.name), f"{path}.{field.name}".lstrip("."))
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _arrays(item, f"{path}.{i}")
    elif eqx.is_array(value) or isinstance(value, np.ndarray):
        yield path, np.asarray(value)


def _build(
    value: Any,
    path: str,
    table: Mapping[str, type[eqx.Module]],
    arrays: Mapping[str, np.ndarray],
    unused: set[str],
    weights: Path,
) -> Any:
    """The module that a description speaks of, its arrays taken from `arrays`."""
    if not isinstance(value, dict):
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise ModelFileError(f"config.json: {path or 'model'} is a {type(value).__name__}")
    if "class" in value:
        name = value["class"]
        if not isinstance(name, str) or name not in table:
            raise ModelFileError(
                f"config.json: {path or 'model'} is of class {name!r}, which is not in the table; "
                "pass your own classes as load(folder, classes=(YourClass,))"
            )
        kind = table[name]
        names = [field.name for field in dataclasses.fields(cast(Any, kind))]
        if set(names) != set(value) - {"class"}:
            wrong = sorted(set(names) ^ (set(value) - {"class"}))
            raise ModelFileError(
                f"config.json: the fields of {path or 'model'} ({name}) differ in {wrong}"
            )
        # Modules' constructors make fresh random weights; the fields are all there is to restore.
        module = object.__new__(kind)
        for field in names:
            child = f"{path}.{field}".lstrip(".")
            restored = _build(value[field], child, table, arrays, unused, weights)
            object.__setattr__(module, field, restored)
        for parent in kind.__mro__:
            if "__check_init__" in vars(parent):
                try:
                    vars(parent)["__check_init__"](module)
                except (ValueError, TypeError, AttributeError) as error:
                    raise ModelFileError(f"config.json: {path or 'model'}: {error}") from error
        return module
    if "array" in value:
        if path not in arrays:
            raise ModelFileError(f"{weights} lacks the tensor {path}")
        unused.discard(path)
        found = arrays[path]
        if list(found.shape) != value["array"] or str(found.dtype) != value.get("dtype"):
            raise ModelFileError(
                f"{weights}: {path} is {found.dtype}{list(found.shape)}, config.json says "
                f"{value.get('dtype')}{value['array']}"
            )
        return jnp.asarray(found)
    if "tuple" in value and isinstance(value["tuple"], list):
        return tuple(
            _build(item, f"{path}.{i}", table, arrays, unused, weights)
            for i, item in enumerate(value["tuple"])
        )
    if "dtype" in value and value["dtype"] in _DTYPES:
        return _DTYPES[value["dtype"]]
    raise ModelFileError(f"config.json: {path or 'model'} is neither class, array, tuple nor dtype")
