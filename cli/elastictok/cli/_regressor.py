"""`elastictok train-regressor`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from elastictok.data import MediaReader, find_media
from elastictok.inference import (
    MSE,
    AbstractStrategy,
    Binary,
    FixedLength,
    Regressor,
    Tokenizer,
    Tokens,
    calibrate,
    least_clips,
)
from elastictok.models import ElasticTok
from elastictok.train import fit_scorer, score_targets

from ._commands import TrainRegressor
from ._strategies import evenly
from ._user import load_model

Clips = list[np.ndarray]


def train_regressor(command: TrainRegressor) -> None:
    """Trains a scorer, calibrates a regressor, writes both and says how good they are."""
    criterion = MSE(command.threshold)
    needed = least_clips(command.alpha)
    if command.steps < 1 or command.context < 1:
        raise ValueError(
            f"--steps is {command.steps} and --context {command.context}; both must be at least 1"
        )
    model = load_model(command.model, command.code)
    tokenizer = Tokenizer(model, Binary(criterion))
    learnt, held_out = _clips(command)
    if len(held_out) < needed:
        print(
            f"--alpha {command.alpha:g} takes at least {needed} held-out pictures and clips, and "
            f"there are {len(held_out)}: with so few, the calibrated regressor keeps all tokens"
        )
    targets = score_targets(
        tokenizer,
        [_cropped(clip, model, command.seed + i) for i, clip in enumerate(learnt)],
        criterion,
        context=command.context,
        seed=command.seed,
    )
    print(f"measured {len(targets)} blocks of {len(learnt)} pictures and clips")
    scorer = fit_scorer(
        tokenizer,
        targets,
        criterion,
        steps=command.steps,
        context=command.context,
        seed=command.seed,
    )
    raw = Regressor(scorer, criterion)
    regressor = calibrate(raw, tokenizer, held_out, alpha=command.alpha)
    regressor.save(command.out)
    _report(command, tokenizer, raw, regressor, held_out)
    print(f"regressor: {command.out}")


def _clips(command: TrainRegressor) -> tuple[Clips, Clips]:
    """What is learnt from, and what is held out."""
    clips = _read(command, command.data)
    if command.calibration_data:
        return clips, _read(command, command.calibration_data)
    if not 0 < command.held_out < 1:
        raise ValueError(
            f"--held-out is {command.held_out}; it is a share between 0 and 1, such as 0.3"
        )
    order = np.random.default_rng(command.seed).permutation(len(clips))
    count = min(max(1, round(command.held_out * len(clips))), len(clips) - 1)
    if count < 1:
        raise ValueError(
            "the data is a single picture or clip, and one has to be held out; give more, or "
            "--calibration-data"
        )
    return [clips[i] for i in order[count:]], [clips[i] for i in order[:count]]


def _read(command: TrainRegressor, folders: Sequence[Path]) -> Clips:
    """Frames of pictures and clips of folders, at most `max_items` of each."""
    if command.max_items < 1:
        raise ValueError(f"--max-items is {command.max_items}; it must be at least 1")
    media = find_media(folders)
    paths = [
        path for kind in (media.pictures, media.clips) for path in evenly(kind, command.max_items)
    ]
    reader = MediaReader(paths, fps=command.fps, max_frames=command.max_frames)
    return [clip.frames for clip in reader]


def _cropped(frames: np.ndarray, model: ElasticTok, seed: int) -> np.ndarray:
    """A part of the model's aspect: of one size, all blocks are measured by one program."""
    height, width = frames.shape[1:3]
    scale = min(height / model.size[0], width / model.size[1])
    rows, columns = (max(1, int(scale * n)) for n in model.size)
    generator = np.random.default_rng(seed)
    top = generator.integers(height - rows + 1)
    left = generator.integers(width - columns + 1)
    return frames[:, top : top + rows, left : left + columns]


def _report(
    command: TrainRegressor,
    tokenizer: Tokenizer,
    raw: Regressor,
    regressor: Regressor,
    clips: Clips,
) -> None:
    """Prints what the regressor does on the clips of the calibration, beside a search."""

    def encode(strategy: AbstractStrategy) -> list[Tokens]:
        return Tokenizer(tokenizer.codec, strategy).encode_batch(clips)

    full = encode(FixedLength(length=tokenizer.limit, criterion=raw.criterion))
    search = encode(Binary(raw.criterion))
    rows = {
        "all tokens": full,
        "binary search": search,
        "predicted": encode(raw),
        f"predicted, alpha {command.alpha:g}": encode(regressor),
    }
    able = [bool(tokens.met.all()) for tokens in full]
    needed, found = _lengths(search), _lengths(rows["predicted"])
    longest = np.repeat([t.tokens_per_block for t in full], [t.blocks for t in full])
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in ("tokens per block", "to a search", "blocks met", "clips that miss"):
        table.add_column(name, justify="right")
    for name, tokens in rows.items():
        lengths, met = _lengths(tokens), np.concatenate([t.met for t in tokens])
        missed = sum(a and not bool(t.met.all()) for a, t in zip(able, tokens, strict=True))
        table.add_row(
            name,
            f"{lengths.mean():.1f}",
            f"{lengths.sum() / needed.sum() - 1:+.1%}",
            f"{met.mean():.1%}",
            f"{missed} of {sum(able)}",
        )
    print(
        f"held out: {len(clips)} pictures and clips of {len(needed)} blocks; {sum(able)} of them "
        f"can meet an MSE of {command.threshold:g} in every block"
    )
    off = np.mean(np.abs(found - needed) / longest)
    print(f"predicted lengths are off by {off:.1%} of a block's tokens in the mean")
    print(_margin(command, regressor))
    # A miss is one of a clip that could have met: that is what alpha speaks of.
    Console(highlight=False, soft_wrap=True).print(table)
    print("(on the very clips of the calibration; measure on others with elastictok eval)")


def _margin(command: TrainRegressor, regressor: Regressor) -> str:
    calibration = regressor.calibration
    assert calibration is not None
    if regressor.margin < np.inf:
        return (
            f"margin for alpha {command.alpha:g}: {regressor.margin:g}, predictions have to meet "
            f"{command.threshold * np.exp(-regressor.margin):.3g}"
        )
    if calibration.enough(command.alpha):
        return (
            f"margin for alpha {command.alpha:g}: all tokens are kept, because too many clips miss "
            f"at a margin of {calibration.margins[-1]:g}; train longer or on more data, or choose "
            "a larger --alpha"
        )
    return (
        f"margin for alpha {command.alpha:g}: all tokens are kept, because {calibration.clips} "
        f"held-out clips are too few; give at least {least_clips(command.alpha)}"
    )


def _lengths(tokens: Sequence[Tokens]) -> np.ndarray:
    return np.concatenate([each.lengths for each in tokens])
