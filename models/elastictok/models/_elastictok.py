"""The tokenizer: patches, encoder, quantizer, decoder, patches; any prefix of tokens is kept."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from elastictok.attention import AbstractMask, BlockCausal, KeyValid, Segments
from elastictok.quantizers import AbstractQuantizer, QuantizerOutput

from ._cells import Cells
from ._execution import LOCAL, AbstractExecution
from ._order import AbstractOrder
from ._patching import Patching
from ._place import PlaceEmbedding
from ._rope import AbstractRotary
from ._transformer import KVCache, Linear, RMSNorm, Transformer


class Encoder(eqx.Module):
    """Patches and the keep mask to latents, before quantization."""

    in_proj: Linear
    kept: Float[Array, "dim"]
    masked: Float[Array, "dim"]
    place: PlaceEmbedding | None
    transformer: Transformer
    norm: RMSNorm
    out_proj: Linear

    def __init__(
        self,
        patch_dim: int,
        latent_dim: int,
        *,
        dim: int,
        hidden: int,
        layers: int,
        heads: int,
        rotary: AbstractRotary,
        eps: float = 1e-5,
        std: float = 0.02,
        dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        place_frequencies: int | None = None,
        key: Key[Array, ""],
    ):
        """**Arguments:**

        - `patch_dim`: values in a patch.
        - `latent_dim`: what the quantizer takes per token (its `input_dim`).
        - `place_frequencies`: of a `PlaceEmbedding`; None for none, as in the paper.
        - the others: see `Transformer`.
        """
        i, k, m, p, t, o = jax.random.split(key, 6)
        self.in_proj = Linear(patch_dim, dim, std=std, key=i)
        self.kept = std * jax.random.normal(k, (dim,))
        self.masked = std * jax.random.normal(m, (dim,))
        self.place = _place(place_frequencies, dim, std, p)
        self.transformer = Transformer(
            dim=dim,
            hidden=hidden,
            layers=layers,
            heads=heads,
            rotary=rotary,
            eps=eps,
            std=std,
            dtype=dtype,
            remat=remat,
            key=t,
        )
        self.norm = RMSNorm(dim, eps)
        self.out_proj = Linear(dim, latent_dim, std=std, key=o)

    def embed(
        self,
        patches: Float[Array, "tokens patch"],
        keep: Bool[Array, "tokens"],
        positions: Int[Array, "tokens"],
        cells: Cells,
    ) -> Float[Array, "tokens dim"]:
        """Input embeddings: each patch's, its *kept* or *masked* vector and its place."""
        x = self.in_proj(patches) + jnp.where(keep[:, None], self.kept, self.masked)
        return _placed(x, self.place, positions, cells)

    def readout(self, x: Float[Array, "tokens dim"]) -> Float[Array, "tokens latent_dim"]:
        """Latents from the last layer's output."""
        return self.out_proj(self.norm(x))

    def __call__(
        self,
        patches: Float[Array, "tokens patch"],
        keep: Bool[Array, "tokens"],
        mask: AbstractMask,
        positions: Int[Array, "tokens"],
        cells: Cells,
        execution: AbstractExecution = LOCAL,
    ) -> Float[Array, "tokens latent_dim"]:
        """Latents of a whole sequence."""
        x = self.embed(patches, keep, positions, cells)
        return self.readout(self.transformer(x, mask, positions, cells, execution))

    def extend(
        self,
        patches: Float[Array, "tokens patch"],
        keep: Bool[Array, "tokens"],
        cache: KVCache,
        cells: Cells,
    ) -> tuple[Float[Array, "tokens latent_dim"], KVCache]:
        """Latents of the next block of a stream."""
        x = self.embed(patches, keep, jnp.arange(len(keep)), cells)
        x, cache = self.transformer.extend(x, cache, cells)
        return self.readout(x), cache


