"""cuDNN's attention without a GPU: what it refuses, and what it asks of JAX for the rest.

JAX's dense attention takes cuDNN's place where values are compared. Where shapes and settings are
enough, cuDNN's own primitives are traced, and lowered for GPUs: their batching rules are more
particular.
"""

import functools
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from elastictok.attention import (
    AbstractMask,
    And,
    BlockCausal,
    Causal,
    CuDNN,
    Full,
    KeyValid,
    Segments,
    SlidingBlocks,
    attention,
)

DENSE = functools.partial(jax.nn.dot_product_attention)


@pytest.fixture
def any_machine(monkeypatch):
    """As if there were a GPU; what runs is JAX's dense attention."""
    from elastictok.attention import _cudnn

    def dense(*arrays, implementation, **how):
        assert implementation == "cudnn"
        return DENSE(*arrays, implementation="xla", **how)

    monkeypatch.setattr(_cudnn, "_reasons_against_machine", list)
    monkeypatch.setattr(jax.nn, "dot_product_attention", dense)


@pytest.fixture
def primitives(monkeypatch):
    """cuDNN's own primitives, which can be traced and lowered but not run."""
    from elastictok.attention import _cudnn

    monkeypatch.setattr(_cudnn, "_reasons_against_machine", list)
    version = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    monkeypatch.setattr(version, lambda: 91000)


def shaped(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def reasons(mask: AbstractMask = Full(), q=(8, 2, 16), k=None, dtypes=(jnp.bfloat16,) * 3):  # noqa: B008
    """Those against a call, but for the lack of a GPU."""
    k = q if k is None else k
    arrays = (shaped(*shape, dtype=dtype) for shape, dtype in zip((q, k, k), dtypes, strict=True))
    no_gpu, *others = CuDNN().reasons_against(*arrays, mask)
    assert "NVIDIA GPUs" in no_gpu
    return others


# --- reasons ------------------------------------------------------------------------------------


def test_a_machine_without_a_gpu():
    x = jnp.ones((4, 1, 8), jnp.bfloat16)
    with pytest.raises(RuntimeError, match=r"NVIDIA GPUs and this machine's devices are 'cpu'"):
        attention(x, x, x, Full(), implementation="cudnn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attention(x, x, x, Full()).shape == x.shape


@pytest.mark.parametrize(
    ("version", "capability", "expected"),
    [
        ("rocm 70100", "gfx942", "runs on NVIDIA GPUs and this machine's devices are 'A card'"),
        ("cuda 12090", "7.5", "'A card' has compute capability 7.5 and .* needs 8.0: use 'xla'"),
        ("cuda 12090", "8.0", None),
        ("cuda 12090", "10.3", None),
    ],
)
def test_gpus(monkeypatch, version, capability, expected):
    card = types.SimpleNamespace(
        platform="gpu",
        device_kind="A card",
        compute_capability=capability,
        client=types.SimpleNamespace(platform_version=version),
    )
    monkeypatch.setattr(jax, "devices", lambda: [card])
    x = shaped(8, 2, 16)
    found = CuDNN().reasons_against(x, x, x, Full())
    assert len(found) == (expected is not None)
    if expected is not None:
        with pytest.raises(RuntimeError, match=expected):
            attention(*(jnp.ones(x.shape, x.dtype),) * 3, Full(), implementation="cudnn")


def test_types():
    half, other, single = jnp.bfloat16, jnp.float16, jnp.float32
    assert reasons(dtypes=(half,) * 3) == reasons(dtypes=(other,) * 3) == []
    (reason,) = reasons(dtypes=(half, single, half))
    assert reason.startswith("k is float32 and it takes bfloat16 and float16: cast")
    assert len(reasons(dtypes=(single,) * 3)) == 3
    (reason,) = reasons(dtypes=(half, other, other))
    assert "q, k and v are bfloat16, float16 and float16, and it takes one type: cast" in reason


def test_head_dim_and_grouped_heads():
    assert reasons(q=(8, 2, 128)) == reasons(q=(8, 4, 8), k=(8, 2, 8)) == []
    for head_dim in (12, 136, 256):
        (reason,) = reasons(q=(8, 2, head_dim))
        assert f"head_dim is {head_dim} and it takes multiples of 8 up to 128" in reason


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (Segments(jnp.zeros(8, int)), "the mask has Segments"),
        (KeyValid(jnp.ones(8, bool)), "the mask has KeyValid"),
        (Causal() & Segments(jnp.zeros(8, int)), "the mask has Segments"),
        (Causal(1), "8 queries at offset 1 and 8 keys"),
        (Causal(-1), "8 queries at offset -1 and 8 keys"),
        (SlidingBlocks(1, 3, 2), "8 queries at offset 2 and 8 keys"),
        (BlockCausal(4), "BlockCausal has 8 queries and 8 keys in blocks of 4 tokens"),
        (SlidingBlocks(4, 2), "SlidingBlocks has 8 queries and 8 keys in blocks of 4 tokens"),
        (Full() & BlockCausal(4), "BlockCausal has 8 queries and 8 keys in blocks of 4 tokens"),
    ],
)
def test_masks_that_it_refuses(mask, expected):
    (reason,) = reasons(mask)
    assert expected in reason
    assert "use 'xla'" in reason


