"""Encoders and decoders other than the paper's: what the model promises with each of them."""

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictok.models import (
    Asked,
    CellRotary,
    CoarseToFine,
    CoordDecoder,
    EarlierBlocks,
    ElasticTok,
    Encoder,
    Patching,
    PatchSample,
    RankRotary,
    RecentBlocks,
    RegisterDecoder,
    RegisterEncoder,
    load,
    save,
    trainable,
    with_compute_dtype,
)
from elastictok.models._cells import Cells
from elastictok.quantizers import FSQ, GaussianVAE

SIZES = dict(dim=16, hidden=24, heads=2, std=0.3, place_frequencies=4)
PATCH, LATENT, REGISTERS = 2 * 4 * 4 * 3, 3, 7
CELLS = 16


def build(encoder, decoder, quantizer, order=None) -> ElasticTok:
    """16x16 pixels in 16 cells, 2 frames a block."""
    return ElasticTok(
        Patching(2, 4, 4),
        CoarseToFine() if order is None else order,
        encoder,
        quantizer,
        decoder,
        frames_per_block=2,
        min_tokens=1,
        size=(16, 16),
        context=3,
    )


def registers(rotary=None, visibility=None, quantizer=None) -> ElasticTok:
    options = SIZES | dict(
        registers=REGISTERS,
        layers=2,
        rotary=CellRotary(30.0, 100.0) if rotary is None else rotary,
        visibility=EarlierBlocks() if visibility is None else visibility,
    )
    e, d = jax.random.split(jax.random.key(0))
    quantizer = GaussianVAE(LATENT) if quantizer is None else quantizer
    return build(
        RegisterEncoder(PATCH, quantizer.input_dim, **options, key=e),
        RegisterDecoder(quantizer.latent_dim, PATCH, **options, key=d),
        quantizer,
    )


def coordinates(reach=2, sample=None, quantizer=None) -> ElasticTok:
    e, d = jax.random.split(jax.random.key(1))
    rotary = CellRotary(30.0, 100.0)
    quantizer = GaussianVAE(LATENT) if quantizer is None else quantizer
    return build(
        Encoder(PATCH, quantizer.input_dim, layers=2, rotary=rotary, **SIZES, key=e),
        CoordDecoder(
            quantizer.latent_dim,
            PATCH,
            layers=2,
            cross_layers=2,
            rotary=rotary,
            reach=reach,
            sample=sample,
            **SIZES,
            key=d,
        ),
        quantizer,
    )


@pytest.fixture(scope="module")
def models(make_tiny):
    return {
        "recent": with_visibility(make_tiny(GaussianVAE(LATENT), min_tokens=1), RecentBlocks(2)),
        "registers": registers(),
        "registers_by_rank": registers(rotary=RankRotary(100.0)),
        "registers_recent": registers(visibility=RecentBlocks(2)),
        "coordinates": coordinates(),
        "coordinates_far": coordinates(reach=3),
    }


def with_visibility(model: ElasticTok, visibility) -> ElasticTok:
    return eqx.tree_at(
        lambda m: (m.encoder.visibility, m.decoder.visibility),
        model,
        (visibility, visibility),
        is_leaf=lambda node: isinstance(node, EarlierBlocks),
    )


# One of each kind; the heavy run has the others.
NAMES = [
    "registers",
    "coordinates",
    *(
        pytest.param(name, marks=pytest.mark.heavy)
        for name in ("recent", "registers_recent", "registers_by_rank", "coordinates_far")
    ),
]
every = pytest.mark.parametrize("name", NAMES)

run = eqx.filter_jit(lambda model, *args: model(*args))
step = eqx.filter_jit(
    lambda model, pixels, length, cache: model.encode_block(pixels, length, cache)
)
unstep = eqx.filter_jit(
    lambda model, latents, length, cache: model.decode_block(
        latents, length, cache, height=16, width=16
    )
)