class Decoder(eqx.Module):
    """Latents (zero where dropped) to patches in (-1, 1)."""

    in_proj: Linear
    place: PlaceEmbedding | None
    transformer: Transformer
    norm: RMSNorm
    out_proj: Linear

    def __init__(
        self,
        latent_dim: int,
        patch_dim: int,
        *,
        dim: int,
        hidden: int,
        layers: int,
        heads: int,
        rotary: AbstractRotary,
        eps: float = 1e-5,
        std: float = 0.02,
        dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        place_frequencies: int | None = None,
        key: Key[Array, ""],
    ):
        """**Arguments:**

        - `latent_dim`: what the quantizer gives per token (its `latent_dim`).
        - `patch_dim`: values in a patch.
        - `place_frequencies`: of a `PlaceEmbedding`; None for none, as in the paper.
        - the others: see `Transformer`.
        """
        i, p, t, o = jax.random.split(key, 4)
        self.in_proj = Linear(latent_dim, dim, std=std, key=i)
        self.place = _place(place_frequencies, dim, std, p)
        self.transformer = Transformer(
            dim=dim,
            hidden=hidden,
            layers=layers,
            heads=heads,
            rotary=rotary,
            eps=eps,
            std=std,
            dtype=dtype,
            remat=remat,
            key=t,
        )
        self.norm = RMSNorm(dim, eps)
        self.out_proj = Linear(dim, patch_dim, std=std, key=o)

    def embed(
        self,
        latents: Float[Array, "tokens latent_dim"],
        positions: Int[Array, "tokens"],
        cells: Cells,
    ) -> Float[Array, "tokens dim"]:
        """Input embeddings: each latent's, plus its place."""
        x = self.in_proj(latents)
        return _placed(x, self.place, positions, cells)

    def readout(self, x: Float[Array, "tokens dim"]) -> Float[Array, "tokens patch"]:
        """Patches from the last layer's output."""
        return jnp.tanh(self.out_proj(self.norm(x)))

    def __call__(
        self,
        latents: Float[Array, "tokens latent_dim"],
        mask: AbstractMask,
        positions: Int[Array, "tokens"],
        cells: Cells,
        execution: AbstractExecution = LOCAL,
    ) -> Float[Array, "tokens patch"]:
        """Patches of a whole sequence."""
        x = self.embed(latents, positions, cells)
        return self.readout(self.transformer(x, mask, positions, cells, execution))

    def extend(
        self,
        latents: Float[Array, "tokens latent_dim"],
        cache: KVCache,
        cells: Cells,
    ) -> tuple[Float[Array, "tokens patch"], KVCache]:
        """Patches of the next block of a stream."""
        x = self.embed(latents, jnp.arange(len(latents)), cells)
        x, cache = self.transformer.extend(x, cache, cells)
        return self.readout(x), cache


class ElasticTokOutput(eqx.Module):
    """What a forward pass gives.

    - `pixels`: the reconstruction, in (-1, 1).
    - `latents`: quantized, zero at dropped tokens.
    - `codes`: integers in range at kept tokens; None if the quantizer is continuous.
    - `loss`: the quantizer's loss, summed over kept tokens and divided by the valid blocks.
    - `statistics`: the quantizer's sums over kept tokens.
    """

    pixels: Float[Array, "frames height width 3"]
    latents: Float[Array, "tokens latent_dim"]
    codes: Int[Array, "tokens"] | Int[Array, "tokens streams"] | None
    loss: Float[Array, ""]
    statistics: PyTree


class Cache(eqx.Module):
    """State of a stream: the encoder's and the decoder's KV cache."""

    encoder: KVCache
    decoder: KVCache


