"""The search against exhaustive search, on arbitrary loss curves."""

import math
import weakref

import equinox as eqx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictok.inference import (
    MSE,
    AbstractCriterion,
    AbstractStrategy,
    Binary,
    Block,
    Criterion,
    FixedLength,
    Full,
    allocate,
)

SHORTEST = st.integers(1, 5)
# Few distinct values, so that ties and repeated crossings of the threshold are common.
VALUES = st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 1.0, 2.0, math.inf, math.nan]) | st.floats()
CURVES = st.lists(VALUES, min_size=1, max_size=40)
FALLING = st.lists(st.floats(0, 4) | st.just(math.inf), min_size=1, max_size=40).map(
    lambda losses: sorted(losses, reverse=True)
)
THRESHOLDS = st.sampled_from([0.0, 0.5, 1.0, math.inf]) | st.floats(0, 4)


def never():
    raise AssertionError("the strategies look at losses only")


def criterion(threshold):
    return Criterion(lambda a, b: never(), threshold)


def good(loss, threshold):
    return not math.isnan(loss) and loss != math.inf and loss <= threshold


def run(strategy, curve, shortest):
    """The allocation, and the lengths probed in order. The result of a probe is its length."""
    probed = []

    def probe(length):
        probed.append(length)
        return curve[length - shortest], (length, "result")

    longest = shortest + len(curve) - 1
    return allocate(strategy, Block(shortest, longest), probe), probed, longest


def check_honest(out, probed, curve, shortest, threshold):
    """What every result claims must be true of what was probed."""
    assert len(set(probed)) == len(probed) == out.probed
    assert out.length in probed
    assert out.result == (out.length, "result")
    loss = curve[out.length - shortest]
    assert out.loss == loss or (math.isnan(out.loss) and math.isnan(loss))
    assert out.met is good(loss, threshold)
    lengths = sorted(probed)
    seen = [curve[length - shortest] for length in lengths]
    rises = any(not seen[i] >= seen[j] for j in range(len(seen)) for i in range(j))
    assert out.monotone is (not rises and not any(math.isnan(loss) for loss in seen))
    successes = [length for length in lengths if good(curve[length - shortest], threshold)]
    assert out.length == (successes[0] if successes else lengths[-1])


@given(CURVES, SHORTEST, THRESHOLDS)
def test_full(curve, shortest, threshold):
    out, probed, longest = run(Full(criterion(threshold)), curve, shortest)
    check_honest(out, probed, curve, shortest, threshold)
    assert sorted(probed) == list(range(shortest, longest + 1))


@given(CURVES, SHORTEST, THRESHOLDS)
def test_binary_on_any_curve(curve, shortest, threshold):
    out, probed, longest = run(Binary(criterion(threshold)), curve, shortest)
    check_honest(out, probed, curve, shortest, threshold)
    assert out.met or out.length == longest
    assert out.probed <= 1 + math.ceil(math.log2(len(curve)))


@given(FALLING, SHORTEST, THRESHOLDS)
def test_binary_on_falling_curves_is_exhaustive(curve, shortest, threshold):
    out, _, longest = run(Binary(criterion(threshold)), curve, shortest)
    meeting = [shortest + i for i, loss in enumerate(curve) if good(loss, threshold)]
    assert out.length == (meeting[0] if meeting else longest)
    assert out.met is bool(meeting)
    assert out.monotone


def test_binary_at_every_crossing():
    for count in range(1, 34):
        for crossing in range(count + 1):
            curve = [1.0] * crossing + [0.0] * (count - crossing)
            out, probed, longest = run(Binary(criterion(0.5)), curve, 3)
            assert out.length == min(3 + crossing, longest)
            assert out.met is (crossing < count)
            assert len(probed) == 1 if crossing == count else len(probed) <= 1 + count.bit_length()


@given(CURVES, SHORTEST, st.integers(1, 60))
def test_fixed_length(curve, shortest, length):
    out, probed, longest = run(FixedLength(length, criterion(0.5)), curve, shortest)
    assert probed == [max(shortest, min(length, longest))]
    check_honest(out, probed, curve, shortest, 0.5)


def test_fixed_length_asks_for_nothing_by_default():
    strategy = FixedLength(7)
    assert strategy.criterion == MSE(math.inf)
    assert run(strategy, [3.0] * 9, 1)[0].met
    assert not run(strategy, [math.nan] * 9, 1)[0].met


@pytest.mark.parametrize("length", [0, -1])
def test_fixed_length_needs_a_token(length):
    with pytest.raises(ValueError, match=str(length)):
        FixedLength(length)


class Asks(AbstractStrategy):
    """Asks for the given rounds, whatever it is told, and remembers what it was told."""

    rounds: list
    told: list = eqx.field(default_factory=list)
    criterion: AbstractCriterion = MSE(0.5)

    def search(self, block):
        for wanted in self.rounds:
            self.told.append((yield wanted))


def test_rounds_of_several_lengths_and_repeated_questions():
    strategy = Asks([(5, 3), (), (3, 4, 5, 3)])
    curve = [9.0, 0.25, 0.75, 0.125, 0.5]  # lengths 2 to 6
    out, probed, _ = run(strategy, curve, 2)
    assert probed == [5, 3, 4]
    assert strategy.told == [(0.125, 0.25), (), (0.25, 0.75, 0.125, 0.25)]
    assert (out.length, out.loss, out.met, out.monotone, out.probed) == (3, 0.25, True, False, 3)


@pytest.mark.parametrize("length", [1, 7])
def test_lengths_out_of_bounds(length):
    with pytest.raises(ValueError, match=f"Asks asked for a length of {length}.* 2 to 6"):
        run(Asks([(length,)]), [0.0] * 5, 2)


def test_nothing_probed():
    with pytest.raises(ValueError, match="at least one"):
        run(Asks([]), [0.0] * 5, 2)


@pytest.mark.parametrize(("shortest", "longest"), [(0, 4), (5, 4), (-1, 4)])
def test_bounds(shortest, longest):
    with pytest.raises(ValueError, match=f"{shortest} to {longest}"):
        Block(shortest, longest)


@given(CURVES, THRESHOLDS)
def test_memory_is_that_of_one_probe(curve, threshold):
    class Result:
        pass

    alive = weakref.WeakSet()

    def probe(length):
        assert len(alive) <= 1
        result = Result()
        alive.add(result)
        return curve[length - 1], result

    allocate(Full(criterion(threshold)), Block(1, len(curve)), probe)
