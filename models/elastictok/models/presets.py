"""Ready-made models: plain functions that call constructors. Read one, copy it, change a line.

`PRESETS` lists them all with how they are trained: those of one kind of tokenizer differ in nothing
else.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from elastictok.quantizers import FSQ, AbstractQuantizer, GaussianVAE

from ._coordinates import CoordDecoder
from ._decoder import Decoder
from ._elastictok import ElasticTok
from ._encoder import Encoder
from ._order import AbstractOrder, CoarseToFine, Raster
from ._patching import Patching
from ._preset import Preset
from ._registers import RegisterDecoder, RegisterEncoder
from ._rope import AbstractRotary, CellRotary, RankRotary
from ._sample import PatchSample
from ._taildrop import (
    ConditionDropout,
    FixedDrop,
    InformationDrop,
    LogUniformDrop,
    PowerOfTwoDrop,
    UniformDrop,
)

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


def elastictok_fsq_200m(
    *,
    key: Key[Array, ""],
    quantizer: AbstractQuantizer | None = None,
    dtype: DTypeLike = jnp.float32,
) -> ElasticTok:
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
        quantizer=FSQ(FSQ_64K) if quantizer is None else quantizer,
        dim=1024,
        hidden=2048,
        layers=10,
        heads=8,
        rotary=RankRotary(5e7),
        dtype=dtype,
        remat=True,
        key=key,
    )


def elastictok_vae_200m(
    *,
    key: Key[Array, ""],
    quantizer: AbstractQuantizer | None = None,
    dtype: DTypeLike = jnp.float32,
) -> ElasticTok:
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
        quantizer=GaussianVAE(8) if quantizer is None else quantizer,
        dim=1024,
        hidden=2048,
        layers=10,
        heads=8,
        rotary=RankRotary(5e6),
        dtype=dtype,
        remat=True,
        key=key,
    )


# The zoo: tokenizers of one size, 64x64 pixels and two layers of width 128 on each side, that two
# cores train in minutes. They differ in the one thing that their names say.
_sizes: dict[str, Any] = dict(
    dim=128, hidden=256, heads=4, rotary=CellRotary(30.0, 100.0), place_frequencies=8
)
_registers: dict[str, Any] = _sizes | dict(layers=2, registers=128)
_zoo = functools.partial(
    build, size=(64, 64), order=CoarseToFine(), layers=2, min_tokens=4, **_sizes
)


def elastic_image(*, key: Key[Array, ""], quantizer: AbstractQuantizer | None = None) -> ElasticTok:
    """Pictures of 64x64 pixels in 4 to 64 tokens (arXiv 2410.08368, on one frame)."""
    return _zoo(
        context=1,
        frames_per_block=1,
        patching=Patching(1, 8, 8),
        quantizer=FSQ(FSQ_64K) if quantizer is None else quantizer,
        key=key,
    )


def elastic_image_vae(
    *, key: Key[Array, ""], quantizer: AbstractQuantizer | None = None
) -> ElasticTok:
    """`elastic_image` with eight numbers for a token instead of a code."""
    return elastic_image(key=key, quantizer=GaussianVAE(8) if quantizer is None else quantizer)


def elastic_video(*, key: Key[Array, ""], quantizer: AbstractQuantizer | None = None) -> ElasticTok:
    """Clips of 64x64 pixels, blocks of 4 frames in 4 to 128 tokens (arXiv 2410.08368)."""
    return _zoo(
        context=4,
        frames_per_block=4,
        patching=Patching(2, 8, 8),
        quantizer=FSQ(FSQ_64K) if quantizer is None else quantizer,
        key=key,
    )


def elastic_video_vae(
    *, key: Key[Array, ""], quantizer: AbstractQuantizer | None = None
) -> ElasticTok:
    """`elastic_video` with eight numbers for a token instead of a code."""
    return elastic_video(key=key, quantizer=GaussianVAE(8) if quantizer is None else quantizer)


def register_tokens(
    *, key: Key[Array, ""], quantizer: AbstractQuantizer | None = None
) -> ElasticTok:
    """`elastic_video` with learned 1-D query tokens, 128 for a block whatever the frames' size."""
    patching = Patching(2, 8, 8)
    quantizer = FSQ(FSQ_64K) if quantizer is None else quantizer
    e, d = jax.random.split(key)
    encoder = RegisterEncoder(patching.patch_dim, quantizer.input_dim, **_registers, key=e)
    decoder = RegisterDecoder(quantizer.latent_dim, patching.patch_dim, **_registers, key=d)
    return ElasticTok(
        patching,
        Raster(),
        encoder,
        quantizer,
        decoder,
        frames_per_block=4,
        min_tokens=4,
        size=(64, 64),
        context=4,
    )