class ElasticTok(eqx.Module):
    """ElasticTok (arXiv 2410.08368) from ready-made parts. One example; batch by `jax.vmap`.

    The tokens of a block are its patches in the order's ranks. A block with length `l` keeps its
    first `l` tokens; the encoder is told which ones, the latents of the others are zero.
    """

    patching: Patching
    order: AbstractOrder
    encoder: Encoder
    quantizer: AbstractQuantizer
    decoder: Decoder
    frames_per_block: int = eqx.field(static=True, kw_only=True)
    min_tokens: int = eqx.field(static=True, kw_only=True)
    size: tuple[int, int] = eqx.field(static=True, kw_only=True)
    context: int = eqx.field(static=True, kw_only=True)

    def __check_init__(self) -> None:
        if not 1 <= self.min_tokens <= self.max_tokens:
            raise ValueError(
                f"min_tokens is {self.min_tokens}; a block has 1 to {self.max_tokens} tokens"
            )
        if self.context < 1:
            raise ValueError(f"context is {self.context} blocks; it must be at least 1")
        for name, wanted, given in (
            ("encoder gives", self.quantizer.input_dim, self.encoder.out_proj.weight.shape[-1]),
            ("decoder takes", self.quantizer.latent_dim, self.decoder.in_proj.weight.shape[-2]),
            ("encoder takes", self.patching.patch_dim, self.encoder.in_proj.weight.shape[-2]),
            ("decoder gives", self.patching.patch_dim, self.decoder.out_proj.weight.shape[-1]),
        ):
            if wanted != given:
                raise ValueError(f"the {name} {given} values per token where {wanted} are needed")

    @property
    def max_tokens(self) -> int:
        """Tokens of a block at the trained size."""
        return self.tokens_per_block(*self.size)

    def grid(self, height: int, width: int) -> tuple[int, int, int]:
        """Cells of a block of frames of the given size along time, height and width.

        **Raises:** `ValueError` if the patch does not divide the size.
        """
        return self.patching.grid(self.frames_per_block, height, width)

    def tokens_per_block(self, height: int, width: int) -> int:
        """Tokens of a block of frames of the given size.

        **Raises:** `ValueError` if the patch does not divide the size.
        """
        return math.prod(self.grid(height, width))

    def patch(self, pixels: Float[Array, "frames height width 3"]) -> Float[Array, "tokens patch"]:
        """Patches of whole blocks in token order."""
        blocks = self._blocks(pixels.shape[0])
        _, height, width, _ = pixels.shape
        grid = self.grid(height, width)
        cells = self.patching.patch(pixels)
        cells = cells.reshape(blocks, -1, cells.shape[-1])[:, self.order.cells(grid)]
        return cells.reshape(-1, cells.shape[-1])

    def unpatch(
        self, patches: Float[Array, "tokens patch"], height: int, width: int
    ) -> Float[Array, "frames height width 3"]:
        """The inverse of `patch`."""
        grid = self.grid(height, width)
        blocks = self._whole(patches.shape[0], height, width)
        cells = patches.reshape(blocks, -1, patches.shape[-1])[:, self.order.ranks(grid)]
        cells = cells.reshape(patches.shape)
        return self.patching.unpatch(cells, blocks * self.frames_per_block, height, width)

    def __call__(
        self,
        pixels: Float[Array, "frames height width 3"],
        lengths: Int[Array, "blocks"],
        segments: Int[Array, "blocks"] | None = None,
        valid: Bool[Array, "blocks"] | None = None,
        *,
        told: Int[Array, "blocks"] | None = None,
        key: Key[Array, ""] | None = None,
        execution: AbstractExecution = LOCAL,
    ) -> ElasticTokOutput:
        """Encodes, quantizes and decodes a sequence of blocks.

        **Arguments:**

        - `pixels`: in [-1, 1]; frames a multiple of `frames_per_block`, sizes of the patch.
        - `lengths`: kept tokens per block, clipped to the allowed range.
        - `segments`: which document each block belongs to; documents do not see each other.
        - `valid`: false for blocks of padding, which nobody sees and which add to no sum.
        - `told`: the lengths that the encoder is told, if other than those kept; only training has
          a use for it (`ConditionDropout`).
        - `key`: for quantizers that sample.
        - `execution`: how the layers are carried out.

        **Raises:** `ValueError` for sizes that do not fit.
        """
        blocks, height, width = self._blocks(pixels.shape[0]), *pixels.shape[1:3]
        if lengths.shape != (blocks,):
            raise ValueError(
                f"lengths has shape {lengths.shape} for {blocks} blocks of "
                f"{self.frames_per_block} frames; give one length per block"
            )
        tokens = self.tokens_per_block(height, width)
        segment_ids, key_valid = _spread(segments, tokens), _spread(valid, tokens)
        quantized = self.encode_tokens(
            self.patch(pixels),
            self.keep(lengths, height, width, valid),
            told=None if told is None else self.keep(told, height, width, valid),
            grid=self.grid(height, width),
            segments=segment_ids,
            key_valid=key_valid,
            key=key,
            execution=execution,
        )
        patches = self.decode_tokens(
            quantized.latents,
            grid=self.grid(height, width),
            segments=segment_ids,
            key_valid=key_valid,
            execution=execution,
        )
        count = blocks if valid is None else jnp.maximum(jnp.sum(valid), 1)
        return ElasticTokOutput(
            self.unpatch(patches, height, width),
            quantized.latents,
            quantized.codes,
            quantized.loss / count,
            quantized.statistics,
        )

    def encode(
        self,
        pixels: Float[Array, "frames height width 3"],
        lengths: Int[Array, "blocks"],
        segments: Int[Array, "blocks"] | None = None,
        valid: Bool[Array, "blocks"] | None = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "tokens latent_dim"]:
        """Quantized latents of a sequence of blocks, zero at dropped tokens; see `__call__`."""
        height, width = pixels.shape[1:3]
        tokens = self.tokens_per_block(height, width)
        return self.encode_tokens(
            self.patch(pixels),
            self.keep(lengths, height, width, valid),
            grid=self.grid(height, width),
            segments=_spread(segments, tokens),
            key_valid=_spread(valid, tokens),
            key=key,
        ).latents

    def decode(
        self,
        latents: Float[Array, "tokens latent_dim"],
        lengths: Int[Array, "blocks"],
        segments: Int[Array, "blocks"] | None = None,
        valid: Bool[Array, "blocks"] | None = None,
        *,
        height: int,
        width: int,
    ) -> Float[Array, "frames height width 3"]:
        """Pixels in (-1, 1) from latents; tokens past a block's length are taken as dropped."""
        tokens = self.tokens_per_block(height, width)
        keep = self.keep(lengths, height, width, valid)
        patches = self.decode_tokens(
            jnp.where(keep[:, None], latents, 0),
            grid=self.grid(height, width),
            segments=_spread(segments, tokens),
            key_valid=_spread(valid, tokens),
        )
        return self.unpatch(patches, height, width)

    def keep(
        self,
        lengths: Int[Array, "blocks"],
        height: int,
        width: int,
        valid: Bool[Array, "blocks"] | None = None,
    ) -> Bool[Array, "tokens"]:
        """The keep mask of the given lengths, which are clipped to the allowed range.

        Exactly `length` tokens of a block are kept, none of a block that is not valid.
        """
        tokens = self.tokens_per_block(height, width)
        lengths = jnp.clip(lengths, min(self.min_tokens, tokens), tokens)
        if valid is not None:
            lengths = jnp.where(valid, lengths, 0)
        return (jnp.arange(tokens) < lengths[:, None]).reshape(-1)

    def encode_tokens(
        self,
        patches: Float[Array, "tokens patch"],
        keep: Bool[Array, "tokens"],
        *,
        told: Bool[Array, "tokens"] | None = None,
        grid: tuple[int, int, int],
        segments: Int[Array, "tokens"] | None = None,
        key_valid: Bool[Array, "tokens"] | None = None,
        positions: Int[Array, "tokens"] | None = None,
        key: Key[Array, ""] | None = None,
        execution: AbstractExecution = LOCAL,
    ) -> QuantizerOutput:
        """The encoder and quantizer on tokens: any keep mask, documents that meet inside a block.

        **Arguments:**

        - `patches`: in token order.
        - `keep`: any mask, not only prefixes.
        - `told`: the mask that the encoder is told, if another one.
        - `grid`: cells of a block; the first block starts at the first token.
        - `segments`: document of each token.
        - `key_valid`: false for tokens that nobody sees.
        - `positions`: for the rotary embedding; the index in the sequence by default.
        - `execution`: how the layers are carried out.
        """
        latents = self.encoder(
            patches,
            keep if told is None else told,
            _mask(math.prod(grid), segments, key_valid),
            _positions(positions, patches),
            Cells(self.order, grid),
            execution,
        )
        return self.quantizer(latents, keep, key=key)

    def decode_tokens(
        self,
        latents: Float[Array, "tokens latent_dim"],
        *,
        grid: tuple[int, int, int],
        segments: Int[Array, "tokens"] | None = None,
        key_valid: Bool[Array, "tokens"] | None = None,
        positions: Int[Array, "tokens"] | None = None,
        execution: AbstractExecution = LOCAL,
    ) -> Float[Array, "tokens patch"]:
        """The decoder on tokens; see `encode_tokens`. Latents must be zero where dropped."""
        return self.decoder(
            latents,
            _mask(math.prod(grid), segments, key_valid),
            _positions(positions, latents),
            Cells(self.order, grid),
            execution,
        )

    def init_cache(self, blocks: int, *, height: int, width: int) -> Cache:
        """The state of a stream that has not started.

        **Arguments:**

        - `blocks`: window: how many blocks, the current one included, a block can see.
        - `height`, `width`: of the stream's frames.
        """
        tokens = self.tokens_per_block(height, width)
        return Cache(
            self.encoder.transformer.init_cache(blocks, tokens),
            self.decoder.transformer.init_cache(blocks, tokens),
        )

    def encode_block(
        self,
        pixels: Float[Array, "frames height width 3"],
        length: Int[Array, ""],
        cache: Cache,
        *,
        key: Key[Array, ""] | None = None,
    ) -> tuple[QuantizerOutput, Cache]:
        """The next block of a stream, and the state with the encoder's part moved on."""
        if pixels.shape[0] != self.frames_per_block:
            raise ValueError(
                f"a block has {self.frames_per_block} frames; {pixels.shape[0]} were given"
            )
        _, height, width, _ = pixels.shape
        keep = self.keep(length[None], height, width)
        cells = Cells(self.order, self.grid(height, width))
        latents, encoder = self.encoder.extend(self.patch(pixels), keep, cache.encoder, cells)
        return self.quantizer(latents, keep, key=key), Cache(encoder, cache.decoder)

    def decode_block(
        self,
        latents: Float[Array, "tokens latent_dim"],
        length: Int[Array, ""],
        cache: Cache,
        *,
        height: int,
        width: int,
    ) -> tuple[Float[Array, "frames height width 3"], Cache]:
        """Pixels of the next block of a stream, and the state with the decoder's part moved on."""
        keep = self.keep(length[None], height, width)
        latents = jnp.where(keep[:, None], latents, 0)
        cells = Cells(self.order, self.grid(height, width))
        patches, decoder = self.decoder.extend(latents, cache.decoder, cells)
        return self.unpatch(patches, height, width), Cache(cache.encoder, decoder)

    def _blocks(self, frames: int) -> int:
        if frames < 1 or frames % self.frames_per_block:
            raise ValueError(
                f"{frames} frames are not a whole number of blocks of {self.frames_per_block}; "
                "repeat the last frame (elastictok.inference.Tokenizer does it for you)"
            )
        return frames // self.frames_per_block

    def _whole(self, tokens: int, height: int, width: int) -> int:
        per_block = self.tokens_per_block(height, width)
        if tokens % per_block:
            raise ValueError(
                f"{tokens} tokens are not a whole number of blocks of {per_block} tokens "
                f"({height}x{width} pixels)"
            )
        return tokens // per_block


