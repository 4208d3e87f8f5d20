"""What an evaluation found, as plain data: for each item, and summed up."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
from jaxtyping import UInt8

from elastictok.inference import Tokens

from ._metrics import mse_per_frame, psnr, ssim_gaussian_per_frame, ssim_uniform_per_frame
from ._rates import CodebookUsage, bits_per_pixel, bpp16


@final
@dataclass(frozen=True)
class Quality:
    """How near a reconstruction is, frame by frame; see the metrics of the same names.

    `ssim_gaussian` and `ssim_uniform` are None where the frames are smaller than the window.
    """

    mse: tuple[float, ...]
    ssim_gaussian: tuple[float, ...] | None
    ssim_uniform: tuple[float, ...] | None


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def measure(
    truth: UInt8[np.ndarray, "frames height width 3"],
    reconstruction: UInt8[np.ndarray, "frames height width 3"],
) -> Quality:
    """All metrics of a reconstruction."""
    smallest = min(truth.shape[1:3])
    return Quality(
        mse=_floats(mse_per_frame(truth, reconstruction)),
        ssim_gaussian=_floats(ssim_gaussian_per_frame(truth, reconstruction))
        if smallest >= 11
        else None,
        ssim_uniform=_floats(ssim_uniform_per_frame(truth, reconstruction))
        if smallest >= 7
        else None,
    )


@final
@dataclass(frozen=True)
class Spent:
    """What a tokenizer spent on an item.

    **Fields:**

    - `lengths`: tokens kept of each block; `tokens_per_block`: the most it can keep.
    - `frames_per_block`: the last block may have fewer frames of the item.
    - `bits_per_token`: None for latents that are not quantized.
    - `losses`, `met`: by the setting's criterion, block by block, of the frames that come back.
    - `measured`: whether the strategy had measured that loss when it chose the length.
    - `encoder_evaluations`, `decoder_evaluations`: passes through each network while encoding.
    - `encode_seconds`, `decode_seconds`: wall-clock time, compilation left out.
    """

    lengths: tuple[int, ...]
    tokens_per_block: int
    frames_per_block: int
    bits_per_token: float | None
    losses: tuple[float, ...]
    met: tuple[bool, ...]
    measured: tuple[bool, ...]
    encoder_evaluations: int
    decoder_evaluations: int
    encode_seconds: float
    decode_seconds: float

    @property
    def tokens(self) -> int:
        """Tokens kept in all."""
        return sum(self.lengths)


@final
@dataclass(frozen=True)
class Measurement:
    """One item at one setting, or through one baseline (then `spent` is None).

    `frames`, `height` and `width` are those that are decoded; `bits` counts everything a decoder
    needs besides its weights, None if nothing is quantized.
    """

    item: str
    frames: int
    height: int
    width: int
    bits: float | None
    quality: Quality
    spent: Spent | None

    @property
    def pixels(self) -> int:
        """Pixels of all frames."""
        return self.frames * self.height * self.width

    @property
    def bits_per_pixel(self) -> float | None:
        return bits_per_pixel(self.bits, self.frames, self.height, self.width)

    @property
    def bpp16(self) -> float | None:
        """None for baselines as well: they have no tokens."""
        if self.spent is None:
            return None
        size = self.frames, self.height, self.width
        return bpp16(self.spent.tokens, self.spent.bits_per_token, *size)

    @property
    def mse(self) -> float:
        """Over the whole item."""
        return float(np.mean(self.quality.mse))

    @property
    def block_mse(self) -> tuple[float, ...]:
        """Of each block of a tokenizer; of the whole item for a baseline."""
        size = self.frames if self.spent is None else self.spent.frames_per_block
        frames = self.quality.mse
        return tuple(float(np.mean(frames[i : i + size])) for i in range(0, len(frames), size))


def _mean(values: Sequence[float] | Sequence[int] | np.ndarray) -> float:
    return float(np.mean(values))


def _pool(parts: Sequence[tuple[float, ...] | None]) -> float | None:
    """Mean over the frames of all items; None if an item has no value."""
    known = [part for part in parts if part is not None]
    return _mean([value for part in known for value in part]) if len(known) == len(parts) else None


@final
@dataclass(frozen=True)
class Row:
    """All items at one setting, or through one baseline.

    **Fields:**

    - `name`: of the setting or the baseline.
    - `searched`: whether lengths were searched for, to meet a threshold.
    - `loss`: the name of what `losses` measure; empty for baselines.
    - `threshold`: what a block's loss must not exceed; None if nothing is asked of it.
    - `measurements`: one for each item, in their order.
    - `usage`: of the code book, over the tokens kept of all items; None if there is no code book.

    The properties sum up over all items; each says how.
    """

    name: str
    searched: bool
    loss: str
    threshold: float | None
    measurements: tuple[Measurement, ...]
    usage: CodebookUsage | None

    def __post_init__(self):
        if not self.measurements:
            raise ValueError(f"{self.name!r} has no measurement: evaluate at least one item")

    @property
    def items(self) -> str:
        """What was measured, in words: `120 items, 64x64`, or `9 items of 8 to 40 frames, ...`."""
        sizes = {(m.height, m.width) for m in self.measurements}
        frames = sorted({m.frames for m in self.measurements})
        count = len(self.measurements)
        size = "several sizes" if len(sizes) > 1 else "{}x{}".format(*sizes.pop())
        items = f"{count} item{'' if count == 1 else 's'}"
        if frames == [1]:
            return f"{items}, {size}"
        length = str(frames[0]) if len(frames) == 1 else f"{frames[0]} to {frames[-1]}"
        return f"{items} of {length} frames, {size}"

    @cached_property
    def spent(self) -> tuple[Spent, ...]:
        """Of each item; empty for a baseline."""
        return tuple(m.spent for m in self.measurements if m.spent is not None)

    @property
    def rival(self) -> bool:
        """Whether it is a baseline."""
        return not self.spent

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every block of every item."""
        return tuple(length for spent in self.spent for length in spent.lengths)

    @property
    def tokens(self) -> float | None:
        """Mean tokens of a block, over all blocks."""
        return _mean(self.lengths) if self.lengths else None

    def tokens_quantile(self, q: float | int) -> float | None:
        """The `q`-quantile of the tokens of a block, over all blocks."""
        return float(np.quantile(self.lengths, q)) if self.lengths else None

    @property
    def share_of_tokens(self) -> float | None:
        """Tokens kept, of those that there could be."""
        most = sum(len(spent.lengths) * spent.tokens_per_block for spent in self.spent)
        return sum(self.lengths) / most if most else None

    def _per_pixel(self, value: Callable[[Measurement], float | None]) -> float | None:
        """Mean over the pixels of all items, of a value per pixel."""
        pairs = [(value(m), m.pixels) for m in self.measurements]
        known = [(v, n) for v, n in pairs if v is not None]
        if len(known) < len(pairs):
            return None
        return sum(v * n for v, n in known) / sum(n for _, n in known)

    @property
    def bits_per_pixel(self) -> float | None:
        """All bits over all pixels."""
        return self._per_pixel(lambda m: m.bits_per_pixel)

    @property
    def bpp16(self) -> float | None:
        """16 times the bits of all tokens over all pixels."""
        return self._per_pixel(lambda m: m.bpp16)

    @cached_property
    def mse(self) -> float:
        """Over all pixels of all items."""
        pixels = [m.pixels for m in self.measurements]
        return float(np.average([m.mse for m in self.measurements], weights=pixels))

    @property
    def psnr_per_frame(self) -> float:
        """Mean of the PSNR of all frames of all items."""
        return _mean([psnr(error) for m in self.measurements for error in m.quality.mse])

    @property
    def psnr_per_clip(self) -> float:
        """Mean of the PSNR of each item."""
        return _mean([psnr(m.mse) for m in self.measurements])

    @property
    def psnr_dataset(self) -> float:
        """PSNR of `mse`."""
        return psnr(self.mse)

    @property
    def ssim_gaussian(self) -> float | None:
        """Mean over all frames of all items; None if some are smaller than the window."""
        return _pool([m.quality.ssim_gaussian for m in self.measurements])

    @property
    def ssim_uniform(self) -> float | None:
        """Mean over all frames of all items; None if some are smaller than the window."""
        return _pool([m.quality.ssim_uniform for m in self.measurements])

    @property
    def blocks_met(self) -> float | None:
        """Share of all blocks that meet the threshold; None if there is none."""
        if self.threshold is None:
            return None
        return _mean([met for spent in self.spent for met in spent.met])

    @property
    def items_met(self) -> float | None:
        """Share of the items all of whose blocks meet the threshold; None if there is none."""
        if self.threshold is None:
            return None
        return _mean([all(spent.met) for spent in self.spent])

    @property
    def blocks_measured(self) -> float | None:
        """Share of all blocks whose loss the strategy had measured when it chose their length."""
        if not self.spent:
            return None
        return _mean([measured for spent in self.spent for measured in spent.measured])

    @property
    def encoder_evaluations(self) -> float | None:
        """Mean encoder passes for a block, while encoding."""
        return self._per_block(lambda spent: spent.encoder_evaluations)

    @property
    def decoder_evaluations(self) -> float | None:
        """Mean decoder passes for a block, while encoding."""
        return self._per_block(lambda spent: spent.decoder_evaluations)

    def _per_block(self, value: Callable[[Spent], int]) -> float | None:
        return sum(map(value, self.spent)) / len(self.lengths) if self.lengths else None

    @property
    def encode_seconds(self) -> float | None:
        """Mean for an item."""
        return _mean([s.encode_seconds for s in self.spent]) if self.spent else None

    @property
    def decode_seconds(self) -> float | None:
        """Mean for an item."""
        return _mean([s.decode_seconds for s in self.spent]) if self.spent else None


