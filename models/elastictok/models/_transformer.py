"""Pre-norm transformer layers, stacked and scanned, with rotary positions and a KV cache."""

import dataclasses
import math
from typing import Any, TypeVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from elastictok.attention import AbstractMask, attention

from ._cells import Cells
from ._execution import LOCAL, AbstractExecution
from ._rope import AbstractRotary, rotate
from ._visibility import EARLIER_BLOCKS, AbstractVisibility

Stack = TypeVar("Stack", bound="Transformer | CrossTransformer")


class Linear(eqx.Module):
    """A matrix without bias, kernel `[in, out]`."""

    weight: Float[Array, "*layers in_dim out_dim"]

    def __init__(self, in_dim: int, out_dim: int, *, std: float, key: Key[Array, ""]):
        self.weight = std * jax.random.normal(key, (in_dim, out_dim))

    def __call__(
        self, x: Float[Array, "tokens in_dim"], execution: AbstractExecution = LOCAL
    ) -> Float[Array, "tokens out_dim"]:
        # Accumulated and returned in float32: what comes next rounds once more, or adds it to the
        # residual stream as it is.
        return execution.product(x, self.weight)


class RMSNorm(eqx.Module):
    """Root-mean-square norm (arXiv 1910.07467), always in float32."""

    weight: Float[Array, "*layers dim"]
    eps: float = eqx.field(static=True)

    def __init__(self, dim: int, eps: float):
        self.weight = jnp.ones(dim)
        self.eps = eps

    def __call__(self, x: Float[Array, "tokens dim"]) -> Float[Array, "tokens dim"]:
        square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(square + self.eps) * self.weight


class KVCache(eqx.Module):
    """Keys (rotated) and values of the last `window` blocks of one stream, as a ring.

    A block's place in the ring is its number modulo the window, so a full cache forgets the oldest
    block. Keys carry their position by rotation: their order in memory does not matter.
    """

    keys: Float[Array, "layers window tokens kv_heads head_dim"]
    values: Float[Array, "layers window tokens kv_heads head_dim"]
    count: Int[Array, ""]

    @property
    def window(self) -> int:
        """Blocks that the cache holds."""
        return self.keys.shape[1]


class SelfAttention(eqx.Module):
    query: Linear
    key: Linear
    value: Linear
    out: Linear
    heads: int = eqx.field(static=True)

    def __init__(self, dim: int, heads: int, *, std: float, key: Key[Array, ""]):
        q, k, v, o = jax.random.split(key, 4)
        self.query = Linear(dim, dim, std=std, key=q)
        self.key = Linear(dim, dim, std=std, key=k)
        self.value = Linear(dim, dim, std=std, key=v)
        self.out = Linear(dim, dim, std=std, key=o)
        self.heads = heads


class SwiGLU(eqx.Module):
    """Gated feed-forward layer (arXiv 2002.05202)."""

    gate: Linear
    up: Linear
    down: Linear

    def __init__(self, dim: int, hidden: int, *, std: float, key: Key[Array, ""]):
        g, u, d = jax.random.split(key, 3)
        self.gate = Linear(dim, hidden, std=std, key=g)
        self.up = Linear(dim, hidden, std=std, key=u)
        self.down = Linear(hidden, dim, std=std, key=d)

    def __call__(
        self, x: Float[Array, "tokens dim"], execution: AbstractExecution = LOCAL
    ) -> Float[Array, "tokens dim"]:
        gated = jax.nn.silu(self.gate(x, execution)) * self.up(x, execution)
        return self.down(gated.astype(x.dtype), execution)


class Layer(eqx.Module):
    attention_norm: RMSNorm
    attention: SelfAttention
    feed_forward_norm: RMSNorm
    feed_forward: SwiGLU

    def __init__(
        self, dim: int, hidden: int, heads: int, *, eps: float, std: float, key: Key[Array, ""]
    ):
        a, f = jax.random.split(key)
        self.attention_norm = RMSNorm(dim, eps)
        self.attention = SelfAttention(dim, heads, std=std, key=a)
        self.feed_forward_norm = RMSNorm(dim, eps)
        self.feed_forward = SwiGLU(dim, hidden, std=std, key=f)