def with_compute_dtype(model: ElasticTok, dtype: DTypeLike) -> ElasticTok:
    """The same weights with the transformers' matrix products and attention in another type.

    The residual stream, norms, rotary angles, the projections in and out and the quantizer stay in
    float32.

    **Arguments:**

    - `dtype`: `jnp.bfloat16` or `jnp.float32`.
    """
    stacks = model.encoder.transformer, model.decoder.transformer
    return eqx.tree_at(
        lambda m: (m.encoder.transformer, m.decoder.transformer),
        model,
        tuple(stack.with_dtype(dtype) for stack in stacks),
    )


def trainable(model: ElasticTok) -> PyTree[bool]:
    """True for each array that gradient descent trains: all but the quantizer's own state."""
    flags = jax.tree.map(eqx.is_inexact_array, model)
    return eqx.tree_at(lambda m: m.quantizer, flags, model.quantizer.trainable())


def _place(
    frequencies: int | None, dim: int, std: float, key: Key[Array, ""]
) -> PlaceEmbedding | None:
    if frequencies is None:
        return None
    return PlaceEmbedding(dim, frequencies=frequencies, std=std, key=key)


def _placed(
    x: Float[Array, "tokens dim"],
    place: PlaceEmbedding | None,
    positions: Int[Array, "tokens"],
    cells: Cells,
) -> Float[Array, "tokens dim"]:
    return x if place is None else x + place(cells.coordinates(positions))


def _mask(
    block: int,
    segments: Int[Array, "tokens"] | None,
    key_valid: Bool[Array, "tokens"] | None,
) -> AbstractMask:
    mask: AbstractMask = BlockCausal(block=block)
    if segments is not None:
        mask = mask & Segments(segments)
    if key_valid is not None:
        mask = mask & KeyValid(key_valid)
    return mask


def _spread(per_block: Array | None, tokens: int) -> Array | None:
    return None if per_block is None else jnp.repeat(per_block, tokens)


def _positions(positions: Array | None, rows: Array) -> Array:
    return jnp.arange(rows.shape[0]) if positions is None else positions
