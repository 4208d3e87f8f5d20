"""A scorer learns the losses of a codec that are known."""

import math
from dataclasses import replace

import equinox as eqx
import numpy as np
import pytest

from elastictok.inference import (
    Codes,
    Criterion,
    ElasticCodec,
    Full,
    Regressor,
    Tokenizer,
    criterion_name,
)
from elastictok.train import fit_scorer, score_targets

LONGEST = 16
SHARES = (0.0, 0.2, 0.6, 1.0)
LENGTHS = [2, 5, 10, 16]  # of 2 to 16


def level(contrast, length, lacking):
    """What is lost: part of the contrast, less with more tokens, more with few before."""
    return int(np.clip(np.rint(contrast * 0.8**length + 2 * lacking), 1, 255))


class Contrast(ElasticCodec[int, int]):
    """Blocks of two frames whose loss is painted into every pixel of what is decoded."""

    size = (8, 8)
    patch = (8, 8)
    frames_per_block = 2
    context = 4
    min_tokens = 2
    kind = Codes(256)
    bits_per_token = 8.0
    fingerprint = "contrast"

    def tokens_per_block(self, height, width):
        return LONGEST

    def encoder_state(self, window, height, width):
        return 0

    def decoder_state(self, window, height, width):
        return 0

    def encode(self, pixels, length, state):
        return np.full(LONGEST, int(np.ptp(pixels)), np.int32), state

    def decode(self, values, length, state):
        loss = level(values[0], length, state)
        return np.full((2, 8, 8, 3), loss, np.uint8), int(length < 4)


def painted(truth, reconstruction):
    return float(reconstruction[0, 0, 0, 0])


CRITERION = Criterion(painted, 20.0)
TOKENIZER = Tokenizer(Contrast(), Full(CRITERION), window=3)


def clips(count, blocks=3, seed=0):
    """Checks of random contrast."""
    rng = np.random.default_rng(seed)
    checks = np.indices((8, 8)).sum(axis=0) % 2
    contrasts = np.exp(rng.uniform(math.log(10), math.log(250), (count, blocks)))
    found = []
    for clip in np.rint(contrasts):
        frames = np.repeat(clip, 2)[:, None, None] * checks
        found.append(np.repeat(frames[..., None], 3, axis=-1).astype(np.uint8))
    return found


@pytest.fixture(scope="module")
def targets():
    return score_targets(TOKENIZER, clips(40), CRITERION, context=2, shares=SHARES, seed=1)


def fit(targets, **options):
    return fit_scorer(
        TOKENIZER,
        targets,
        CRITERION,
        **{"steps": 100, "shares": SHARES, "learning_rate": 5e-3, "progress": False, **options},
    )


@pytest.fixture(scope="module")
def scorer(targets):
    return fit(targets)


def test_what_is_measured(targets):
    assert len(targets) == 120
    lacking = set()
    for target in targets:
        assert target.lengths.tolist() == LENGTHS
        assert len(target.block.pixels) in (2, 4)
        contrast = int(np.ptp(target.block.pixels[-2:]))
        first = len(target.block.pixels) == 2
        fitting = [
            state
            for state in (0, 1)
            if target.losses.tolist() == [level(contrast, n, state) for n in LENGTHS]
        ]
        assert fitting
        assert not first or 0 in fitting
        lacking |= set() if len(fitting) > 1 else set(fitting)
    # Earlier blocks had lengths that lack something, and such that do not.
    assert lacking == {0, 1}


def test_earlier_lengths_are_drawn_from_the_seed():
    def losses(seed):
        found = score_targets(TOKENIZER, clips(10), CRITERION, context=1, shares=SHARES, seed=seed)
        return sorted(tuple(target.losses) for target in found)

    assert losses(1) == losses(1) != losses(2)


def test_losses_are_learnt(scorer):
    new = score_targets(TOKENIZER, clips(15, seed=9), CRITERION, context=2, shares=SHARES)
    lengths, predicted = scorer.curves([target.block for target in new])
    assert lengths.tolist() == [LENGTHS] * len(new)
    true = np.log([target.losses for target in new])
    off = np.abs(np.log(predicted) - true).mean()
    by_the_mean = np.abs(true.mean(axis=0) - true).mean()
    assert off < 0.3 * by_the_mean
    assert (scorer.criterion, scorer.codec) == (criterion_name(CRITERION), "contrast")
    assert (scorer.context, scorer.shares, scorer.patch) == (2, SHARES, 8)
    assert scorer.logarithmic


def test_lengths_come_out_near_those_that_are_needed(scorer):
    new = clips(15, seed=8)
    found = Tokenizer(Contrast(), Regressor(scorer, CRITERION), window=3).encode_batch(new)
    needed = TOKENIZER.encode_batch(new)
    gap = [abs(a.lengths - b.lengths).mean() for a, b in zip(found, needed, strict=True)]
    assert np.mean(gap) < 2
    assert all(each.encoder_evaluations.tolist() == [1, 1, 1] for each in found)


def test_the_same_seed_gives_the_same_scorer(targets):
    one, same, other = (fit(targets, steps=3, seed=seed) for seed in (1, 1, 2))
    assert bool(eqx.tree_equal(one, same))
    assert not bool(eqx.tree_equal(one, other))


def test_what_is_not_finite_is_left_out(targets):
    broken = [
        replace(t, losses=np.where(t.lengths == LENGTHS[1], [math.nan, math.inf][i % 2], t.losses))
        for i, t in enumerate(targets)
    ]
    broken.append(replace(targets[0], losses=np.full(4, math.nan)))
    _, predicted = fit(broken).curves([target.block for target in targets])
    true = np.array([target.losses for target in targets])
    off = np.abs(np.log(predicted) - np.log(true)).mean(axis=0)
    # Where nothing is known, the mean curve to begin with: on the line between its neighbours.
    assert np.all(off < [0.3, 0.8, 0.3, 0.3])


def test_losses_that_may_be_negative_are_learnt_as_they_are(targets):
    shifted = [replace(t, losses=t.losses - 30) for t in targets]
    scorer = fit(shifted, steps=3)
    assert not scorer.logarithmic
    # To begin with, the mean curve.
    _, losses = scorer.curves([t.block for t in shifted])
    mean = np.mean([t.losses for t in shifted], axis=0)
    np.testing.assert_allclose(losses.mean(axis=0), mean, atol=3)


def test_sizes_may_differ(targets):
    wide = [
        replace(t, block=replace(t.block, pixels=np.concatenate([t.block.pixels] * 2, axis=2)))
        for t in targets[:9]
    ]
    fit([*wide, *targets[:9]], steps=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": []}, "no targets"),
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"patch": 7}, "patch is 7"),
        ({"context": 0}, "context is 0"),
    ],
)
def test_what_cannot_be_trained(targets, change, message):
    with pytest.raises(ValueError, match=message):
        fit(**{"targets": targets, **change})


def test_a_codec_that_fails(targets):
    with pytest.raises(ValueError, match="none of the measured losses is finite"):
        fit([replace(t, losses=np.full(4, math.nan)) for t in targets])