class Transformer(eqx.Module):
    """`layers` equal layers, their parameters stacked on a leading axis and scanned.

    The residual stream, the norms and the rotary angles are float32; matrix products and attention
    run in `dtype`.
    """

    layers: Layer
    rotary: AbstractRotary
    dtype: DTypeLike = eqx.field(static=True)
    remat: bool = eqx.field(static=True)

    def __init__(
        self,
        *,
        dim: int,
        hidden: int,
        layers: int,
        heads: int,
        rotary: AbstractRotary,
        eps: float = 1e-5,
        std: float = 0.02,
        dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        key: Key[Array, ""],
    ):
        """**Arguments:**

        - `dim`, `hidden`: width of the stream and of the gated feed-forward layer.
        - `layers`, `heads`: `heads` must divide `dim` into even parts.
        - `rotary`: what the angles of queries and keys are made of.
        - `eps`, `std`: of the norms; of the normal initialisation.
        - `dtype`: of matrix products and attention.
        - `remat`: keep only each layer's input for the backward pass and compute the rest again.
        """
        self.layers = _stacked(dim, hidden, layers, heads, eps=eps, std=std, key=key)
        self.rotary = rotary
        self.dtype = jnp.dtype(dtype)
        self.remat = remat

    @property
    def dim(self) -> int:
        """Width of the stream."""
        return self.layers.attention_norm.weight.shape[-1]

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.layers.attention_norm.weight.shape[0]

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.dim // self.layers.attention.heads

    def flops(self, tokens: int, pairs: int) -> float:
        """Floating-point operations of the matrix products of a pass, those of attention included.

        **Arguments:**

        - `tokens`: in the sequence.
        - `pairs`: of a query and a key that it sees.
        """
        return _layer_flops(self.layers, tokens) + 4.0 * pairs * self.dim * self.depth

    def __call__(
        self,
        x: Float[Array, "tokens dim"],
        mask: AbstractMask,
        positions: Int[Array, "tokens"],
        cells: Cells,
        execution: AbstractExecution = LOCAL,
    ) -> Float[Array, "tokens dim"]:
        """All tokens at once. `mask` says who sees whom, by index in the sequence."""
        cos, sin = self.rotary(positions, cells, self.head_dim)

        def step(x, layer):
            layer = execution.weights(layer)
            q, k, v = self._project(layer, x, cos, sin, execution)
            out = attention(q, k, v, mask, implementation=execution.backend())
            return execution.stream(_finish(layer, x, out, self.dtype, execution)), None

        if self.remat or execution.remat is not None:
            step = jax.checkpoint(step, policy=execution.remat)
        return jax.lax.scan(step, execution.stream(x), self.layers)[0]

    def init_cache(self, window: int, tokens: int) -> KVCache:
        """An empty cache for `window` blocks of `tokens` tokens."""
        if window < 1:
            raise ValueError(f"a cache of {window} blocks holds nothing; ask for at least 1")
        heads = self.layers.attention.heads
        empty = jnp.zeros((self.depth, window, tokens, heads, self.head_dim), self.dtype)
        return KVCache(empty, empty, jnp.zeros((), jnp.int32))

    def extend(
        self,
        x: Float[Array, "tokens dim"],
        cache: KVCache,
        cells: Cells,
        visibility: AbstractVisibility = EARLIER_BLOCKS,
    ) -> tuple[Float[Array, "tokens dim"], KVCache]:
        """The next block of a stream: it sees itself and the blocks in the cache.

        **Arguments:**

        - `visibility`: which of them.
        """
        tokens = x.shape[0]
        positions = cache.count * tokens + jnp.arange(tokens)
        cos, sin = self.rotary(positions, cells, self.head_dim)
        slot = cache.count % cache.window
        # Every block in the ring is this one or an earlier one, and those up to this one are there:
        # as in a sequence in which this block stands in its slot, or at the end once all are full.
        mask = visibility.mask(tokens, tokens * jnp.minimum(cache.count, cache.window - 1))
        full = cache.count >= cache.window

        def in_order(ring: Array) -> Array:
            if not visibility.in_any_order:
                ring = jnp.roll(ring, jnp.where(full, -(slot + 1), 0), axis=0)
            return ring.reshape(-1, *ring.shape[2:])

        def step(x, inputs):
            layer, keys, values = inputs
            q, k, v = self._project(layer, x, cos, sin)
            keys = jax.lax.dynamic_update_index_in_dim(keys, k, slot, 0)
            values = jax.lax.dynamic_update_index_in_dim(values, v, slot, 0)
            out = attention(q, in_order(keys), in_order(values), mask)
            return _finish(layer, x, out, self.dtype, LOCAL), (keys, values)

        x, (keys, values) = jax.lax.scan(step, x, (self.layers, cache.keys, cache.values))
        return x, KVCache(keys, values, cache.count + 1)

    def _project(
        self, layer: Layer, x, cos, sin, execution: AbstractExecution = LOCAL
    ) -> tuple[Array, Array, Array]:
        own = layer.attention
        h = layer.attention_norm(x).astype(self.dtype)
        q, k, v = (
            _heads(part(h, execution), own.heads) for part in (own.query, own.key, own.value)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q.astype(self.dtype), k.astype(self.dtype), v.astype(self.dtype)


class CrossTransformer(eqx.Module):
    """`layers` equal layers in which a sequence looks at another one, the memory, and not at itself
    (the decoder of Perceiver IO, arXiv 2107.14795, in several layers).

    What comes out at a position depends on that position and on the memory alone. Stacked, scanned
    and computed as in `Transformer`.
    """

    layers: Layer
    rotary: AbstractRotary
    dtype: DTypeLike = eqx.field(static=True)
    remat: bool = eqx.field(static=True)

    def __init__(
        self,
        *,
        dim: int,
        hidden: int,
        layers: int,
        heads: int,
        rotary: AbstractRotary,
        eps: float = 1e-5,
        std: float = 0.02,
        dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        key: Key[Array, ""],
    ):
        """**Arguments:** as of `Transformer`."""
        self.layers = _stacked(dim, hidden, layers, heads, eps=eps, std=std, key=key)
        self.rotary = rotary
        self.dtype = jnp.dtype(dtype)
        self.remat = remat

    @property
    def dim(self) -> int:
        """Width of the stream, and of the memory."""
        return self.layers.attention_norm.weight.shape[-1]

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.layers.attention_norm.weight.shape[0]

    def flops(self, tokens: int, keys: int, pairs: int) -> float:
        """As `Transformer.flops`.

        **Arguments:**

        - `tokens`: in the sequence.
        - `keys`: in the memory.
        - `pairs`: of a token and a key that it sees.
        """
        own = self.layers.attention
        memory = 2.0 * math.prod(own.key.weight.shape) * (keys - tokens)
        memory += 2.0 * math.prod(own.value.weight.shape) * (keys - tokens)
        return _layer_flops(self.layers, tokens) + memory + 4.0 * pairs * self.dim * self.depth

    def __call__(
        self,
        x: Float[Array, "tokens dim"],
        memory: Float[Array, "keys dim"],
        mask: AbstractMask,
        positions: Int[Array, "tokens"],
        memory_positions: Int[Array, "keys"],
        cells: Cells,
        execution: AbstractExecution = LOCAL,
    ) -> Float[Array, "tokens dim"]:
        """**Arguments:**

        - `x`: the sequence.
        - `memory`: what it looks at, normed.
        - `mask`: which position sees which of the memory.
        - `positions`, `memory_positions`: for the rotary embedding, of one sequence.
        - `cells`: where the tokens of a block lie.
        - `execution`: how the layers are carried out, but for attention: sequences are short here,
            and the best backend at hand is taken.
        """
        heads, head_dim = self.layers.attention.heads, self.dim // self.layers.attention.heads
        own = self.rotary(positions, cells, head_dim)
        others = self.rotary(memory_positions, cells, head_dim)
        memory = memory.astype(self.dtype)

        def step(x, layer):
            layer = execution.weights(layer)
            part = layer.attention
            h = layer.attention_norm(x).astype(self.dtype)
            q = rotate(_heads(part.query(h, execution), heads), *own)
            k = rotate(_heads(part.key(memory, execution), heads), *others)
            v = _heads(part.value(memory, execution), heads)
            q, k, v = (array.astype(self.dtype) for array in (q, k, v))
            return _finish(layer, x, attention(q, k, v, mask), self.dtype, execution), None

        if self.remat or execution.remat is not None:
            step = jax.checkpoint(step, policy=execution.remat)
        return jax.lax.scan(step, x, self.layers)[0]


def with_dtype(stack: Stack, dtype: DTypeLike) -> Stack:
    """The same layers, computing in another type."""
    new = object.__new__(type(stack))  # the constructor would make new weights
    for field in dataclasses.fields(cast(Any, stack)):
        object.__setattr__(new, field.name, getattr(stack, field.name))
    object.__setattr__(new, "dtype", jnp.dtype(dtype))
    return new


def _stacked(
    dim: int,
    hidden: int,
    layers: int,
    heads: int,
    *,
    eps: float,
    std: float,
    key: Key[Array, ""],
) -> Layer:
    """Equal layers, their parameters stacked.

    **Raises:** `ValueError` for layers that cannot be made.
    """
    if layers < 1:
        raise ValueError(f"layers is {layers}; it must be at least 1")
    if dim % heads or (dim // heads) % 2:
        raise ValueError(
            f"dim {dim} over {heads} heads is not an even whole number; choose heads so that "
            "dim / heads is even"
        )

    def make(key: Key[Array, ""]) -> Layer:
        return Layer(dim, hidden, heads, eps=eps, std=std, key=key)

    return eqx.filter_vmap(make)(jax.random.split(key, layers))


def _heads(x: Float[Array, "tokens dim"], heads: int) -> Float[Array, "tokens heads head_dim"]:
    return x.reshape(x.shape[0], heads, -1)


def _finish(
    layer: Layer, x, attended, dtype: DTypeLike, execution: AbstractExecution
) -> Float[Array, "tokens dim"]:
    """What comes after attention."""
    attended = attended.reshape(x.shape).astype(dtype)
    x = x + layer.attention.out(attended, execution)
    h = layer.feed_forward_norm(x).astype(dtype)
    return x + layer.feed_forward(h, execution)


def _layer_flops(layers: Layer, tokens: int) -> float:
    """Of the products of each token with the layers' matrices."""
    matrices = (layers.attention, layers.feed_forward)
    return 2.0 * tokens * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(matrices))


def count_parameters(module: eqx.Module) -> int:
    """Number of array elements in a module (also of one made by `eqx.filter_eval_shape`)."""
    leaves = jax.tree.leaves(eqx.filter(module, lambda x: hasattr(x, "shape")))
    return sum(math.prod(leaf.shape) for leaf in leaves)
