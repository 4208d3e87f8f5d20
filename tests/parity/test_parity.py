"""The library computes what the official implementation computes, layer by layer, then whole."""

import hashlib

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import optax
import pytest

from elastictok.attention import BlockCausal, attention
from elastictok.models import Cells, load_official
from elastictok.quantizers import FSQ, keep_rows

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


def layer_by_layer(transformer, x, positions, cells):
    """Each layer's output, from the parts that `Transformer` scans."""
    cos, sin = transformer.rotary(positions, cells, transformer.head_dim)
    outputs = []
    for i in range(transformer.depth):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], transformer.layers)
        q, k, v = transformer._project(layer, x, cos, sin)
        x = transformer._finish(layer, x, attention(q, k, v, BlockCausal(32)))
        outputs.append(x)
    return jnp.stack(outputs)


def test_every_layer_gives_what_the_official_one_gives(reference, patches):
    model = reference.model
    keep = jnp.asarray(reference["encoding_mask"].astype(bool))
    positions, cells = jnp.arange(128), Cells(model.order, grid(model))
    encoder, decoder = model.encoder, model.decoder

    @eqx.filter_jit
    @jax.vmap
    def encode(x, keep):
        layers = layer_by_layer(
            encoder.transformer, encoder.embed(x, keep, positions, cells), positions, cells
        )
        latents = encoder.readout(layers[-1])
        out = model.quantizer(latents, keep)
        found = {
            "enc_in_proj": encoder.in_proj(x),
            "enc_layers": layers,
            "enc_blocks": layers[-1],
            "enc_ln_f": encoder.norm(layers[-1]),
            "z_pre": latents,
            "z_masked": out.latents,
        }
        if isinstance(model.quantizer, FSQ):
            # Ours is in units of the quantized latents.
            half = np.array(model.quantizer.levels) // 2
            found["z_bounded"] = model.quantizer.bound(latents) * half
        return found

    @eqx.filter_jit
    @jax.vmap
    def decode(latents):
        start = decoder.embed(latents, positions, cells)
        layers = layer_by_layer(decoder.transformer, start, positions, cells)
        normed = decoder.norm(layers[-1])
        return {
            "dec_post_quant": start,
            "dec_layers": layers,
            "dec_blocks": layers[-1],
            "dec_ln_f": normed,
            "out_proj": decoder.out_proj(normed),
            "recon": decoder.readout(layers[-1]),
        }

    found = encode(patches, keep)
    found |= decode(found["z_masked"])
    assert len(found) == 12 + isinstance(model.quantizer, FSQ)
    for name, array in found.items():
        array = array.swapaxes(0, 1) if name.endswith("layers") else array
        tolerance = RECON[reference.variant] if name == "recon" else 3 * STREAM
        reference.check(f"whole/{name}", array, tolerance)


def test_codes_and_latents_stand_for_each_other(reference):
    if reference.variant != "fsq":
        pytest.skip("continuous latents have no codes")
    codes = jnp.asarray(reference["whole/code_idx"].astype(np.int32))
    latents = jax.vmap(reference.model.quantizer.from_codes)(codes)
    keep = reference["encoding_mask"].astype(bool)
    reference.check("whole/z_masked", np.where(keep[..., None], latents, 0), 0.0)
    np.testing.assert_array_equal(jax.vmap(reference.model.quantizer.to_codes)(latents), codes)


def test_the_pixel_level_call_and_packed_documents_are_the_token_level_ones(reference, patches):
    """`min_toks` is 4 and one block keeps 1 token: such blocks are compared by tokens only."""
    model = reference.model
    video = jnp.asarray(reference["video_uint8"], jnp.float32) / 127.5 - 1
    lengths = jnp.asarray(np.maximum(reference["keep_counts"], 4), jnp.int32)
    keep = jnp.arange(32) < lengths[..., None]
    segments = jnp.asarray([[0, 0, 1, 1], [0, 1, 1, 1]])
    whole = jax.vmap(model)(video, lengths, segments)
    tokens = jnp.repeat(segments, 32, axis=1)
    at, everyone = jnp.broadcast_to(jnp.arange(128), (2, 128)), jnp.ones((2, 128), bool)
    out, decoded = run(model, patches, keep.reshape(2, 128), tokens, everyone, at)
    np.testing.assert_allclose(whole.latents, out.latents, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(model.patch)(whole.pixels), decoded, atol=1e-5)
    # The first sequence keeps what the reference kept.
    reference.check(
        "packA_pos/recon", decoded, RECON[reference.variant], jnp.asarray([True, False])
    )


@eqx.filter_jit
def step(model, x, keep, cache):
    """A block of a stream, with any keep mask."""
    cells = Cells(model.order, grid(model))
    latents, encoder = model.encoder.extend(x, keep, cache.encoder, cells)
    out = model.quantizer(latents, keep)
    decoded, decoder = model.decoder.extend(out.latents, cache.decoder, cells)
    return decoded, type(cache)(encoder, decoder)


def stream(model, x, keep, starts):
    """Block by block; a new cache where a document starts."""
    height, width = model.size
    decoded, cache = [], None
    for i in range(4):
        if i in starts:
            cache = model.init_cache(4, height=height, width=width)
        now = slice(32 * i, 32 * (i + 1))
        patches, cache = step(model, x[now], keep[now], cache)
        decoded.append(patches)
    return jnp.concatenate(decoded), cache