def coord_decoder(*, key: Key[Array, ""], quantizer: AbstractQuantizer | None = None) -> ElasticTok:
    """`elastic_video` whose decoder makes single patches from their coordinates: a training step
    asks for 64 patches of each of two blocks, however long the clips are."""
    patching = Patching(2, 8, 8)
    quantizer = FSQ(FSQ_64K) if quantizer is None else quantizer
    e, d = jax.random.split(key)
    encoder = Encoder(patching.patch_dim, quantizer.input_dim, layers=2, **_sizes, key=e)
    decoder = CoordDecoder(
        quantizer.latent_dim,
        patching.patch_dim,
        layers=1,
        cross_layers=2,
        reach=2,
        sample=PatchSample(blocks=2, patches=64),
        **_sizes,
        key=d,
    )
    return ElasticTok(
        patching,
        CoarseToFine(),
        encoder,
        quantizer,
        decoder,
        frames_per_block=4,
        min_tokens=4,
        size=(64, 64),
        context=4,
    )


_ELASTICTOK = "ElasticTok, arXiv 2410.08368"
_REGISTERS = "FlexTok, arXiv 2502.13967; One-D-Piece, 2501.10064; AdapTok, 2505.17011"
_COORDINATES = "CoordTok, arXiv 2411.14762"

PRESETS: dict[str, Preset] = {
    "demo": Preset(demo, about="What `elastictok demo` trains.", source=_ELASTICTOK),
    "small": Preset(small, about="A first model of your own, for one machine.", source=_ELASTICTOK),
    "elastictok_fsq_200m": Preset(
        elastictok_fsq_200m,
        about="The geometry of the released discrete model.",
        source=_ELASTICTOK,
    ),
    "elastictok_vae_200m": Preset(
        elastictok_vae_200m,
        about="The geometry of the released continuous model.",
        source=_ELASTICTOK,
    ),
    "elastic_image": Preset(
        elastic_image, about="Pictures in as many codes as they need.", source=_ELASTICTOK
    ),
    "elastic_image_vae": Preset(
        elastic_image_vae, about="Pictures in as many vectors as they need.", source=_ELASTICTOK
    ),
    "elastic_image_fixed": Preset(
        elastic_image,
        FixedDrop(32),
        about="elastic_image, always trained at half its tokens.",
        source=f"baseline of {_ELASTICTOK}, section 4",
    ),
    "elastic_image_vae_fixed": Preset(
        elastic_image_vae,
        FixedDrop(32),
        about="elastic_image_vae, always trained at half its tokens.",
        source=f"baseline of {_ELASTICTOK}, section 4",
    ),
    "elastic_video": Preset(
        elastic_video, about="Clips in as many codes as they need.", source=_ELASTICTOK
    ),
    "elastic_video_vae": Preset(
        elastic_video_vae, about="Clips in as many vectors as they need.", source=_ELASTICTOK
    ),
    "elastic_video_once": Preset(
        elastic_video,
        ConditionDropout(UniformDrop(), 0.5),
        about="elastic_video that can be encoded once and cut at any length.",
        source=f"{_ELASTICTOK}, section 4.3",
    ),
    "elastic_video_log": Preset(
        elastic_video,
        LogUniformDrop(),
        about="elastic_video, trained on every octave of lengths alike.",
        source=f"after {_ELASTICTOK}",
    ),
    "elastic_video_powers": Preset(
        elastic_video,
        PowerOfTwoDrop(),
        about="elastic_video, trained at powers of two only.",
        source="FlexTok, arXiv 2502.13967",
    ),
    "elastic_video_information": Preset(
        elastic_video,
        InformationDrop(),
        about="elastic_video, trained at shorter lengths the easier a block is.",
        source="after InfoTok, arXiv 2512.16975",
    ),
    "elastic_video_fixed": Preset(
        elastic_video,
        FixedDrop(64),
        about="elastic_video, always trained at half its tokens.",
        source=f"baseline of {_ELASTICTOK}, section 4",
    ),
    "elastic_video_vae_fixed": Preset(
        elastic_video_vae,
        FixedDrop(64),
        about="elastic_video_vae, always trained at half its tokens.",
        source=f"baseline of {_ELASTICTOK}, section 4",
    ),
    "register_tokens": Preset(
        register_tokens,
        about="Clips in learned 1-D tokens, as many as they need.",
        source=_REGISTERS,
    ),
    "register_tokens_fixed": Preset(
        register_tokens,
        FixedDrop(64),
        about="register_tokens, always trained at half its tokens.",
        source=f"baseline; {_REGISTERS}",
    ),
    "coord_decoder": Preset(
        coord_decoder,
        about="Clips whose patches are decoded one by one from their coordinates.",
        source=_COORDINATES,
    ),
    "coord_decoder_fixed": Preset(
        coord_decoder,
        FixedDrop(64),
        about="coord_decoder, always trained at half its tokens.",
        source=f"baseline; {_COORDINATES}",
    ),
}
"""All presets by name."""
