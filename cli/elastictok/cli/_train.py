"""`elastictok train`."""

import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import optax

from elastictok.data import (
    Geometry,
    RandomCrop,
    RandomStretch,
    WholeClip,
    aspect_buckets,
    load_folders,
)
from elastictok.models import AbstractTailDrop, ElasticTok, LogUniformDrop, UniformDrop, load
from elastictok.train import (
    AbstractTracker,
    Constant,
    Cosine,
    TensorBoard,
    WeightsAndBiases,
    adamw,
    fit,
    muon,
)

from ._commands import Train
from ._data import weighted
from ._models import make_model, with_context

SETTINGS = "train.json"
# A resumed run may change these; all else decides what the batches and the model are.
_FREE = {"out", "resume", "steps", "save_every", "log_every", "trackers", "init_from"}


def train(command: Train) -> None:
    """Trains what the command asks for, and says at the end what was read and skipped."""
    settings = _settings(command)
    if command.resume:
        _check_unchanged(command.out, settings)
    model = _start(command)
    dataset = load_folders(
        weighted(command.data),
        Geometry(
            model.size,
            model.frames_per_block,
            model.context,
            command.fps,
            buckets=_buckets(model) if command.aspect_buckets else (),
        ),
        crop=RandomCrop(0.5, 1.0),
        excerpt=WholeClip() if command.whole_clips else RandomStretch(),
        image_share=command.image_share,
        batch_size=command.batch_size,
        seed=command.seed,
        workers=command.workers,
    )
    command.out.mkdir(parents=True, exist_ok=True)
    if command.resume or not (command.out / SETTINGS).exists():
        _write(command.out / SETTINGS, settings)
    batches = iter(dataset)
    trackers = tuple(_tracker(name, command, settings) for name in command.trackers)
    fit(
        model,
        batches,
        steps=command.steps,
        out=command.out,
        optimizer=_optimizer(command),
        tail_drop=_tail_drop(command),
        seed=command.seed,
        resume=command.resume,
        save_every=command.save_every,
        log_every=command.log_every,
        trackers=trackers,
    )
    print(batches.report(), file=sys.stderr)
    print(f"{command.out} holds the model: elastictok encode PICTURE --model {command.out} ...")


def _start(command: Train) -> ElasticTok:
    if command.init_from is None:
        return make_model(
            command.preset,
            quantizer=command.quantizer,
            context=command.context,
            seed=command.seed,
        )
    if command.quantizer is not None:
        raise ValueError(
            "--quantizer makes a new quantizer, and --init-from brings a trained one; give one "
            "of them"
        )
    model = load(command.init_from)
    return model if command.context is None else with_context(model, command.context)


def _buckets(model: ElasticTok) -> tuple[tuple[int, int], ...]:
    multiple = math.lcm(model.patching.height, model.patching.width)
    return aspect_buckets(model.size, multiple=multiple)


def _optimizer(command: Train) -> optax.GradientTransformation:
    warmup = min(command.steps // 20, 2000) if command.warmup is None else command.warmup
    schedule = (
        Cosine(command.steps, warmup=warmup)
        if command.schedule == "cosine"
        else Constant(warmup=warmup)
    )
    if command.optimizer == "adamw":
        rate = 1e-3 if command.learning_rate is None else command.learning_rate
        return adamw(rate, schedule=schedule)
    rate = 0.02 if command.learning_rate is None else command.learning_rate
    # Adam's part in proportion to Muon's, as in their defaults.
    return muon(rate, adam_learning_rate=0.15 * rate, schedule=schedule)


def _tail_drop(command: Train) -> AbstractTailDrop:
    return UniformDrop() if command.tail_drop == "uniform" else LogUniformDrop()


def _tracker(name: str, command: Train, settings: dict[str, Any]) -> AbstractTracker:
    if name == "tensorboard":
        return TensorBoard(command.out / "tensorboard")
    return WeightsAndBiases(project="elastictok", config=settings)


def _settings(command: Train) -> dict[str, Any]:
    """The resolved command as JSON."""
    return json.loads(json.dumps(dataclasses.asdict(command), default=os.fspath))


def _check_unchanged(out: Path, settings: dict[str, Any]) -> None:
    if not (out / SETTINGS).exists():
        return
    before = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
    for name, value in settings.items():
        if name not in _FREE and name in before and before[name] != value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"{out} was trained with {flag} {before[name]}, now it is {value}; resume with the "
                "same settings, or start a new run with --init-from"
            )


def _write(path: Path, settings: dict[str, Any]) -> None:
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, path)
