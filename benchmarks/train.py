"""How fast a training step is on a CPU, beside the machine's rate for matrix products.

    python benchmarks/train.py                 # prints
    python benchmarks/train.py --write         # and keeps benchmarks/results/train.md

One model: width 256, SwiGLU of 512, 4 + 4 layers of 4 heads, FSQ with 64,000 codes, 256 tokens a
block, float32, AdamW, uniform tail-drop. Sequences of 4 blocks, four in a batch, and of 16 blocks,
one in a batch, with this library's attention and with dense masked attention in the same step. Each
in a process of its own, for the peak of its memory; the rate of matrix products (2048 x 2048,
float32) is the best before and after the steps in the same process.

On a GPU, `--gpu` measures the 200M presets in bfloat16 instead: tokens a second, and the share of
the card's bfloat16 rate that the model's own operations make (model-flops utilisation).
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "train.md"
PACKAGES = ("elastictok", "jax", "jaxlib", "equinox", "optax", "numpy")
WIDTH, HIDDEN, LAYERS, HEADS, TOKENS = 256, 512, 4, 4, 256
TASKS = {"4": (4, 4, False), "16": (16, 1, False), "16 dense": (16, 1, True)}
REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    parser.add_argument("--gpu", action="store_true", help="the 200M presets on this GPU")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        print(json.dumps(run(*TASKS[arguments.task])))
        return
    if arguments.gpu:
        print(on_gpu())
        return
    rows = {name: in_a_process(name) for name in TASKS}
    text = describe(rows)
    print(text)
    if arguments.write:
        RESULT.write_text(text, encoding="utf-8")


def in_a_process(task: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, "--task", task],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def operations(blocks: int, batch: int) -> float:
    """Multiplications and additions of a step's matrix products: forward, and twice that back.

    Attention between the blocks that see each other only.
    """
    tokens = batch * blocks * TOKENS
    layer = 4 * WIDTH * WIDTH + 3 * WIDTH * HIDDEN
    ends = 2 * WIDTH * (3 * 8 * 8 + 6)  # patches in and out, latents out and in
    pairs = batch * TOKENS**2 * blocks * (blocks + 1) / 2
    return 3 * (2 * tokens * (2 * LAYERS * layer + ends) + 2 * LAYERS * 4 * pairs * WIDTH)


def run(blocks: int, batch: int, dense: bool) -> dict[str, float]:
    """Seconds, rates and the peak of memory of one kind of step."""
    import jax
    import jax.numpy as jnp

    from elastictok.attention import Reference
    from elastictok.models import Patching, RankRotary, Raster, UniformDrop, presets
    from elastictok.quantizers import FSQ
    from elastictok.train import (
        MSE,
        CompiledStep,
        DeviceBatch,
        OneDevice,
        adamw,
        init_state,
        train_step,
    )

    model = presets.build(
        size=(128, 128),
        context=blocks,
        frames_per_block=1,
        min_tokens=16,
        patching=Patching(1, 8, 8),
        order=Raster(),
        quantizer=FSQ(presets.FSQ_64K),
        dim=WIDTH,
        hidden=HIDDEN,
        layers=LAYERS,
        heads=HEADS,
        rotary=RankRotary(5e7),
        key=jax.random.key(0),
    )
    assert model.max_tokens == TOKENS
    optimizer = adamw(1e-4)
    pixels = jax.random.randint(jax.random.key(1), (batch, blocks, 1, 128, 128, 3), 0, 256)
    ones = jnp.ones((batch, blocks), jnp.int32)
    frames = DeviceBatch(pixels.astype(jnp.uint8), ones, ones > 0)
    execution = OneDevice(implementation=Reference() if dense else None)

    def forward(model: Any, frames: DeviceBatch) -> Any:
        x = frames.pixels.reshape(batch, blocks, 128, 128, 3) / 127.5 - 1
        lengths = jnp.full((batch, blocks), TOKENS // 2)
        return jax.vmap(lambda x, n: model(x, n, execution=execution).pixels)(x, lengths)

    rate = matmul_rate()
    compiled = jax.jit(lambda arrays: forward(arrays, frames)).lower(model).compile()
    forwards = seconds(lambda: compiled(model))
    state = init_state(model, optimizer, jax.random.key(2))
    function = functools.partial(
        train_step,
        optimizer=optimizer,
        loss=MSE(),
        tail_drop=UniformDrop(),
        quantizer_weight=1 / TOKENS,
        execution=execution,
    )
    began = time.perf_counter()
    step = CompiledStep(function, state, frames)
    compiling = time.perf_counter() - began

    def once() -> Any:
        nonlocal state
        state, metrics = step(state, frames)
        return metrics

    reset_peak()
    steps = seconds(once)
    peak = status("VmHWM")
    return {
        "forward": forwards,
        "step": steps,
        "compile": compiling,
        "rate": max(rate, matmul_rate()),
        "operations": operations(blocks, batch),
        "peak": peak,
    }


def seconds(call: Any) -> float:
    """Median time of a call, after one that is not counted."""
    import jax

    times = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def matmul_rate() -> float:
    """Operations a second of the best of ten products of two matrices."""
    import jax
    import jax.numpy as jnp

    size = 2048
    product = jax.jit(jnp.matmul)
    x = jnp.ones((size, size))
    jax.block_until_ready(product(x, x))
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        jax.block_until_ready(product(x, x))
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def status(name: str) -> int:
    """Bytes, as Linux counts them for this process."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


