"""Finite scalar quantization: every dimension is rounded to its own few levels."""

import math
import operator
from collections.abc import Sequence
from typing import final

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32

from ._base import AbstractDiscreteQuantizer

_MAX_LEVEL = 1001
_MAX_CODES = 2**31
# Points are multiples of this: finer than anyone needs, and of size below 2 they and their sums are
# exact in float32.
_QUANTUM = 2.0**-22
# Points closer than a few quanta could not be told apart.
_MAX_DENOMINATOR = 2**20


def _check_levels(levels: tuple[int, ...]) -> None:
    if not levels:
        raise ValueError("levels is empty: give one level count per latent dimension.")
    for level in levels:
        if not 2 <= level <= _MAX_LEVEL:
            raise ValueError(
                f"A level of {level} is outside 2 .. {_MAX_LEVEL} (levels {levels}): above "
                f"{_MAX_LEVEL} the bounded range no longer reaches the outermost levels."
            )
    if math.prod(levels) >= _MAX_CODES:
        raise ValueError(
            f"levels {levels} make {math.prod(levels)} codes, which int32 cannot hold (limit "
            f"{_MAX_CODES - 1}): use fewer or smaller levels, or Residual for several codes."
        )


def _places(levels: tuple[int, ...]) -> np.ndarray:
    """The weight of each digit in a code: mixed radix, the first level varies fastest."""
    return np.array([math.prod(levels[:i]) for i in range(len(levels))], np.int32)


def _codes_of_digits(
    digits: Float32[Array, "tokens dim"], levels: tuple[int, ...]
) -> Int32[Array, " tokens"]:
    """From rounded digits, still floats, to codes."""
    # Clipped before the cast, which is undefined for large values; fmax takes 0 for a NaN. So no
    # input whatever gives an index out of range.
    upper = np.array(levels, np.float32) - 1
    whole = jnp.fmin(jnp.fmax(digits, 0.0), upper).astype(jnp.int32)
    return jnp.sum(whole * _places(levels), axis=-1, dtype=jnp.int32)


def _digits_of_codes(
    codes: Int[Array, " tokens"], levels: tuple[int, ...]
) -> Int32[Array, "tokens dim"]:
    return codes.astype(jnp.int32)[:, None] // _places(levels) % np.array(levels, np.int32)


def _ratios(
    numerators: Int32[Array, "tokens dim"], denominators: np.ndarray
) -> Float32[Array, "tokens dim"]:
    """The quotients, to the nearest multiple of 2**-22."""
    # A plain quotient is not the same bits in every program: XLA makes it a multiplication, and
    # may fuse that into the addition that follows in Residual. Powers of two are exact either way.
    per_quantum = (1 / (_QUANTUM * denominators)).astype(np.float32)
    return jnp.round(numerators.astype(jnp.float32) * per_quantum) * np.float32(_QUANTUM)


