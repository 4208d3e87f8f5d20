"""A tokenizer simple enough to work out by hand."""

import numpy as np
import pytest

from elastictok.inference import Codes, ElasticCodec, Latents


class Grey(ElasticCodec):
    """Token `n` is the mean grey of 4x4 patch `n` of a block's first frame; the rest stays black.

    Frames are 12 pixels a side unless native; blocks have 2 frames, 9 tokens at that size, of which
    2 at least are kept. A state counts the blocks before, so that carrying it on can be told.
    """

    size = (12, 12)
    patch = (4, 4)
    frames_per_block = 2
    context = 3
    min_tokens = 2
    kind = Codes(256)
    bits_per_token = 8.0
    fingerprint = "9e57" * 16

    def __init__(self):
        self.encoded = []
        self.decoded = []

    def tokens_per_block(self, height, width):
        return (height // 4) * (width // 4)

    def encoder_state(self, window, height, width):
        return 0

    def decoder_state(self, window, height, width):
        return 0, height, width

    def encode(self, pixels, length, state):
        self.encoded.append(length)
        height, width = pixels.shape[1:3]
        boxes = pixels[0].reshape(height // 4, 4, width // 4, 4, 3).mean((1, 3, 4))
        return np.floor(boxes + 0.5).astype(np.int32).ravel(), state + 1

    def decode(self, values, length, state):
        self.decoded.append(length)
        blocks, height, width = state
        kept = np.where(np.arange(len(values)) < length, values, 0)
        grey = np.kron(kept.reshape(height // 4, width // 4), np.ones((4, 4)))
        frame = np.repeat(grey[..., None], 3, axis=-1).astype(np.uint8)
        return np.stack([frame] * 2), (blocks + 1, height, width)


class Float(Grey):
    """The same with tokens that are not quantized."""

    kind = Latents(1)
    bits_per_token = None
    fingerprint = "f10a" * 16

    def encode(self, pixels, length, state):
        values, state = super().encode(pixels, length, state)
        return values.astype(np.float32)[:, None], state

    def decode(self, values, length, state):
        return super().decode(values[:, 0], length, state)


@pytest.fixture
def grey():
    return Grey()


@pytest.fixture
def unquantised():
    return Float()


@pytest.fixture
def flat():
    """Makes clips of frames of one grey: the error with any number of tokens is easily told."""

    def make(*greys):
        return np.stack([np.full((12, 12, 3), grey, np.uint8) for grey in greys])

    return make
