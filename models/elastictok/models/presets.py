"""Ready-made models: plain functions that call constructors. Read one, copy it, change a line."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from elastictok.quantizers import FSQ, AbstractQuantizer, GaussianVAE

from ._elastictok import Decoder, ElasticTok, Encoder
from ._order import AbstractOrder, CoarseToFine, Raster
from ._patching import Patching
from ._rope import AbstractRotary, CellRotary, RankRotary

FSQ_64K = (8, 8, 8, 5, 5, 5)
"""Levels of the released discrete model: 64,000 codes."""


def build(
    *,
    size: tuple[int, int],
    context: int,
    frames_per_block: int,
    min_tokens: int,
    patching: Patching,
    order: AbstractOrder,
    quantizer: AbstractQuantizer,
    dim: int,
    hidden: int,
    layers: int,
    heads: int,
    rotary: AbstractRotary,
    std: float = 0.02,
    dtype: DTypeLike = jnp.float32,
    remat: bool = False,
    place_frequencies: int | None = None,
    key: Key[Array, ""],
) -> ElasticTok:
    """An ElasticTok whose encoder and decoder have equal sizes; see `ElasticTok`, `Transformer`."""
    e, d = jax.random.split(key)
    encoder = Encoder(
        patching.patch_dim,
        quantizer.input_dim,
        dim=dim,
        hidden=hidden,
        layers=layers,
        heads=heads,
        rotary=rotary,
        std=std,
        dtype=dtype,
        remat=remat,
        place_frequencies=place_frequencies,
        key=e,
    )
    decoder = Decoder(
        quantizer.latent_dim,
        patching.patch_dim,
        dim=dim,
        hidden=hidden,
        layers=layers,
        heads=heads,
        rotary=rotary,
        std=std,
        dtype=dtype,
        remat=remat,
        place_frequencies=place_frequencies,
        key=d,
    )
    return ElasticTok(
        patching,
        order,
        encoder,
        quantizer,
        decoder,
        frames_per_block=frames_per_block,
        min_tokens=min_tokens,
        size=size,
        context=context,
    )


def demo(*, key: Key[Array, ""], quantizer: AbstractQuantizer | None = None) -> ElasticTok:
    """What `elastictok demo` trains in three minutes on two cores: 64x64 pixels, 64 tokens."""
    return build(
        size=(64, 64),
        context=4,
        frames_per_block=2,
        min_tokens=4,
        patching=Patching(2, 8, 8),
        order=CoarseToFine(),
        quantizer=FSQ(FSQ_64K) if quantizer is None else quantizer,
        dim=128,
        hidden=256,
        layers=2,
        heads=4,
        rotary=CellRotary(30.0, 100.0),
        place_frequencies=8,
        key=key,
    )


def small(*, key: Key[Array, ""], quantizer: AbstractQuantizer | None = None) -> ElasticTok:
    """A model for one machine: 128x128 pixels, 256 tokens for a block of 4 frames."""
    return build(
        size=(128, 128),
        context=4,
        frames_per_block=4,
        min_tokens=8,
        patching=Patching(4, 8, 8),
        order=CoarseToFine(),
        quantizer=FSQ(FSQ_64K) if quantizer is None else quantizer,
        dim=256,
        hidden=512,
        layers=4,
        heads=4,
        rotary=CellRotary(30.0, 100.0),
        place_frequencies=16,
        key=key,
    )


def elastictok_fsq_200m(*, key: Key[Array, ""], dtype: DTypeLike = jnp.float32) -> ElasticTok:
    """The geometry of the released discrete model: 210,165,760 parameters (random here).

    `load_official` with `OFFICIAL_FSQ` brings the weights. Nothing of it depends on a defect of the
    official code; docs/models.md lists what differs.
    """
    return build(
        size=(256, 256),
        context=256,
        frames_per_block=4,
        min_tokens=256,
        patching=Patching(1, 8, 8),
        order=Raster(),
        quantizer=FSQ(FSQ_64K),
        dim=1024,
        hidden=2048,
        layers=10,
        heads=8,
        rotary=RankRotary(5e7),
        dtype=dtype,
        remat=True,
        key=key,
    )


def elastictok_vae_200m(*, key: Key[Array, ""], dtype: DTypeLike = jnp.float32) -> ElasticTok:
    """The geometry of the released continuous model: 210,571,264 parameters (random here).

    `load_official` with `OFFICIAL_VAE` brings the weights. Nothing of it depends on a defect of the
    official code; docs/models.md lists what differs.
    """
    return build(
        size=(256, 256),
        context=256,
        frames_per_block=4,
        min_tokens=128,
        patching=Patching(2, 8, 8),
        order=Raster(),
        quantizer=GaussianVAE(8),
        dim=1024,
        hidden=2048,
        layers=10,
        heads=8,
        rotary=RankRotary(5e6),
        dtype=dtype,
        remat=True,
        key=key,
    )
