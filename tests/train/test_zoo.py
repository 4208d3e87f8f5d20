"""Every preset learns, and its tokens survive a file; a new one is tested once it is listed."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastictok.data import Batch
from elastictok.inference import FixedLength, Tokenizer, Tokens
from elastictok.models import ElasticTok, FixedDrop, count_parameters, load, model_card, save
from elastictok.models.presets import PRESETS
from elastictok.train import adamw, data_mesh, fit

# A model of more parameters is not trained here.
MOST_PARAMETERS = 20_000_000
STEPS = 50
# By which training divides the error of what it saw; it is 8 or more for the presets there are.
FACTOR = 4


def shapes(name: str) -> ElasticTok:
    return eqx.filter_eval_shape(lambda: PRESETS[name].make(key=jax.random.key(0)))


TRAINED = [name for name in PRESETS if count_parameters(shapes(name)) < MOST_PARAMETERS]
# The first of those that differ in their training only.
MODELS = list({PRESETS[name].make: name for name in reversed(TRAINED)}.values())


def each(names: list[str], quick: set[str]) -> pytest.MarkDecorator:
    marked = [pytest.param(n, marks=[] if n in quick else [pytest.mark.heavy]) for n in names]
    return pytest.mark.parametrize("name", marked)


def waves(model: ElasticTok, *, examples: int, blocks: int) -> np.ndarray:
    """Moving waves of other colours, directions and lengths in each example.

    **Returns:** `uint8[examples blocks frames height width 3]`.
    """
    rng = np.random.default_rng(0)
    height, width = model.size
    frames = blocks * model.frames_per_block
    t, y, x = np.meshgrid(
        np.arange(frames) / 8, np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij"
    )
    clips = []
    for _ in range(examples):
        rate, down, across = rng.uniform(-4, 4, (3, 3))
        phase = rng.uniform(0, 2 * np.pi, 3)
        angle = t[..., None] * rate + y[..., None] * down + x[..., None] * across + phase
        clips.append((127.5 + 120 * np.sin(angle)).astype(np.uint8))
    return np.stack(clips).reshape(examples, blocks, -1, height, width, 3)


def error(model: ElasticTok, pixels: np.ndarray, length: int) -> float:
    """Mean squared error with so many tokens of each block, pixels in [-1, 1]."""
    examples, blocks, frames = pixels.shape[:3]
    target = jnp.asarray(pixels, jnp.float32) / 127.5 - 1
    clips = target.reshape(examples, blocks * frames, *pixels.shape[3:])
    out = reconstructed(model, clips, jnp.full((examples, blocks), length))
    return float(jnp.mean(jnp.square(out - clips)))


@eqx.filter_jit
def reconstructed(model: ElasticTok, clips: jax.Array, lengths: jax.Array) -> jax.Array:
    return jax.vmap(model)(clips, lengths).pixels


@each(TRAINED, {"elastic_image"})
def test_a_preset_learns_with_its_own_tail_drop(name):
    preset = PRESETS[name]
    model = preset.make(key=jax.random.key(0))
    blocks = min(model.context, 2)
    pixels = waves(model, examples=2 if model.frames_per_block == 1 else 1, blocks=blocks)
    batch = Batch(
        pixels,
        np.ones(pixels.shape[:2], np.int32),
        np.ones(pixels.shape[:2], bool),
    )
    # What all policies train, and what those of one length do not.
    fixed = isinstance(preset.tail_drop, FixedDrop)
    lengths = [model.max_tokens // 2, *([] if fixed else [model.max_tokens])]
    before = [error(model, pixels, length) for length in lengths]
    trained = fit(
        model,
        [batch] * STEPS,
        steps=STEPS,
        optimizer=adamw(3e-3),  # which compiles sooner than Muon
        tail_drop=preset.tail_drop,
        mesh=data_mesh(jax.local_devices()[:1]),
        progress=False,
    )
    after = [error(trained, pixels, length) for length in lengths]
    assert all(a < b / FACTOR for a, b in zip(after, before, strict=True)), (before, after)


@each(MODELS, {"elastic_image", "register_tokens"})
def test_a_preset_encodes_saves_loads_and_decodes(name, tmp_path):
    model = PRESETS[name].make(key=jax.random.key(1))
    save(model, tmp_path / "model")
    tokenizer = Tokenizer(model, FixedLength(length=model.max_tokens // 2))
    # One frame more than a block, if it has several: a block that is not full.
    frames = waves(model, examples=1, blocks=2).reshape(-1, *model.size, 3)
    frames = frames[: 1 if model.frames_per_block == 1 else model.frames_per_block + 1]
    tokens = tokenizer.encode(frames)
    tokens.save(tmp_path / "tokens.safetensors")

    again = Tokenizer(load(tmp_path / "model"), FixedLength(length=1))
    found = Tokens.load(tmp_path / "tokens.safetensors")
    assert found.lengths.tolist() == [model.max_tokens // 2] * (1 if len(frames) == 1 else 2)
    decoded = again.decode(found)
    assert decoded.shape == frames.shape
    assert np.array_equal(decoded, tokenizer.decode(tokens))
    shorter = again.decode(found.truncate(model.min_tokens))
    assert not np.array_equal(shorter, decoded)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_what_it_is(name):
    preset, model = PRESETS[name], shapes(name)
    assert preset.about.endswith(".")
    assert "arXiv" in preset.source
    card = model_card(model, about=f"{preset.about} {preset.source}")
    assert preset.about in card
    assert f"{count_parameters(model):,}" in card


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_together(name):
    """Without making it: pixels to as many pixels, a block's tokens told apart."""
    model = shapes(name)
    blocks = min(model.context, 2)
    frames = blocks * model.frames_per_block
    pixels = jax.ShapeDtypeStruct((frames, *model.size, 3), jnp.float32)
    lengths = jax.ShapeDtypeStruct((blocks,), jnp.int32)
    out = eqx.filter_eval_shape(lambda m, x, n: m(x, n), model, pixels, lengths)
    assert out.pixels.shape == pixels.shape
    assert 1 <= model.min_tokens < model.max_tokens
    assert len(out.latents) == blocks * model.max_tokens
