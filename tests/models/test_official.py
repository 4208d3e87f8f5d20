"""Checkpoints of the official implementation, written here by the msgpack library.

`tests/parity` has files that the official code wrote; these are other sizes, layouts and faults.
"""

import dataclasses
import hashlib
import json
import random
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictok.models import (
    OFFICIAL_FSQ,
    OFFICIAL_VAE,
    ModelFileError,
    OfficialConfig,
    count_parameters,
    load_official,
    presets,
)

OPTIONS = dict(
    bottleneck_type="fsq",
    patch_size=[1, 4, 4],
    frames_per_block=2,
    min_toks=2,
    max_toks=8,
    max_sequence_length=24,
    theta=1000,
    fsq_quant_levels=[5, 4],
    hidden_size=8,
    intermediate_size=12,
    num_encoder_layers=3,
    num_decoder_layers=2,
    num_attention_heads=2,
    mask_type="elastic",
    scan_layers=True,
)
CONFIG = OfficialConfig.from_options(OPTIONS)


def layer(dim: int, hidden: int) -> dict[str, tuple[int, ...]]:
    square = {f"attention/{name}/kernel": (dim, dim) for name in ("wq", "wk", "wv", "wo")}
    return square | {
        "feed_forward/w1/kernel": (dim, hidden),
        "feed_forward/w2/kernel": (hidden, dim),
        "feed_forward/w3/kernel": (dim, hidden),
        "attention_norm/kernel": (dim,),
        "ffn_norm/kernel": (dim,),
    }


def official(config: OfficialConfig = CONFIG, *, stacked: bool = True) -> dict[str, np.ndarray]:
    """Random parameters by the official names, as the notes on the format list them."""
    rng = np.random.default_rng(0)
    dim, patch = config.hidden_size, int(np.prod(config.patch_size)) * 3
    fsq = config.bottleneck_type == "fsq"
    latent = len(config.fsq_quant_levels) if fsq else config.vae_bottleneck_dim
    shapes: dict[str, tuple[int, ...]] = {
        "encoder/in_proj/kernel": (patch, dim),
        "encoder/is_kept_embed": (1, dim),
        "encoder/is_masked_embed": (1, dim),
        "encoder/ln_f/kernel": (dim,),
        "encoder/pre_quant/kernel": (dim, latent if fsq else 2 * latent),
        "decoder/post_quant/kernel": (latent, dim),
        "decoder/ln_f/kernel": (dim,),
        "decoder/out_proj/kernel": (dim, patch),
    }
    for side, count in (
        ("encoder", config.num_encoder_layers),
        ("decoder", config.num_decoder_layers),
    ):
        for name, shape in layer(dim, config.intermediate_size).items():
            shapes[f"{side}/{side}_blocks/scan_decoder/{name}"] = (count, *shape)
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    if stacked:
        return arrays
    separate = {}
    for name, array in arrays.items():
        if "scan_decoder" not in name:
            separate[name] = array
        else:
            for i, part in enumerate(array):
                separate[name.replace("scan_decoder", str(i))] = part
    return separate


def ext(array: np.ndarray) -> msgpack.ExtType:
    """An array as flax writes it."""
    parts = array.shape, array.dtype.name, array.tobytes("C")
    return msgpack.ExtType(1, msgpack.packb(parts, use_bin_type=True))


def packed(array: np.ndarray, chunk: int | None = None) -> bytes:
    """An array's value in the file, in parts of `chunk` numbers if given."""
    if chunk is None or array.size <= chunk:
        return msgpack.packb(ext(array), use_bin_type=True)
    flat = array.reshape(-1)
    parts = [flat[i : i + chunk] for i in range(0, flat.size, chunk)]
    content = {
        "__msgpack_chunked_array__": True,
        "shape": {str(i): n for i, n in enumerate(array.shape)},
        "chunks": {str(i): ext(part) for i, part in enumerate(parts)},
    }
    return msgpack.packb(content, use_bin_type=True)


def stream(arrays: dict[str, np.ndarray], *, prefix=(), dtype=np.float32, chunk=None) -> bytes:
    return b"".join(
        msgpack.packb(((*prefix, *name.split("/")), packed(array.astype(dtype), chunk)))
        for name, array in arrays.items()
    )


def load_bytes(content: bytes, folder, config=CONFIG, **options):
    path = folder / "params"
    path.write_bytes(content)
    return load_official(path, config, **options)


