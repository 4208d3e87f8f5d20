"""What inference needs of a tokenizer: any that keeps a prefix of a block's tokens will do."""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, final

import numpy as np

EncoderState = TypeVar("EncoderState")
DecoderState = TypeVar("DecoderState")


@final
@dataclass(frozen=True)
class Codes:
    """Tokens are integers below `codebook_size`.

    One each, or rows of `streams` integers each if that is given (it may be 1).
    """

    codebook_size: int
    streams: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.codebook_size <= 2**31:
            raise ValueError(f"codebook_size is {self.codebook_size}; it must be 1 to 2**31")
        if self.streams is not None and self.streams < 1:
            raise ValueError(f"streams is {self.streams}; it must be at least 1")

    def zeros(self, tokens: int) -> np.ndarray:
        """`i32[tokens]` or `i32[tokens streams]`."""
        return np.zeros((tokens,) if self.streams is None else (tokens, self.streams), np.int32)


@final
@dataclass(frozen=True)
class Latents:
    """Tokens are vectors of `dim` real numbers, not quantized."""

    dim: int

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"dim is {self.dim}; it must be at least 1")

    def zeros(self, tokens: int) -> np.ndarray:
        """`f32[tokens dim]`."""
        return np.zeros((tokens, self.dim), np.float32)


class ElasticCodec(abc.ABC, Generic[EncoderState, DecoderState]):
    """A tokenizer that works block by block and lets each block keep any prefix of its tokens.

    `ElasticTokCodec` adapts an `ElasticTok`; subclass this to measure a tokenizer written in any
    framework with the same strategies. Pixels are NumPy arrays. States are explicit values: a call
    gives back the next one and leaves the one it was given as it was, because a search tries many
    lengths from the same state and keeps the state of the length it settles for. The encoder and
    the decoder each have their own, so that decoding needs no encoder and a block that was encoded
    once can be decoded at several lengths.

    What a token is, `kind` says. Arrays of tokens (called `values`) always have all
    `tokens_per_block` rows; only the first `length` rows mean anything.
    """

    @property
    @abc.abstractmethod
    def size(self) -> tuple[int, int]:
        """`(height, width)` of the frames that it was made for."""

    @property
    @abc.abstractmethod
    def patch(self) -> tuple[int, int]:
        """`(height, width)` that frames must be a multiple of."""

    @property
    @abc.abstractmethod
    def frames_per_block(self) -> int:
        """Frames of a block."""

    @property
    @abc.abstractmethod
    def context(self) -> int:
        """Blocks, the current one included, that it was made to see at once."""

    @property
    @abc.abstractmethod
    def min_tokens(self) -> int:
        """Fewest tokens that a block may keep (all of them if it has no more)."""

    @property
    @abc.abstractmethod
    def kind(self) -> Codes | Latents:
        """What a token is."""

    @property
    @abc.abstractmethod
    def bits_per_token(self) -> float | None:
        """Payload of a token, all streams together; None for latents."""

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Hexadecimal digest of everything that decides what tokens mean, weights included."""

    @property
    def lanes(self) -> int:
        """Blocks that it likes to be given at once, in `encode_batch` and `decode_batch`."""
        return 1

    @abc.abstractmethod
    def tokens_per_block(self, height: int, width: int) -> int:
        """Tokens of a block of frames of a size that `patch` divides."""

    @abc.abstractmethod
    def encoder_state(self, window: int, height: int, width: int) -> EncoderState:
        """The encoder's state before the first block.

        **Arguments:**

        - `window`: how many blocks, the current one included, a block can see.
        - `height`, `width`: of the frames to come.
        """

    @abc.abstractmethod
    def decoder_state(self, window: int, height: int, width: int) -> DecoderState:
        """The decoder's state before the first block; see `encoder_state`."""

    @abc.abstractmethod
    def encode(
        self, pixels: np.ndarray, length: int, state: EncoderState
    ) -> tuple[np.ndarray, EncoderState]:
        """Tokens of the next block.

        **Arguments:**

        - `pixels`: `u8[frames_per_block height width 3]`.
        - `length`: tokens to keep, `min(min_tokens, tokens_per_block)` to `tokens_per_block`.
        - `state`: after the block before.

        **Returns:** values with all rows (those from `length` on are ignored) and the state.
        """

    @abc.abstractmethod
    def decode(
        self, values: np.ndarray, length: int, state: DecoderState
    ) -> tuple[np.ndarray, DecoderState]:
        """Pixels of the next block.

        The result must be the same each time: that is what makes a measured loss true of the
        decoded pixels.

        **Arguments:**

        - `values`: all rows, those from `length` on zero.
        - `length`: tokens kept.
        - `state`: after the block before.

        **Returns:** `u8[frames_per_block height width 3]` and the state.
        """

    def encode_batch(
        self, requests: Sequence[tuple[np.ndarray, int, EncoderState]]
    ) -> list[tuple[np.ndarray, EncoderState]]:
        """`encode` for several blocks that do not depend on each other: of other clips, or the same
        block at other lengths. One after another, unless a subclass does better.

        **Arguments:**

        - `requests`: the arguments of `encode` for each; frames and states of one size and window.

        **Returns:** what `encode` gives for each, the very same.
        """
        return [self.encode(*request) for request in requests]

    def decode_batch(
        self, requests: Sequence[tuple[np.ndarray, int, DecoderState]]
    ) -> list[tuple[np.ndarray, DecoderState]]:
        """`decode` for several blocks that do not depend on each other; see `encode_batch`."""
        return [self.decode(*request) for request in requests]
