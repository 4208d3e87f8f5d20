"""`elastictok reproduce zoo-small`: every small tokenizer, trained alike, measured alike."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from elastictok.eval import (
    Evaluation,
    Item,
    Row,
    Setting,
    Table,
    TableGroup,
    TableRow,
    describe_device,
    evaluate,
    format_markdown,
    format_table,
    requirement,
    share_settings,
)
from elastictok.inference import MSE, AbstractStrategy, Binary, EncodeOnce, FixedLength, Tokenizer
from elastictok.models import (
    AbstractTailDrop,
    ConditionDropout,
    ElasticTok,
    FixedDrop,
    Preset,
    count_parameters,
    fingerprint,
    load,
    model_card,
    save,
)
from elastictok.models.presets import PRESETS
from elastictok.train import data_mesh, latest_step, plan

from ._commands import Reproduce
from ._demo import TRAINING_CLIPS, optimizer, say, train
from ._gallery import Exhibit, draw_sheet, gallery_page, write_sheet
from ._names import find
from ._samples import (
    CLIP_FRAMES,
    FPS,
    TEST,
    TRAIN,
    Samples,
    photographs,
    training_clip,
    write_samples,
)

NAME = "zoo-small"
SIZE = (64, 64)
_FAMILIES = ("elastic_", "register_", "coord_")
BLOCKS = 8  # in a training step, pictures or blocks of frames
SHARES = (1 / 4, 1 / 2, 1)
THRESHOLDS = (0.1, 0.07, 0.05)
_CROPS = 8  # of each photograph that is measured on
_CLIPS = 3  # besides the demo's
_SAVE_EVERY = 100
# First frames of scenes of the demo's clip, shown as pictures; and frames of it, shown of clips.
_SHOWN_PICTURES = {"cat": 0, "rocket": 16, "cameraman": 32}
_SHOWN_FRAMES = (4, 12, 20, 36)

# Of the photographs that the gallery shows, as scikit-image's documentation has them.
LICENCES = (
    "camera: by Lav Varshney, CC0",
    "chelsea: by Stéfan van der Walt, CC0",
    "rocket: by SpaceX, released into the public domain",
)


def small_tokenizers() -> dict[str, Preset]:
    """The presets that are compared: tokenizers of one size that two cores train in a minute."""
    return {name: preset for name, preset in PRESETS.items() if name.startswith(_FAMILIES)}


@dataclasses.dataclass(frozen=True)
class Figures:
    """What a tokenizer gives at one setting, over all pictures or clips.

    - `setting`: its name; `searched`: whether lengths were searched for.
    - `tokens`: mean of a block, `share_of_tokens` of those it could have.
    - `bits_per_pixel`: lengths included; None for latents that are not quantized.
    - `psnr`: of the error over all pixels, in dB; `ssim`: mean over frames, Gaussian window.
    - `met`: share of the blocks that meet the threshold; None without one.
    - `seconds`: to encode and decode a picture or clip, after compilation.
    """

    setting: str
    searched: bool
    tokens: float
    share_of_tokens: float
    bits_per_pixel: float | None
    psnr: float
    ssim: float | None
    met: float | None
    seconds: float


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tokenizer, trained and measured.

    - `items`: what it was measured on, in words; `clips` if clips.
    - `steps`, of `step_flops` each; `seconds` of training, compilation left out.
    - `trained_length`: tokens of a block, if it was trained at one length only.
    - `fingerprint`: of the trained model.
    """

    preset: str
    items: str
    clips: bool
    parameters: int
    steps: int
    step_flops: float
    seconds: float
    trained_length: int | None
    fingerprint: str
    figures: tuple[Figures, ...]

    @property
    def flops(self) -> float:
        """Of the whole training."""
        return self.steps * self.step_flops


def reproduce_zoo(command: Reproduce) -> None:
    """Trains and measures what is not done yet; the results so far are written after each.

    **Raises:** `ValueError` for an unknown preset, for a budget below a step, and where the folder
    holds models of other settings.
    """
    known = small_tokenizers()
    chosen = {name: find("preset", name, known) for name in command.presets or tuple(known)}
    out = command.out
    out.mkdir(parents=True, exist_ok=True)
    say(f"writing {len(TRAIN)} photographs and {TRAINING_CLIPS} clips made from them")
    samples = write_samples(out / "data", size=SIZE[0], clips=TRAINING_CLIPS, seed=command.seed)
    entries: list[Entry] = []
    for number, (name, preset) in enumerate(chosen.items(), 1):
        say(f"[{number}/{len(chosen)}] {name}: {preset.about}")
        entries.append(_entry(command, name, preset, samples))
        _write(command, entries)
    for table in tables(entries):
        print(f"{format_table(table)}\n")
    print(f"{out / f'{NAME}.md'}, {out / 'gallery.md'}; models are in {out / 'models'}")


