"""`elastictok demo`: the whole job on material that comes with the installation."""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from elastictok.data import Geometry, RandomCrop, load_folders, write_clip, write_picture
from elastictok.eval import Evaluation, Item, length_settings, threshold_settings
from elastictok.inference import MSE, FixedLength, Tokenizer
from elastictok.models import AbstractTailDrop, ElasticTok, UniformDrop, WithFull, presets
from elastictok.train import Cosine, fit, muon

from ._commands import Demo
from ._report import baselines_for, measured, publish
from ._samples import FPS, TEST, TRAIN, Samples, photographs, write_samples

LENGTHS = (4, 8, 16, 32, 48, 64)
THRESHOLD = 0.03
BATCH_SIZE = 8
IMAGE_SHARE = 0.5
FULL_SHARE = 0.2  # of the training blocks, which keep all their tokens
TRAINING_CLIPS = 48
# Pictures and the clip that the report shows and whose tokens are kept as files.
SHOWN = ("chelsea-00", "chelsea-01", "rocket-00", "rocket-01", "camera-00", "camera-01")


def demo(command: Demo) -> None:
    """Trains, tokenizes what was not trained on, and reports."""
    began = time.perf_counter()
    out = command.out
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; remove it or choose another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    model = presets.demo(key=jax.random.key(command.seed))
    say(f"1/3 Writing {len(TRAIN)} photographs and {TRAINING_CLIPS} clips made from them")
    samples = write_samples(
        out / "data", size=model.size[0], clips=TRAINING_CLIPS, seed=command.seed
    )
    (out / "demo.json").write_text(
        json.dumps(dataclasses.asdict(command), indent=1, default=str) + "\n", encoding="utf-8"
    )

    say(f"2/3 Training {command.steps} steps")
    model = train(
        model,
        samples,
        out=out,
        steps=command.steps,
        tail_drop=WithFull(UniformDrop(), FULL_SHARE),
        seed=command.seed,
        save_every=command.steps,
    )
    trained = time.perf_counter()

    test = f"{len(samples.pictures)} crops of {len(TEST)} photographs"
    say(f"3/3 Tokenizing {test} and a clip that the model has not seen")
    write_tokens(model, samples, out)
    evaluations = measure(model, samples)
    notes = notes_for(model, command, samples, trained - began)
    publish(
        evaluations,
        out,
        title="ElasticTok demo",
        lead="Images and video as as many tokens as the content needs, on photographs and a clip "
        "that the model was not trained on.",
        notes=notes,
    )
    say(f"{time.perf_counter() - began:.0f} s in all; open {out / 'report.html'} in a browser")


def say(text: str) -> None:
    """Progress, for people."""
    print(text, file=sys.stderr, flush=True)


def train(
    model: ElasticTok,
    samples: Samples,
    *,
    out: Path,
    steps: int,
    tail_drop: AbstractTailDrop,
    seed: int,
    save_every: int,
    batch_size: int = BATCH_SIZE,
    image_share: float | int = IMAGE_SHARE,
    mesh: Mesh | None = None,
    resume: bool = False,
) -> ElasticTok:
    """Trains on the samples; `out` becomes a run folder. What the arguments mean, `fit` says."""
    dataset = load_folders(
        samples.train,
        Geometry(model.size, model.frames_per_block, model.context, FPS),
        crop=RandomCrop(0.25, 1.0),
        batch_size=batch_size,
        image_share=image_share,
        seed=seed,
    )
    return fit(
        model,
        dataset,
        steps=steps,
        out=out,
        optimizer=optimizer(steps),
        tail_drop=tail_drop,
        seed=seed,
        save_every=save_every,
        mesh=mesh,
        resume=resume,
    )


def optimizer(steps: int) -> optax.GradientTransformation:
    """What models are trained with on the samples: Muon over a cosine with a short warm-up."""
    return muon(schedule=Cosine(steps, warmup=min(20, steps // 10)))


def write_tokens(model: ElasticTok, samples: Samples, out: Path) -> None:
    """Token files, and what decoding them gives, of the shown pictures and the clip."""
    tokenizer = Tokenizer(model, strategy())
    (out / "tokens").mkdir()
    (out / "reconstructions").mkdir()
    (out / "data" / "test").mkdir()
    for name in SHOWN:
        tokens = tokenizer.encode(samples.pictures[name][None])
        tokens.save(out / "tokens" / f"{name}.safetensors")
        write_picture(out / "reconstructions" / f"{name}.png", tokenizer.decode(tokens)[0])
        write_picture(out / "data" / "test" / f"{name}.png", samples.pictures[name])
    tokens = tokenizer.encode(samples.clip, FPS)
    tokens.save(out / "tokens" / "clip.safetensors")
    write_clip(out / "reconstructions" / "clip.mp4", tokenizer.decode(tokens), FPS)
    write_clip(out / "data" / "test" / "clip.mp4", samples.clip, FPS)


def strategy():
    """Fewest tokens per block that meet the demo's threshold."""
    (setting,) = threshold_settings([MSE(THRESHOLD)])
    return setting.strategy


def measure(model: ElasticTok, samples: Samples) -> Sequence[Evaluation]:
    """All test pictures and the clip, at fixed and searched lengths, beside trivial coders."""
    tokenizer = Tokenizer(model, FixedLength(length=model.max_tokens))
    settings = (*length_settings(LENGTHS), *threshold_settings([MSE(THRESHOLD)]))
    photos = [tokenizer.fit(photo[None]) for photo in photographs(TRAIN).values()]
    order = [*SHOWN, *(name for name in samples.pictures if name not in SHOWN)]
    pictures = [Item(name, samples.pictures[name][None]) for name in order]
    clip = Item("clip", samples.clip, FPS, samples.cuts)
    still = [np.repeat(photo, model.frames_per_block, axis=0) for photo in photos]
    return (
        measured(
            "pictures",
            tokenizer,
            pictures,
            settings,
            baselines_for(model, photos, pictures=True),
            keep=len(SHOWN),
        ),
        measured(
            "clip",
            tokenizer,
            [clip],
            settings,
            baselines_for(model, still, pictures=False),
            keep=1,
        ),
    )


def notes_for(
    model: ElasticTok, command: Demo, samples: Samples, seconds: float
) -> tuple[str, ...]:
    """What a reader has to know to judge the numbers."""
    height, width = model.size
    return (
        f"A small model, {command.steps} training steps ({seconds:.0f} s here), {height}x{width} "
        f"pixels, at most {model.max_tokens} tokens for a block of {model.frames_per_block} "
        "frames: pictures look blocky, and the table says so in numbers. It shows the method, not "
        "its quality.",
        f"Trained on {len(TRAIN)} photographs that scikit-image carries ({', '.join(TRAIN)}) and "
        f"on clips made from them; measured on {len(samples.pictures)} random crops of others "
        f"({', '.join(TEST)}) and a clip made from those.",
        "Tokens are in coarse-to-fine order (every prefix covers the whole picture, a quarter of "
        "the tokens starts from every second cell on both axes), the model is told each token's "
        f"cell, and {FULL_SHARE:.0%} of the training blocks keep all tokens, the others a "
        "uniformly drawn number. Only the last is in the paper, whose raster order needs far "
        "longer training to be of use at short lengths.",
        "PCA and DCT were fitted to the training photographs, and spend the same bits on a patch "
        "as the model on a token. Block means take 8 bits for each colour.",
    )
