"""`elastictok train`."""

import dataclasses
import itertools
import json
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from elastictok.data import (
    Batch,
    BatchIterator,
    Geometry,
    MediaReader,
    PackedDataset,
    RandomCrop,
    RandomStretch,
    WholeClip,
    aspect_buckets,
    find_media,
    load_folders,
)
from elastictok.eval import Item, load_lpips
from elastictok.models import (
    AbstractTailDrop,
    ConditionDropout,
    ElasticTok,
    FixedDrop,
    Local,
    with_compute_dtype,
)
from elastictok.train import (
    L1,
    MSE,
    AbstractLoss,
    AbstractTracker,
    Average,
    Constant,
    Cosine,
    Perceptual,
    Pictures,
    Stage,
    Sum,
    TensorBoard,
    Validation,
    WeightsAndBiases,
    adamw,
    data_mesh,
    data_share,
    fit,
    fit_stages,
    init_sharded,
    make_mesh,
    muon,
    parse_mesh,
)

from ._commands import Train
from ._data import weighted
from ._models import TAIL_DROPS, find_preset, make_model, remat_policy, with_context
from ._names import SETTINGS
from ._processes import join_processes
from ._user import file_of, load_model, names_file

_STEPS, _OVERFIT_STEPS = 20_000, 1_000
_LEARNT = 1e-3  # mean squared error of a batch that was learnt by heart
_VALIDATION_FRAMES = 32  # of each clip
_POLICY = "tail_drop_policy"  # what the flags, or the preset, came to
_TAIL_DROP_FLAGS = {"tail_drop", "length", "condition_dropout"}
# A resumed run may change these; all else decides what the batches and the model are.
_FREE = {
    "out",
    "resume",
    "steps",
    "save_every",
    "log_every",
    "trackers",
    "init_from",
    "code",
    "mesh",
    "remat",
    "coordinator",
    "processes",
    "process",
    "validation",
    "validation_items",
    "pictures_every",
    "threshold",
}


def train(command: Train) -> None:
    """Trains what the command asks for, and says at the end what was read and skipped."""
    join_processes(command.coordinator, command.processes, command.process)
    tail_drop = _tail_drop(command)
    settings = _settings(command, tail_drop)
    if command.overfit_one and (command.resume or command.stages):
        raise ValueError("--overfit-one is a quick trial; leave out --resume and --stages")
    if command.resume:
        _check_unchanged(command.out, settings)
    axes = {"data": jax.device_count()} if command.mesh is None else parse_mesh(command.mesh)
    mesh = make_mesh(**axes, devices=jax.devices())
    model = _start(command, mesh)
    parts = _parts(command)
    datasets = [_Read(_dataset(command, model, part, mesh)) for part in parts]
    pictures = _pictures(command, model, parts[0], mesh)
    shared: dict[str, Any] = {
        "out": command.out,
        "loss": _loss(command),
        "seed": command.seed,
        "save_every": command.save_every,
        "log_every": command.log_every,
        "pictures": pictures,
        "trackers": tuple(_tracker(name, command, settings) for name in command.trackers)
        if jax.process_index() == 0
        else (),
        "mesh": mesh,
        "accumulate": command.accumulate,
        "average": None if command.average is None else Average(command.average),
        "remat": None if command.remat is None else remat_policy(command.remat),
    }
    if jax.process_index() == 0:
        command.out.mkdir(parents=True, exist_ok=True)
        if command.resume or not (command.out / SETTINGS).exists():
            _write(command.out / SETTINGS, settings)
    if command.overfit_one:
        _overfit_one(command, model, datasets[0], parts[0], shared)
        return
    fit_stages(
        model,
        [
            Stage(dataset, part.steps, _optimizer(command, part), part.context)
            for dataset, part in zip(datasets, parts, strict=True)
        ],
        tail_drop=tail_drop,
        resume=command.resume,
        validate=_validation(command),
        **shared,
    )
    if jax.process_index() == 0:
        for dataset in datasets:
            if dataset.iterator is not None:
                print(dataset.iterator.report(), file=sys.stderr)
        print(f"{command.out} holds the model: elastictok encode PICTURE --model {command.out} ...")


@dataclasses.dataclass(frozen=True)
class _Part:
    """A stage as the command line has it; None for what the command has for all."""

    context: int | None
    steps: int
    image_share: float
    learning_rate: float | None


