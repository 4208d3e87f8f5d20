"""Checks for quantizers of your own: what this package asks of its own ones.

Plain functions that raise an `AssertionError`; call them in a test of any framework.

```python
from elastictok.quantizers.testing import check_quantizer, elementwise

def test_mine():
    check_quantizer(Mine(4), gradient=elementwise(lambda z: 1 / np.cosh(z) ** 2))
```

For one test per property, or for latents that a library like hypothesis draws, take `properties`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from elastictok.quantizers._base import AbstractDiscreteQuantizer, AbstractQuantizer

# Books up to this size are enumerated; of larger ones so many random codes are taken.
_ENUMERATED = 2**16
_RANDOM_CODES = 1000
_CONSTANTS = (0.0, 1.0, -1.0, 1e4, -1e4, 1e-40)
# Arrays, because Python numbers would be compiled in.
_ZERO, _ONE = np.float32(0), np.float32(1)
_GARBAGE = np.array([np.nan, np.inf, -np.inf, 3e38, 1.0], np.float32)


@final
@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """What a property is tried on.

    - `latents`: float32 `[tokens input_dim]`, finite.
    - `keep`: bool `[tokens]`.
    - `seed`: of whatever else the property draws.
    """

    latents: np.ndarray
    keep: np.ndarray
    seed: int


GradientOracle = Callable[[np.ndarray, np.ndarray], np.ndarray]
Check = Callable[[Sample], None]


def unchanged(latents: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
    """The gradient of a straight-through quantizer that does not bound: passed on as it is."""
    del latents
    return cotangent


def elementwise(slope: Callable[[np.ndarray], np.ndarray]) -> GradientOracle:
    """The gradient of a quantizer that bounds each number by a function with this derivative."""
    return lambda latents, cotangent: slope(latents) * cotangent


def random_samples(width: int, *, tokens: int = 12, n: int = 4, seed: int = 0) -> list[Sample]:
    """Normal latents of several sizes with some zeros among them; the same for the same seed.

    **Arguments:**

    - `width`: the quantizer's `input_dim`.
    - `tokens`: how many tokens a sample has, at least 2.
    - `n`: how many samples. In the first all tokens are kept, in the second one is dropped, in the
        others about half are.
    - `seed`: of what is drawn.
    """
    rng = np.random.default_rng(seed)
    samples = []
    for number in range(n):
        size = rng.choice([0.3, 1.0, 3.0])
        latents = size * rng.normal(size=(tokens, width)) * (rng.random((tokens, width)) < 0.9)
        keep = rng.random(tokens) < 0.5
        if number < 2:
            keep = np.arange(tokens) >= number
        samples.append(Sample(latents.astype(np.float32), keep, seed=int(rng.integers(2**31))))
    return samples


def check_quantizer(
    quantizer: AbstractQuantizer,
    *,
    gradient: GradientOracle | None = None,
    exact: bool = True,
    nearest: bool = True,
    samples: Sequence[Sample] | None = None,
) -> None:
    """Checks every property on every sample. It compiles some twenty small programs, which takes
    seconds.

    **Arguments:**

    - `quantizer`: the quantizer.
    - `gradient`, `exact`, `nearest`: as in [`properties`][].
    - `samples`: default: those of [`random_samples`][].

    **Raises:** `AssertionError` that names the property, where it failed, and what to do.
    """
    if samples is None:
        samples = random_samples(quantizer.input_dim)
    checks = properties(quantizer, gradient=gradient, exact=exact, nearest=nearest)
    for check in checks.values():
        for sample in samples:
            check(sample)


def properties(
    quantizer: AbstractQuantizer,
    *,
    gradient: GradientOracle | None = None,
    exact: bool = True,
    nearest: bool = True,
) -> dict[str, Check]:
    """Every property that this quantizer must have, by name, as a function of a [`Sample`][].

    **Arguments:**

    - `quantizer`: the quantizer.
    - `gradient`: the gradient at the latents, given the latents and the gradient at the output
        latents (without a `key`), all in NumPy float64 `[tokens dim]`. An independent oracle:
        write the formula out. Its values for dropped tokens do not matter. By default, a quantizer
        with codes must pass the gradient straight through to what its `bound` made of the latents,
        whatever the gradient of that is; a continuous one is not asked.
    - `exact`: whether `to_codes` reads the codes back off the latents for sure.
    - `nearest`: whether `to_codes` gives the nearest point, for latents out of the code book too.

    **Returns:** the checks. Each raises an `AssertionError` that names the property, where it
    failed, and what to do.
    """
    subject = _Subject(quantizer, gradient)
    chosen = dict(_EVERY)
    if isinstance(quantizer, AbstractDiscreteQuantizer):
        chosen |= _DISCRETE | (_EXACT if exact else {}) | (_NEAREST if nearest else {})
    return {name: _named(name, *entry, subject) for name, entry in chosen.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class _Subject:
    quantizer: Any
    gradient: GradientOracle | None


_Body = Callable[[_Subject, Sample], None]
_Table = dict[str, tuple[_Body, str]]
_EVERY: _Table = {}
_DISCRETE: _Table = {}
_EXACT: _Table = {}
_NEAREST: _Table = {}


def _property(table: _Table, remedy: str) -> Callable[[_Body], _Body]:
    """Enters a function into a table by its name."""

    def enter(body: _Body) -> _Body:
        table[body.__name__.strip("_")] = (body, remedy)
        return body

    return enter


def _named(name: str, body: _Body, remedy: str, subject: _Subject) -> Check:
    def check(sample: Sample) -> None:
        try:
            body(subject, sample)
        except AssertionError as error:
            raise AssertionError(
                f"{type(subject.quantizer).__name__} fails {name}: {error}. {remedy} (seed of the "
                f"sample: {sample.seed}, kept: {np.flatnonzero(sample.keep).tolist()})"
            ) from error

    return check


# The programs. The quantizer is an argument, so they are compiled once for each kind.


@eqx.filter_jit
def _call(q: Any, latents: Any, keep: Any, key: Any = None) -> Any:
    return q(latents, keep, key=key)


@eqx.filter_jit
def _batched_call(q: Any, latents: Any, keep: Any, keys: Any) -> Any:
    return jax.vmap(lambda z, k, key: q(z, k, key=key))(latents, keep, keys)


@eqx.filter_jit
def _to_codes(q: Any, latents: Any) -> Any:
    return q.to_codes(latents)


@eqx.filter_jit
def _from_codes(q: Any, codes: Any) -> Any:
    return q.from_codes(codes)


@eqx.filter_jit
def _batch(q: Any, statistics: Any) -> Any:
    return q.batch_loss(statistics), q.update(statistics)


@eqx.filter_jit
def _pull(q: Any, latents: Any, keep: Any, cotangent: Any) -> Any:
    return jax.vjp(lambda z: q(z, keep).latents, latents)[1](cotangent)[0]


@eqx.filter_jit
def _pull_bound(q: Any, latents: Any, cotangent: Any) -> Any:
    return jax.vjp(q.bound, latents)[1](cotangent)[0]


@eqx.filter_jit
def _gradients(
    q: Any, latents: Any, keep: Any, weights: Any, of_sums: Any, of_batch_loss: Any
) -> Any:
    """At the latents and at the quantizer's own arrays, of all that a trainer may differentiate."""
    arrays, rest = eqx.partition(q, eqx.is_inexact_array)

    def objective(z: Any, arrays: Any) -> Any:
        q = eqx.combine(arrays, rest)
        out = q(z, keep)
        sums = sum(jnp.sum(leaf) for leaf in _numbers(out.statistics))
        total = jnp.sum(out.latents * weights) + out.loss + of_sums * sums
        return total + of_batch_loss * q.batch_loss(out.statistics)

    return jax.grad(objective, argnums=(0, 1))(latents, arrays)


