"""Predicted lengths, with scorers whose predictions are known."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictok.inference import (
    L1,
    MSE,
    PSNR,
    AbstractScorer,
    Block,
    Calibration,
    Criterion,
    Regressor,
    allocate,
)

LOSSES = st.floats(1e-6, 10) | st.sampled_from([math.nan, math.inf, 0.0, -1.0, -30.0])


class Says(AbstractScorer):
    """Predicts the same for every block, and counts how often it was asked."""

    lengths: tuple
    losses: tuple
    name: str | None = None
    calls: list | None = None

    @property
    def history(self):
        return 5

    @property
    def criterion_name(self):
        return self.name

    @property
    def fingerprint(self):
        return "says"

    def curves(self, blocks):
        if self.calls is not None:
            self.calls.append(len(blocks))
        count = len(blocks)
        return np.tile(self.lengths, (count, 1)), np.tile(np.array(self.losses, float), (count, 1))


BLOCK = Block(1, 40)


def predicted(lengths, losses, criterion, margin=0.0):
    (length,) = Regressor(Says(lengths, losses), criterion, margin=margin).predict([BLOCK])
    return length


@st.composite
def curves(draw, losses=LOSSES):
    lengths = sorted(draw(st.sets(st.integers(1, 40), min_size=1, max_size=8)))
    return lengths, draw(st.lists(losses, min_size=len(lengths), max_size=len(lengths)))


@given(curves(st.floats(1e-6, 10)), st.floats(1e-5, 20))
def test_the_shortest_length_on_the_line_between_candidates(curve, threshold):
    lengths, losses = curve
    falling = sorted(losses, reverse=True)
    length = predicted(tuple(lengths), tuple(falling), MSE(threshold))
    everywhere = np.arange(lengths[0], lengths[-1] + 1)
    line = np.exp(np.interp(everywhere, lengths, np.log(falling)))
    certain = everywhere[line <= threshold * (1 - 1e-9)]
    possible = everywhere[line <= threshold * (1 + 1e-9)]
    if not len(certain):
        assert length == lengths[-1] or length in possible
    else:
        assert possible[0] <= length <= certain[0]


@given(curves(), st.sampled_from([MSE(0.5), L1(0.1), PSNR(20), MSE(0.0), MSE(math.inf)]))
def test_whatever_is_predicted_a_candidate_that_meets_bounds_the_length(curve, criterion):
    lengths, losses = curve
    length = predicted(tuple(lengths), tuple(losses), criterion)
    meeting = [n for n, x in zip(lengths, losses, strict=True) if criterion.meets(x)]
    assert length <= (meeting[0] if meeting else lengths[-1])
    before = [n for n in lengths if not meeting or n < meeting[0]]
    assert length > before[-1] if meeting and before else True


@given(curves(), st.lists(st.floats(0, 5), min_size=2, max_size=2), st.booleans())
def test_no_shorter_with_a_larger_margin(curve, margins, decibels):
    criterion = PSNR(20) if decibels else MSE(0.5)
    small, large = sorted(margins)
    args = tuple(curve[0]), tuple(curve[1]), criterion
    assert predicted(*args, small) <= predicted(*args, large) <= predicted(*args, math.inf) == 40


def test_margins_are_factors_of_errors_and_distances_in_decibels():
    lengths = (1, 2, 3, 4)
    errors = (1.0, 0.5, 0.25, 0.125)
    assert predicted(lengths, errors, MSE(0.5)) == 2
    assert predicted(lengths, errors, MSE(0.5), math.log(2) - 1e-9) == 3
    assert predicted(lengths, errors, MSE(0.5), math.log(2) + 1e-9) == 4
    ratios = (-10.0, -20.0, -30.0, -40.0)
    assert predicted(lengths, ratios, PSNR(20)) == 2
    assert predicted(lengths, ratios, PSNR(20), 9.99) == 3
    assert predicted(lengths, ratios, PSNR(20), 10.01) == 4


def test_between_candidates_the_logarithm_is_interpolated():
    assert predicted((1, 11), (1.0, 0.01), MSE(0.1)) == 6
    assert predicted((1, 11), (-10.0, -30.0), PSNR(20)) == 6
    # A curve that reaches zero has no logarithm there.
    assert predicted((1, 11), (1.0, 0.0), MSE(0.5)) == 6


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("planned", [True, False])
def test_one_probe_or_none(verify, planned):
    scorer = Says((1, 11), (1.0, 0.01), calls=[])
    strategy = Regressor(scorer, MSE(0.1), verify=verify)
    assert strategy.history == 5
    block = replace(
        BLOCK, planned=strategy.plan([[BLOCK, BLOCK], [BLOCK]])[1][0] if planned else None
    )
    out = allocate(strategy, block, lambda length: (length / 100, length))
    assert (out.length, out.result, out.probed, out.measured) == (6, 6, int(verify), verify)
    assert out.met is verify
    assert scorer.calls == [3 if planned else 1]


def test_a_plan_is_kept_to_what_a_narrower_search_allows():
    strategy = Regressor(Says((1, 11), (1.0, 0.01)), MSE(0.1))
    out = allocate(strategy, Block(8, 40, planned=6), lambda length: (0.0, None))
    assert out.length == 8


def painted(truth, reconstruction):
    return 0.0


def calibration(**changes):
    fields = {
        "needed": (0.0, 0.5, 1.0, 0.5),
        "margins": (0.0, 0.5, 1.0),
        "criterion": "MSE",
        "threshold": 0.1,
        "codec": "a",
        "scorer": "says",
        "window": 3,
    }
    return Calibration(**{**fields, **changes})


def test_the_margin_comes_from_the_calibration():
    scorer = Says((1, 11), (1.0, 0.01))
    assert Regressor(scorer, MSE(0.1), alpha=0.5, calibration=calibration()).margin == 0.5
    assert Regressor(scorer, MSE(0.1), alpha=0.1, calibration=calibration()).margin == math.inf


@pytest.mark.parametrize(
    ("criterion", "options", "message"),
    [
        (MSE(0.1), {"alpha": 0.1}, "belong together"),
        (MSE(0.1), {"calibration": calibration()}, "belong together"),
        (MSE(0.1), {"alpha": 0.5, "calibration": calibration(), "margin": 1}, "margin is 1"),
        (MSE(0.1), {"margin": -1.0}, "margin is -1"),
        (MSE(0.1), {"margin": math.nan}, "margin is nan"),
        (MSE(0.1), {"alpha": 1.5, "calibration": calibration()}, "alpha is 1.5"),
        (MSE(0.2), {"alpha": 0.5, "calibration": calibration()}, "threshold 0.1, and .* 0.2"),
        (L1(0.1), {}, "losses of MSE, and the criterion is L1"),
        (Criterion(painted, 0.1), {}, "criterion is painted"),
        (MSE(0.1), {"alpha": 0.5, "calibration": calibration(scorer="x")}, "scorer x, .* says"),
        (MSE(0.1), {"alpha": 0.5, "calibration": calibration(criterion="L1")}, "criterion L1"),
    ],
)
def test_what_does_not_belong_together(criterion, options, message):
    with pytest.raises(ValueError, match=message):
        Regressor(Says((1, 11), (1.0, 0.01), "MSE"), criterion, **options)


def test_only_scorers_of_ours_have_files(tmp_path):
    with pytest.raises(ValueError, match="is a Says"):
        Regressor(Says((1,), (1.0,)), MSE(0.1)).save(tmp_path)
