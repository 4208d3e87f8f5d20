"""Models as data: what a module is made of as JSON, its arrays by name, and the way back."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import elastictok.quantizers as quantizers

from . import (
    _coordinates,
    _decoder,
    _elastictok,
    _encoder,
    _order,
    _patching,
    _place,
    _registers,
    _rope,
    _sample,
    _transformer,
    _visibility,
)

_MODULES = (
    _coordinates,
    _decoder,
    _elastictok,
    _encoder,
    _order,
    _patching,
    _place,
    _registers,
    _rope,
    _sample,
    _transformer,
    _visibility,
    quantizers,
)

# What model folders hold. A closed table: any other type makes a folder foreign.
DTYPES = {name: np.dtype(name) for name in ("float32", "int32", "uint32", "bool")}
DTYPES |= {str(jnp.dtype(jnp.bfloat16)): jnp.dtype(jnp.bfloat16)}
# Differences that an error lists in full; a foreign file could make it as long as it likes.
_LISTED = 100

Leaf = jax.Array | np.ndarray | jax.ShapeDtypeStruct
M = TypeVar("M")


class ModelFileError(ValueError):
    """A model file that cannot be read: missing, damaged, foreign or from a newer version."""


def class_table(classes: Sequence[type[eqx.Module]] = ()) -> dict[str, type[eqx.Module]]:
    """The classes that a saved model may name: this library's final ones and the user's own."""
    table: dict[str, type[eqx.Module]] = {}
    for module in _MODULES:
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


def named(module: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each array of a module, or what stands in its place, with its path: `encoder.kept`."""
    if isinstance(module, eqx.Module):
        for field in dataclasses.fields(cast(Any, module)):
            yield from named(getattr(module, field.name), _join(path, field.name))
    elif isinstance(module, tuple):
        for i, item in enumerate(module):
            yield from named(item, _join(path, str(i)))
    elif isinstance(module, Leaf):
        yield path, module


def replaced(module: M, change: Callable[[str, Any], Any], path: str = "") -> M:
    """The same module with each array replaced by what `change` makes of its path and itself."""
    value: Any = module
    if isinstance(value, eqx.Module):
        # Modules' constructors make fresh random weights; the fields are all there is to it.
        new = object.__new__(type(value))
        for field in dataclasses.fields(cast(Any, value)):
            child = replaced(getattr(value, field.name), change, _join(path, field.name))
            object.__setattr__(new, field.name, child)
        return cast(M, new)
    if isinstance(value, tuple):
        return cast(M, tuple(replaced(v, change, _join(path, str(i))) for i, v in enumerate(value)))
    if isinstance(value, Leaf):
        return change(path, value)
    return value


def describe(model: eqx.Module) -> dict[str, Any]:
    """The JSON description of a module: its class, every field, and shapes in place of arrays.

    **Raises:** `ValueError` for a field that JSON and model folders do not hold.
    """
    return _describe(model, "")


def undescribe(description: Any, classes: Mapping[str, type[eqx.Module]]) -> Any:
    """The module that a description speaks of, a `jax.ShapeDtypeStruct` in place of each array.

    **Raises:** `ModelFileError` naming the part that is no such description.
    """
    try:
        return _undescribe(description, "", classes)
    except RecursionError:
        raise ModelFileError("config.json: the model is nested too deep to be one") from None


def fingerprint(model: eqx.Module) -> str:
    """SHA-256 over a model's description and its arrays' bytes: names the maker of a token file."""
    digest = Fingerprint(describe(model))
    for name, array in sorted(named(model)):
        digest.add(name, np.asarray(array))
    return digest.hexdigest()


class Fingerprint:
    """`fingerprint`, one array at a time; they come in the order of their sorted names."""

    def __init__(self, description: dict[str, Any]):
        self._digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())

    def add(self, name: str, array: np.ndarray) -> None:
        """The next array."""
        self._digest.update(name.encode())
        # As bytes without a copy; bfloat16 has no buffer of its own.
        self._digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def hexdigest(self) -> str:
        """The hash of what came so far."""
        return self._digest.hexdigest()


def kind(leaf: Any) -> str:
    """Type and shape for people: `float32[16, 24]`."""
    return f"{leaf.dtype}{list(leaf.shape)}"


