"""Many clips at once: what is found is what each alone gives, and nobody pays for the others."""

import math

import equinox as eqx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictok.inference import (
    MSE,
    AbstractCriterion,
    AbstractStrategy,
    Binary,
    Binned,
    Block,
    Criterion,
    ElasticTokCodec,
    EncodeOnce,
    FixedLength,
    Full,
    KAry,
    Tokenizer,
    WarmStart,
    allocate,
)

LENGTHS = 24
VALUES = st.sampled_from([-math.inf, 0.0, 0.25, 0.5, 1.0, math.inf, math.nan]) | st.floats(0, 1)
# Index 0 stands for no token; lengths are 1 to 24.
CURVE = st.lists(VALUES, min_size=LENGTHS + 1, max_size=LENGTHS + 1)
BLOCKS = st.lists(st.integers(0, 4), min_size=1, max_size=6)
SEARCHES = {
    "full": Full,
    "binary": Binary,
    "3-ary": lambda c: KAry(c, 3),
    "9 bins": lambda c: Binned(c, 9),
    "warm start": lambda c: WarmStart(Binary(c)),
    "fixed": lambda c: FixedLength(7, c),
}


def one_by_one(strategy, codec, blocks):
    """Length, loss, met and number of probes of each block, by `allocate` and the curves alone."""
    found, previous = [], None
    for block in blocks:
        curve = codec.curves[block]
        out = allocate(
            strategy, Block(1, LENGTHS, previous), lambda n, c=curve: (float(c[n]), None)
        )
        previous = out.length
        found.append((out.length, out.loss, out.met, out.monotone, out.probed))
    return found


def same(a, b):
    np.testing.assert_array_equal(np.array(a, np.float64), np.array(b, np.float64))


@settings(max_examples=40)
@given(
    curves=st.lists(CURVE, min_size=5, max_size=5),
    clips=st.lists(BLOCKS, min_size=1, max_size=5),
    lanes=st.integers(1, 4),
    name=st.sampled_from(sorted(SEARCHES)),
    threshold=st.sampled_from([0.25, 0.5, math.inf]),
    once=st.booleans(),
)
def test_batches_find_what_each_block_needs(
    curves_codec, curves, clips, lanes, name, threshold, once
):
    codec = curves_codec(curves, lanes)
    strategy = SEARCHES[name](Criterion(codec.loss, threshold))
    strategy = EncodeOnce(strategy) if once else strategy
    tokens = Tokenizer(codec, strategy).encode_batch([codec.frames(blocks) for blocks in clips])
    for found, blocks in zip(tokens, clips, strict=True):
        expected = one_by_one(strategy, codec, blocks)
        lengths, losses, met, monotone, probed = zip(*expected, strict=True)
        same(found.lengths, lengths)
        same(found.losses, losses)
        same(found.met, met)
        same(found.monotone, monotone)
        same(found.decoder_evaluations, probed)
        same(found.encoder_evaluations, np.ones(len(blocks)) if once else probed)
        assert found.measured.all()
        assert (found.seconds > 0).all()
        # Every token of these codes is the number of its block.
        same(found.codes, np.repeat(blocks, found.lengths))
    told = [length for call in codec.calls["encode"] for length in call]
    if once:
        assert set(told) == {LENGTHS}
    for kind in ("encode", "decode"):
        passes = sum(getattr(t, f"{kind}r_evaluations").sum() for t in tokens)
        assert sum(map(len, codec.calls[kind])) == passes  # nothing is done twice, nor in vain


def test_a_finished_clip_makes_room_for_the_next(curves_codec):
    """One clip of 6 blocks and six of one block, two at a time: as many calls as the long one."""
    curves = np.ones((5, LENGTHS + 1))
    codec = curves_codec(curves, 2)
    strategy = FixedLength(4, Criterion(codec.loss, 0.5))
    clips = [codec.frames(blocks) for blocks in ([0, 1, 2, 3, 4, 0], [1], [2], [3], [4], [0], [1])]
    Tokenizer(codec, strategy, window=2).encode_batch(clips)
    for calls in codec.calls.values():
        # The long clip has another window than the short ones, and so goes through alone.
        assert [len(call) for call in calls] == [1] * 6 + [2] * 3
    codec = curves_codec(curves, 2)
    Tokenizer(codec, strategy, window=1).encode_batch(clips)
    for calls in codec.calls.values():
        assert [len(call) for call in calls] == [2] * 6


