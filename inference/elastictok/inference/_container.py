"""Token files as bytes: safetensors with one versioned, checksummed block of JSON facts."""

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

FORMAT = "elastictok.tokens"
VERSION = 1

# Everything that the format may hold, little-endian as safetensors has it. A closed table: a dtype
# that is not in it makes the file foreign.
_DTYPES = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("<u1"),
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}


class TokenFileError(ValueError):
    """A token file cannot be read, or does not belong to the model that should decode it."""


def smallest_unsigned(largest: int) -> np.dtype:
    """The smallest unsigned integer type that holds `largest`.

    **Raises:** `ValueError` if 32 bits do not.
    """
    for name in ("U8", "U16", "U32"):
        if 0 <= largest <= np.iinfo(_DTYPES[name]).max:
            return _DTYPES[name]
    raise ValueError(f"{largest} does not fit into an unsigned integer of 32 bits")


def write(path: Path, facts: Mapping[str, object], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes beside the target, then renames: a reader sees the old file or the new one."""
    arrays = {name: np.ascontiguousarray(array) for name, array in sorted(arrays.items())}
    about = {"version": VERSION, "sha256": _checksum(facts, arrays), "facts": facts}
    # One entry only: safetensors writes several in no particular order, and equal tokens should
    # make equal files.
    metadata = {FORMAT: _canonical(about)}
    raw = safetensors.numpy.save(arrays, metadata=metadata)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with beside.open("xb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def read(path: Path) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    """The facts and arrays of a file whose checksum is right.

    **Raises:** `TokenFileError` if it is not; `OSError` if the file cannot be opened.
    """
    raw = path.read_bytes()
    try:
        # Checks that the header's offsets cover the body exactly and agree with its shapes.
        tensors = safetensors.deserialize(raw)
    except safetensors.SafetensorError as error:
        raise TokenFileError(
            f"{path} is not a safetensors file, or is damaged or cut short ({error})"
        ) from error
    about = _about(path, raw)
    arrays = {name: _array(path, name, tensor) for name, tensor in sorted(tensors)}
    facts = about.get("facts")
    if not isinstance(facts, dict) or about.get("sha256") != _checksum(facts, arrays):
        raise TokenFileError(
            f"{path} is damaged: its content does not have the checksum that it was written with; "
            "copy or encode it again"
        )
    return facts, arrays


def _about(path: Path, raw: bytes) -> dict[str, Any]:
    """The format's entry in a header that `safetensors.deserialize` has accepted."""
    header = raw[8 : 8 + int.from_bytes(raw[:8], "little")]
    metadata = json.loads(header).get("__metadata__") or {}
    if FORMAT not in metadata:
        raise TokenFileError(
            f"{path} is a safetensors file without {FORMAT!r} in its metadata: it was not written "
            "by Tokens.save, or is damaged"
        )
    try:
        about = json.loads(metadata[FORMAT])
    except (ValueError, RecursionError) as error:
        raise TokenFileError(f"{path} is damaged: its metadata is not JSON ({error})") from error
    if not isinstance(about, dict) or type(about.get("version")) is not int:
        raise TokenFileError(f"{path} is damaged: its metadata states no version")
    if about["version"] != VERSION:
        raise TokenFileError(
            f"{path} has version {about['version']} of the format; this elastictok reads version "
            f"{VERSION}: install the release that wrote it, or encode again"
        )
    return about


def _array(path: Path, name: str, tensor: Mapping[str, Any]) -> np.ndarray:
    dtype = _DTYPES.get(tensor["dtype"])
    if dtype is None:
        raise TokenFileError(f"{path} is foreign or damaged: {name} is of type {tensor['dtype']}")
    try:
        array = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
    except ValueError as error:  # no values, but a shape that is too large to write down
        raise TokenFileError(f"{path} is damaged: {name} has no such shape ({error})") from error
    if dtype == np.bool_ and np.any(array.view(np.uint8) > 1):
        raise TokenFileError(f"{path} is damaged: {name} holds bytes that are neither 0 nor 1")
    return array


def _canonical(facts: Mapping[str, object]) -> str:
    return json.dumps(facts, sort_keys=True)


def _checksum(facts: Mapping[str, object], arrays: Mapping[str, np.ndarray]) -> str:
    """Over the facts and, in the order of their names, each array's name, type, shape and bytes."""
    digest = hashlib.sha256()
    parts = [_canonical(facts).encode()]
    for name, array in arrays.items():
        about = json.dumps([name, array.dtype.newbyteorder("<").str, list(array.shape)])
        parts += [about.encode(), array.tobytes()]
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
