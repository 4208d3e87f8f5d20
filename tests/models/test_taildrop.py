import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictok.models import (
    ConditionDropout,
    FixedDrop,
    InformationDrop,
    LogUniformDrop,
    PowerOfTwoDrop,
    UniformDrop,
    WithFull,
)


def expected_at(share, low, high):
    """Chances of InformationDrop's lengths low to high, from the distribution function of u^a."""
    edges = np.arange(high - low + 2) / (high - low + 1)
    return np.diff(edges ** (share / (1 - share)))


def assert_drawn(lengths, chances, low):
    """Chi-square by its normal approximation: five standard deviations, and nothing elsewhere."""
    lengths, chances = np.asarray(lengths), np.asarray(chances, np.float64)
    counts = np.bincount(lengths, minlength=low + len(chances))
    assert counts[:low].sum() == 0
    counts = counts[low:]
    assert len(counts) == len(chances)
    assert counts[chances == 0].sum() == 0
    expected = (len(lengths) * chances)[chances > 0]
    square = np.sum((counts[chances > 0] - expected) ** 2 / expected)
    degrees = len(expected) - 1
    assert square < degrees + 5 * np.sqrt(2 * degrees) + 10


@given(seed=st.integers(0, 1000), low=st.integers(1, 5), width=st.integers(0, 8))
def test_lengths_stay_within_their_bounds(seed, low, width):
    errors = jnp.asarray(np.random.default_rng(seed).exponential(1.0, 64), jnp.float32)
    for policy in (
        UniformDrop(),
        LogUniformDrop(),
        PowerOfTwoDrop(),
        FixedDrop(3),
        WithFull(UniformDrop(), 0.5),
        InformationDrop().informed(errors),
        InformationDrop(0.9).informed(1000 * errors),
    ):
        lengths = np.asarray(policy(jax.random.key(seed), 64, low, low + width))
        assert lengths.shape == (64,)
        assert lengths.dtype == np.int32
        assert low <= lengths.min()
        assert lengths.max() <= low + width


def test_uniform_drop_draws_every_length_equally_often():
    lengths = np.asarray(UniformDrop()(jax.random.key(0), 40_000, 4, 11))
    counts = np.bincount(lengths, minlength=12)[4:]
    assert len(counts) == 8
    # Five standard deviations of a binomial count around 5000.
    assert np.abs(counts - 5000).max() < 5 * np.sqrt(40_000 * 1 / 8 * 7 / 8)


def test_log_uniform_drop_draws_every_octave_equally_often():
    lengths = np.asarray(LogUniformDrop()(jax.random.key(0), 40_000, 4, 63))
    octaves = np.bincount(np.floor(np.log2(lengths)).astype(int), minlength=6)[2:]
    assert len(octaves) == 4
    assert np.abs(octaves - 10_000).max() < 5 * np.sqrt(40_000 * 1 / 4 * 3 / 4)


@pytest.mark.parametrize(
    ("low", "high", "lengths"),
    [
        (4, 64, {4, 8, 16, 32, 64}),
        (5, 50, {5, 8, 16, 32, 50}),
        (1, 6, {1, 2, 4, 6}),
        (33, 63, {33, 63}),
        (31, 33, {31, 32, 33}),
        (16, 16, {16}),
        (7, 7, {7}),
    ],
)
def test_power_of_two_drop_draws_its_lengths_equally_often(low, high, lengths):
    drawn = PowerOfTwoDrop()(jax.random.key(high), 20_000, low, high)
    chances = np.array([n in lengths for n in range(low, high + 1)]) / len(lengths)
    assert_drawn(drawn, chances, low)


@pytest.mark.parametrize("error", [0.0, 0.2, 1.0, 1.7, 50.0])
def test_information_drop_draws_from_its_formula(error):
    count, low, high = 40_000, 4, 19
    policy = InformationDrop(0.4).informed(jnp.full(count, error))
    share = np.clip(0.4 * error, 0.1, 0.9)
    lengths = policy(jax.random.key(1), count, low, high)
    assert_drawn(lengths, expected_at(share, low, high), low)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_the_share_is_what_an_ordinary_block_keeps_in_the_mean(share):
    count, tokens = 40_000, 1000  # so many that rounding down does not show
    lengths = InformationDrop(share).informed(jnp.ones(count))(jax.random.key(2), count, 1, tokens)
    assert np.asarray(lengths).mean() / tokens == pytest.approx(share, abs=0.01)


def test_equal_errors_at_a_share_of_a_half_are_uniform_drop():
    for seed, low, high in ((0, 1, 4), (1, 4, 64), (2, 7, 130)):
        policy = InformationDrop(0.5).informed(jnp.ones(30_000))
        lengths = policy(jax.random.key(seed), 30_000, low, high)
        assert_drawn(lengths, np.full(high - low + 1, 1 / (high - low + 1)), low)