class Takes(AbstractStrategy):
    """Every third block measured; the others taken at a length of their own, unmeasured."""

    lengths: tuple
    criterion: AbstractCriterion
    state: list = eqx.field(default_factory=lambda: [0])

    def search(self, block):
        index = self.state[0] % len(self.lengths)
        self.state[0] += 1
        if index % 3 == 2:
            yield (self.lengths[index],)
            return None
        return self.lengths[index]
        yield


def test_unmeasured_blocks_cost_no_decoder_until_one_is_measured(model):
    """And then the pixels are right: the decoder is shown what it had not seen."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (16, 16, 16, 3), np.uint8)
    lengths = (4, 9, 5, 16, 7, 6, 4, 11)
    tok = Tokenizer(model, Takes(lengths, MSE(0)))
    tokens = tok.encode(frames)
    assert tokens.lengths.tolist() == list(lengths)
    assert tokens.measured.tolist() == [False, False, True] * 2 + [False, False]
    assert tokens.encoder_evaluations.tolist() == [1] * 8
    assert tokens.decoder_evaluations.tolist() == [0, 0, 3, 0, 0, 3, 0, 0]
    assert np.isnan(tokens.losses[~tokens.measured]).all()
    decoded = tok.decode(tokens)
    for index in (2, 5):
        part = slice(2 * index, 2 * index + 2)
        assert tokens.losses[index] == MSE(0)(tok.fit(frames)[part], decoded[part])


def clips_of(*counts):
    rng = np.random.default_rng(0)
    return [
        rng.integers(0, 256, (n, 4, 4, 3), np.uint8).repeat(4, axis=1).repeat(4, axis=2)
        for n in counts
    ]


def test_lanes_change_nothing_but_the_last_bits(make_model):
    model, clips = make_model(), clips_of(4, 3, 4)
    alone = Tokenizer(ElasticTokCodec(model, lanes=1), FixedLength(9)).encode_batch(clips)
    tok = Tokenizer(ElasticTokCodec(model, lanes=2), FixedLength(9))
    for frames, tokens, other in zip(clips, tok.encode_batch(clips), alone, strict=True):
        np.testing.assert_allclose(tokens.losses, other.losses, rtol=2e-3)
        # The very pixels that were measured, whatever was beside them.
        truth, decoded = tok.fit(frames), tok.decode(tokens)
        for index, loss in enumerate(tokens.losses):
            part = slice(2 * index, 2 * index + 2)
            assert loss == MSE(0)(truth[part], decoded[part])
        assert tok.encode(frames) == tokens


def test_no_batch_fill_compiles_anything(make_model, compilations):
    codec = ElasticTokCodec(make_model(frames_per_block=4), lanes=3)
    tok = Tokenizer(codec, KAry(MSE(0.92), 4))
    tok.encode_batch(clips_of(12, 12))
    before = len(compilations)
    assert before > 0
    for count in (1, 2, 3, 5):
        tokens = tok.encode_batch(clips_of(*[11] * count))
        assert len(tokens) == count
    Tokenizer(codec, WarmStart(EncodeOnce(Binary(MSE(0.92))))).encode_batch(clips_of(12, 11, 10))
    for each in tokens:
        tok.decode(each)
    assert len(compilations) == before


def test_lanes_and_rates_that_cannot_be(model):
    with pytest.raises(ValueError, match="lanes is 0"):
        ElasticTokCodec(model, lanes=0)
    with pytest.raises(ValueError, match="fps has 2 values for 1 clips"):
        Tokenizer(model, FixedLength(4)).encode_batch(clips_of(1), [8, 8])
    assert Tokenizer(model, FixedLength(4)).encode_batch([]) == []