# --- one tokenizer -------------------------------------------------------------------------------


def _entry(command: Reproduce, name: str, preset: Preset, samples: Samples) -> Entry:
    """Trained and measured, or read from where that was done."""
    folder, sheet = command.out / "models" / name, command.out / _sheet(name)
    record = folder / f"{NAME}.json"
    start = preset.make(key=jax.random.key(command.seed))
    settings = {
        "budget": command.budget,
        "seed": command.seed,
        "blocks": BLOCKS,
        "tail_drop": repr(preset.tail_drop),
        "model_at_start": fingerprint(start),
    }
    done = _done(record, settings)
    if done is not None and sheet.exists():
        say(f"{folder} is trained and measured")
        return done
    step_flops = flops_of_step(start, preset.tail_drop)
    steps = steps_of(command.budget, step_flops)
    say(f"training {steps} steps of {step_flops / 1e9:.3g} Gflop each")
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(record, {"settings": settings})
    trained = train(
        start,
        samples,
        out=folder,
        steps=steps,
        tail_drop=preset.tail_drop,
        seed=command.seed,
        save_every=_SAVE_EVERY,
        batch_size=_batch_size(start),
        image_share=0.5 if _of_clips(start) else 1.0,
        mesh=_mesh(),
        resume=True,
    )
    if (latest_step(folder) or 0) < steps:  # fit was asked to stop, and has said so
        raise KeyboardInterrupt
    source = f" From: {preset.source}." if preset.source else ""
    about = (
        f"The preset `{name}`. {preset.about}{source} Trained for {steps} steps on photographs\n"
        "that scikit-image carries and clips made from them, by `elastictok reproduce zoo-small`:\n"
        "it shows a method, and is of no other use."
    )
    save(trained, folder, card=model_card(trained, about=about))
    evaluation = _measured(load(folder), preset.tail_drop, samples)
    write_sheet(sheet, _drawn(evaluation, _trained_length(preset.tail_drop, trained)))
    entry = Entry(
        preset=name,
        items=evaluation.rows[0].items,
        clips=_of_clips(trained),
        parameters=count_parameters(trained),
        steps=steps,
        step_flops=step_flops,
        seconds=_seconds(folder / "metrics.jsonl"),
        trained_length=_trained_length(preset.tail_drop, trained),
        fingerprint=evaluation.fingerprint,
        figures=tuple(map(_figures, evaluation.rows)),
    )
    _write_json(record, {"settings": settings, "entry": dataclasses.asdict(entry)})
    return entry


