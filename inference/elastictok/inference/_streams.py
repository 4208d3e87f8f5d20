"""Streams without end: the state between two blocks as a value, and iterators that carry it on."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
from jaxtyping import UInt8

from ._codec import ElasticCodec
from ._frames import check_frames
from ._tokens import TokenFileError, Tokens
from ._walk import State


@final
@dataclass(frozen=True, eq=False)
class EncoderState:
    """Where a stream of frames stands: all that its next block depends on. Its size is bounded.

    Made by `Tokenizer.start`, moved on by `Tokenizer.push`; `save_state` and `load_state` keep it
    in a file.

    - `walk`: the codec's states, and the length of the last block.
    - `original`, `fitted`, `padded`: height and width of the frames: as given, as the model sees
      them, and in whole patches.
    - `window`: blocks that a block sees, itself included.
    - `fps`: frames per second, if known.
    - `blocks`: how many are done.
    - `pending`: `u8[frames height width 3]`, fitted, that do not fill a block yet.
    - `recent`: padded pixels of the last blocks, for strategies that look back.
    - `fingerprint`: of the codec.
    """

    walk: State
    original: tuple[int, int]
    fitted: tuple[int, int]
    padded: tuple[int, int]
    window: int
    fps: float | int | None
    blocks: int
    pending: UInt8[np.ndarray, "frames height width 3"]
    recent: tuple[np.ndarray, ...]
    fingerprint: str

    def check(self, codec: ElasticCodec, window: int) -> None:
        """**Raises:** `ValueError` if it is not the state of such a stream."""
        _check_codec(self.fingerprint, codec)
        if self.window != window:
            raise ValueError(
                f"the state is of a stream with a window of {self.window} blocks, and this "
                f"tokenizer has {window}; make it with window={self.window}"
            )

    def moved(
        self, walk: State, blocks: int, pending: np.ndarray, recent: tuple[np.ndarray, ...]
    ) -> "EncoderState":
        """After so many more blocks."""
        blocks += self.blocks
        return replace(self, walk=walk, blocks=blocks, pending=pending, recent=recent)


@final
@dataclass(frozen=True, eq=False)
class DecoderState:
    """Where a decoded stream stands: all that the pixels of its next block depend on.

    - `decoder`: the codec's state.
    - `padded`: height and width of the frames in whole patches.
    - `window`: blocks that a block sees, itself included.
    - `blocks`: number of the next block in the stream.
    - `exact`: whether all blocks before were decoded; if not, decoding began in the middle, and
      pixels are approximate.
    - `fingerprint`: of the codec.
    """

    decoder: Any
    padded: tuple[int, int]
    window: int
    blocks: int
    exact: bool
    fingerprint: str

    def check(self, tokens: Tokens, index: int) -> None:
        """Whether it is the state before a block of these tokens.

        **Raises:** `TokenFileError` if another model made the tokens; `ValueError` if they are of
        another place or stream.
        """
        if tokens.fingerprint != self.fingerprint:
            raise TokenFileError(
                f"the tokens were made by the model {tokens.fingerprint[:12]}..., and the state is "
                f"one of {self.fingerprint[:12]}...; open them with the model that made them"
            )
        if tokens.window != self.window:
            raise ValueError(
                f"the tokens were made with a window of {tokens.window} blocks, and the state with "
                f"{self.window}: they are of different streams"
            )
        if tokens.first_block + index != self.blocks:
            raise ValueError(
                f"block {tokens.first_block + index} of a stream was given where block "
                f"{self.blocks} follows; give the parts in order and without gaps"
            )

    def moved(self, decoder: Any) -> "DecoderState":
        """After one more block."""
        return replace(self, decoder=decoder, blocks=self.blocks + 1)


@final
class TokenStream(Iterator[Tokens]):
    """Tokens of one block after another; see `Tokenizer.stream`.

    - `state`: just after the last block that it gave, to go on from with the frames that follow;
      None before the first frame. At the end it also holds the frames that were left over.
    """

    state: EncoderState | None

    def __init__(
        self,
        start: Callable[[int, int], EncoderState],
        push: Callable[[EncoderState, np.ndarray, bool], tuple[list[Tokens], EncoderState]],
        frames_per_block: int,
        frames: Iterable[np.ndarray],
        state: EncoderState | None,
        end: bool,
    ):
        self.state = state
        self._start, self._push, self._size, self._end = start, push, frames_per_block, end
        self._steps = self._run(frames)

    def __next__(self) -> Tokens:
        return next(self._steps)

    def _run(self, frames: Iterable[np.ndarray]) -> Iterator[Tokens]:
        for given in frames:
            piece = given[None] if given.ndim == 3 else given
            if len(piece) == 0:
                continue
            check_frames(piece)
            if self.state is None:
                self.state = self._start(*piece.shape[1:3])
            # No more at a time than completes a block: the state is to be that after each.
            while len(piece):
                count = self._size - len(self.state.pending)
                found, self.state = self._push(self.state, piece[:count], False)
                piece = piece[count:]
                yield from found
        if self._end and self.state is not None and len(self.state.pending):
            none = np.zeros((0, *self.state.original, 3), np.uint8)
            found, self.state = self._push(self.state, none, True)
            yield from found


@final
class FrameStream(Iterator[np.ndarray]):
    """Frames of one block after another; see `Tokenizer.decode_stream`.

    - `state`: just after the last block that it gave; None before the first.
    - `exact`: whether the frames are those that decoding from the beginning gives; None before the
      first block.
    """

    state: DecoderState | None

    def __init__(
        self,
        start: Callable[[Tokens], DecoderState],
        decode: Callable[[Tokens, int, DecoderState], tuple[np.ndarray, DecoderState]],
        tokens: Iterable[Tokens],
        state: DecoderState | None,
    ):
        self.state = state
        self._start, self._decode = start, decode
        self._steps = self._run(tokens)

    @property
    def exact(self) -> bool | None:
        return None if self.state is None else self.state.exact

    def __next__(self) -> UInt8[np.ndarray, "frames height width 3"]:
        return next(self._steps)

    def _run(self, tokens: Iterable[Tokens]) -> Iterator[np.ndarray]:
        for part in tokens:
            if self.state is None:
                self.state = self._start(part)
            for index in range(part.blocks):
                pixels, self.state = self._decode(part, index, self.state)
                yield pixels


def _check_codec(fingerprint: str, codec: ElasticCodec) -> None:
    if fingerprint != codec.fingerprint:
        raise ValueError(
            f"the state is one of the model {fingerprint[:12]}..., and this one is "
            f"{codec.fingerprint[:12]}...; go on with the model that began"
        )