def _parts(command: Train) -> list[_Part]:
    if not command.stages:
        default = _OVERFIT_STEPS if command.overfit_one else _STEPS
        steps = default if command.steps is None else command.steps
        return [_Part(command.context, steps, command.image_share, command.learning_rate)]
    for name in ("steps", "context"):
        if getattr(command, name) is not None:
            raise ValueError(f"--stages has its own {name}; leave out --{name}")
    return [_stage(command, text) for text in command.stages]


def _stage(command: Train, text: str) -> _Part:
    fields = text.split(":")
    try:
        context, steps = int(fields[0]), int(fields[1])
        image_share = float(fields[2]) if len(fields) > 2 else command.image_share
        rate = float(fields[3]) if len(fields) > 3 else command.learning_rate
        if len(fields) > 4 or context < 1 or steps < 1:
            raise ValueError(text)
    except (ValueError, IndexError):
        raise ValueError(
            f"--stages has {text!r}; write CONTEXT:STEPS, and if you like :IMAGE_SHARE and "
            ":LEARNING_RATE after it, such as 4:5000:0.5:0.01"
        ) from None
    return _Part(context, steps, image_share, rate)


class _Read(Iterable[Batch]):
    """A data set, and the iterator that a run took from it: that one knows what was skipped."""

    def __init__(self, dataset: PackedDataset):
        self.dataset = dataset
        self.iterator: BatchIterator | None = None

    def __iter__(self) -> BatchIterator:
        self.iterator = iter(self.dataset)
        return self.iterator


def _dataset(
    command: Train,
    model: ElasticTok,
    part: _Part,
    mesh: Mesh,
    *,
    data: Any = None,
    workers: int | None = None,
) -> PackedDataset:
    share = data_share(mesh)
    if command.accumulate < 1 or command.batch_size % command.accumulate:
        raise ValueError(
            f"--batch-size is {command.batch_size} and cannot be computed in {command.accumulate} "
            "parts; choose a multiple, or accumulate less"
        )
    if command.batch_size % share[1]:
        raise ValueError(
            f"--batch-size is {command.batch_size} and {share[1]} processes read data; choose a "
            f"multiple of {share[1]}"
        )
    return load_folders(
        weighted(command.data) if data is None else data,
        Geometry(
            model.size,
            model.frames_per_block,
            model.context if part.context is None else part.context,
            command.fps,
            buckets=_buckets(model) if command.aspect_buckets else (),
        ),
        crop=RandomCrop(0.5, 1.0),
        excerpt=WholeClip() if command.whole_clips else RandomStretch(),
        image_share=part.image_share,
        batch_size=command.batch_size // share[1],
        seed=command.seed,
        shard=share,
        workers=command.workers if workers is None else workers,
    )


def _pictures(command: Train, model: ElasticTok, part: _Part, mesh: Mesh) -> Pictures | None:
    """Of the first batch: of the validation folders if there are any, else of the data."""
    if command.pictures_every == 0:
        return None
    # Of its own, so that the run's data is not touched; one process shows what all would.
    data = list(command.validation) or None
    with iter(_dataset(command, model, part, mesh, data=data, workers=0)) as batches:
        batch = next(batches)
    return Pictures(batch, every=command.pictures_every, threshold=command.threshold)


