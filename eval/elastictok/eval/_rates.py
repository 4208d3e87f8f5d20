"""What tokens cost, and how much of the code book they use."""

import math
from dataclasses import dataclass
from typing import TypeAlias, final

import numpy as np
from jaxtyping import Integer

Codes: TypeAlias = Integer[np.ndarray, "tokens"] | Integer[np.ndarray, "tokens streams"]


def bits_per_pixel(bits: float | int | None, frames: int, height: int, width: int) -> float | None:
    """Bits for each pixel (not each colour value) of a clip; None if there is no count of bits.

    **Arguments:**

    - `bits`: everything that has to be stored, as `Tokens.bits` counts it: codes and the lengths
        of the blocks. None for latents that are not quantized.
    - `frames`, `height`, `width`: of what is decoded.
    """
    pixels = frames * height * width
    if pixels < 1:
        raise ValueError(f"a clip of {frames} frames of {height}x{width} has no pixels")
    return None if bits is None else bits / pixels


def bpp16(
    tokens: int, bits_per_token: float | int | None, frames: int, height: int, width: int
) -> float | None:
    """`16 * tokens * log2(codes) / (frames * height * width)`, the convention of video tokenizers.

    The payload only (no side information), for 16 pixels. `bits_per_token` is `log2(codes)`, summed
    over the streams of a residual or grouped quantizer; None (not quantized) gives None.
    """
    if tokens < 0:
        raise ValueError(f"the number of tokens is not negative, got {tokens}")
    payload = None if bits_per_token is None else 16.0 * tokens * bits_per_token
    return bits_per_pixel(payload, frames, height, width)


@final
@dataclass(frozen=True)
class StreamUsage:
    """How one stream of codes uses its code book.

    **Fields:**

    - `used`: distinct codes seen.
    - `share`: `used / codebook_size`.
    - `perplexity`: `exp(entropy)` of the codes' frequencies, between 1 and `used`.
    """

    used: int
    share: float
    perplexity: float


@final
@dataclass(frozen=True)
class CodebookUsage:
    """Code-book use over kept tokens, per stream.

    `used` and `perplexity` cannot exceed the number of `tokens` counted: read them beside it.
    """

    codebook_size: int
    tokens: int
    streams: tuple[StreamUsage, ...]


def _stream_usage(codes: np.ndarray, codebook_size: int) -> StreamUsage:
    # Only the codes that occur: a code book may have 2**31 entries.
    _, counts = np.unique(codes, return_counts=True)
    share = counts / counts.sum()
    return StreamUsage(
        used=len(counts),
        share=len(counts) / codebook_size,
        perplexity=math.exp(-float(np.sum(share * np.log(share)))),
    )


def codebook_usage(codes: Codes, codebook_size: int) -> CodebookUsage:
    """Usage and perplexity of the code book, from the codes of kept tokens.

    **Arguments:**

    - `codes`: `[tokens]`, or `[tokens streams]` for residual and grouped quantizers. Kept tokens
        only, as in `Tokens.codes`: what a model returns at dropped positions means nothing.
    - `codebook_size`: entries of a stream's code book.

    **Raises:**

    `ValueError` if there are no codes or one of them lies outside the code book.
    """
    if codes.size == 0:
        raise ValueError("code-book usage of no tokens is not defined: give at least one token")
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= codebook_size:
        raise ValueError(
            f"codes run from {low} to {high}, outside the code book 0..{codebook_size - 1}: "
            "were they made by another model?"
        )
    streams = codes[:, None] if codes.ndim == 1 else codes
    return CodebookUsage(
        codebook_size=codebook_size,
        tokens=len(streams),
        streams=tuple(_stream_usage(stream, codebook_size) for stream in streams.T),
    )