def _numbers(tree: Any) -> list[Any]:
    return jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))


def _weights(subject: _Subject, sample: Sample) -> np.ndarray:
    shape = (len(sample.keep), subject.quantizer.latent_dim)
    return np.random.default_rng(sample.seed).normal(size=shape).astype(np.float32)


def _keys(sample: Sample) -> tuple[Any, ...]:
    return None, jax.random.key(sample.seed)


def _all_codes(q: Any, ndim: int, seed: int) -> np.ndarray:
    """Every code, or every tuple of codes; some of them and the ends where they are too many."""
    size, streams = q.codebook_size, q.streams
    if size**streams <= _ENUMERATED:
        codes = np.unravel_index(np.arange(size**streams), (size,) * streams)
        codes = np.stack(codes, axis=-1)
    else:
        codes = np.random.default_rng(seed).integers(0, size, (_RANDOM_CODES, streams))
        codes[:2] = [[0], [size - 1]]
    return (codes[:, 0] if ndim == 1 else codes).astype(np.int32)


# What is compared.


def _require(right: Any, what: str) -> None:
    if not right:
        raise AssertionError(what)


def _require_rows(right: np.ndarray, what: str) -> None:
    """`right` says of each token (and perhaps dimension) whether it is right."""
    wrong = np.flatnonzero(~right.reshape(len(right), -1).all(axis=-1))
    _require(
        not len(wrong), f"{what} at {len(wrong)} of {len(right)} rows, first at row {wrong[:1]}"
    )


