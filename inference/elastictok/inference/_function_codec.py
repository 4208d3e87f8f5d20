"""A tokenizer written elsewhere as an `ElasticCodec`: two functions on NumPy arrays."""

import math
from collections.abc import Callable
from typing import final

import numpy as np

from ._codec import Codes, ElasticCodec, Latents

Encode = Callable[[np.ndarray, int], np.ndarray]
Decode = Callable[[np.ndarray, int, int, int], np.ndarray]


@final
class FunctionCodec(ElasticCodec[None, tuple[int, int]]):
    """A tokenizer whose blocks do not know of each other, in any framework.

    One with a state between blocks is a subclass of `ElasticCodec` of its own.

    !!! Example

        A PyTorch model that keeps any prefix of its 256 tokens:

        ```python
        codec = FunctionCodec(
            lambda pixels, length: model.encode(torch.from_numpy(pixels)).numpy(),
            lambda values, length, height, width: model.decode(torch.from_numpy(values[:length])),
            kind=Codes(4096), tokens=lambda height, width: 256, size=(256, 256), patch=(16, 16),
            fingerprint="my model, step 1000",
        )
        Tokenizer(codec, Binary(MSE(0.003))).encode(frames)
        ```
    """

    def __init__(
        self,
        encode: Encode,
        decode: Decode,
        *,
        kind: Codes | Latents,
        tokens: Callable[[int, int], int],
        size: tuple[int, int],
        patch: tuple[int, int],
        frames_per_block: int = 1,
        min_tokens: int = 1,
        fingerprint: str,
    ):
        """**Arguments:**

        - `encode`: of `u8[frames_per_block height width 3]` and the length to be kept: integers
          `[tokens]` or `[tokens streams]`, or floats `[tokens dim]`. Rows from the length on may be
          missing.
        - `decode`: of tokens (all rows, those from the length on zero), the length, height and
          width: `u8[frames_per_block height width 3]`, the same each time.
        - `kind`: what a token is.
        - `tokens`: of a block of frames of a height and width.
        - `size`: height and width that it was made for.
        - `patch`: height and width that sizes must be a multiple of.
        - `frames_per_block`: 1 for pictures.
        - `min_tokens`: the fewest that a block may keep.
        - `fingerprint`: changes whenever tokens change their meaning; kept with every token.

        **Raises:** `ValueError` if a number is below 1 or the fingerprint is empty.
        """
        numbers = {"size": min(size), "patch": min(patch)}
        numbers |= {"frames_per_block": frames_per_block, "min_tokens": min_tokens}
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not fingerprint:
            raise ValueError("fingerprint is empty; name the model and its version")
        self._encode, self._decode, self._tokens = encode, decode, tokens
        self._kind, self._size, self._patch = kind, size, patch
        self._frames_per_block, self._min_tokens = frames_per_block, min_tokens
        self._fingerprint = fingerprint

    @property
    def size(self) -> tuple[int, int]:
        return self._size

    @property
    def patch(self) -> tuple[int, int]:
        return self._patch

    @property
    def frames_per_block(self) -> int:
        return self._frames_per_block

    @property
    def context(self) -> int:
        return 1

    @property
    def min_tokens(self) -> int:
        return self._min_tokens

    @property
    def kind(self) -> Codes | Latents:
        return self._kind

    @property
    def bits_per_token(self) -> float | None:
        if isinstance(self._kind, Latents):
            return None
        return (self._kind.streams or 1) * math.log2(self._kind.codebook_size)

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def tokens_per_block(self, height: int, width: int) -> int:
        return self._tokens(height, width)

    def encoder_state(self, window: int, height: int, width: int) -> None:
        return None

    def decoder_state(self, window: int, height: int, width: int) -> tuple[int, int]:
        return height, width

    def encode(self, pixels: np.ndarray, length: int, state: None) -> tuple[np.ndarray, None]:
        """See `ElasticCodec.encode`.

        **Raises:** `ValueError` if the function gives anything but tokens of its kind.
        """
        found = np.asarray(self._encode(pixels, length))
        values = self._kind.zeros(self._tokens(*pixels.shape[1:3]))
        whole = np.issubdtype(found.dtype, np.integer) or isinstance(self._kind, Latents)
        fits = found.shape[1:] == values.shape[1:] and length <= len(found) <= len(values)
        if found.ndim != values.ndim or not fits or not whole:
            raise ValueError(
                f"the encoder gave {found.dtype}{list(found.shape)} for {length} tokens; "
                f"{values.dtype}{list(values.shape)} is needed, or its first {length} rows"
            )
        values[: len(found)] = found
        return values, None

    def decode(
        self, values: np.ndarray, length: int, state: tuple[int, int]
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """See `ElasticCodec.decode`.

        **Raises:** `ValueError` if the function gives anything but frames of the size.
        """
        pixels = np.asarray(self._decode(values, length, *state))
        shape = (self._frames_per_block, *state, 3)
        if pixels.dtype != np.uint8 or pixels.shape != shape:
            raise ValueError(
                f"the decoder gave {pixels.dtype}{list(pixels.shape)}; uint8{list(shape)} is needed"
            )
        return pixels, state
