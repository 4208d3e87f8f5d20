"""Strategies compared on blocks whose losses are prescribed, against sums done in plain Python."""

import html
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictok.eval import (
    Chart,
    Item,
    Line,
    Table,
    TableGroup,
    TableRow,
    build_report,
    compare_strategies,
    cost_chart,
    evaluate,
    format_table,
    length_settings,
    render_chart,
    render_report,
    spread_thresholds,
    strategy_chart,
    strategy_charts,
    strategy_table,
    write_json,
)
from elastictok.eval._evaluate import Setting
from elastictok.eval._tables import change, times
from elastictok.inference import (
    L1,
    MSE,
    AbstractCriterion,
    AbstractStrategy,
    Binary,
    Binned,
    Codes,
    ElasticCodec,
    EncodeOnce,
    FixedLength,
    KAry,
    Tokenizer,
    WarmStart,
)

FEWEST, MOST = 2, 16
LENGTHS = range(FEWEST, MOST + 1)


class Prescribed(ElasticCodec):
    """Block `n` of grey `100 + n`, decoded from `l` tokens, is off by `curves[n][l - 2]` greys.

    Token 0 says which block it is, and token 1 which length the encoder was told: where that is not
    the length kept, the block is off by `worse` more.
    """

    size = (16, 16)
    patch = (4, 4)
    frames_per_block = 2
    context = 2
    min_tokens = FEWEST
    kind = Codes(256)
    bits_per_token = 8.0
    fingerprint = "c0de" * 16

    def __init__(self, curves, worse=3, lanes=1):
        self.curves, self.worse, self._lanes = curves, worse, lanes
        self.groups = []

    @property
    def lanes(self):
        return self._lanes

    def tokens_per_block(self, height, width):
        return (height // 4) * (width // 4)

    def encoder_state(self, window, height, width):
        return 0

    def decoder_state(self, window, height, width):
        return 0

    def encode(self, pixels, length, state):
        values = np.zeros(MOST, np.int32)
        values[:2] = pixels[0, 0, 0, 0], length
        return values, state

    def decode(self, values, length, state):
        grey, told = int(values[0]), int(values[1])
        off = self.curves[grey - 100][length - FEWEST] + (self.worse if told != length else 0)
        return np.full((2, 16, 16, 3), grey + off, np.uint8), state

    def encode_batch(self, requests):
        self.groups.append(len(requests))
        return [self.encode(*request) for request in requests]


class Guess(AbstractStrategy):
    """Takes a length that it has not looked at."""

    criterion: AbstractCriterion
    length: int

    def search(self, block):
        return self.length
        yield


# Six blocks: two easy ones, two harder ones, one that is never good, one whose loss rises again.
CURVES = (
    [9, 6, 4, 3, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0, 0],
    [5, 3, 3, 2, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
    [30, 26, 22, 18, 15, 13, 11, 9, 8, 7, 6, 4, 3, 2, 1],
    [40, 33, 27, 22, 18, 14, 12, 10, 8, 6, 5, 4, 4, 3, 2],
    [60] * 15,
    [20, 4, 9, 8, 7, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1],
)
# Blocks of each item, and frames: the last block of the first item has one.
BLOCKS = ((0, 2, 4), (1,), (3, 5))
FRAMES = (5, 2, 4)


def clips(blocks=BLOCKS, frames=FRAMES):
    return [
        Item(
            f"item {n}",
            np.concatenate([np.full((2, 16, 16, 3), 100 + b, np.uint8) for b in each])[:count],
        )
        for n, (each, count) in enumerate(zip(blocks, frames, strict=True))
    ]


def tokenizer(codec):
    return Tokenizer(codec, FixedLength(length=MOST))


def threshold(off):
    """Just met by blocks that are off by so many grey levels."""
    return (off / 127.5) ** 2 * (1 + 1e-9)


def bisected(curve, most):
    """Length, and the number of lengths looked at: all tokens, then the middle of what is left."""
    probes = 1
    if curve[-1] > most:
        return MOST, probes
    low, high = FEWEST, MOST
    while low < high:
        middle = (low + high - 1) // 2
        probes += 1
        if curve[middle - FEWEST] <= most:
            high = middle
        else:
            low = middle + 1
    return low, probes


def first(curve, most, among=LENGTHS):
    """The first of some lengths that is good enough, else the last."""
    return next((n for n in among if curve[n - FEWEST] <= most), MOST)


def once(curve, worse=3):
    """The curve where the encoder is told that all tokens are kept."""
    return [off + worse for off in curve[:-1]] + curve[-1:]


# As `Binned(criterion, 5)` cuts 2 to 16: 2, 5.5, 9, 12.5, 16.
BINS = (2, 6, 9, 12, 16)
# For each strategy: length of a block, passes through the encoder, and through the decoder.
ORACLES = {
    "exhaustive optimum": lambda curve, most: (first(curve, most), 15, 15),
    "binary": lambda curve, most: (bisected(curve, most)[0], *[bisected(curve, most)[1]] * 2),
    "5 bins": lambda curve, most: (first(curve, most, BINS), 5, 5),
    "encode once": lambda curve, most: (
        bisected(once(curve), most)[0],
        1,
        bisected(once(curve), most)[1],
    ),
    "guess": lambda curve, most: (6, 1, 0),
}
MAKERS = {
    "binary": Binary,
    "5 bins": lambda c: Binned(c, 5),
    "encode once": lambda c: EncodeOnce(Binary(c)),
    "guess": lambda c: Guess(c, 6),
}
SHARES = (1 / 8, 1 / 2, 3 / 4, 1)


def decibels(mse):
    return 10 * math.log10(4 / mse) if mse else math.inf


def expected(name, most):
    """Every number of a strategy's line, by loops over blocks."""
    found, offs = {}, {}
    for b, curve in enumerate(CURVES):
        found[b] = ORACLES[name](curve, most)
        seen = once(curve) if name == "encode once" else curve
        offs[b] = seen[found[b][0] - FEWEST]
    return summed({b: n for b, (n, _, _) in found.items()}, offs, most) | {
        "encoder": sum(e for _, e, _ in found.values()) / 6,
        "decoder": sum(d for _, _, d in found.values()) / 6,
        "measured": 0 if name == "guess" else 1,
    }


def summed(lengths, offs, most):
    errors, bits = [], 0
    for blocks, count in zip(BLOCKS, FRAMES, strict=True):
        errors.append([(offs[b] / 127.5) ** 2 for b in blocks for _ in range(2)][:count])
        bits += sum(8 * lengths[b] + 4 for b in blocks)
    flat = [error for each in errors for error in each]
    met = {b: off <= most for b, off in offs.items()}
    return {
        "lengths": lengths,
        "met": met,
        "tokens": sum(lengths.values()) / 6,
        "blocks_met": sum(met.values()) / 6,
        "items_met": sum(all(met[b] for b in blocks) for blocks in BLOCKS) / 3,
        "bpp": bits / (11 * 256),
        "psnr_all": decibels(sum(flat) / 11),
        "psnr_frame": sum(map(decibels, flat)) / 11,
        "psnr_clip": sum(decibels(sum(each) / len(each)) for each in errors) / 3,
    }


def overhead(one, best):
    both = [b for b in range(6) if one["met"][b] and best["met"][b]]
    if not both:
        return None
    return sum(one["lengths"][b] for b in both) / sum(best["lengths"][b] for b in both) - 1


OFFS = (9, 4, 1)


@pytest.fixture(scope="module")
def compared():
    return compare_strategies(
        tokenizer(Prescribed(CURVES)),
        clips(),
        [MSE(threshold(off)) for off in OFFS],
        MAKERS,
        shares=SHARES,
        name="clips",
    )


def check(result, one, best):
    row = result.row
    assert row.lengths == tuple(one["lengths"][b] for blocks in BLOCKS for b in blocks)
    assert row.tokens == pytest.approx(one["tokens"])
    assert row.bits_per_pixel == pytest.approx(one["bpp"])
    assert row.psnr_dataset == pytest.approx(one["psnr_all"])
    assert row.psnr_per_frame == pytest.approx(one["psnr_frame"])
    assert row.psnr_per_clip == pytest.approx(one["psnr_clip"])
    assert row.blocks_met == pytest.approx(one["blocks_met"])
    assert row.items_met == pytest.approx(one["items_met"])
    assert row.blocks_measured == one["measured"]
    assert row.encoder_evaluations == pytest.approx(one["encoder"])
    assert row.decoder_evaluations == pytest.approx(one["decoder"])
    passes = one["encoder"] + one["decoder"]
    assert result.fewer_evaluations == pytest.approx((best["encoder"] + best["decoder"]) / passes)
    assert result.met_difference == pytest.approx(one["blocks_met"] - best["blocks_met"])
    assert result.token_overhead == pytest.approx(overhead(one, best))
    assert result.faster == pytest.approx(result.optimum.encode_seconds / row.encode_seconds)


@pytest.mark.parametrize("off", OFFS)
@pytest.mark.parametrize("name", ORACLES)
def test_every_number_of_a_strategy_by_hand(compared, name, off):
    (result,) = [
        each
        for each in compared.of(name)
        if each.row.threshold == pytest.approx(threshold(off), rel=1e-6)
    ]
    check(result, expected(name, off), expected("exhaustive optimum", off))


def test_the_oracle_tells_strategies_apart():
    """Of no use if all of them came to the same."""
    seen = {name: str([expected(name, off) for off in OFFS]) for name in ORACLES}
    assert len(set(seen.values())) == len(ORACLES)
    # A block whose loss rises again: bisection meets the threshold, but not with the fewest tokens.
    assert expected("exhaustive optimum", 4)["lengths"][5] == 3
    assert expected("binary", 4)["lengths"][5] == 10


@pytest.mark.parametrize("off", OFFS)
def test_equal_lengths_are_the_fewest_that_let_as_many_blocks_meet_it(compared, off):
    best = expected("exhaustive optimum", off)
    choices = []
    for length in (2, 8, 12, 16):
        offs = {b: curve[length - FEWEST] for b, curve in enumerate(CURVES)}
        choices.append(
            summed(dict.fromkeys(range(6), length), offs, off)
            | {"encoder": 1, "decoder": 1, "measured": 1}
        )
    one = next(each for each in choices if each["blocks_met"] >= best["blocks_met"])
    (result,) = [each for each in compared.of("equal lengths") if each.requirement == _asked(off)]
    check(result, one, best)


def _asked(off):
    return f"MSE ≤ {threshold(off):g}"


def test_equal_lengths_that_none_meet_are_all_tokens():
    hopeless = Prescribed([[60] * 15])
    found = compare_strategies(
        tokenizer(hopeless), clips([(0,)], [2]), [MSE(1e-4)], {"binary": Binary}, shares=SHARES
    )
    for result in found.results:
        assert result.row.lengths == (16,)
        assert result.row.blocks_met == 0
        assert result.token_overhead is None
        assert result.met_difference == 0


def test_equal_lengths_need_not_do_better_than_the_reference():
    # Good with any length; and with 8 tokens alone, which a reference of 2 and 16 does not look at.
    curves = [[1] * 15, [60] * 6 + [1] + [60] * 8]
    found = compare_strategies(
        tokenizer(Prescribed(curves)),
        clips([(0,), (1,)], [2, 2]),
        [MSE(threshold(1))],
        {},
        optimum=lambda c: Binned(c, 2),
        shares=SHARES,
    )
    (result,) = found.of("equal lengths")
    assert result.row.lengths == (2, 2)
    assert result.met_difference == 0


def test_a_comparison_is_grouped_as_it_says(compared):
    assert compared.optimum == "exhaustive optimum"
    assert compared.strategies == ("exhaustive optimum", *MAKERS)
    assert compared.requirements == tuple(map(_asked, OFFS))
    groups = list(compared.groups())
    assert [requirement for requirement, _ in groups] == list(map(_asked, OFFS))
    for _, results in groups:
        assert [r.strategy for r in results] == [*compared.strategies, "equal lengths"]
    tokens = [result.row.tokens for result in compared.of("binary")]
    assert tokens == sorted(tokens)
    assert [row.tokens for row in compared.fixed] == [2, 8, 12, 16]
    with pytest.raises(KeyError, match="no strategy 'x'; there are"):
        compared.of("x")


falling = st.lists(st.integers(0, 40), min_size=15, max_size=15).map(
    lambda drops: sorted(drops, reverse=True)
)


@settings(max_examples=8)
@given(st.lists(falling, min_size=4, max_size=4), st.integers(0, 40))
def test_nothing_beats_the_optimum_where_losses_fall(curves, off):
    """Nor does any strategy that searches until it has found it need a token more."""
    makers = {
        "binary": Binary,
        "3-ary": lambda c: KAry(c, 3),
        "4 bins": lambda c: Binned(c, 4),
        "warm start": lambda c: WarmStart(Binary(c)),
        "guess": lambda c: Guess(c, 7),
    }
    found = compare_strategies(
        tokenizer(Prescribed(curves)),
        clips([(0, 1, 2), (3,)], [6, 1]),
        [MSE(threshold(off))],
        makers,
        shares=(1 / 2, 1),
    )
    for result in found.results:
        met = [m for spent in result.row.spent for m in spent.met]
        best = [m for spent in result.optimum.spent for m in spent.met]
        assert all(b or not m for m, b in zip(met, best, strict=True))
        assert result.met_difference <= 0
        assert result.token_overhead is None or result.token_overhead >= 0
        if met == best and result.strategy not in ("guess", "equal lengths"):
            assert result.row.tokens >= result.optimum.tokens
        if result.strategy in ("exhaustive optimum", "binary", "3-ary", "warm start"):
            assert result.row.lengths == result.optimum.lengths


def cells(table):
    """Cells by threshold, strategy and column."""
    found, group = {}, None
    for row in table.rows:
        if isinstance(row, TableGroup):
            group = row.name
        else:
            found[group, row.cells[0]] = dict(zip(table.columns, row.cells, strict=True))
    return found


def test_the_table_says_what_was_found(compared):
    table = strategy_table(compared)
    assert table.title.startswith("clips: strategies, 3 items of 2 to 5 frames, 16x16, on ")
    found = cells(table)
    assert list(found) == [
        (_asked(off), name) for off in OFFS for name in (*ORACLES, "equal lengths")
    ]
    best = expected("exhaustive optimum", 4)
    for name in ORACLES:
        one, row = expected(name, 4), found[_asked(4), name]
        assert row["tokens"] == f"{one['tokens']:.1f}"
        assert row["bpp"] == f"{one['bpp']:.4f}"
        assert row["PSNR frame"] == f"{one['psnr_frame']:.2f}"
        assert row["clip"] == f"{one['psnr_clip']:.2f}"
        assert row["all"] == f"{one['psnr_all']:.2f}"
        assert row["met"] == f"{100 * one['blocks_met']:.0f} %"
        assert row["items"] == f"{100 * one['items_met']:.0f} %"
        assert (row["enc."], row["dec."]) == (f"{one['encoder']:.1f}", f"{one['decoder']:.1f}")
        assert row["measured"] == ("0 %" if name == "guess" else "100 %")
        if name == "exhaustive optimum":
            assert row["overhead"] == row["diff."] == row["fewer"] == row["faster"] == ""
            continue
        share = 100 * overhead(one, best)
        assert row["overhead"] == ("0 %" if abs(share) < 0.05 else f"{share:+.1f} %")
        points = 100 * (one["blocks_met"] - best["blocks_met"])
        assert row["diff."] == ("0" if points == 0 else f"{points:+.0f}")
        assert re.fullmatch(r"[\d.]+x", row["fewer"])
        assert re.fullmatch(r"[\d.]+x", row["faster"])
    assert "exhaustive optimum" in table.note
    assert "of 4 that were tried" in table.note


def test_charts_draw_the_points_and_the_frontier(compared):
    chart = strategy_chart(compared)
    frontier = chart.frontier
    assert frontier is not None
    assert [line.name for line in chart.lines] == [*MAKERS, "equal lengths for all"]
    for line in (frontier, *chart.lines[:-1]):
        points = {
            (expected(line.name, off)["tokens"], expected(line.name, off)["psnr_all"])
            for off in OFFS
        }
        assert len(line.x) == 3
        for x, y in zip(line.x, line.y, strict=True):
            assert min(math.hypot(x - a, y - b) for a, b in points) < 1e-9
        assert list(line.x) == sorted(line.x)
    assert chart.lines[-1].x == (2, 8, 12, 16)
    chart = cost_chart(compared)
    assert chart.ratios
    assert chart.frontier == Line("exhaustive optimum", (30.0,) * 3, (0.0,) * 3, joined=False)
    assert [line.name for line in chart.lines] == list(MAKERS)
    (bins,) = [line for line in chart.lines if line.name == "5 bins"]
    best = [expected("exhaustive optimum", off) for off in OFFS]
    shares = [100 * overhead(expected("5 bins", o), b) for o, b in zip(OFFS, best, strict=True)]
    assert bins.x == (10.0,) * 3
    assert bins.y == pytest.approx(sorted(shares))


def test_points_that_are_not_numbers_are_left_out():
    perfect = Prescribed([[9, 3] + [0] * 13])
    found = compare_strategies(
        tokenizer(perfect),
        clips([(0,)], [1]),
        [MSE(0.0), MSE(threshold(3))],
        {"binary": Binary},
        shares=SHARES,
    )
    chart = strategy_chart(found)
    assert [line.x for line in chart.lines] == [(3,), (2,)]
    assert chart.frontier is not None
    assert chart.frontier.x == (3,)
    only = compare_strategies(
        tokenizer(Prescribed([[60] * 15])),
        clips([(0,)], [1]),
        [MSE(1e-4)],
        {"b": Binary},
        shares=(1,),
    )
    (group,) = strategy_table(only).rows
    assert group == TableGroup("MSE ≤ 0.0001: met by no block, whatever its length")
    # There is no overhead to draw.
    assert [chart.title for chart in strategy_charts(only)] == ["strategies: what strategies reach"]


def test_the_report_has_the_table_and_the_charts(compared):
    found = evaluate(
        tokenizer(Prescribed(CURVES)), clips(), settings=length_settings([4, 8]), name="clips"
    )
    report = build_report([found], title="t", comparisons=[compared, replace(compared, name="b")])
    titles = [table.title.split(",")[0] for table in report.tables]
    assert titles[-2:] == ["clips: strategies", "b: strategies"]
    # The note, which is the same, once.
    assert report.tables[-2].note == ""
    page = render_report(report)
    (table,) = re.findall(r'<table aria-label="clips: strategies.*?</table>', page, flags=re.DOTALL)
    heads = re.findall(r'<tr class="group"><th scope="colgroup" colspan="16">(.*?)</th>', table)
    assert list(map(html.unescape, heads)) == list(map(_asked, OFFS))
    lines = re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', table, flags=re.DOTALL)
    assert [name for name, _ in lines] == [*ORACLES, "equal lengths"] * 3
    wanted = [row.cells[1:] for row in report.tables[-2].rows if isinstance(row, TableRow)]
    for (_, rest), row in zip(lines, wanted, strict=True):
        assert tuple(html.unescape(c) for c in re.findall(r"<td>(.*?)</td>", rest)) == row
    for title in ("what strategies reach", "what strategies take"):
        assert f"clips: {title}" in page
    (svg,) = re.findall(
        r"<h3>clips: what strategies reach</h3>\s*(<svg.*?</svg>)", page, flags=re.DOTALL
    )
    for name in ORACLES:
        assert name in svg
    assert "exhaustive optimum: " in svg.split(">", 1)[0]


def test_json_has_all_of_it(compared, tmp_path):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    path = write_json([], tmp_path / "evaluation.json", [compared])
    facts = json.loads(path.read_text("utf-8"), parse_constant=refuse)
    assert (facts["format"], facts["version"]) == ("elastictok-evaluation", 1)
    assert facts["evaluations"] == []
    (found,) = facts["comparisons"]
    assert (found["name"], found["optimum"]) == ("clips", "exhaustive optimum")
    assert (found["device"], found["fingerprint"]) == (compared.device, compared.fingerprint)
    assert len(found["results"]) == len(compared.results) == 18
    for read, result in zip(found["results"], compared.results, strict=True):
        assert (read["strategy"], read["requirement"]) == (result.strategy, result.requirement)
        assert read["threshold"] == result.row.threshold
        assert read["summary"]["tokens"] == result.row.tokens
        assert read["summary"]["blocks_measured"] == result.row.blocks_measured
        assert read["against_optimum"] == {
            "token_overhead": result.token_overhead,
            "met_difference": result.met_difference,
            "fewer_evaluations": result.fewer_evaluations,
            "faster": result.faster,
        }
        lengths = [m["spent"]["lengths"] for m in read["measurements"]]
        assert [n for each in lengths for n in each] == list(result.row.lengths)
    assert [row["summary"]["tokens"] for row in found["fixed"]] == [2, 8, 12, 16]
    # Equal lengths were made for no threshold.
    assert {row["threshold"] for row in found["fixed"]} == {None}


def test_what_was_not_measured_is_judged_by_what_comes_back():
    setting = Setting("guess", Guess(MSE(threshold(9)), 6), searched=True)
    (row,) = evaluate(tokenizer(Prescribed(CURVES)), clips(), settings=[setting]).rows
    offs = [[CURVES[b][6 - FEWEST] for b in blocks] for blocks in BLOCKS]
    for spent, each in zip(row.spent, offs, strict=True):
        assert spent.losses == pytest.approx([(off / 127.5) ** 2 for off in each])
        assert spent.met == tuple(off <= 9 for off in each)
        assert not any(spent.measured)


def test_items_are_encoded_together_and_the_time_is_divided():
    codec = Prescribed(CURVES, lanes=2)
    settings = [Setting("binary", Binary(MSE(threshold(4))), searched=True)]
    items = clips([(0,), (3, 5), (2, 4)], [2, 4, 3])
    (row,) = evaluate(tokenizer(codec), items, settings=settings).rows
    # The first two do not fit together: they have other windows. The last one is alone.
    assert max(codec.groups) == 1
    (row,) = evaluate(tokenizer(codec), items[1:], settings=settings).rows
    assert max(codec.groups) == 2
    alone = Prescribed(CURVES, lanes=2)
    (apart,) = evaluate(tokenizer(alone), items[1:], settings=settings, together=1).rows
    assert max(alone.groups) == 1
    assert row.lengths == apart.lengths
    assert row.encoder_evaluations == apart.encoder_evaluations
    assert all(spent.encode_seconds > 0 for spent in row.spent)
    with pytest.raises(ValueError, match="0 items are to be encoded together"):
        evaluate(tokenizer(codec), clips(), settings=settings, together=0)


def test_thresholds_lie_between_what_is_reached():
    # The median block is off by 24 with the fewest tokens, by 1 with all.
    codec = Prescribed([[30] * 14 + [2], [24] * 14 + [1], [20] * 14 + [0]])
    material = clips([(0,), (1, 2)], [2, 4])
    found = spread_thresholds(tokenizer(codec), material, 3)
    high, low = (24 / 127.5) ** 2, (1 / 127.5) ** 2
    expected = [high * (low / high) ** (part / 4) for part in (1, 2, 3)]
    assert found == pytest.approx(expected, rel=0.05)
    assert all(value == float(f"{value:.2g}") for value in found)
    assert found == tuple(sorted(found, reverse=True))
    flat = Prescribed([[30] * 15] * 3)
    assert spread_thresholds(tokenizer(flat), material) == (float(f"{(30 / 127.5) ** 2:.2g}"),)
    exact = Prescribed([[0] * 15] * 3)
    assert spread_thresholds(tokenizer(exact), material) == (float(f"{low:.2g}"),)
    with pytest.raises(ValueError, match="0 thresholds"):
        spread_thresholds(tokenizer(codec), material, 0)


def test_progress_ends_at_one():
    seen = []
    compare_strategies(
        tokenizer(Prescribed(CURVES)),
        clips(),
        [MSE(0.1)],
        {"binary": Binary},
        shares=(1,),
        progress=seen.append,
    )
    assert seen == pytest.approx([n / 9 for n in range(1, 10)])


@pytest.mark.parametrize(
    ("criteria", "strategies", "message"),
    [
        ([], {}, "at least one criterion"),
        ([MSE(0.1), L1(0.1)], {}, "criteria measure L1, MSE; one comparison has one loss"),
        ([MSE(0.1)], {"equal lengths": Binary}, "'equal lengths', which has a meaning"),
        ([MSE(0.1)], {"exhaustive optimum": Binary}, "which has a meaning: rename it"),
        ([MSE(0.1), MSE(0.1)], {}, "same name"),
        ([MSE(0.1)], {"b": lambda c: Binary(MSE(0.2))}, "made for MSE ≤ 0.1 goes by MSE ≤ 0.2"),
    ],
)
def test_what_cannot_be_compared_is_refused(criteria, strategies, message):
    with pytest.raises(ValueError, match=message):
        compare_strategies(tokenizer(Prescribed(CURVES)), clips(), criteria, strategies)


def test_another_reference_has_another_name(compared):
    found = compare_strategies(
        tokenizer(Prescribed(CURVES)),
        clips(),
        [MSE(threshold(4))],
        {"binary": Binary},
        optimum=lambda c: Binned(c, 5),
        shares=(1,),
    )
    assert found.strategies == ("reference", "binary")
    (result,) = found.of("binary")
    # A finer search than what it is held against: below nothing.
    assert result.token_overhead < 0
    with pytest.raises(ValueError, match=r"6 blocks and .* 1; compare rows of the same items"):
        replace(
            result, optimum=replace(result.optimum, measurements=result.optimum.measurements[1:2])
        )


def test_groups_stand_under_rules_of_their_own():
    rows = (
        TableGroup("first group"),
        TableRow(("a", "1")),
        TableGroup("second"),
        TableRow(("b", "2")),
        TableRow(("c", "3"), rival=True),
    )
    lines = format_table(Table("t", ("", "n"), rows)).splitlines()
    rule = lines[2]
    assert lines[2:] == [rule, "first group", "a  1", rule, "second", "b  2", rule, "c  3"]


def test_differences_and_ratios_in_words():
    assert [change(x, 1, " %") for x in (None, 0.0, 0.0004, -0.0004, 0.123, -0.5)] == [
        *("-", "0 %", "0 %", "0 %", "+12.3 %", "-50.0 %")
    ]
    assert [times(x) for x in (None, 1.0, 9.94, 9.96, 122.4)] == [
        "-",
        "1.0x",
        "9.9x",
        "10x",
        "122x",
    ]


def test_many_lines_are_told_apart_and_named_below_the_plot():
    lines = tuple(Line(f"line {n}", (1, 2), (n, n + 1)) for n in range(12))
    chart = Chart("c", "x", "y", lines, (), "alt", frontier=Line("best", (1, 2), (0, 1)))
    svg = render_chart(chart)
    for name in ("best", *(line.name for line in lines)):
        assert f">{name}<" in svg
    drawn = re.findall(r'<path d="M [^"]*" clip-path="[^"]*" style="([^"]*)"', svg)
    looks = [style for style in drawn if "stroke-linecap: square" in style or "dasharray" in style]
    curves = [look for look in looks if "stroke-width: 0.6" not in look]
    assert len(set(curves)) == len(curves) == 13
    few = render_chart(Chart("c", "x", "y", lines[:2], (), "alt"))
    tall, low = (float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', s)[1]) for s in (svg, few))
    assert tall > low


def test_ratios_take_no_zero():
    with pytest.raises(ValueError, match="x of 0 or less"):
        Chart("c", "x", "y", (Line("l", (0, 1), (1, 1)),), (), "alt", ratios=True)
