"""`Tokenizer` on ElasticTok: carried state, one compilation, the same pixels as the whole model."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictok.inference import (
    MSE,
    AbstractCriterion,
    AbstractStrategy,
    Binary,
    ElasticTokCodec,
    FixedLength,
    Full,
    TokenFileError,
    Tokenizer,
    Tokens,
)
from elastictok.quantizers import FSQ, LFQ, VQ, GaussianVAE, Residual

QUANTIZERS = {
    "fsq": lambda: FSQ((5, 5, 5)),
    "vae": lambda: GaussianVAE(3),
    "vq": lambda: VQ(32, 4, key=jax.random.key(7)),
    "lfq": lambda: LFQ(6),
    "residual of one": lambda: Residual(FSQ((5, 5, 5)), 1),
    "residual of two": lambda: Residual(FSQ((5, 5, 5)), 2),
}


def clip(frames, height=16, width=16, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (frames, -(-height // 4), -(-width // 4), 3), np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2)[:, :height, :width]


class InTurn(AbstractStrategy):
    """Given lengths, one for each block."""

    lengths: list
    criterion: AbstractCriterion = MSE(0)

    def search(self, block):
        yield (self.lengths.pop(0),)


def block_losses(tok, frames, tokens):
    truth, decoded = tok.fit(frames), tok.decode(tokens)
    return [
        tok.strategy.criterion(truth[i : i + 2], decoded[i : i + 2])
        for i in range(0, len(truth), 2)
    ]


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer_round_trips(make_model, tmp_path, name):
    model = make_model(QUANTIZERS[name]())
    frames = clip(5)
    curve = Tokenizer(model, FixedLength(9)).encode(frames)
    tok = Tokenizer(model, Binary(MSE(float(np.median(curve.losses)))))
    tokens = tok.encode(frames, fps=24)
    assert tokens.losses.tolist() == block_losses(tok, frames, tokens)
    tokens.save(tmp_path / "x")
    again = Tokens.load(tmp_path / "x")
    assert again == tokens
    fresh = Tokenizer(make_model(QUANTIZERS[name]()), FixedLength(4))
    np.testing.assert_array_equal(fresh.decode(again), tok.decode(tokens))
    if name == "vae":
        assert tokens.bits is None
        assert tokens.latents.shape == (tokens.lengths.sum(), 3)
    else:
        quantizer = model.quantizer
        assert tokens.codes.shape[0] == tokens.lengths.sum()
        assert tokens.codebook_size == quantizer.codebook_size
        assert tokens.bits == tokens.lengths.sum() * quantizer.bits_per_token + 3 * 4
        assert tokens.codes.ndim == (2 if name.startswith("residual") else 1)


@pytest.fixture(scope="module")
def tokenizer(model):
    """A function, because hypothesis prints its arguments and a model is long."""
    return lambda strategy: Tokenizer(model, strategy)


@settings(max_examples=15)
@given(
    st.integers(1, 7),
    st.sampled_from([Binary, Full]),
    st.sampled_from([0.3, 0.88, 0.9, 0.92, 0.95, 1.1]),  # an untrained model's losses are about 0.9
    st.integers(0, 99),
)
def test_losses_are_those_of_the_decoded_pixels(tokenizer, count, strategy, threshold, seed):
    tok = tokenizer(strategy(MSE(threshold)))
    frames = clip(count, seed=seed)
    tokens = tok.encode(frames)
    assert tokens.losses.tolist() == block_losses(tok, frames, tokens)
    assert np.all(tokens.met | (tokens.lengths == 16))
    assert tok.encode(frames) == tokens


def test_other_sizes(model):
    tok = Tokenizer(model, FixedLength(10))
    for shape in ((3, 16, 21), (1, 40, 30)):
        frames = clip(*shape)
        tokens = tok.encode(frames)
        assert tok.decode(tokens).shape == tok.fit(frames).shape
        assert tokens.losses.tolist() == block_losses(tok, frames, tokens)
    # Smaller than any trained size: fewer tokens than the model's least.
    native = Tokenizer(model, FixedLength(10), native=True)
    tokens = native.encode(clip(1, 3, 6))
    assert (tokens.tokens_per_block, tokens.lengths.tolist()) == (2, [2])
    assert native.decode(tokens).shape == (1, 3, 6, 3)


def test_cached_equals_the_whole_model(make_model):
    model = make_model(GaussianVAE(3))
    frames = clip(6)
    tokens = Tokenizer(model, InTurn([9, 4, 16])).encode(frames)
    assert tokens.lengths.tolist() == [9, 4, 16]
    lengths = jnp.asarray(tokens.lengths)
    pixels = jnp.asarray(frames, jnp.float32) / 127.5 - 1
    latents = np.asarray(model.encode(pixels, lengths)).reshape(3, 16, -1)
    for index in range(3):
        kept = tokens.lengths[index]
        np.testing.assert_allclose(tokens.block(index), latents[index, :kept], atol=1e-4)
    whole = model.decode(jnp.asarray(latents.reshape(48, -1)), lengths, height=16, width=16)
    decoded = Tokenizer(model, FixedLength(4)).decode(tokens)
    assert_rounded(decoded, np.asarray(whole))


def test_cached_codes_equal_the_whole_model(model):
    frames = clip(6)
    tokens = Tokenizer(model, FixedLength(11)).encode(frames)
    pixels = jnp.asarray(frames, jnp.float32) / 127.5 - 1
    out = model(pixels, jnp.full(3, 11))
    expected = np.asarray(out.codes).reshape(3, 16)[:, :11].reshape(-1)
    np.testing.assert_array_equal(tokens.codes, expected)
    assert_rounded(Tokenizer(model, FixedLength(4)).decode(tokens), np.asarray(out.pixels))


def assert_rounded(decoded, unit):
    """8-bit pixels are the nearest to the model's, but for those that are nearly half way."""
    exact = (unit.astype(np.float64) + 1) * 127.5
    assert decoded.shape == unit.shape
    assert np.abs(decoded - exact).max() < 0.5 + 0.02
    assert np.mean(decoded == np.clip(np.rint(exact), 0, 255)) > 0.98


