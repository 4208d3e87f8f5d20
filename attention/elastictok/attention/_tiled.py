"""What the tiled backends share: their gradient, their batch axis, and who sees whom by tiles.

Such a backend is two passes over arrays with a batch axis, `forward` and `backward`. Here they
become one differentiable function of one example: a `custom_vjp` around, and inside each of its
halves a `custom_vmap` under which `jax.vmap` grows the batch axis instead of batching the loops or
the kernel (which would run every example as long as the longest, or one after the other). The order
matters: a `custom_vmap` around a `custom_vjp` fails under the gradient of a batch.
"""

import abc
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree

from elastictok.attention._backend import AbstractBackend
from elastictok.attention._masks import AbstractMask, ranges

# The score of what is not visible. Finite, so that no difference of scores is NaN: beside any
# visible score its weight is 0, and a row with nothing else is known by its peak.
UNSEEN = -1e38


class Sight(NamedTuple):
    """Who sees whom in one call of a pass.

    The leaves of the mask have a leading axis of the batch's size, or of size 1 where the whole
    batch shares them; so has everything that the methods return.
    """

    structure: Any  # of the mask
    leaves: tuple[Array, ...]
    queries: int
    keys: int
    # Where the queries and the keys stand in the mask, each [1 or batch, length]; `None`: in order
    # from 0, and only then does the mask know bounds.
    places: tuple[Int[Array, "batch queries"], Int[Array, "batch keys"]] | None = None

    @property
    def mask(self) -> AbstractMask:
        """The mask without its arrays: the predicates are asked of facts alone."""
        return jax.tree.unflatten(self.structure, [None] * len(self.leaves))

    def facts(self) -> tuple[PyTree[Array], PyTree[Array]]:
        """What is known of the queries, [batch queries], and of the keys, [batch keys]."""

        def ask(leaves: tuple[Array, ...], places: tuple[Array, Array] | None) -> Any:
            mask = jax.tree.unflatten(self.structure, leaves)
            q_at, k_at = (
                (jnp.arange(self.queries), jnp.arange(self.keys)) if places is None else places
            )
            return mask.of_queries(q_at), mask.of_keys(k_at)

        return self._of_each(ask)

    def near(self, q_tile: int, k_tile: int) -> Bool[Array, "batch q_tiles k_tiles"]:
        """Which tiles may hold a visible pair: by the mask's bounds and by the ranges of its facts.

        One boolean for each pair of tiles, made and consumed on the device.
        """
        of_queries, of_keys = self.facts()
        query = jax.tree.map(lambda x: x[:, :, None], ranges(of_queries, q_tile))
        key = jax.tree.map(lambda x: x[:, None, :], ranges(of_keys, k_tile))
        near = self.mask.may_see(query, key)
        k_tiles = jnp.arange(-(-self.keys // k_tile))
        shape = (1, -(-self.queries // q_tile), len(k_tiles))
        near = jnp.broadcast_to(near, jnp.broadcast_shapes(jnp.shape(near), shape))
        if self.places is not None:
            return near

        def bounds(leaves: tuple[Array, ...], _: None) -> tuple[Array, Array]:
            mask = jax.tree.unflatten(self.structure, leaves)
            return mask.key_bounds(self.queries, self.keys, q_tile)

        start, stop = (x[:, :, None] for x in self._of_each(bounds))
        overlap = (start < (k_tiles + 1) * k_tile) & (stop > k_tiles * k_tile)
        return near & (start < stop) & overlap

    def _of_each(self, ask: Callable[..., Any]) -> Any:
        """`ask` for each example, or once where the batch shares all."""
        leaves = (self.leaves, self.places)
        axes = jax.tree.map(lambda x: None if x.shape[0] == 1 else 0, leaves)
        own = jax.tree.map(lambda x: x[0] if x.shape[0] == 1 else x, leaves)
        if all(x.shape[0] == 1 for x in jax.tree.leaves(leaves)):
            return jax.tree.map(lambda x: x[None], ask(*own))
        return jax.vmap(ask, in_axes=axes)(*own)


def hull(near: Bool[Array, "... tiles"]) -> tuple[Int[Array, "..."], Int[Array, "..."]]:
    """From the first to behind the last of the marked tiles; `(0, 0)` where none is."""
    tiles = near.shape[-1]
    some = near.any(axis=-1)
    first = jnp.where(some, jnp.argmax(near, axis=-1), 0).astype(jnp.int32)
    last = jnp.where(some, tiles - jnp.argmax(near[..., ::-1], axis=-1), 0).astype(jnp.int32)
    return first, last


class AbstractTiled(AbstractBackend):
    """A backend that consists of two passes over tiles.

    Both take arrays with a batch axis and return float32 or the type that they are told to; the
    gradients of grouped key heads are summed over their group.
    """

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
        how = How(self, structure, scale)
        return _run(how, q, k, v, tuple(jnp.asarray(leaf) for leaf in leaves))

    @abc.abstractmethod
    def forward(
        self,
        q: Float[Array, "batch queries heads head_dim"],
        k: Float[Array, "batch keys kv_heads head_dim"],
        v: Float[Array, "batch keys kv_heads head_dim"],
        sight: Sight,
        *,
        scale: float,
        dtype: Any,
    ) -> tuple[Float[Array, "batch queries heads head_dim"], Float[Array, "batch heads queries"]]:
        """The output, and each row's log-sum-exp of its scores: `UNSEEN` where it sees nothing."""

    @abc.abstractmethod
    def backward(
        self,
        q: Float[Array, "batch queries heads head_dim"],
        k: Float[Array, "batch keys kv_heads head_dim"],
        v: Float[Array, "batch keys kv_heads head_dim"],
        lse: Float[Array, "batch heads queries"],
        delta: Float[Array, "batch heads queries"],
        d_out: Float[Array, "batch queries heads head_dim"],
        sight: Sight,
        *,
        scale: float,
        dtype: Any,
    ) -> tuple[Array, Array, Array]:
        """The gradients of q, k and v (FlashAttention, arXiv 2205.14135, appendix B.2).

        `delta` is the sum of output times gradient of each row. A row that sees nothing has the
        log-sum-exp 0 here, so that its weights are 0.
        """


class How(NamedTuple):
    """All that is known at compile time. Hashable: it is the key of the compiled code."""

    backend: AbstractTiled
    structure: Any  # of the mask, whose arrays travel apart
    scale: float


# Compiled here as well, so that a call outside jit does not trace its loops anew each time.
@functools.partial(jax.jit, static_argnums=0)
def _run(how: How, q: Array, k: Array, v: Array, leaves: tuple[Array, ...]) -> Array:
    dtype = computed_in(q, k, v)
    out: Array = _attend(how, q.astype(dtype), k.astype(dtype), v.astype(dtype), leaves)
    return out.astype(q.dtype)


def computed_in(q: Array, k: Array, v: Array) -> Any:
    """The type that the products take. float16 has too few exponents for what the gradient is made
    of; bfloat16 has those of float32."""
    return jnp.promote_types(jnp.result_type(q, k, v), jnp.bfloat16)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how: How, q: Array, k: Array, v: Array, leaves: tuple[Array, ...]) -> Array:
    return _attend_forward(how, q, k, v, leaves)[0]


def _attend_forward(
    how: How, q: Array, k: Array, v: Array, leaves: tuple[Array, ...]
) -> tuple[Array, PyTree[Array]]:
    out, lse = named(*forward(how, q, k, v, leaves, dtype=q.dtype))
    return out, (leaves, (q, k, v, out, lse))


def _attend_backward(
    how: How, saved: PyTree[Array], d_out: Array
) -> tuple[Array, Array, Array, None]:
    leaves, (q, k, v, out, lse) = saved
    dq, dk, dv = backward(how, q, k, v, lse, row_sums(out, d_out), d_out, leaves, dtype=q.dtype)
    return dq, dk, dv, None


_attend.defvjp(_attend_forward, _attend_backward)


def named(*saved: Array) -> tuple[Array, ...]:
    """What the backward pass needs of the forward one, by the name that a policy of
    `jax.checkpoint` can keep it by: with them, attention is not computed twice."""
    return tuple(checkpoint_name(x, "attention") for x in saved)


def row_sums(
    out: Float[Array, "queries heads head_dim"], d_out: Float[Array, "queries heads head_dim"]
) -> Float[Array, "heads queries"]:
    """The sum of output times gradient of each row, in float32."""
    return (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(axis=-1).T


def forward(
    how: How,
    q: Array,
    k: Array,
    v: Array,
    leaves: tuple[Array, ...],
    places: tuple[Array, Array] | None = None,
    *,
    dtype: Any,
) -> tuple[Array, Array]:
    """The forward pass of one example."""

    def run(arrays: tuple[Array, ...], facts: Any) -> tuple[Array, ...]:
        q, k, v = arrays
        sight = Sight(how.structure, facts[0], q.shape[1], k.shape[1], facts[1])
        return how.backend.forward(q, k, v, sight, scale=how.scale, dtype=dtype)

    def shardings(arrays: tuple[Array, ...]) -> tuple[PartitionSpec, ...]:
        batch, rows, heads, width = _spec(arrays[0])
        return PartitionSpec(batch, rows, heads, width), PartitionSpec(batch, heads, rows)

    out, lse = _over_a_batch(_automatic(run, shardings))((q, k, v), (leaves, places))
    return out, lse


def backward(
    how: How,
    q: Array,
    k: Array,
    v: Array,
    lse: Array,
    delta: Array,
    d_out: Array,
    leaves: tuple[Array, ...],
    places: tuple[Array, Array] | None = None,
    *,
    dtype: Any,
) -> tuple[Array, Array, Array]:
    """The backward pass of one example."""

    def run(arrays: tuple[Array, ...], facts: Any) -> tuple[Array, ...]:
        q, k, v, lse, delta, d_out = arrays
        sight = Sight(how.structure, facts[0], q.shape[1], k.shape[1], facts[1])
        lse = jnp.where(lse <= UNSEEN, 0.0, lse)
        return how.backend.backward(q, k, v, lse, delta, d_out, sight, scale=how.scale, dtype=dtype)

    def shardings(arrays: tuple[Array, ...]) -> tuple[PartitionSpec, ...]:
        return tuple(PartitionSpec(*_spec(x)) for x in arrays[:3])

    pulled = _over_a_batch(_automatic(run, shardings))
    dq, dk, dv = pulled((q, k, v, lse, delta, d_out), (leaves, places))
    return dq, dk, dv


def _automatic(
    kernel: Callable[[tuple[Array, ...], Any], tuple[Array, ...]],
    shardings: Callable[[tuple[Array, ...]], tuple[PartitionSpec, ...]],
) -> Callable[[tuple[Array, ...], Any], tuple[Array, ...]]:
    """On a mesh with explicit axes, has the compiler find the shardings inside the kernel: its
    loops and reshapes would each have to name theirs. `shardings` says those of the results."""

    def run(arrays: tuple[Array, ...], facts: Any) -> tuple[Array, ...]:
        explicit = jax.sharding.get_abstract_mesh().explicit_axes
        if not explicit:
            return kernel(arrays, facts)
        automatic = jax.sharding.auto_axes(kernel, axes=explicit, out_sharding=shardings(arrays))
        return automatic(arrays, facts)  # pyright: ignore[reportCallIssue]

    return run


def _spec(x: Array) -> tuple[Any, ...]:
    """The sharding of each axis, on a mesh with explicit axes."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return (*spec, *[None] * (x.ndim - len(spec)))


def _over_a_batch(
    kernel: Callable[[tuple[Array, ...], Any], tuple[Array, ...]],
) -> Callable[[tuple[Array, ...], Any], tuple[Array, ...]]:
    """Makes a kernel with a batch axis take one example, and `jax.vmap` grow that axis.

    The kernel's first arguments have a leading axis of the batch's size; the second ones, what the
    mask is made of, have it too, or one of size 1 where the whole batch shares them.
    """

    @jax.custom_batching.custom_vmap
    def batched(arrays: tuple[Array, ...], facts: Any) -> tuple[Array, ...]:
        return kernel(arrays, facts)

    @batched.def_vmap
    def _(
        size: int, is_batched: Sequence[Any], arrays: tuple[Array, ...], facts: Any
    ) -> tuple[tuple[Array, ...], tuple[bool, ...]]:
        inner = arrays[0].shape[1 if is_batched[0][0] else 0]

        def fold(x: Array, is_new: bool) -> Array:
            x = x if is_new else x[None]
            x = jnp.broadcast_to(x, (size, inner, *x.shape[2:]))
            return x.reshape(size * inner, *x.shape[2:])

        folded = tuple(map(fold, arrays, is_batched[0]))
        shared = jax.tree.map(
            lambda x, is_new: x if not is_new and x.shape[0] == 1 else fold(x, is_new),
            facts,
            is_batched[1],
        )
        outs = batched(folded, shared)
        return tuple(out.reshape(size, inner, *out.shape[1:]) for out in outs), (True,) * len(outs)

    def one(arrays: tuple[Array, ...], facts: Any) -> tuple[Array, ...]:
        arrays, facts = jax.tree.map(lambda x: x[None], (arrays, facts))
        return tuple(out[0] for out in batched(arrays, facts))

    return one