def streamed(model, pixels, lengths, window):
    """Latents and pixels of a clip, block by block."""
    cache = model.init_cache(window, height=16, width=16)
    latents, frames = [], []
    for block, length in zip(pixels.reshape(-1, 2, 16, 16, 3), lengths, strict=True):
        out, cache = step(model, block, jnp.int32(length), cache)
        made, cache = unstep(model, out.latents, jnp.int32(length), cache)
        latents.append(out.latents)
        frames.append(made)
    return jnp.concatenate(latents), jnp.concatenate(frames)


@every
def test_block_by_block_is_as_all_at_once(models, noise, name):
    model, pixels = models[name], noise(0, 10, 16, 16, 3)
    lengths = np.array([3, 1, model.max_tokens, 5, 2])
    out = run(model, pixels, jnp.asarray(lengths))
    latents, frames = streamed(model, pixels, lengths, 5)
    np.testing.assert_allclose(latents, out.latents, atol=1e-4)
    np.testing.assert_allclose(frames, out.pixels, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "window"),
    [
        ("recent", 3),
        pytest.param("registers_recent", 2, marks=pytest.mark.heavy),
        pytest.param("registers_recent", 4, marks=pytest.mark.heavy),
    ],
)
def test_a_stream_remembers_no_more_than_it_sees(models, noise, name, window):
    """Once the ring is full, its oldest block is not the first in memory."""
    model, pixels = models[name], noise(1, 14, 16, 16, 3)
    lengths = np.array([3, 1, 7, 5, 2, 6, 4])
    out = run(model, pixels, jnp.asarray(lengths))
    latents, frames = streamed(model, pixels, lengths, window)
    np.testing.assert_allclose(latents, out.latents, atol=1e-4)
    np.testing.assert_allclose(frames, out.pixels, atol=1e-4)


def test_a_decoder_that_reaches_two_blocks_remembers_two(models, noise):
    cache = models["coordinates"].init_cache(100, height=16, width=16)
    assert cache.decoder.latents.shape == (2, CELLS, LATENT)
    assert models["coordinates"].init_cache(1, height=16, width=16).decoder.latents.shape[0] == 1


@every
@settings(max_examples=4)
@given(data=st.data())
def test_no_block_sees_a_later_one(models, noise, name, data):
    model = models[name]
    changed = data.draw(st.integers(1, 3))
    lengths = jnp.asarray(data.draw(st.lists(st.integers(1, 7), min_size=4, max_size=4)))
    pixels = noise(2, 8, 16, 16, 3)
    other = pixels.at[2 * changed :].set(noise(3, 8 - 2 * changed, 16, 16, 3))
    a, b = run(model, pixels, lengths), run(model, other, lengths)
    np.testing.assert_array_equal(a.pixels[: 2 * changed], b.pixels[: 2 * changed])
    assert np.abs(a.pixels[2 * changed :] - b.pixels[2 * changed :]).max() > 1e-3


@every
def test_how_far_back_a_block_sees(models, noise, name):
    """Through the encoder and the decoder, each of two layers, after one another."""
    model, pixels = models[name], noise(4, 10, 16, 16, 3)
    lengths = jnp.full(5, 4)
    other = pixels.at[:2].set(noise(5, 2, 16, 16, 3))
    moved = np.abs(run(model, pixels, lengths).pixels - run(model, other, lengths).pixels)
    per_block = moved.reshape(5, -1).max(axis=1)
    if name in ("recent", "registers_recent"):
        # A block back in each of two layers on either side.
        assert (per_block[:4] > 0).all()
    else:
        assert (per_block > 1e-4).all()  # the encoder alone sees all


def test_blocks_that_see_only_themselves_are_alone(make_tiny, noise):
    model = with_visibility(make_tiny(GaussianVAE(LATENT)), RecentBlocks(1))
    pixels, lengths = noise(6, 6, 16, 16, 3), jnp.array([4, 9, 16])
    together = run(model, pixels, lengths).pixels
    # Rotary embeddings tell distances alone.
    for i in range(3):
        alone = run(model, pixels[2 * i : 2 * i + 2], lengths[i : i + 1]).pixels
        np.testing.assert_allclose(together[2 * i : 2 * i + 2], alone, atol=1e-4)