def test_longer_than_the_context(make_model):
    model = make_model(GaussianVAE(3))
    tok = Tokenizer(model, FixedLength(9))
    frames = clip(14)
    tokens = tok.encode(frames)
    decoded = tok.decode(tokens)
    assert tokens.blocks == 7
    assert tokens.window == model.context == 3
    assert tokens.losses.tolist() == block_losses(tok, frames, tokens)
    # Later frames change nothing before them.
    later = frames.copy()
    later[8:] = 255 - later[8:]
    other = tok.encode(later)
    for index in range(4):
        np.testing.assert_array_equal(other.block(index), tokens.block(index))
        assert other.losses[index] == tokens.losses[index]
    np.testing.assert_array_equal(tok.decode(other)[:8], decoded[:8])
    # A block sees two blocks back and, with one layer, nothing beyond.
    earlier = frames.copy()
    earlier[:2] = 255 - earlier[:2]
    other = tok.encode(earlier)
    for index, same in enumerate([False, False, False, True, True, True, True]):
        assert np.array_equal(other.block(index), tokens.block(index)) is same
    alone = Tokenizer(model, FixedLength(9), window=1)
    other, changed = alone.encode(frames), alone.encode(earlier)
    assert not np.array_equal(other.block(0), changed.block(0))
    np.testing.assert_array_equal(other.values[9:], changed.values[9:])


def test_nothing_compiles_twice(make_model, compilations):
    model = make_model()
    tok = Tokenizer(model, FixedLength(4))
    before = len(compilations)
    jax.jit(lambda x: x * 1.2345)(jnp.ones(17))
    assert len(compilations) > before  # the counter counts
    tok.decode(tok.encode(clip(2)))
    before = len(compilations)
    for length in range(1, 18):
        Tokenizer(model, FixedLength(length)).encode(clip(2, seed=length))
    tokens = Tokenizer(model, Full(MSE(0.92))).encode(clip(9))
    tok.decode(tokens)
    tok.decode(tokens.truncate(5))
    Tokenizer(model, Binary(MSE(0.95))).encode_batch([clip(n, seed=n) for n in (1, 4, 3)])
    Tokenizer(model, FixedLength(4)).encode(clip(2, 40, 40))  # resized
    Tokenizer(make_model(seed=3), FixedLength(4)).encode(clip(2))  # other weights
    assert len(compilations) == before


def test_another_model_is_refused(make_model, tmp_path):
    tokens = Tokenizer(make_model(seed=0), FixedLength(4)).encode(clip(2))
    tokens.save(tmp_path / "x")
    back = Tokens.load(tmp_path / "x")
    back.check(make_model(seed=0))
    back.check(ElasticTokCodec(make_model(seed=0)))
    with pytest.raises(TokenFileError, match=tokens.fingerprint[:12]):
        back.check(make_model(seed=1))
    with pytest.raises(TokenFileError, match=tokens.fingerprint[:12]):
        Tokenizer(make_model(seed=1), FixedLength(4)).decode(back)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_broken_weights_are_named(make_model, part):
    model = make_model()

    def where(m):
        return getattr(m, part).in_proj.weight

    broken = eqx.tree_at(where, model, jnp.full_like(where(model), jnp.nan))
    with pytest.raises(FloatingPointError, match=part):
        Tokenizer(broken, FixedLength(4)).encode(clip(2))


def test_the_encoder_is_told_the_length(model):
    tok = [Tokenizer(model, FixedLength(n)) for n in (4, 16)]
    short, full = (t.encode(clip(2)) for t in tok)
    assert not np.array_equal(short.codes, full.codes[:4])


def test_a_window_that_memory_cannot_hold_is_refused_with_one_that_it_can(make_model, monkeypatch):
    from elastictok.inference import _elastictok_codec

    model = make_model()
    cache = jax.tree.leaves(model.init_cache(1, height=16, width=16))
    block = sum(leaf.nbytes for leaf in cache)
    monkeypatch.setattr(_elastictok_codec, "memory", lambda: 10 * block)
    tok = Tokenizer(model, FixedLength(4), window=6)
    with pytest.raises(ValueError, match=r"a window of 6 blocks of 16 tokens .* at most 2"):
        tok.encode(clip(12))
    assert Tokenizer(model, FixedLength(4), window=5).encode(clip(12)).window == 5
    # A short clip fills less.
    assert tok.encode(clip(6)).window == 4
    monkeypatch.setattr(_elastictok_codec, "memory", lambda: None)
    assert tok.encode(clip(12)).window == 6


def test_memory_is_that_of_the_machine():
    from elastictok.inference._elastictok_codec import memory

    found = memory()
    assert found is None or 2**28 < found < 2**48
