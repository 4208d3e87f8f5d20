"""Scorers and calibrations as files: nothing is unpickled, and everything is checked."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ._sealed import Kind, checksum, read_sealed, write_sealed

if TYPE_CHECKING:
    from ._scorer import Scorer

VERSION = 1
# A scorer of the usual size takes half a megabyte.
_MOST_BYTES = 2**28
# The types of what a scorer's constructor is given, so that no file can give it anything else.
_FACTS: dict[str, type] = {
    "frames_per_block": int,
    "criterion": str,
    "codec": str,
    "context": int,
    "patch": int,
    "shares": list,
    "logarithmic": bool,
    "dim": int,
    "hidden": int,
    "layers": int,
    "heads": int,
}
_MOST = 2**16


class ScorerFileError(ValueError):
    """A scorer or a calibration cannot be read, or does not belong to what it is used with."""


_SCORER = Kind("elastictok.scorer", VERSION, "a scorer", ScorerFileError, _MOST_BYTES)


def facts_of(scorer: "Scorer") -> tuple[dict[str, Any], str]:
    """What a scorer is, and the SHA-256 over it and the arrays."""
    layers = scorer.transformer.layers
    facts = {
        "frames_per_block": scorer.frames_per_block,
        "criterion": scorer.criterion,
        "codec": scorer.codec,
        "context": scorer.context,
        "patch": scorer.patch,
        "shares": list(scorer.shares),
        "logarithmic": scorer.logarithmic,
        "dim": scorer.transformer.dim,
        "hidden": layers.feed_forward.up.weight.shape[-1],
        "layers": scorer.transformer.depth,
        "heads": layers.attention.heads,
    }
    return facts, checksum(facts, _arrays(scorer))


def write_scorer(scorer: "Scorer", path: Path) -> None:
    """Beside the target, then renamed: a reader sees the old file or the new one."""
    write_sealed(_SCORER, path, facts_of(scorer)[0], _arrays(scorer))


def read_scorer(path: Path, skeleton: Callable[[dict[str, Any]], "Scorer"]) -> "Scorer":
    """**Raises:** `ScorerFileError` for what is not the whole and unharmed file of a scorer."""
    facts, arrays = read_sealed(_SCORER, path)
    for name, array in arrays.items():
        if array.dtype != np.float32 or not np.all(np.isfinite(array)):
            raise ScorerFileError(
                f"{path}: {name} holds values that are not finite numbers; train again"
            )
    return _filled(path, _shapes(path, facts, skeleton), arrays)


def parsed(path: Path, text: str | bytes) -> dict[str, Any]:
    """The JSON object with `version` that is written around facts.

    **Raises:** `ScorerFileError` if it is none, or of another version.
    """
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ScorerFileError(f"{path} is damaged or foreign: it is not JSON ({error})") from error
    if not isinstance(about, dict) or type(about.get("version")) is not int:
        raise ScorerFileError(f"{path} is damaged or foreign: it states no version")
    if about["version"] != VERSION:
        raise ScorerFileError(
            f"{path} has version {about['version']} of the format; this elastictok reads version "
            f"{VERSION}: install the release that wrote it, or train again"
        )
    return about


def check_sum(
    path: Path, about: Mapping[str, Any], sum_of: Callable[[dict[str, Any]], str]
) -> None:
    """**Raises:** `ScorerFileError` if the facts do not have the `sha256` that they came with."""
    facts = about.get("facts")
    if not isinstance(facts, dict) or about.get("sha256") != sum_of(facts):
        raise ScorerFileError(
            f"{path} is damaged: its content does not have the checksum that it was written with; "
            "copy it again"
        )


def read_bytes(path: Path) -> bytes:
    """**Raises:** `ScorerFileError` for a file that is far too large."""
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise ScorerFileError(f"{path} has {size} bytes; a scorer has at most {_MOST_BYTES}")
    return path.read_bytes()


def _shapes(
    path: Path, facts: Mapping[str, Any], skeleton: Callable[[dict[str, Any]], "Scorer"]
) -> "Scorer":
    if set(facts) != set(_FACTS):
        raise ScorerFileError(
            f"{path}: the facts of a scorer differ in {sorted(set(facts) ^ set(_FACTS))}"
        )
    for name, kind in _FACTS.items():
        value = facts[name]
        if type(value) is not kind or (kind is int and not 1 <= value <= _MOST):
            raise ScorerFileError(f"{path}: {name} is {value!r}, which no scorer has")
    if not all(type(share) in (int, float) for share in facts["shares"]):
        raise ScorerFileError(f"{path}: shares are {facts['shares']!r}, which are no numbers")
    try:
        return skeleton({**facts, "shares": tuple(facts["shares"])})
    except ValueError as error:
        raise ScorerFileError(f"{path} is damaged or foreign: {error}") from error


def _filled(path: Path, shapes: "Scorer", arrays: Mapping[str, np.ndarray]) -> "Scorer":
    needed = _named(shapes)
    if set(needed) != set(arrays):
        raise ScorerFileError(
            f"{path}: the arrays of a scorer differ in {sorted(set(needed) ^ set(arrays))}"
        )
    for name, leaf in needed.items():
        if arrays[name].shape != leaf.shape:
            raise ScorerFileError(
                f"{path}: {name} has shape {arrays[name].shape}, and this scorer needs {leaf.shape}"
            )
    leaves = [jnp.asarray(arrays[name]) for name in needed]
    structure = jax.tree.structure(shapes)
    return jax.tree.unflatten(structure, leaves)


def _named(scorer: "Scorer") -> dict[str, Any]:
    """The arrays, or what stands in their place, in the order of the tree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(scorer)
    return {jax.tree_util.keystr(path).removeprefix("."): leaf for path, leaf in leaves}


def _arrays(scorer: "Scorer") -> dict[str, np.ndarray]:
    return {
        name: np.ascontiguousarray(leaf, "<f4")
        for name, leaf in sorted(_named(scorer).items())
        if eqx.is_array(leaf)
    }
