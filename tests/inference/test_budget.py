"""Splitting a budget against an exact integer program."""

import math
from dataclasses import replace
from itertools import pairwise

import equinox as eqx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from elastictok.inference import MSE, AbstractScorer, Block, Budget, allocate, split

# Coarse, so that no two sums are nearer to each other than the solver's tolerance.
LOSSES = st.integers(0, 20).map(float) | st.integers(0, 1280).map(lambda x: x / 64)


@st.composite
def problems(draw, convex=False):
    """Curves of a few blocks, each `(lengths, losses)`."""
    curves = []
    for _ in range(draw(st.integers(1, 5))):
        count = draw(st.integers(1, 6))
        lengths = sorted(draw(st.sets(st.integers(1, 15), min_size=count, max_size=count)))
        losses = draw(st.lists(LOSSES, min_size=count, max_size=count))
        if convex:
            slopes = sorted(draw(st.lists(st.integers(1, 50), min_size=count, max_size=count)))
            steps = [
                s * (b - a) for s, (a, b) in zip(slopes[:0:-1], pairwise(lengths), strict=True)
            ]
            losses = np.concatenate([[0.0], -np.cumsum(steps)]) + 1000
        curves.append((np.array(lengths), np.array(losses, np.float64)))
    return curves


def program(curves, total):
    """One binary variable for each block and length, one of them 1 in each block."""
    cost = np.concatenate([losses for _, losses in curves])
    tokens = np.concatenate([lengths for lengths, _ in curves])
    one = np.zeros((len(curves), len(cost)))
    first = 0
    for row, (lengths, _) in zip(one, curves, strict=True):
        row[first : first + len(lengths)] = 1
        first += len(lengths)
    return cost, tokens, one, total


def exact(curves, total):
    cost, tokens, one, total = program(curves, total)
    constraints = [LinearConstraint(one, 1, 1), LinearConstraint(tokens[None], -np.inf, total)]
    result = milp(
        cost,
        constraints=constraints,
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0},
    )
    assert result.success, result.message
    return result.fun


def relaxed(curves, total):
    cost, tokens, one, total = program(curves, total)
    result = linprog(cost, tokens[None], [total], one, np.ones(len(one)), bounds=(0, 1))
    assert result.success, result.message
    return result.fun


def total_loss(curves, chosen):
    at = [
        lengths.tolist().index(length) for (lengths, _), length in zip(curves, chosen, strict=True)
    ]
    return sum(losses[i] for (_, losses), i in zip(curves, at, strict=True))


def run(curves, total, **options):
    return split([c[1] for c in curves], [c[0] for c in curves], total, **options)


def least(curves):
    return sum(lengths.min() for lengths, _ in curves)


def hull(lengths, losses):
    """Vertices of the lower hull by its definition: below every chord, and lower than before."""
    points = list(zip(lengths.tolist(), losses.tolist(), strict=True))
    for i, (x, y) in enumerate(points):
        if any(q[1] <= y for q in points[:i]):
            continue
        chords = [(p, q) for p in points[:i] for q in points[i + 1 :]]
        if all(y < p[1] + (q[1] - p[1]) * (x - p[0]) / (q[0] - p[0]) - 1e-9 for p, q in chords):
            yield x, y


@given(problems(), st.integers(0, 70))
def test_near_the_optimum_and_never_over_the_budget(curves, spare):
    total = int(least(curves)) + spare
    chosen = run(curves, total)
    assert sum(chosen) <= total
    loss, best = total_loss(curves, chosen), exact(curves, total)
    assert loss >= best - 1e-6
    # What separates it from the optimum is part of one segment's gain.
    gains = [gain for _, gain in steps_of(curves)]
    assert loss <= relaxed(curves, total) + max(gains, default=0.0) + 1e-6
    assert loss <= best + max(gains, default=0.0) + 1e-6


def steps_of(curves):
    """All hull segments, the steepest first, as (tokens, gain)."""
    steps = []
    for curve in curves:
        steps += [(b[0] - a[0], a[1] - b[1]) for a, b in pairwise(hull(*curve))]
    return sorted(steps, key=lambda step: -step[1] / step[0])


@given(problems(), st.integers(0, 70))
def test_within_the_gain_of_the_segment_that_did_not_fit(curves, spare):
    total = int(least(curves)) + spare
    left, broke = spare, 0.0
    steps = steps_of(curves)
    for tokens, gain in steps:
        if tokens > left:
            # Of equally steep segments any may come first.
            equal = [g for t, g in steps if math.isclose(g / t, gain / tokens)]
            broke = max([gain, *equal])
            break
        left -= tokens
    assert total_loss(curves, run(curves, total)) <= exact(curves, total) + broke + 1e-6


@given(problems(convex=True), st.data())
def test_exact_where_the_budget_falls_on_vertices(curves, data):
    steps = steps_of(curves)
    count = data.draw(st.integers(0, len(steps)))
    total = int(least(curves)) + sum(tokens for tokens, _ in steps[:count])
    loss = total_loss(curves, run(curves, total))
    assert loss == pytest.approx(exact(curves, total))
    assert loss == pytest.approx(relaxed(curves, total))


@given(problems(), st.integers(0, 70))
def test_nothing_that_would_help_is_left_undone(curves, spare):
    total = int(least(curves)) + spare
    chosen = run(curves, total)
    left = total - sum(chosen)
    for (lengths, losses), length in zip(curves, chosen, strict=True):
        now = losses[lengths.tolist().index(length)]
        assert not np.any(losses[(lengths > length) & (lengths <= length + left)] < now)
        # No tokens for nothing: each shorter length is worse.
        assert np.all(losses[lengths < length] > now)


