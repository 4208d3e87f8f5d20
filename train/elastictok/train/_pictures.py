"""What the model makes of the same examples as training goes on, with the tokens that they need."""

import functools
import os
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from elastictok.data import Batch, write_picture
from elastictok.models import AbstractExecution, ElasticTok

from ._devices import place
from ._sharding import replicated
from ._step import DeviceBatch

SHARES = (1.0, 0.5, 0.25, 0.125, 0.0625)  # of a block's tokens
_EXAMPLES, _BLOCKS = 4, 8  # that are drawn
_GAP, _BAR = 4, 24  # pixels between pictures, and of a full bar
_NEEDED, _MISSED, _EMPTY, _PAPER = (66, 133, 244), (219, 68, 55), (224, 224, 224), (255, 255, 255)


class Pictures:
    """Reconstructions of a batch at a few lengths, drawn and measured every so many steps.

    Writes `pictures/step-00000500.png` into the run folder: for each example the original, the
    reconstruction from all tokens and from a quarter, the first frame of each block; below each
    block a bar of the tokens that it needs for `threshold`, red where all are not enough. Adds
    `mse_full` and `mse_quarter` to the metrics, means over the whole batch.
    """

    def __init__(self, batch: Batch, *, every: int = 500, threshold: float | int = 0.01):
        """**Arguments:**

        - `batch`: the examples, of the shape of the training batches; on several processes each
            brings its share.
        - `every`: steps.
        - `threshold`: mean squared error of a block, pixels in [-1, 1].
        """
        if every < 1:
            raise ValueError(f"pictures are due every {every} steps; it must be at least 1")
        if not threshold > 0:
            raise ValueError(f"threshold is {threshold}; a mean squared error above 0 is needed")
        self.every = every
        self._batch = batch
        self._threshold = threshold
        self._placed: DeviceBatch | None = None
        self._mesh: Mesh | None = None

    def measure(
        self, model: ElasticTok, mesh: Mesh, execution: AbstractExecution
    ) -> tuple[dict[str, float], UInt8[np.ndarray, "height width 3"]]:
        """The metrics and the picture of a model that lies on the mesh."""
        if self._placed is None or self._mesh != mesh:
            self._placed, self._mesh = place(self._batch, mesh), mesh
        probe = _probe(mesh)
        tokens = model.tokens_per_block(*self._batch.pixels.shape[3:5])
        least = min(model.min_tokens, tokens)
        lengths = [max(least, round(share * tokens)) for share in SHARES]
        errors, frames = [], []
        for length in lengths:
            error, shown = jax.device_get(probe(model, self._placed, jnp.int32(length), execution))
            errors.append(error)
            frames.append(shown)
        valid = np.asarray(jax.device_get(jax.device_put(self._placed.valid, replicated(mesh))))
        of_all = [float(np.mean(error[valid])) if valid.any() else 0.0 for error in errors]
        metrics = {"mse_full": of_all[0], "mse_quarter": of_all[SHARES.index(0.25)]}
        truth = np.asarray(jax.device_get(_first_frames(mesh)(self._placed.pixels)))
        needed = _needed(np.stack(errors) <= self._threshold, lengths) / tokens
        picture = _draw((truth, frames[0], frames[SHARES.index(0.25)]), needed, valid)
        return metrics, picture

    def write(self, picture: UInt8[np.ndarray, "height width 3"], out: Path, step: int) -> Path:
        """Puts a picture into the run folder."""
        path = out / "pictures" / f"step-{step:08d}.png"
        os.makedirs(path.parent, exist_ok=True)
        write_picture(path, picture)
        return path


@functools.cache
def _first_frames(mesh: Mesh):
    return jax.jit(lambda pixels: pixels[:_EXAMPLES, :_BLOCKS, 0], out_shardings=replicated(mesh))


@functools.cache
def _probe(mesh: Mesh):
    """Errors of all blocks and the first frames of the first ones, with so many tokens each."""

    @eqx.filter_jit
    def probe(
        model: ElasticTok, batch: DeviceBatch, length: Int[Array, ""], execution: AbstractExecution
    ) -> tuple[Float[Array, "batch blocks"], UInt8[Array, "few some height width 3"]]:
        examples, blocks, frames, height, width, _ = batch.pixels.shape
        target = batch.pixels.astype(jnp.float32) / 127.5 - 1
        flat = target.reshape(examples, blocks * frames, height, width, 3)
        lengths = jnp.full((examples, blocks), length)
        pixels = jax.vmap(
            lambda x, length, segments, valid: (
                model(x, length, segments, valid, execution=execution).pixels
            ),
            spmd_axis_name=execution.batch_axes,
        )(flat, lengths, batch.segments, batch.valid).reshape(target.shape)
        error = jnp.mean(jnp.square(pixels - target), axis=(2, 3, 4, 5))
        shown = jnp.round((pixels[:_EXAMPLES, :_BLOCKS, 0] + 1) * 127.5).astype(jnp.uint8)
        return jax.lax.with_sharding_constraint((error, shown), replicated(mesh))

    return probe


def _needed(met: np.ndarray, lengths: list[int]) -> np.ndarray:
    """Tokens of the shortest length that meets the threshold, [batch blocks]; infinite if none."""
    asked = np.array(lengths, np.float64)[:, None, None]
    return np.where(met, asked, np.inf).min(axis=0)


def _draw(rows: tuple[np.ndarray, ...], needed: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """For each example its rows of pictures, a column per block, and below them the bars."""
    examples, blocks, height, width, _ = rows[0].shape
    cell = len(rows) * (height + _GAP) + _BAR + 2 * _GAP
    sheet = np.full((examples * cell, blocks * (width + _GAP), 3), _PAPER, np.uint8)
    for i in range(examples):
        for b in range(blocks):
            if not valid[i, b]:
                continue
            top, left = i * cell, b * (width + _GAP)
            for row in rows:
                sheet[top : top + height, left : left + width] = row[i, b]
                top += height + _GAP
            bar = sheet[top : top + _BAR, left : left + width]
            bar[:] = _EMPTY
            filled = max(1, round(_BAR * min(needed[i, b], 1.0)))
            bar[_BAR - filled :] = _NEEDED if needed[i, b] <= 1 else _MISSED
    return sheet