def _overfit_one(
    command: Train, model: ElasticTok, dataset: _Read, part: _Part, shared: dict[str, Any]
) -> None:
    """One batch again and again; says whether it was learnt."""
    with iter(dataset) as batches:
        batch = next(batches)
    probe = Pictures(batch, every=max(1, part.steps // 5), threshold=command.threshold)
    model = fit(
        model,
        itertools.repeat(batch),
        steps=part.steps,
        optimizer=_optimizer(command, part),
        tail_drop=FixedDrop(model.max_tokens),
        **{**shared, "pictures": probe},
    )
    (first, *_) = jax.local_devices()
    error = probe.measure(model, data_mesh([first]), Local())[0]["mse_full"]
    said = f"mean squared error of the one batch after {part.steps} steps, all tokens: {error:.2g}"
    if not error < _LEARNT:
        raise ValueError(
            f"{said}, not below {_LEARNT}: look at {command.out / 'pictures'}; more --steps or a "
            "smaller --batch-size may do, codes of a small book never reach it; else model, data "
            "or optimizer are at fault"
        )
    print(f"{said}: learnt")


def _validation(command: Train) -> Validation | None:
    if not command.validation:
        return None
    media = find_media(command.validation)
    items = []
    for kind in (media.pictures, media.clips):
        paths = kind[:: max(1, -(-len(kind) // command.validation_items))]
        if paths:
            reader = MediaReader(paths, fps=command.fps, max_frames=_VALIDATION_FRAMES)
            items += [Item(str(clip.path), clip.frames, clip.fps) for clip in reader]
    return Validation(items, threshold=command.threshold)


def _loss(command: Train) -> AbstractLoss:
    loss = MSE() if command.loss == "mse" else L1()
    if command.perceptual is None:
        return loss
    lpips = load_lpips(command.perceptual)
    print(f"perceptual loss: {command.perceptual}, sha256 {lpips.sha256}", file=sys.stderr)
    return Sum((1.0, loss), (command.perceptual_weight, Perceptual(lpips)))


def _start(command: Train, mesh: Mesh) -> ElasticTok:
    if command.init_from is None:

        def make() -> ElasticTok:
            return make_model(
                command.preset,
                quantizer=command.quantizer,
                context=command.context,
                seed=command.seed,
            )

        model = make() if mesh.size == 1 else init_sharded(make, mesh)
    else:
        if command.quantizer is not None:
            raise ValueError(
                "--quantizer makes a new quantizer, and --init-from brings a trained one; give one "
                "of them"
            )
        own = (file_of(command.preset),) if names_file(command.preset) else ()
        model = load_model(command.init_from, (*own, *command.code))
        if command.context is not None:
            model = with_context(model, command.context)
    return with_compute_dtype(model, jnp.dtype(command.precision))


def _buckets(model: ElasticTok) -> tuple[tuple[int, int], ...]:
    multiple = math.lcm(model.patching.height, model.patching.width)
    return aspect_buckets(model.size, multiple=multiple)


def _optimizer(command: Train, part: _Part) -> optax.GradientTransformation:
    warmup = min(part.steps // 20, 2000) if command.warmup is None else command.warmup
    schedule = (
        Cosine(part.steps, warmup=warmup)
        if command.schedule == "cosine"
        else Constant(warmup=warmup)
    )
    if command.optimizer == "adamw":
        rate = 1e-3 if part.learning_rate is None else part.learning_rate
        return adamw(rate, schedule=schedule)
    rate = 0.02 if part.learning_rate is None else part.learning_rate
    # Adam's part in proportion to Muon's, as in their defaults.
    return muon(rate, adam_learning_rate=0.15 * rate, schedule=schedule)


def _tail_drop(command: Train) -> AbstractTailDrop:
    """As asked for, or the preset's own."""
    if (command.tail_drop == "fixed") != (command.length is not None):
        raise ValueError(
            "--length is for --tail-drop fixed, which needs it: --tail-drop fixed --length 32"
        )
    preset = find_preset(command.preset)
    if command.length is not None:
        drawn = FixedDrop(command.length)
    elif command.tail_drop is not None:
        drawn = TAIL_DROPS[command.tail_drop]
    else:
        drawn = preset.tail_drop
    share = command.condition_dropout
    return ConditionDropout(drawn, share) if share else drawn


def _tracker(name: str, command: Train, settings: dict[str, Any]) -> AbstractTracker:
    if name == "tensorboard":
        return TensorBoard(command.out / "tensorboard")
    return WeightsAndBiases(project="elastictok", config=settings)


def _settings(command: Train, tail_drop: AbstractTailDrop) -> dict[str, Any]:
    """The resolved command as JSON."""
    settings = json.loads(json.dumps(dataclasses.asdict(command), default=os.fspath))
    return settings | {_POLICY: repr(tail_drop)}


def _check_unchanged(out: Path, settings: dict[str, Any]) -> None:
    if not (out / SETTINGS).exists():
        return
    before = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
    for name, value in settings.items():
        if name in _FREE or name not in before or before[name] == value:
            continue
        # Which flags led to it, or a preset, does not matter.
        if name in _TAIL_DROP_FLAGS and _POLICY in before:
            continue
        flag = "the policy" if name == _POLICY else "--" + name.replace("_", "-")
        raise ValueError(
            f"{out} was trained with {flag} {before[name]}, now it is {value}; resume with the "
            "same settings, or start a new run with --init-from"
        )


def _write(path: Path, settings: dict[str, Any]) -> None:
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, path)