def assert_holds(model, arrays: dict[str, np.ndarray], dtype=np.float32) -> None:
    """The model's arrays are the official ones (stacked), by a list of pairs written out here."""
    for side in ("encoder", "decoder"):
        ours = getattr(model, side)
        layers = ours.transformer.layers
        stack = f"{side}/{side}_blocks/scan_decoder"
        pairs = [
            (ours.norm.weight, f"{side}/ln_f/kernel"),
            (layers.attention.query.weight, f"{stack}/attention/wq/kernel"),
            (layers.attention.key.weight, f"{stack}/attention/wk/kernel"),
            (layers.attention.value.weight, f"{stack}/attention/wv/kernel"),
            (layers.attention.out.weight, f"{stack}/attention/wo/kernel"),
            (layers.feed_forward.gate.weight, f"{stack}/feed_forward/w1/kernel"),
            (layers.feed_forward.down.weight, f"{stack}/feed_forward/w2/kernel"),
            (layers.feed_forward.up.weight, f"{stack}/feed_forward/w3/kernel"),
            (layers.attention_norm.weight, f"{stack}/attention_norm/kernel"),
            (layers.feed_forward_norm.weight, f"{stack}/ffn_norm/kernel"),
        ]
        if side == "encoder":
            pairs += [
                (ours.in_proj.weight, "encoder/in_proj/kernel"),
                (ours.kept[None], "encoder/is_kept_embed"),
                (ours.masked[None], "encoder/is_masked_embed"),
                (ours.out_proj.weight, "encoder/pre_quant/kernel"),
            ]
        else:
            pairs += [
                (ours.in_proj.weight, "decoder/post_quant/kernel"),
                (ours.out_proj.weight, "decoder/out_proj/kernel"),
            ]
        for found, name in pairs:
            np.testing.assert_array_equal(np.asarray(found, np.float32), arrays[name].astype(dtype))
    total = sum(array.size for array in arrays.values())
    assert count_parameters(model) == total


# What is read.


@pytest.mark.parametrize("bottleneck", ["fsq", "vae"])
@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("prefix", [(), ("params",), ("params", "params")])
def test_every_layout_gives_the_same_model(tmp_path, bottleneck, stacked, prefix):
    config = dataclasses.replace(CONFIG, bottleneck_type=bottleneck, vae_bottleneck_dim=3)
    content = stream(official(config, stacked=stacked), prefix=prefix)
    assert_holds(load_bytes(content, tmp_path, config), official(config))


@settings(max_examples=10)
@given(seed=st.integers(0, 2**31), chunk=st.none() | st.integers(1, 400))
def test_tensors_come_in_any_order_and_in_parts(tmp_path_factory, seed, chunk):
    names = list(official())
    random.Random(seed).shuffle(names)
    content = stream({name: official()[name] for name in names}, chunk=chunk)
    assert_holds(load_bytes(content, tmp_path_factory.mktemp("official")), official())


def test_bfloat16_becomes_float32_or_stays(tmp_path):
    rounded = {k: v.astype(jnp.bfloat16) for k, v in official().items()}
    content = stream(rounded, dtype=jnp.bfloat16)
    model = load_bytes(content, tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {np.dtype(np.float32)}
    assert_holds(model, {name: a.astype(np.float32) for name, a in rounded.items()})
    model = load_bytes(content, tmp_path, dtype=None)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(jnp.bfloat16)}


def test_a_train_state_gives_its_parameters_and_the_rest_is_passed_over(tmp_path):
    moments = stream(official(), prefix=("opt_state", "1", "0", "mu"))
    step = msgpack.packb((("step",), msgpack.packb(7)))
    content = step + moments + stream(official(), prefix=("params", "params"))
    assert_holds(load_bytes(content, tmp_path), official())


def test_a_sharding_and_a_hash_are_taken(tmp_path):
    content = stream(official())
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    sha = hashlib.sha256(content).hexdigest()
    model = load_bytes(content, tmp_path, shardings=here, sha256=sha.upper())
    assert_holds(model, official())
    with pytest.raises(ModelFileError, match=f"has the sha256 {sha}, not abc"):
        load_bytes(content, tmp_path, sha256="abc")


# What is refused.


def test_faults_are_listed_with_both_shapes(tmp_path):
    arrays = official()
    arrays["encoder/more/kernel"] = np.zeros((3, 4), np.float32)
    del arrays["decoder/ln_f/kernel"]
    arrays["encoder/is_kept_embed"] = np.zeros((1, 9), np.float32)
    with pytest.raises(ModelFileError) as caught:
        load_bytes(stream(arrays), tmp_path)
    message = str(caught.value)
    assert "no checkpoint of this model (bottleneck fsq, width 8, 3 + 2 layers)" in message
    assert "give the options of its size" in message
    assert "lacks decoder/ln_f/kernel, [8]" in message
    assert "holds encoder/more/kernel, [3, 4], which the model has not" in message
    assert "encoder/is_kept_embed is [1, 9], where the model has [1, 8]" in message
    assert message.count("\n") == 3


