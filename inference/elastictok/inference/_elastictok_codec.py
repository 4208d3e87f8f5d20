"""`ElasticTok` as an `ElasticCodec`."""

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, PyTree, UInt8

from elastictok.models import ElasticTok, fingerprint
from elastictok.quantizers import AbstractDiscreteQuantizer

from ._codec import Codes, ElasticCodec, Latents


class Stream(eqx.Module):
    """One half of a model's stream, the encoder's or the decoder's.

    - `cache`: that half's KV cache.
    - `window`: blocks that it holds.
    - `height`, `width`: of the frames.
    """

    cache: PyTree
    window: int = eqx.field(static=True)
    height: int = eqx.field(static=True)
    width: int = eqx.field(static=True)


@final
class ElasticTokCodec(ElasticCodec[Stream, Stream]):
    """An `ElasticTok` behind the interface that strategies and `Tokenizer` work with.

    Encoder and decoder are one jitted function each, shared by all codecs: they compile once per
    model structure, frame size and window. The length is an array in them, so that no length
    compiles anything. They are two functions, not one, so that decoding a file runs the very
    program whose pixels were measured when it was made.

    Each runs `lanes` blocks at once, and always as many, so that the number of blocks at hand
    compiles nothing either: blocks of a batch go through it `lanes` at a time, and lanes that are
    left over in the last group do what is not used.
    """

    model: ElasticTok

    def __init__(self, model: ElasticTok, *, lanes: int | None = None):
        """**Arguments:**

        - `model`: the model.
        - `lanes`: blocks that go through it at once. By default 1 on a CPU, which a single block
          keeps busy (benchmarks/results/inference.md), and 8 elsewhere. Pixels can differ in the
          last bit between codecs with different lanes.

        **Raises:** `ValueError` if `lanes` is below 1.
        """
        if lanes is not None and lanes < 1:
            raise ValueError(f"lanes is {lanes}; at least 1 block goes through the model at once")
        self.model = model
        on_cpu = jax.default_backend() == "cpu"
        self._lanes = (1 if on_cpu else 8) if lanes is None else lanes

    @property
    def lanes(self) -> int:
        return self._lanes

    @property
    def size(self) -> tuple[int, int]:
        return self.model.size

    @property
    def patch(self) -> tuple[int, int]:
        return self.model.patching.height, self.model.patching.width

    @property
    def frames_per_block(self) -> int:
        return self.model.frames_per_block

    @property
    def context(self) -> int:
        return self.model.context

    @property
    def min_tokens(self) -> int:
        return self.model.min_tokens

    @property
    def kind(self) -> Codes | Latents:
        return self._kind

    @property
    def bits_per_token(self) -> float | None:
        return self.model.quantizer.bits_per_token

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _kind(self) -> Codes | Latents:
        quantizer = self.model.quantizer
        if not isinstance(quantizer, AbstractDiscreteQuantizer):
            return Latents(quantizer.latent_dim)
        one = jax.ShapeDtypeStruct((1, quantizer.latent_dim), jnp.float32)
        codes = jax.eval_shape(quantizer.to_codes, one)  # one stream may come as [tokens 1]
        return Codes(quantizer.codebook_size, *codes.shape[1:])

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.model)  # hashes every weight: once is enough

    def tokens_per_block(self, height: int, width: int) -> int:
        return self.model.tokens_per_block(height, width)

    def encoder_state(self, window: int, height: int, width: int) -> Stream:
        """See `ElasticCodec.encoder_state`.

        **Raises:** `ValueError` if the KV caches of the window do not fit into memory.
        """
        self._check_memory(window, height, width)
        cache = self.model.init_cache(window, height=height, width=width)
        return Stream(cache.encoder, window, height, width)

    def decoder_state(self, window: int, height: int, width: int) -> Stream:
        """See `ElasticCodec.decoder_state`.

        **Raises:** `ValueError` if the KV caches of the window do not fit into memory.
        """
        self._check_memory(window, height, width)
        cache = self.model.init_cache(window, height=height, width=width)
        return Stream(cache.decoder, window, height, width)

    def _check_memory(self, window: int, height: int, width: int) -> None:
        # A cache that does not fit ends the process on many systems, instead of raising.
        here = memory()
        if here is None:
            return
        shapes = jax.eval_shape(lambda: self.model.init_cache(1, height=height, width=width))
        block = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
        # A call has the states before and after it.
        fits = here // (2 * block)
        if window > fits:
            raise ValueError(
                f"a window of {window} blocks of {self.tokens_per_block(height, width)} tokens "
                f"needs KV caches of {2 * window * block / 1e9:.1f} GB, and there are "
                f"{here / 1e9:.1f} GB of memory; choose a window (--window) of at most "
                f"{max(fits // 2, 1)}, or a smaller size"
            )

    def encode(
        self, pixels: UInt8[np.ndarray, "frames height width 3"], length: int, state: Stream
    ) -> tuple[np.ndarray, Stream]:
        """See `ElasticCodec.encode`.

        **Raises:** `FloatingPointError` if a kept latent is not finite.
        """
        (result,) = self.encode_batch([(pixels, length, state)])
        return result

    def decode(
        self, values: np.ndarray, length: int, state: Stream
    ) -> tuple[UInt8[np.ndarray, "frames height width 3"], Stream]:
        """See `ElasticCodec.decode`.

        **Raises:** `FloatingPointError` if a pixel is not finite.
        """
        (result,) = self.decode_batch([(values, length, state)])
        return result

    def encode_batch(
        self, requests: Sequence[tuple[np.ndarray, int, Stream]]
    ) -> list[tuple[np.ndarray, Stream]]:
        """See `ElasticCodec.encode_batch`.

        **Raises:** `FloatingPointError` if a kept latent is not finite.
        """
        return self._run(_encode, requests, "the encoder's latents")

    def decode_batch(
        self, requests: Sequence[tuple[np.ndarray, int, Stream]]
    ) -> list[tuple[np.ndarray, Stream]]:
        """See `ElasticCodec.decode_batch`.

        **Raises:** `FloatingPointError` if a pixel is not finite.
        """
        return self._run(_decode, requests, "the decoder's pixels")

    def _run(
        self, program: Any, requests: Sequence[tuple[np.ndarray, int, Stream]], what: str
    ) -> list[tuple[np.ndarray, Stream]]:
        results = []
        for first in range(0, len(requests), self.lanes):
            group = list(requests[first : first + self.lanes])
            full = group + group[-1:] * (self.lanes - len(group))
            arrays, lengths, states = zip(*full, strict=True)
            lengths = jnp.asarray(np.array(lengths, np.int32))
            results += program(self.model, tuple(map(jnp.asarray, arrays)), lengths, states)[
                : len(group)
            ]
        # Not before all were started: a device goes on while the host fetches.
        if not all(finite for _, finite, _ in results):
            raise FloatingPointError(
                f"{what} are not finite: the model's weights hold NaN or infinity, or its compute "
                "precision overflows"
            )
        return [(np.asarray(array), state) for array, _, state in results]


