"""Streams: in whatever pieces frames come, and wherever it stops and goes on, the same tokens."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictok.inference import (
    MSE,
    AbstractStrategy,
    Binary,
    FixedLength,
    StateFileError,
    TokenFileError,
    Tokenizer,
    Tokens,
    WarmStart,
    load_decoder_state,
    load_encoder_state,
    save_decoder_state,
    save_encoder_state,
)


def clip(frames, height=8, width=8, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (frames, height, width, 3), np.uint8)


def pieces(frames, cuts):
    """The frames in pieces; a piece of one frame comes as a frame."""
    for start, stop in itertools.pairwise([0, *cuts, len(frames)]):
        yield frames[start] if stop - start == 1 else frames[start:stop]


def searched(codec, frames):
    """A search whose lengths vary, and which looks at the block before."""
    losses = Tokenizer(codec, FixedLength(3)).encode(frames).losses
    return WarmStart(Binary(MSE(float(np.median(losses)))))


@given(st.integers(2, 13), st.lists(st.integers(0, 13), max_size=6), st.integers(0, 5))
def test_pieces_change_nothing(patch_means, count, cuts, seed):
    codec, frames = patch_means(), clip(count, seed=seed)
    tok = Tokenizer(codec, searched(codec, frames))
    cuts = sorted(min(cut, count) for cut in cuts)
    parts = list(tok.stream(pieces(frames, cuts), fps=8))
    assert [part.first_block for part in parts] == list(range(-(-count // 2)))
    assert all(part.blocks == 1 for part in parts)
    whole = tok.encode(frames, fps=8)
    joined = Tokens.join(parts)
    # `encode` reserves no more window than the clip fills; nothing else may differ.
    assert joined.window == 3
    assert np.array_equal(joined.codes, whole.codes)
    for name in ("lengths", "losses", "met", "monotone", "encoder_evaluations", "frames", "fps"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))
    if whole.window == 3:
        assert joined == whole


@settings(max_examples=8)
@given(st.integers(5, 11), st.lists(st.integers(0, 11), max_size=3), st.integers(0, 3))
def test_an_elastictok_streams_bit_for_bit(model_tokenizer, count, cuts, seed):
    tok, frames = model_tokenizer(), clip(count, 16, 16, seed)
    parts = list(tok.stream(pieces(frames, sorted(min(cut, count) for cut in cuts))))
    assert Tokens.join(parts) == tok.encode(frames)


@pytest.fixture(scope="module")
def model_tokenizer(model):
    """A function, because hypothesis prints its arguments and a model is long."""
    tok = Tokenizer(model, WarmStart(Binary(MSE(0.4))))
    return lambda: tok


def test_a_blocks_tokens_come_as_soon_as_its_frames_are_in(patch_means):
    given_out = []

    def camera():
        for index, frame in enumerate(clip(7)):
            given_out.append(index)
            yield frame

    stream = Tokenizer(patch_means(), FixedLength(3)).stream(camera())
    seen = []
    for tokens in stream:
        seen.append((len(given_out), tokens.frames, stream.state.blocks))
    assert seen == [(2, 2, 1), (4, 2, 2), (6, 2, 3), (7, 1, 4)]
    assert list(Tokenizer(patch_means(), FixedLength(3)).stream([])) == []


@pytest.mark.parametrize("kind", ["patch means", "elastictok"])
@pytest.mark.parametrize("stop", [1, 4, 7])
def test_stopping_and_going_on_changes_nothing(model, patch_means, tmp_path, kind, stop):
    size = 8 if kind == "patch means" else 16
    frames = clip(11, size, size)

    def tokenizer():
        codec = patch_means() if kind == "patch means" else model
        return Tokenizer(codec, WarmStart(Binary(MSE(0.4))))

    first = tokenizer().stream(frames[:stop], fps=5, end=False)
    parts = list(first)
    assert len(first.state.pending) == stop % 2
    save_encoder_state(first.state, tmp_path / "state")
    again = tokenizer()
    state = load_encoder_state(tmp_path / "state", again.codec)
    parts += list(again.stream(frames[stop:], state=state))
    assert Tokens.join(parts) == tokenizer().encode(frames, fps=5)
    # A state is a value: what went on from it left it as it was.
    assert list(again.stream(frames[stop:], state=state)) == parts[stop // 2 :]
    save_encoder_state(state, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "state").read_bytes()


def test_the_state_is_that_after_the_last_block_given_out(patch_means):
    frames = clip(9)
    tok = Tokenizer(patch_means(), FixedLength(3))
    stream = tok.stream([frames])  # all in one piece
    first = [next(stream), next(stream)]
    rest = list(tok.stream(frames[4:], state=stream.state))
    assert Tokens.join(first + rest) == tok.encode(frames)


class LooksBack(AbstractStrategy):
    """Keeps as many tokens as the blocks that it sees have different brightness."""

    criterion: MSE = MSE(0)

    @property
    def history(self):
        return 2

    def search(self, block):
        assert len(block.pixels) % block.frames_per_block == 0
        blocks = block.pixels.reshape(-1, block.frames_per_block, *block.pixels.shape[1:])
        assert len(blocks) <= 3
        yield (block.clip(sum(int(b.sum()) * 3**i for i, b in enumerate(blocks)) % 4),)


def test_strategies_that_look_back_see_the_same(patch_means, tmp_path):
    frames = clip(12)
    tok = Tokenizer(patch_means(), LooksBack(), window=4)
    whole = tok.encode(frames)
    assert len(set(whole.lengths)) > 1
    stream = tok.stream(frames[:5], end=False)
    parts = list(stream)
    save_encoder_state(stream.state, tmp_path / "state")
    state = load_encoder_state(tmp_path / "state", tok.codec)
    assert len(state.recent) == 2
    parts += list(tok.stream(frames[5:], state=state))
    assert Tokens.join(parts).lengths.tolist() == whole.lengths.tolist()


def test_memory_is_bounded(patch_means):
    """However many frames came, a state holds the same."""
    stream = Tokenizer(patch_means(), LooksBack()).stream(clip(200))
    sizes = []
    for _ in stream:
        leaves = jax.tree.leaves((stream.state.walk, stream.state.pending, stream.state.recent))
        sizes.append(sum(np.asarray(leaf).nbytes for leaf in leaves))
        for array in (stream.state.pending, *stream.state.recent):
            assert array.base is None or array.base.nbytes < 10_000
    assert len(set(sizes[3:])) == 1


def test_decoding_streams_too(model):
    tok = Tokenizer(model, FixedLength(9))
    frames = clip(11, 16, 16)
    tokens = tok.encode(frames)
    whole = tok.decode(tokens)
    stream = tok.decode_stream([tokens.select(0, 2), tokens.select(2, 3), tokens.select(3, 6)])
    blocks = list(stream)
    assert [len(block) for block in blocks] == [2, 2, 2, 2, 2, 1]
    assert stream.exact
    np.testing.assert_array_equal(np.concatenate(blocks), whole)


def test_decoding_from_the_middle_needs_the_state_from_there(model, tmp_path):
    tok = Tokenizer(model, FixedLength(9))
    tokens = tok.encode(clip(12, 16, 16))
    whole = tok.decode(tokens)
    first = tok.decode_stream([tokens.select(0, 3)])
    list(first)
    save_decoder_state(first.state, tmp_path / "state")
    state = load_decoder_state(tmp_path / "state", tok.codec)
    rest = tok.decode_stream([tokens.select(3, 6)], state=state)
    np.testing.assert_array_equal(np.concatenate(list(rest)), whole[6:])
    assert rest.exact
    for start in (
        lambda: tok.decode(tokens.select(3, 6)),
        lambda: tok.decode_stream([tokens.select(3, 6)]),
    ):
        with pytest.raises(ValueError, match=r"begin with block 3.*approximate=True"):
            list(start())
    approximate = tok.decode_stream([tokens.select(3, 6)], approximate=True)
    assert approximate.exact is None
    near = np.concatenate(list(approximate))
    assert approximate.exact is False
    assert not approximate.state.exact
    assert near.shape == whole[6:].shape
    assert (near != whole[6:]).any()


def test_parts_out_of_order_are_refused(model):
    tok = Tokenizer(model, FixedLength(9))
    tokens = tok.encode(clip(12, 16, 16))
    with pytest.raises(ValueError, match="block 4 of a stream was given where block 2 follows"):
        list(tok.decode_stream([tokens.select(0, 2), tokens.select(4, 6)]))
    other = Tokenizer(model, FixedLength(9), window=2).encode(clip(12, 16, 16))
    with pytest.raises(ValueError, match="window of 2"):
        list(tok.decode_stream([tokens.select(0, 2), other.select(2, 3)]))
    wide = tok.encode(clip(12, 16, 24))
    with pytest.raises(ValueError, match=r"frames of 16x24 pixels .* and the state of 16x16"):
        list(tok.decode_stream([tokens.select(0, 2), wide.select(2, 3)]))


def test_states_and_frames_that_do_not_fit_are_refused(model, make_model, patch_means, tmp_path):
    tok = Tokenizer(model, FixedLength(9))
    stream = tok.stream(clip(3, 16, 16), end=False)
    list(stream)
    with pytest.raises(ValueError, match="frames of 8x8 pixels in a stream of 16x16"):
        list(tok.stream(clip(3), state=stream.state))
    with pytest.raises(ValueError, match="window of 3 blocks, and this tokenizer has 2"):
        list(Tokenizer(model, FixedLength(9), window=2).stream(clip(3), state=stream.state))
    other = Tokenizer(make_model(seed=5), FixedLength(9))
    with pytest.raises(ValueError, match="go on with the model that began"):
        list(other.stream(clip(3, 16, 16), state=stream.state))
    save_encoder_state(stream.state, tmp_path / "state")
    with pytest.raises(StateFileError, match="go on with the model that began"):
        load_encoder_state(tmp_path / "state", other.codec)
    with pytest.raises(StateFileError, match="is not the state of a decoder"):
        load_decoder_state(tmp_path / "state", tok.codec)
    tokens = other.encode(clip(3, 16, 16))
    decoding = tok.decode_stream([tok.encode(clip(2, 16, 16))])
    list(decoding)
    with pytest.raises(TokenFileError, match="the state is"):
        list(tok.decode_stream([tokens], state=decoding.state))
    with pytest.raises(ValueError, match="frames are float64"):
        list(tok.stream([np.zeros((16, 16, 3))]))


class Plans(AbstractStrategy):
    criterion: MSE = MSE(0)

    def search(self, block):
        if block.planned is None:
            raise ValueError("Plans needs whole clips; use encode or encode_batch")
        yield (block.planned,)

    def plan(self, clips):
        """The number of the clip, and the sum of the first pixels of its blocks."""
        return [
            [2 + (i + int(block.pixels[-1, 0, 0, 0])) % 3 for block in blocks]
            for i, blocks in enumerate(clips)
        ]


def test_plans_are_made_once_over_all_clips_and_not_on_streams(patch_means):
    clips = [clip(5, seed=1), clip(2, seed=2), clip(3, 16, 8, seed=3)]
    tok = Tokenizer(patch_means(), Plans())
    for index, (frames, tokens) in enumerate(zip(clips, tok.encode_batch(clips), strict=True)):
        firsts = [frames[min(i + 1, len(frames) - 1), 0, 0, 0] for i in range(0, len(frames), 2)]
        assert tokens.lengths.tolist() == [2 + (index + int(first)) % 3 for first in firsts]
    with pytest.raises(ValueError, match="whole clips"):
        list(tok.stream(clips[0]))


def test_every_flip_in_a_state_file_is_found(patch_means, tmp_path):
    tok = Tokenizer(patch_means(), LooksBack())
    stream = tok.stream(clip(7), end=False)
    list(stream)
    path = tmp_path / "state"
    save_encoder_state(stream.state, path)
    raw = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in rng.choice(len(raw), 150, replace=False):
        broken = bytearray(raw)
        broken[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        with pytest.raises(StateFileError):
            load_encoder_state(path, tok.codec)
    for size in (0, 7, 8, 50, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:size])
        with pytest.raises(StateFileError):
            load_encoder_state(path, tok.codec)
    path.write_bytes(raw.replace(rb"\"version\": 1", rb"\"version\": 2"))
    with pytest.raises(StateFileError, match="version 2"):
        load_encoder_state(path, tok.codec)
