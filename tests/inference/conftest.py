"""A tokenizer in plain NumPy, tiny models and made-up tokens for the tests of this folder."""

import jax
import numpy as np
import pytest

from elastictok.inference import Codes, ElasticCodec, Latents, Tokens
from elastictok.models import CellRotary, CoarseToFine, Patching, presets
from elastictok.quantizers import FSQ


class PatchMeans(ElasticCodec[int, np.ndarray]):
    """A token is the mean of a 4x4 patch over the block; what is dropped looks like the last block.

    The decoder's state is the block before, so that lengths have consequences; the encoder's counts
    blocks. Losses need not fall with the length: the block before may be nearer than the mean.
    """

    size = (8, 8)
    patch = (4, 4)
    frames_per_block = 2
    context = 3
    min_tokens = 2
    kind = Codes(256)
    bits_per_token = 8.0
    fingerprint = "patch means"

    def __init__(self):
        self.encoded, self.decoded = [], []

    def tokens_per_block(self, height, width):
        assert (height % 4, width % 4) == (0, 0)
        return height * width // 16

    def encoder_state(self, window, height, width):
        return 0

    def decoder_state(self, window, height, width):
        return np.full((height // 4, width // 4), 128, np.int32)

    def encode(self, pixels, length, state):
        assert (pixels.dtype, pixels.shape[0]) == (np.uint8, 2)
        self.encoded.append((state, length))
        height, width = pixels.shape[1:3]
        cells = pixels.reshape(2, height // 4, 4, width // 4, 4, 3).mean(axis=(0, 2, 4, 5))
        codes = np.rint(cells).astype(np.int32).reshape(-1)
        codes[length:] = 77  # to be ignored
        return codes, state + 1

    def decode(self, values, length, state):
        assert (values.dtype, values.shape) == (np.int32, (state.size,))
        assert not values[length:].any()
        self.decoded.append(length)
        cells = np.where(np.arange(state.size) < length, values, state.reshape(-1))
        cells = cells.reshape(state.shape)
        plane = np.repeat(np.repeat(cells, 4, axis=0), 4, axis=1).astype(np.uint8)
        return np.broadcast_to(plane[None, :, :, None], (2, *plane.shape, 3)).copy(), cells


class Curves(ElasticCodec[int, int]):
    """Blocks whose loss at each length is prescribed: `curves[index of the block][length]`.

    A block of one frame of 8x8 carries its index in its first pixel; what is decoded carries the
    index and the length, and `loss` looks them up. Lengths are 1 to 64. `calls` holds the lengths
    of every call: what the encoder was told, what the decoder was given.
    """

    size = (8, 8)
    patch = (1, 1)
    frames_per_block = 1
    context = 2
    min_tokens = 1
    kind = Codes(256)
    bits_per_token = 8.0
    fingerprint = "curves"

    def __init__(self, curves, lanes=1):
        self.curves, self._lanes = curves, lanes
        self.calls = {"encode": [], "decode": []}

    @property
    def lanes(self):
        return self._lanes

    def frames(self, blocks):
        """A clip of these blocks."""
        frames = np.zeros((len(blocks), 8, 8, 3), np.uint8)
        frames[:, 0, 0, 0] = blocks
        return frames

    def loss(self, truth, reconstruction):
        assert truth[0, 0, 0, 0] == reconstruction[0, 0, 0, 0]
        return float(self.curves[truth[0, 0, 0, 0]][reconstruction[0, 0, 0, 1]])

    def tokens_per_block(self, height, width):
        assert (height, width) == (8, 8)
        return len(self.curves[0]) - 1

    def encoder_state(self, window, height, width):
        return 0

    def decoder_state(self, window, height, width):
        return 0

    def encode(self, pixels, length, state):
        self.calls["encode"].append([length])
        return self._encode(pixels, length, state)

    def decode(self, values, length, state):
        self.calls["decode"].append([length])
        return self._decode(values, length, state)

    def encode_batch(self, requests):
        self.calls["encode"].append([length for _, length, _ in requests])
        return [self._encode(*request) for request in requests]

    def decode_batch(self, requests):
        self.calls["decode"].append([length for _, length, _ in requests])
        return [self._decode(*request) for request in requests]

    def _encode(self, pixels, length, state):
        values = np.full(
            self.tokens_per_block(8, 8), 77, np.int32
        )  # to be ignored from `length` on
        values[:length] = pixels[0, 0, 0, 0]
        return values, state + 1

    def _decode(self, values, length, state):
        assert not values[length:].any()
        assert len(set(values[:length].tolist())) == 1
        pixels = np.zeros((1, 8, 8, 3), np.uint8)
        pixels[0, 0, 0, :3] = values[0], length, state
        return pixels, state + 1


@pytest.fixture(scope="session")
def patch_means():
    return PatchMeans


@pytest.fixture(scope="session")
def curves_codec():
    return Curves


@pytest.fixture(scope="session")
def make_model():
    """A model of 16x16 pixels, 4 to 16 tokens per block of 2 frames, context of 3 blocks."""

    def make(quantizer=None, *, seed=0, frames_per_block=2):
        return presets.build(
            size=(16, 16),
            context=3,
            frames_per_block=frames_per_block,
            min_tokens=4,
            patching=Patching(2, 4, 4),
            order=CoarseToFine(),
            quantizer=FSQ((5, 5, 5)) if quantizer is None else quantizer,
            dim=16,
            hidden=32,
            layers=1,
            heads=2,
            rotary=CellRotary(30.0, 100.0),
            place_frequencies=4,
            std=0.4,  # large: an untrained model should not paint everything grey
            key=jax.random.key(seed),
        )

    return make


@pytest.fixture(scope="session")
def model(make_model):
    return make_model()


@pytest.fixture(scope="session")
def make_tokens():
    """Valid `Tokens` of the given lengths, drawn from a seed."""

    def make(lengths=(3, 5, 2), kind=None, seed=0, **changes):
        rng = np.random.default_rng(seed)
        kind = Codes(125) if kind is None else kind
        blocks, kept = len(lengths), sum(lengths)
        values = kind.zeros(kept)
        if isinstance(kind, Latents):
            values = rng.normal(size=values.shape).astype(np.float32)
        else:
            values = rng.integers(0, kind.codebook_size, values.shape).astype(np.int32)
        codes = isinstance(kind, Codes)
        losses = rng.random(blocks)
        fields = {
            "codes": values if codes else None,
            "latents": None if codes else values,
            "lengths": np.array(lengths, np.int32),
            "losses": losses,
            "met": losses < 0.5,
            "monotone": rng.random(blocks) < 0.5,
            "measured": np.ones(blocks, np.bool_),
            "encoder_evaluations": rng.integers(1, 9, blocks).astype(np.int32),
            "decoder_evaluations": rng.integers(1, 300, blocks).astype(np.int32),
            "frames": 2 * blocks - 1,
            "height": 30,
            "width": 17,
            "original_height": 300,
            "original_width": 170,
            "fps": 23.976,
            "picture": False,
            "tokens_per_block": 16,
            "frames_per_block": 2,
            "min_tokens": 2,
            "codebook_size": kind.codebook_size if codes else None,
            "bits_per_token": 6.965784284662087 if codes else None,
            "window": 3,
            "fingerprint": "ab" * 32,
            "seconds": rng.random(blocks),
        }
        return Tokens(**{**fields, **changes})

    return make


@pytest.fixture(scope="module")
def compilations():
    """A list that grows by one with everything that XLA compiles."""
    compiled = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return compiled
