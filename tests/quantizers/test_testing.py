"""The checks for quantizers of one's own: they pass what is right, and each of them can fail."""

import os
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastictok.quantizers import (
    BSQ,
    FSQ,
    LFQ,
    VQ,
    AbstractDiscreteQuantizer,
    GaussianVAE,
    Identity,
    Projected,
    QuantizerOutput,
    Residual,
    RotationTrick,
    straight_through,
)
from elastictok.quantizers.testing import (
    check_quantizer,
    elementwise,
    properties,
    random_samples,
    unchanged,
)

DIM = 3


class Right(AbstractDiscreteQuantizer):
    """A bit per dimension, with everything that a quantizer can have: an array that is trained,
    one that is updated, a loss, statistics and a loss of the batch.
    """

    scale: jax.Array = eqx.field(default_factory=lambda: jnp.ones(DIM))
    seen: jax.Array = eqx.field(default_factory=lambda: jnp.ones(()))

    @property
    def latent_dim(self):
        return DIM

    @property
    def codebook_size(self):
        return 2**DIM

    def to_codes(self, latents):
        return jnp.sum((latents >= 0) * 2 ** np.arange(DIM), axis=-1, dtype=jnp.int32)

    def from_codes(self, codes):
        bits = codes[:, None] >> np.arange(DIM) & 1
        return jnp.where(bits == 1, self.scale, -self.scale)

    def codes(self, bounded):
        return self.to_codes(jax.lax.stop_gradient(bounded))

    def latents(self, points, bounded):
        return straight_through(points, bounded)

    def loss(self, points, bounded, keep):
        distances = jnp.sum((bounded - points) ** 2, axis=-1)
        return jnp.sum(jnp.where(keep, distances, 0.0))

    def quantize(self, bounded, keep, *, key=None):
        codes = self.codes(bounded)
        points = self.from_codes(codes)
        count = jnp.sum(keep, dtype=jnp.float32)
        loss = self.loss(points, bounded, keep)
        return QuantizerOutput(self.latents(points, bounded), codes, loss, count)

    def batch_loss(self, statistics):
        return jnp.where(statistics > 0, 1 / jnp.maximum(statistics, 1), 0.0)

    def update(self, statistics):
        return eqx.tree_at(lambda q: q.seen, self, self.seen + statistics)

    def trainable(self):
        return eqx.tree_at(lambda q: (q.scale, q.seen), self, (True, False))


class NarrowCodes(Right):
    def codes(self, bounded):
        return self.to_codes(jax.lax.stop_gradient(bounded)).astype(jnp.int16)


class KeptRows(Right):
    """Dropped rows come out as the points of zero."""

    def __call__(self, latents, keep, *, key=None):
        latents = jnp.where(keep[:, None], latents, 0).astype(jnp.float32)
        return self.quantize(latents, keep, key=key)


class UnsafeWhere(Right):
    """The value of the loss is masked, and so its gradient is 0 times infinity."""

    def __call__(self, latents, keep, *, key=None):
        clean = jnp.where(keep[:, None], latents, 0).astype(jnp.float32)
        out = self.quantize(clean, keep, key=key)
        extra = jnp.sum(jnp.where(keep[:, None], latents.astype(jnp.float32) ** 2, 0))
        kept = jnp.where(keep[:, None], out.latents, 0)
        return QuantizerOutput(kept, out.codes, out.loss + extra, out.statistics)


class Positions(Right):
    def codes(self, bounded):
        return self.to_codes(
            jax.lax.stop_gradient(bounded) + 0.3 * jnp.arange(len(bounded))[:, None]
        )


class Centred(Right):
    def quantize(self, bounded, keep, *, key=None):
        count = jnp.maximum(jnp.sum(keep), 1)
        mean = jnp.sum(jnp.where(keep[:, None], bounded, 0), axis=0) / count
        codes = self.to_codes(jax.lax.stop_gradient(bounded - mean))
        points = self.from_codes(codes)
        latents = self.latents(points, bounded)
        return QuantizerOutput(latents, codes, jnp.zeros(()), jnp.sum(keep, dtype=jnp.float32))


class Doubled(Right):
    def latents(self, points, bounded):
        return straight_through(points, 2 * bounded)


@jax.custom_batching.custom_vmap
def _spoilt_by_vmap(codes):
    return codes


