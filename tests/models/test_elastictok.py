"""What the model promises whatever its weights are."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictok.models import (
    CellRotary,
    Patching,
    RankRotary,
    count_parameters,
    presets,
    trainable,
    with_compute_dtype,
)
from elastictok.quantizers import FSQ, LFQ, VQ, GaussianVAE, Residual

BLOCKS, TOKENS, FRAMES = 3, 16, 6
lengths_strategy = st.lists(st.integers(2, TOKENS), min_size=BLOCKS, max_size=BLOCKS)


@eqx.filter_jit
def run(model, *args):
    return model(*args)


@pytest.fixture(scope="module")
def quantizers():
    key = jax.random.key(1)
    return {
        "fsq": FSQ((5, 5, 5)),
        "vae": GaussianVAE(3),
        "vq": VQ(16, 3, key=key),
        "lfq": LFQ(4),
        "residual": Residual(FSQ((5, 5, 5)), 2),
    }


QUANTIZERS = ["fsq", "vae", "vq", "lfq", "residual"]


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer_runs_through_the_same_model(make_tiny, quantizers, noise, name):
    model = make_tiny(quantizers[name])
    out = run(model, noise(0, FRAMES, 16, 16, 3), jnp.array([2, 9, 16]))
    assert out.pixels.shape == (FRAMES, 16, 16, 3)
    assert np.abs(out.pixels).max() <= 1
    assert out.latents.shape == (BLOCKS * TOKENS, quantizers[name].latent_dim)
    if name == "vae":
        assert out.codes is None
    else:
        assert jnp.issubdtype(out.codes.dtype, jnp.integer)
    assert np.isfinite(out.loss)


@settings(max_examples=15)
@given(lengths=lengths_strategy, seed=st.integers(0, 3))
def test_exactly_length_tokens_are_kept_and_the_rest_is_zero(make_tiny, noise, lengths, seed):
    model = make_tiny(GaussianVAE(3))
    latents = np.asarray(
        eqx.filter_jit(type(model).encode)(
            model, noise(seed, FRAMES, 16, 16, 3), jnp.asarray(lengths)
        )
    ).reshape(BLOCKS, TOKENS, -1)
    for block, length in zip(latents, lengths, strict=True):
        assert (block[:length] != 0).any(axis=-1).all()
        assert (block[length:] == 0).all()


@settings(max_examples=10)
@given(lengths=lengths_strategy, seed=st.integers(0, 3))
def test_call_is_encode_then_decode(tiny, noise, lengths, seed):
    pixels, lengths = noise(seed, FRAMES, 16, 16, 3), jnp.asarray(lengths)
    out = run(tiny, pixels, lengths)
    latents = eqx.filter_jit(type(tiny).encode)(tiny, pixels, lengths)
    np.testing.assert_allclose(latents, out.latents, atol=1e-6)
    decode = eqx.filter_jit(type(tiny).decode)
    back = decode(tiny, latents, lengths, height=16, width=16)
    np.testing.assert_allclose(back, out.pixels, atol=1e-5)
    # Tokens past a block's length are taken as dropped, whatever stands there.
    dirty = jnp.where(latents == 0, 7.0, latents)
    again = decode(tiny, dirty, lengths, height=16, width=16)
    kept = np.asarray(tiny.keep(lengths, 16, 16))
    if not (np.asarray(latents)[kept] == 0).any():
        np.testing.assert_allclose(again, out.pixels, atol=1e-5)


def test_lengths_outside_the_range_are_clipped(tiny, noise):
    pixels = noise(0, FRAMES, 16, 16, 3)
    wild = run(tiny, pixels, jnp.array([0, 100, -3]))
    tame = run(tiny, pixels, jnp.array([2, 16, 2]))
    np.testing.assert_array_equal(wild.pixels, tame.pixels)


@settings(max_examples=15)
@given(changed=st.integers(0, BLOCKS - 1), lengths=lengths_strategy, seed=st.integers(0, 3))
def test_changing_a_block_changes_no_earlier_block(tiny, noise, changed, lengths, seed):
    pixels = noise(seed, FRAMES, 16, 16, 3)
    start = changed * tiny.frames_per_block
    other = pixels.at[start : start + tiny.frames_per_block].multiply(-1)
    length_list = jnp.asarray(lengths)
    a, b = run(tiny, pixels, length_list), run(tiny, other, length_list)
    np.testing.assert_array_equal(a.pixels[:start], b.pixels[:start])
    tokens = changed * TOKENS
    np.testing.assert_array_equal(a.latents[:tokens], b.latents[:tokens])
    assert (a.pixels[start:] != b.pixels[start:]).any()


@settings(max_examples=15)
@given(
    segments=st.sampled_from([[0, 0, 1], [0, 1, 1], [3, 1, 3], [0, 1, 2]]),
    changed=st.integers(0, BLOCKS - 1),
    seed=st.integers(0, 3),
)
def test_documents_do_not_see_each_other(tiny, noise, segments, changed, seed):
    pixels = noise(seed, FRAMES, 16, 16, 3)
    start = changed * tiny.frames_per_block
    other = pixels.at[start : start + tiny.frames_per_block].multiply(-1)
    lengths, ids = jnp.array([5, 16, 9]), jnp.asarray(segments)
    a, b = run(tiny, pixels, lengths, ids), run(tiny, other, lengths, ids)
    for block, segment in enumerate(segments):
        if segment != segments[changed]:
            part = slice(block * tiny.frames_per_block, (block + 1) * tiny.frames_per_block)
            np.testing.assert_array_equal(a.pixels[part], b.pixels[part])


def test_a_packed_document_is_what_it_is_alone(tiny, noise):
    pixels, lengths = noise(0, FRAMES, 16, 16, 3), jnp.array([5, 16, 9])
    packed = run(tiny, pixels, lengths, jnp.array([0, 1, 1]))
    alone = run(tiny, pixels[2:], lengths[1:])
    # Positions differ by a block, and rotary embeddings know distances only.
    np.testing.assert_allclose(packed.pixels[2:], alone.pixels, atol=2e-5)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_padding_blocks_change_nothing(make_tiny, quantizers, noise, name):
    model = make_tiny(quantizers[name])
    lengths, ids = jnp.array([5, 16, 9]), jnp.array([0, 0, 1])
    valid = jnp.array([True, True, False])
    pixels = noise(0, FRAMES, 16, 16, 3)

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def loss(model, pixels):
        out = model(pixels, lengths, ids, valid)
        return jnp.mean((out.pixels[:4] - 0.5) ** 2) + out.loss, out

    (a, out), grad_a = loss(model, pixels)
    (b, other), grad_b = loss(model, pixels.at[4:].set(noise(9, 2, 16, 16, 3)))
    np.testing.assert_array_equal(out.pixels[:4], other.pixels[:4])
    assert a == b
    assert eqx.tree_equal(grad_a, grad_b)
    assert eqx.tree_equal(out.statistics, other.statistics)
    assert (np.asarray(out.latents[2 * TOKENS :]) == 0).all()


@pytest.mark.parametrize("name", QUANTIZERS)
def test_dropped_latents_reach_nothing_but_through_the_encoder(make_tiny, quantizers, noise, name):
    """The latents that the encoder computes at dropped positions are dead: no gradient, no sum."""
    model = make_tiny(quantizers[name])
    keep = model.keep(jnp.array([5, 16, 9]), 16, 16)
    latents = noise(1, BLOCKS * TOKENS, quantizers[name].input_dim)

    @jax.jit
    @jax.value_and_grad
    def loss(latents):
        q = model.quantizer(latents, keep)
        patches = model.decode_tokens(q.latents, grid=(1, 4, 4))
        statistics = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(q.statistics))
        return jnp.sum(patches) + q.loss + statistics + jnp.sum(q.latents)

    value, grad = loss(latents)
    assert (np.asarray(grad)[~np.asarray(keep)] == 0).all()
    other, other_grad = loss(jnp.where(keep[:, None], latents, 5.0))
    assert other == value
    np.testing.assert_array_equal(other_grad, grad)


def test_the_keep_mask_is_seen_by_the_encoder(tiny, noise):
    pixels = noise(0, FRAMES, 16, 16, 3)
    a = run(tiny, pixels, jnp.array([5, 5, 5])).latents[:5]
    b = run(tiny, pixels, jnp.array([16, 16, 16])).latents[:5]
    assert (a != b).any()


def test_an_encoder_that_is_told_all_can_be_run_once(tiny, noise):
    """What it gives is what encoding with all tokens gives, cut at the lengths."""
    pixels = noise(0, FRAMES, 16, 16, 3)
    full, lengths = jnp.full(BLOCKS, TOKENS), jnp.array([5, 2, 15])
    out = eqx.filter_jit(lambda m, x: m(x, lengths, told=full))(tiny, pixels)
    kept = tiny.keep(lengths, 16, 16)[:, None]
    everything = run(tiny, pixels, full).latents
    np.testing.assert_allclose(out.latents, jnp.where(kept, everything, 0), atol=1e-6)
    assert (out.latents != run(tiny, pixels, lengths).latents).any()


@settings(max_examples=10)
@given(seed=st.integers(0, 5))
def test_vmap_equals_loop(tiny, noise, seed):
    pixels = noise(seed, 3, FRAMES, 16, 16, 3)
    lengths = jnp.asarray(np.random.default_rng(seed).integers(2, TOKENS + 1, (3, BLOCKS)))
    segments = jnp.array([[0, 0, 0], [0, 1, 1], [0, 1, 2]])
    valid = jnp.array([[True, True, True], [True, True, False], [True, True, True]])
    batched = eqx.filter_jit(eqx.filter_vmap(lambda *a: tiny(*a)))(pixels, lengths, segments, valid)
    for i in range(3):
        single = run(tiny, pixels[i], lengths[i], segments[i], valid[i])
        np.testing.assert_allclose(batched.pixels[i], single.pixels, atol=1e-5)
        np.testing.assert_array_equal(batched.codes[i], single.codes)


@pytest.mark.parametrize("rotary", [RankRotary(100.0), CellRotary(30.0, 100.0)])
@pytest.mark.parametrize("size", [(16, 16), (8, 20)])
def test_cached_block_by_block_equals_the_whole_sequence(make_tiny, noise, size, rotary):
    model = make_tiny(GaussianVAE(3), rotary=rotary)
    height, width = size
    pixels, lengths = noise(0, FRAMES, height, width, 3), jnp.array([3, 10, 7])
    whole = run(model, pixels, lengths)
    cache = model.init_cache(BLOCKS, height=height, width=width)
    encode = eqx.filter_jit(type(model).encode_block)
    decode = eqx.filter_jit(type(model).decode_block)
    tokens = model.tokens_per_block(height, width)
    for block in range(BLOCKS):
        frames = slice(block * 2, block * 2 + 2)
        q, cache = encode(model, pixels[frames], lengths[block], cache)
        out, cache = decode(model, q.latents, lengths[block], cache, height=height, width=width)
        part = slice(block * tokens, (block + 1) * tokens)
        np.testing.assert_allclose(q.latents, whole.latents[part], atol=1e-5)
        np.testing.assert_allclose(out, whole.pixels[frames], atol=1e-5)


@pytest.mark.heavy
def test_a_full_cache_forgets_the_oldest_block_only(make_tiny, noise):
    """With one layer, a window of 2 blocks is exactly the sequence of the last two blocks."""
    model = make_tiny(GaussianVAE(3), layers=1)
    pixels, length = noise(0, 10, 16, 16, 3), jnp.array(9)
    cache = model.init_cache(2, height=16, width=16)
    for block in range(5):
        q, cache = model.encode_block(pixels[block * 2 : block * 2 + 2], length, cache)
    assert cache.encoder.count == 5
    last_two = model.encode(pixels[-4:], jnp.array([9, 9]))
    np.testing.assert_allclose(q.latents, last_two[TOKENS:], atol=2e-5)
    three = model.encode(pixels[-6:], jnp.array([9, 9, 9]))
    assert np.abs(q.latents - three[2 * TOKENS :]).max() > 1e-3


def test_remat_changes_memory_and_not_results(make_tiny, noise):
    pixels, lengths = noise(0, FRAMES, 16, 16, 3), jnp.array([3, 10, 7])

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(model):
        return jnp.mean(model(pixels, lengths).pixels ** 2)

    plain, remat = (loss(make_tiny(GaussianVAE(3), remat=flag)) for flag in (False, True))
    np.testing.assert_allclose(plain[0], remat[0], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(plain[1]), jax.tree.leaves(remat[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_bfloat16_keeps_the_stream_and_the_quantizer_in_float32(make_tiny, noise):
    pixels, lengths = noise(0, FRAMES, 16, 16, 3), jnp.array([16, 16, 16])
    exact = run(make_tiny(std=0.05), pixels, lengths)
    half = run(make_tiny(std=0.05, dtype=jnp.bfloat16), pixels, lengths)
    assert half.pixels.dtype == half.latents.dtype == jnp.float32
    assert np.mean(np.asarray(exact.codes) != np.asarray(half.codes)) < 0.15
    np.testing.assert_allclose(half.pixels, exact.pixels, atol=0.05)


def test_lengths_are_data_no_length_recompiles(tiny, noise):
    traces = []

    @jax.jit
    def count(pixels, lengths):
        traces.append(None)
        return tiny(pixels, lengths).pixels

    for length in range(2, 17):
        count(noise(0, FRAMES, 16, 16, 3), jnp.full(BLOCKS, length))
    assert len(traces) == 1


def test_published_sizes_are_those_of_the_paper():
    for preset, parameters in (
        (presets.elastictok_fsq_200m, 210_165_760),
        (presets.elastictok_vae_200m, 210_571_264),
    ):
        shapes = eqx.filter_eval_shape(preset, key=jax.random.key(0))
        assert count_parameters(shapes) == parameters
    fsq = eqx.filter_eval_shape(presets.elastictok_fsq_200m, key=jax.random.key(0))
    assert (fsq.min_tokens, fsq.max_tokens) == (256, 4096)
    vae = eqx.filter_eval_shape(presets.elastictok_vae_200m, key=jax.random.key(0))
    assert (vae.min_tokens, vae.max_tokens) == (128, 2048)


def test_trainable_is_all_but_the_quantizers_own_state(make_tiny, quantizers):
    flags = trainable(make_tiny(quantizers["vq"]))
    assert not any(jax.tree.leaves(flags.quantizer))
    assert all(jax.tree.leaves(flags.encoder))
    assert all(jax.tree.leaves(flags.decoder))


def test_misfits_are_named(tiny, make_tiny, noise):
    lengths = jnp.array([2, 2, 2])
    with pytest.raises(ValueError, match="5 frames are not a whole number of blocks of 2"):
        tiny(noise(0, 5, 16, 16, 3), lengths)
    with pytest.raises(ValueError, match="height is 15, which the patch's 4 does not divide"):
        tiny(noise(0, 6, 15, 16, 3), lengths)
    with pytest.raises(ValueError, match=r"lengths has shape \(2,\) for 3 blocks"):
        tiny(noise(0, 6, 16, 16, 3), lengths[:2])
    with pytest.raises(ValueError, match="a block has 2 frames; 4 were given"):
        tiny.encode_block(
            noise(0, 4, 16, 16, 3), lengths[0], tiny.init_cache(1, height=16, width=16)
        )
    with pytest.raises(ValueError, match="min_tokens is 17; a block has 1 to 16 tokens"):
        make_tiny(min_tokens=17)
    with pytest.raises(ValueError, match="context is 0"):
        make_tiny(context=0)
    with pytest.raises(ValueError, match="dim 16 over 3 heads"):
        make_tiny(heads=3)
    with pytest.raises(ValueError, match="the encoder gives 3 values per token where 4 are needed"):
        eqx.tree_at(lambda m: m.quantizer, tiny, FSQ((5, 5, 5, 5))).__check_init__()
    with pytest.raises(ValueError, match="the encoder takes 96 values"):
        eqx.tree_at(lambda m: m.patching, tiny, Patching(1, 4, 4)).__check_init__()


@pytest.mark.heavy
def test_bfloat16_changes_few_codes_at_the_default_initialisation():
    """Below 1 %; benchmarks/precision.py has the 200M geometry."""
    model = presets.small(key=jax.random.key(0))
    phase = jnp.arange(4)[:, None, None, None] / 4 + jnp.arange(3)
    y, x = jnp.mgrid[:128, :128][..., None] / 9.0
    pixels = 0.9 * jnp.sin(x + 0.6 * y + phase) * jnp.cos(y - phase)

    @eqx.filter_jit
    def codes(model):
        return model(pixels, jnp.asarray([256])).codes

    share = np.mean(np.asarray(codes(model) != codes(with_compute_dtype(model, jnp.bfloat16))))
    assert share < 0.01