def differences(needed: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """What separates the tensors that are needed from those that were found, a line each.

    **Arguments:**

    - `needed`, `found`: `kind` by name.
    """
    lines = [f"lacks {name}, {needed[name]}" for name in needed if name not in found]
    lines += [
        f"holds {name}, {found[name]}, which the model has not"
        for name in found
        if name not in needed
    ]
    lines += [
        f"{name} is {found[name]}, where the model has {needed[name]}"
        for name in needed
        if name in found and found[name] != needed[name]
    ]
    return lines


def listed(lines: Sequence[str]) -> str:
    """Lines for an error message."""
    more = [f"and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    return "".join(f"\n  {line}" for line in [*lines[:_LISTED], *more])


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _describe(value: Any, path: str) -> Any:
    if isinstance(value, eqx.Module):
        fields = {
            field.name: _describe(getattr(value, field.name), _join(path, field.name))
            for field in dataclasses.fields(cast(Any, value))
        }
        # A field at its default is left out: a class may be given new ones, and what was described
        # before, or fingerprinted, is still the same.
        defaults = _defaults(type(value))
        told = {
            name: told
            for name, told in fields.items()
            if name not in defaults or told != _describe(defaults[name], name)
        }
        return {"class": type(value).__name__} | told
    if isinstance(value, Leaf):
        if str(value.dtype) not in DTYPES:
            raise ValueError(
                f"{path} has dtype {value.dtype}, which model folders do not hold; they hold "
                f"{', '.join(DTYPES)}"
            )
        return {"array": list(value.shape), "dtype": str(value.dtype)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return {"tuple": [_describe(item, _join(path, str(i))) for i, item in enumerate(value)]}
    if isinstance(value, np.dtype):
        return {"dtype": str(value)}
    raise ValueError(
        f"{path} is a {type(value).__name__}, which cannot be saved; use modules, arrays, tuples, "
        "numbers, strings and None"
    )


def _defaults(kind: type[eqx.Module]) -> dict[str, Any]:
    """The fields of a class that have a default, and which."""
    return {
        field.name: field.default
        for field in dataclasses.fields(cast(Any, kind))
        if field.default is not dataclasses.MISSING
    }


def _undescribe(value: Any, path: str, classes: Mapping[str, type[eqx.Module]]) -> Any:
    if not isinstance(value, dict):
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise ModelFileError(f"config.json: {path or 'model'} is a {type(value).__name__}")
    if "class" in value:
        name = value["class"]
        if not isinstance(name, str) or name not in classes:
            raise ModelFileError(
                f"config.json: {path or 'model'} is of class {name!r}, which is not in the table; "
                "pass your own classes as load(folder, classes=(YourClass,))"
            )
        fields = {key: item for key, item in value.items() if key != "class"}
        return _module(classes[name], fields, path, classes)
    if "array" in value:
        shape, dtype = value["array"], value.get("dtype")
        whole = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
        if not whole or not isinstance(dtype, str) or dtype not in DTYPES:
            raise ModelFileError(f"config.json: {path} is no array: {shape!r} of type {dtype!r}")
        return jax.ShapeDtypeStruct(tuple(shape), DTYPES[dtype])
    if isinstance(value.get("tuple"), list):
        return tuple(
            _undescribe(item, _join(path, str(i)), classes) for i, item in enumerate(value["tuple"])
        )
    if isinstance(value.get("dtype"), str) and value["dtype"] in DTYPES:
        return DTYPES[value["dtype"]]
    raise ModelFileError(f"config.json: {path or 'model'} is neither class, array, tuple nor dtype")


def _module(
    kind: type[eqx.Module],
    fields: Mapping[str, Any],
    path: str,
    classes: Mapping[str, type[eqx.Module]],
) -> eqx.Module:
    names = [field.name for field in dataclasses.fields(cast(Any, kind))]
    defaults = _defaults(kind)
    odd = (set(names) - set(defaults) - set(fields)) | (set(fields) - set(names))
    if odd:
        raise ModelFileError(
            f"config.json: the fields of {path or 'model'} ({kind.__name__}) differ in "
            f"{sorted(odd)}"
        )
    module = object.__new__(kind)
    for name in names:
        value = (
            _undescribe(fields[name], _join(path, name), classes)
            if name in fields
            else defaults[name]
        )
        object.__setattr__(module, name, value)
    for parent in kind.__mro__:
        check = vars(parent).get("__check_init__")
        if check is not None:
            try:
                check(module)
            # Checks speak to programmers, who pass the right types; a damaged file has any.
            except Exception as error:
                raise ModelFileError(f"config.json: {path or 'model'}: {error}") from error
    return module