def memory() -> int | None:
    """Bytes that the default device has in all; None where that is unknown."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (ValueError, OSError):
            return None
    return (device.memory_stats() or {}).get("bytes_limit")


def as_codec(model: ElasticTok | ElasticCodec) -> ElasticCodec:
    """The model behind the interface, or the codec as it is."""
    return ElasticTokCodec(model) if isinstance(model, ElasticTok) else model


@eqx.filter_jit
def _encode(
    model: ElasticTok,
    pixels: tuple[UInt8[Array, "frames height width 3"], ...],
    lengths: Int32[Array, "lanes"],
    states: tuple[Stream, ...],
) -> list[tuple[Array, Bool[Array, ""], Stream]]:
    return _lanes(lambda *one: _encode_one(model, *one), pixels, lengths, states)


@eqx.filter_jit
def _decode(
    model: ElasticTok,
    values: tuple[Int32[Array, "tokens *streams"] | Float32[Array, "tokens dim"], ...],
    lengths: Int32[Array, "lanes"],
    states: tuple[Stream, ...],
) -> list[tuple[Array, Bool[Array, ""], Stream]]:
    return _lanes(lambda *one: _decode_one(model, *one), values, lengths, states)


def _lanes(
    one: Callable[..., tuple[Array, Bool[Array, ""], Stream]],
    arrays: tuple[Array, ...],
    lengths: Int32[Array, "lanes"],
    states: tuple[Stream, ...],
) -> list[tuple[Array, Bool[Array, ""], Stream]]:
    """A function of one block over several at once."""
    if len(arrays) == 1:
        return [one(arrays[0], lengths[0], states[0])]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *zip(arrays, states, strict=True))
    out = jax.vmap(lambda lane, length: one(lane[0], length, lane[1]))(stacked, lengths)
    return [jax.tree.map(lambda leaf, at=at: leaf[at], out) for at in range(len(arrays))]


def _encode_one(
    model: ElasticTok,
    pixels: UInt8[Array, "frames height width 3"],
    length: Int32[Array, ""],
    state: Stream,
) -> tuple[Int32[Array, "tokens *streams"] | Float32[Array, "tokens dim"], Bool[Array, ""], Stream]:
    empty = model.init_cache(state.window, height=state.height, width=state.width)
    cache = eqx.tree_at(lambda c: c.encoder, empty, state.cache)
    unit = pixels.astype(jnp.float32) / 127.5 - 1
    quantized, cache = model.encode_block(unit, length, cache)
    if quantized.codes is None:
        values = quantized.latents.astype(jnp.float32)
    else:
        values = quantized.codes.astype(jnp.int32)
    finite = jnp.all(jnp.isfinite(quantized.latents))
    return values, finite, Stream(cache.encoder, state.window, state.height, state.width)


def _decode_one(
    model: ElasticTok,
    values: Int32[Array, "tokens *streams"] | Float32[Array, "tokens dim"],
    length: Int32[Array, ""],
    state: Stream,
) -> tuple[UInt8[Array, "frames height width 3"], Bool[Array, ""], Stream]:
    # The half that is not used is never computed: XLA drops it.
    empty = model.init_cache(state.window, height=state.height, width=state.width)
    cache = eqx.tree_at(lambda c: c.decoder, empty, state.cache)
    if isinstance(model.quantizer, AbstractDiscreteQuantizer):
        latents = model.quantizer.from_codes(values)
    else:
        latents = values
    # The model takes tokens from `length` on as dropped, whatever code 0 stands for.
    unit, cache = model.decode_block(latents, length, cache, height=state.height, width=state.width)
    pixels = jnp.clip(jnp.round((unit + 1) * 127.5), 0, 255).astype(jnp.uint8)
    finite = jnp.all(jnp.isfinite(unit))
    return pixels, finite, Stream(cache.decoder, state.window, state.height, state.width)
