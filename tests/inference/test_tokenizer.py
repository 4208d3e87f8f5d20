"""`Tokenizer` on a NumPy codec, where everything can be checked by hand."""

import dataclasses
import math
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictok.inference import (
    L1,
    MSE,
    PSNR,
    Binary,
    Criterion,
    FixedLength,
    Full,
    Latents,
    TokenFileError,
    Tokenizer,
    Tokens,
)


def noise(shape, seed=0):
    """Smooth enough that a few tokens help, rough enough that all of them are not perfect."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 256, shape)
    level = rng.integers(0, 256, (shape[0], 1, 1, 1))
    return ((base + 3 * level) // 4).astype(np.uint8)


def block_losses(tok, frames, tokens):
    """The criterion on what decoding gives, block by block."""
    truth, decoded = tok.fit(frames), tok.decode(tokens)
    assert decoded.shape == truth.shape
    assert decoded.dtype == np.uint8
    step = tokens.frames_per_block
    return [
        tok.strategy.criterion(truth[i : i + step], decoded[i : i + step])
        for i in range(0, len(truth), step)
    ]


SHAPES = st.tuples(
    st.integers(1, 9), st.integers(1, 14), st.integers(1, 14), st.integers(1, 4)
).filter(lambda s: max(s[1:3]) <= 4 * min(s[1:3]))
STRATEGIES = st.sampled_from(
    [Full(MSE(0.05)), Binary(MSE(0.05)), Binary(L1(0.1)), Full(PSNR(20)), FixedLength(3)]
)


@given(SHAPES, STRATEGIES, st.booleans(), st.integers(0, 99))
def test_any_size_and_number_of_frames(patch_means, shape, strategy, native, seed):
    tok = Tokenizer(patch_means(), strategy, native=native)
    frames = noise(shape, seed)
    tokens = tok.encode(frames, fps=12.5)
    count, height, width = shape[:3]
    assert (tokens.frames, tokens.picture, tokens.fps) == (count, count == 1, 12.5)
    assert (tokens.original_height, tokens.original_width) == (height, width)
    fitted = tokens.height, tokens.width
    if native:
        assert fitted == (height, width)
    else:
        assert min(fitted) == 8
        assert abs(max(fitted) - 8 * max(height, width) / min(height, width)) <= 0.5
    assert tokens.tokens_per_block == math.ceil(fitted[0] / 4) * math.ceil(fitted[1] / 4)
    assert tokens.blocks == math.ceil(count / 2)
    # What was measured is what decoding gives, to the last bit.
    losses = block_losses(tok, frames, tokens)
    assert tokens.losses.tolist() == losses
    assert tokens.met.tolist() == [strategy.criterion.meets(loss) for loss in losses]
    if not isinstance(strategy, FixedLength):
        assert np.all(tokens.met | (tokens.lengths == tokens.tokens_per_block))


@given(st.integers(1, 7), st.sampled_from([0.0, 0.02, 0.03, 0.04, 4.0]), st.integers(0, 99))
def test_full_is_the_greedy_optimum(patch_means, count, threshold, seed):
    frames = noise((count, 8, 12, 3), seed)
    tokens = Tokenizer(patch_means(), Full(MSE(threshold))).encode(frames)
    # By hand, block after block: the codec with its states, the smallest length that will do.
    codec = patch_means()
    encoder, decoder = codec.encoder_state(3, 8, 12), codec.decoder_state(3, 8, 12)
    for index in range(math.ceil(count / 2)):
        truth = frames[2 * index : 2 * index + 2]
        pixels = truth if len(truth) == 2 else np.concatenate([truth, truth])
        curve = []
        for length in range(2, 7):
            values, after = codec.encode(pixels, length, encoder)
            values[length:] = 0
            out, then = codec.decode(values, length, decoder)
            error = (out[: len(truth)].astype(float) - truth) / 127.5
            curve.append(((error**2).mean(), length, after, then))
        good = [c for c in curve if c[0] <= threshold] or curve[-1:]
        assert tokens.lengths[index] == good[0][1]
        assert tokens.losses[index] == pytest.approx(good[0][0], rel=1e-12)
        assert tokens.met[index] == (good[0][0] <= threshold)
        losses = [c[0] for c in curve]
        assert tokens.monotone[index] == (losses == sorted(losses, reverse=True))
        encoder, decoder = good[0][2:]


@pytest.mark.parametrize("strategy", [Full(MSE(0.03)), Binary(MSE(0.03)), FixedLength(4)])
def test_evaluations_are_the_calls_made(patch_means, strategy):
    codec = patch_means()
    tokens = Tokenizer(codec, strategy).encode(noise((6, 8, 16, 3)))
    assert tokens.encoder_evaluations.sum() == len(codec.encoded)
    assert tokens.decoder_evaluations.sum() == len(codec.decoded)
    assert tokens.evaluations.sum() == len(codec.encoded) + len(codec.decoded)
    # Every probe of block i started from the state after block i - 1; no length came twice.
    assert len(set(codec.encoded)) == len(codec.encoded)
    assert {state for state, _ in codec.encoded} == {0, 1, 2}
    assert tokens.seconds.shape == (3,)
    assert np.all(tokens.seconds >= 0)


def test_states_do_not_pile_up(patch_means):
    class State(np.ndarray):
        """An array that can be referenced weakly."""

    codec, alive, most = patch_means(), weakref.WeakValueDictionary(), []

    def decode(values, length, state):
        pixels, after = patch_means.decode(codec, values, length, np.asarray(state))
        after = after.view(State)
        alive[len(most)] = after
        most.append(len(alive))
        return pixels, after

    codec.decode = decode
    Tokenizer(codec, Full(MSE(0.03))).encode(noise((30, 8, 8, 3)))
    assert max(most) <= 4


def test_colours(patch_means):
    tok = Tokenizer(patch_means(), FixedLength(4))
    grey = noise((3, 8, 8, 1))
    colour = np.repeat(grey, 3, axis=-1)
    opaque = np.full_like(grey, 255)
    expected = tok.encode(colour)
    assert tok.encode(grey) == expected
    assert tok.encode(np.concatenate([grey, opaque], axis=-1)) == expected
    assert tok.encode(np.concatenate([colour, opaque], axis=-1)) == expected
    clear = np.concatenate([colour, np.zeros_like(grey)], axis=-1)
    assert np.all(tok.fit(clear) == 255)


def test_padding_and_repeated_frames_do_not_count(patch_means):
    # 5x5 pixels are padded to 8x8; frame 2 is repeated. A criterion sees neither.
    seen = []

    def look(truth, reconstruction):
        seen.append((truth, reconstruction))
        return 0.0

    frames = noise((3, 5, 5, 3))
    tok = Tokenizer(patch_means(), FixedLength(4, Criterion(look, 1)), native=True)
    decoded = tok.decode(tok.encode(frames))
    for index, (truth, reconstruction) in enumerate(seen):
        np.testing.assert_array_equal(truth, frames[2 * index : 2 * index + 2])
        np.testing.assert_array_equal(reconstruction, decoded[2 * index : 2 * index + 2])


def test_a_picture_is_a_block_of_itself(patch_means):
    tok = Tokenizer(patch_means(), FixedLength(4))
    frame = noise((1, 8, 8, 3))
    picture, clip = tok.encode(frame), tok.encode(np.repeat(frame, 2, axis=0))
    assert picture.picture
    assert not clip.picture
    np.testing.assert_array_equal(picture.codes, clip.codes)
    np.testing.assert_array_equal(tok.decode(picture), tok.decode(clip)[:1])


def test_batch_is_a_loop(patch_means):
    tok = Tokenizer(patch_means(), Binary(MSE(0.03)))
    clips = [noise((n, 8, w, 3), n) for n, w in ((1, 8), (5, 12), (2, 9))]
    assert tok.encode_batch(clips) == [tok.encode(clip) for clip in clips]
    assert tok.encode_batch([]) == []


def test_truncated_and_saved_tokens_decode(patch_means, tmp_path):
    tok = Tokenizer(patch_means(), FixedLength(6))
    frames = noise((5, 8, 12, 3))
    short = tok.encode(frames).truncate(3)
    # The codec ignores lengths when it encodes, so this is what a length of 3 gives.
    np.testing.assert_array_equal(
        tok.decode(short), tok.decode(Tokenizer(patch_means(), FixedLength(3)).encode(frames))
    )
    short.save(tmp_path / "x")
    np.testing.assert_array_equal(tok.decode(Tokens.load(tmp_path / "x")), tok.decode(short))


@pytest.mark.parametrize(
    ("frames", "says"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), "float32"),
        (np.zeros((2, 8, 8, 3), np.int64), "int64"),
        (np.zeros((8, 8, 3), np.uint8), "picture\\[None\\]"),
        (np.zeros((2, 8, 8), np.uint8), "grey"),
        (np.zeros((2, 8, 8, 5), np.uint8), "channels"),
        (np.zeros((0, 8, 8, 3), np.uint8), "\\(0, 8, 8, 3\\)"),
        (np.zeros((2, 0, 8, 3), np.uint8), "no pixel"),
    ],
)
def test_other_input(patch_means, frames, says):
    tok = Tokenizer(patch_means(), FixedLength(4))
    for call in (tok.encode, tok.fit):
        with pytest.raises(ValueError, match=says):
            call(frames)


@pytest.mark.parametrize("fps", [0, -1.0, math.nan, math.inf])
def test_impossible_rates(patch_means, fps):
    codec = patch_means()
    with pytest.raises(ValueError, match="fps"):
        Tokenizer(codec, FixedLength(4)).encode(noise((2, 8, 8, 3)), fps=fps)
    assert not codec.encoded  # said before the work, not after


def test_too_many_tokens(patch_means):
    # 4 tokens at the trained 8x8, so 16 by default.
    wide, wider = noise((1, 8, 32, 3)), noise((1, 8, 33, 3))
    tok = Tokenizer(patch_means(), FixedLength(4))
    assert tok.encode(wide).tokens_per_block == 16
    with pytest.raises(ValueError, match=r"8x33, make 18 tokens .* limit is 16.*limit=18"):
        tok.encode(wider)
    large = Tokenizer(patch_means(), FixedLength(4), limit=18)
    tokens = large.encode(wider)
    assert tokens.tokens_per_block == 18
    with pytest.raises(ValueError, match="limit=18"):
        tok.decode(tokens)
    native = Tokenizer(patch_means(), FixedLength(4), native=True)
    with pytest.raises(ValueError, match="native"):
        native.encode(noise((1, 80, 80, 3)))
    # A sliver is refused before it is blown up.
    with pytest.raises(ValueError, match="limit"):
        tok.encode(np.zeros((1, 1, 60_000, 3), np.uint8))


@pytest.mark.parametrize("changes", [{"window": 0}, {"limit": 0}, {"window": -2}])
def test_settings(patch_means, changes):
    with pytest.raises(ValueError, match=r"window|limit"):
        Tokenizer(patch_means(), FixedLength(4), **changes)


def test_window_of_the_tokens_is_used(patch_means):
    codec = patch_means()
    asked = []
    codec.decoder_state = lambda window, h, w: (
        asked.append(window) or patch_means.decoder_state(codec, window, h, w)
    )
    frames = noise((4, 8, 8, 3))
    tokens = Tokenizer(codec, FixedLength(4), window=2).encode(frames)
    tok = Tokenizer(codec, FixedLength(4))
    tok.decode(tokens)
    assert (tokens.window, asked) == (2, [2, 2])
    # Older files may ask for more than their clip fills.
    tokens = dataclasses.replace(tokens, window=9)
    with pytest.raises(ValueError, match="window=9"):
        tok.decode(tokens)
    wide = Tokenizer(codec, FixedLength(4), window=9)
    np.testing.assert_array_equal(wide.decode(tokens), tok.decode(wide.encode(frames)))
    # A clip as long as the window: its tokens are worth the memory.
    long = Tokenizer(codec, FixedLength(4), window=4).encode(noise((8, 8, 8, 3)))
    tok.decode(long)


@pytest.mark.parametrize(("blocks", "reserved"), [(1, 1), (2, 2), (3, 4), (5, 8), (9, 10)])
def test_no_more_memory_is_reserved_than_the_clip_fills(patch_means, blocks, reserved):
    """A picture needs no cache of a long context; powers of two, so that few sizes compile."""
    codec = patch_means()
    asked = []
    codec.encoder_state = lambda window, h, w: (
        asked.append(window) or patch_means.encoder_state(codec, window, h, w)
    )
    tok = Tokenizer(codec, FixedLength(4), window=10)
    frames = noise((blocks * codec.frames_per_block, 8, 8, 3))
    assert tok.encode(frames).window == reserved
    assert asked == [reserved]


def test_tokens_of_another_codec(patch_means):
    tok = Tokenizer(patch_means(), FixedLength(4))
    tokens = tok.encode(noise((2, 8, 8, 3)))
    tokens.check(tok.codec)
    for name, value, says in (
        ("fingerprint", "someone else", "someone el"),
        ("kind", Latents(1), "kind is"),
        ("frames_per_block", 3, "frames_per_block"),
        ("min_tokens", 3, "min_tokens"),
        ("bits_per_token", 7.0, "bits_per_token"),
        ("patch", (2, 2), None),
    ):
        other = patch_means()
        setattr(other, name, value)
        if says is None:  # the same padded size: nothing is wrong
            tokens.check(other)
            continue
        with pytest.raises(TokenFileError, match=says):
            tokens.check(other)
        with pytest.raises(TokenFileError, match=says):
            Tokenizer(other, FixedLength(4)).decode(tokens)
    other = patch_means()
    other.tokens_per_block = lambda height, width: 5
    with pytest.raises(TokenFileError, match="tokens_per_block"):
        tokens.check(other)


def test_losses_that_are_not_numbers(patch_means):
    frames = noise((4, 8, 12, 3))

    def sometimes(truth, reconstruction):
        error = MSE(0)(truth, reconstruction)
        return math.nan if error > 0.03 else error

    for strategy in (Full(Criterion(sometimes, 0.05)), Binary(Criterion(sometimes, 0.05))):
        tokens = Tokenizer(patch_means(), strategy).encode(frames)
        assert not np.any(tokens.met & np.isnan(tokens.losses))
    never = Tokenizer(patch_means(), Full(Criterion(lambda a, b: math.nan, 1.0))).encode(frames)
    assert not never.met.any()
    assert not never.monotone.any()
    assert never.lengths.tolist() == [6, 6]
