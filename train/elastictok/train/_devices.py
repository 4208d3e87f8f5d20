"""Batches on the devices, and the step compiled for exactly those."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from elastictok.data import Batch

from ._errors import DataError, RecompilationError
from ._sharding import data_share, pixels_spec, replicated
from ._step import DeviceBatch, Metrics, TrainState


def place(batch: Batch, mesh: Mesh) -> DeviceBatch:
    """Moves this process's share of a batch to the devices; the shares of all make one batch.

    **Raises:** `DataError` if it is no batch, or the devices do not divide it.
    """
    _check(batch)
    number, shares = data_share(mesh)
    here = batch.pixels.shape[0]
    examples, split = here * shares, mesh.shape["data"] * mesh.shape["fsdp"]
    if examples % split:
        raise DataError(
            f"a batch of {examples} examples cannot be split over {split} devices; choose a batch "
            f"size that is a multiple of {split}, or a mesh with fewer along data and fsdp"
        )

    def whole(array: np.ndarray) -> jax.Array:
        shape = (examples, *array.shape[1:])
        sharding = NamedSharding(mesh, pixels_spec(shape, mesh))

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(examples)
            # A copy: on a CPU, jax may keep the caller's memory as its own, and whoever writes the
            # next batch into the same array would change this one.
            return array[(slice(start - number * here, stop - number * here), *index[1:])].copy()

        return jax.make_array_from_callback(shape, sharding, part)

    return DeviceBatch(*map(whole, (batch.pixels, batch.segments, batch.valid)))


def _check(batch: Batch) -> None:
    """What would else be trained on as if it were pictures."""
    pixels, shape = batch.pixels, np.shape(batch.pixels)
    if pixels.dtype != np.uint8 or len(shape) != 6 or shape[-1] != 3:
        raise DataError(
            f"the pixels of a batch are {pixels.dtype}{list(shape)}; they must be "
            "uint8[batch, blocks, frames, height, width, 3], 0 to 255"
        )
    for name, array, kind in (
        ("segments", batch.segments, np.integer),
        ("valid", batch.valid, np.bool_),
    ):
        if np.shape(array) != shape[:2] or not np.issubdtype(array.dtype, kind):
            raise DataError(
                f"{name} of a batch is {array.dtype}{list(np.shape(array))}; it must have one "
                f"{'boolean' if kind is np.bool_ else 'integer'} for each of its {shape[:2]} blocks"
            )


class CompiledStep:
    """A step compiled ahead of time for one state and one shape of batch; it never recompiles.

    Batches may have other sizes of frames if those are named; the step is compiled for each of them
    once, when the first such batch comes.

    The state given to a call is donated: its arrays are gone afterwards.
    """

    def __init__(
        self,
        step: Callable[[TrainState, DeviceBatch], tuple[TrainState, Metrics]],
        state: TrainState,
        batch: DeviceBatch,
        sizes: Sequence[tuple[int, int]] = (),
        mesh: Mesh | None = None,
    ):
        """**Arguments:**

        - `state`, `batch`: arrays, or `jax.ShapeDtypeStruct`s with shardings: then the step can be
            compiled for devices that are not here.
        - `sizes`: of frames, height and width.
        - `mesh`: then every device gets the metrics.
        """
        arrays, self._static = eqx.partition(state, _is_array)

        def run(arrays, batch):
            after, metrics = step(eqx.combine(arrays, self._static), batch)
            after, static = eqx.partition(after, eqx.is_array)
            _refuse_changes("state", _shapes(arrays), _shapes(after))
            if not eqx.tree_equal(static, self._static):
                raise RecompilationError("the step changed a part of the state that is no array")
            return after, metrics

        kept = jax.tree.map(lambda array: array.sharding, arrays)
        everywhere = None if mesh is None else replicated(mesh)
        self._jitted = jax.jit(run, donate_argnums=0, out_shardings=(kept, everywhere))
        self._expected = {
            size: _shapes(batch) | {"pixels": _pixels_of(batch, size)}
            for size in {_size(batch), *sizes}
        }
        self._first = _size(batch)
        self._compiled = {self._first: self._lower(arrays, batch)}

    def _lower(self, arrays, batch: DeviceBatch) -> jax.stages.Compiled:
        return self._jitted.lower(arrays, batch).compile()

    @property
    def compiled(self) -> jax.stages.Compiled:
        """The program for the first size of batches."""
        return self._compiled[self._first]

    @property
    def compilations(self) -> int:
        """How often the step was compiled."""
        return len(self._compiled)

    def __call__(self, state: TrainState, batch: DeviceBatch) -> tuple[TrainState, Metrics]:
        """**Raises:** `RecompilationError` naming the shapes that are not those compiled for."""
        size = _size(batch)
        expected = self._expected.get(size, self._expected[self._first])
        _refuse_changes("batch", expected, _shapes(batch))
        arrays, _ = eqx.partition(state, eqx.is_array)
        if size not in self._compiled:
            self._compiled[size] = self._lower(arrays, batch)
        arrays, metrics = self._compiled[size](arrays, batch)
        return eqx.combine(arrays, self._static), metrics


def _is_array(leaf) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def _size(batch: DeviceBatch) -> tuple[int, int]:
    """Height and width of the frames."""
    height, width = batch.pixels.shape[-3:-1]
    return height, width


def _pixels_of(batch: DeviceBatch, size: tuple[int, int]) -> str:
    """Type and shape of the pixels with other frames, as `_shapes` has them."""
    *front, _, _, channels = batch.pixels.shape
    return f"{batch.pixels.dtype}{[*front, *size, channels]}"


def _shapes(tree) -> dict[str, str]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    }


def _refuse_changes(what: str, before: dict[str, str], now: dict[str, str]) -> None:
    if before == now:
        return
    changes = [
        f"{name}: {before.get(name, 'absent')} -> {now.get(name, 'absent')}"
        for name in sorted(before | now)
        if before.get(name) != now.get(name)
    ]
    raise RecompilationError(
        f"the step was compiled for another {what} ({'; '.join(changes[:5])}); all batches of a "
        "run must have the same shapes and types, and a step must keep those of the state"
    )
