"""The worked example of docs/generators.md, on a tiny model with random weights."""

import importlib.util
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from elastictok.data import write_clip, write_picture
from elastictok.inference import ElasticTokCodec, FixedLength, Tokenizer
from elastictok.inference.ragged import pack

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "generator.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("generator_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def clips(model, make_tokens):
    """Made-up tokens that the model decodes."""
    codec = ElasticTokCodec(model)
    facts = {
        "height": 16,
        "width": 16,
        "min_tokens": codec.min_tokens,
        "bits_per_token": codec.bits_per_token,
        "fingerprint": codec.fingerprint,
        "window": 2,
    }
    lengths = [(4,), (9, 5), (16, 4), (6, 12)]
    return [make_tokens(own, seed=seed, **facts) for seed, own in enumerate(lengths)]


def test_digits_are_codes(example, model, clips):
    for tokens in clips:
        back = example.codes(model, example.digits(model, tokens))
        assert np.array_equal(np.concatenate(back), tokens.codes)


@pytest.mark.heavy
def test_the_generator_learns_and_what_it_makes_decodes(example, model, clips):
    vocabulary = example.vocabulary_for(model, clips[0])
    packed = pack([example.digits(model, tokens) for tokens in clips], vocabulary, 64)
    key = jax.random.key(0)
    untrained = example.Generator(vocabulary.vocabulary_size, dim=16, layers=1, heads=2, key=key)
    seen = []
    trained, losses = example.train(
        untrained,
        vocabulary,
        packed,
        steps=20,
        seed=0,
        report=lambda step, loss: seen.append((step, loss)),
    )
    assert seen == [(20, losses[-1])]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    made = example.generate(trained, model, vocabulary, clips[1], 2, count=3, seed=1)
    assert len({tokens.codes.tobytes() for tokens in made}) > 1
    tokenizer = Tokenizer(model, FixedLength(16))
    for tokens in made:
        assert (tokens.blocks, tokens.frames) == (2, 4)
        assert tokenizer.decode(tokens).shape == (4, 16, 16, 3)


def test_material_is_crops_and_parts_of_clips(example, tmp_path):
    rng = np.random.default_rng(0)
    write_picture(tmp_path / "a.png", rng.integers(0, 256, (40, 30, 3)).astype(np.uint8))
    frames = rng.integers(0, 256, (13, 32, 32, 3)).astype(np.uint8)
    write_clip(tmp_path / "b.mp4", frames, 8)
    shapes = [given.shape for given in example.material(tmp_path, 3)]
    assert [shape[0] for shape in shapes] == [1, 1, 1, 6, 6]
    assert all(height == width <= 32 for _, height, width, _ in shapes)


def test_the_guide_quotes_the_script():
    guide = (ROOT / "docs" / "generators.md").read_text()
    quoted = [part.strip() for part in re.split(r"```\w*\n|\n\n\n", guide)]
    script = SCRIPT.read_text()
    for name in ("class Generator(", "def loss_of(", "@eqx.filter_jit\ndef sample("):
        (part,) = (part for part in quoted if part.startswith(name))
        assert part in script
