"""Every layer within a few roundings of float32: `test_parity` allows far more than they take."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastictok.attention import BlockCausal
from elastictok.models import Cells
from elastictok.quantizers import FSQ

# Largest differences that are let pass, some three times the measured ones.
ALLOWED = {
    "fsq": {
        "enc_in_proj": 1e-5,
        "enc_layers": 1e-4,
        "enc_blocks": 1e-4,
        "enc_ln_f": 3e-5,
        "z_pre": 4e-5,
        "z_bounded": 1e-4,
        "z_masked": 0.0,
        "dec_post_quant": 1e-6,
        "dec_layers": 1e-4,
        "dec_blocks": 1e-4,
        "dec_ln_f": 2e-5,
        "out_proj": 4e-5,
        "recon": 3e-5,
    },
    "vae": {
        "enc_in_proj": 2e-5,
        "enc_layers": 1e-4,
        "enc_blocks": 1e-4,
        "enc_ln_f": 3e-5,
        "z_pre": 3e-5,
        "z_masked": 3e-5,
        "dec_post_quant": 3e-5,
        "dec_layers": 3e-4,
        "dec_blocks": 3e-4,
        "dec_ln_f": 8e-5,
        "out_proj": 2e-4,
        "recon": 1e-4,
    },
}


def first(transformer, count: int):
    """A transformer of the first layers of another, so that it is the library's own that runs."""
    layers = jax.tree.map(lambda leaf: leaf[:count], transformer.layers)
    return eqx.tree_at(lambda t: t.layers, transformer, layers)


@eqx.filter_jit
def everything(model, patches, keep):
    """What the reference has of each layer, by its names, batched."""

    def one(patches, keep):
        mask, positions = BlockCausal(32), jnp.arange(len(keep))
        cells = Cells(model.order, model.grid(*model.size))

        def layers(transformer, x):
            counts = range(1, transformer.depth + 1)
            return jnp.stack([first(transformer, n)(x, mask, positions, cells) for n in counts])

        encoder, decoder = model.encoder, model.decoder
        encoded = layers(encoder.transformer, encoder.embed(patches, keep, positions, cells))
        latents = encoder.readout(encoded[-1])
        quantized = model.quantizer(latents, keep).latents
        embedded = decoder.embed(quantized, positions, cells)
        decoded = layers(decoder.transformer, embedded)
        found = {
            # There it is taken before the vectors of kept and dropped tokens are added.
            "enc_in_proj": encoder.in_proj(patches),
            "enc_layers": encoded,
            "enc_blocks": encoded[-1],
            "enc_ln_f": encoder.norm(encoded[-1]),
            "z_pre": latents,
            "z_masked": quantized,
            "dec_post_quant": embedded,
            "dec_layers": decoded,
            "dec_blocks": decoded[-1],
            "dec_ln_f": decoder.norm(decoded[-1]),
            "out_proj": decoder.out_proj(decoder.norm(decoded[-1])),
            "recon": decoder.readout(decoded[-1]),
        }
        if isinstance(model.quantizer, FSQ):
            # Ours bounds to the range of the latents, theirs to that of the levels.
            steps = np.array(model.quantizer.levels) // 2
            found["z_bounded"] = model.quantizer.bound(latents) * steps
        return found

    return jax.vmap(one)(patches, keep)


@pytest.fixture(scope="session")
def tokens(reference, cut):
    return jnp.asarray(cut(reference.model, reference["video_uint8"]), jnp.float32) / 127.5 - 1


@pytest.mark.parametrize(("scenario", "start"), [("whole", 0), ("single", 0), ("single_b1", 32)])
def test_every_layer_is_the_official_one_to_a_few_roundings(reference, tokens, scenario, start):
    keep = jnp.asarray(reference[f"{scenario}/encoding_mask"].astype(bool))
    patches = tokens[:, start : start + keep.shape[1]]
    found = everything(reference.model, patches, keep)
    assert found.keys() == ALLOWED[reference.variant].keys()
    if scenario != "whole":
        found.pop("z_bounded", None)  # of the whole only
    for name, array in found.items():
        array = jnp.swapaxes(array, 0, 1) if name.endswith("layers") else array
        reference.check(f"{scenario}/{name}", array, ALLOWED[reference.variant][name])


