"""The search against exhaustive search, on arbitrary loss curves."""

import itertools
import math
import weakref

import equinox as eqx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictok.inference import (
    MSE,
    AbstractCriterion,
    AbstractStrategy,
    Binary,
    Binned,
    Block,
    Criterion,
    EncodeOnce,
    FixedLength,
    Full,
    KAry,
    Secant,
    WarmStart,
    allocate,
    linear_spaced,
    log_spaced,
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


def run(strategy, curve, shortest, previous=None):
    """The allocation, and the lengths probed in order. The result of a probe is its length."""
    probed = []

    def probe(length):
        probed.append(length)
        return curve[length - shortest], (length, "result")

    longest = shortest + len(curve) - 1
    return allocate(strategy, Block(shortest, longest, previous), probe), probed, longest


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


def rounds(strategy, curve, shortest, previous=None):
    """What the search asks for, round by round, told the truth."""
    search = strategy.search(Block(shortest, shortest + len(curve) - 1, previous))
    asked = []
    try:
        wanted = next(search)
        while True:
            asked.append(list(wanted))
            wanted = search.send(tuple(curve[length - shortest] for length in wanted))
    except StopIteration as stop:
        assert stop.value is None
    return asked


@given(CURVES, SHORTEST, THRESHOLDS, st.integers(1, 9))
def test_k_ary_on_any_curve(curve, shortest, threshold, k):
    strategy = KAry(criterion(threshold), k)
    out, probed, longest = run(strategy, curve, shortest)
    check_honest(out, probed, curve, shortest, threshold)
    assert out.met or out.length == longest
    asked = rounds(strategy, curve, shortest)
    assert all(len(each) <= k and each == sorted(set(each)) for each in asked)
    # Each round leaves a part of k + 1 equal ones, but for rounding.
    assert len(asked) <= 1 + math.ceil(math.log(len(curve), k + 1) + 1e-9)


@given(FALLING, SHORTEST, THRESHOLDS, st.integers(1, 9))
def test_k_ary_on_falling_curves_is_exhaustive(curve, shortest, threshold, k):
    out, _, _ = run(KAry(criterion(threshold), k), curve, shortest)
    exhaustive, _, _ = run(Full(criterion(threshold)), curve, shortest)
    assert (out.length, out.met, out.monotone) == (exhaustive.length, exhaustive.met, True)


@given(
    CURVES, SHORTEST, THRESHOLDS, st.integers(2, 45), st.sampled_from([linear_spaced, log_spaced])
)
def test_binned_on_any_curve(curve, shortest, threshold, bins, spacing):
    out, probed, longest = run(Binned(criterion(threshold), bins, spacing), curve, shortest)
    check_honest(out, probed, curve, shortest, threshold)
    assert len(probed) <= bins
    assert {shortest, longest} <= set(probed)
    if spacing is linear_spaced:
        gaps = [b - a for a, b in itertools.pairwise(probed)]
        assert not gaps or max(gaps) - min(gaps) <= 1
        assert len(probed) == min(bins, len(curve))


@given(
    FALLING, SHORTEST, THRESHOLDS, st.integers(2, 45), st.sampled_from([linear_spaced, log_spaced])
)
def test_binned_on_falling_curves_rounds_the_optimum_up(curve, shortest, threshold, bins, spacing):
    out, probed, _ = run(Binned(criterion(threshold), bins, spacing), curve, shortest)
    best, _, _ = run(Full(criterion(threshold)), curve, shortest)
    assert out.length == min(length for length in probed if length >= best.length)
    assert out.met == best.met


@given(CURVES, SHORTEST, THRESHOLDS)
def test_secant_on_any_curve(curve, shortest, threshold):
    out, probed, longest = run(Secant(criterion(threshold)), curve, shortest)
    check_honest(out, probed, curve, shortest, threshold)
    assert out.met or out.length == longest
    assert len(probed) <= 2 + 3 * math.ceil(math.log2(len(curve)))


@given(FALLING, SHORTEST, THRESHOLDS, st.booleans(), st.integers(1, 50))
def test_secant_on_falling_curves_is_exhaustive(curve, shortest, threshold, warm, previous):
    strategy = Secant(criterion(threshold))
    strategy = WarmStart(strategy) if warm else strategy
    out, _, _ = run(strategy, curve, shortest, previous)
    best, _, _ = run(Full(criterion(threshold)), curve, shortest)
    assert (out.length, out.met) == (best.length, best.met)


def test_secant_is_quick_on_smooth_curves():
    """Power laws with a floor, as tokenizers have them: half of what bisection takes, or less."""
    lengths = np.arange(16, 4097)
    probes = []
    for power in (0.5, 1.0, 2.0):
        for floor in (0.0, 0.05):
            curve = list(floor + lengths**-power / 16**-power)
            for threshold in (0.6, 0.3, 0.1, 0.06):
                out, probed, _ = run(Secant(criterion(threshold)), curve, 16)
                assert out.length == min(
                    (n for n, loss in zip(lengths, curve, strict=True) if loss <= threshold),
                    default=4096,
                )
                probes.append(len(probed))
    assert np.mean(probes) < 6.5  # Binary: 13
    assert max(probes) <= 16


def test_log_spacing_is_in_equal_ratios():
    lengths = log_spaced(4, 4096, 11)
    assert lengths == [4 * 2**i for i in range(11)]
    assert log_spaced(7, 7, 5) == linear_spaced(7, 7, 5) == [7]


@given(CURVES, SHORTEST, THRESHOLDS, st.integers(1, 50), st.integers(0, 2))
def test_warm_start_on_any_curve(curve, shortest, threshold, previous, which):
    makers = (Binary, lambda c: KAry(c, 3), Secant)
    inner = makers[which](criterion(threshold))
    out, probed, longest = run(WarmStart(inner), curve, shortest, previous)
    check_honest(out, probed, curve, shortest, threshold)
    assert out.met or out.length == longest
    assert probed[0] == max(shortest, min(previous, longest))


@given(FALLING, SHORTEST, THRESHOLDS, st.integers(1, 50) | st.none())
def test_warm_start_on_falling_curves_is_exhaustive(curve, shortest, threshold, previous):
    out, probed, _ = run(WarmStart(Binary(criterion(threshold))), curve, shortest, previous)
    best, _, _ = run(Full(criterion(threshold)), curve, shortest)
    assert (out.length, out.met) == (best.length, best.met)
    if previous is None:
        assert probed == run(Binary(criterion(threshold)), curve, shortest)[1]


def test_warm_start_is_cheap_near_the_block_before():
    """Of 4096 lengths, a neighbour is found in a few probes; from the other end it takes more."""
    for crossing in (0, 1, 700, 2048, 4090, 4095):
        curve = [1.0] * crossing + [0.0] * (4096 - crossing)
        for distance in (0, 1, 30, 255):
            for previous in (1 + crossing - distance, 1 + crossing + distance):
                out, probed, _ = run(WarmStart(Binary(criterion(0.5))), curve, 1, previous)
                assert out.length == 1 + crossing
                assert len(probed) <= 3 + 9  # itself, steps of 255 and 510, what bisects those
        far = run(WarmStart(Binary(criterion(0.5))), curve, 1, 1)[1]
        assert len(far) <= 1 + 5 + 12


def test_a_block_that_cannot_meet_the_threshold_is_given_all_after_few_probes():
    curve = [1.0] * 256
    assert run(WarmStart(Binary(criterion(0.5))), curve, 1, 256)[1] == [256]
    assert run(KAry(criterion(0.5), 4), curve, 1)[1] == [256]


@given(CURVES, SHORTEST, THRESHOLDS)
def test_encode_once_probes_as_its_inner_search_does(curve, shortest, threshold):
    inner = Binary(criterion(threshold))
    strategy = EncodeOnce(inner)
    assert run(strategy, curve, shortest)[1] == run(inner, curve, shortest)[1]
    block = Block(shortest, shortest + len(curve) - 1)
    assert strategy.encoded_length(block, shortest) == block.longest
    assert inner.encoded_length(block, shortest) == shortest
    assert WarmStart(strategy).encoded_length(block, shortest) == block.longest


class Takes(AbstractStrategy):
    """Probes some lengths, then takes one whatever was found."""

    probes: list
    length: int
    criterion: AbstractCriterion = MSE(0.5)

    def search(self, block):
        for length in self.probes:
            yield (length,)
        return self.length


def test_a_length_that_is_taken_unmeasured_says_so():
    out, probed, _ = run(Takes([], 4), [0.25] * 6, 2)
    assert probed == [4]  # it is carried out, but its loss is not looked at
    assert (out.length, out.met, out.monotone, out.measured, out.probed) == (
        4,
        False,
        False,
        False,
        0,
    )
    assert math.isnan(out.loss)
    assert out.result == (4, "result")


def test_a_length_that_is_taken_against_the_rule_has_what_was_measured():
    curve = [9.0, 0.25, 0.75, 0.125, 0.5]  # lengths 2 to 6
    out, _, _ = run(Takes([3, 4, 5], 4), curve, 2)
    assert (out.length, out.loss, out.met, out.measured, out.probed) == (4, 0.75, False, True, 3)
    assert out.result == (4, "result")
    assert run(Takes([3, 4], 3), curve, 2)[0].loss == 0.25
    with pytest.raises(ValueError, match="Takes asked for a length of 7"):
        run(Takes([3], 7), curve, 2)


@pytest.mark.parametrize(
    ("make", "name"), [(lambda: KAry(MSE(0.1), 0), "k is 0"), (lambda: Binned(MSE(0.1), 1), "bins")]
)
def test_what_leaves_no_search_is_refused(make, name):
    with pytest.raises(ValueError, match=name):
        make()


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
