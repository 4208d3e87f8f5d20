"""Predicting the losses of a block from its pixels, before anything is encoded."""

import abc
import itertools
import math
import operator
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64, Int64, Key, UInt8

from elastictok.attention import BlockCausal, KeyValid
from elastictok.models import (
    CellRotary,
    Cells,
    ElasticTok,
    Linear,
    Patching,
    PlaceEmbedding,
    Raster,
    RMSNorm,
    Transformer,
)

from ._codec import ElasticCodec
from ._criteria import AbstractCriterion, Criterion
from ._elastictok_codec import as_codec
from ._scorer_file import ScorerFileError, facts_of, read_scorer, write_scorer
from ._strategies import Block

SCORE_SHARES = (
    0.0,
    1 / 64,
    1 / 32,
    1 / 16,
    3 / 32,
    1 / 8,
    3 / 16,
    1 / 4,
    3 / 8,
    1 / 2,
    5 / 8,
    3 / 4,
    1.0,
)
"""Closer together where losses fall fastest."""

# An error of half an 8-bit step, squared: energies below it are rounding.
_NOISE = 1.5e-5
# Added to logarithms of energies: what brings them to both sides of 0.
_MIDDLE = 2.5
# Blocks that accelerators take at once. A processor gains nothing by it, and would compute padding.
_TOGETHER = 8


class AbstractScorer(eqx.Module):
    """Predicts the loss of a block at candidate lengths, before anything is encoded."""

    @property
    @abc.abstractmethod
    def history(self) -> int:
        """Earlier blocks whose pixels it wants to see beside the block's own."""

    @abc.abstractmethod
    def curves(
        self, blocks: Sequence[Block]
    ) -> tuple[Int64[np.ndarray, "blocks candidates"], Float64[np.ndarray, "blocks candidates"]]:
        """The predicted loss curves of blocks, which may belong to different clips.

        What is predicted for a block must not depend on the others.

        **Arguments:**

        - `blocks`: with pixels.

        **Returns:** candidate lengths from each block's shortest to its longest, in ascending order
        (repeated where there are few), and the losses predicted at them.
        """

    @property
    def criterion_name(self) -> str | None:
        """Of the losses that it predicts, as `criterion_name` gives it; None where that is open."""
        return None

    @property
    def fingerprint(self) -> str | None:
        """Tells it from other scorers; None if it cannot."""
        return None


