"""The search for lengths, on weights that were trained far enough for a search to make sense.

Its reference has weights of its own, so this needs the whole reference.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest

from elastictok.inference import MSE, Binary, Full, Tokenizer
from elastictok.models import Cells, load_official

BLOCKS, TOKENS = 4, 32


@pytest.fixture(scope="session")
def trained(reference, source, whole_folder, tmp_path_factory):
    if source != "whole":
        pytest.skip("trained weights are in the whole reference only")
    content = b""
    for name, array in np.load(whole_folder / f"{reference.variant}_params_trained.npz").items():
        key = name.removeprefix("params/").split("/")
        value = msgpack.packb((array.shape, array.dtype.name, array.tobytes()))
        content += msgpack.packb((key, msgpack.packb(msgpack.ExtType(1, value))))
    path = tmp_path_factory.mktemp("trained") / "params"
    path.write_bytes(content)
    return load_official(path, reference.config)


@pytest.fixture(scope="session")
def tokens(reference, trained, cut):
    return jnp.asarray(cut(trained, reference["video_uint8"]), jnp.float32) / 127.5 - 1


@eqx.filter_jit
def run(model, tokens, keep):
    def one(tokens, keep):
        grid = model.grid(*model.size)
        out = model.encode_tokens(tokens, keep, grid=grid)
        return out, model.decode_tokens(out.latents, grid=grid)

    return jax.vmap(one)(tokens, keep)


def test_trained_weights_give_the_official_codes_and_patches(reference, trained, tokens):
    keep = reference["trained_whole/encoding_mask"]
    out, decoded = run(trained, tokens, jnp.asarray(keep))
    if reference.variant == "fsq":
        codes = reference["trained_whole/code_idx"]
        np.testing.assert_array_equal(np.asarray(out.codes)[keep], codes[keep])
    # Measured: 0 (fsq), 3e-6 (vae); 2e-6.
    reference.check("trained_whole/z_masked", out.latents, 1e-5 * (reference.variant == "vae"))
    reference.check("trained_whole/recon", decoded, 6e-6)


@eqx.filter_jit
def probe(model, tokens, lengths, cache):
    """Losses of the next block with the given lengths, its patches and the caches after it."""

    def one(tokens, length, cache):
        keep, cells = jnp.arange(TOKENS) < length, Cells(model.order, model.grid(*model.size))
        latents, encoder = model.encoder.extend(tokens, keep, cache.encoder, cells)
        latents = model.quantizer(latents, keep).latents
        patches, decoder = model.decoder.extend(latents, cache.decoder, cells)
        return jnp.mean(jnp.square(patches - tokens)), patches, type(cache)(encoder, decoder)

    return jax.vmap(one)(tokens, lengths, cache)


@pytest.mark.parametrize("threshold", [0, 1, 2])
@pytest.mark.parametrize("search", ["binary", "linear"])
def test_every_probe_of_the_official_search_has_the_same_loss(
    reference, trained, tokens, search, threshold
):
    """Each block starts from the tokens that the official search kept of those before it, which is
    what its last probe of a block kept: one more than it reports, if there is one more."""
    path = f"search_trained/{search}/{threshold}"
    at, kept, losses = (reference[f"{path}/trace_{n}"] for n in ("cache_idx", "kept", "loss"))
    reported = reference[f"{path}/ntoks"].astype(int)
    np.testing.assert_array_equal(reference[f"{path}/kept"], np.minimum(reported + 1, TOKENS))
    empty = trained.init_cache(BLOCKS, height=32, width=32)
    cache = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), empty)
    for block in range(BLOCKS):
        now = slice(TOKENS * block, TOKENS * (block + 1))
        rows = np.flatnonzero(at == TOKENS * block)
        lengths, which = np.unique(kept[rows], axis=0, return_inverse=True)
        results = [probe(trained, tokens[:, now], jnp.asarray(n), cache) for n in lengths]
        found = np.stack([result[0] for result in results])[which.reshape(-1)]
        # Measured: 8e-8.
        np.testing.assert_allclose(found, losses[rows], atol=4e-7)
        np.testing.assert_array_equal(kept[rows[-1]], reference[f"{path}/kept"][:, block])
        _, patches, cache = results[which.reshape(-1)[-1]]
        cut_off = (np.asarray(patches, np.float64) + 1) * 127.5 - 0.5
        off = np.abs(cut_off - reference[f"{path}/recon_uint8"][:, now])
        assert off.max() <= 0.5 + 127.5 * 6e-6


@pytest.mark.parametrize("threshold", [0, 1, 2])
@pytest.mark.parametrize("strategy", [Full, Binary])
def test_lengths_are_those_of_the_official_linear_search(reference, trained, strategy, threshold):
    """That search tries every length. Ours measures bytes, rounded, and theirs numbers, which is
    3e-5 in the loss at most here, and no block is that near to a threshold."""
    path = f"search_trained/linear/{threshold}"
    limit = float(reference[f"{path}/threshold"])
    tokenizer = Tokenizer(trained, strategy(MSE(limit)))
    for i, video in enumerate(reference["video_uint8"]):
        tokens = tokenizer.encode(video)
        np.testing.assert_array_equal(tokens.lengths, reference[f"{path}/kept"][i])
        np.testing.assert_allclose(tokens.losses, reference[f"{path}/recon_loss"][i], atol=1e-4)
        np.testing.assert_array_equal(tokens.met, tokens.losses <= limit)
        assert np.all(tokens.met | (tokens.lengths == TOKENS))
        truth, decoded = (x.astype(np.float64) / 127.5 for x in (video, tokenizer.decode(tokens)))
        errors = np.mean(np.square(truth - decoded).reshape(BLOCKS, -1), axis=-1)
        np.testing.assert_allclose(errors, tokens.losses, rtol=1e-9)


def test_the_official_binary_search_misses_thresholds_that_can_be_met(reference, trained):
    """It ends on its last probe, whether that was good or not. This is why `Binary` is compared
    with the linear search above."""
    missed = 0
    for threshold in range(2):
        path = f"search_trained/binary/{threshold}"
        kept, losses = (reference[f"{path}/{name}"] for name in ("kept", "recon_loss"))
        missed += np.sum((losses > reference[f"{path}/threshold"]) & (kept < TOKENS))
    assert missed == {"fsq": 3, "vae": 2}[reference.variant]
