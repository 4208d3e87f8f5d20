"""Which device holds what: the axes of a mesh, and one rule per kind of array.

| axis | splits | so that |
|---|---|---|
| `data` | the examples of a batch | more are computed at once |
| `fsdp` | the examples too, and every matrix | they need less memory |
| `sequence` | the tokens of an example | a context may be longer than a device holds |
| `tensor` | heads and hidden units | a layer's products are split |

`fsdp` gathers a layer's matrices while the layer is computed (ZeRO-3, arXiv 1910.02054), `sequence`
has ring attention (arXiv 2310.01889), `tensor` splits layers as in arXiv 1909.08053.
"""

import fnmatch
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from elastictok.attention import AbstractBackend, AbstractTiled, Ring
from elastictok.models import LOCAL, AbstractExecution

# Outermost first: neighbouring devices, whose links are the fastest, share an example's products.
AXES = ("data", "fsdp", "sequence", "tensor")
BATCH = ("data", "fsdp")

# The first pattern that fits an array's path decides; an array that none fits is on every device.
# Optimizers keep their averages under the paths of the parameters that they are for, and so those
# lie where the parameters do. An axis that does not divide a dimension leaves that dimension whole.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # Layers are stacked on their first axis: [layers in out].
    ("*.attention.query.weight", (None, "fsdp", "tensor")),
    ("*.attention.key.weight", (None, "fsdp", "tensor")),
    ("*.attention.value.weight", (None, "fsdp", "tensor")),
    ("*.attention.out.weight", (None, "tensor", "fsdp")),
    ("*.feed_forward.gate.weight", (None, "fsdp", "tensor")),
    ("*.feed_forward.up.weight", (None, "fsdp", "tensor")),
    ("*.feed_forward.down.weight", (None, "tensor", "fsdp")),
    # Patches and latents are narrow, the stream is wide.
    ("*.in_proj.weight", (None, "fsdp")),
    ("*.out_proj.weight", ("fsdp", None)),
    ("*.place.weight", (None, "fsdp")),
)
Rules = Sequence[tuple[str, tuple[str | None, ...]]]

Tree = TypeVar("Tree")


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    sequence: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh of all devices of all processes, or of those given.

    **Arguments:**

    - `data`, `fsdp`, `tensor`, `sequence`: devices along each axis; their product is the number of
        devices.
    - `devices`: those of every process by default.

    **Raises:** `ValueError` if the axes do not take exactly the devices.
    """
    sizes = {"data": data, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}
    chosen = jax.devices() if devices is None else list(devices)
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"mesh axis {name} is {size}; it must be at least 1")
    product = math.prod(sizes.values())
    if product != len(chosen):
        said = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(
            f"the mesh {said} takes {product} devices and there are {len(chosen)}; choose axes "
            f"whose product is {len(chosen)}, or name the devices"
        )
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=chosen
    )


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh on which each device takes a share of every batch, and holds everything else.

    **Arguments:**

    - `devices`: those of every process by default.
    """
    chosen = jax.devices() if devices is None else list(devices)
    return make_mesh(data=len(chosen), devices=chosen)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def shardings(tree: PyTree, mesh: Mesh, rules: Rules = RULES) -> PyTree[NamedSharding]:
    """Where the arrays of a model, of an optimizer's state or of both belong.

    **Arguments:**

    - `tree`: of arrays or of `jax.ShapeDtypeStruct`s; None elsewhere.
    - `rules`: patterns of paths, as `fnmatch` has them, and the mesh axis of each dimension.

    **Returns:** a tree of the same structure.
    """

    def of(path: Any, leaf: Any) -> NamedSharding:
        name = "." + jax.tree_util.keystr(path, simple=True, separator=".")
        return NamedSharding(mesh, _spec(name, leaf.shape, mesh, rules))

    return jax.tree_util.tree_map_with_path(of, tree)


def _spec(name: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules) -> PartitionSpec:
    for pattern, axes in rules:
        if fnmatch.fnmatchcase(name, pattern) and len(axes) == len(shape):
            whole = (
                axis if axis in mesh.shape and size % mesh.shape[axis] == 0 else None
                for axis, size in zip(axes, shape, strict=True)
            )
            return PartitionSpec(*whole)
    return PartitionSpec()


