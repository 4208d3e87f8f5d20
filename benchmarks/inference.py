"""Who decides how many tokens: every strategy against the exhaustive optimum, and streaming.

    python benchmarks/inference.py             # prints; about half an hour, most of it training
    python benchmarks/inference.py --write     # and keeps benchmarks/results/inference.md

One model, of the size of benchmarks/train.py: width 256, 4 + 4 layers, FSQ, 256 tokens for a block
of one frame of 128x128 pixels, context of 4 blocks, trained with condition dropout on the
photographs that scikit-image carries and on clips made from them (`--work FOLDER` keeps it and the
regressor for the next call). Clips of 4 blocks of other photographs are encoded by every strategy,
one at a time, with one threshold; `official` is the search of the official code: bisection of every
block without a look at the others, one clip at a time, and one more pass over the whole sequence.

`--stream` alone: 10,000 frames of a moving camera through `Tokenizer.stream` and back, and the
memory that the process takes.
"""

import argparse
import datetime
import importlib.metadata
import math
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import final

import numpy as np
from train import matmul_rate, processor

from elastictok.cli._samples import TEST, photographs, random_move, random_view, write_samples
from elastictok.data import Geometry, find_media, load_folders, read_media
from elastictok.eval import Item, StrategyComparison, StrategyResult, compare_strategies
from elastictok.inference import (
    MSE,
    AbstractCriterion,
    AbstractStrategy,
    Binary,
    Binned,
    Block,
    EncodeOnce,
    FixedLength,
    KAry,
    Regressor,
    Search,
    Secant,
    Tokenizer,
    WarmStart,
    calibrate,
)
from elastictok.models import (
    ConditionDropout,
    ElasticTok,
    Patching,
    RankRotary,
    Raster,
    UniformDrop,
    load,
    presets,
)
from elastictok.quantizers import FSQ
from elastictok.train import fit, fit_scorer, score_targets

RESULT = Path(__file__).parent / "results" / "inference.md"
PACKAGES = ("elastictok", "jax", "jaxlib", "equinox", "numpy")
CLIPS, FRAMES, SIZE = 8, 4, 128
CALIBRATION, MORE, ALPHA = 120, 60, 0.01
STREAM_FRAMES = 10_000
OFFICIAL = "official"
# The figure of the official code: seconds for a clip at this rate of matrix products.
OFFICIAL_SECONDS, OFFICIAL_RATE = (3.1, 3.8), 165e9


@final
class Official(AbstractStrategy):
    """Bisection as arXiv 2410.08368, algorithm 2, has it: all tokens are not probed first.

    (With the last success returned, and not the last probe.)
    """

    criterion: AbstractCriterion

    def search(self, block: Block) -> Search:
        low, high, probed = block.shortest, block.longest, False
        while low < high:
            middle = (low + high) // 2
            (loss,) = yield (middle,)
            if self.criterion.meets(loss):
                high, probed = middle, True
            else:
                low = middle + 1
        if not probed:
            yield (block.longest,)
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    parser.add_argument("--stream", action="store_true", help="only the stream")
    parser.add_argument("--work", type=Path, help="folder to keep the model and the regressor in")
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument(
        "--threshold", type=float, help="MSE; by default one that half the tokens meet"
    )
    arguments = parser.parse_args()
    parts = [heading()]
    if not arguments.stream:
        with tempfile.TemporaryDirectory() as scratch:
            work = arguments.work or Path(scratch)
            parts.append(strategies(work, arguments.steps, arguments.threshold))
    parts.append(stream())
    text = "\n".join(parts)
    print(text)
    if arguments.write:
        RESULT.write_text(text, encoding="utf-8")


def heading() -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return (
        "# Inference\n\n"
        f"`python benchmarks/inference.py --write`, {datetime.date.today()}, on {os.cpu_count()} "
        f"CPU cores ({processor()}). Python {platform.python_version()}, {versions}.\n"
    )