def _require_finite(tree: Any, what: str) -> None:
    _require(all(np.isfinite(x).all() for x in _numbers(tree)), f"{what} is not finite")


def _require_zero(tree: Any, what: str) -> None:
    _require(not any(np.asarray(x).any() for x in jax.tree.leaves(tree)), f"{what} is not zero")


def _require_same(ours: Any, theirs: Any, what: str) -> None:
    """Equal structure and equal values; NaN equals NaN."""
    _require(jax.tree.structure(ours) == jax.tree.structure(theirs), f"{what}: another structure")
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        same = a.shape == b.shape and a.dtype == b.dtype
        number = np.issubdtype(a.dtype, np.inexact)
        _require(same and np.array_equal(a, b, equal_nan=number), f"{what}: {_difference(a, b)}")


def _require_close(ours: Any, theirs: Any, what: str) -> None:
    """Equal but for rounding: 1e-5, and that much of the largest number of an array."""
    for a, b in zip(_numbers(ours), _numbers(theirs), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        limit = 1e-5 + 1e-5 * np.abs(b).max(initial=0)
        _require((np.abs(a - b) <= limit).all(), f"{what}: {_difference(a, b)}")


def _difference(a: np.ndarray, b: np.ndarray) -> str:
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype} {a.shape} against {b.dtype} {b.shape}"
    if not a.size:
        return "no difference"
    off = np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))
    place = np.unravel_index(np.argmax(np.nan_to_num(off, nan=np.inf)), a.shape)
    return f"{a[place]} against {b[place]} at {[int(i) for i in place]}"


# The properties of every quantizer.


@_property(_EVERY, "Return float32 latents and loss whatever comes in; cast with keep_rows.")
def _output_has_the_right_shapes_and_types(subject: _Subject, sample: Sample) -> None:
    q, tokens = subject.quantizer, len(sample.keep)
    for dtype in (jnp.float32, jnp.bfloat16):
        out = _call(q, jnp.asarray(sample.latents, dtype), sample.keep)
        for what, array, shape in (
            ("latents", out.latents, (tokens, q.latent_dim)),
            ("loss", out.loss, ()),
        ):
            right = array.shape == shape and array.dtype == jnp.float32
            _require(right, f"{what} of {dtype.__name__} are {array.dtype} {array.shape}")
        types = {str(x.dtype) for x in _numbers(out.statistics)}
        _require(types <= {"float32"}, f"statistics of {dtype.__name__} are {types}")
        if isinstance(q, AbstractDiscreteQuantizer):
            codes = out.codes
            _require(codes is not None, "there are no codes")
            flat = codes.shape == (tokens,) and q.streams == 1
            _require(flat or codes.shape == (tokens, q.streams), f"codes are {codes.shape}")
            _require(codes.dtype == jnp.int32, f"codes are {codes.dtype}")
        else:
            _require(out.codes is None, "a continuous quantizer returns codes")


@_property(
    _EVERY,
    "Start with keep_rows, which selects and does not multiply, and mask every sum with keep.",
)
def _dropped_tokens_contribute_nothing(subject: _Subject, sample: Sample) -> None:
    q, keep, rng = subject.quantizer, sample.keep, np.random.default_rng(sample.seed)
    garbage = rng.choice(_GARBAGE, sample.latents.shape)
    dirty = np.where(keep[:, None], sample.latents, garbage)
    clean = np.where(keep[:, None], sample.latents, np.float32(0))
    for key in _keys(sample):
        how = "without a key" if key is None else "with a key"
        out = _call(q, dirty, keep, key)
        _require_rows(~np.asarray(out.latents).any(axis=-1) | keep, f"{how} a dropped row is kept")
        _require_finite(out, f"{how} the output for inf and NaN in dropped rows")
        _require_same(out, _call(q, clean, keep, key), f"{how} dropped rows change the output")