def pixels_spec(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Of `[batch blocks ...]`: examples over `data` and `fsdp`, blocks over `sequence`.

    Blocks that the devices do not divide are on all of them at first; the tokens made of them are
    split all the same.
    """
    split = shape[1] % mesh.shape["sequence"] == 0
    return PartitionSpec(BATCH, "sequence" if split else None)


def put(tree: Tree, where: PyTree[NamedSharding]) -> Tree:
    """Arrays laid out as told, in memory of their own: a step may be given them for good.

    Arrays of this process become arrays of all; every process must hold the same ones.
    """

    def one(array: Array, sharding: NamedSharding) -> Array:
        if isinstance(array, jax.Array) and array.sharding == sharding:
            return array.copy()
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            data = one(jax.random.key_data(array), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            return jax.device_put(array, sharding, may_alias=False)
        here = np.array(array)
        return jax.make_array_from_callback(here.shape, sharding, lambda part: here[part].copy())

    return jax.tree.map(one, tree, where)


def gather(tree: Tree, mesh: Mesh) -> Tree:
    """The arrays on one device of this process, whole. Every process must call it."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        if not leaf.is_fully_addressable:
            leaf = jax.device_put(leaf, replicated(mesh)).addressable_data(0)
        return jax.device_put(leaf, mesh.local_devices[0])

    return jax.tree.map(one, tree)


def init_sharded(make: Callable[[], Tree], mesh: Mesh, rules: Rules = RULES) -> Tree:
    """A model made where it belongs: no device ever holds all of it.

    **Arguments:**

    - `make`: makes the model, as in `lambda: presets.small(key=key)`. Same values as without a
        mesh.
    - `mesh`, `rules`: as of `shardings`.
    """
    shapes = eqx.filter_eval_shape(make)
    arrays, static = eqx.partition(shapes, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    where = shardings(arrays, mesh, rules)
    made = jax.jit(lambda: eqx.filter(make(), eqx.is_array), out_shardings=where)()
    return eqx.combine(made, static)


class Sharded(AbstractExecution):
    """A forward pass on a mesh: examples, tokens and heads split, one layer's matrices gathered.

    - `mesh`: as `make_mesh` makes it.
    - `remat`: see `elastictok.models.AbstractExecution`.
    - `inner`: the backend of attention on each device; the best one that is there by default.
    """

    mesh: Mesh = eqx.field(static=True)
    remat: Callable[..., Any] | None = eqx.field(static=True, default=None)
    inner: AbstractTiled | None = eqx.field(static=True, default=None)
    batch_axes: tuple[str, ...] | None = eqx.field(static=True, default=BATCH)

    def backend(self) -> AbstractBackend:
        return Ring(axis="sequence", inner=self.inner, heads="tensor", mesh=self.mesh)

    def stream(self, x: Float[Array, "tokens dim"]) -> Float[Array, "tokens dim"]:
        return self._constrain(x, PartitionSpec("sequence", None))

    def weights(self, layer: Tree) -> Tree:
        def gathered(path: Any, leaf: Any) -> Any:
            name = "." + jax.tree_util.keystr(path, simple=True, separator=".")
            spec = _spec(name, (1, *leaf.shape), self.mesh, RULES)[1:]
            return self._constrain(
                leaf, PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec))
            )

        return jax.tree_util.tree_map_with_path(gathered, layer)

    def _constrain(self, x: Array, spec: PartitionSpec) -> Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))


@jax.custom_batching.custom_vmap
def _together(x: Array, weight: Array) -> Array:
    return LOCAL.product(x, weight)


@_together.def_vmap
def _(size: int, batched: list[bool], x: Array, weight: Array) -> tuple[Array, bool]:
    if batched == [True, False]:
        rows = x.reshape(-1, x.shape[-1])
        return LOCAL.product(rows, weight).reshape(*x.shape[:-1], -1), True
    axes = tuple(0 if each else None for each in batched)
    return jax.vmap(LOCAL.product, in_axes=axes)(x, weight), True


class OneDevice(AbstractExecution):
    """A forward pass of a batch on one device: the tokens of all examples in one product.

    The gradient of a matrix is then one product of two matrices as well. As a sum over a batch,
    compilers for CPUs turn one of the two around first, which costs as much as the product. Only
    for the gradient of a batch, as in `jax.grad` of a `jax.vmap`.

    - `remat`: see `elastictok.models.AbstractExecution`.
    - `implementation`: of attention; None takes the best backend that can run the call.
    """

    remat: Callable[..., Any] | None = eqx.field(static=True, default=None)
    implementation: AbstractBackend | None = eqx.field(static=True, default=None)
    batch_axes: tuple[str, ...] | None = eqx.field(static=True, default=None)

    def backend(self) -> AbstractBackend | None:
        return self.implementation

    def product(
        self, x: Float[Array, "tokens in_dim"], weight: Float[Array, "in_dim out_dim"]
    ) -> Float[Array, "tokens out_dim"]:
        return _together(x, weight)


def execution_on(
    mesh: Mesh,
    remat: Callable[..., Any] | None = None,
    inner: AbstractTiled | None = None,
) -> AbstractExecution:
    """How a training step is carried out on a mesh.

    **Arguments:**

    - `remat`, `inner`: as of [`Sharded`][].
    """
    if mesh.size == 1:
        return OneDevice(remat=remat, implementation=inner)
    return Sharded(mesh=mesh, remat=remat, inner=inner)


@functools.cache  # asked for every batch
def data_share(mesh: Mesh) -> tuple[int, int]:
    """Which share of every batch this process brings, as `(number, of how many)`.

    Give it to the data: `PackedDataset(..., shard=data_share(mesh))`. Processes whose devices hold
    the same examples (other tokens, heads or matrices of them) bring the same share.

    **Raises:** `ValueError` if the mesh gives processes shares of different sizes.
    """
    rows = _rows(mesh)
    own = rows.get(jax.process_index())
    shares = sorted(set(rows.values()))
    sizes = {stop - start for start, stop in shares}
    disjoint = all(a[1] == b[0] for a, b in itertools.pairwise(shares))
    if own is None or len(sizes) != 1 or not disjoint:
        raise ValueError(
            f"the processes hold the parts {shares} of a batch on this mesh, which are no equal "
            "shares; choose data and fsdp so that every process has as many"
        )
    return shares.index(own), len(shares)


def _rows(mesh: Mesh) -> dict[int, tuple[int, int]]:
    """For each process, from which to which of the places along the batch its devices are."""
    places: dict[int, list[int]] = {}
    examples = mesh.shape["data"] * mesh.shape["fsdp"]
    grid = mesh.devices.reshape(examples, -1)
    for row, devices in enumerate(grid):
        for device in devices:
            places.setdefault(device.process_index, []).append(row)
    return {process: (min(rows), max(rows) + 1) for process, rows in places.items()}


def parse_mesh(text: str) -> dict[str, int]:
    """The axes in `data=2,fsdp=4`.

    **Raises:** `ValueError` saying how it is written.
    """
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in AXES or name in axes or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"{part.strip()!r} is no mesh axis; write AXIS=DEVICES for any of "
                f"{', '.join(AXES)}, each once, such as data=2,fsdp=4"
            )
        axes[name] = int(size)
    return axes
