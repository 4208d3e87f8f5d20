import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictok.models import ConditionDropout, FixedDrop, LogUniformDrop, UniformDrop, WithFull


@given(seed=st.integers(0, 1000), low=st.integers(1, 5), width=st.integers(0, 8))
def test_lengths_stay_within_their_bounds(seed, low, width):
    for policy in (UniformDrop(), LogUniformDrop(), FixedDrop(3), WithFull(UniformDrop(), 0.5)):
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
