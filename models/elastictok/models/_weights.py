"""Tensors in safetensors files: one, or several with the index that Hugging Face's tools read.

A folder's weights are those of `model.safetensors.index.json` if it is there, else of
`model.safetensors`. Either is put in place by one rename: readers see the old weights or the new.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ._describe import DTYPES, ModelFileError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = "model-*.safetensors"
_NAMES = {"F32": "float32", "BF16": "bfloat16", "I32": "int32", "U32": "uint32", "BOOL": "bool"}


class Tensor:
    """A tensor in a file, not read yet."""

    def __init__(self, file: Any, path: Path, name: str):
        part = file.get_slice(name)
        stored = part.get_dtype()
        if stored not in _NAMES:
            raise ModelFileError(
                f"{path}: {name} is of type {stored}, which model folders do not hold; they hold "
                f"{', '.join(_NAMES)}"
            )
        self.dtype = DTYPES[_NAMES[stored]]
        self.shape = tuple(part.get_shape())
        self._file, self._path, self._name = file, path, name

    def read(self) -> np.ndarray:
        """Its values, in memory of their own."""
        try:
            return self._file.get_tensor(self._name)
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(self._path, error) from error


def open_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The file that speaks for a folder's weights, and every tensor of it by name.

    **Raises:** `ModelFileError` if a file is missing or damaged, or the index is not one.
    """
    index = folder / INDEX
    if not index.exists():
        return folder / WEIGHTS, _open(folder / WEIGHTS)
    places = _read_index(index)
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        found = _open(folder / shard)
        listed = {name for name, place in places.items() if place == shard}
        if set(found) != listed:
            raise ModelFileError(
                f"{folder / shard} and {INDEX} disagree about {sorted(set(found) ^ listed)[:5]}; "
                "copy the whole model folder again"
            )
        tensors |= found
    return index, tensors


def write_weights(
    folder: Path, arrays: Mapping[str, Any], *, tag: str, shard_bytes: int, metadata: dict[str, str]
) -> None:
    """Replaces a folder's weights; what was there stays readable until the new ones are complete.

    **Arguments:**

    - `arrays`: by name; brought to the host one file at a time.
    - `tag`: goes into the names of shards, so that new ones do not overwrite old ones.
    - `shard_bytes`: most bytes of tensors in a file; a larger tensor has a file of its own.
    - `metadata`: goes into each file.
    """
    shards = _split(arrays, shard_bytes)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
        if len(shards) == 1:
            written = Path(scratch) / WEIGHTS
            _save(written, arrays, shards[0], metadata)
            os.replace(written, folder / WEIGHTS)
            (folder / INDEX).unlink(missing_ok=True)
            keep = set()
        else:
            places: dict[str, str] = {}
            for i, names in enumerate(shards):
                shard = f"model-{tag}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
                _save(Path(scratch) / shard, arrays, names, metadata)
                os.replace(Path(scratch) / shard, folder / shard)
                places |= dict.fromkeys(names, shard)
            total = sum(_bytes(array) for array in arrays.values())
            write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
            (folder / WEIGHTS).unlink(missing_ok=True)
            keep = set(places.values())
    for old in folder.glob(SHARDS):
        if old.name not in keep:
            old.unlink()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes beside the target, then renames."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes beside the target, then renames."""
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=".saving-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def _open(path: Path) -> dict[str, Tensor]:
    try:
        # Read, not mapped: mapped pages would count as a second copy, and change with the file.
        file = safe_open(path, framework="np", backend="pread")
        return {name: Tensor(file, path, name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ModelFileError(f"{path} is missing; copy the whole model folder") from None
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ModelFileError:
    return ModelFileError(f"{path} is damaged ({error}); copy or train it again")


def _read_index(path: Path) -> dict[str, str]:
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = {(name, shard) for name, shard in places.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelFileError(f"{path} is no index of weights: {error!r}") from error
    for name, shard in names:
        # A file beside the index and nowhere else.
        if not isinstance(shard, str) or Path(shard).name != shard or "\0" in shard:
            raise ModelFileError(f"{path} places {name} in {shard!r}, which is no file beside it")
    return places


def _split(arrays: Mapping[str, Any], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, array in arrays.items():
        if shards[-1] and size + _bytes(array) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _bytes(array)
    return shards


def _bytes(array: Any) -> int:
    return array.size * array.dtype.itemsize


def _save(
    path: Path, arrays: Mapping[str, Any], names: list[str], metadata: dict[str, str]
) -> None:
    save_file({name: np.asarray(arrays[name], order="C") for name in names}, path, metadata)
    os.chmod(path, 0o644)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