@final
class Scorer(AbstractScorer):
    """A small network that sees a block's pixels and those of a few blocks before.

    Patches of whole blocks, each as a coarse picture of itself and the logarithms of what varies in
    it in space and time (the tokens that a block needs go with its high frequencies, arXiv
    2410.08368, section 4.3), go through a block-causal transformer as AdapTok's scorer does
    (arXiv 2505.17011). The mean over the block's patches, and a linear map of plain statistics of
    them, give a curve that never rises: a first value minus sums of softplus. Where losses are
    positive, it is the curve of their logarithm. Blocks before the clip's beginning are masked;
    where in its clip a block lies compiles nothing.

    `elastictok.train.fit_scorer` trains one for a tokenizer and a criterion.
    """

    embed: Linear
    place: PlaceEmbedding
    transformer: Transformer
    norm: RMSNorm
    readout: Linear
    plain: Linear
    bias: Float[Array, "shares"]
    frames_per_block: int = eqx.field(static=True)
    context: int = eqx.field(static=True)
    patch: int = eqx.field(static=True)
    shares: tuple[float, ...] = eqx.field(static=True)
    logarithmic: bool = eqx.field(static=True)
    criterion: str = eqx.field(static=True)
    codec: str = eqx.field(static=True)

    def __init__(
        self,
        *,
        frames_per_block: int,
        criterion: str,
        codec: str,
        context: int = 2,
        patch: int = 8,
        shares: Sequence[float | int] = SCORE_SHARES,
        logarithmic: bool = True,
        dim: int = 32,
        hidden: int = 64,
        layers: int = 1,
        heads: int = 4,
        key: Key[Array, ""],
    ):
        """**Arguments:**

        - `frames_per_block`: of the codec.
        - `criterion`: whose losses it predicts, `criterion_name(criterion)`.
        - `codec`: fingerprint of the codec whose losses it predicts.
        - `context`: blocks that it sees, the one at hand included.
        - `patch`: height and width of a patch, a multiple of 4. Frames of any size will do.
        - `shares`: of the way from the shortest to the longest length, where the curve has its
          points: ascending from 0 to 1.
        - `logarithmic`: whether the curve is that of the loss's logarithm: for positive losses.
        - `dim`, `hidden`, `layers`, `heads`: of the transformer.

        **Raises:** `ValueError` for what is no such thing.
        """
        self.frames_per_block = operator.index(frames_per_block)
        self.context, self.patch = operator.index(context), operator.index(patch)
        self.shares = tuple(float(share) for share in shares)
        self.logarithmic, self.criterion, self.codec = logarithmic, criterion, codec
        _check(self)
        e, p, t, r, s = jax.random.split(key, 5)
        features = 3 * (self.patch // 4) ** 2 + _STATISTICS
        self.embed = Linear(features, dim, std=features**-0.5, key=e)
        self.place = PlaceEmbedding(dim, frequencies=4, std=0.02, key=p)
        self.transformer = Transformer(
            dim=dim,
            hidden=hidden,
            layers=layers,
            heads=heads,
            rotary=CellRotary(30.0, 100.0),
            std=dim**-0.5,
            key=t,
        )
        self.norm = RMSNorm(dim, 1e-5)
        self.readout = Linear(dim, len(self.shares), std=0.1 * dim**-0.5, key=r)
        self.plain = Linear(2 * _STATISTICS + _ENERGIES, len(self.shares), std=0.01, key=s)
        self.bias = jnp.zeros(len(self.shares))

    @property
    def history(self) -> int:
        return self.context - 1

    @property
    def criterion_name(self) -> str:
        return self.criterion

    @property
    def fingerprint(self) -> str:
        return facts_of(self)[1]

    def __call__(
        self, pixels: UInt8[Array, "frames height width 3"], valid: Bool[Array, "blocks"]
    ) -> Float[Array, "shares"]:
        """The curve of the last block, of the loss or its logarithm, at `shares`.

        **Arguments:**

        - `pixels`: `context` blocks, the one at hand last.
        - `valid`: false for those that are not there, which come first.
        """
        return self.curve(self.measure(pixels, valid), valid, self.grid(*pixels.shape[1:3]))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches of a frame along height and width."""
        return height // self.patch, width // self.patch

    def measure(
        self, pixels: UInt8[Array, "frames height width 3"], valid: Bool[Array, "blocks"]
    ) -> Float[Array, "tokens features"]:
        """What is seen of each patch. Nothing of it is trained."""
        return _features(pixels, valid, self.frames_per_block, self.patch)

    def curve(
        self,
        features: Float[Array, "tokens features"],
        valid: Bool[Array, "blocks"],
        grid: tuple[int, int],
    ) -> Float[Array, "shares"]:
        """The curve of the last block, from `measure`."""
        tokens, cells = math.prod(grid), Cells(Raster(), (1, *grid))
        positions = jnp.arange(self.context * tokens)
        x = self.embed(features) + self.place(cells.coordinates(positions))
        mask = BlockCausal(block=tokens) & KeyValid(jnp.repeat(valid, tokens))
        x = self.norm(self.transformer(x, mask, positions, cells))
        mean = jnp.mean(x[-tokens:], axis=0, keepdims=True)
        plain = _statistics(features[-tokens:, -_STATISTICS:])[None]
        return falling((self.readout(mean) + self.plain(plain))[0] + self.bias)

    def curves(
        self, blocks: Sequence[Block]
    ) -> tuple[Int64[np.ndarray, "blocks candidates"], Float64[np.ndarray, "blocks candidates"]]:
        """See `AbstractScorer.curves`. Compiles once for each size of frames.

        **Raises:** `ValueError` if a block comes without pixels, or with other frames per block.
        """
        lengths = np.zeros((len(blocks), len(self.shares)), np.int64)
        losses = np.zeros(lengths.shape)
        for i, block in enumerate(blocks):
            lengths[i] = candidates(block, self.shares)
        windows = [self.window(block) for block in blocks]
        for indices in _of_one_size([pixels for pixels, _ in windows]):
            count = 1 if jax.default_backend() == "cpu" else _TOGETHER
            for first in range(0, len(indices), count):
                part = indices[first : first + count]
                # Always as many: one program, and the same result beside whatever others.
                filled = [windows[part[min(i, len(part) - 1)]] for i in range(count)]
                pixels, valid = (jnp.asarray(np.stack(x)) for x in zip(*filled, strict=True))
                out = np.asarray(_predict(self, pixels, valid), np.float64)
                losses[part] = out[: len(part)]
        for i, block in enumerate(blocks):
            places = shares_of(block, lengths[i])
            losses[i] = np.interp(places, self.shares, losses[i])
        return lengths, np.exp(losses) if self.logarithmic else losses

    def window(
        self, block: Block
    ) -> tuple[UInt8[np.ndarray, "frames height width 3"], Bool[np.ndarray, "blocks"]]:
        """What the network is given of a block: `context` blocks, and which of them there are.

        **Raises:** `ValueError` if a block comes without pixels, or with other frames per block.
        """
        if block.pixels is None:
            raise ValueError(
                "a scorer predicts losses from pixels, and this block has none; Tokenizer gives "
                "them, or make it Block(shortest, longest, pixels=frames, frames_per_block=count)"
            )
        if block.frames_per_block != self.frames_per_block:
            raise ValueError(
                f"this scorer was made for {self.frames_per_block} frames per block, and the block "
                f"has {block.frames_per_block}; use the scorer that was trained for this tokenizer"
            )
        most = self.context * self.frames_per_block
        pixels = block.pixels[-most:]
        missing = most - len(pixels)
        if missing % self.frames_per_block or missing == most:
            raise ValueError(
                f"{len(block.pixels)} frames are no whole blocks of {self.frames_per_block}; give "
                "those of the block, and of earlier ones before them"
            )
        valid = np.arange(self.context) >= missing // self.frames_per_block
        sizes = [-n % self.patch for n in pixels.shape[1:3]]
        edges = [(0, 0), *((0, n) for n in sizes), (0, 0)]
        pixels = np.pad(np.pad(pixels, edges, mode="edge"), [(missing, 0), *[(0, 0)] * 3])
        return pixels, valid

    def check_codec(self, model: ElasticTok | ElasticCodec) -> None:
        """**Raises:** `ScorerFileError` if it was trained for another tokenizer than this one."""
        given = as_codec(model).fingerprint
        if given != self.codec:
            raise ScorerFileError(
                f"the scorer was trained for the model with fingerprint {self.codec}, and this one "
                f"has {given}; use that model, or train a scorer for this one (elastictok "
                "train-regressor)"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file: the arrays, and in the metadata what the scorer is."""
        write_scorer(self, Path(path))

    @staticmethod
    def load(
        path: str | os.PathLike[str], model: ElasticTok | ElasticCodec | None = None
    ) -> "Scorer":
        """Reads what `save` wrote; nothing is unpickled, and everything is checked.

        **Arguments:**

        - `path`: the file.
        - `model`: the tokenizer that it is to be used with; None leaves that unchecked.

        **Raises:** `ScorerFileError` if the file is damaged, foreign, of a newer version or of
        another model; `OSError` if it cannot be opened.
        """
        scorer = read_scorer(Path(path), _skeleton)
        if model is not None:
            scorer.check_codec(model)
        return scorer


def criterion_name(criterion: AbstractCriterion) -> str:
    """What a criterion measures, without its threshold: `MSE`, or the name of its function."""
    if isinstance(criterion, Criterion):
        function = criterion.function
        return getattr(function, "__qualname__", type(function).__qualname__)
    return type(criterion).__qualname__


def in_parts(blocks: Iterable[Block], count: int = 64) -> Iterator[list[Block]]:
    """Blocks, at most `count` at a time: their pixels may only be made when they are asked for."""
    blocks = iter(blocks)
    while part := list(itertools.islice(blocks, count)):
        yield part


def candidates(block: Block, shares: Sequence[float]) -> Int64[np.ndarray, "shares"]:
    """The block's lengths at shares of the way from the shortest to the longest."""
    span = block.longest - block.shortest
    return block.shortest + np.rint(np.multiply(shares, span)).astype(np.int64)


def shares_of(
    block: Block, lengths: Int64[np.ndarray, "lengths"]
) -> Float64[np.ndarray, "lengths"]:
    """The shares at which lengths lie; 1 where there is but one length: it is all tokens."""
    span = block.longest - block.shortest
    return (lengths - block.shortest) / span if span else np.ones(len(lengths))


def falling(values: Float[Array, "shares"]) -> Float[Array, "shares"]:
    """A curve that never rises, from unbounded numbers."""
    drops = jnp.cumsum(jax.nn.softplus(values[1:]))
    return values[0] - jnp.concatenate([jnp.zeros(1), drops])


@eqx.filter_jit
def _predict(
    scorer: Scorer,
    pixels: UInt8[Array, "batch frames height width 3"],
    valid: Bool[Array, "batch blocks"],
) -> Float[Array, "batch shares"]:
    return jax.vmap(scorer)(pixels, valid)


def _of_one_size(pixels: Sequence[np.ndarray]) -> list[list[int]]:
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, each in enumerate(pixels):
        groups[each.shape].append(i)
    return list(groups.values())


def _skeleton(facts: dict[str, Any]) -> Scorer:
    """The scorer that facts speak of, with shapes in place of arrays."""
    return eqx.filter_eval_shape(lambda: Scorer(**facts, key=jax.random.key(0)))


def _check(scorer: Scorer) -> None:
    for name in ("frames_per_block", "context"):
        if getattr(scorer, name) < 1:
            raise ValueError(f"{name} is {getattr(scorer, name)}; it must be at least 1")
    if scorer.patch < 4 or scorer.patch % 4:
        raise ValueError(f"patch is {scorer.patch}; it must be a multiple of 4")
    shares = scorer.shares
    rising = all(a < b for a, b in itertools.pairwise(shares))
    if len(shares) < 2 or (shares[0], shares[-1]) != (0, 1) or not rising:
        raise ValueError(f"shares are {shares}; they must rise from 0 to 1")


# The last of a patch's features: three means, as many energies, and whether its block is the first.
_ENERGIES = 8
_STATISTICS = 3 + _ENERGIES + 1


def _features(
    pixels: UInt8[Array, "frames height width 3"],
    valid: Bool[Array, "blocks"],
    frames_per_block: int,
    patch: int,
) -> Float[Array, "tokens features"]:
    """What the network sees of each patch of whole blocks."""
    x = pixels.astype(jnp.float32) / 127.5 - 1
    blocks = len(valid)

    def of_patches(values: Float[Array, "frames rows columns 3"]) -> Float[Array, "frames cells"]:
        """Means over patches and channels."""
        cells = _pooled(values, patch * values.shape[1] // x.shape[1])
        return jnp.mean(cells, axis=-1).reshape(len(cells), -1)

    def of_blocks(
        values: Float[Array, "frames cells"], reduce: Callable[..., Array] = jnp.mean
    ) -> Float[Array, "blocks cells"]:
        return reduce(values.reshape(blocks, -1, values.shape[-1]), axis=1)

    means = of_patches(jnp.square(_pooled(x, patch)))
    scales = (x, _pooled(x, 2), _pooled(x, 4))
    variances = [of_blocks(of_patches(jnp.square(scale)) - means) for scale in scales]
    across = jnp.diff(x, axis=2, append=x[:, :, -1:])
    down = jnp.diff(x, axis=1, append=x[:, -1:])
    motion = of_patches(jnp.square(jnp.diff(x, axis=0, prepend=x[:1])))
    first = jnp.arange(len(x)) % frames_per_block == 0
    inside = jnp.where(first[:, None], 0.0, motion)
    # The step into a block means something only if there is a block before.
    before = jnp.roll(valid, 1).at[0].set(False)
    energies = [
        *(jnp.maximum(variance, 0.0) for variance in variances),
        of_blocks(of_patches(jnp.square(across))),
        of_blocks(of_patches(jnp.square(down))),
        of_blocks(inside),
        of_blocks(inside, jnp.max),
        jnp.where(before[:, None], motion[::frames_per_block], 0.0),
    ]
    logs = jnp.log10(jnp.stack(energies, axis=-1) + _NOISE) + _MIDDLE
    new = jnp.broadcast_to(~before[:, None, None], (*logs.shape[:2], 1)).astype(jnp.float32)
    picture = jnp.mean(scales[-1].reshape(blocks, -1, *scales[-1].shape[1:]), axis=1)
    side = patch // 4
    cells = Patching(1, side, side).patch(picture).reshape(*logs.shape[:2], side * side, 3)
    mean = jnp.mean(cells, axis=2)
    detail = (cells - mean[:, :, None]).reshape(*logs.shape[:2], -1)
    features = jnp.concatenate([detail, mean, logs, new], axis=-1)
    return features.reshape(-1, features.shape[-1])


def _statistics(features: Float[Array, "tokens statistics"]) -> Float[Array, "plain"]:
    """Of a block: the mean and spread of its patches, and the logarithms of its energies."""
    energies = jnp.mean(10.0 ** features[:, 3:-1], axis=0)
    return jnp.concatenate(
        [jnp.mean(features, axis=0), jnp.std(features, axis=0), jnp.log10(energies)]
    )


def _pooled(
    x: Float[Array, "frames height width 3"], size: int
) -> Float[Array, "frames rows columns 3"]:
    """Means of squares of `size` pixels a side."""
    frames, height, width, _ = x.shape
    # Rows first, whole ones at a time: four times as fast on a processor as both at once.
    rows = jnp.mean(x.reshape(frames, height // size, size, width * 3), axis=2)
    return jnp.mean(rows.reshape(frames, height // size, width // size, size, 3), axis=3)
