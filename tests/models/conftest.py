"""A model small enough to compile in a second."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastictok.models import CoarseToFine, ElasticTok, Patching, RankRotary, presets
from elastictok.quantizers import FSQ, AbstractQuantizer


def build_tiny(
    quantizer: AbstractQuantizer | None = None, *, order=None, patching=None, **changes
) -> ElasticTok:
    """16x16 pixels, 2 frames and 16 tokens per block, width 16, weights large enough to matter."""
    options = dict(
        size=(16, 16),
        context=3,
        frames_per_block=2,
        min_tokens=2,
        patching=Patching(2, 4, 4) if patching is None else patching,
        order=CoarseToFine() if order is None else order,
        quantizer=FSQ((5, 5, 5)) if quantizer is None else quantizer,
        dim=16,
        hidden=24,
        layers=2,
        heads=2,
        rotary=RankRotary(100.0),
        std=0.3,
        place_frequencies=4,
        key=jax.random.key(0),
    )
    return presets.build(**(options | changes))


@pytest.fixture(scope="session")
def tiny() -> ElasticTok:
    return build_tiny()


@pytest.fixture(scope="session")
def make_tiny():
    return build_tiny


@pytest.fixture(scope="session")
def noise():
    def draw(seed: int, *shape: int) -> jax.Array:
        return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, shape), jnp.float32)

    return draw
