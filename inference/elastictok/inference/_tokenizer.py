"""From frames to tokens and back."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

import equinox as eqx
import numpy as np
from jaxtyping import UInt8

from elastictok.models import ElasticTok

from ._codec import ElasticCodec, Latents
from ._elastictok_codec import as_codec
from ._frames import check_frames, fitted_size, multiple, pad, resize, to_rgb
from ._strategies import AbstractStrategy, Block
from ._streams import DecoderState, EncoderState, FrameStream, TokenStream
from ._tokens import Tokens, check_rate
from ._walk import Chosen, Cut, State, Walk, run, run_side_by_side, walk

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

    def with_strategy(self, strategy: AbstractStrategy) -> "Tokenizer":
        """The same codec, window, `native` and `limit` with another strategy."""
        return Tokenizer(
            self.codec, strategy, window=self.window, native=self.native, limit=self.limit
        )

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
        (tokens,) = self.encode_batch([frames], [fps])
        return tokens

    def encode_batch(
        self,
        clips: Sequence[np.ndarray],
        fps: Sequence[float | int | None] | None = None,
    ) -> list[Tokens]:
        """Tokens of several pictures or clips of any sizes and lengths.

        What is found is equal to encoding each alone, unless the strategy plans over all of them
        (`Budget`). Clips of one size go through the codec side by side, as many as it has lanes;
        one that is finished makes room for the next. `seconds` of a block are its share of the time
        that it took.

        **Arguments:**

        - `clips`: see `encode`.
        - `fps`: of each.

        **Raises:** `ValueError` for input that `encode` refuses, before any is encoded.
        """
        rates = [None] * len(clips) if fps is None else list(fps)
        if len(rates) != len(clips):
            raise ValueError(f"fps has {len(rates)} values for {len(clips)} clips; give one each")
        sources = []
        for frames, rate in zip(clips, rates, strict=True):
            check_frames(frames)
            check_rate(rate)
            sources.append(_Clip(self, frames, self._geometry(*frames.shape[1:3])))
        plans = self.strategy.plan([clip.blocks for clip in sources])
        found: list[Tokens | None] = [None] * len(clips)
        groups: dict[tuple, list[int]] = {}
        for index, clip in enumerate(sources):
            groups.setdefault((clip.geometry.padded, clip.window), []).append(index)
        for group in groups.values():
            walks = [
                lambda index=index: sources[index].walk(None if plans is None else plans[index])
                for index in group
            ]
            for place, blocks in run_side_by_side(self.codec, walks, self.codec.lanes):
                clip, index = sources[group[place]], group[place]
                facts = clip.window, rates[index], len(clips[index]) == 1
                found[index] = self._tokens(blocks, clip.geometry, *facts)
        return [tokens for tokens in found if tokens is not None]

    def stream(
        self,
        frames: Iterable[np.ndarray],
        *,
        fps: float | int | None = None,
        state: EncoderState | None = None,
        end: bool = True,
    ) -> TokenStream:
        """Tokens block after block, each as soon as its frames are there.

        Memory does not grow with the number of frames: a block sees `window - 1` blocks before it.
        `Tokens.join` of all parts is what `encode` gives for the whole clip, bit for bit, where
        that has the same window (`encode` takes no more than the clip fills). How the frames are
        cut into pieces makes no difference.

        **Arguments:**

        - `frames`: any iterable, endless ones too, of frames `u8[height width channels]` or pieces
          `u8[frames height width channels]`, all of one size.
        - `fps`: frames per second, to be kept with the tokens.
        - `state`: to go on where another stream stopped: its `state`.
        - `end`: when `frames` are at an end, so is the stream: what is left over is encoded as the
          last, unfinished block. If false, it stays in the state for the next stream to go on with.

        **Returns:** an iterator over `Tokens` of one block each, with the `state` after the last.

        **Raises:** while it runs, `ValueError` for frames that `encode` refuses, or of another
        size; for a strategy that plans over whole clips; for a state of another codec.
        """
        check_rate(fps)
        return TokenStream(
            lambda height, width: self.start(height, width, fps),
            lambda state, frames, end: self.push(state, frames, end=end),
            self.codec.frames_per_block,
            frames,
            state,
            end,
        )

    def start(self, height: int, width: int, fps: float | int | None = None) -> EncoderState:
        """The state of a stream of frames of a size, before its first frame.

        **Raises:** `ValueError` if a block had more tokens than `limit`.
        """
        check_rate(fps)
        geometry = self._geometry(height, width)
        return EncoderState(
            walk=self._start(geometry, self.window),
            original=geometry.original,
            fitted=geometry.fitted,
            padded=geometry.padded,
            window=self.window,
            fps=fps,
            blocks=0,
            pending=np.zeros((0, *geometry.fitted, 3), np.uint8),
            recent=(),
            fingerprint=self.codec.fingerprint,
        )

    def push(
        self, state: EncoderState, frames: np.ndarray, *, end: bool = False
    ) -> tuple[list[Tokens], EncoderState]:
        """More frames of a stream: the blocks that they complete, and the next state.

        **Arguments:**

        - `state`: from `start`, or the last push. It stays as it is.
        - `frames`: `u8[frames height width channels]` of the stream's size; there may be none.
        - `end`: they are the last: encodes what does not fill a block, its last frame repeated.

        **Raises:** `ValueError` for frames of another size, a state of another codec, or a strategy
        that plans over whole clips.
        """
        state.check(self.codec, self.window)
        pending = state.pending
        if len(frames):
            check_frames(frames)
            if frames.shape[1:3] != state.original:
                raise ValueError(
                    f"frames of {frames.shape[1]}x{frames.shape[2]} pixels in a stream of "
                    f"{state.original[0]}x{state.original[1]} (height x width); start another one"
                )
            pending = np.concatenate([pending, self._resized(frames, state.fitted)])
        size = self.codec.frames_per_block
        ready = len(pending) if end else len(pending) // size * size
        geometry = _Geometry(
            state.original,
            state.fitted,
            state.padded,
            self.codec.tokens_per_block(*state.padded),
        )
        recent = list(state.recent)
        cuts = (
            self._cut(pending[first : first + size][: ready - first], geometry, recent)
            for first in range(0, ready, size)
        )
        parts: list[Tokens] = []
        runner = run(self.codec, walk(self.codec, self.strategy, cuts, state.walk))
        while True:
            try:
                chosen = next(runner)
            except StopIteration as stop:
                after = stop.value
                break
            facts = state.window, state.fps, False, state.blocks + len(parts)
            parts.append(self._tokens([chosen], geometry, *facts))
        # A copy: what is left must not hold on to all that was pushed.
        return parts, state.moved(after, len(parts), pending[ready:].copy(), tuple(recent))

    def decode(self, tokens: Tokens) -> UInt8[np.ndarray, "frames height width 3"]:
        """Frames of the fitted size, without padding and repeated frames; a picture is one frame.

        They are, bit for bit, those whose loss was measured when this codec encoded them on a
        machine like this one. The tokens' own window is used.

        **Raises:** `TokenFileError` if another model made the tokens; `ValueError` if they have
        more tokens per block than `limit`, a window larger than this tokenizer's and the clip, or
        begin in the middle of a stream (see `decode_stream`).
        """
        return np.concatenate(list(self.decode_stream([tokens])))

    def decode_stream(
        self,
        tokens: Iterable[Tokens],
        *,
        state: DecoderState | None = None,
        approximate: bool = False,
    ) -> FrameStream:
        """Frames block after block.

        Pixels depend on all earlier blocks: each layer sees the window, so that history reaches
        back `layers * (window - 1)` blocks. Starting in the middle of a stream is therefore exact
        only from the state that decoding had there.

        **Arguments:**

        - `tokens`: consecutive parts of one stream, of any number of blocks each.
        - `state`: of a decoding stream just before the first part: its `state`.
        - `approximate`: start in the middle without a state, as if the first part began its stream.
          The stream's `exact` is false then, as is that of every state that comes of it.

        **Returns:** an iterator over `u8[frames height width 3]` of one block each, with the
        `state` after the last, and `exact`.

        **Raises:** while it runs, as `decode`; `ValueError` if parts are not consecutive.
        """
        return FrameStream(
            lambda first: self.start_decoding(first, approximate=approximate),
            self.decode_block,
            tokens,
            state,
        )

    def start_decoding(self, tokens: Tokens, *, approximate: bool = False) -> DecoderState:
        """The decoder's state before the first block of these tokens.

        **Raises:** as `decode_stream`.
        """
        tokens.check(self.codec)
        if tokens.first_block and not approximate:
            raise ValueError(
                f"these tokens begin with block {tokens.first_block} of their stream, and pixels "
                "depend on the blocks before it; give the decoder's state from there, decode from "
                "the beginning, or pass approximate=True to decode_stream"
            )
        geometry = self._of_tokens(tokens)
        # A part of a stream does not say how much is to come.
        if tokens.window > max(self.window, _capacity(tokens.blocks)):
            raise ValueError(
                f"the tokens were made with a window of {tokens.window} blocks, and this tokenizer "
                f"reserves memory for {self.window}; pass window={tokens.window}"
            )
        return DecoderState(
            decoder=self.codec.decoder_state(tokens.window, *geometry.padded),
            padded=geometry.padded,
            window=tokens.window,
            blocks=tokens.first_block,
            exact=tokens.first_block == 0,
            fingerprint=self.codec.fingerprint,
        )

    def decode_block(
        self, tokens: Tokens, index: int, state: DecoderState
    ) -> tuple[UInt8[np.ndarray, "frames height width 3"], DecoderState]:
        """Frames of one block of these tokens, and the state after it.

        **Raises:** `TokenFileError` or `ValueError` if the state is not that before this block.
        """
        state.check(tokens, index)
        padded = self._of_tokens(tokens).padded
        if padded != state.padded:
            raise ValueError(
                f"the tokens are of frames of {padded[0]}x{padded[1]} pixels (height x width, in "
                f"whole patches), and the state of {state.padded[0]}x{state.padded[1]}: they are "
                "of different streams"
            )
        kept = tokens.block(index)
        values = self.codec.kind.zeros(tokens.tokens_per_block)
        values[: len(kept)] = kept
        pixels, decoder = self.codec.decode(values, len(kept), state.decoder)
        count = min(tokens.frames_per_block, tokens.frames - index * tokens.frames_per_block)
        return pixels[:count, : tokens.height, : tokens.width], state.moved(decoder)

    def _tokens(
        self,
        blocks: Sequence[Chosen],
        geometry: _Geometry,
        window: int,
        fps: float | int | None,
        picture: bool,
        first_block: int = 0,
    ) -> Tokens:
        kind = self.codec.kind
        values = np.concatenate([block.values for block in blocks])
        found = [block.allocation for block in blocks]
        return Tokens(
            codes=None if isinstance(kind, Latents) else values,
            latents=values if isinstance(kind, Latents) else None,
            lengths=np.array([each.length for each in found], np.int32),
            losses=np.array([each.loss for each in found], np.float64),
            met=np.array([each.met for each in found], np.bool_),
            monotone=np.array([each.monotone for each in found], np.bool_),
            measured=np.array([each.measured for each in found], np.bool_),
            encoder_evaluations=np.array([b.encoder_evaluations for b in blocks], np.int32),
            decoder_evaluations=np.array([b.decoder_evaluations for b in blocks], np.int32),
            frames=sum(block.frames for block in blocks),
            height=geometry.fitted[0],
            width=geometry.fitted[1],
            original_height=geometry.original[0],
            original_width=geometry.original[1],
            fps=fps,
            picture=picture,
            tokens_per_block=geometry.tokens,
            frames_per_block=self.codec.frames_per_block,
            min_tokens=self.codec.min_tokens,
            codebook_size=None if isinstance(kind, Latents) else kind.codebook_size,
            bits_per_token=self.codec.bits_per_token,
            window=window,
            fingerprint=self.codec.fingerprint,
            first_block=first_block,
            seconds=np.array([block.seconds for block in blocks], np.float64),
        )

    def _start(self, geometry: _Geometry, window: int) -> State:
        return State(
            self.codec.encoder_state(window, *geometry.padded),
            self.codec.decoder_state(window, *geometry.padded),
        )

    def _cut(self, truth: np.ndarray, geometry: _Geometry, recent: list[np.ndarray]) -> Cut:
        """A block of fitted frames made ready.

        **Arguments:**

        - `recent`: padded pixels of the blocks before that the strategy wants; moved on here.
        """
        pixels = pad(truth, self.codec.frames_per_block, *geometry.padded)
        recent.append(pixels)
        block = Block(
            min(self.codec.min_tokens, geometry.tokens),
            geometry.tokens,
            pixels=np.concatenate(recent) if len(recent) > 1 else pixels,
            frames_per_block=self.codec.frames_per_block,
        )
        del recent[: max(0, len(recent) - self.strategy.history)]
        return Cut(truth, pixels, block)

    def _resized(
        self, frames: np.ndarray, size: tuple[int, int]
    ) -> UInt8[np.ndarray, "frames height width 3"]:
        return resize(to_rgb(frames), *size)

    def _fitted(self, height: int, width: int) -> tuple[int, int]:
        return (height, width) if self.native else fitted_size(height, width, min(self.codec.size))

    def _geometry(self, height: int, width: int) -> _Geometry:
        return self._padded((height, width), *self._fitted(height, width))

    def _of_tokens(self, tokens: Tokens) -> _Geometry:
        original = tokens.original_height, tokens.original_width
        return self._padded(original, tokens.height, tokens.width)

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


@final
class _Clip:
    """A whole clip, fitted block by block when it is needed."""

    def __init__(self, tokenizer: Tokenizer, frames: np.ndarray, geometry: _Geometry):
        self._tokenizer, self._frames, self.geometry = tokenizer, frames, geometry
        self._size = tokenizer.codec.frames_per_block
        self.count = -(-len(frames) // self._size)
        self.window = min(tokenizer.window, _capacity(self.count))

    @property
    def blocks(self) -> "_Blocks":
        return _Blocks(self)

    def walk(self, plan: Sequence[int] | None) -> Walk:
        tokenizer = self._tokenizer
        state = tokenizer._start(self.geometry, self.window)
        return walk(tokenizer.codec, tokenizer.strategy, self.cuts(plan), state)

    def cuts(self, plan: Sequence[int] | None = None) -> Iterator[Cut]:
        """The blocks, one after another."""
        recent: list[np.ndarray] = []
        for index in range(self.count):
            frames = self._frames[index * self._size : (index + 1) * self._size]
            truth = self._tokenizer._resized(frames, self.geometry.fitted)
            cut = self._tokenizer._cut(truth, self.geometry, recent)
            if plan is not None:
                cut = cut._replace(block=replace(cut.block, planned=int(plan[index])))
            yield cut


@final
class _Blocks(Collection[Block]):
    """What a strategy that plans is shown of a clip; pixels are made when they are looked at."""

    def __init__(self, clip: _Clip):
        self._clip = clip

    def __len__(self) -> int:
        return self._clip.count

    def __iter__(self) -> Iterator[Block]:
        return (cut.block for cut in self._clip.cuts())

    def __contains__(self, block: object) -> bool:
        return any(block is each for each in self)


def _capacity(blocks: int) -> int:
    """Blocks to reserve memory for: a power of two, so that few windows are compiled for."""
    return 1 << (blocks - 1).bit_length()
