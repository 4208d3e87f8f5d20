"""Ring attention: one sequence over several devices (arXiv 2310.01889).

Every device keeps its queries. Keys and values travel around the ring of devices, and while a
device works on those that it holds the next ones are on their way; partial results are merged by
their log-sum-exp. Going back, keys and values travel again, and their gradients behind them.

Where a token of a shard stands in the sequence is the layout's business, and the mask speaks of the
whole sequence: what it knows of the keys that arrive is looked up, and tiles are skipped by the
ranges of that, hop by hop and on each device as its own part of the mask allows.
"""

import abc
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from elastictok.attention._backend import AbstractBackend, Shaped
from elastictok.attention._masks import AbstractMask
from elastictok.attention._pallas_tpu import PallasTPU
from elastictok.attention._registry import choose
from elastictok.attention._tiled import (
    UNSEEN,
    AbstractTiled,
    How,
    backward,
    computed_in,
    forward,
    named,
    row_sums,
)
from elastictok.attention._xla import XLA


class AbstractLayout(eqx.Module):
    """Which tokens of the sequence each device of the ring holds."""

    @abc.abstractmethod
    def reasons_against(self, shards: int, length: int) -> list[str]:
        """Why a sequence of that length cannot be laid out so; empty if it can."""

    @abc.abstractmethod
    def places(self, shard: Int[Array, ""] | int, shards: int, tokens: int) -> Int[Array, "tokens"]:
        """Where the tokens of a shard stand in the sequence. The shard may be traced."""

    def order(self, shards: int, length: int) -> Int[np.ndarray, "length"]:
        """The place in the sequence of each token as it is laid out: `x[order]` lays out an array
        in its natural order, and `laid_out[numpy.argsort(order)]` undoes that.

        **Raises:**

        `ValueError` if the length cannot be laid out.
        """
        if reasons := self.reasons_against(shards, length):
            raise ValueError("; ".join(reasons))
        tokens = length // shards
        return np.concatenate([self.places(shard, shards, tokens) for shard in range(shards)])


class Contiguous(AbstractLayout):
    """Each device holds one piece of the sequence, in order: no rearranging, but under a causal
    mask the last device has up to twice the average work."""

    def reasons_against(self, shards: int, length: int) -> list[str]:
        return _indivisible(length, shards, f"{shards} devices")

    def places(self, shard: Int[Array, ""] | int, shards: int, tokens: int) -> Int[Array, "tokens"]:
        return shard * tokens + jnp.arange(tokens)