def _done(record: Path, settings: dict[str, Any]) -> Entry | None:
    """What was found before; None if it is not finished.

    **Raises:** `ValueError` if it was begun with other settings.
    """
    if not record.exists():
        return None
    found = json.loads(record.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if found["settings"].get(name) != value:
            raise ValueError(
                f"{record.parent} was made with another {name.replace('_', ' ')} "
                f"({found['settings'].get(name)}, now {value}); choose another --out, or remove it"
            )
    if "entry" not in found:
        return None
    facts = found["entry"]
    return Entry(**facts | {"figures": tuple(Figures(**each) for each in facts["figures"])})


def flops_of_step(model: ElasticTok, tail_drop: AbstractTailDrop) -> float:
    """Floating-point operations of one training step: what all tokenizers get an equal sum of.

    Those of the matrix products in the compiled program of the step that `train` runs: forward,
    backward and the optimizer's, with what is computed again and with the pass that measures errors
    for a tail-drop that asks for it; a layer as often as it runs. As `elastictok plan` counts: its
    loops whose rounds depend on the mask (attention over tiles of keys) count once.
    """
    found = plan(
        eqx.filter_eval_shape(lambda: model),
        _mesh(),
        batch_size=_batch_size(model),
        optimizer=optimizer(1000),
        tail_drop=tail_drop,
    )
    if found.flops is None:
        raise RuntimeError(f"the training step does not fit this machine: {found.refused}")
    return found.flops


def steps_of(budget: float | int, step_flops: float | int) -> int:
    """As many steps as come nearest to the budget.

    **Arguments:**

    - `budget`: in units of 10^12 operations.
    - `step_flops`: operations of a step.

    **Raises:** `ValueError` if that is not even one.
    """
    steps = round(budget * 1e12 / step_flops)
    if steps < 1:
        raise ValueError(
            f"--budget {budget:g} is not enough for one training step, which takes "
            f"{step_flops / 1e12:.2g}; give at least that"
        )
    return steps


def _mesh() -> jax.sharding.Mesh:
    """One device: batches of two sequences cannot be split over many."""
    return data_mesh(jax.local_devices()[:1])


def _batch_size(model: ElasticTok) -> int:
    return max(1, BLOCKS // model.context)


def _of_clips(model: ElasticTok) -> bool:
    return model.frames_per_block > 1


def _trained_length(tail_drop: AbstractTailDrop, model: ElasticTok) -> int | None:
    """Tokens of a block, of a model that was trained at one length only."""
    if not isinstance(tail_drop, FixedDrop):
        return None
    return min(max(tail_drop.length, model.min_tokens), model.max_tokens)


def _seconds(metrics: Path) -> float:
    """Of training, by the speeds that were logged: all sessions of a run, compilation left out."""
    seconds, before = 0.0, 0
    for text in metrics.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if "steps_per_second" in line:
            seconds += (line["step"] - before) / line["steps_per_second"]
            before = line["step"]
    return seconds


# --- measuring -----------------------------------------------------------------------------------


def _measured(model: ElasticTok, tail_drop: AbstractTailDrop, samples: Samples) -> Evaluation:
    items, shown = (
        (_clips(samples), 1) if _of_clips(model) else (_pictures(samples), len(_SHOWN_PICTURES))
    )
    say(f"measuring on {len(items)} {'clips' if _of_clips(model) else 'pictures'}")
    return evaluate(
        Tokenizer(model, FixedLength(length=model.max_tokens)),
        items,
        settings=settings_for(tail_drop),
        keep=shown,
    )


def settings_for(tail_drop: AbstractTailDrop) -> tuple[Setting, ...]:
    """Three equal lengths; and three thresholds, but for models of one length, which have nothing
    to search. Models that need not be told how many tokens are kept run the encoder once."""

    def strategy(inner: AbstractStrategy) -> AbstractStrategy:
        return EncodeOnce(inner) if isinstance(tail_drop, ConditionDropout) else inner

    fixed = [
        dataclasses.replace(setting, strategy=strategy(setting.strategy))
        for setting in share_settings(SHARES)
    ]
    if isinstance(tail_drop, FixedDrop):
        return tuple(fixed)
    criteria = [MSE(threshold) for threshold in THRESHOLDS]
    searched = [Setting(requirement(c), strategy(Binary(c)), searched=True) for c in criteria]
    return (*fixed, *searched)


def _pictures(samples: Samples) -> list[Item]:
    """Those that are shown, then crops."""
    shown = [Item(name, samples.clip[i : i + 1]) for name, i in _SHOWN_PICTURES.items()]
    names = [f"{Path(photo).stem}-{i:02d}" for photo in TEST for i in range(_CROPS)]
    return [*shown, *(Item(name, samples.pictures[name][None]) for name in names)]


def _clips(samples: Samples) -> list[Item]:
    """The one that is shown, then others made as the training clips are, of other photographs."""
    rng = np.random.default_rng(0)
    photos = list(photographs(TEST).values())
    others = [
        Item(f"clip-{i}", training_clip(photos, rng, frames=CLIP_FRAMES), FPS)
        for i in range(_CLIPS)
    ]
    return [Item("clip", samples.clip, FPS, samples.cuts), *others]


def _figures(row: Row) -> Figures:
    assert row.tokens is not None
    assert row.share_of_tokens is not None
    assert row.encode_seconds is not None
    assert row.decode_seconds is not None
    return Figures(
        setting=row.name,
        searched=row.searched,
        tokens=row.tokens,
        share_of_tokens=row.share_of_tokens,
        bits_per_pixel=row.bits_per_pixel,
        psnr=row.psnr_dataset,
        ssim=row.ssim_gaussian,
        met=row.blocks_met,
        seconds=row.encode_seconds + row.decode_seconds,
    )


def _drawn(evaluation: Evaluation, trained_length: int | None) -> np.ndarray:
    """The kept items beside what they are at the equal lengths."""
    fixed = evaluation.fixed
    headings = ["original"]
    for row in fixed:
        length = row.lengths[0]
        mark = " (trained)" if length == trained_length else ""
        headings.append(f"{length} tokens{mark}")
    rows = []
    for sample in evaluation.samples:
        frames = {each.row: each.frames for each in sample.reconstructions}
        for t in (0,) if len(sample.truth) == 1 else _SHOWN_FRAMES:
            rows.append([sample.truth[t], *(frames[row.name][t] for row in fixed)])
    return draw_sheet(headings, rows)


# --- all of them ---------------------------------------------------------------------------------


def tables(entries: Sequence[Entry]) -> tuple[Table, ...]:
    """How they were trained, and what they give on pictures and on clips."""
    training = Table(
        "Training",
        ("tokenizer", "parameters", "steps", "Gflop a step", "Tflop", "seconds"),
        tuple(
            TableRow(
                (
                    each.preset,
                    f"{each.parameters:,}",
                    str(each.steps),
                    f"{each.step_flops / 1e9:.2f}",
                    f"{each.flops / 1e12:.3f}",
                    f"{each.seconds:.0f}",
                )
            )
            for each in entries
        ),
        "Flop: floating-point operations of the matrix products in the compiled training step, "
        "with its backward pass, its optimizer, and the pass that measures errors where a "
        "tail-drop asks for it; loops of attention whose rounds depend on the mask count once. "
        "Seconds: compilation left out.",
    )
    quality = [
        _quality(title, group)
        for title, clips in (("Pictures", False), ("Clips", True))
        if (group := [each for each in entries if each.clips == clips])
    ]
    return (training, *quality)


def _quality(title: str, entries: Sequence[Entry]) -> Table:
    rows: list[TableRow | TableGroup] = []
    for entry in entries:
        rows.append(TableGroup(entry.preset))
        rows += [_quality_row(each, entry.trained_length) for each in entry.figures]
    what = "a clip" if entries[0].clips else "a picture"
    return Table(
        f"{title}: {entries[0].items}",
        ("", "tokens", "bits per pixel", "PSNR, dB", "SSIM", "met", "seconds"),
        tuple(rows),
        "Tokens: mean of a block. Bits per pixel count the lengths of the blocks; - for latents "
        "that are not quantized. PSNR: of the mean squared error over all pixels. Met: share of "
        "the blocks that meet the threshold, pixels in [-1, 1]. Seconds: to encode and decode "
        f"{what}, after compilation.",
    )


def _quality_row(figures: Figures, trained_length: int | None) -> TableRow:
    mark = " (trained)" if figures.tokens == trained_length else ""

    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    return TableRow(
        (
            figures.setting + mark,
            number(figures.tokens, 1),
            number(figures.bits_per_pixel, 4),
            number(figures.psnr, 2),
            number(figures.ssim, 3),
            "-" if figures.met is None else f"{100 * figures.met:.0f} %",
            number(figures.seconds, 3),
        )
    )


def _sheet(name: str) -> str:
    return f"gallery/{name}.png"


def _write(command: Reproduce, entries: Sequence[Entry]) -> None:
    """The table as Markdown and as JSON, and the gallery's page."""
    device = describe_device()
    said = (
        f"`elastictok reproduce {NAME} --budget {command.budget:g} --seed {command.seed}`, on "
        f"{device}."
    )
    how = (
        f"Every tokenizer was trained with the same number of floating-point operations, "
        f"{command.budget:g} x 10^12, on {len(TRAIN)} photographs that scikit-image carries (and, "
        f"those of clips, on {TRAINING_CLIPS} clips made from them as well), {BLOCKS} pictures or "
        "blocks a step. Measured on other photographs, and clips made from those. That is minutes "
        "of a CPU: the comparison is of interest, the quality is not."
    )
    table = "\n".join(format_markdown(each) for each in tables(entries))
    _write_text(command.out / f"{NAME}.md", f"# The small tokenizers\n\n{said}\n\n{how}\n\n{table}")
    _write_json(
        command.out / f"{NAME}.json",
        {
            "reproduction": NAME,
            "budget": command.budget,
            "seed": command.seed,
            "device": device,
            "tokenizers": [
                dataclasses.asdict(each)
                | {"flops": each.flops}
                | {"about": PRESETS[each.preset].about, "source": PRESETS[each.preset].source}
                for each in entries
            ],
        },
    )
    lead = (
        "What each of the small tokenizers gives back of frames that it was not trained on, at a "
        "quarter, half and all of its tokens, beside the original: pictures for those of pictures, "
        "frames of one clip for those of clips, whose tokens are counted for a block of frames. "
        "64x64 pixels, shown twice as large.",
        said + " " + how,
        f"Photographs: {'; '.join(LICENCES)}; all of them come with scikit-image.",
    )
    exhibits = [
        Exhibit(
            name=each.preset,
            about=PRESETS[each.preset].about,
            source=PRESETS[each.preset].source,
            facts=f"{each.parameters:,} parameters, {each.steps} steps, {each.seconds:.0f} s.",
            sheet=_sheet(each.preset),
        )
        for each in entries
    ]
    _write_text(command.out / "gallery.md", gallery_page("Gallery", lead, exhibits))


def _write_json(path: Path, content: Any) -> None:
    _write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    """Either whole or not there."""
    scratch = path.with_suffix(f"{path.suffix}.part")
    scratch.write_text(text, encoding="utf-8", newline="\n")
    os.replace(scratch, path)