def test_every_reason_is_given():
    found = reasons(
        BlockCausal(4) & Segments(jnp.zeros(8, int)), q=(8, 2, 12), dtypes=(jnp.float32,) * 3
    )
    assert len(found) == 6


class SameParity(AbstractMask):
    """A mask of someone else."""

    def check(self, queries, keys):
        pass

    def of_queries(self, indices):
        return indices % 2

    def of_keys(self, indices):
        return indices % 2

    def sees(self, query, key):
        return query == key

    def key_bounds(self, queries, keys, tile):
        tiles = -(-queries // tile)
        return jnp.zeros(tiles, int), jnp.full(tiles, keys)

    def dense(self, queries, keys):
        return jnp.arange(queries)[:, None] % 2 == jnp.arange(keys)[None, :] % 2


def test_a_mask_of_someone_else():
    assert reasons(SameParity()) == ["the mask has SameParity, which it does not know: use 'xla'"]


def test_a_traced_offset_is_refused_and_a_concrete_array_is_not():
    assert reasons(Causal(jnp.int32(0))) == reasons(Causal(np.int32(0))) == []
    found = []

    @jax.jit
    def run(at):
        found.extend(reasons(Causal(at)))
        return at

    run(0)
    assert found == ["the offset of Causal is traced: make it a number, or use 'xla'"]


# --- masks --------------------------------------------------------------------------------------

POSITIONAL = st.one_of(
    st.builds(Causal, offset=st.integers(-2, 12)),
    st.builds(BlockCausal, block=st.integers(1, 12), offset=st.integers(-2, 12)),
    st.builds(
        SlidingBlocks,
        block=st.integers(1, 12),
        window=st.integers(1, 12),
        offset=st.integers(-2, 12),
    ),
)
AT_ZERO = st.one_of(
    st.just(Causal()),
    st.just(Full()),
    st.builds(BlockCausal, block=st.sampled_from([1, 2, 9, 40])),
    st.builds(SlidingBlocks, block=st.sampled_from([1, 9, 40]), window=st.integers(1, 12)),
)


@settings(max_examples=300)
@given(mask=POSITIONAL | AT_ZERO, queries=st.integers(1, 10), keys=st.integers(1, 10), square=...)
def test_it_takes_exactly_the_masks_that_are_full_or_a_causal_band(
    mask: AbstractMask, queries: int, keys: int, square: bool
):
    keys = queries if square else keys
    dense = np.asarray(mask.dense(queries, keys))
    back = np.arange(queries)[:, None] - np.arange(keys)[None, :]
    bands = ((back >= 0) & (back < window) for window in range(1, keys + 1))
    simple = dense.all() or (queries == keys and any((dense == band).all() for band in bands))
    assert (reasons(mask, (queries, 1, 8), (keys, 1, 8)) == []) == simple


MASKS = {
    "full": (Full(), 40, 40),
    "cross": (Full(), 24, 40),
    "causal": (Causal(), 40, 40),
    "one-block": (BlockCausal(64), 40, 40),
    "one-block-cached": (BlockCausal(16, 32), 16, 48),
    "last-token": (Causal(39), 1, 40),
    "blocks-of-one": (BlockCausal(1), 40, 40),
    "window": (SlidingBlocks(1, 7), 40, 40),
    "itself": (SlidingBlocks(1, 1), 40, 40),
    "window-of-all": (SlidingBlocks(1, 64), 40, 40),
    "full-and-causal": (Full() & Causal(), 40, 40),
    "causal-and-window": (And((Causal() & Full(), SlidingBlocks(1, 5))), 40, 40),
    "two-windows": (SlidingBlocks(1, 9) & SlidingBlocks(1, 4), 40, 40),
}


def arrays(queries: int, keys: int, dtype=jnp.float32, batch: tuple[int, ...] = ()):
    rng = np.random.default_rng(queries + keys)
    shapes = [(*batch, queries, 4, 16), *[(*batch, keys, 2, 16)] * 2, (*batch, queries, 4, 16)]
    q, k, v, d_out = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    return (q, k, v), d_out


@functools.partial(jax.jit, static_argnums=0)
def with_gradient(attend, qkv, d_out):
    out, pull = jax.vjp(attend, *qkv)
    return out, *pull(d_out)


def assert_close(ours, theirs, tolerance: float) -> None:
    for mine, right in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        mine, right = (np.asarray(x, np.float64) for x in (mine, right))
        assert np.isfinite(mine).all()
        np.testing.assert_allclose(mine, right, atol=tolerance * np.abs(right).max())


@pytest.mark.parametrize("name", MASKS)
def test_value_and_gradient_are_the_references(any_machine, name):
    mask, queries, keys = MASKS[name]
    qkv, d_out = arrays(queries, keys)
    reference = functools.partial(attention, mask=mask, implementation="reference", scale=0.3)
    # Called itself, because `attention` would not let float32 through, and that compares closer.
    ours = with_gradient(lambda *qkv: CuDNN()(*qkv, mask, scale=0.3), qkv, d_out)
    assert_close(ours, with_gradient(reference, qkv, d_out), 3e-6)

    halves, d_half = arrays(queries, keys, jnp.bfloat16)
    ours = functools.partial(attention, mask=mask, implementation="cudnn", scale=0.3)
    ours = with_gradient(ours, halves, d_half)
    assert {x.dtype for x in ours} == {jnp.dtype(jnp.bfloat16)}
    exact = [x.astype(jnp.float32) for x in (*halves, d_half)]
    assert_close(ours, with_gradient(reference, exact[:3], exact[3]), 3e-2)


@pytest.mark.parametrize(
    ("name", "mask_type", "window"),
    [
        ("full", "NO_MASK", 0),
        ("cross", "NO_MASK", 0),
        ("causal", "CAUSAL", 0),
        ("window", "CAUSAL", 7),
        ("itself", "CAUSAL", 1),
        ("window-of-all", "CAUSAL", 0),
    ],
)
def test_what_cudnn_is_told(primitives, name, mask_type, window):
    mask, queries, keys = MASKS[name]
    qkv, d_out = arrays(queries, keys, jnp.bfloat16)
    ours = functools.partial(attention, mask=mask, implementation="cudnn")
    traced = jax.jit(lambda *args: with_gradient(ours, *args)).trace(qkv, d_out)
    code = traced.lower(lowering_platforms=("cuda",)).as_text().replace("\\22", '"')
    for what in ("fmhaSoftmax", "fmhaSoftmaxBackward"):
        (call,) = (line for line in code.splitlines() if f"__cudnn${what}(" in line)
        assert f'"mask_type": "{mask_type}"' in call
        assert f'"sliding_window_length": {window},' in call


def test_the_default_prefers_it_where_it_can_and_is_silent_where_it_cannot(any_machine):
    from elastictok.attention._registry import backends, choose

    assert backends()["cudnn"] == []
    half, single = shaped(8, 2, 16), shaped(8, 2, 16, dtype=jnp.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(None, half, half, half, Causal()).name == "cudnn"
        assert choose(None, half, half, half, BlockCausal(4)).name == "xla"
        assert choose(None, single, single, single, Causal()).name == "xla"


# --- batches ------------------------------------------------------------------------------------


def attend(q, k, v):
    return CuDNN()(q, k, v, SlidingBlocks(1, 7), scale=0.25)


def reference(q, k, v):
    return attention(q, k, v, SlidingBlocks(1, 7), implementation="reference", scale=0.25)


def total(attend):
    return lambda *qkv: attend(*qkv).astype(jnp.float32).sum()


def gradient(attend):
    return jax.grad(total(attend), (0, 1, 2))


def rows(attend):
    def run(q, k, v):
        out, pull = jax.vjp(attend, q, k, v)
        return jax.vmap(pull)(jnp.stack([out, jnp.ones_like(out), out**2]))

    return run


def layers(attend):
    def loss(q, k, v):
        def layer(x, _):
            return x + attend(x, k, v), None

        x, _ = jax.lax.scan(jax.checkpoint(layer), q, None, length=2)
        return jnp.sum(x.astype(jnp.float32) ** 2)

    return jax.grad(loss, (0, 1, 2))


# From one function of one example to one of a batch, and which arguments have which batch axes.
BATCHES = {
    "all": (lambda f: jax.vmap(f), (3, 3, 3)),
    "shared keys": (lambda f: jax.vmap(f, (0, None, None)), (3, 0, 0)),
    "shared queries": (lambda f: jax.vmap(f, (None, 0, None)), (0, 3, 0)),
    "any axis": (lambda f: jax.vmap(lambda *x: f(x[0].T, *x[1:]), (3, 0, 0)), (3, 3, 3)),
    "gradients": (lambda f: jax.vmap(gradient(f)), (3, 3, 3)),
    "gradients, shared": (lambda f: jax.vmap(gradient(f), (0, None, 0)), (3, 0, 3)),
    "gradient of a batch": (
        lambda f: gradient(jax.vmap(f, (0, None, None))),
        (3, 0, 0),
    ),
    "twice": (
        lambda f: (
            lambda q, k, v: jax.vmap(jax.vmap(gradient(f), (0, None, 0)), (None, 0, None))(
                q, jnp.stack([k, 2 * k]), v
            )
        ),
        (3, 0, 3),
    ),
    "jacobian": (rows, (0, 0, 0)),
    "jacobians": (lambda f: jax.vmap(rows(f), (0, None, 0)), (3, 0, 3)),
    "layers": (lambda f: jax.vmap(layers(f), (0, 0, None)), (3, 3, 0)),
}


def cudnn_calls(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name.startswith("dot_product_attention_"):
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from cudnn_calls(inner)


def batch_of(name: str, dtype):
    sizes = BATCHES[name][1]
    qkv, _ = arrays(24, 24, dtype, batch=(3,))
    qkv = [x if size else x[0] for x, size in zip(qkv, sizes, strict=True)]
    return [qkv[0].T, *qkv[1:]] if name == "any axis" else qkv


@pytest.mark.parametrize("name", BATCHES)
def test_batches_are_the_references(any_machine, name):
    qkv = batch_of(name, jnp.float32)
    batched, _ = BATCHES[name]
    ours, theirs = (jax.jit(batched(f))(*qkv) for f in (attend, reference))
    assert_close(ours, theirs, 5e-6)


@pytest.mark.parametrize("name", BATCHES)
def test_batches_pass_the_batching_rules_of_cudnns_primitives(primitives, name):
    qkv = batch_of(name, jnp.bfloat16)
    batched, _ = BATCHES[name]
    traced = jax.make_jaxpr(batched(attend))(*qkv)
    calls = list(cudnn_calls(traced.jaxpr))
    assert calls
    for call in calls:  # as many axes as without a batch, or the code for GPUs would misread them
        assert {x.aval.ndim for x in call.invars if x.aval.size > 0} <= {3, 4}
        assert {x.aval.shape for x in call.invars if x.aval.size == 0} == {(0,)}
    ours = [(x.shape, x.dtype) for x in traced.out_avals]
    expected = jax.tree.leaves(jax.eval_shape(batched(reference), *qkv))
    assert ours == [(x.shape, x.dtype) for x in expected]