class ZigZag(AbstractLayout):
    """Device `d` of `n` holds the pieces `d` and `2 n - 1 - d` of `2 n`: under a causal mask all
    have the same work. Lay the sequence out once, before the model (see `order`); positions, labels
    and the mask stay those of the natural order."""

    def reasons_against(self, shards: int, length: int) -> list[str]:
        return _indivisible(length, 2 * shards, f"2 x {shards} devices")

    def places(self, shard: Int[Array, ""] | int, shards: int, tokens: int) -> Int[Array, "tokens"]:
        half = jnp.arange(tokens // 2)
        pieces = (shard, 2 * shards - 1 - shard)
        return jnp.concatenate([piece * (tokens // 2) + half for piece in pieces])


def _indivisible(length: int, parts: int, said: str) -> list[str]:
    if length % parts == 0:
        return []
    longer = -(-length // parts) * parts
    return [
        f"{length} tokens do not divide by {said}: pad to {longer}, and hide the padding with "
        "KeyValid"
    ]


class Ring(AbstractBackend):
    """Sequence parallelism over an axis of a mesh.

    Called with whole arrays, inside `jax.set_mesh(mesh)` or with a `mesh`, it splits them over the
    axis itself. On a mesh with explicit axes, which is what `jax.make_mesh` makes, `jax.vmap` keeps
    a batch as it is sharded; on one with automatic axes use `jax.vmap(..., spmd_axis_name="data")`,
    or the batch is gathered. Called inside a `jax.shard_map` over the axis (with
    `check_vma=False`), the arrays are this device's part. In every case the arrays follow the
    layout, and the mask speaks of the whole sequence in its natural order.

    **Arguments:**

    - `axis`: the name of the mesh axis.
    - `layout`: `Contiguous()` or `ZigZag()`.
    - `inner`: what computes a hop. Default: the kernels for TPUs on a TPU, else `XLA()`; on an axis
      of one device, which has no hops, the backend that `attention` takes by default.
    - `heads`: the mesh axis that the heads are split over, if any. Only for whole arrays.
    - `mesh`: the mesh. Default: that of the context.
    """

    axis: str = eqx.field(static=True)
    layout: AbstractLayout = eqx.field(static=True, default=Contiguous())
    inner: AbstractTiled | None = eqx.field(static=True, default=None)
    heads: str | None = eqx.field(static=True, default=None)
    mesh: Mesh | None = eqx.field(static=True, default=None)
    name: str = eqx.field(static=True, default="ring")

    def reasons_against(self, q: Shaped, k: Shaped, v: Shaped, mask: AbstractMask) -> list[str]:
        mesh = self._mesh()
        for axis in (self.axis, *([] if self.heads is None else [self.heads])):
            if axis not in mesh.axis_names:
                known = ", ".join(map(repr, mesh.axis_names)) or "none"
                return [
                    f"there is no mesh axis {axis!r} here (axes: {known}): call it inside "
                    "jax.set_mesh(mesh) or a jax.shard_map over that axis, or give mesh="
                ]
        shards = mesh.shape[self.axis]
        queries, keys = self.lengths(q, k)
        reasons = self.layout.reasons_against(shards, queries)
        if keys != queries:
            reasons += self.layout.reasons_against(shards, keys)
        tensor = 1 if self.heads is None or self._is_inside() else mesh.shape[self.heads]
        reasons += [
            f"{x.shape[1]} {which} do not divide by the {tensor} devices of axis {self.heads!r}"
            for which, x in (("heads", q), ("key heads", k))
            if x.shape[1] % tensor
        ]
        if reasons:
            return reasons
        if shards == 1 and self.inner is None:
            return []
        q, k, v = (
            jax.ShapeDtypeStruct((n // shards, x.shape[1] // tensor, x.shape[2]), x.dtype)
            for x, n in ((q, queries), (k, keys), (v, keys))
        )
        return [f"each hop: {why}" for why in self._inner().reasons_against(q, k, v, mask)]

    def lengths(self, q: Shaped, k: Shaped) -> tuple[int, int]:
        shards = self._mesh().shape.get(self.axis, 1) if self._is_inside() else 1
        return q.shape[0] * shards, k.shape[0] * shards

    def __call__(
        self,
        q: Float[Array, "tokens heads head_dim"],
        k: Float[Array, "keys kv_heads head_dim"],
        v: Float[Array, "keys kv_heads head_dim"],
        mask: AbstractMask,
        *,
        scale: float,
    ) -> Float[Array, "tokens heads head_dim"]:
        leaves, structure = jax.tree.flatten(mask)
        leaves = tuple(jnp.asarray(leaf) for leaf in leaves)
        how = _How(How(self._inner(), structure, scale), self.axis, self.layout, self.inner)
        if self._is_inside():
            return _local(how, q, k, v, leaves)
        spec = PartitionSpec(self.axis, self.heads)
        split = jax.shard_map(
            functools.partial(_local, how),
            mesh=self.mesh,
            in_specs=(spec, spec, spec, PartitionSpec()),
            out_specs=spec,
            check_vma=False,
        )
        if AxisType.Explicit in self._mesh().axis_types:  # there, shard_map moves nothing by itself
            q, k, v = (jax.sharding.reshard(x, self._sharding(spec)) for x in (q, k, v))
            leaves = jax.sharding.reshard(leaves, self._sharding(PartitionSpec()))
        return split(q, k, v, leaves)

    def _sharding(self, spec: PartitionSpec) -> PartitionSpec | NamedSharding:
        return spec if self.mesh is None else NamedSharding(self.mesh, spec)

    def _mesh(self) -> Mesh | AbstractMesh:
        return jax.sharding.get_abstract_mesh() if self.mesh is None else self.mesh

    def _is_inside(self) -> bool:
        return self.axis in jax.sharding.get_abstract_mesh().manual_axes

    def _inner(self) -> AbstractTiled:
        if self.inner is not None:
            return self.inner
        return PallasTPU() if jax.default_backend() == "tpu" else XLA()


class _How(eqx.Module):
    """All that is known at compile time."""

    hop: How = eqx.field(static=True)
    axis: str = eqx.field(static=True)
    layout: AbstractLayout = eqx.field(static=True)
    inner: AbstractTiled | None = eqx.field(static=True)

    def places(self, hop: Array, tokens: int) -> Int[Array, "tokens"]:
        """Of the tokens that are here after so many hops."""
        shards = lax.axis_size(self.axis)
        shard = lax.rem(lax.axis_index(self.axis) - hop + shards, shards)
        return self.layout.places(shard, shards, tokens)

    def pass_on(self, x: PyTree[Array]) -> PyTree[Array]:
        shards = lax.axis_size(self.axis)
        return lax.ppermute(x, self.axis, [(i, (i + 1) % shards) for i in range(shards)])


def _local(how: _How, q: Array, k: Array, v: Array, leaves: tuple[Array, ...]) -> Array:
    if lax.axis_size(how.axis) == 1:  # no ring: whatever is best on one device
        mask, scale = jax.tree.unflatten(how.hop.structure, leaves), how.hop.scale
        backend = choose(how.inner, q, k, v, mask)
        return backend(q, k, v, mask, scale=scale)
    dtype = computed_in(q, k, v)
    out: Array = _attend(how, q.astype(dtype), k.astype(dtype), v.astype(dtype), leaves)
    return out.astype(q.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how: _How, q: Array, k: Array, v: Array, leaves: tuple[Array, ...]) -> Array:
    return _attend_forward(how, q, k, v, leaves)[0]


def _attend_forward(
    how: _How, q: Array, k: Array, v: Array, leaves: tuple[Array, ...]
) -> tuple[Array, PyTree[Array]]:
    own = how.places(jnp.int32(0), q.shape[0])

    def hop(carry: PyTree[Array], number: Array) -> tuple[PyTree[Array], None]:
        k, v, out, lse = carry
        following = how.pass_on((k, v))  # needs nothing of what follows, so that they overlap
        places = (own, how.places(number, k.shape[0]))
        part, part_lse = forward(how.hop, q, k, v, leaves, places, dtype=jnp.float32)
        total = jnp.logaddexp(lse, part_lse)  # UNSEEN and UNSEEN stay so: log 2 is lost in 1e38
        weight, part_weight = (jnp.exp(x - total).T[..., None] for x in (lse, part_lse))
        return (*following, out * weight + part * part_weight, total), None

    nothing = jnp.zeros(q.shape, jnp.float32), jnp.full((q.shape[1], q.shape[0]), UNSEEN)
    hops = jnp.arange(lax.axis_size(how.axis))
    (_, _, out, lse), _ = lax.scan(hop, (k, v, *nothing), hops)
    out, lse = named(out.astype(q.dtype), lse)
    return out, (leaves, (q, k, v, out, lse))


def _attend_backward(
    how: _How, saved: PyTree[Array], d_out: Array
) -> tuple[Array, Array, Array, None]:
    leaves, (q, k, v, out, lse) = saved
    own, delta = how.places(jnp.int32(0), q.shape[0]), row_sums(out, d_out)

    def hop(carry: PyTree[Array], number: Array) -> tuple[PyTree[Array], None]:
        k, v, so_far, dq = carry
        following = how.pass_on((k, v))
        arrived = how.pass_on(so_far)  # of the keys that are here now
        places = (own, how.places(number, k.shape[0]))
        part_dq, *part = backward(
            how.hop, q, k, v, lse, delta, d_out, leaves, places, dtype=jnp.float32
        )
        so_far = jax.tree.map(jnp.add, arrived, tuple(part))
        return (*following, so_far, dq + part_dq), None

    dq, *nothing = (jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    hops = jnp.arange(lax.axis_size(how.axis))
    (_, _, d_kv, dq), _ = lax.scan(hop, (k, v, tuple(nothing), dq), hops)
    dk, dv = how.pass_on(d_kv)  # the last hop's are the next device's own
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)