@every
@settings(max_examples=4)
@given(data=st.data())
def test_exactly_length_tokens_reach_the_decoder(models, noise, name, data):
    model = models[name]
    lengths = data.draw(st.lists(st.integers(1, model.max_tokens), min_size=3, max_size=3))
    out = run(model, noise(7, 6, 16, 16, 3), jnp.asarray(lengths))
    latents = np.asarray(out.latents).reshape(3, model.max_tokens, -1)
    for block, length in zip(latents, lengths, strict=True):
        assert (block[:length] != 0).any(axis=-1).all()
        assert not block[length:].any()
    decode = eqx.filter_jit(lambda m, z: m.decode(z, jnp.asarray(lengths), height=16, width=16))
    dropped = ~np.asarray(model.keep(jnp.asarray(lengths), 16, 16))
    noisy = jnp.where(dropped[:, None], 9.0, out.latents)
    np.testing.assert_array_equal(decode(model, out.latents), decode(model, noisy))
    np.testing.assert_allclose(decode(model, out.latents), out.pixels, atol=1e-5)


@every
def test_the_encoder_is_told_what_is_kept(models, noise, name):
    model, pixels = models[name], noise(8, 2, 16, 16, 3)
    latents = [run(model, pixels, jnp.array([n])).latents[0] for n in (2, 7)]
    assert np.abs(latents[0] - latents[1]).max() > 1e-3


@every
def test_documents_and_padding_do_not_see_each_other(models, noise, name):
    model, pixels = models[name], noise(9, 8, 16, 16, 3)
    lengths = jnp.array([3, 5, 7, 2])
    packed = run(
        model, pixels, lengths, jnp.array([4, 4, 2, 2]), jnp.array([True, True, True, False])
    )
    first = run(model, pixels[:4], lengths[:2])
    np.testing.assert_allclose(packed.pixels[:4], first.pixels, atol=1e-4)
    other = pixels.at[:4].set(0.3).at[6:].set(-0.9)
    again = run(
        model, other, lengths, jnp.array([4, 4, 2, 2]), jnp.array([True, True, True, False])
    )
    np.testing.assert_array_equal(packed.pixels[4:6], again.pixels[4:6])
    tokens = model.max_tokens
    assert not np.asarray(packed.latents[3 * tokens :]).any()


@every
def test_a_document_that_sees_only_itself_starts_anew(models, noise, name):
    """Where positions are told by distance alone, the second document is as if it came first."""
    model, pixels = models[name], noise(10, 6, 16, 16, 3)
    lengths = jnp.array([3, 5, 7])
    packed = run(model, pixels, lengths, jnp.array([0, 1, 1]))
    second = run(model, pixels[2:], lengths[1:])
    np.testing.assert_allclose(packed.pixels[2:], second.pixels, atol=1e-3)


@every
def test_patches_asked_for_are_those_of_the_whole(models, noise, name):
    model, pixels = models[name], noise(11, 6, 16, 16, 3)
    latents = run(model, pixels, jnp.array([3, 5, 7])).latents
    segments = jnp.repeat(jnp.array([0, 1, 1]), CELLS)
    valid = jnp.repeat(jnp.array([True, False, True]), CELLS)
    cells = Cells(model.order, (1, 4, 4))
    asked = Asked(jnp.array([2, 0]), jnp.array([[3, 15, 0], [7, 1, 2]]))

    @eqx.filter_jit
    def both(model, latents):
        some = model.decoder.ask(latents, asked, cells, segments=segments, key_valid=valid)
        return some, model.decoder(latents, cells, segments=segments, key_valid=valid)

    some, whole = both(model, latents)
    whole = np.asarray(whole).reshape(3, CELLS, -1)
    wanted = np.stack([whole[2][[3, 15, 0]], whole[0][[7, 1, 2]]])
    np.testing.assert_allclose(some, wanted, atol=1e-5)