@_property(
    _EVERY,
    "Start with keep_rows and mask with where before any function that is not finite; where alone "
    "does not stop the gradient of a NaN.",
)
def _dropped_tokens_have_no_gradient(subject: _Subject, sample: Sample) -> None:
    q, keep, rng = subject.quantizer, sample.keep, np.random.default_rng(sample.seed)
    garbage = rng.choice(_GARBAGE, sample.latents.shape)
    weights = _weights(subject, sample)
    dirty, clean = (
        _gradients(q, np.where(keep[:, None], sample.latents, x), keep, weights, _ONE, _ONE)
        for x in (garbage, np.float32(0))
    )
    _require_rows(~np.asarray(dirty[0]).any(axis=-1) | keep, "a dropped row has a gradient")
    _require_finite(dirty, "the gradient for inf and NaN in dropped rows")
    _require_same(dirty, clean, "dropped rows change the gradient")


@_property(_EVERY, "Work on each token by itself; what needs others belongs into statistics.")
def _tokens_do_not_see_each_other(subject: _Subject, sample: Sample) -> None:
    """Tokens in another order, with other tokens dropped among them, give the same."""
    q, keep, rng = subject.quantizer, sample.keep, np.random.default_rng(sample.seed)
    order = rng.permutation(len(keep))
    other = rng.normal(size=sample.latents.shape).astype(np.float32)
    others = np.where(keep[:, None], sample.latents, other)
    out, moved = _call(q, sample.latents, keep), _call(q, others[order], keep[order])
    latents = np.asarray(out.latents)[order]
    _require_rows(latents == np.asarray(moved.latents), "latents in another order differ")
    if out.codes is not None:
        same = (np.asarray(out.codes)[order] == np.asarray(moved.codes)).reshape(len(keep), -1)
        _require_rows(same.all(axis=-1) | ~keep[order], "codes in another order differ")
    for what in ("loss", "statistics"):
        ours, theirs = getattr(moved, what), getattr(out, what)
        _require_close(ours, theirs, f"{what} in another order")
    fewer = keep & (rng.random(len(keep)) < 0.5)
    alone = np.asarray(_call(q, sample.latents, fewer).latents)
    same = (alone == np.asarray(out.latents)).all(axis=-1)
    _require_rows(same | ~fewer, "latents differ where others are dropped")


@_property(
    _EVERY,
    "Use straight_through, or pass gradient=, a formula, if it is not straight-through.",
)
def _gradient_is_as_given(subject: _Subject, sample: Sample) -> None:
    cotangent = _weights(subject, sample)
    z, c = sample.latents.astype(np.float64), cotangent.astype(np.float64)
    if subject.gradient is not None:
        expected = subject.gradient(z, c)
    elif not isinstance(subject.quantizer, AbstractDiscreteQuantizer):
        return
    else:
        bounded = jax.eval_shape(subject.quantizer.bound, jnp.asarray(sample.latents))
        straight = bounded.shape == cotangent.shape
        _require(straight, f"bound makes {bounded.shape} and what comes out is {cotangent.shape}")
        expected = np.asarray(
            _pull_bound(subject.quantizer, jnp.asarray(z, jnp.float32), cotangent)
        )
    expected = np.where(sample.keep[:, None], expected, 0)
    ours = np.asarray(_pull(subject.quantizer, jnp.asarray(sample.latents), sample.keep, cotangent))
    right = ours.shape == expected.shape
    _require(right, f"it is {ours.shape} and gradient gives {expected.shape}")
    limit = 1e-5 + 1e-4 * np.abs(expected).max(axis=-1, keepdims=True)
    off = np.abs(ours - expected)
    _require((off <= limit).all(), f"{_difference(ours.astype(np.float64), expected)}")


@_property(_EVERY, "Use nothing that depends on the batch, and axes counted from the end.")
def _vmap_equals_a_loop(subject: _Subject, sample: Sample) -> None:
    q, z, keep = subject.quantizer, sample.latents, sample.keep
    latents = np.stack([z, z[::-1], z / 2])
    keeps = np.stack([keep, keep[::-1], ~keep])
    for key in _keys(sample):
        keys = None if key is None else jax.random.split(key, 3)
        together = _batched_call(q, latents, keeps, keys)
        for i in range(3):
            one = _call(q, latents[i], keeps[i], None if keys is None else keys[i])
            picked = jax.tree.map(lambda leaf, i=i: leaf[i], together)
            _same_result(picked, one, f"example {i} of 3")