@final
@dataclass(frozen=True, eq=False)
class Reconstruction:
    """An item as one setting or baseline gives it back; `tokens` is None for a baseline."""

    row: str
    frames: UInt8[np.ndarray, "frames height width 3"]
    tokens: Tokens | None


@final
@dataclass(frozen=True, eq=False)
class Sample:
    """An item whose pixels were kept, to be shown or saved.

    **Fields:**

    - `index`: of the item among those that were evaluated.
    - `item`: its name; `fps` and `cuts` as they were given.
    - `truth`: the frames as the tokenizer sees them, which is what reconstructions are compared to.
    - `reconstructions`: one for each row of the evaluation, in their order.
    """

    index: int
    item: str
    fps: float | int | None
    cuts: tuple[int, ...]
    truth: UInt8[np.ndarray, "frames height width 3"]
    reconstructions: tuple[Reconstruction, ...]


@final
@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` found.

    **Fields:**

    - `name`: of the set of items.
    - `device`: what the seconds were measured on.
    - `fingerprint`: of the model.
    - `rows`: the settings, then the baselines.
    - `samples`: items whose pixels were kept; not in the JSON.
    """

    name: str
    device: str
    fingerprint: str
    rows: tuple[Row, ...]
    samples: tuple[Sample, ...]

    def row(self, name: str) -> Row:
        """The row of that name.

        **Raises:** `KeyError` naming the rows that there are.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row {name!r}; there are {[row.name for row in self.rows]}")

    @property
    def baselines(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.rival)

    @property
    def fixed(self) -> tuple[Row, ...]:
        """Rows whose lengths were fixed: the rate-distortion curve, by rising tokens."""
        rows = [row for row in self.rows if not row.rival and not row.searched]
        return tuple(sorted(rows, key=lambda row: sum(row.lengths)))

    @property
    def searched(self) -> tuple[Row, ...]:
        """Rows whose lengths were searched for to meet a threshold."""
        return tuple(row for row in self.rows if row.searched)


@final
@dataclass(frozen=True)
class Satisfaction:
    """Share of blocks that meet a threshold, against the mean tokens of a block, both rising.

    Points of equal index belong together.
    """

    tokens: tuple[float, ...]
    share: tuple[float, ...]


def satisfaction_of_search(row: Row) -> Satisfaction:
    """How many blocks a search satisfies within a limit on the tokens of a block.

    For a limit `L`, a block that met the threshold with `l <= L` tokens counts as satisfied and
    costs `l`; any other costs `L` and is not. One search gives the whole curve, which is how arXiv
    2410.08368 presents its results. Exact where blocks stand alone; in a clip, later blocks saw
    earlier ones at the lengths of the search.

    **Raises:** `ValueError` for a row that was not searched.
    """
    if not row.searched:
        raise ValueError(f"{row.name!r} has fixed lengths: see satisfaction_of_fixed")
    lengths = np.array(row.lengths)
    met = np.array([met for spent in row.spent for met in spent.met])
    limits = np.unique(lengths)
    return Satisfaction(
        tokens=tuple(_mean(np.minimum(lengths, limit)) for limit in limits),
        share=tuple(_mean(met & (lengths <= limit)) for limit in limits),
    )


def satisfaction_of_fixed(rows: Sequence[Row], threshold: float | int) -> Satisfaction:
    """How many blocks have an MSE of at most `threshold` when all are given the same length.

    **Arguments:**

    - `rows`: with fixed lengths, by rising tokens, as `Evaluation.fixed` gives them.
    - `threshold`: on the MSE of a block, pixels in [-1, 1].
    """
    means = [row.tokens for row in rows]
    return Satisfaction(
        tokens=tuple(tokens for tokens in means if tokens is not None),
        share=tuple(
            _mean([error <= threshold for m in row.measurements for error in m.block_mse])
            for row in rows
        ),
    )
