"""Models as folders: `config.json` says what the model is, safetensors files hold its arrays.

The config is the tree of modules: class names from a closed table and every field. Nothing is ever
unpickled or evaluated, every tensor is compared with what the config announces before one of them
is read, and all of them with its hash.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from ._card import MARK, model_card
from ._describe import (
    Fingerprint,
    ModelFileError,
    class_table,
    describe,
    differences,
    fingerprint,
    kind,
    listed,
    named,
    replaced,
    undescribe,
)
from ._elastictok import ElasticTok
from ._hub import PREFIX, snapshot, upload
from ._weights import open_weights, write_json, write_text, write_weights

FORMAT = "elastictok-model"
VERSION = 2
CARD = "README.md"


class _Candidate(NamedTuple):
    """A model that a folder may hold; while one is being replaced there are two."""

    model: Any
    sha256: str


def save(
    model: ElasticTok,
    folder: str | os.PathLike[str],
    *,
    card: str | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a model folder; what was there stays readable until the new files are complete.

    **Arguments:**

    - `model`: any `ElasticTok`; classes that are not the library's must be passed to `load`.
    - `folder`: made if absent.
    - `card`: what `README.md` says; `model_card(model)` by default. A `README.md` that somebody
      edited (it has lost the mark in its last line) is left as it is.
    - `shard_bytes`: weights larger than this go into several files.

    **Raises:** `ValueError` naming a part of the model that cannot be saved, or an `hf:` name.
    """
    if os.fspath(folder).startswith(PREFIX):
        raise ValueError(f"{os.fspath(folder)} is not a folder; push(model, ...) sends it there")
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes is {shard_bytes}; a file holds at least 1 byte")
    folder = Path(folder)
    description = describe(model)
    sha = fingerprint(model)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "config.json"
    config: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "sha256": sha,
        "model": description,
    }
    # Config and weights cannot be renamed at once. While the weights are being replaced, the
    # config speaks for the old model and for the new one.
    old = [candidate._asdict() for candidate in _previous(folder)]
    write_json(target, config | ({"replacing": old} if old else {}))
    write_weights(
        folder,
        dict(named(model)),
        tag=sha[:8],
        shard_bytes=shard_bytes,
        metadata={"format": FORMAT, "version": str(VERSION)},
    )
    if old:
        write_json(target, config)
    if _ours(folder / CARD):
        text = model_card(model) if card is None else card
        write_text(folder / CARD, f"{text.rstrip()}\n\n{MARK}\n")


def load(
    folder: str | os.PathLike[str],
    *,
    classes: Sequence[type[eqx.Module]] = (),
    dtype: DTypeLike | None = None,
    shardings: PyTree[jax.sharding.Sharding] | None = None,
) -> ElasticTok:
    """Reads a model folder (a run folder is one) and checks every shape and the hash.

    Tensors are read one at a time and go straight to their place: the host never holds a second
    copy of the model.

    **Arguments:**

    - `folder`: holds `config.json` and the weights; or `hf:owner/name`, `hf:owner/name@revision`
      for a repository on the Hugging Face hub (extra `hub`).
    - `classes`: your own module classes that the model uses.
    - `dtype`: of the floating point arrays outside the quantizer, which stays as it was saved; by
      default all do. What the network computes in is another matter: see `with_compute_dtype`.
    - `shardings`: where the arrays go: one `jax.sharding.Sharding` for all, or a tree of them in
      the model's structure (a prefix will do), which is best made from `load_shapes`. By default,
      jax's default device.

    **Raises:** `ModelFileError` naming the file, what is wrong with it and what to do; `ValueError`
    if the shardings do not fit the model.
    """
    folder = _local(folder)
    candidates, table = _candidates(folder), class_table(classes)
    file, tensors = open_weights(folder)
    found = {name: kind(tensor) for name, tensor in tensors.items()}
    shapes, fitting, faults = None, [], []
    for candidate in candidates:
        model = undescribe(candidate.model, table)
        needed = {name: kind(leaf) for name, leaf in named(model)}
        fault = differences(needed, found)
        faults.append(fault)
        if not fault:
            shapes = model
            fitting.append(candidate)
    if shapes is None:
        raise ModelFileError(
            f"{file} does not hold the weights of the model in config.json, it is of another model "
            f"or damaged:{listed(faults[0])}"
        )
    _check_class(folder, shapes)
    places = placement(shapes, shardings)
    prints = [Fingerprint(candidate.model) for candidate in fitting]
    arrays: dict[str, jax.Array] = {}
    for name in sorted(tensors):
        values = tensors[name].read()
        for digest in prints:
            digest.add(name, values)
        if dtype is not None and not name.startswith("quantizer."):
            values = converted(values, dtype)
        arrays[name] = put(values, places.get(name))
    matches = [
        candidate
        for candidate, digest in zip(fitting, prints, strict=True)
        if digest.hexdigest() == candidate.sha256
    ]
    if not matches:
        raise ModelFileError(
            f"{file} does not have the sha256 that config.json gives: one of them is damaged, was "
            "edited or is from another model. Copy the folder again; a setting cannot be changed "
            "under trained weights, nor a quantizer swapped: train a model with it"
        )
    model = undescribe(matches[0].model, table)
    return replaced(model, lambda name, _: arrays[name])


