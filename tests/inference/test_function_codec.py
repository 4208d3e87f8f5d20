"""A tokenizer written elsewhere, as two functions, under every strategy."""

import math

import numpy as np
import pytest

from elastictok.inference import (
    MSE,
    Binary,
    Codes,
    EncodeOnce,
    FixedLength,
    Full,
    FunctionCodec,
    Latents,
    Tokenizer,
    Tokens,
    WarmStart,
)


def rows(kind=None, encode=None, decode=None, **changes):
    """A token is the mean of a row of pixels; rows that are dropped are grey."""

    def means(pixels, length):
        return np.rint(pixels.mean(axis=(0, 2, 3))).astype(np.int64)[:length]

    def paint(values, length, height, width):
        rows = np.where(np.arange(height) < length, values, 128).astype(np.uint8)
        return np.broadcast_to(rows[None, :, None, None], (1, height, width, 3))

    settings = {
        "kind": Codes(256) if kind is None else kind,
        "tokens": lambda height, width: height,
        "size": (8, 6),
        "patch": (1, 1),
        "fingerprint": "rows",
    }
    return FunctionCodec(encode or means, decode or paint, **(settings | changes))


def clip(frames=3):
    """Rows of one grey each, so that enough tokens give the truth."""
    shades = np.random.default_rng(0).integers(0, 256, (frames, 8, 1, 1), np.uint8)
    return np.broadcast_to(shades, (frames, 8, 6, 3)).copy()


def test_the_length_is_the_one_that_is_needed(tmp_path):
    frames = clip()
    frames[1, 5:] = 128  # as dropped rows are painted
    tok = Tokenizer(rows(), Binary(MSE(0)), native=True)
    tokens = tok.encode(frames)
    assert tokens.lengths.tolist() == [8, 5, 8]
    assert tokens.codes.tolist() == [*frames[0, :, 0, 0], *frames[1, :5, 0, 0], *frames[2, :, 0, 0]]
    np.testing.assert_array_equal(tok.decode(tokens), frames)
    for strategy in (Full(MSE(0)), WarmStart(Binary(MSE(0))), EncodeOnce(Binary(MSE(0)))):
        other = Tokenizer(rows(), strategy, native=True).encode(frames)
        assert other.lengths.tolist() == [8, 5, 8]
    assert other.encoder_evaluations.tolist() == [1, 1, 1]
    tokens.save(tmp_path / "x")
    np.testing.assert_array_equal(tok.decode(Tokens.load(tmp_path / "x")), frames)
    assert Tokens.join(list(tok.stream(frames))) == tokens


def test_what_it_says_of_itself():
    codec = rows()
    assert codec.bits_per_token == 8
    assert rows(Codes(16, 3)).bits_per_token == 12
    assert rows(Codes(10)).bits_per_token == math.log2(10)
    assert rows(Latents(4)).bits_per_token is None
    assert (codec.context, codec.min_tokens, codec.frames_per_block) == (1, 1, 1)
    assert codec.tokens_per_block(5, 9) == 5


def test_latents():
    def encode(pixels, length):
        return pixels.mean(axis=(0, 2)) / 255  # all rows, more than are asked for

    def decode(values, length, height, width):
        assert not values[length:].any()
        return np.rint(values * 255).astype(np.uint8)[None, :, None].repeat(width, axis=2)

    frames = clip()
    tok = Tokenizer(rows(Latents(3), encode, decode), FixedLength(8), native=True)
    tokens = tok.encode(frames)
    assert tokens.latents.shape == (24, 3)
    np.testing.assert_array_equal(tok.decode(tokens), frames)


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        (rows(encode=lambda pixels, n: np.zeros(n - 1, np.int32)), r"int32\[4\] for 5 tokens"),
        (rows(encode=lambda pixels, n: np.zeros(9, np.int32)), r"int32\[9\]"),
        (rows(encode=lambda pixels, n: np.zeros((8, 2), np.int32)), r"int32\[8, 2\]"),
        (rows(encode=lambda pixels, n: np.zeros(8)), r"float64\[8\]"),
        (rows(decode=lambda v, n, h, w: np.zeros((1, h, w, 1), np.uint8)), r"uint8\[1, 8, 6, 1\]"),
        (rows(decode=lambda v, n, h, w: np.zeros((1, h, w, 3))), r"float64\[1, 8, 6, 3\]"),
    ],
)
def test_functions_that_give_something_else_are_named(codec, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer(codec, FixedLength(5), native=True).encode(clip(1))


@pytest.mark.parametrize(
    "change", [{"size": (0, 8)}, {"patch": (4, 0)}, {"frames_per_block": 0}, {"min_tokens": 0}]
)
def test_numbers_that_cannot_be(change):
    (name,) = change
    with pytest.raises(ValueError, match=f"{name} is 0"):
        rows(**change)
    with pytest.raises(ValueError, match="fingerprint is empty"):
        rows(fingerprint="")