@_property(_EVERY, "Branch on shapes and static fields alone, and round before you compare.")
def _jit_equals_eager(subject: _Subject, sample: Sample) -> None:
    q, latents, keep = subject.quantizer, jnp.asarray(sample.latents), jnp.asarray(sample.keep)
    for key in _keys(sample):
        eager, compiled = q(latents, keep, key=key), _call(q, latents, keep, key)
        _same_result(compiled, eager, "compiled against eager")


def _same_result(ours: Any, theirs: Any, what: str) -> None:
    _require(jax.tree.structure(ours) == jax.tree.structure(theirs), f"{what}: another structure")
    if ours.codes is not None:
        _require_same(ours.codes, theirs.codes, f"codes of {what}")
        _require_same(ours.latents, theirs.latents, f"latents of {what}")
    for part in ("latents", "loss", "statistics"):
        _require_close(getattr(ours, part), getattr(theirs, part), f"{part} of {what}")


@_property(
    _EVERY,
    "Return sums over kept tokens and not means, and mask them with keep: then they add up over "
    "tokens, examples and devices.",
)
def _sums_are_additive_over_tokens(subject: _Subject, sample: Sample) -> None:
    q, z, keep = subject.quantizer, sample.latents, sample.keep
    first = np.random.default_rng(sample.seed).random(len(keep)) < 0.5
    whole, a, b = (_call(q, z, k) for k in (keep, keep & first, keep & ~first))
    for what in ("latents", "loss", "statistics"):
        parts = jax.tree.map(lambda x, y: x + y, getattr(a, what), getattr(b, what))
        _require_close(getattr(whole, what), parts, f"{what} against two parts' sum")
    weights = _weights(subject, sample)
    whole, a, b = (
        _gradients(q, z, k, weights, _ONE, _ZERO) for k in (keep, keep & first, keep & ~first)
    )
    parts = jax.tree.map(lambda x, y: x + y, a, b)
    for what, ours, theirs in zip(("latents", "the arrays"), whole, parts, strict=True):
        _require_close(ours, theirs, f"the gradient of {what} against two parts' sum")


@_property(
    _EVERY, "Divide by nothing that can be 0, also in the gradient: select a safe divisor first."
)
def _constants_are_finite(subject: _Subject, sample: Sample) -> None:
    q, keep = subject.quantizer, sample.keep
    for value in _CONSTANTS:
        z = np.full(sample.latents.shape, value, np.float32)
        out = _call(q, z, keep)
        results = {
            "output": out,
            "batch_loss or update": _batch(q, out.statistics),
            "gradient": _gradients(q, z, keep, _weights(subject, sample), _ONE, _ONE),
        }
        for what, result in results.items():
            _require_finite(result, f"the {what} for latents that are all {value}")


@_property(_EVERY, "Let a batch without kept tokens through: where(count > 0, new, old).")
def _nothing_kept_changes_nothing(subject: _Subject, sample: Sample) -> None:
    q, keep = subject.quantizer, np.zeros_like(sample.keep)
    z = np.full(sample.latents.shape, np.nan, np.float32)
    out = _call(q, z, keep)
    _require_zero((out.latents, out.loss, out.statistics), "the output for no kept token")
    loss, updated = _batch(q, out.statistics)
    _require_zero(loss, "batch_loss for no kept token")
    ours, theirs = (eqx.filter(x, eqx.is_array) for x in (updated, q))
    _require_same(ours, theirs, "update for no kept token")
    _require_zero(_gradients(q, z, keep, _weights(subject, sample), _ONE, _ONE), "the gradient")


@_property(_EVERY, "Change arrays with eqx.tree_at, and keep their shapes and types.")
def _update_keeps_the_structure(subject: _Subject, sample: Sample) -> None:
    q = subject.quantizer
    statistics = _call(q, sample.latents, sample.keep).statistics
    _, updated = _batch(q, statistics)
    _require(jax.tree.structure(updated) == jax.tree.structure(q), "update: another structure")
    arrays = (jax.tree.leaves(eqx.filter(x, eqx.is_array)) for x in (updated, q))
    for new, old in zip(*arrays, strict=True):
        same = (new.shape, new.dtype) == (old.shape, old.dtype)
        _require(same, f"update makes {old.dtype} {old.shape} to {new.dtype} {new.shape}")


