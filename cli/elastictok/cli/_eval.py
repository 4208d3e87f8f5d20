"""`elastictok eval`."""

from collections.abc import Sequence
from pathlib import Path

from elastictok.data import Clip, MediaReader, find_media
from elastictok.eval import Evaluation, Item, share_settings, threshold_settings
from elastictok.inference import MSE, FixedLength, Tokenizer
from elastictok.models import ElasticTok

from ._commands import Eval
from ._report import baselines_for, measured, publish
from ._strategies import ENCODE_ONCE_NOTE, NOTE, comparison, evenly
from ._user import load_model

_SHOWN = 6


def evaluate_folders(command: Eval) -> None:
    """Measures a model on files and writes the report."""
    command.out.mkdir(parents=True, exist_ok=True)
    model = load_model(command.model, command.code)
    tokenizer = Tokenizer(model, FixedLength(length=model.max_tokens))
    kinds = _read(command, command.data)
    fitted = _read(command, command.baseline_data) if command.baseline_data else kinds
    given = {name: clips for name, clips in kinds.items() if clips}
    evaluations = [
        _measure(command, model, tokenizer, name, clips, fitted[name])
        for name, clips in given.items()
    ]
    compared = [
        comparison(command, tokenizer, name, [_item(clip) for clip in clips])
        for name, clips in given.items()
    ]
    comparisons = [each for each in compared if each is not None]
    notes = [f"Model: {command.model}. Files: {', '.join(map(str, command.data))}."]
    if not command.baseline_data:
        notes.append(
            "The patch PCA and the block DCT were fitted to the very files they are measured on, "
            "which flatters them; --baseline-data names other ones."
        )
    if comparisons:
        notes.append(NOTE)
        if "encode-once" in command.strategies:
            notes.append(ENCODE_ONCE_NOTE)
    publish(
        evaluations,
        command.out,
        comparisons=comparisons,
        title="ElasticTok evaluation",
        lead=f"{command.model} on {', '.join(map(str, command.data))}",
        notes=notes,
    )
    print(f"report: {command.out / 'report.html'}")


def _measure(
    command: Eval,
    model: ElasticTok,
    tokenizer: Tokenizer,
    name: str,
    clips: Sequence[Clip],
    material: Sequence[Clip],
) -> Evaluation:
    fitted = [tokenizer.fit(clip.frames) for clip in (material or clips)]
    return measured(
        name,
        tokenizer,
        [_item(clip) for clip in clips],
        (*share_settings(), *threshold_settings([MSE(x) for x in command.threshold])),
        baselines_for(model, fitted, pictures=name == "pictures"),
        keep=_SHOWN,
    )


def _item(clip: Clip) -> Item:
    return Item(str(clip.path), clip.frames, clip.fps)


def _read(command: Eval, folders: Sequence[Path]) -> dict[str, list[Clip]]:
    """Pictures and clips of folders, at most `max_items` of each."""
    media = find_media(folders)
    kinds = {"pictures": media.pictures, "clips": media.clips}
    chosen = {name: _evenly(found, command.max_items) for name, found in kinds.items()}
    for name, found in kinds.items():
        if len(chosen[name]) < len(found):
            print(f"{len(chosen[name])} of {len(found)} {name}, evenly chosen (--max-items)")
    return {
        name: list(MediaReader(paths, fps=command.fps, max_frames=command.max_frames))
        if paths
        else []
        for name, paths in chosen.items()
    }


def _evenly(paths: Sequence[Path], most: int) -> list[Path]:
    if most < 1:
        raise ValueError(f"--max-items is {most}; it must be at least 1")
    return evenly(paths, most)
