"""Where state and batches live, and the step compiled for exactly those."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from elastictok.data import Batch

from ._errors import DataError, RecompilationError
from ._step import DeviceBatch, Metrics, TrainState


def data_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with the one axis `data`: each device takes a share of every batch.

    **Arguments:**

    - `devices`: all local ones by default.
    """
    chosen = np.array(jax.local_devices() if devices is None else devices)
    return Mesh(chosen, ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array: the state."""
    return NamedSharding(mesh, PartitionSpec())


def place(batch: Batch, mesh: Mesh) -> DeviceBatch:
    """Moves a batch to the devices, split over its first axis.

    **Raises:** `DataError` if the devices do not divide the batch.
    """
    examples = batch.pixels.shape[0]
    if examples % mesh.size:
        raise DataError(
            f"a batch of {examples} examples cannot be split over {mesh.size} devices; choose a "
            f"batch size that is a multiple of {mesh.size}, or pass fit a mesh of fewer devices"
        )
    # On a CPU, device_put may keep the caller's memory as its own: whoever writes the next batch
    # into the same array would change this one.
    owned = [np.array(array) for array in (batch.pixels, batch.segments, batch.valid)]
    split = NamedSharding(mesh, PartitionSpec("data"))
    return DeviceBatch(*jax.device_put(owned, split))


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
    ):
        arrays, self._static = eqx.partition(state, eqx.is_array)

        def run(arrays, batch):
            after, metrics = step(eqx.combine(arrays, self._static), batch)
            after, static = eqx.partition(after, eqx.is_array)
            _refuse_changes("state", _shapes(arrays), _shapes(after))
            if not eqx.tree_equal(static, self._static):
                raise RecompilationError("the step changed a part of the state that is no array")
            return after, metrics

        kept = jax.tree.map(lambda array: array.sharding, arrays)
        self._jitted = jax.jit(run, donate_argnums=0, out_shardings=(kept, None))
        self._expected = {
            size: _shapes(batch) | {"pixels": _pixels_of(batch, size)}
            for size in {_size(batch), *sizes}
        }
        self._first = _size(batch)
        self._compiled = {self._first: self._jitted.lower(arrays, batch).compile()}

    def __call__(self, state: TrainState, batch: DeviceBatch) -> tuple[TrainState, Metrics]:
        """**Raises:** `RecompilationError` naming the shapes that are not those compiled for."""
        size = _size(batch)
        expected = self._expected.get(size, self._expected[self._first])
        _refuse_changes("batch", expected, _shapes(batch))
        arrays, _ = eqx.partition(state, eqx.is_array)
        if size not in self._compiled:
            self._compiled[size] = self._jitted.lower(arrays, batch).compile()
        arrays, metrics = self._compiled[size](arrays, batch)
        return eqx.combine(arrays, self._static), metrics


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