@_property(_EVERY, "Return jax.tree.map(mark, self), with a Python bool for each leaf.")
def _trainable_marks_the_structure(subject: _Subject, sample: Sample) -> None:
    del sample
    marks = subject.quantizer.trainable()
    same = jax.tree.structure(marks) == jax.tree.structure(subject.quantizer)
    _require(same, "trainable: another structure")
    others = [mark for mark in jax.tree.leaves(marks) if not isinstance(mark, bool)]
    _require(not others, f"trainable has {others[:1]}")
    for mark, leaf in zip(jax.tree.leaves(marks), jax.tree.leaves(subject.quantizer), strict=True):
        _require(not mark or eqx.is_inexact_array(leaf), f"trainable marks {leaf}")


@_property(_EVERY, "Use stop_gradient where a frozen array enters, or mark it as trainable.")
def _frozen_arrays_get_no_gradient(subject: _Subject, sample: Sample) -> None:
    q = subject.quantizer
    # Statistics are left out: they are differentiated only through batch_loss.
    gradients = _gradients(q, sample.latents, sample.keep, _weights(subject, sample), _ZERO, _ONE)[
        1
    ]
    _, frozen = eqx.partition(gradients, q.trainable())
    for path, gradient in jax.tree_util.tree_leaves_with_path(frozen):
        _require_zero(gradient, f"the gradient of {jax.tree_util.keystr(path)}")


@_property(_EVERY, "Let NaN come through, as straight_through does: a diverged encoder must show.")
def _kept_nan_is_visible(subject: _Subject, sample: Sample) -> None:
    q, keep = subject.quantizer, np.ones_like(sample.keep)
    row = int(np.random.default_rng(sample.seed).integers(len(keep)))
    z = np.array(sample.latents)
    z[row] = np.nan
    latents = np.asarray(_call(q, z, keep).latents)
    _require(np.isnan(latents[row]).all(), f"NaN at row {row} gives {latents[row]}")
    others = np.arange(len(keep)) != row
    clean = np.asarray(_call(q, sample.latents, keep).latents)
    _require_same(latents[others], clean[others], f"other rows than {row}, which is NaN")


@_property(_EVERY, "Define bits_per_token: streams * log2(codebook_size), None if continuous.")
def _bits_per_token_fit_the_codes(subject: _Subject, sample: Sample) -> None:
    del sample
    q = subject.quantizer
    if isinstance(q, AbstractDiscreteQuantizer):
        expected = math.log2(q.codebook_size**q.streams)
        right = q.bits_per_token is not None and math.isclose(q.bits_per_token, expected)
        _require(right, f"{q.bits_per_token} for {q.streams} codes of {q.codebook_size}")
    else:
        _require(q.bits_per_token is None, f"{q.bits_per_token} for a continuous quantizer")


@_property(_EVERY, "Raise ValueError that names input_dim, before anything else.")
def _wrong_width_is_refused(subject: _Subject, sample: Sample) -> None:
    width = subject.quantizer.input_dim
    for wrong in (width + 1, width - 1):
        try:
            subject.quantizer(jnp.zeros((len(sample.keep), wrong)), jnp.asarray(sample.keep))
        except ValueError as error:
            _require(str(width) in str(error), f"the error for a width of {wrong} is {error}")
        except Exception as error:
            raise AssertionError(f"a width of {wrong} raises {type(error).__name__}") from error
        else:
            raise AssertionError(f"latents of width {wrong} are taken for {width}")


# The properties of quantizers with codes.


@_property(_DISCRETE, "Clip before the cast to int32, and let no NaN through to an index.")
def _codes_are_in_range_for_any_float(subject: _Subject, sample: Sample) -> None:
    q, rng = subject.quantizer, np.random.default_rng(sample.seed)
    z = _any_floats(rng, sample.latents.shape)
    latents = _any_floats(rng, (len(z), q.latent_dim))
    for what, codes in (
        ("codes", _call(q, z, np.ones_like(sample.keep)).codes),
        ("codes", _call(q, z, sample.keep).codes),
        ("to_codes", _to_codes(q, latents)),
    ):
        low, high = np.min(codes), np.max(codes)
        _require(low >= 0, f"{what} has {low}")
        _require(high < q.codebook_size, f"{what} has {high} of {q.codebook_size}")


