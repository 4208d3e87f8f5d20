"""The tokenizer: patches, encoder, quantizer, decoder, patches; any prefix of tokens is kept."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from elastictok.quantizers import AbstractQuantizer, QuantizerOutput

from ._cells import Cells
from ._decoder import AbstractDecoder
from ._encoder import AbstractEncoder
from ._execution import LOCAL, AbstractExecution
from ._order import AbstractOrder
from ._patching import Patching
from ._transformer import CrossTransformer, Transformer, with_dtype


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


class Reconstruction(eqx.Module):
    """What a training step compares. Where patches were drawn, those of a block are one picture of
    a patch's height: fit for losses of single pixels, not for those of whole frames.

    - `prediction`, `target`: pixels, in (-1, 1) and [-1, 1].
    - `valid`: false for blocks of padding.
    - `loss`, `statistics`: as in `ElasticTokOutput`.
    """

    prediction: Float[Array, "blocks frames height width 3"]
    target: Float[Array, "blocks frames height width 3"]
    valid: Bool[Array, "blocks"]
    loss: Float[Array, ""]
    statistics: PyTree


class Cache(eqx.Module):
    """State of a stream: what the encoder and what the decoder remember of it."""

    encoder: PyTree
    decoder: PyTree


class ElasticTok(eqx.Module):
    """ElasticTok (arXiv 2410.08368) from ready-made parts. One example; batch by `jax.vmap`.

    A block with length `l` keeps its first `l` tokens; the encoder is told which ones, the latents
    of the others are zero. What the tokens of a block are is up to the encoder: with `Encoder`, its
    patches in the order's ranks.
    """

    patching: Patching
    order: AbstractOrder
    encoder: AbstractEncoder
    quantizer: AbstractQuantizer
    decoder: AbstractDecoder
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
            ("encoder gives", self.quantizer.input_dim, self.encoder.latent_dim),
            ("decoder takes", self.quantizer.latent_dim, self.decoder.latent_dim),
            ("encoder takes", self.patching.patch_dim, self.encoder.patch_dim),
            ("decoder gives", self.patching.patch_dim, self.decoder.patch_dim),
        ):
            if wanted != given:
                raise ValueError(f"the {name} {given} values per token where {wanted} are needed")
        decoded = self.decoder.tokens(self.grid(*self.size))
        if decoded != self.max_tokens:
            raise ValueError(
                f"the encoder makes {self.max_tokens} tokens of a block of {self.size[0]}x"
                f"{self.size[1]} pixels and the decoder takes {decoded}"
            )

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
        return self.encoder.tokens(self.grid(height, width))

    def _cells(self, height: int, width: int) -> Cells:
        return Cells(self.order, self.grid(height, width))

    def patch(self, pixels: Float[Array, "frames height width 3"]) -> Float[Array, "cells patch"]:
        """Patches of whole blocks in the order of their ranks."""
        blocks = self._blocks(pixels.shape[0])
        _, height, width, _ = pixels.shape
        grid = self.grid(height, width)
        cells = self.patching.patch(pixels)
        cells = cells.reshape(blocks, -1, cells.shape[-1])[:, self.order.cells(grid)]
        return cells.reshape(-1, cells.shape[-1])

    def unpatch(
        self, patches: Float[Array, "cells patch"], height: int, width: int
    ) -> Float[Array, "frames height width 3"]:
        """The inverse of `patch`."""
        grid = self.grid(height, width)
        blocks, rest = divmod(patches.shape[0], math.prod(grid))
        if rest:
            raise ValueError(
                f"{patches.shape[0]} patches are not a whole number of blocks of "
                f"{math.prod(grid)} ({height}x{width} pixels)"
            )
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
        height, width = pixels.shape[1:3]
        quantized = self._quantized(pixels, lengths, segments, valid, told, key, execution)
        patches = self.decode_tokens(
            quantized.latents,
            grid=self.grid(height, width),
            segments=self._of_cells(segments, height, width),
            key_valid=self._of_cells(valid, height, width),
            execution=execution,
        )
        return ElasticTokOutput(
            self.unpatch(patches, height, width),
            quantized.latents,
            quantized.codes,
            quantized.loss / _count(lengths, valid),
            quantized.statistics,
        )

    def reconstruct(
        self,
        pixels: Float[Array, "frames height width 3"],
        lengths: Int[Array, "blocks"],
        segments: Int[Array, "blocks"] | None = None,
        valid: Bool[Array, "blocks"] | None = None,
        *,
        told: Int[Array, "blocks"] | None = None,
        key: Key[Array, ""],
        execution: AbstractExecution = LOCAL,
    ) -> Reconstruction:
        """What a training step compares: the whole sequence and its reconstruction, or of both the
        patches that the decoder's `sample` draws.

        **Arguments:** as of `__call__`.
        """
        sample = self.decoder.sample
        blocks, (height, width) = lengths.shape[0], pixels.shape[1:3]
        whole = jnp.ones(blocks, bool) if valid is None else valid
        if sample is None:
            out = self(pixels, lengths, segments, valid, told=told, key=key, execution=execution)
            shape = (blocks, self.frames_per_block, height, width, 3)
            return Reconstruction(
                out.pixels.reshape(shape), pixels.reshape(shape), whole, out.loss, out.statistics
            )
        key, drawn = jax.random.split(key)
        quantized = self._quantized(pixels, lengths, segments, valid, told, key, execution)
        cells = self._cells(height, width)
        asked = sample.draw(drawn, whole, cells)
        made = self.decoder.ask(
            quantized.latents,
            asked,
            cells,
            segments=self._of_cells(segments, height, width),
            key_valid=self._of_cells(valid, height, width),
            execution=execution,
        )
        target = asked.of(self.patch(pixels), cells)
        return Reconstruction(
            self._side_by_side(made),
            self._side_by_side(target),
            whole[asked.blocks],
            quantized.loss / _count(lengths, valid),
            quantized.statistics,
        )

    def _side_by_side(
        self, patches: Float[Array, "blocks asked patch"]
    ) -> Float[Array, "blocks frames height width 3"]:
        """Patches as one picture of each block."""
        frames, height, width = self.patching.frames, self.patching.height, self.patching.width
        blocks, count = patches.shape[:2]
        flat = patches.reshape(-1, self.patching.patch_dim)
        return jax.vmap(lambda rows: self.patching.unpatch(rows, frames, height, count * width))(
            flat.reshape(blocks, count, -1)
        )

    def _quantized(
        self,
        pixels: Float[Array, "frames height width 3"],
        lengths: Int[Array, "blocks"],
        segments: Int[Array, "blocks"] | None,
        valid: Bool[Array, "blocks"] | None,
        told: Int[Array, "blocks"] | None,
        key: Key[Array, ""] | None,
        execution: AbstractExecution = LOCAL,
    ) -> QuantizerOutput:
        blocks, height, width = self._blocks(pixels.shape[0]), *pixels.shape[1:3]
        if lengths.shape != (blocks,):
            raise ValueError(
                f"lengths has shape {lengths.shape} for {blocks} blocks of "
                f"{self.frames_per_block} frames; give one length per block"
            )
        return self.encode_tokens(
            self.patch(pixels),
            self.keep(lengths, height, width, valid),
            told=None if told is None else self.keep(told, height, width, valid),
            grid=self.grid(height, width),
            segments=self._of_cells(segments, height, width),
            key_valid=self._of_cells(valid, height, width),
            key=key,
            execution=execution,
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
        return self._quantized(pixels, lengths, segments, valid, None, key).latents

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
        keep = self.keep(lengths, height, width, valid)
        patches = self.decode_tokens(
            jnp.where(keep[:, None], latents, 0),
            grid=self.grid(height, width),
            segments=self._of_cells(segments, height, width),
            key_valid=self._of_cells(valid, height, width),
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
        patches: Float[Array, "cells patch"],
        keep: Bool[Array, "tokens"],
        *,
        told: Bool[Array, "tokens"] | None = None,
        grid: tuple[int, int, int],
        segments: Int[Array, "cells"] | None = None,
        key_valid: Bool[Array, "cells"] | None = None,
        positions: Int[Array, "cells"] | None = None,
        key: Key[Array, ""] | None = None,
        execution: AbstractExecution = LOCAL,
    ) -> QuantizerOutput:
        """The encoder and quantizer on tokens: any keep mask, documents that meet inside a block.

        **Arguments:**

        - `patches`: in the order of their ranks.
        - `keep`: any mask, not only prefixes.
        - `told`: the mask that the encoder is told, if another one.
        - `grid`: cells of a block; the first block starts at the first patch.
        - `segments`: document of each patch.
        - `key_valid`: false for patches that nobody sees.
        - `positions`: of patches, for the rotary embedding; the index in the sequence by default.
        - `execution`: how the layers are carried out.
        """
        latents = self.encoder(
            patches,
            keep if told is None else told,
            Cells(self.order, grid),
            segments=segments,
            key_valid=key_valid,
            positions=positions,
            execution=execution,
        )
        return self.quantizer(latents, keep, key=key)

    def decode_tokens(
        self,
        latents: Float[Array, "tokens latent_dim"],
        *,
        grid: tuple[int, int, int],
        segments: Int[Array, "cells"] | None = None,
        key_valid: Bool[Array, "cells"] | None = None,
        positions: Int[Array, "cells"] | None = None,
        execution: AbstractExecution = LOCAL,
    ) -> Float[Array, "cells patch"]:
        """The decoder on tokens; see `encode_tokens`. Latents must be zero where dropped."""
        return self.decoder(
            latents,
            Cells(self.order, grid),
            segments=segments,
            key_valid=key_valid,
            positions=positions,
            execution=execution,
        )

    def init_cache(self, blocks: int, *, height: int, width: int) -> Cache:
        """The state of a stream that has not started.

        **Arguments:**

        - `blocks`: window: how many blocks, the current one included, a block can see.
        - `height`, `width`: of the stream's frames.
        """
        grid = self.grid(height, width)
        return Cache(self.encoder.init_cache(blocks, grid), self.decoder.init_cache(blocks, grid))

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
        cells = self._cells(height, width)
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
        cells = self._cells(height, width)
        patches, decoder = self.decoder.extend(latents, cache.decoder, cells)
        return self.unpatch(patches, height, width), Cache(cache.encoder, decoder)

    def _blocks(self, frames: int) -> int:
        if frames < 1 or frames % self.frames_per_block:
            raise ValueError(
                f"{frames} frames are not a whole number of blocks of {self.frames_per_block}; "
                "repeat the last frame (elastictok.inference.Tokenizer does it for you)"
            )
        return frames // self.frames_per_block

    def _of_cells(self, per_block: Array | None, height: int, width: int) -> Array | None:
        """A value of each block for each of its patches."""
        if per_block is None:
            return None
        return jnp.repeat(per_block, math.prod(self.grid(height, width)))


def with_compute_dtype(model: ElasticTok, dtype: DTypeLike) -> ElasticTok:
    """The same weights with the transformers' matrix products and attention in another type.

    The residual stream, norms, rotary angles, the projections in and out and the quantizer stay in
    float32.

    **Arguments:**

    - `dtype`: `jnp.bfloat16` or `jnp.float32`.
    """
    kinds = (Transformer, CrossTransformer)
    return jax.tree.map(
        lambda node: with_dtype(node, dtype) if isinstance(node, kinds) else node,
        model,
        is_leaf=lambda node: isinstance(node, kinds),
    )


def trainable(model: ElasticTok) -> PyTree[bool]:
    """True for each array that gradient descent trains: all but the quantizer's own state."""
    flags = jax.tree.map(eqx.is_inexact_array, model)
    return eqx.tree_at(lambda m: m.quantizer, flags, model.quantizer.trainable())


def _count(
    lengths: Int[Array, "blocks"], valid: Bool[Array, "blocks"] | None
) -> int | Int[Array, ""]:
    """Blocks that are not padding, at least 1."""
    return lengths.shape[0] if valid is None else jnp.maximum(jnp.sum(valid), 1)
