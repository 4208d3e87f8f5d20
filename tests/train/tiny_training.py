"""A model of a few hundred weights and data that can say where it is."""

from collections.abc import Iterator

import jax
import numpy as np

from elastictok.data import Batch
from elastictok.models import (
    AbstractDecoder,
    AbstractEncoder,
    CoarseToFine,
    CoordDecoder,
    ElasticTok,
    Encoder,
    Patching,
    PatchSample,
    RankRotary,
    RegisterDecoder,
    RegisterEncoder,
    presets,
)
from elastictok.quantizers import FSQ, LFQ, VQ, AbstractQuantizer, GaussianVAE, Residual
from elastictok.train import adamw

# What most tests train with, so that they can share what was compiled. The decay is large enough to
# be seen where there should be none.
OPTIMIZER = adamw(1e-2, weight_decay=1.0)
QUANTIZER_WEIGHT = 0.5
SIZE = 16  # pixels: four patches, so four tokens to a block


def quantizers() -> dict[str, AbstractQuantizer]:
    """One of each kind."""
    return {
        "FSQ": FSQ((5, 5, 5)),
        "GaussianVAE": GaussianVAE(3),
        "VQ": VQ(17, 3, key=jax.random.key(1)),
        "LFQ": LFQ(4),
        "Residual": Residual(VQ(8, 3, key=jax.random.key(2)), 2),
    }


def tiny_model(
    quantizer: AbstractQuantizer | None = None,
    *,
    seed: int = 0,
    heads: int = 2,
    dim: int = 16,
    context: int = 2,
) -> ElasticTok:
    """One layer on each side."""
    return presets.build(
        size=(SIZE, SIZE),
        context=context,
        frames_per_block=1,
        min_tokens=1,
        patching=Patching(1, 8, 8),
        order=CoarseToFine(),
        quantizer=FSQ((5, 5, 5)) if quantizer is None else quantizer,
        dim=dim,
        hidden=dim,
        layers=1,
        heads=heads,
        rotary=RankRotary(1e4),
        std=0.1,
        place_frequencies=2,
        key=jax.random.key(seed),
    )


def tiny_registers(context: int = 4) -> ElasticTok:
    """Learned 1-D tokens: 3 for the four patches of a block."""
    options = SIDES | {"registers": 3, "layers": 1}
    return _tiny(
        RegisterEncoder(PATCH, 6, **options, key=jax.random.key(0)),
        RegisterDecoder(3, PATCH, **options, key=jax.random.key(1)),
        context,
    )


def tiny_coordinates(context: int = 4) -> ElasticTok:
    """A training step asks for 2 patches of each of 2 blocks."""
    encoder = Encoder(PATCH, 6, layers=1, **SIDES, key=jax.random.key(0))
    decoder = CoordDecoder(
        3,
        PATCH,
        layers=1,
        cross_layers=1,
        sample=PatchSample(2, 2),
        **SIDES,
        key=jax.random.key(1),
    )
    return _tiny(encoder, decoder, context)


PATCH = 8 * 8 * 3
SIDES = {
    "dim": 32,
    "hidden": 32,
    "heads": 8,
    "rotary": RankRotary(1e4),
    "std": 0.1,
    "place_frequencies": 2,
}


def _tiny(encoder: AbstractEncoder, decoder: AbstractDecoder, context: int) -> ElasticTok:
    return ElasticTok(
        Patching(1, 8, 8),
        CoarseToFine(),
        encoder,
        GaussianVAE(3),
        decoder,
        frames_per_block=1,
        min_tokens=1,
        size=(SIZE, SIZE),
        context=context,
    )


def make_batch(seed: int, *, examples: int = 8, blocks: int = 2) -> Batch:
    """Two-colour patches; the last block of every third example is padding."""
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, 256, (examples, blocks, 1, 2, 2, 3), dtype=np.uint8)
    pixels = cells.repeat(SIZE // 2, axis=3).repeat(SIZE // 2, axis=4)
    valid = np.ones((examples, blocks), bool)
    valid[::3, -1] = blocks == 1
    pixels[~valid] = 0
    segments = np.where(valid, np.arange(1, blocks + 1, dtype=np.int32), 0)
    return Batch(pixels, segments, valid)


class Counted:
    """Endless batches made from their number; the number is the iterator's state."""

    def __init__(self, examples: int = 8, blocks: int = 2):
        self.examples = examples
        self.blocks = blocks
        self.closed = 0

    def __iter__(self) -> "CountedIterator":
        return CountedIterator(self)


class CountedIterator:
    def __init__(self, parent: Counted):
        self._parent = parent
        self._state = {"next": 0}

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self._state["next"] += 1
        number = self._state["next"]
        return make_batch(number, examples=self._parent.examples, blocks=self._parent.blocks)

    def get_state(self) -> dict:
        return self._state  # not a copy: whoever keeps it must copy

    def set_state(self, state: dict) -> None:
        self._state = dict(state)

    def close(self) -> None:
        self._parent.closed += 1