def products(jaxpr) -> int:
    """Floating-point operations of the matrix products of a program."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contract)
        times = eqn.params.get("length", 1)
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(value, "eqns"):
                total += times * products(getattr(value, "jaxpr", value))
    return total


def places(model, positions: int) -> int:
    """Of the embedding of that many places, which is counted nowhere."""
    return 2 * positions * math.prod(model.place.weight.shape)


@pytest.mark.parametrize("blocks", [1, 4])
def test_flops_of_registers_are_those_of_the_program(blocks):
    """Dense attention, as on a CPU, multiplies what is hidden as well."""
    model, cells = registers(), Cells(CoarseToFine(), (1, 4, 4))
    patches, keep = jnp.zeros((blocks * CELLS, PATCH)), jnp.ones(blocks * REGISTERS, bool)
    latents = jnp.zeros((blocks * REGISTERS, LATENT))
    block = CELLS + REGISTERS
    hidden = (blocks * block) ** 2 - block**2 * blocks * (blocks + 1) // 2
    for side, program in (
        (model.encoder, jax.make_jaxpr(lambda: model.encoder(patches, keep, cells))()),
        (model.decoder, jax.make_jaxpr(lambda: model.decoder(latents, cells))()),
    ):
        counted = products(program.jaxpr) - places(side, CELLS)
        assert side.flops(blocks, (1, 4, 4)) == counted - 4 * hidden * 16 * 2


@pytest.mark.parametrize("sample", [None, PatchSample(2, 5)])
def test_flops_of_coordinates_are_those_of_the_program(sample):
    blocks, reach = 3, 2
    decoder, cells = coordinates(sample=sample).decoder, Cells(CoarseToFine(), (1, 4, 4))
    latents = jnp.zeros((blocks * CELLS, LATENT))
    asked = Asked(jnp.arange(blocks), jnp.tile(jnp.arange(CELLS), (blocks, 1)))
    if sample is not None:
        asked = sample.draw(jax.random.key(0), jnp.ones(blocks, bool), cells)
    program = jax.make_jaxpr(lambda: decoder.ask(latents, asked, cells))()
    count, each = asked.ranks.shape
    hidden = CELLS**2  # the window's first block does not see its second
    counted = products(program.jaxpr) - count * places(decoder, each) - places(decoder, reach * 16)
    assert decoder.flops(blocks, (1, 4, 4)) == counted - count * 4 * hidden * 16 * 2


def test_what_a_sample_costs_the_decoder_does_not_depend_on_the_clip():
    model = coordinates(sample=PatchSample(2, 5))
    cells = Cells(model.order, (1, 4, 4))

    def cost(blocks: int) -> int:
        def work(latents, key):
            asked = model.decoder.sample.draw(key, jnp.ones(blocks, bool), cells)
            return model.decoder.ask(latents, asked, cells)

        latents = jnp.zeros((blocks * CELLS, LATENT))
        return products(jax.make_jaxpr(work)(latents, jax.random.key(0)).jaxpr)

    assert cost(2) == cost(4) == cost(64)
    assert coordinates().decoder.flops(64, (1, 4, 4)) == 64 * coordinates().decoder.flops(
        1, (1, 4, 4)
    )


@settings(max_examples=20)
@given(
    seed=st.integers(0, 1000),
    valid=st.lists(st.booleans(), min_size=1, max_size=6),
    blocks=st.integers(1, 7),
    patches=st.integers(1, 20),
)
def test_a_sample_has_nothing_twice_and_padding_last(seed, valid, blocks, patches):
    cells = Cells(CoarseToFine(), (1, 4, 4))
    asked = PatchSample(blocks, patches).draw(jax.random.key(seed), jnp.asarray(valid), cells)
    count = min(blocks, len(valid))
    assert asked.blocks.shape == (count,)
    assert asked.ranks.shape == (count, min(patches, CELLS))
    assert len(set(np.asarray(asked.blocks).tolist())) == count
    for row in np.asarray(asked.ranks):
        assert len(set(row.tolist())) == len(row)
        assert row.min() >= 0
        assert row.max() < CELLS
    drawn = [valid[i] for i in asked.blocks]
    assert sum(drawn) == min(count, sum(valid))
    assert drawn == sorted(drawn, reverse=True)


def test_every_block_and_patch_is_asked_for_alike():
    cells = Cells(CoarseToFine(), (1, 4, 4))
    draw = jax.jit(jax.vmap(lambda k: PatchSample(2, 4).draw(k, jnp.ones(5, bool), cells)))
    asked = draw(jax.random.split(jax.random.key(0), 4000))
    blocks = np.bincount(np.asarray(asked.blocks).ravel(), minlength=5) / 4000
    np.testing.assert_allclose(blocks, 2 / 5, atol=0.03)
    ranks = np.bincount(np.asarray(asked.ranks).ravel(), minlength=CELLS) / 8000
    np.testing.assert_allclose(ranks, 4 / CELLS, atol=0.03)


def mean_error(found) -> float:
    error = jnp.mean((found.prediction - found.target) ** 2, axis=(1, 2, 3, 4))
    return float(jnp.sum(jnp.where(found.valid, error, 0)) / jnp.sum(found.valid))


reconstruct = eqx.filter_jit(lambda m, x, n, v, key: m.reconstruct(x, n, None, v, key=key))


def test_a_sample_of_everything_is_everything(noise):
    valid = jnp.array([False, True, True])
    args = noise(12, 6, 16, 16, 3), jnp.array([3, 5, 7]), valid, jax.random.key(0)
    quantizer = FSQ((5, 5, 5))
    whole = reconstruct(coordinates(quantizer=quantizer), *args)
    assert whole.prediction.shape == (3, 2, 16, 16, 3)
    drawn = reconstruct(coordinates(sample=PatchSample(9, 99), quantizer=quantizer), *args)
    assert drawn.prediction.shape == (3, 2, 4, 4 * CELLS, 3)
    assert mean_error(drawn) == pytest.approx(mean_error(whole), rel=1e-5)
    some = coordinates(sample=PatchSample(1, 4), quantizer=quantizer)
    keys = jax.random.split(jax.random.key(1), 200)
    many = eqx.filter_jit(
        lambda m: jax.vmap(lambda key: m.reconstruct(*args[:2], None, valid, key=key))(keys)
    )(some)
    errors = [mean_error(jax.tree.map(lambda x, i=i: x[i], many)) for i in range(200)]
    assert np.mean(errors) == pytest.approx(mean_error(whole), rel=0.1)


def test_what_is_compared_is_the_patch_asked_for(noise):
    """Each drawn patch of the target is in the clip, and its prediction is what the clip's
    reconstruction has there."""
    model = coordinates(sample=PatchSample(2, 3), quantizer=FSQ((5, 5, 5)))
    pixels, lengths = noise(13, 6, 16, 16, 3), jnp.array([3, 5, 7])
    found = reconstruct(model, pixels, lengths, None, jax.random.key(2))
    whole = run(model, pixels, lengths).pixels
    originals, made = (np.asarray(model.patching.patch(x)) for x in (pixels, whole))
    for target, prediction in zip(found.target, found.prediction, strict=True):
        for left in range(0, 12, 4):
            mine = np.asarray(target[:, :, left : left + 4]).reshape(-1)
            [at] = np.flatnonzero((originals == mine).all(axis=1))
            theirs = np.asarray(prediction[:, :, left : left + 4]).reshape(-1)
            np.testing.assert_allclose(theirs, made[at], atol=1e-5)


def test_blocks_that_are_not_there_change_nothing(noise):
    """A first block is the same to a decoder that could look back: its queries stand among its own
    latents."""
    pixels, lengths = noise(18, 2, 16, 16, 3), jnp.array([7])
    near, far = (run(coordinates(reach=reach), pixels, lengths).pixels for reach in (1, 3))
    np.testing.assert_allclose(near, far, atol=1e-5)


def test_registers_are_as_many_for_any_size(models, noise):
    model = models["registers"]
    assert model.tokens_per_block(16, 16) == model.tokens_per_block(8, 32) == REGISTERS
    out = run(model, noise(14, 4, 8, 32, 3), jnp.array([2, 7]))
    assert out.pixels.shape == (4, 8, 32, 3)
    assert out.latents.shape == (2 * REGISTERS, LATENT)


@every
def test_every_trained_array_has_a_gradient(models, noise, name):
    model, pixels = models[name], noise(15, 4, 16, 16, 3)
    params, rest = eqx.partition(model, trainable(model))

    @eqx.filter_jit
    def gradient(params):
        def loss(params):
            found = eqx.combine(params, rest).reconstruct(
                pixels, jnp.array([3, 6]), key=jax.random.key(0)
            )
            return jnp.mean((found.prediction - found.target) ** 2) + 1e-3 * found.loss

        return jax.grad(loss)(params)

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(params)):
        assert np.isfinite(leaf).all(), path
        assert np.asarray(leaf).any(), path


@every
def test_half_precision_reaches_every_stack(models, noise, name):
    model, pixels = models[name], noise(16, 4, 16, 16, 3)
    half = with_compute_dtype(model, jnp.bfloat16)
    a, b = run(model, pixels, jnp.array([3, 7])), run(half, pixels, jnp.array([3, 7]))
    gap = float(np.abs(a.pixels - b.pixels).mean())
    assert 1e-5 < gap < 0.1
    if hasattr(half.decoder, "cross"):
        assert half.decoder.cross.dtype == jnp.bfloat16


@every
def test_a_saved_model_is_the_same(models, noise, name, tmp_path):
    save(models[name], tmp_path)
    again = load(tmp_path)
    assert jax.tree.structure(again) == jax.tree.structure(models[name])
    pixels = noise(17, 4, 16, 16, 3)
    np.testing.assert_array_equal(
        run(again, pixels, jnp.array([3, 7])).pixels,
        run(models[name], pixels, jnp.array([3, 7])).pixels,
    )


def test_positions_of_patches_leave_none_for_registers(models):
    model = models["registers"]
    patches, keep = jnp.zeros((CELLS, PATCH)), jnp.ones(REGISTERS, bool)
    with pytest.raises(ValueError, match="leave them out"):
        model.encode_tokens(patches, keep, grid=(1, 4, 4), positions=jnp.arange(CELLS))
    with pytest.raises(ValueError, match="positions of its own"):
        models["coordinates"].decode_tokens(
            jnp.zeros((CELLS, LATENT)), grid=(1, 4, 4), positions=jnp.arange(CELLS)
        )


def test_an_encoder_and_a_decoder_that_do_not_fit():
    with pytest.raises(ValueError, match=r"the encoder makes 7 tokens .* the decoder takes 16"):
        dataclasses.replace(registers(), decoder=coordinates().decoder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RecentBlocks(0), "window is 0 blocks"),
        (lambda: PatchSample(0, 4), "blocks is 0"),
        (lambda: PatchSample(2, 0), "patches is 0"),
        (lambda: coordinates(reach=0), "reach is 0 blocks"),
        (
            lambda: RegisterEncoder(
                PATCH,
                3,
                registers=0,
                layers=1,
                rotary=RankRotary(10.0),
                **SIZES,
                key=jax.random.key(0),
            ),
            "registers is 0",
        ),
        (lambda: coordinates().init_cache(0, height=16, width=16), "0 blocks holds nothing"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
