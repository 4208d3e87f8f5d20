"""Small safetensors files with one versioned entry of facts, and a checksum over all of it."""

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

_DTYPES = {"U8": np.dtype("u1"), "F32": np.dtype("<f4")}


class Kind(NamedTuple):
    """A kind of file.

    - `name`: of the entry in the metadata.
    - `version`: that is written, and the only one that is read.
    - `what`: for people, such as "a scorer".
    - `error`: raised for files that are none.
    - `most_bytes`: larger files are not read.
    """

    name: str
    version: int
    what: str
    error: type[ValueError]
    most_bytes: int


def write_sealed(
    kind: Kind, path: Path, facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    """Writes beside the target, then renames: a reader sees the old file or the new one.

    **Arguments:**

    - `facts`: anything that JSON can hold.
    - `arrays`: of uint8 or float32.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in sorted(arrays.items())}
    about = {"version": kind.version, "sha256": checksum(facts, arrays), "facts": facts}
    # One entry only: safetensors writes several in no particular order.
    metadata = {kind.name: json.dumps(about, sort_keys=True)}
    write_bytes(path, safetensors.numpy.save(arrays, metadata=metadata))


def read_sealed(kind: Kind, path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The facts and arrays. Nothing of them is trusted but that they are what was written.

    **Raises:** the kind's error if the file is damaged, cut short, foreign, too large or of another
    version; `OSError` if it cannot be opened.
    """
    size = path.stat().st_size
    if size > kind.most_bytes:
        raise kind.error(f"{path} has {size} bytes; {kind.what} has at most {kind.most_bytes}")
    raw = path.read_bytes()
    try:
        # Checks that the header's offsets cover the body exactly and agree with its shapes.
        tensors = dict(safetensors.deserialize(raw))
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        text = (header.get("__metadata__") or {}).get(kind.name)
    except (safetensors.SafetensorError, RecursionError) as error:
        raise kind.error(
            f"{path} is not a safetensors file, or is damaged or cut short ({error})"
        ) from error
    if text is None:
        raise kind.error(
            f"{path} is a safetensors file without {kind.name!r} in its metadata: it is not "
            f"{kind.what}, or is damaged"
        )
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise kind.error(f"{path} is damaged: its metadata is not JSON ({error})") from error
    if not isinstance(about, dict) or type(about.get("version")) is not int:
        raise kind.error(f"{path} is damaged: its metadata states no version")
    if about["version"] != kind.version:
        raise kind.error(
            f"{path} has version {about['version']} of the format; this elastictok reads version "
            f"{kind.version}: install the release that wrote it, or make it again"
        )
    arrays = {name: _array(kind, path, name, tensor) for name, tensor in sorted(tensors.items())}
    facts = about.get("facts")
    if not isinstance(facts, dict) or about.get("sha256") != checksum(facts, arrays):
        raise kind.error(
            f"{path} is damaged: its content does not have the checksum that it was written with; "
            "copy or make it again"
        )
    return facts, arrays


def checksum(facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over the facts and, by name, each array's name, type, shape and bytes."""
    digest = hashlib.sha256()
    parts = [json.dumps(facts, sort_keys=True).encode()]
    for name, array in sorted(arrays.items()):
        parts += [json.dumps([name, array.dtype.str, list(array.shape)]).encode(), array.tobytes()]
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def write_bytes(path: Path, raw: bytes) -> None:
    """Beside the target, then renamed."""
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


def _array(kind: Kind, path: Path, name: str, tensor: Mapping[str, Any]) -> np.ndarray:
    dtype = _DTYPES.get(tensor["dtype"])
    if dtype is None:
        raise kind.error(f"{path} is foreign or damaged: {name} is of type {tensor['dtype']}")
    try:
        return np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
    except ValueError as error:  # no values, but a shape that is too large to write down
        raise kind.error(f"{path} is damaged: {name} has no such shape ({error})") from error
