"""From what was measured to what is shown: tables, charts and the sections of a report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import UInt8

from ._charts import Chart, Level, Line
from ._comparison import StrategyComparison
from ._metrics import psnr
from ._report import ClipSection, PictureSection, Report, Shot, Video
from ._results import (
    Evaluation,
    Reconstruction,
    Row,
    Sample,
    satisfaction_of_fixed,
    satisfaction_of_search,
)
from ._strategy_summary import strategy_charts, strategy_table
from ._tables import Table, TableRow, number, share

_QUALITY_NOTE = (
    "tokens: mean of a block. bpp: bits per pixel, lengths of the blocks included. MSE on pixels "
    "in [-1, 1], over all pixels. PSNR = 10 log10(4/MSE) in dB: frame = mean over frames, clip = "
    "mean over items of the PSNR of the item's MSE, all = of the MSE over all pixels. SSIM 11: "
    "Gaussian window of 11x11, sigma 1.5; SSIM 7: uniform window of 7x7. met: share of blocks that "
    "meet the threshold."
)
_RIVAL_NOTE = (
    " Below the rule: trivial coders at a fixed rate, fitted to training material where they have "
    "anything to fit; each at a bpp of its own."
)
_COST_NOTE = (
    "Tokens of a block, over all blocks. bpp16: 16 x bits of the tokens alone, per pixel. passes: "
    "through the encoder and the decoder for a block, while encoding. s: seconds for an item, "
    "resizing included, compilation not. codes: distinct codes used over kept tokens; perplexity "
    "of their frequencies (several streams: one number each)."
)


def quality_table(evaluation: Evaluation) -> Table:
    """What each setting and baseline costs in bits, and how good it is."""
    columns = ("", "tokens", "bpp", "MSE", "PSNR frame", "clip", "all", "SSIM 11", "SSIM 7", "met")
    rows = tuple(
        TableRow(
            (
                row.name,
                number(row.tokens, 1),
                number(row.bits_per_pixel, 4),
                number(row.mse, 4),
                number(row.psnr_per_frame, 2),
                number(row.psnr_per_clip, 2),
                number(row.psnr_dataset, 2),
                number(row.ssim_gaussian, 3),
                number(row.ssim_uniform, 3),
                share(row.blocks_met),
            ),
            row.rival,
        )
        for row in evaluation.rows
    )
    title = f"{evaluation.name}: {evaluation.rows[0].items}"
    rivals = _RIVAL_NOTE if evaluation.baselines else ""
    return Table(title, columns, rows, _QUALITY_NOTE + rivals)


def cost_table(evaluation: Evaluation) -> Table:
    """How tokens are distributed over blocks, and what finding them costs."""
    columns = ("", "mean", "least", "10 %", "median", "90 %", "most", "bpp16")
    columns += ("enc. passes", "dec.", "enc. s", "dec. s", "codes", "perplexity")
    rows = tuple(
        TableRow(
            (
                row.name,
                number(row.tokens, 1),
                *(number(row.tokens_quantile(q), 0) for q in (0, 0.1, 0.5, 0.9, 1)),
                number(row.bpp16, 3),
                number(row.encoder_evaluations, 1),
                number(row.decoder_evaluations, 1),
                number(row.encode_seconds, 3),
                number(row.decode_seconds, 3),
                _used(row),
                _perplexity(row),
            )
        )
        for row in evaluation.rows
        if not row.rival
    )
    sizes = {row.usage.codebook_size for row in evaluation.rows if row.usage is not None}
    book = "".join(f"; code book of {size:,}" for size in sizes)
    return Table(
        f"{evaluation.name}: cost, on {evaluation.device}{book}", columns, rows, _COST_NOTE
    )


def _used(row: Row) -> str:
    if row.usage is None:
        return number(None, 0)
    return " / ".join(f"{stream.used:,}" for stream in row.usage.streams)


def _perplexity(row: Row) -> str:
    if row.usage is None:
        return number(None, 0)
    return " / ".join(f"{stream.perplexity:,.0f}" for stream in row.usage.streams)


def _rival_name(row: Row) -> str:
    bits = row.bits_per_pixel
    return f"{row.name} (floats)" if bits is None else f"{row.name} ({bits:.2g} bpp)"


def _length_chart(
    evaluation: Evaluation, title: str, unit: str, value: Callable[[Row], float]
) -> Chart:
    """A metric against the length of blocks, with a level for each baseline."""
    lines = []
    for name, rows in (("fixed length", evaluation.fixed), ("searched", evaluation.searched)):
        points = sorted((row.tokens, value(row)) for row in rows if row.tokens is not None)
        points = [point for point in points if np.isfinite(point[1])]
        if points:
            lines.append(Line(name, tuple(x for x, _ in points), tuple(y for _, y in points)))
    levels = [Level(_rival_name(row), value(row)) for row in evaluation.baselines]
    seen = "; ".join(
        f"{line.name}: {line.y[0]:.3g} with {line.x[0]:.3g} tokens to {line.y[-1]:.3g} with "
        f"{line.x[-1]:.3g}"
        for line in lines
    )
    against = "; ".join(f"{level.name}: {level.y:.3g}" for level in levels)
    return Chart(
        title=f"{evaluation.name}: {title}",
        x_label="tokens of a block (mean)",
        y_label=unit,
        lines=tuple(lines),
        levels=tuple(level for level in levels if np.isfinite(level.y)),
        alt=f"{title} against tokens of a block. {seen}. {against}",
    )


def _satisfaction_chart(evaluation: Evaluation, row: Row) -> Chart:
    """Blocks that meet a threshold: searched lengths, and equal lengths where those can be told."""
    curves = [("searched", satisfaction_of_search(row))]
    if row.loss == "MSE" and row.threshold is not None and evaluation.fixed:
        fixed = satisfaction_of_fixed(evaluation.fixed, row.threshold)
        curves.append(("equal length for all", fixed))
    lines = tuple(
        Line(name, curve.tokens, tuple(100 * part for part in curve.share))
        for name, curve in curves
    )
    seen = "; ".join(f"{line.name}: {line.y[-1]:.0f} % with {line.x[-1]:.3g}" for line in lines)
    return Chart(
        title=f"{evaluation.name}: blocks with {row.name}",
        x_label="tokens of a block (mean)",
        y_label="share of blocks, %",
        lines=lines,
        levels=(),
        alt=f"Share of blocks with {row.name}, against tokens of a block. {seen} tokens.",
        y_range=(0.0, 103.0),
    )


def charts(evaluation: Evaluation) -> tuple[Chart, ...]:
    """MSE and PSNR against length with the baselines as levels; satisfaction for each threshold."""
    curves = [
        _length_chart(evaluation, "MSE", "MSE, pixels in [-1, 1]", lambda row: row.mse),
        _length_chart(evaluation, "PSNR", "PSNR of all pixels, dB", lambda row: row.psnr_dataset),
    ]
    drawn = [chart for chart in curves if chart.lines]
    return (*drawn, *(_satisfaction_chart(evaluation, row) for row in evaluation.searched))


def _details(sample: Sample, row: Row) -> tuple[str, ...]:
    measured = row.measurements[sample.index]
    bits = measured.bits_per_pixel
    rate = "floats" if bits is None else f"{bits:.2g} bpp"
    return f"MSE {measured.mse:.4f}", f"{psnr(measured.mse):.1f} dB, {rate}"


def _shot(evaluation: Evaluation, sample: Sample, reconstruction: Reconstruction) -> Shot:
    row = evaluation.row(reconstruction.row)
    caption = row.name
    if reconstruction.tokens is not None:
        length = int(reconstruction.tokens.lengths.sum())
        caption = f"{row.name}: {length} tokens" if row.searched else f"{length} tokens"
    return Shot(caption, reconstruction.frames[0], _details(sample, row))


def picture_section(evaluation: Evaluation, sample: Sample) -> PictureSection:
    """A kept picture: truth, fixed lengths from most to fewest tokens, searches, baselines."""
    fixed = [row.name for row in reversed(evaluation.fixed)]
    found = [row.name for row in evaluation.searched]
    order = [*fixed, *found, *(row.name for row in evaluation.baselines)]
    shots = sorted(sample.reconstructions, key=lambda each: order.index(each.row))
    return PictureSection(
        name=sample.item,
        truth=sample.truth[0],
        shots=tuple(_shot(evaluation, sample, each) for each in shots),
    )


def clip_section(
    evaluation: Evaluation, sample: Sample, row: Row, video: Video | None = None
) -> ClipSection:
    """A kept clip at one setting."""
    (shown,) = [each for each in sample.reconstructions if each.row == row.name]
    measured = row.measurements[sample.index]
    spent = measured.spent
    if spent is None:
        raise ValueError(f"{row.name!r} is a baseline: it has no blocks to show")
    asked = f"Fewest tokens found for {row.name} in each block" if row.searched else row.name
    bits = measured.bits_per_pixel
    rate = "not quantized" if bits is None else f"{bits:.3g} bits per pixel"
    met = "" if row.threshold is None else f"; {sum(spent.met)} of them meet the threshold"
    return ClipSection(
        name=f"{sample.item}, {row.name}",
        truth=sample.truth,
        reconstruction=shown.frames,
        lengths=spent.lengths,
        longest=spent.tokens_per_block,
        frames_per_block=spent.frames_per_block,
        met=() if row.threshold is None else spent.met,
        caption=f"{asked}: {spent.tokens} tokens in {len(spent.lengths)} blocks{met}. {rate}, "
        f"MSE {measured.mse:.4f} over the clip.",
        cuts=sample.cuts,
        video=video,
    )


def _clip_sections(
    evaluation: Evaluation, sample: Sample, video: Video | None
) -> list[ClipSection]:
    rows = evaluation.searched or evaluation.fixed[-1:]
    # The video under the first one only: it is large.
    return [
        clip_section(evaluation, sample, row, video if index == 0 else None)
        for index, row in enumerate(rows)
    ]


def side_by_side(
    truth: UInt8[np.ndarray, "frames height width 3"],
    reconstruction: UInt8[np.ndarray, "frames height width 3"],
) -> UInt8[np.ndarray, "frames height both 3"]:
    """Truth on the left, reconstruction on the right: frames for a video."""
    return np.concatenate([truth, reconstruction], axis=2)


def _note_once(tables: Sequence[Table]) -> list[Table]:
    """The note, which is the same for all, under the last table only."""
    return [replace(table, note="") for table in tables[:-1]] + list(tables[-1:])


def build_report(
    evaluations: Sequence[Evaluation],
    *,
    title: str,
    lead: str = "",
    notes: Sequence[str] = (),
    videos: Mapping[str, Video] | None = None,
    comparisons: Sequence[StrategyComparison] = (),
) -> Report:
    """Everything that evaluations found, as a report: tables, charts, kept pictures and clips.

    **Arguments:**

    - `evaluations`: such as one of pictures and one of clips. Items kept in `samples` are shown.
    - `title`, `lead`: the heading and the line under it.
    - `notes`: what a reader should know to judge the numbers.
    - `videos`: an mp4 for a clip, by the item's name; `side_by_side` makes the frames.
    - `comparisons`: of strategies, from `compare_strategies`: tables and charts of their own.
    """
    films = {} if videos is None else videos
    samples = [(evaluation, sample) for evaluation in evaluations for sample in evaluation.samples]
    quality = [quality_table(evaluation) for evaluation in evaluations]
    cost = [cost_table(evaluation) for evaluation in evaluations]
    strategies = [strategy_table(comparison) for comparison in comparisons]
    return Report(
        title=title,
        lead=lead,
        tables=(*_note_once(quality), *_note_once(cost), *_note_once(strategies)),
        charts=(
            *(chart for evaluation in evaluations for chart in charts(evaluation)),
            *(chart for comparison in comparisons for chart in strategy_charts(comparison)),
        ),
        pictures=tuple(picture_section(e, s) for e, s in samples if len(s.truth) == 1),
        clips=tuple(
            section
            for e, s in samples
            if len(s.truth) > 1
            for section in _clip_sections(e, s, films.get(s.item))
        ),
        notes=tuple(notes),
    )