@final
class FSQ(AbstractDiscreteQuantizer):
    """Finite scalar quantization (Mentzer et al., arXiv 2309.15505) with the code book of
    ElasticTok (arXiv 2410.08368).

    A latent `z` of a dimension with `L` levels is bounded to
    `tanh(z + shift) * half - offset`, with `half = (L - 1) * (1 - 1e-3) / 2`, `offset = 0.5` for
    even `L` and 0 for odd, `shift = tan(offset / half)`; rounded with a straight-through gradient;
    and divided by `L // 2`. Other libraries have `atanh` and `1 + 1e-3`, which is another code
    book. Loss and statistics are empty. Where `L // 2` is not a power of two the quotient is
    rounded to a multiple of `2**-22`, so that every compiled program gives the same bits.

    The code is the mixed radix number of the levels' indices, the first level fastest. All integer
    arithmetic comes after rounding, in int32.
    """

    levels: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, levels: Sequence[int]):
        """**Arguments:**

        - `levels`: the number of levels of each dimension, 2 to 1001 each; their product is the
            code book's size and must be below 2**31. ElasticTok: `(8, 8, 8, 5, 5, 5)`.
        """
        self.levels = tuple(operator.index(level) for level in levels)

    def __check_init__(self):
        _check_levels(self.levels)

    @property
    def latent_dim(self) -> int:
        return len(self.levels)

    @property
    def codebook_size(self) -> int:
        return math.prod(self.levels)

    @property
    def _steps(self) -> np.ndarray:
        """`L // 2`: how many steps of the grid make 1."""
        return np.array(self.levels, np.float32) // 2

    def bound(self, latents: Float32[Array, "tokens dim"]) -> Float32[Array, "tokens dim"]:
        """Squash latents to the range of the levels, in units of the quantized latents (so
        divided by `L // 2`)."""
        levels = np.array(self.levels, np.float64)
        half = (levels - 1) * (1 - 1e-3) / 2
        offset = np.where(levels % 2 == 0, 0.5, 0.0)
        shift = np.tan(offset / half)
        half, offset, shift = (x.astype(np.float32) for x in (half, offset, shift))
        return (jnp.tanh(latents + shift) * half - offset) / self._steps

    def to_codes(self, latents: Float[Array, "tokens dim"]) -> Int32[Array, " tokens"]:
        """The codes of quantized (or bounded) latents. Never bounds: bounding twice would move
        them to other levels. Latents that went through bfloat16 come back right for levels up to
        512.
        """
        digits = jnp.round(latents.astype(jnp.float32) * self._steps) + self._steps
        return _codes_of_digits(digits, self.levels)

    def from_codes(self, codes: Int[Array, " tokens"]) -> Float32[Array, "tokens dim"]:
        """The quantized latents of these codes."""
        centre = np.array(self.levels, np.int32) // 2
        return _ratios(_digits_of_codes(codes, self.levels) - centre, self._steps)

    def refined(self) -> AbstractDiscreteQuantizer:
        """A grid of as many levels within one step of this one."""
        return UniformGrid(self.levels, [2 * (level // 2) * level for level in self.levels])

    @property
    def nests(self) -> bool:
        return True


@final
class UniformGrid(AbstractDiscreteQuantizer):
    """Rounding to the nearest of a few evenly spaced points per dimension, centred on zero.

    With `L` levels and denominator `D` the points of a dimension are `(2 i - (L - 1)) / D` for
    `i = 0 .. L - 1`: neighbours are `2 / D` apart. Latents are not bounded; those outside go to
    the outermost points. It is the later stages of a residual [`FSQ`][]. Straight-through
    gradient; loss and statistics are empty; codes as in [`FSQ`][].
    """

    levels: tuple[int, ...] = eqx.field(static=True)
    denominators: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, levels: Sequence[int], denominators: Sequence[int]):
        """**Arguments:**

        - `levels`: the number of levels of each dimension, 2 to 1001 each, product below 2**31.
        - `denominators`: `D` of each dimension, 1 to 2**20.
        """
        self.levels = tuple(operator.index(level) for level in levels)
        self.denominators = tuple(operator.index(denominator) for denominator in denominators)

    def __check_init__(self):
        _check_levels(self.levels)
        if len(self.denominators) != len(self.levels):
            raise ValueError(
                f"{len(self.denominators)} denominators for {len(self.levels)} levels: give one "
                "per level."
            )
        for denominator in self.denominators:
            if not 1 <= denominator <= _MAX_DENOMINATOR:
                raise ValueError(
                    f"A denominator of {denominator} is outside 1 .. {_MAX_DENOMINATOR}, beyond "
                    "which float32 cannot tell a sum of stages apart: use fewer residual stages "
                    "or fewer levels."
                )

    @property
    def latent_dim(self) -> int:
        return len(self.levels)

    @property
    def codebook_size(self) -> int:
        return math.prod(self.levels)

    def to_codes(self, latents: Float[Array, "tokens dim"]) -> Int32[Array, " tokens"]:
        """The codes of the nearest points."""
        numerators = latents.astype(jnp.float32) * np.array(self.denominators, np.float32)
        digits = jnp.round((numerators + (np.array(self.levels, np.float32) - 1)) / 2)
        return _codes_of_digits(digits, self.levels)

    def from_codes(self, codes: Int[Array, " tokens"]) -> Float32[Array, "tokens dim"]:
        """The points of these codes."""
        top = np.array(self.levels, np.int32) - 1
        numerators = 2 * _digits_of_codes(codes, self.levels) - top
        return _ratios(numerators, np.array(self.denominators, np.float64))

    def refined(self) -> AbstractDiscreteQuantizer:
        """A grid of as many levels within one step of this one."""
        finer = [d * level for d, level in zip(self.denominators, self.levels, strict=True)]
        return UniformGrid(self.levels, finer)

    @property
    def nests(self) -> bool:
        return True
