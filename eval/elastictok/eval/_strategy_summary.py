"""Strategies side by side: a table, and charts of what they reach and what they take."""

import math
from collections.abc import Callable, Sequence

from ._charts import Chart, Line
from ._comparison import StrategyComparison, StrategyResult
from ._results import Row
from ._tables import Table, TableGroup, TableRow, change, number, share, times

_NOTE = (
    "tokens: mean of a block. overhead: tokens more than with the {optimum}, over the blocks at "
    "which both meet the threshold. bpp: bits per pixel, lengths of the blocks included. PSNR in "
    "dB: frame = mean over frames, clip = mean over items, all = of the MSE over all pixels. met: "
    "share of blocks that meet the threshold, judged on the frames that come back; diff.: in "
    "points, against the {optimum}; items: share of items all of whose blocks do. enc., dec.: "
    "passes through encoder and decoder for a block, while encoding; fewer: times fewer passes "
    "than the {optimum} takes. s: seconds to encode an item, compilation left out; faster: times "
    "less than the {optimum} takes. measured: share of blocks whose loss the strategy measured "
    "before it chose their length. {equal}: no search; the least share of all tokens, of {count} "
    "that were tried, with which as many blocks meet the threshold; finding it is not counted."
)
_COLUMNS = ("", "tokens", "overhead", "bpp", "PSNR frame", "clip", "all", "met", "diff.", "items")
_COLUMNS += ("enc.", "dec.", "fewer", "s", "faster", "measured")


def _cells(result: StrategyResult, optimum: bool) -> tuple[str, ...]:
    row = result.row
    return (
        result.strategy,
        number(row.tokens, 1),
        "" if optimum else change(result.token_overhead, 1, " %"),
        number(row.bits_per_pixel, 4),
        number(row.psnr_per_frame, 2),
        number(row.psnr_per_clip, 2),
        number(row.psnr_dataset, 2),
        share(row.blocks_met),
        "" if optimum else change(result.met_difference, 0),
        share(row.items_met),
        number(row.encoder_evaluations, 1),
        number(row.decoder_evaluations, 1),
        "" if optimum else times(result.fewer_evaluations),
        number(row.encode_seconds, 3),
        "" if optimum else times(result.faster),
        share(row.blocks_measured),
    )


def strategy_table(comparison: StrategyComparison) -> Table:
    """What each strategy spends and reaches at each threshold, against the exhaustive optimum."""
    rows: list[TableRow | TableGroup] = []
    for requirement, results in comparison.groups():
        if not any(result.row.blocks_met for result in results):
            rows.append(TableGroup(f"{requirement}: met by no block, whatever its length"))
            continue
        rows.append(TableGroup(requirement))
        rows += [
            TableRow(_cells(result, optimum=result.strategy == comparison.optimum))
            for result in results
        ]
    return Table(
        f"{comparison.name}: strategies, {comparison.fixed[0].items}, on {comparison.device}",
        _COLUMNS,
        tuple(rows),
        _NOTE.format(
            optimum=comparison.optimum, equal=comparison.equal, count=len(comparison.fixed)
        ),
    )


def _line(
    name: str, points: Sequence[tuple[float | None, float | None]], joined: bool = True
) -> Line | None:
    """The points that there are, from left to right; a PSNR may be infinite, for one."""
    known = sorted(
        (x, y) for x, y in points if x is not None and y is not None and math.isfinite(y)
    )
    if not known:
        return None
    return Line(name, tuple(x for x, _ in known), tuple(y for _, y in known), joined)


def _lines(
    comparison: StrategyComparison,
    point: Callable[[StrategyResult], tuple[float | None, float | None]],
    joined: bool = True,
) -> tuple[Line | None, list[Line]]:
    """Of the optimum, and of the strategies that have a point to show."""
    best, *others = [
        _line(name, [point(result) for result in comparison.of(name)], joined)
        for name in comparison.strategies
    ]
    return best, [line for line in others if line is not None]


def _quality(row: Row) -> tuple[float | None, float | None]:
    return row.tokens, row.psnr_dataset


def strategy_chart(comparison: StrategyComparison) -> Chart:
    """PSNR against tokens: a line for each strategy, the exhaustive optimum as the frontier."""
    frontier, lines = _lines(comparison, lambda result: _quality(result.row))
    equal = _line("equal lengths for all", [_quality(row) for row in comparison.fixed])
    drawn = (*lines, equal) if equal is not None else tuple(lines)
    shown = drawn if frontier is None else (frontier, *drawn)
    return Chart(
        title=f"{comparison.name}: what strategies reach",
        x_label="tokens of a block (mean)",
        y_label="PSNR of all pixels, dB",
        lines=drawn,
        levels=(),
        alt="PSNR against tokens of a block. " + _in_words(shown, "dB with", "tokens"),
        frontier=frontier,
    )


def cost_chart(comparison: StrategyComparison) -> Chart:
    """Tokens above the exhaustive optimum's, against the passes that it took to find them.

    A point for each threshold that some block meets.
    """
    frontier, lines = _lines(
        comparison,
        lambda result: (
            result.evaluations,
            None if result.token_overhead is None else 100 * result.token_overhead,
        ),
        joined=False,
    )
    shown = tuple(lines) if frontier is None else (frontier, *lines)
    return Chart(
        title=f"{comparison.name}: what strategies take",
        x_label="passes through the networks for a block",
        y_label=f"tokens above the {comparison.optimum}, %",
        lines=tuple(lines),
        levels=(),
        alt=f"Tokens above those of the {comparison.optimum}, against passes for a block. "
        + _in_words(shown, "% with", "passes"),
        frontier=frontier,
        ratios=True,
    )


def strategy_charts(comparison: StrategyComparison) -> tuple[Chart, ...]:
    """What strategies reach, and what they take; those of them that have anything to show."""
    charts = (strategy_chart(comparison), cost_chart(comparison))
    return tuple(chart for chart in charts if chart.lines)


def _in_words(lines: Sequence[Line], y_unit: str, x_unit: str) -> str:
    return "; ".join(
        f"{line.name}: {line.y[0]:.3g} {y_unit} {line.x[0]:.3g} {x_unit} to {line.y[-1]:.3g} "
        f"{y_unit} {line.x[-1]:.3g}"
        for line in lines
    )
