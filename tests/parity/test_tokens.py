"""Tokens in, tokens out: codes, latents and patches in every scenario, and the files' bytes."""

import hashlib

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import pytest

from elastictok.models import load_official
from elastictok.quantizers import keep_rows

# Largest differences of reconstructions; measured: 7e-6 (fsq), 5e-5 (vae).
RECON = {"fsq": 5e-5, "vae": 1e-4}
# Residual streams reach some 50, so this is a few roundings of float32. Measured: 3e-5.
STREAM = 1e-4
SCENARIOS = ("whole", "single", "single_b1", "packA_pos", "packM_pos", "padded", "hidden0")
NAMES = {
    "attention.query": "attention/wq",
    "attention.key": "attention/wk",
    "attention.value": "attention/wv",
    "attention.out": "attention/wo",
    "attention_norm": "attention_norm",
    "feed_forward.gate": "feed_forward/w1",
    "feed_forward.down": "feed_forward/w2",
    "feed_forward.up": "feed_forward/w3",
    "feed_forward_norm": "ffn_norm",
}


@pytest.fixture(scope="session")
def patches(reference):
    """The input as tokens: cut by NumPy here, not by the library."""
    video = reference["video_uint8"]
    t, h, w = (getattr(reference.model.patching, n) for n in ("frames", "height", "width"))
    sequences, frames, height, width, _ = video.shape
    cut = video.reshape(sequences, frames // t, t, height // h, h, width // w, w, 3)
    cut = cut.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(sequences, 128, -1)
    return jnp.asarray(cut, jnp.float32) / 127.5 - 1


def grid(model):
    return model.grid(*model.size)


@eqx.filter_jit
def run(model, patches, keep, segments, key_valid, positions):
    def one(patches, keep, segments, key_valid, positions):
        about = dict(grid=grid(model), segments=segments, key_valid=key_valid, positions=positions)
        out = model.encode_tokens(patches, keep, **about)
        return out, model.decode_tokens(out.latents, **about)

    return jax.vmap(one)(patches, keep, segments, key_valid, positions)


def visible(reference, scenario):
    """Tokens that see at least one: the value of the others is no one's business."""
    valid, segments = (reference[f"{scenario}/{n}"] for n in ("attention_mask", "segment_ids"))
    blocks = np.arange(valid.shape[1]) // 32
    sees = (segments[:, :, None] == segments[:, None]) & (blocks[:, None] >= blocks)
    return (sees & valid[:, None].astype(bool)).any(axis=-1)


def inputs(reference, patches, scenario):
    keep, valid = (
        jnp.asarray(reference[f"{scenario}/{n}"].astype(bool))
        for n in ("encoding_mask", "attention_mask")
    )
    segments, positions = (
        jnp.asarray(reference[f"{scenario}/{n}"].astype(np.int32))
        for n in ("segment_ids", "position_ids")
    )
    first = 32 if scenario == "single_b1" else 0
    return patches[:, first : first + keep.shape[1]], keep, segments, valid, positions


def test_patches_are_in_the_official_order(reference, patches):
    video = jnp.asarray(reference["video_uint8"], jnp.float32) / 127.5 - 1
    np.testing.assert_array_equal(jax.vmap(reference.model.patch)(video), patches)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_codes_are_equal_and_latents_and_patches_near(reference, patches, scenario):
    """One sequence, single blocks, documents that meet on and inside block edges, hidden keys."""
    x, keep, *rest = inputs(reference, patches, scenario)
    out, decoded = run(reference.model, x, keep, *rest)
    rows = visible(reference, scenario)
    kept = np.asarray(keep) & rows
    if reference.variant == "fsq":
        codes = reference[f"{scenario}/code_idx"]
        np.testing.assert_array_equal(np.asarray(out.codes)[kept], codes[kept])
        # The official code gives a dropped token that of zeros; ours is unspecified.
        assert set(codes[~np.asarray(keep)].tolist()) <= {32036}
        reference.check(f"{scenario}/z_masked", out.latents, 0.0, rows)
    else:
        reference.check(f"{scenario}/z_masked", out.latents, STREAM, rows)
        blocks = out.loss.shape[0] * keep.shape[1] / 32
        if scenario != "hidden0":  # where tokens that see nothing are in the official sum
            ours = 1e-8 * float(out.loss.sum()) / blocks
            assert ours == pytest.approx(float(reference[f"{scenario}/stat_aux_loss"]), rel=1e-5)
    reference.check(f"{scenario}/recon", decoded, RECON[reference.variant], rows)
    errors = jnp.mean((decoded - x) ** 2, axis=-1)
    reference.check(f"{scenario}/token_mse", errors, 1e-4, rows)


def test_codes_and_latents_stand_for_each_other(reference):
    if reference.variant != "fsq":
        pytest.skip("continuous latents have no codes")
    codes = jnp.asarray(reference["whole/code_idx"].astype(np.int32))
    latents = jax.vmap(reference.model.quantizer.from_codes)(codes)
    keep = reference["encoding_mask"].astype(bool)
    reference.check("whole/z_masked", np.where(keep[..., None], latents, 0), 0.0)
    np.testing.assert_array_equal(jax.vmap(reference.model.quantizer.to_codes)(latents), codes)


def official_names(model):
    """Ours and theirs, written out apart from the library's own table."""
    for side in ("encoder", "decoder"):
        part = getattr(model, side)
        for ours, theirs in NAMES.items():
            outer, _, inner = ours.partition(".")
            module = getattr(part.transformer.layers, outer)
            module = getattr(module, inner) if inner else module
            yield f"{side}/{side}_blocks/scan_decoder/{theirs}/kernel", module.weight
        yield f"{side}/ln_f/kernel", part.norm.weight
        first, last = ("in_proj", "pre_quant") if side == "encoder" else ("post_quant", "out_proj")
        yield f"{side}/{first}/kernel", part.in_proj.weight
        yield f"{side}/{last}/kernel", part.out_proj.weight
    yield "encoder/is_kept_embed", model.encoder.kept[None]
    yield "encoder/is_masked_embed", model.encoder.masked[None]


def test_the_official_file_of_bfloat16_is_written_byte_for_byte(reference, tmp_path):
    """Rounded by NumPy, written by the msgpack library: the reader is right on both files."""
    arrays, written = {}, b""
    with reference.params.open("rb") as file:
        for key, value in msgpack.Unpacker(file, max_buffer_size=0):
            extension = msgpack.unpackb(value)
            shape, dtype, raw = msgpack.unpackb(extension.data)
            assert (extension.code, dtype) == (1, "float32")
            array = np.frombuffer(raw, np.float32).reshape(shape).astype(ml_dtypes.bfloat16)
            arrays["/".join(key)] = array
            payload = msgpack.packb((array.shape, "bfloat16", array.tobytes()))
            written += msgpack.packb((key, msgpack.packb(msgpack.ExtType(1, payload))))
    assert hashlib.sha256(written).digest() == reference["bf16_sha256"].tobytes()
    path = tmp_path / "params"
    path.write_bytes(written)
    half = dict(official_names(load_official(path, reference.config, dtype=None)))
    full = dict(official_names(load_official(path, reference.config)))
    whole = dict(official_names(reference.model))
    assert set(half) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(half[name], array)
        np.testing.assert_array_equal(full[name], array.astype(np.float32))
        np.testing.assert_allclose(whole[name], full[name], rtol=2**-8)


def test_dropped_latents_are_zero_as_there(reference, patches):
    out, _ = run(reference.model, *inputs(reference, patches, "whole"))
    keep = jnp.asarray(reference["encoding_mask"].astype(bool))
    np.testing.assert_array_equal(out.latents, jax.vmap(keep_rows)(out.latents, keep))