def _any_floats(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Any float32 there is, and often the special ones."""
    bits = rng.integers(0, 2**32, shape, dtype=np.uint32).view(np.float32)
    special = rng.choice(np.append(_GARBAGE, np.array([0, 1e-40], np.float32)), shape)
    return np.where(rng.random(shape) < 0.5, bits, special)


@_property(_DISCRETE, "Return straight_through(self.from_codes(codes), latents).")
def _codes_name_the_latents(subject: _Subject, sample: Sample) -> None:
    q = subject.quantizer
    narrow = jnp.asarray(sample.latents, jnp.bfloat16)
    for how, out in (
        ("float32", _call(q, sample.latents, sample.keep)),
        ("float32 with a key", _call(q, sample.latents, sample.keep, _keys(sample)[1])),
        ("bfloat16", _call(q, narrow, sample.keep)),
    ):
        points = np.asarray(_from_codes(q, out.codes))
        right = (np.asarray(out.latents) == points).all(axis=-1) | ~sample.keep
        _require_rows(right, f"from_codes of the codes of {how} is not what came out")


@_property(
    _DISCRETE,
    "The compiler may fuse a product and a sum, and sum in another order: build the points of "
    "lookups, or of sums and products that are exact.",
)
def _points_have_the_same_bits_in_every_program(subject: _Subject, sample: Sample) -> None:
    q = subject.quantizer
    codes = jnp.asarray(_call(q, sample.latents, sample.keep).codes)
    points = np.asarray(_from_codes(q, codes))
    _require_same(np.asarray(q.from_codes(codes)), points, "eager")
    _require_same(np.asarray(_from_codes(q, codes[:1])), points[:1], "for one token")
    _require_same(np.asarray(_from_codes_of_each(q, codes)), points, "in a batch of one token each")
    added = points + np.float32(1)
    _require_same(np.asarray(_from_codes_and_one(q, codes)), added, "with 1 added")


@eqx.filter_jit
def _from_codes_of_each(q: Any, codes: Any) -> Any:
    return jax.vmap(lambda code: q.from_codes(code[None])[0])(codes)


@eqx.filter_jit
def _from_codes_and_one(q: Any, codes: Any) -> Any:
    return q.from_codes(codes) + 1


@_property(
    _EXACT, "Let to_codes invert from_codes, or pass exact=False if it is a guess by design."
)
def _codes_survive_the_round_trip(subject: _Subject, sample: Sample) -> None:
    q = subject.quantizer
    out = _call(q, sample.latents, sample.keep)
    again = np.asarray(_to_codes(q, out.latents)).reshape(len(sample.keep), -1)
    right = (again == np.asarray(out.codes).reshape(again.shape)).all(axis=-1) | ~sample.keep
    _require_rows(right, "to_codes of the output's latents is not the output's codes")
    codes = _all_codes(q, out.codes.ndim, sample.seed)
    again = np.asarray(_to_codes(q, _from_codes(q, codes)))
    _require(again.shape == codes.shape, f"to_codes gives {again.shape} for {codes.shape}")
    _require_rows(again == codes, "to_codes(from_codes(codes)) is not codes")


@_property(
    _NEAREST, "Compare with every point in float32, or pass nearest=False if it is not meant to be."
)
def _codes_are_those_of_the_nearest_point(subject: _Subject, sample: Sample) -> None:
    q = subject.quantizer
    rng = np.random.default_rng(sample.seed)
    z = rng.uniform(-2, 2, (len(sample.keep), q.latent_dim)).astype(np.float32)
    codes = _to_codes(q, z)
    book = np.asarray(_from_codes(q, _all_codes(q, codes.ndim, sample.seed)), np.float64)
    chosen = np.sum((np.asarray(_from_codes(q, codes), np.float64) - z) ** 2, axis=-1)
    for row, (latent, ours) in enumerate(zip(z.astype(np.float64), chosen, strict=True)):
        best = np.sum((book - latent) ** 2, axis=-1).min()
        _require(ours <= best + 1e-5, f"at row {row}, {ours} away where {best} is possible")