def test_bounds_of_the_official_latents(reference):
    """Fed with its latents, not ours, so that nothing hides what the formula is: the levels' shift
    is a tangent, and the inverse hyperbolic one that others use is just 1e-5 off with 8 levels."""
    if reference.variant != "fsq":
        pytest.skip("continuous latents are not bounded")
    quantizer = reference.model.quantizer
    at, latents = reference.entries("whole/z_pre", 2 * 128 * 6)
    places, wanted = reference.entries("whole/z_bounded", 2 * 128 * 6)
    np.testing.assert_array_equal(places, at)
    rows = np.zeros((2 * 128, 6), np.float32)
    rows.reshape(-1)[at] = latents
    found = quantizer.bound(jnp.asarray(rows)) * (np.array(quantizer.levels) // 2)
    # Measured: 5e-7.
    np.testing.assert_allclose(np.asarray(found).reshape(-1)[at], wanted, atol=2e-6)


@eqx.filter_jit
def encoded(model, patches, keep, segments, valid, positions):
    def one(patches, keep, segments, valid, positions):
        cells = Cells(model.order, model.grid(*model.size))
        return model.encoder(
            patches, keep, cells, segments=segments, key_valid=valid, positions=positions
        )

    return jax.vmap(one)(patches, keep, segments, valid, positions)


@pytest.mark.parametrize("scenario", ["packA_pos", "packM_pos", "padded", "hidden0"])
def test_latents_before_the_bottleneck_with_documents_and_hidden_keys(reference, tokens, scenario):
    """Where a token sees nothing at all, as the first block of `hidden0`, there is nothing right to
    compare: attention gives zero here, and there the mean of all values, those of later blocks
    too (its ring attention gives yet another thing). Nothing else depends on such a token, since
    it is hidden itself."""
    about = {
        name: reference[f"{scenario}/{name}"]
        for name in ("encoding_mask", "segment_ids", "attention_mask", "position_ids")
    }
    keep, valid = (about[n].astype(bool) for n in ("encoding_mask", "attention_mask"))
    segments, positions = (about[n].astype(np.int32) for n in ("segment_ids", "position_ids"))
    rows = np.ones(keep.shape, bool)
    if scenario == "hidden0":
        rows[:, :32] = False
        assert not valid[:, :32].any()
        assert valid[:, 32:].all()
    found = encoded(
        reference.model, tokens, *(jnp.asarray(x) for x in (keep, segments, valid, positions))
    )
    reference.check(f"{scenario}/z_pre", found, ALLOWED[reference.variant]["z_pre"], rows)


def test_the_official_share_of_used_codes_counts_dropped_tokens_too(reference, tokens):
    """Its perplexity and its share are of all tokens, before any is dropped; the library's are of
    kept ones only. The codes behind them are the same."""
    if reference.variant != "fsq":
        pytest.skip("continuous latents have no codes")
    keep = jnp.asarray(reference["encoding_mask"].astype(bool))
    latents = everything(reference.model, tokens, keep)["z_pre"]
    quantizer = reference.model.quantizer
    codes = jax.vmap(lambda x: quantizer(x, jnp.ones(128, bool)).codes)(latents)
    _, counts = np.unique(codes, return_counts=True)
    share = counts / counts.sum()
    assert len(counts) / 64_000 == pytest.approx(float(reference["whole/stat_codebook_usage"]))
    perplexity = np.exp(-np.sum(share * np.log(share)))
    assert perplexity == pytest.approx(float(reference["whole/stat_perplexity"]), rel=1e-5)