def test_integers_are_no_weights(tmp_path):
    content = stream(official() | {"decoder/ln_f/kernel": np.zeros(8)}, dtype=np.int32)
    with pytest.raises(ModelFileError, match=r"decoder/ln_f/kernel is int32\[8\], where .* \[8\]"):
        load_bytes(content, tmp_path)


def test_another_size_or_bottleneck_is_refused(tmp_path):
    content = stream(official())
    for config, message in (
        (dataclasses.replace(CONFIG, hidden_size=16), r"ln_f/kernel is \[8\], where .* \[16\]"),
        (dataclasses.replace(CONFIG, num_decoder_layers=3), r"ffn_norm/kernel is \[2, 8\]"),
        (dataclasses.replace(CONFIG, bottleneck_type="vae"), r"pre_quant/kernel is \[8, 2\]"),
        (OFFICIAL_FSQ, r"in_proj/kernel is \[48, 8\], where the model has \[192, 1024\]"),
    ):
        with pytest.raises(ModelFileError, match=message):
            load_bytes(content, tmp_path, config)
    separate = official(stacked=False)
    del separate["encoder/encoder_blocks/1/ffn_norm/kernel"]
    with pytest.raises(ModelFileError, match=r"lacks encoder/encoder_blocks/1/ffn_norm/kernel"):
        load_bytes(stream(separate), tmp_path)


@pytest.mark.parametrize("what", ["same", "prefixed"])
def test_a_tensor_that_comes_twice_is_refused(tmp_path, what):
    content = stream(official())
    content += stream(official(), prefix=() if what == "same" else ("params",))
    with pytest.raises(ModelFileError, match=r"comes twice|parameters twice"):
        load_bytes(content, tmp_path)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, number):
    arrays = official()
    arrays["encoder/pre_quant/kernel"][0, 1] = number
    with pytest.raises(ModelFileError, match="encoder/pre_quant/kernel holds numbers that are not"):
        load_bytes(stream(arrays), tmp_path)


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(ModelFileError, match="is missing"):
        load_official(tmp_path / "absent", CONFIG)
    with pytest.raises(ModelFileError, match="cannot be read"):
        load_official(tmp_path, CONFIG)
    for content in (b"", b"PK\x03\x04 a zip file", b"\x80\x04\x95 a pickle", b"{}", b"\x92" * 90):
        with pytest.raises(ModelFileError, match=r"(cut short or damaged|lacks encoder/in_proj)"):
            load_bytes(content, tmp_path)


def test_a_length_is_never_believed(tmp_path):
    """Sizes far beyond the file reserve nothing and are named."""
    for value in (
        b"\xc6\xff\xff\xff\xff",  # a byte string of 4 GB
        packed_value(msgpack.packb([[2**40, 2**40], "float32", b""])),
        packed_value(b"\x93\xdd\xff\xff\xff\xff"),  # a shape of 4 G dimensions
        packed_value(msgpack.packb([[1], "float32", b"1234"]) + b"more"),
        packed_value(msgpack.packb([[1], "float64", b"12345678"])),
        packed_value(msgpack.packb([[-1], "float32", b""])),
        packed_value(msgpack.packb([[1], "float32", b"1234"]), kind=2),
    ):
        content = b"\x92" + msgpack.packb(["encoder", "is_kept_embed"]) + value
        with pytest.raises(ModelFileError, match=r"damaged at byte .*in encoder/is_kept_embed"):
            load_bytes(content, tmp_path)


def packed_value(payload: bytes, kind: int = 1) -> bytes:
    return msgpack.packb(msgpack.packb(msgpack.ExtType(kind, payload)))


@settings(max_examples=80)
@given(data=st.data())
def test_a_file_cut_anywhere_is_an_error_that_names_what_is_missing(tmp_path_factory, data):
    arrays = official()
    chunk = data.draw(st.sampled_from([None, 50]))
    content = stream(arrays, chunk=chunk)
    at = data.draw(st.integers(0, len(content) - 1))
    with pytest.raises(ModelFileError) as caught:
        load_bytes(content[:at], tmp_path_factory.mktemp("official"))
    message, begun = str(caught.value), 0
    for name, array in arrays.items():
        begun += len(stream({name: array}, chunk=chunk))
        assert (f"lacks {name}, " in message) == (begun > at), name
    whole = {len(stream(dict(list(arrays.items())[:n]), chunk=chunk)) for n in range(len(arrays))}
    assert ("is cut short or damaged" in message) == (at not in whole)