@given(seed=st.integers(0, 1000), share=st.floats(0.1, 0.9), harder=st.floats(1.01, 30))
def test_a_harder_block_never_keeps_fewer_tokens(seed, share, harder):
    """With the same random number."""
    errors = jnp.asarray(np.random.default_rng(seed).exponential(1.0, 64), jnp.float32)
    draw = [
        np.asarray(InformationDrop(share).informed(x)(jax.random.key(seed), 64, 3, 40))
        for x in (errors, harder * errors)
    ]
    assert (draw[0] <= draw[1]).all()


def test_information_drop_knows_what_it_was_told_and_no_more():
    policy = InformationDrop(0.5, probe=0.25)
    assert policy.probe == 0.25
    with pytest.raises(ValueError, match=r"3 blocks and knows none; ask policy\.informed"):
        policy(jax.random.key(0), 3, 1, 8)
    with pytest.raises(ValueError, match="errors of 3 blocks and knows those of 2"):
        policy.informed(jnp.ones(2))(jax.random.key(0), 3, 1, 8)
    with pytest.raises(ValueError, match=r"share is 0\.01; it must be between 0\.1 and 0\.9"):
        InformationDrop(0.01)
    for probe in (0.0, 1.1):
        with pytest.raises(ValueError, match=f"probe is {probe}; it must be more than 0"):
            InformationDrop(probe=probe)


def test_wrapped_information_drop_is_still_one():
    policy = WithFull(ConditionDropout(InformationDrop(0.5, probe=0.75), 0.5), 0.25)
    assert policy.probe == 0.75
    told = policy.informed(jnp.full(40_000, 0.5))
    assert isinstance(told, WithFull)
    assert told.share == 0.25
    lengths = told(jax.random.key(0), 40_000, 1, 16)
    chances = 0.75 * expected_at(0.25, 1, 16) + 0.25 * (np.arange(1, 17) == 16)
    assert_drawn(lengths, chances, 1)


@pytest.mark.parametrize("policy", [UniformDrop(), PowerOfTwoDrop(), WithFull(FixedDrop(5), 0.5)])
def test_other_policies_need_no_errors(policy):
    assert policy.probe is None
    assert policy.informed(jnp.ones(3)) == policy


def test_fixed_drop_is_clipped_to_what_the_block_has():
    assert set(np.asarray(FixedDrop(40)(jax.random.key(0), 3, 2, 16))) == {16}
    with pytest.raises(ValueError, match="length is 0"):
        FixedDrop(0)


def test_with_full_keeps_all_tokens_of_its_share_and_the_inner_lengths_elsewhere():
    lengths = np.asarray(WithFull(FixedDrop(5), 0.25)(jax.random.key(0), 10_000, 4, 16))
    assert set(lengths) == {5, 16}
    assert abs((lengths == 16).sum() - 2500) < 5 * np.sqrt(10_000 * 0.25 * 0.75)
    with pytest.raises(ValueError, match=r"share is 1.5"):
        WithFull(UniformDrop(), 1.5)


def test_condition_dropout_draws_the_inner_lengths_and_tells_its_share_that_all_are_kept():
    inner = WithFull(UniformDrop(), 0.1)
    key = jax.random.key(0)
    policy = ConditionDropout(inner, 0.25)
    lengths = policy(key, 10_000, 4, 16)
    told = np.asarray(policy.told(key, lengths, 16))
    short = np.asarray(lengths) < 16
    assert set(told[told != np.asarray(lengths)]) == {16}
    silent = (told[short] == 16).sum()
    assert abs(silent - 0.25 * short.sum()) < 5 * np.sqrt(short.sum() * 0.25 * 0.75)
    # Neither depends on the other: short lengths are as often kept from the encoder as long ones.
    few = np.asarray(lengths) < 8
    assert abs((told[few] == 16).sum() - 0.25 * few.sum()) < 5 * np.sqrt(few.sum() * 0.25 * 0.75)
    counts = np.bincount(np.asarray(lengths)[short], minlength=16)[4:16]
    assert np.abs(counts - 750).max() < 5 * np.sqrt(750)
    with pytest.raises(ValueError, match=r"share is -0.5"):
        ConditionDropout(inner, -0.5)


@pytest.mark.parametrize("policy", [UniformDrop(), FixedDrop(5), WithFull(UniformDrop(), 0.5)])
def test_other_policies_tell_the_encoder_what_is_kept(policy):
    lengths = policy(jax.random.key(1), 50, 4, 16)
    np.testing.assert_array_equal(policy.told(jax.random.key(1), lengths, 16), lengths)


def test_wrapped_condition_dropout_is_still_one():
    policy = WithFull(ConditionDropout(FixedDrop(5), 1.0), 0.0)
    lengths = policy(jax.random.key(1), 50, 4, 16)
    assert set(np.asarray(lengths)) == {5}
    assert set(np.asarray(policy.told(jax.random.key(1), lengths, 16))) == {16}
