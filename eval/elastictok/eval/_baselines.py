"""Trivial coders to hold a tokenizer against: means of blocks, patch PCA, block DCT.

They take and give `uint8` frames, as a tokenizer does, code every frame (or group of frames) at a
fixed rate, and count their bits honestly. What is fitted (bases and quantisers) is fitted to
training material that the caller gives, and is shared, as a model's weights are: it costs no bits.
"""

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

import numpy as np
from jaxtyping import Float, UInt8

from ._scalar import Quantiser, allocate, fit_quantisers

# More patches than this change no digit that is reported.
_MOST_PATCHES = 100_000
_LARGEST_QUANTISER = 256

# `[frames height width 3]`; in a sequence of them, sizes may differ from clip to clip.
AnyClip: TypeAlias = UInt8[np.ndarray, "_ _ _ 3"]


def _to_uint8(values: np.ndarray) -> np.ndarray:
    """Round, never truncate."""
    return np.rint(np.clip(values, 0.0, 255.0)).astype(np.uint8)


class AbstractBaseline(abc.ABC):
    """A coder that any tokenizer should beat: frames in, what is left of them out."""

    @abc.abstractmethod
    def label(self) -> str:
        """A short name for tables and charts."""

    @abc.abstractmethod
    def bits(self, frames: int, height: int, width: int) -> float | None:
        """Bits of a clip of that size; None if its numbers are kept as floats."""

    @abc.abstractmethod
    def __call__(
        self, frames: UInt8[np.ndarray, "frames height width 3"]
    ) -> UInt8[np.ndarray, "frames height width 3"]:
        """What is reproduced of the frames, rounded to `uint8`."""


@final
@dataclass(frozen=True)
class ImageMean(AbstractBaseline):
    """Every frame becomes its mean colour: 24 bits a frame."""

    def label(self) -> str:
        return "image mean"

    def bits(self, frames: int, height: int, width: int) -> float:
        return 24.0 * frames

    def __call__(
        self, frames: UInt8[np.ndarray, "frames height width 3"]
    ) -> UInt8[np.ndarray, "frames height width 3"]:
        means = _to_uint8(frames.mean(axis=(1, 2), keepdims=True))
        return np.broadcast_to(means, frames.shape).copy()


@final
@dataclass(frozen=True)
class BlockMean(AbstractBaseline):
    """Every `size` x `size` block of every frame becomes its mean colour: 24 bits a block.

    At a right or lower edge that cuts a block, the mean is over the pixels that are there.
    """

    size: int

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"a block has at least one pixel a side, got {self.size}")

    def label(self) -> str:
        return f"{self.size}x{self.size} block mean"

    def bits(self, frames: int, height: int, width: int) -> float:
        return 24.0 * frames * math.ceil(height / self.size) * math.ceil(width / self.size)

    def __call__(
        self, frames: UInt8[np.ndarray, "frames height width 3"]
    ) -> UInt8[np.ndarray, "frames height width 3"]:
        return np.stack([self._frame(frame) for frame in frames])

    def _frame(self, frame: np.ndarray) -> np.ndarray:
        sums, counts = frame.astype(np.float64), []
        for axis in (0, 1):
            starts = np.arange(0, frame.shape[axis], self.size)
            sums = np.add.reduceat(sums, starts, axis=axis)
            counts.append(np.diff(starts, append=frame.shape[axis]))
        rows, columns = counts
        means = _to_uint8(sums / (rows[:, None] * columns)[:, :, None])
        return np.repeat(np.repeat(means, rows, axis=0), columns, axis=1)


