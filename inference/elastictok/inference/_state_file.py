"""States of streams as files, to go on another day: what a block sees of those before it."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._codec import ElasticCodec
from ._sealed import Kind, read_sealed, write_sealed
from ._streams import DecoderState, EncoderState
from ._walk import State


class StateFileError(ValueError):
    """The state of a stream cannot be read, or does not belong to this codec."""


_ENCODER = Kind("elastictok.encoder-state", 1, "the state of a stream", StateFileError, 2**40)
_DECODER = Kind("elastictok.decoder-state", 1, "the state of a decoder", StateFileError, 2**40)
_MOST = 2**40  # of any number in the facts


def save_encoder_state(state: EncoderState, path: str | Path) -> None:
    """Writes the state of a stream, all of it or nothing. Its size is that of the KV caches.

    **Arguments:**

    - `state`: `TokenStream.state`, or what `Tokenizer.push` gave.
    - `path`: of the file.
    """
    walk = state.walk
    facts = {
        "original": state.original,
        "fitted": state.fitted,
        "padded": state.padded,
        "window": state.window,
        "fps": None if state.fps is None else float(state.fps),
        "blocks": state.blocks,
        "fingerprint": state.fingerprint,
        "previous": walk.previous,
        "behind": [length for _, length in walk.behind],
    }
    arrays = {"pending": state.pending}
    arrays |= {f"recent.{i}": pixels for i, pixels in enumerate(state.recent)}
    arrays |= _named("encoder", walk.encoder) | _named("decoder", walk.decoder)
    for index, (values, _) in enumerate(walk.behind):
        arrays |= _named(f"behind.{index}", values)
    write_sealed(_ENCODER, Path(path), facts, arrays)


def load_encoder_state(path: str | Path, codec: ElasticCodec) -> EncoderState:
    """Reads what `save_encoder_state` wrote, for the same codec.

    **Raises:** `StateFileError` if the file is damaged, foreign, of a newer version or of another
    codec; `OSError` if it cannot be opened.
    """
    path = Path(path)
    facts, arrays = read_sealed(_ENCODER, path)
    names = {"original", "fitted", "padded", "window", "fps", "blocks", "fingerprint"}
    _check(path, facts.keys() == names | {"previous", "behind"})
    _check_codec(path, facts, codec)
    original, fitted, padded = (_size(path, facts[n]) for n in ("original", "fitted", "padded"))
    window, blocks = _count(path, facts["window"], 1), _count(path, facts["blocks"], 0)
    fps, previous = facts["fps"], facts["previous"]
    _check(path, fps is None or (isinstance(fps, float) and 0 < fps < math.inf))
    tokens = codec.tokens_per_block(*padded)
    _check(path, previous is None or _count(path, previous, 1) <= tokens)
    lengths = facts["behind"]
    _check(path, isinstance(lengths, list))
    values = codec.kind.zeros(tokens)
    behind = tuple(
        (_filled(path, f"behind.{i}", values, arrays), _count(path, length, 1))
        for i, length in enumerate(lengths)
    )
    pending = arrays.pop("pending", np.zeros(0, np.uint8))
    _check(path, pending.dtype == np.uint8 and pending.shape[1:] == (*fitted, 3))
    _check(path, pending.ndim == 4 and len(pending) < codec.frames_per_block)
    recent = []
    while (pixels := arrays.pop(f"recent.{len(recent)}", None)) is not None:
        _check(path, pixels.dtype == np.uint8)
        _check(path, pixels.shape == (codec.frames_per_block, *padded, 3))
        recent.append(pixels)
    walk = State(
        _filled(path, "encoder", codec.encoder_state(window, *padded), arrays),
        _filled(path, "decoder", codec.decoder_state(window, *padded), arrays),
        behind,
        previous,
    )
    _check(path, not arrays)
    fingerprint = codec.fingerprint
    return EncoderState(
        walk, original, fitted, padded, window, fps, blocks, pending, tuple(recent), fingerprint
    )


def save_decoder_state(state: DecoderState, path: str | Path) -> None:
    """Writes the state of a decoding stream, all of it or nothing; see `save_encoder_state`."""
    facts = {
        "padded": state.padded,
        "window": state.window,
        "blocks": state.blocks,
        "exact": state.exact,
        "fingerprint": state.fingerprint,
    }
    write_sealed(_DECODER, Path(path), facts, _named("decoder", state.decoder))


def load_decoder_state(path: str | Path, codec: ElasticCodec) -> DecoderState:
    """Reads what `save_decoder_state` wrote, for the same codec.

    **Raises:** as `load_encoder_state`.
    """
    path = Path(path)
    facts, arrays = read_sealed(_DECODER, path)
    _check(path, facts.keys() == {"padded", "window", "blocks", "exact", "fingerprint"})
    _check_codec(path, facts, codec)
    padded, window = _size(path, facts["padded"]), _count(path, facts["window"], 1)
    blocks, exact = _count(path, facts["blocks"], 0), facts["exact"]
    _check(path, isinstance(exact, bool))
    decoder = _filled(path, "decoder", codec.decoder_state(window, *padded), arrays)
    _check(path, not arrays)
    return DecoderState(decoder, padded, window, blocks, exact, codec.fingerprint)


def _named(name: str, tree: Any) -> dict[str, np.ndarray]:
    """The leaves as bytes: a state may hold any type, and the codec knows which."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return {
        f"{name}.{index}": np.frombuffer(leaf.tobytes(), np.uint8)
        for index, leaf in enumerate(leaves)
    }


def _filled(path: Path, name: str, template: Any, arrays: dict[str, np.ndarray]) -> Any:
    """A tree like the template, its leaves from the file; they are taken out of `arrays`."""
    leaves, structure = jax.tree.flatten(template)
    return jax.tree.unflatten(
        structure,
        [_leaf(path, arrays.pop(f"{name}.{i}", None), leaf) for i, leaf in enumerate(leaves)],
    )


def _leaf(path: Path, raw: np.ndarray | None, template: Any) -> Any:
    wanted = np.asarray(template)
    _check(path, raw is not None and raw.dtype == np.uint8 and raw.size == wanted.nbytes)
    assert raw is not None
    found = np.frombuffer(raw.tobytes(), wanted.dtype).reshape(wanted.shape)
    if isinstance(template, np.ndarray):
        return found
    return jnp.asarray(found) if isinstance(template, jax.Array) else found.item()


def _check(path: Path, fine: bool) -> None:
    if not fine:
        raise StateFileError(f"{path} is foreign or damaged: no stream of this codec stands so")


def _check_codec(path: Path, facts: Mapping[str, Any], codec: ElasticCodec) -> None:
    fingerprint = facts["fingerprint"]
    _check(path, isinstance(fingerprint, str))
    if fingerprint != codec.fingerprint:
        raise StateFileError(
            f"{path} is of the model {fingerprint[:12]}..., and this one is "
            f"{codec.fingerprint[:12]}...; go on with the model that began"
        )


def _count(path: Path, value: Any, least: int) -> int:
    _check(path, type(value) is int and least <= value <= _MOST)
    return value


def _size(path: Path, value: Any) -> tuple[int, int]:
    _check(path, isinstance(value, list) and len(value) == 2)
    return _count(path, value[0], 1), _count(path, value[1], 1)