def reset_peak() -> None:
    """From here on, VmHWM is the peak of what follows."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def on_gpu() -> str:
    """Tokens a second and utilisation of the 200M presets, one sequence of four blocks."""
    import jax
    import jax.numpy as jnp

    from elastictok.models import UniformDrop, presets
    from elastictok.train import MSE, CompiledStep, DeviceBatch, adamw, init_state, train_step

    device = jax.devices()[0]
    peak = {"NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100": 312e12}
    known = [rate for name, rate in peak.items() if device.device_kind.startswith(name)]
    lines = [f"{device.device_kind}, jax {jax.__version__}, {datetime.date.today()}"]
    for make in (presets.elastictok_fsq_200m, presets.elastictok_vae_200m):
        model = make(key=jax.random.key(0), dtype=jnp.bfloat16)
        optimizer = adamw(1e-4)
        state = init_state(model, optimizer, jax.random.key(1))
        blocks = 4
        frames = DeviceBatch(
            jnp.zeros((1, blocks, 4, 256, 256, 3), jnp.uint8),
            jnp.ones((1, blocks), jnp.int32),
            jnp.ones((1, blocks), bool),
        )
        step = CompiledStep(
            functools.partial(
                train_step,
                optimizer=optimizer,
                loss=MSE(),
                tail_drop=UniformDrop(),
                quantizer_weight=1e-8,
            ),
            state,
            frames,
        )
        times = []
        for _ in range(REPEATS + 3):
            began = time.perf_counter()
            state, metrics = step(state, frames)
            jax.block_until_ready(metrics)
            times.append(time.perf_counter() - began)
        tokens = blocks * model.max_tokens
        took = statistics.median(times[3:])
        pairs = model.max_tokens**2 * blocks * (blocks + 1) / 2
        work = 3 * (20 * 2 * tokens * (4 * 1024**2 + 3 * 1024 * 2048) + 20 * 4 * pairs * 1024)
        share = f"{work / took / known[0]:.1%} of its bfloat16 rate" if known else "peak unknown"
        lines.append(f"{make.__name__}: {took:.3f} s, {tokens / took:,.0f} tokens/s, {share}")
    return "\n".join(lines)


def describe(rows: dict[str, dict[str, float]]) -> str:
    """The result as a page of Markdown."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    lines = [
        "# Training steps on a CPU",
        "",
        f"`python benchmarks/train.py --write`, {datetime.date.today()}, on {os.cpu_count()} CPU "
        f"cores ({processor()}). Python {platform.python_version()}, {versions}.",
        "",
        f"Width {WIDTH}, SwiGLU {HIDDEN}, {LAYERS} + {LAYERS} layers, {HEADS} heads, FSQ, {TOKENS} "
        f"tokens a block, float32, AdamW. Medians of {REPEATS}. `rate`: of 2048 x 2048 matrix "
        "products in the same process. `share`: the step's matrix products, attention between "
        "visible blocks only, at that rate, over its time.",
        "",
        "| sequences | attention | forward | step | products of a step | rate | share | compiling "
        "| peak memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        blocks, batch, dense = TASKS[name]
        share = row["operations"] / row["rate"] / row["step"]
        lines.append(
            f"| {batch} of {blocks} blocks | {'dense, masked' if dense else 'block-causal'} "
            f"| {row['forward']:.2f} s | {row['step']:.2f} s | {row['operations'] / 1e9:.0f} GFLOP "
            f"| {row['rate'] / 1e9:.0f} GFLOP/s | {share:.0%} | {row['compile']:.1f} s "
            f"| {row['peak'] / 2**20:.0f} MB |"
        )
    ratio = rows["16 dense"]["step"] / rows["16"]["step"]
    lines += [
        "",
        f"At 16 blocks a step is {ratio:.1f} times as fast as with dense masked attention.",
    ]
    return "\n".join(lines) + "\n"


def processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


if __name__ == "__main__":
    main()