def test_block_by_block_with_a_cache(reference, patches):
    model, keep = reference.model, jnp.asarray(reference["encoding_mask"].astype(bool))
    runs = [stream(model, x, k, {0}) for x, k in zip(patches, keep, strict=True)]
    decoded = jnp.stack([run[0] for run in runs])
    reference.check("cached/recon", decoded, RECON[reference.variant])
    errors = jnp.mean((decoded - patches).reshape(2, 4, -1) ** 2, axis=-1)
    np.testing.assert_allclose(errors, reference["cached/block_loss"], atol=1e-5)
    for side in ("encoder", "decoder"):
        for ours, name in (("keys", "cached_key"), ("values", "cached_value")):
            found = jnp.stack([getattr(getattr(run[1], side), ours) for run in runs], axis=1)
            found = found.reshape(2, 2, 128, 4, 16)  # layers, sequences, tokens, heads, head_dim
            path = f"cached/cache/{side}/{side}_blocks/scan_decoder/attention/{name}"
            reference.check(path, found, STREAM)


def test_block_by_block_a_document_starts_with_an_empty_cache(reference, patches):
    model, keep = reference.model, jnp.asarray(reference["encoding_mask"].astype(bool))
    decoded = [
        stream(model, x, k, starts)[0]
        for x, k, starts in zip(patches, keep, ({0, 2}, {0, 1}), strict=True)
    ]
    tolerance = RECON[reference.variant]
    reference.check("cached_packA_posreset/recon", jnp.stack(decoded), tolerance)


def test_a_fixed_number_of_tokens_per_block(reference, patches):
    """The official encoder at 9 tokens a block keeps exactly 9."""
    keep = jnp.broadcast_to(jnp.arange(128) % 32 < 9, (2, 128))
    rest = (reference["whole/segment_ids"].astype(np.int32), np.ones((2, 128), bool))
    at = jnp.broadcast_to(jnp.arange(128), (2, 128))
    out, _ = run(reference.model, patches, keep, *map(jnp.asarray, rest), at)
    kept = np.asarray(out.latents)[np.asarray(keep)].reshape(2, 4, 9, -1)
    reference.check("fixed9/z", kept, 0.0 if reference.variant == "fsq" else STREAM)


def test_a_sampled_bottleneck_with_the_given_noise(reference, patches, monkeypatch):
    if reference.variant != "vae":
        pytest.skip("FSQ does not sample")
    model, keep = reference.model, jnp.asarray(reference["encoding_mask"].astype(bool))
    decoded = []
    for x, k, noise in zip(patches, keep, reference["whole_sampled/noise"], strict=True):
        with monkeypatch.context() as patch:
            patch.setattr(jax.random, "normal", lambda *_, noise=noise: jnp.asarray(noise))
            out = model.encode_tokens(x, k, grid=grid(model), key=jax.random.key(0))
        assert not np.any(np.asarray(out.latents)[~np.asarray(k)])
        decoded.append(model.decode_tokens(out.latents, grid=grid(model)))
    reference.check("whole_sampled/recon", jnp.stack(decoded), RECON["vae"])


# Training.


def official_loss(model, patches, keep):
    """Mean squared error, and for the VAE 1e-8 times the divergence per block."""
    tokens = jax.vmap(lambda x, k: model.encode_tokens(x, k, grid=grid(model)))(patches, keep)
    decoded = jax.vmap(lambda z: model.decode_tokens(z, grid=grid(model)))(tokens.latents)
    return jnp.mean((decoded - patches) ** 2) + 1e-8 * jnp.sum(tokens.loss) / 8


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


@pytest.fixture(scope="session")
def value_and_gradient():
    return eqx.filter_jit(eqx.filter_value_and_grad(official_loss))


def test_the_gradient_of_every_parameter(reference, patches, value_and_gradient):
    keep = jnp.asarray(reference["encoding_mask"].astype(bool))
    loss, gradient = value_and_gradient(reference.model, patches, keep)
    assert float(loss) == pytest.approx(float(reference["grad/loss"]), rel=1e-6)
    names = dict(official_names(gradient))
    assert len(names) == 26 == len(jax.tree.leaves(gradient))
    for name, found in names.items():
        # Relative to the parameter's largest gradient; measured: 2e-4 at most.
        reference.check(f"grad/params/{name}", found, 1e-3 * float(jnp.abs(found).max()))


def test_four_steps_of_adamw(reference, patches, value_and_gradient):
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 2, 10, 1e-4)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b1=0.9, b2=0.95, eps=1e-8, weight_decay=1e-2),
    )
    model, keep = reference.model, jnp.asarray(reference["encoding_mask"].astype(bool))
    state = optimizer.init(eqx.filter(model, eqx.is_array))
    for i in range(4):
        loss, gradient = value_and_gradient(model, patches, keep)
        assert float(loss) == pytest.approx(float(reference[f"opt/{i}/loss"]), rel=2e-5)
        assert float(schedule(i)) == pytest.approx(float(reference[f"opt/{i}/lr_used"]), rel=1e-5)
        norm = float(optax.tree.norm(gradient))
        assert norm == pytest.approx(float(reference[f"opt/{i}/grad_norm"]), rel=2e-3)
        updates, state = optimizer.update(gradient, state, eqx.filter(model, eqx.is_array))
        model = eqx.apply_updates(model, updates)
    moved = 0.0
    for (name, found), (_, before) in zip(
        official_names(model), official_names(reference.model), strict=True
    ):
        moved = max(moved, float(jnp.abs(found - before).max()))
        # AdamW moves by the sign of tiny gradients: a twentieth of the way at most.
        reference.check(f"opt/params_after4/params/{name}", found, 1e-4)
    assert moved > 2e-3


# The file.


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