@final
@dataclass(frozen=True)
class Patch:
    """A box of pixels that a transform coder codes on its own: frames, height, width."""

    frames: int
    height: int
    width: int

    def __post_init__(self):
        if min(self.frames, self.height, self.width) < 1:
            raise ValueError(f"a patch has at least one pixel a side, got {self}")

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.frames, self.height, self.width

    @property
    def dim(self) -> int:
        """Numbers in a patch, three colours a pixel."""
        return self.frames * self.height * self.width * 3

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Patches along each axis of a clip, the last ones perhaps cut by its edge."""
        return (
            math.ceil(frames / self.frames),
            math.ceil(height / self.height),
            math.ceil(width / self.width),
        )

    def count(self, frames: int, height: int, width: int) -> int:
        """Patches of a clip."""
        return math.prod(self.grid(frames, height, width))

    def cut(
        self, clip: UInt8[np.ndarray, "frames height width 3"]
    ) -> UInt8[np.ndarray, "patches dim"]:
        """The patches as rows; a clip that they do not divide is padded by repeating its edge."""
        grid = self.grid(*clip.shape[:3])
        pad = [(0, n * p - size) for n, p, size in zip(grid, self.shape, clip.shape, strict=False)]
        padded = np.pad(clip, [*pad, (0, 0)], mode="edge")
        (t, h, w), (a, b, c) = grid, self.shape
        boxes = padded.reshape(t, a, h, b, w, c, 3).transpose(0, 2, 4, 1, 3, 5, 6)
        return boxes.reshape(t * h * w, self.dim)

    def join(
        self, patches: UInt8[np.ndarray, "patches dim"], frames: int, height: int, width: int
    ) -> UInt8[np.ndarray, "frames height width 3"]:
        """The inverse of `cut`: the clip of that size, its padding cropped."""
        (t, h, w), (a, b, c) = self.grid(frames, height, width), self.shape
        boxes = patches.reshape(t, h, w, a, b, c, 3).transpose(0, 3, 1, 4, 2, 5, 6)
        return boxes.reshape(t * a, h * b, w * c, 3)[:frames, :height, :width]

    def __str__(self) -> str:
        flat = f"{self.height}x{self.width}"
        return flat if self.frames == 1 else f"{self.frames}x{flat}"


@final
@dataclass(frozen=True, eq=False)
class TransformCoder(AbstractBaseline):
    """Patches are projected on a few orthonormal vectors and the coefficients quantised, or not.

    A fixed-rate code: each patch costs `log2` of the number of combinations of its coefficients'
    levels, whatever its content, as each token of an FSQ costs `log2` of the code book. No entropy
    coding on either side, and no side information.

    **Fields:**

    - `name`: for tables.
    - `patch`: what is coded on its own.
    - `mean`: the patch that is subtracted first, in 0..255.
    - `basis`: orthonormal rows.
    - `quantisers`: one for each row of `basis`; None keeps the coefficients as floats.

    Make one with `fit_patch_pca` or `fit_block_dct`.
    """

    name: str
    patch: Patch
    mean: Float[np.ndarray, "dim"]
    basis: Float[np.ndarray, "components dim"]
    quantisers: tuple[Quantiser, ...] | None

    def label(self) -> str:
        return self.name

    @property
    def bits_per_patch(self) -> float | None:
        if self.quantisers is None:
            return None
        return math.log2(math.prod(len(quantiser.values) for quantiser in self.quantisers))

    def bits(self, frames: int, height: int, width: int) -> float | None:
        each = self.bits_per_patch
        return None if each is None else each * self.patch.count(frames, height, width)

    def __call__(
        self, frames: UInt8[np.ndarray, "frames height width 3"]
    ) -> UInt8[np.ndarray, "frames height width 3"]:
        # A few frames at a time: a clip in float64 would take eight times its size.
        parts = [
            self._some(frames[start : start + self.patch.frames])
            for start in range(0, len(frames), self.patch.frames)
        ]
        return np.concatenate(parts)

    def _some(self, frames: np.ndarray) -> np.ndarray:
        coefficients = (self.patch.cut(frames) - self.mean) @ self.basis.T
        if self.quantisers is not None:
            columns = zip(self.quantisers, coefficients.T, strict=True)
            quantised = [quantiser(column) for quantiser, column in columns]
            coefficients = np.stack(quantised, axis=1) if quantised else coefficients
        patches = _to_uint8(coefficients @ self.basis + self.mean)
        return self.patch.join(patches, *frames.shape[:3])


def _training_patches(clips: Sequence[AnyClip], patch: Patch) -> np.ndarray:
    """Patches of the training material as float64 rows, thinned evenly where there are too many."""
    if not clips:
        raise ValueError("a baseline is fitted to training pictures or clips: give at least one")
    total = sum(patch.count(*clip.shape[:3]) for clip in clips)
    stride = math.ceil(total / _MOST_PATCHES)
    rows = [patch.cut(clip)[index % stride :: stride] for index, clip in enumerate(clips)]
    return np.concatenate(rows).astype(np.float64)


def _quantised(
    name: str,
    patch: Patch,
    mean: np.ndarray,
    basis: np.ndarray,
    patches: np.ndarray,
    bits: float | int,
) -> TransformCoder:
    """The coder with `bits` for each patch shared among the rows of `basis` as the patches ask."""
    if bits < 0:
        raise ValueError(f"bits for each patch are not negative, got {bits}")
    coefficients = (patches - mean) @ basis.T
    # A used coefficient costs a bit at least, so no more than `bits` of them are used, and they are
    # among the ones that vary most (twice as many are tried: distributions differ a little).
    order = np.argsort(-coefficients.var(axis=0), kind="stable")[: 2 * math.ceil(bits) + 1]
    largest = min(_LARGEST_QUANTISER, int(2 ** min(bits, 60) * (1 + 1e-12)))
    fitted = [fit_quantisers(coefficients[:, index], largest) for index in order]
    chosen = zip(order, allocate(fitted, bits), strict=True)
    used = [(index, quantiser) for index, quantiser in chosen if len(quantiser.values) > 1]
    rows = np.array([index for index, _ in used], dtype=np.int64)
    return TransformCoder(name, patch, mean, basis[rows], tuple(q for _, q in used))


def fit_patch_pca(
    clips: Sequence[AnyClip],
    *,
    components: int,
    bits: float | int | None,
    patch: Patch,
) -> TransformCoder:
    """The best linear code of patches: their first principal components.

    **Arguments:**

    - `clips`: training pictures (one frame) or clips; nothing that is evaluated.
    - `components`: how many of the components may be used.
    - `bits`: for each patch, shared among the components so that the training error is least: each
        coefficient has a Lloyd-Max quantiser of its own, of at most 256 levels. For a token of
        64,000 codes, `log2(64000) = 15.97`. None keeps the coefficients as floats.
    - `patch`: what a token stands for.

    **Raises:**

    `ValueError` if there are no clips, or `components` is not in `1..patch.dim`.
    """
    if not 1 <= components <= patch.dim:
        raise ValueError(
            f"a {patch} patch has 1..{patch.dim} principal components, asked for {components}"
        )
    patches = _training_patches(clips, patch)
    mean = patches.mean(axis=0)
    centred = patches - mean
    _, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
    # eigh sorts upwards; its signs are arbitrary.
    basis = vectors[:, ::-1][:, :components].T
    largest = np.take_along_axis(basis, np.abs(basis).argmax(axis=1)[:, None], axis=1)
    basis = np.ascontiguousarray(basis * np.sign(largest))
    if bits is None:
        return TransformCoder(f"{components}-component PCA, floats", patch, mean, basis, None)
    name = f"{components}-component PCA"
    return _quantised(name, patch, mean, basis, patches, bits)


def dct_matrix(size: int) -> Float[np.ndarray, "size size"]:
    """The orthonormal DCT-II (Ahmed, Natarajan and Rao 1974), a row for each frequency."""
    frequency, position = np.arange(size)[:, None], np.arange(size)
    cosines = np.cos(np.pi * (2 * position + 1) * frequency / (2 * size))
    scale = np.where(frequency == 0, math.sqrt(1 / size), math.sqrt(2 / size))
    return scale * cosines


def fit_block_dct(clips: Sequence[AnyClip], *, bits: float | int, patch: Patch) -> TransformCoder:
    """A block DCT at a fixed rate: the transform is fixed, only its quantisers are fitted.

    The DCT runs along frames, height, width and the three colours. Along the colours its rows are
    `(R + G + B)/sqrt 3`, `(R - B)/sqrt 2` and `(R - 2G + B)/sqrt 6`: luma and two chromas, like
    YCbCr but orthonormal, so that an error in a coefficient is the same error in the pixels.

    **Arguments:**

    - `clips`: training pictures (one frame) or clips; nothing that is evaluated.
    - `bits`: for each patch. Instead of a zig-zag and a fixed table, the coefficients that are kept
        and their levels are those with the least training error under this budget (Lloyd-Max
        quantisers of at most 256 levels).
    - `patch`: what a token stands for.

    **Raises:**

    `ValueError` if there are no clips.
    """
    basis = np.ones((1, 1))
    for size in (*patch.shape, 3):
        basis = np.kron(basis, dct_matrix(size))
    patches = _training_patches(clips, patch)
    name = f"{patch} block DCT"
    return _quantised(name, patch, patches.mean(axis=0), basis, patches, bits)


def fit_baselines(
    clips: Sequence[AnyClip],
    *,
    patch: Patch,
    bits: float | int | None,
    components: int = 6,
) -> tuple[AbstractBaseline, ...]:
    """The usual row of rivals: image mean, 16x16 and 8x8 block means, patch PCA and block DCT.

    Fit them for pictures and for clips separately: a picture costs a tokenizer one block, so its
    rival's patch is one frame deep; a clip's is as deep as the tokenizer's.

    **Arguments:**

    - `clips`: training pictures or clips.
    - `patch`: what a token stands for.
    - `bits`: of a token. None (latents that are not quantized): the PCA keeps `components` floats,
        and there is no DCT.
    - `components`: of the PCA.
    """
    means = (ImageMean(), BlockMean(16), BlockMean(8))
    pca = fit_patch_pca(clips, components=components, bits=bits, patch=patch)
    if bits is None:
        return (*means, pca)
    return (*means, pca, fit_block_dct(clips, bits=bits, patch=patch))