def load_shapes(
    folder: str | os.PathLike[str], *, classes: Sequence[type[eqx.Module]] = ()
) -> ElasticTok:
    """The model of a folder with a `jax.ShapeDtypeStruct` for each array; reads no weights.

    To make shardings from, or to count parameters: `count_parameters(load_shapes(folder))`.

    **Arguments:** as for `load`.

    **Raises:** `ModelFileError`.
    """
    folder = _local(folder)
    model = undescribe(_candidates(folder)[0].model, class_table(classes))
    _check_class(folder, model)
    return model


def push(
    model: ElasticTok,
    reference: str,
    *,
    private: bool = False,
    message: str = "Add an elastictok model",
    card: str | None = None,
) -> str:
    """Sends a model to a repository on the Hugging Face hub (extra `hub`), as one commit.

    The repository is made if absent. Weights of an earlier model in it are deleted; a `README.md`
    that is there already stays.

    **Arguments:**

    - `model`: as for `save`.
    - `reference`: `hf:owner/name`, or `hf:owner/name@branch`.
    - `private`: whether a repository that is made is private.
    - `message`: of the commit.
    - `card`: see `save`.

    **Returns:** the address of the commit.

    **Raises:** `ValueError` for another kind of reference; huggingface_hub's errors, such as
    `HfHubHTTPError` where you may not write.
    """
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder, card=card)
        return upload(Path(folder), reference, private=private, message=message, keep=CARD)


def placement(
    model: ElasticTok, shardings: PyTree[jax.sharding.Sharding] | None
) -> dict[str, jax.sharding.Sharding]:
    """The sharding of each array by name; none for those that go to the default device.

    **Raises:** `ValueError` if the shardings are no prefix of the model's structure.
    """
    if shardings is None:
        return {}
    names = [name for name, _ in named(model)]
    arrays = eqx.filter(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    try:
        flat = jax.tree.broadcast(shardings, arrays)
    except ValueError as error:
        raise ValueError(
            "shardings is neither one sharding nor a tree of them in the model's structure; make "
            f"it from load_shapes: {error}"
        ) from error
    leaves = jax.tree.leaves(flat, is_leaf=lambda x: isinstance(x, jax.sharding.Sharding))
    places = dict(zip(names, leaves, strict=True))
    for name, leaf in named(model):
        place = places[name]
        if not isinstance(place, jax.sharding.Sharding):
            raise ValueError(f"shardings has a {type(place).__name__} for {name}, not a Sharding")
        try:
            place.shard_shape(leaf.shape)
        except ValueError as error:
            raise ValueError(f"{name} does not fit its sharding: {error}") from error
    return places


def converted(values: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """Floating point values in another type; integers and bools as they are."""
    return values.astype(dtype) if jnp.issubdtype(values.dtype, jnp.floating) else values


def put(values: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """The values where they belong; of each device's part, the process that has it takes it."""
    if sharding is None:
        return jnp.asarray(values)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def _local(folder: str | os.PathLike[str]) -> Path:
    name = os.fspath(folder)
    return snapshot(name) if name.startswith(PREFIX) else Path(folder)


def _check_class(folder: Path, model: Any) -> None:
    if not isinstance(model, ElasticTok):
        raise ModelFileError(f"{folder} holds a {type(model).__name__}, not an ElasticTok")


def _ours(path: Path) -> bool:
    """Whether the file may be replaced: absent, or with our mark at its end."""
    try:
        return path.read_text(encoding="utf-8").rstrip().endswith(MARK)
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False


def _previous(folder: Path) -> list[_Candidate]:
    try:
        return _candidates(folder)
    except ModelFileError:
        return []  # nothing that could be lost


def _candidates(folder: Path) -> list[_Candidate]:
    """What the folder's config speaks for, the newest first."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFileError(
            f"{folder} is not a model folder: it has no config.json; give the output folder of "
            "elastictok train, demo or import-official"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ModelFileError(f"{path} is not an {FORMAT} config")
    version = config.get("version")
    if version not in (1, 2):
        raise ModelFileError(
            f"{path} has format version {version}; this library reads 1 and {VERSION}: "
            "update elastictok"
        )
    candidates = _version_1(config) if version == 1 else _version_2(config)
    if candidates is None:
        raise ModelFileError(f"{path} lacks the model's description or its sha256")
    return candidates


def _version_1(config: Mapping[str, Any]) -> list[_Candidate] | None:
    """One description; while it was being replaced by one like it, several hashes."""
    hashes = config.get("sha256")
    if not isinstance(hashes, list) or not hashes or "model" not in config:
        return None
    return [_Candidate(config["model"], sha) for sha in hashes]


def _version_2(config: Mapping[str, Any]) -> list[_Candidate] | None:
    old = config.get("replacing", [])
    candidates = []
    for entry in [config, *old] if isinstance(old, list) else [None]:
        if not isinstance(entry, dict) or not {"model", "sha256"} <= set(entry):
            return None
        candidates.append(_Candidate(entry["model"], entry["sha256"]))
    return candidates