@given(problems(), st.integers(0, 70), st.lists(st.sampled_from([0, 0.5, 1, 4]), min_size=5))
def test_weights_are_factors_of_the_losses(curves, spare, weights):
    weights = weights[: len(curves)]
    total = int(least(curves)) + spare
    scaled = [(c[0], c[1] * w) for c, w in zip(curves, weights, strict=True)]
    assert run(curves, total, weights=weights) == run(scaled, total)


@given(problems(), st.integers(0, 70), st.randoms())
def test_order_and_repetition_mean_nothing(curves, spare, random):
    total = int(least(curves)) + spare
    shuffled = []
    for lengths, losses in curves:
        again = random.choices(range(len(lengths)), k=3)
        points = [(lengths[i], losses[i]) for i in range(len(lengths))]
        points += [(lengths[i], losses[i] + 1.0) for i in again]
        random.shuffle(points)
        shuffled.append(tuple(np.array(each) for each in zip(*points, strict=True)))
    assert run(shuffled, total) == run(curves, total)


def test_what_is_not_a_number():
    inf, nan = math.inf, math.nan
    lengths = np.array([1, 2, 3, 4])
    # Out of the unknown first, then to the perfect, whatever finite losses there are.
    curves = [
        (lengths, np.array([1e6, 5e5, 2.0, 1.0])),
        (lengths, np.array([nan, inf, 1e6, 1e6])),
        (lengths, np.array([3.0, 2.9, 2.8, -inf])),
        (lengths, np.array([nan, nan, inf, nan])),
    ]
    assert run(curves, 4) == [1, 1, 1, 1]
    assert run(curves, 6) == [1, 3, 1, 1]
    assert run(curves, 9) == [1, 3, 4, 1]
    assert run(curves, 16) == [4, 3, 4, 1]


def test_a_step_that_fitted_once_may_not_fit_later():
    # The segments of 6 tokens do not fit into 5. Off the hull, either block's step of 3 does, and
    # not both.
    lengths = np.array([1, 4, 7])
    curves = [(lengths, np.array([9.0, 8.0, 1.0])), (lengths, np.array([9.0, 8.5, 2.0]))]
    assert run(curves, 7) == [4, 1]


def test_flat_curves_take_nothing():
    assert run([(np.arange(1, 9), np.full(8, 0.5))] * 3, 24) == [1, 1, 1]


def test_no_blocks():
    assert split([], [], 0) == []


def test_a_matrix_of_candidates():
    lengths = np.array([[2, 4], [2, 4]])
    assert split(np.array([[1.0, 0.5], [1.0, 0.0]]), lengths, 7) == [2, 4]


@pytest.mark.parametrize(
    ("losses", "lengths", "weights", "message"),
    [
        ([[1.0], [1.0]], [[3], [4]], None, "total of 6 tokens is less .* 2 blocks .* at least 7"),
        ([[1.0]], [[3], [4]], None, "losses of 1 blocks, lengths of 2"),
        ([[1.0, 2.0]], [[3]], None, r"block 0 has losses of shape \(2,\)"),
        ([[]], [[]], None, "at least one length"),
        ([[1.0]], [[0]], None, "whole numbers from 1"),
        ([[1.0]], [[1.5]], None, "whole numbers from 1"),
        ([[1.0]], [[1]], [-1.0], "weight of -1.0"),
        ([[1.0]], [[1]], [math.nan], "weight of nan"),
        ([[1.0]], [[1]], [1.0, 1.0], "2 weights"),
    ],
)
def test_what_cannot_be_split(losses, lengths, weights, message):
    arrays = [np.array(each) for each in losses], [np.array(each) for each in lengths]
    with pytest.raises(ValueError, match=message):
        split(*arrays, 6, weights)


class Told(AbstractScorer):
    """Reads the curve from the first pixels of the block at hand."""

    @property
    def history(self):
        return 2

    def curves(self, blocks):
        lengths = np.stack([np.arange(b.shortest, b.longest + 1) for b in blocks])
        losses = np.stack([b.pixels[-1, 0, : lengths.shape[1], 0] for b in blocks])
        return lengths, losses.astype(np.float64)


def told(losses):
    pixels = np.zeros((1, 1, 8, 3), np.uint8)
    pixels[0, 0, : len(losses), 0] = losses
    return Block(2, 2 + len(losses) - 1, pixels=pixels)


def test_a_budget_is_shared_by_all_blocks_of_all_clips():
    clips = [[told([9, 1, 1]), told([9, 8, 7])], [told([9, 3, 1])]]
    budget = Budget(9, Told())
    assert budget.history == 2
    assert budget.plan(clips) == [[3, 2], [4]]
    assert Budget(6, Told()).plan(clips) == [[2, 2], [2]]
    with pytest.raises(ValueError, match="at least 6"):
        Budget(5, Told()).plan(clips)


@pytest.mark.parametrize("verify", [True, False])
def test_what_was_planned_is_taken(verify):
    block = replace(told([9, 1, 1]), planned=3)
    strategy = Budget(9, Told(), MSE(0.5), verify=verify)
    out = allocate(strategy, block, lambda length: (length / 10, str(length)))
    assert (out.length, out.result, out.measured, out.probed) == (3, "3", verify, int(verify))
    assert out.met is verify
    assert out.loss == 0.3 if verify else math.isnan(out.loss)


def test_streams_have_no_budget():
    with pytest.raises(ValueError, match=r"budget of 9 tokens .* stream"):
        next(Budget(9, Told()).search(told([1, 2])))


def test_a_budget_of_nothing():
    with pytest.raises(ValueError, match="total is 0"):
        Budget(0, Told())


def test_a_scorer_is_an_equinox_module():
    assert issubclass(AbstractScorer, eqx.Module)
