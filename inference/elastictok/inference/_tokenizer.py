"""From frames to tokens and back."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import equinox as eqx
import numpy as np
from jaxtyping import UInt8

from elastictok.models import ElasticTok

from ._codec import ElasticCodec, Latents
from ._elastictok_codec import as_codec
from ._frames import check_frames, fitted_size, multiple, pad, resize, to_rgb
from ._strategies import AbstractStrategy, Allocation, Block, allocate
from ._tokens import Tokens, check_rate

# Tokens of a block, against those at the codec's own size, beyond which it is surely a mistake.
_TIMES_TRAINED = 4


@final
@dataclass(frozen=True)
class _Geometry:
    """Sizes of a clip: as given, as fitted, and padded to whole patches."""

    original: tuple[int, int]
    fitted: tuple[int, int]
    padded: tuple[int, int]
    tokens: int  # of a block


@final
@dataclass(frozen=True)
class _Probed:
    """What a probe leaves behind besides its loss: the tokens, and the states after the block."""

    values: np.ndarray
    encoder: Any
    decoder: Any


@final
class Tokenizer(eqx.Module):
    """Turns frames into tokens, with a strategy deciding how many each block gets, and back.

    Blocks are encoded one after another over the whole clip, each seeing the `window - 1` blocks
    before it, so that clips may be longer than the context the model was trained with.

    !!! Example

        ```python
        tok = Tokenizer(model, Binary(MSE(0.003)))
        tokens = tok.encode(frames)  # u8[frames height width 3]
        frames = tok.decode(tokens)
        ```
    """

    codec: ElasticCodec
    strategy: AbstractStrategy
    window: int
    native: bool
    limit: int

    def __init__(
        self,
        model: ElasticTok | ElasticCodec,
        strategy: AbstractStrategy,
        *,
        window: int | None = None,
        native: bool = False,
        limit: int | None = None,
    ):
        """**Arguments:**

        - `model`: an `ElasticTok`, or any other tokenizer behind an `ElasticCodec`.
        - `strategy`: decides the length of each block.
        - `window`: how many blocks, the current one included, a block sees; the model's context by
          default. No more memory than the clip fills is reserved for it.
        - `native`: keep the frames' size. By default the short side is resized to that of the size
          the model was trained at (Pillow's bicubic filter, antialiased).
        - `limit`: most tokens that a block may have; by default four times those at the trained
          size, beyond which models make little sense and attention takes long.

        **Raises:** `ValueError` if `window` or `limit` is below 1.
        """
        self.codec = as_codec(model)
        self.strategy = strategy
        self.window = self.codec.context if window is None else window
        self.native = native
        at_trained_size = self.codec.tokens_per_block(*self.codec.size)
        self.limit = _TIMES_TRAINED * at_trained_size if limit is None else limit

    def __check_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window is {self.window} blocks; a block sees at least itself: 1")
        if self.limit < 1:
            raise ValueError(f"limit is {self.limit} tokens; a block has at least 1")

    def fit(self, frames: np.ndarray) -> UInt8[np.ndarray, "frames height width 3"]:
        """The frames as the model sees them, before padding: what decoding should give back.

        Alpha is composited on white, grey becomes three channels; unless `native`, the short side
        is resized to that of the trained size.

        **Arguments:**

        - `frames`: `u8[frames height width channels]`, 1 to 4 channels.

        **Raises:** `ValueError` for anything else.
        """
        check_frames(frames)
        return resize(to_rgb(frames), *self._fitted(frames.shape[1], frames.shape[2]))

    def encode(self, frames: np.ndarray, fps: float | int | None = None) -> Tokens:
        """Tokens of a picture or clip.

        Per block the loss is that of the 8-bit pixels that `decode` gives, on the frames as `fit`
        gives them: neither padding nor repeated frames count.

        **Arguments:**

        - `frames`: `u8[frames height width channels]`, any number of frames of any size, with 1
          (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha) channels. One frame is a picture.
        - `fps`: frames per second, to be kept with the tokens.

        **Raises:** `ValueError` for other input, or if a block had more tokens than `limit`.
        """
        check_frames(frames)
        check_rate(fps)
        geometry = self._geometry(frames.shape[1], frames.shape[2])
        blocks = -(-frames.shape[0] // self.codec.frames_per_block)
        window = min(self.window, _capacity(blocks))
        results, seconds = zip(*self._blocks(frames, geometry, window), strict=True)
        kind = self.codec.kind
        values = np.concatenate([r.result for r in results])
        probed = np.array([r.probed for r in results], np.int32)
        return Tokens(
            codes=None if isinstance(kind, Latents) else values,
            latents=values if isinstance(kind, Latents) else None,
            lengths=np.array([r.length for r in results], np.int32),
            losses=np.array([r.loss for r in results], np.float64),
            met=np.array([r.met for r in results], np.bool_),
            monotone=np.array([r.monotone for r in results], np.bool_),
            encoder_evaluations=probed,
            decoder_evaluations=probed,
            frames=frames.shape[0],
            height=geometry.fitted[0],
            width=geometry.fitted[1],
            original_height=geometry.original[0],
            original_width=geometry.original[1],
            fps=fps,
            picture=frames.shape[0] == 1,
            tokens_per_block=geometry.tokens,
            frames_per_block=self.codec.frames_per_block,
            min_tokens=self.codec.min_tokens,
            codebook_size=None if isinstance(kind, Latents) else kind.codebook_size,
            bits_per_token=self.codec.bits_per_token,
            window=window,
            fingerprint=self.codec.fingerprint,
            seconds=np.array(seconds, np.float64),
        )

    def encode_batch(self, clips: Sequence[np.ndarray]) -> list[Tokens]:
        """Tokens of several pictures or clips of any sizes; equal to encoding each alone."""
        return [self.encode(clip) for clip in clips]

    def decode(self, tokens: Tokens) -> UInt8[np.ndarray, "frames height width 3"]:
        """Frames of the fitted size, without padding and repeated frames; a picture is one frame.

        They are, bit for bit, those whose loss was measured when this codec encoded them on a
        machine like this one. The tokens' own window is used.

        **Raises:** `TokenFileError` if another model made the tokens; `ValueError` if they have
        more tokens per block than `limit`, or a window larger than this tokenizer's and the clip.
        """
        tokens.check(self.codec)
        geometry = self._padded(
            (tokens.original_height, tokens.original_width), tokens.height, tokens.width
        )
        if tokens.window > max(self.window, _capacity(tokens.blocks)):
            raise ValueError(
                f"the tokens were made with a window of {tokens.window} blocks, and this tokenizer "
                f"reserves memory for {self.window}; pass window={tokens.window}"
            )
        state = self.codec.decoder_state(tokens.window, *geometry.padded)
        frames = []
        for index in range(tokens.blocks):
            kept = tokens.block(index)
            values = self.codec.kind.zeros(geometry.tokens)
            values[: len(kept)] = kept
            pixels, state = self.codec.decode(values, len(kept), state)
            frames.append(pixels[:, : tokens.height, : tokens.width])
        return np.concatenate(frames)[: tokens.frames]

    def _blocks(
        self, frames: np.ndarray, geometry: _Geometry, window: int
    ) -> Iterator[tuple[Allocation[np.ndarray], float]]:
        """Each block's allocation, its result the kept tokens, and the seconds it took."""
        encoder = self.codec.encoder_state(window, *geometry.padded)
        decoder = self.codec.decoder_state(window, *geometry.padded)
        for first in range(0, frames.shape[0], self.codec.frames_per_block):
            start = time.perf_counter()
            truth = self.fit(frames[first : first + self.codec.frames_per_block])
            chosen = self._allocate(truth, geometry, encoder, decoder)
            encoder, decoder = chosen.result.encoder, chosen.result.decoder
            # Without the states: there is one of each at a time, however long the clip.
            facts = chosen.length, chosen.loss, chosen.met, chosen.monotone, chosen.probed
            yield Allocation(*facts, chosen.result.values), time.perf_counter() - start

    def _allocate(
        self, truth: np.ndarray, geometry: _Geometry, encoder: Any, decoder: Any
    ) -> Allocation[_Probed]:
        """Lets the strategy probe one block. Every probe starts from the same states."""
        count, height, width = truth.shape[:3]
        pixels = pad(truth, self.codec.frames_per_block, *geometry.padded)

        def probe(length: int) -> tuple[float, _Probed]:
            values, after = self.codec.encode(pixels, length, encoder)
            # What a decoder that has only the kept tokens is given.
            kept = self.codec.kind.zeros(geometry.tokens)
            kept[:length] = values[:length]
            decoded, then = self.codec.decode(kept, length, decoder)
            loss = self.strategy.criterion(truth, decoded[:count, :height, :width])
            return float(loss), _Probed(kept[:length], after, then)

        block = Block(min(self.codec.min_tokens, geometry.tokens), geometry.tokens)
        return allocate(self.strategy, block, probe)

    def _fitted(self, height: int, width: int) -> tuple[int, int]:
        return (height, width) if self.native else fitted_size(height, width, min(self.codec.size))

    def _geometry(self, height: int, width: int) -> _Geometry:
        return self._padded((height, width), *self._fitted(height, width))

    def _padded(self, original: tuple[int, int], height: int, width: int) -> _Geometry:
        patch = self.codec.patch
        padded = multiple(height, patch[0]), multiple(width, patch[1])
        tokens = self.codec.tokens_per_block(*padded)
        if tokens > self.limit:
            remedy = "do not ask for the native size" if self.native else "crop them"
            raise ValueError(
                f"frames of {original[0]}x{original[1]} pixels (height x width), taken as "
                f"{height}x{width}, make {tokens} tokens per block; the limit is {self.limit}: "
                f"shrink the frames, {remedy}, or pass limit={tokens}"
            )
        return _Geometry(original, (height, width), padded, tokens)


def _capacity(blocks: int) -> int:
    """Blocks to reserve memory for: a power of two, so that few windows are compiled for."""
    return 1 << (blocks - 1).bit_length()