def strategies(work: Path, steps: int, threshold: float | None) -> str:
    """The table of strategies, as Markdown."""
    model = trained(work, steps)
    tokenizer = Tokenizer(model, FixedLength(1))
    photos = list(photographs(TEST).values())
    rng = np.random.default_rng(1)
    test = [moving(photos, rng) for _ in range(CLIPS)]
    calibration = [moving(photos, rng) for _ in range(CALIBRATION)]
    more = [moving(photos, rng) for _ in range(MORE)]
    if threshold is None:
        half = Tokenizer(model, FixedLength(model.max_tokens // 2)).encode_batch(test)
        threshold = float(f"{np.median(np.concatenate([t.losses for t in half])):.1g}")
    criterion = MSE(threshold)
    regressor = regressor_for(work, tokenizer, criterion, calibration)
    rate = matmul_rate()
    found = compare_strategies(
        tokenizer,
        [Item(f"clip {i}", frames) for i, frames in enumerate(test)],
        [criterion],
        {
            OFFICIAL: Official,
            "Binary": Binary,
            "KAry(4)": lambda c: KAry(c, 4),
            "Binned(32)": lambda c: Binned(c, 32),
            "Secant": Secant,
            "WarmStart(Binary)": lambda c: WarmStart(Binary(c)),
            "WarmStart(Secant)": lambda c: WarmStart(Secant(c)),
            "EncodeOnce(Binary)": lambda c: EncodeOnce(Binary(c)),
            "EncodeOnce(WarmStart(Secant))": lambda c: EncodeOnce(WarmStart(Secant(c))),
            "Regressor, as predicted": lambda c: Regressor(regressor.scorer, c),
            f"Regressor(alpha={ALPHA})": lambda c: regressor,
            f"Regressor(alpha={ALPHA}), not verified": lambda c: Regressor(
                regressor.scorer,
                c,
                alpha=ALPHA,
                calibration=regressor.calibration,
                verify=False,
            ),
        },
        shares=(1,),
    )
    whole = whole_pass(model, test)
    rate = max(rate, matmul_rate())
    return describe(model, steps, found, whole, rate) + held_out(tokenizer, regressor, more)


def trained(work: Path, steps: int) -> ElasticTok:
    """The model, trained or taken from the folder."""
    import jax

    run = work / "model"
    if (run / "model.safetensors").exists():
        model = load(run)
        assert isinstance(model, ElasticTok)
        return model
    model = presets.build(
        size=(SIZE, SIZE),
        context=FRAMES,
        frames_per_block=1,
        min_tokens=16,
        patching=Patching(1, 8, 8),
        order=Raster(),
        quantizer=FSQ(presets.FSQ_64K),
        dim=256,
        hidden=512,
        layers=4,
        heads=4,
        rotary=RankRotary(5e7),
        place_frequencies=16,
        key=jax.random.key(0),
    )
    samples = write_samples(work, size=SIZE, clips=40, seed=0)
    data = load_folders(samples.train, Geometry(model.size, 1, model.context), batch_size=2)
    drop = ConditionDropout(UniformDrop(), 0.5)
    return fit(model, data, steps=steps, tail_drop=drop, out=run, resume=True)


def regressor_for(
    work: Path, tokenizer: Tokenizer, criterion: MSE, calibration: list[np.ndarray]
) -> Regressor:
    """The regressor, trained and calibrated or taken from the folder."""
    folder = work / f"regressor-{criterion.threshold:g}"
    if (folder / "calibration.json").exists():
        return Regressor.load(folder, tokenizer.codec, criterion, alpha=ALPHA)
    clips = [
        read_media(path, max_frames=FRAMES).frames for path in find_media(work / "train").paths
    ]
    rng = np.random.default_rng(2)
    photos = [clip[0] for clip in clips if len(clip) == 1]
    clips += [moving(photos, rng) for _ in range(60)]
    targets = score_targets(tokenizer, clips, criterion)
    scorer = fit_scorer(tokenizer, targets, criterion, steps=600)
    regressor = calibrate(Regressor(scorer, criterion), tokenizer, calibration, alpha=ALPHA)
    regressor.save(folder)
    return regressor


def moving(photos: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """A clip of a camera that holds, pans or zooms."""
    view, move = random_view(photos[rng.integers(len(photos))], rng, smallest=0.3), random_move(rng)
    frames = []
    for _ in range(FRAMES):
        frames.append(view.frame(SIZE))
        view = view.moved(*move)
    return np.stack(frames)


def whole_pass(model: ElasticTok, clips: list[np.ndarray]) -> float:
    """Seconds for one clip as a whole sequence through encoder and decoder."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    run = eqx.filter_jit(lambda m, x, n: m(x, n).pixels)
    lengths = jnp.full(FRAMES, 100)
    inputs = [jnp.asarray(clip, jnp.float32) / 127.5 - 1 for clip in clips]
    jax.block_until_ready(run(model, inputs[0], lengths))
    start = time.perf_counter()
    for pixels in inputs:
        jax.block_until_ready(run(model, pixels, lengths))
    return (time.perf_counter() - start) / len(clips)


def held_out(tokenizer: Tokenizer, regressor: Regressor, clips: list[np.ndarray]) -> str:
    """How the regressor does on more clips than the optimum can be found for."""
    able = Tokenizer(tokenizer.codec, FixedLength(10**6, regressor.criterion)).encode_batch(clips)
    found = Tokenizer(tokenizer.codec, regressor).encode_batch(clips)
    searched = Tokenizer(tokenizer.codec, WarmStart(Secant(regressor.criterion))).encode_batch(
        clips
    )
    best = np.mean([np.mean(t.met) for t in able])
    share = np.mean([np.mean(t.met) for t in found])
    missed = sum(bool(a.met.all() and not f.met.all()) for a, f in zip(able, found, strict=True))
    tokens = sum(t.lengths.sum() for t in found) / sum(t.lengths.sum() for t in searched)
    margin = f"{regressor.margin:g}" if math.isfinite(regressor.margin) else "infinite"
    return (
        f"\nOn {len(clips)} other clips of the same kind: {share:.1%} of the blocks meet the "
        f"threshold by Regressor(alpha={ALPHA}), {best:.1%} with all tokens; {missed} of the clips "
        f"miss it although they need not; {tokens:.2f} times the tokens of a search. Its margin is "
        f"{margin}, from {CALIBRATION} clips.\n"
    )


def describe(
    model: ElasticTok, steps: int, found: StrategyComparison, whole: float, rate: float
) -> str:
    ((_, results),) = found.groups()
    by_name = {result.strategy: result for result in results}
    official = by_name[OFFICIAL].row.encode_seconds
    assert official is not None
    official += whole
    lines = [
        f"## {CLIPS} clips of {FRAMES} blocks, {model.max_tokens} tokens each, "
        f"{results[0].requirement}",
        "",
        f"Width 256, 4 + 4 layers, FSQ, {steps} steps of training. Matrix products (2048 x 2048): "
        f"{rate / 1e9:.0f} GFLOP/s. `passes`: through encoder and decoder for a block. `s`: for a "
        "clip, one at a time, resizing and measuring included, compilation not. `faster`: than "
        f"`{OFFICIAL}`, whose time includes {whole:.2f} s for a pass over the whole sequence. "
        "`overhead`: tokens beyond the exhaustive optimum's, over blocks that both meet.",
        "",
        "| strategy | tokens | overhead | bpp | PSNR | met | passes | s | faster |",
        "|---|---|---|---|---|---|---|---|---|",
        *(line(result, official, whole) for result in results),
        "",
    ]
    seconds = by_name["WarmStart(Secant)"].row.encode_seconds
    assert seconds is not None
    low, high = (OFFICIAL_RATE / rate * s for s in OFFICIAL_SECONDS)
    lines.append(
        f"A clip by WarmStart(Secant): {seconds:.2f} s. The official code was measured at "
        f"{OFFICIAL_SECONDS[0]} to {OFFICIAL_SECONDS[1]} s on cores of {OFFICIAL_RATE / 1e9:.0f} "
        f"GFLOP/s, which is {low:.1f} to {high:.1f} s at this rate."
    )
    return "\n".join(lines) + "\n"


def line(result: StrategyResult, official: float, whole: float) -> str:
    row, seconds = result.row, result.row.encode_seconds
    assert seconds is not None
    seconds += whole if result.strategy == OFFICIAL else 0
    overhead = result.token_overhead
    return (
        f"| {result.strategy} | {row.tokens:.1f} "
        f"| {'-' if overhead is None else f'{overhead:+.1%}'} "
        f"| {row.bits_per_pixel:.3f} | {row.psnr_dataset:.2f} | {row.blocks_met:.1%} "
        f"| {row.encoder_evaluations:.1f} + {row.decoder_evaluations:.1f} | {seconds:.2f} "
        f"| {official / seconds:.1f}x |"
    )


def stream() -> str:
    """A long stream, and the memory of the process at several places in it."""
    import jax

    model = presets.demo(key=jax.random.key(0))
    tokenizer = Tokenizer(model, FixedLength(16))
    photo = photographs(("rocket.jpg",))["rocket"]
    marks = {STREAM_FRAMES // 100, STREAM_FRAMES // 10, STREAM_FRAMES}
    memory: dict[int, int] = {}

    def camera() -> Iterator[np.ndarray]:
        rng = np.random.default_rng(0)
        view, move = random_view(photo, rng, smallest=0.3), random_move(rng)
        for index in range(STREAM_FRAMES):
            if index % 100 == 0:
                move = random_move(rng)
            yield view.frame(64)
            view = view.moved(*move)
            if index + 1 in marks:
                memory[index + 1] = resident()

    start = time.perf_counter()
    count = sum(len(frames) for frames in tokenizer.decode_stream(tokenizer.stream(camera())))
    seconds = time.perf_counter() - start
    assert count == STREAM_FRAMES
    taken = ", ".join(f"{memory[n] / 2**20:.0f} MB after {n:,}" for n in sorted(memory))
    return (
        f"## A stream of {STREAM_FRAMES:,} frames\n\n"
        "The `demo` preset with random weights, 64x64 pixels, a window of "
        f"{tokenizer.window} blocks, 16 tokens a block; each block is encoded, measured and "
        f"decoded again as soon as its frames are in: {STREAM_FRAMES / seconds:.0f} frames/s. The "
        f"whole process: {taken} frames.\n"
    )


def resident() -> int:
    """Bytes of memory that the process takes now, as Linux tells it; 0 elsewhere."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
