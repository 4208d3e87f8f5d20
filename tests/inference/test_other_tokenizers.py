"""What knows a model only by its interface works with any encoder and decoder."""

import jax
import numpy as np
import pytest

from elastictok.inference import (
    MSE,
    Binary,
    EncodeOnce,
    FixedLength,
    Full,
    Tokenizer,
    Tokens,
    load_decoder_state,
    load_encoder_state,
    save_decoder_state,
    save_encoder_state,
)
from elastictok.models import (
    CellRotary,
    CoarseToFine,
    CoordDecoder,
    ElasticTok,
    Encoder,
    Patching,
    PatchSample,
    RegisterDecoder,
    RegisterEncoder,
)
from elastictok.quantizers import FSQ, GaussianVAE

SIDES = {
    "dim": 16,
    "hidden": 32,
    "layers": 1,
    "heads": 2,
    "rotary": CellRotary(30.0, 100.0),
    "place_frequencies": 4,
    "std": 0.4,
}
PATCH = 2 * 4 * 4 * 3


def make(name: str) -> ElasticTok:
    """16x16 pixels, blocks of 2 frames; 9 registers, or 16 patches."""
    e, d = jax.random.split(jax.random.key(0))
    if name == "registers":
        quantizer = FSQ((5, 5, 5))
        encoder = RegisterEncoder(PATCH, 3, registers=9, **SIDES, key=e)
        decoder = RegisterDecoder(3, PATCH, registers=9, **SIDES, key=d)
    else:
        quantizer = GaussianVAE(3)
        encoder = Encoder(PATCH, 6, **SIDES, key=e)
        sample = PatchSample(1, 3)  # of no concern to inference
        decoder = CoordDecoder(3, PATCH, cross_layers=1, sample=sample, **SIDES, key=d)
    return ElasticTok(
        Patching(2, 4, 4),
        CoarseToFine(),
        encoder,
        quantizer,
        decoder,
        frames_per_block=2,
        min_tokens=2,
        size=(16, 16),
        context=3,
    )


@pytest.fixture(scope="module", params=["registers", "coordinates"])
def model(request):
    return make(request.param)


def clip(frames: int, height: int = 16, width: int = 16) -> np.ndarray:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (frames, height // 8, width // 8, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


def test_a_search_finds_what_trying_every_length_finds(model):
    frames = clip(6)
    every = Tokenizer(model, Full(MSE(0.5))).encode(frames)
    found = Tokenizer(model, Binary(MSE(0.5))).encode(frames)
    for block in range(3):
        if every.met[block]:
            assert every.lengths[block] <= found.lengths[block]
            assert not found.met[block] or found.losses[block] <= 0.5


def test_losses_are_those_of_the_decoded_pixels_of_a_file(model, tmp_path):
    tokenizer = Tokenizer(model, Binary(MSE(0.4)))
    tokens = tokenizer.encode(clip(7))
    assert tokens.blocks == 4
    tokens.save(tmp_path / "clip.safetensors")
    again = Tokens.load(tmp_path / "clip.safetensors")
    decoded = tokenizer.decode(again)
    assert decoded.shape == (7, 16, 16, 3)
    truth = clip(7).astype(np.float64) / 127.5 - 1
    made = decoded.astype(np.float64) / 127.5 - 1
    for block in range(3):
        part = slice(2 * block, 2 * block + 2)
        loss = np.mean((truth[part] - made[part]) ** 2)
        assert tokens.losses[block] == pytest.approx(loss, abs=1e-6)
    np.testing.assert_array_equal(tokenizer.decode(again.truncate(2)).shape, decoded.shape)


def test_frames_of_another_size(model):
    tokenizer = Tokenizer(model, FixedLength(length=5), native=True)
    tokens = tokenizer.encode(clip(4, 8, 32))
    assert tokens.lengths.tolist() == [5, 5]
    assert tokenizer.decode(tokens).shape == (4, 8, 32, 3)


def test_stopping_and_going_on_changes_nothing(model, tmp_path):
    """Window 2, so that the encoder's ring turns; states go through files."""
    tokenizer = Tokenizer(model, Binary(MSE(0.4)), window=2)
    frames = clip(9)
    state, parts = tokenizer.start(16, 16), []
    for first in range(0, 9, 3):
        found, state = tokenizer.push(state, frames[first : first + 3], end=first == 6)
        parts += found
        save_encoder_state(state, tmp_path / "state")
        state = load_encoder_state(tmp_path / "state", tokenizer.codec)
    whole = tokenizer.encode(frames)
    assert Tokens.join(parts) == whole
    first = tokenizer.decode_stream([whole.select(0, 3)])
    blocks = list(first)
    save_decoder_state(first.state, tmp_path / "decoder")
    state = load_decoder_state(tmp_path / "decoder", tokenizer.codec)
    blocks += list(tokenizer.decode_stream([whole.select(3, 5)], state=state))
    np.testing.assert_array_equal(np.concatenate(blocks), tokenizer.decode(whole))


def test_encoding_once(model):
    once = Tokenizer(model, EncodeOnce(Binary(MSE(0.4)))).encode(clip(4))
    assert once.encoder_evaluations.tolist() == [1, 1]
    assert once.lengths.max() <= model.max_tokens