@settings(max_examples=100)
@given(data=st.data())
def test_a_flipped_bit_is_an_error_or_one_other_number(tmp_path_factory, data):
    """The format has no checksum: a flip between tensors is an error, one inside a weight changes
    that weight alone, and `sha256` finds every one."""
    arrays = official()
    chunk = data.draw(st.sampled_from([None, 50]))
    good = stream(arrays, chunk=chunk)
    # Half of them in the few bytes between the tensors, which are less than a tenth of the file.
    heads = [i for i in range(len(good)) if not in_weights(i, arrays, chunk)]
    head = data.draw(st.booleans())
    at = data.draw(st.sampled_from(heads) if head else st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[at] ^= 1 << data.draw(st.integers(0, 7))
    folder = tmp_path_factory.mktemp("official")
    sha = hashlib.sha256(good).hexdigest()
    with pytest.raises(ModelFileError, match="sha256"):
        load_bytes(bytes(bad), folder, sha256=sha)
    try:
        model = load_bytes(bytes(bad), folder)
    except ModelFileError as error:
        assert str(folder) in str(error)
    else:
        assert at not in heads
        reference = load_bytes(good, folder)
        changed = sum(
            int(np.sum(np.asarray(a) != np.asarray(b)))
            for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(reference), strict=True)
        )
        assert changed <= 1  # 0.0 and -0.0 are equal


def in_weights(at: int, arrays: dict[str, np.ndarray], chunk: int | None) -> bool:
    """Whether a byte of the file belongs to a weight: found by looking for the weights' bytes."""
    return at in _weight_bytes(chunk)


def _weight_bytes(chunk: int | None, cache: dict = {}) -> set[int]:  # noqa: B006
    if chunk not in cache:
        content, found, start = stream(official(), chunk=chunk), set(), 0
        for array in official().values():
            flat = array.reshape(-1)
            size = flat.size if chunk is None else chunk
            for i in range(0, flat.size, size):
                raw = flat[i : i + size].tobytes()
                start = content.index(raw, start)
                found |= set(range(start, start + len(raw)))
                start += len(raw)
        cache[chunk] = found
    return cache[chunk]


# What the options make.


def test_released_models_are_the_presets():
    for config, preset, parameters in (
        (OFFICIAL_FSQ, presets.elastictok_fsq_200m, 210_165_760),
        (OFFICIAL_VAE, presets.elastictok_vae_200m, 210_571_264),
    ):
        key = jax.random.key(0)
        ours = eqx.filter_eval_shape(preset, key=key)
        theirs = eqx.filter_eval_shape(config.build, key=key)
        assert count_parameters(theirs) == parameters
        assert eqx.tree_equal(ours, theirs)


def test_options_by_name_and_from_a_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(OPTIONS))
    assert OfficialConfig.read(path) == CONFIG
    assert CONFIG.resolution == 8
    content = stream(official())
    for config in (OPTIONS, path, str(path)):
        assert_holds(load_bytes(content, tmp_path, config), official())
    model = load_bytes(content, tmp_path)
    assert (model.size, model.context, model.min_tokens) == ((8, 8), 3, 2)
    # What is not said is as in the released model of that kind.
    assert OfficialConfig.from_options({"bottleneck_type": "vae"}) == OFFICIAL_VAE
    wide = OfficialConfig.from_options(
        {"bottleneck_type": "fsq", "resolution": 128, "max_toks": 1024}
    )
    assert wide == dataclasses.replace(OFFICIAL_FSQ, resolution=128, max_toks=1024)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 8}, "there are no options hiden_size; did you mean hidden_size?"),
        ({"bottleneck_type": "vq"}, "bottleneck_type is 'vq'; it must be fsq or vae"),
        ({"bottleneck_type": ["fsq"]}, "it must be fsq or vae"),
        ({"hidden_size": 8.0}, "hidden_size is 8.0; it must be a whole number"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"theta": "5e7"}, "theta is '5e7'; it must be a number"),
        ({"theta": float("nan")}, "theta is nan"),
        ({"patch_size": [1, 8]}, "patch_size is [1, 8]; give frames"),
        ({"patch_size": 8}, "patch_size is 8; it must be a list of whole numbers"),
        ({"fsq_quant_levels": []}, "levels is empty"),
        ({"fsq_quant_levels": [0]}, "fsq_quant_levels is (0,); it must be above 0"),
        ({"max_toks": 9}, "max_toks is 9"),
        ({"max_toks": 0}, "max_toks is 0; it must be above 0"),
        ({"max_sequence_length": 20}, "not a whole number of blocks of max_toks = 8"),
        ({"frames_per_block": 3, "patch_size": [2, 4, 4]}, "frames is 3, which the patch's 2"),
    ],
)
def test_options_that_make_no_model_are_named(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        OfficialConfig.from_options(OPTIONS | change)


@pytest.mark.parametrize("content", ["[1]", "{", '{"theta": 1}', '"x"'])
def test_files_of_options_that_are_none_are_named(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        OfficialConfig.read(path)