@_spoilt_by_vmap.def_vmap
def _spoil(axis_size, in_batched, codes):
    return codes ^ 1, in_batched[0]


class Batched(Right):
    def codes(self, bounded):
        return _spoilt_by_vmap(self.to_codes(jax.lax.stop_gradient(bounded)))


class Traced(Right):
    def codes(self, bounded):
        codes = self.to_codes(jax.lax.stop_gradient(bounded))
        return codes ^ 1 if isinstance(bounded, jax.core.Tracer) else codes


class Mean(Right):
    def loss(self, points, bounded, keep):
        distances = jnp.sum((bounded - points) ** 2, axis=-1)
        return jnp.sum(jnp.where(keep, distances, 0.0)) / jnp.maximum(jnp.sum(keep), 1)


class Overflow(Right):
    def loss(self, points, bounded, keep):
        return jnp.sum(jnp.where(keep[:, None], jnp.exp(bounded), 0.0))


class LossOfNothing(Right):
    def batch_loss(self, statistics):
        return 1 / jnp.maximum(statistics, 1)


class Reshaped(Right):
    def update(self, statistics):
        return eqx.tree_at(lambda q: q.seen, self, self.seen[None])


class OneMark(Right):
    def trainable(self):
        return True


class Unmarked(Right):
    def trainable(self):
        return jax.tree.map(lambda _: False, self)


class Hidden(Right):
    def bound(self, latents):
        return jnp.nan_to_num(latents)


class Bits(Right):
    @property
    def bits_per_token(self):
        return DIM + 0.5


class AnyWidth(Right):
    def __call__(self, latents, keep, *, key=None):
        latents = jnp.where(keep[:, None], latents[:, :DIM], 0).astype(jnp.float32)
        out = self.quantize(latents, keep, key=key)
        kept = jnp.where(keep[:, None], out.latents, 0)
        return QuantizerOutput(kept, out.codes, out.loss, out.statistics)


class Escaping(Right):
    def to_codes(self, latents):
        escape = jnp.isnan(latents).any(axis=-1) * 2**DIM
        return escape + jnp.sum((latents >= 0) * 2 ** np.arange(DIM), axis=-1, dtype=jnp.int32)


class RoundedAway(Right):
    """The usual formula, which is off by a rounding error."""

    scale: jax.Array = eqx.field(default_factory=lambda: jnp.full(DIM, 0.7))

    def latents(self, points, bounded):
        return bounded + jax.lax.stop_gradient(points - bounded)


class SizesMatter(Right):
    def from_codes(self, codes):
        bits = codes[:, None] >> np.arange(DIM) & 1
        return jnp.where(bits == 1, self.scale, -self.scale) * (1.5 if len(codes) == 1 else 1)


class Backwards(Right):
    def to_codes(self, latents):
        return jnp.sum((latents >= 0) * 2 ** np.arange(DIM)[::-1], axis=-1, dtype=jnp.int32)


class OffCentre(Right):
    def to_codes(self, latents):
        return jnp.sum((latents >= 0.5) * 2 ** np.arange(DIM), axis=-1, dtype=jnp.int32)


# What each fails, first the property that it is meant for.
WRONG = [
    (NarrowCodes, ["output_has_the_right_shapes_and_types"]),
    (
        KeptRows,
        [
            "dropped_tokens_contribute_nothing",
            "nothing_kept_changes_nothing",
            "sums_are_additive_over_tokens",
        ],
    ),
    (
        UnsafeWhere,
        [
            "dropped_tokens_have_no_gradient",
            "nothing_kept_changes_nothing",
        ],
    ),
    (Positions, ["tokens_do_not_see_each_other"]),
    (
        Centred,
        [
            "tokens_do_not_see_each_other",
            "kept_nan_is_visible",
            "sums_are_additive_over_tokens",
        ],
    ),
    (Doubled, ["gradient_is_as_given"]),
    (Batched, ["vmap_equals_a_loop"]),
    (Traced, ["jit_equals_eager"]),
    (Mean, ["sums_are_additive_over_tokens"]),
    (Overflow, ["constants_are_finite"]),
    (LossOfNothing, ["nothing_kept_changes_nothing"]),
    (Reshaped, ["update_keeps_the_structure", "nothing_kept_changes_nothing"]),
    (OneMark, ["trainable_marks_the_structure"]),
    (Unmarked, ["frozen_arrays_get_no_gradient"]),
    (Hidden, ["kept_nan_is_visible"]),
    (Bits, ["bits_per_token_fit_the_codes"]),
    (AnyWidth, ["wrong_width_is_refused"]),
    (Escaping, ["codes_are_in_range_for_any_float"]),
    (RoundedAway, ["codes_name_the_latents"]),
    (SizesMatter, ["points_have_the_same_bits_in_every_program"]),
    (Backwards, ["codes_survive_the_round_trip", "codes_are_those_of_the_nearest_point"]),
    (OffCentre, ["codes_are_those_of_the_nearest_point"]),
]
wrong = pytest.mark.parametrize(
    ("kind", "failing"), WRONG, ids=[kind.__name__ for kind, _ in WRONG]
)


