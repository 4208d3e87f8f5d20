"""cuDNN's flash attention, for the masks that it has a name for.

`jax.nn.dot_product_attention` calls it; a mask is translated or refused as a whole. What it knows
without a (queries, keys) array: everything visible, causal, and causal within a window of tokens.
Real blocks, packed documents, validity and traced offsets are none of these.

Tested on CPUs with JAX's dense attention in cuDNN's place, and with cuDNN's own primitives up to
the code that a GPU would be given; never yet run on a GPU.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from elastictok.attention._backend import AbstractBackend, Shaped
from elastictok.attention._masks import (
    AbstractMask,
    And,
    BlockCausal,
    Causal,
    Full,
    KeyValid,
    Segments,
    SlidingBlocks,
)

_TYPES = ("bfloat16", "float16")
# What JAX checks before it calls cuDNN (check_layout and check_is_flash_attention in
# jax/_src/cudnn/fused_attention_stablehlo.py): rank 4; one type for q, k and v, bfloat16 or
# float16; the same batch, head_dim and number of keys; head_dim a multiple of 8 and at most 128, or
# 256 from compute capability 9.0 on. The smaller limit, here, holds on every GPU. It does not
# compare the numbers of heads of q and k: cuDNN takes grouped heads as they are.
_HEAD_DIM_STEP, _HEAD_DIM_LIMIT = 8, 128
# JAX leaves it to cuDNN to refuse older GPUs, which happens when the call is compiled: too late.
_CAPABILITY = (8, 0)


class CuDNN(AbstractBackend):
    """cuDNN's flash attention on NVIDIA GPUs, for bfloat16 and float16.

    Its masks: `Full`; `Causal`, with as many queries as keys and from offset 0; `SlidingBlocks` of
    single tokens, likewise; whatever comes to the same at the lengths of the call, such as one
    block that covers everything; and `&` of these. It refuses the rest, silently if it was not
    named: see `is_specialist`.

    Products take the type of the inputs, also those that make up the gradient: where that is
    float16, scale the loss, or use the backend `"xla"`, which computes them in float32.

    `jax.vmap` makes one larger call of a batch. JAX's primitives have batching rules for that,
    forward and backward, but only for a batch axis that comes first, and only if all arrays have
    it; here all are given one before JAX's rules see them.

    **Arguments:**

    - `name`: the name to register it by.
    """

    name: str = eqx.field(static=True, default="cudnn")

    def reasons_against(self, q: Shaped, k: Shaped, v: Shaped, mask: AbstractMask) -> list[str]:
        reasons = _reasons_against_machine() + _reasons_against_types(q, k, v)
        head_dim = q.shape[-1]
        if head_dim % _HEAD_DIM_STEP or head_dim > _HEAD_DIM_LIMIT:
            reasons.append(
                f"head_dim is {head_dim} and it takes multiples of {_HEAD_DIM_STEP} up to "
                f"{_HEAD_DIM_LIMIT}: choose such a one, or use 'xla'"
            )
        against_mask, _ = _translated(mask, q.shape[0], k.shape[0])
        return reasons + against_mask

    def is_specialist(self) -> bool:
        return True

    def __call__(
        self,
        q: Float[Array, "tokens heads head_dim"],
        k: Float[Array, "keys kv_heads head_dim"],
        v: Float[Array, "keys kv_heads head_dim"],
        mask: AbstractMask,
        *,
        scale: float,
    ) -> Float[Array, "tokens heads head_dim"]:
        reasons, reach = _translated(mask, q.shape[0], k.shape[0])
        assert not reasons
        return _attend(reach, scale, q, k, v)


# --- what it can do -----------------------------------------------------------------------------


def _reasons_against_machine() -> list[str]:
    device = jax.devices()[0]
    # A GPU may also be one of AMD's; JAX tells them apart by the same string.
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return [
            f"it runs on NVIDIA GPUs and this machine's devices are {device.device_kind!r}: "
            "use 'xla'"
        ]
    capability = str(device.compute_capability)
    if tuple(map(int, capability.split("."))) < _CAPABILITY:
        least = ".".join(map(str, _CAPABILITY))
        return [
            f"{device.device_kind!r} has compute capability {capability} and cuDNN's flash "
            f"attention needs {least}: use 'xla'"
        ]
    return []


def _reasons_against_types(q: Shaped, k: Shaped, v: Shaped) -> list[str]:
    names = [x.dtype.name for x in (q, k, v)]
    wrong = [
        f"{x} is {name} and it takes {' and '.join(_TYPES)}: cast, or use 'xla'"
        for x, name in zip("qkv", names, strict=True)
        if name not in _TYPES
    ]
    if not wrong and len(set(names)) > 1:
        return [
            f"q, k and v are {names[0]}, {names[1]} and {names[2]}, and it takes one type: cast, "
            "or use 'xla'"
        ]
    return wrong


# How many keys a query sees, its own position the last of them; `None`: every query sees all keys.
_Reach = int | None


def _translated(mask: AbstractMask, queries: int, keys: int) -> tuple[list[str], _Reach]:
    """The mask in cuDNN's terms, or the reasons why it has none.

    In these terms every query sees at least one key, itself or all: no row is empty.
    """
    if isinstance(mask, And):
        found = [_translated(part, queries, keys) for part in mask.masks]
        reaches = [reach for _, reach in found if reach is not None]
        return [reason for reasons, _ in found for reason in reasons], min(reaches, default=None)
    if isinstance(mask, Full):
        return [], None
    if isinstance(mask, Causal | BlockCausal | SlidingBlocks):
        return _translated_positional(mask, queries, keys)
    if isinstance(mask, Segments):
        return ["the mask has Segments, and it knows no packed documents: use 'xla'"], None
    if isinstance(mask, KeyValid):
        return ["the mask has KeyValid, and it knows no padding: use 'xla'"], None
    return [f"the mask has {type(mask).__name__}, which it does not know: use 'xla'"], None


def _translated_positional(
    mask: Causal | BlockCausal | SlidingBlocks, queries: int, keys: int
) -> tuple[list[str], _Reach]:
    name = type(mask).__name__
    if isinstance(mask.offset, jax.core.Tracer):
        return [f"the offset of {name} is traced: make it a number, or use 'xla'"], None
    offset = int(mask.offset)
    block = 1 if isinstance(mask, Causal) else mask.block
    window = mask.window if isinstance(mask, SlidingBlocks) else None

    first, last = offset // block, (offset + queries - 1) // block
    if first >= (keys - 1) // block and (window is None or last < window):
        return [], None  # the first query sees the last key, and the last one the first
    if block > 1:
        return [
            f"{name} has {queries} queries and {keys} keys in blocks of {block} tokens, and it "
            "knows single tokens and one block for all: use 'xla'"
        ], None
    if offset != 0 or queries != keys:
        return [
            f"{name} has {queries} queries at offset {offset} and {keys} keys, and it starts at "
            "offset 0 with as many queries as keys: use 'xla'"
        ], None
    return [], keys if window is None else min(window, keys)


# --- the call, its gradient and its batch ---------------------------------------------------------


def _call(reach: _Reach, scale: float) -> Callable[[Array, Array, Array], Array]:
    def run(q: Array, k: Array, v: Array) -> Array:
        # So many keys to the left and to the right of the query's own position.
        window = None if reach is None or reach == k.shape[0] else (reach - 1, 0)
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=scale,
            is_causal=reach is not None,
            local_window_size=window,
            implementation="cudnn",
        )

    return run


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(reach: _Reach, scale: float, q: Array, k: Array, v: Array) -> Array:
    return _call(reach, scale)(*_together((q, k, v)))


def _attend_forward(
    reach: _Reach, scale: float, q: Array, k: Array, v: Array
) -> tuple[Array, PyTree[Array]]:
    return jax.vjp(_call(reach, scale), *_together((q, k, v)))


def _attend_backward(
    reach: _Reach, scale: float, pull: Any, d_out: Array
) -> tuple[Array, Array, Array]:
    # The gradient that comes in may lack the batch axis, as under the vmap of the gradient of a
    # sum, or be the only one to have it, as in a Jacobian.
    leaves, structure = jax.tree.flatten(pull)
    # JAX saves empty placeholders too, which its batching rules hand on: they must have no batch.
    saved = [i for i, leaf in enumerate(leaves) if leaf.size > 0]
    d_out, *batched = _together((d_out, *(jnp.asarray(leaves[i]) for i in saved)))
    for i, leaf in zip(saved, batched, strict=True):
        leaves[i] = leaf
    return jax.tree.unflatten(structure, leaves)(d_out)


_attend.defvjp(_attend_forward, _attend_backward)


@jax.custom_batching.custom_vmap
def _together(arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arrays as they are, but if one has a batch axis then all have it, and it comes first."""
    return arrays


@_together.def_vmap
def _(
    # Among what a vjp closes over are literals, which are no `jax.Array`.
    size: int,
    is_batched: Sequence[Any],
    arrays: tuple[Any, ...],
) -> tuple[tuple[Any, ...], tuple[bool, ...]]:
    whole = tuple(
        x if has_it else jnp.broadcast_to(x, (size, *x.shape))
        for x, has_it in zip(arrays, is_batched[0], strict=True)
    )
    return _together(whole), (True,) * len(whole)  # again, for the vmap around this one
