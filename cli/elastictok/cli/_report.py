"""What `demo` and `eval` share: measuring pictures and clips, the report and the printed table."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from elastictok.data import write_clip
from elastictok.eval import (
    AbstractBaseline,
    Evaluation,
    Item,
    Patch,
    Setting,
    StrategyComparison,
    Video,
    build_report,
    evaluate,
    fit_baselines,
    format_table,
    quality_table,
    side_by_side,
    strategy_table,
    write_json,
    write_report,
)
from elastictok.inference import Tokenizer
from elastictok.models import ElasticTok


def baselines_for(
    model: ElasticTok, material: Sequence[np.ndarray], *, pictures: bool
) -> tuple[AbstractBaseline, ...]:
    """Trivial coders at the bits that a token of this model takes.

    **Arguments:**

    - `material`: what the PCA and the DCT's quantisers are fitted to.
    - `pictures`: a picture costs the model one block however deep its patch is, so the rivals'
        patch is one frame deep; for clips it is as deep as the model's.
    """
    patching = model.patching
    depth = 1 if pictures else patching.frames
    return fit_baselines(
        material,
        patch=Patch(depth, patching.height, patching.width),
        bits=model.quantizer.bits_per_token,
    )


def measured(
    name: str,
    tokenizer: Tokenizer,
    items: Sequence[Item],
    settings: Sequence[Setting],
    baselines: Sequence[AbstractBaseline],
    *,
    keep: int,
) -> Evaluation:
    """`evaluate` under a progress bar."""
    total = len(items) * (len(settings) + len(baselines))
    with progress_bar(f"measuring {name}") as advance:
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            advance(done / total)

        return evaluate(
            tokenizer,
            items,
            settings=settings,
            baselines=baselines,
            name=name,
            keep=keep,
            progress=step,
        )


@contextmanager
def progress_bar(text: str) -> Iterator[Callable[[float], None]]:
    """A bar on the terminal; what it gives is to be called with the share that is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=1.0)
        yield lambda done: bar.update(task, completed=done)


def publish(
    evaluations: Sequence[Evaluation],
    out: Path,
    *,
    title: str,
    lead: str,
    notes: Sequence[str],
    comparisons: Sequence[StrategyComparison] = (),
) -> None:
    """Writes report.html, evaluation.json and videos of the kept clips; prints the tables.

    **Arguments:**

    - `evaluations`: the first rows of each are printed.
    - `out`: an existing folder.
    - `title`, `lead`, `notes`: of the report.
    - `comparisons`: of strategies.
    """
    videos = {}
    (out / "reconstructions").mkdir(exist_ok=True)
    for evaluation in evaluations:
        for sample in evaluation.samples:
            if len(sample.truth) == 1:
                continue
            row = (evaluation.searched or evaluation.fixed[-1:])[0]
            (shown,) = [each for each in sample.reconstructions if each.row == row.name]
            path = out / "reconstructions" / f"{Path(sample.item).name}-side-by-side.mp4"
            write_clip(path, side_by_side(sample.truth, shown.frames), sample.fps or 8.0)
            caption = f"Left: truth. Right: {row.name}."
            videos[sample.item] = Video(path.read_bytes(), caption)
    report = build_report(
        evaluations, title=title, lead=lead, notes=notes, videos=videos, comparisons=comparisons
    )
    write_report(report, out / "report.html")
    write_json(evaluations, out / "evaluation.json", comparisons)
    for evaluation in evaluations:
        print(format_table(quality_table(evaluation)))
    for comparison in comparisons:
        print(f"\n{format_table(strategy_table(comparison))}")
    sys.stdout.flush()