def try_all(check):
    for sample in random_samples(DIM):
        check(sample)


def test_a_right_quantizer_passes():
    check_quantizer(Right())


@wrong
def test_a_wrong_quantizer_is_found(kind, failing):
    check = properties(kind())[failing[0]]
    message = f"{kind.__name__} fails {failing[0]}: .*\\. [A-Z].* \\(seed of the sample: "
    with pytest.raises(AssertionError, match=message):
        try_all(check)


@pytest.mark.heavy
@wrong
def test_a_wrong_quantizer_fails_nothing_else(kind, failing):
    found = []
    for name, check in properties(kind()).items():
        try:
            try_all(check)
        except AssertionError:
            found.append(name)
    assert sorted(found) == sorted(failing)


def test_each_property_has_a_quantizer_that_fails_it():
    assert {failing[0] for _, failing in WRONG} == set(properties(Right()))


def test_check_quantizer_runs_every_property():
    with pytest.raises(AssertionError, match="OffCentre fails codes_are_those_of_the_nearest"):
        check_quantizer(OffCentre())
    check_quantizer(OffCentre(), nearest=False)
    with pytest.raises(AssertionError, match="Doubled fails gradient_is_as_given"):
        check_quantizer(Doubled(), samples=random_samples(DIM, tokens=4, n=1))
    check_quantizer(Doubled(), gradient=elementwise(lambda z: 2 + 0 * z))


def test_the_gradient_is_straight_through_unless_a_formula_is_given():
    sample = random_samples(6, n=1)[0]
    for quantizer in (FSQ((8, 8, 8, 5, 5, 5)), BSQ(6), LFQ(6), GaussianVAE(3)):
        properties(quantizer)["gradient_is_as_given"](sample)
    rotated = VQ(8, 6, key=jax.random.key(0), estimator=RotationTrick())
    projected = Projected(6, LFQ(3), 4, key=jax.random.key(0))
    for quantizer in (rotated, projected):
        with pytest.raises(AssertionError, match="or pass gradient="):
            properties(quantizer)["gradient_is_as_given"](sample)


def test_what_is_not_claimed_is_not_asked():
    exact, near = "codes_survive_the_round_trip", "codes_are_those_of_the_nearest_point"
    assert {exact, near} <= set(properties(LFQ(2)))
    assert exact not in properties(LFQ(2), exact=False)
    assert near not in properties(LFQ(2), nearest=False)
    assert not {"codes_name_the_latents", exact, near} & set(properties(GaussianVAE(2)))
    assert set(properties(Identity(2))) < set(properties(Residual(FSQ((3, 3)), 2)))


def test_samples_are_what_they_say():
    samples = random_samples(5, tokens=7, n=6, seed=3)
    assert len(samples) == 6
    for sample, again in zip(samples, random_samples(5, tokens=7, n=6, seed=3), strict=True):
        assert sample.latents.shape == (7, 5)
        assert sample.latents.dtype == np.float32
        np.testing.assert_array_equal(sample.latents, again.latents)
        np.testing.assert_array_equal(sample.keep, again.keep)
        assert sample.seed == again.seed
    assert samples[0].keep.all()
    assert samples[1].keep.sum() == 6
    assert len({sample.seed for sample in samples}) == 6
    np.testing.assert_array_equal(unchanged(np.zeros(2), np.ones(2)), np.ones(2))


def test_it_needs_no_test_framework():
    program = """if True:
        import sys
        sys.modules.update(dict.fromkeys(["pytest", "hypothesis", "scipy"]))
        from elastictok.quantizers import LFQ
        from elastictok.quantizers.testing import check_quantizer

        check_quantizer(LFQ(2))
    """
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
