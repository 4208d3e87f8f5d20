"""How fast attention is on a GPU beside cuDNN's flash attention, in one run.

    python benchmarks/attention_gpu.py [--repeats 10] [--out benchmarks/results/attention_gpu.md]

cuDNN has no block-causal mask, so the rates are compared: floating point operations over the
visible pairs of tokens, which is what each mask asks for, by the time taken. Counted are the two
products of a forward pass (4 x heads x head_dim for each pair), and 3.5 times that for a forward
and a backward pass, which computes five more. The variants take turns, and the fastest of each
one's turns counts.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elastictok.attention import AbstractMask, BlockCausal, Causal, Segments, attention

HEADS, HEAD_DIM = 8, 128
DTYPE = "bfloat16"
FORWARD, BOTH = "forward", "forward + backward"
FLOPS_PER_PAIR = {FORWARD: 4 * HEADS * HEAD_DIM, BOTH: 14 * HEADS * HEAD_DIM}
GOAL = 0.6  # of the rate of cuDNN's causal attention

Attend = Callable[[jax.Array, jax.Array, jax.Array, AbstractMask], jax.Array]


def _dense(q: jax.Array, k: jax.Array, v: jax.Array, mask: AbstractMask) -> jax.Array:
    seen = mask.dense(q.shape[0], k.shape[0])[None]
    return jax.nn.dot_product_attention(q, k, v, mask=seen, implementation="xla")


@dataclasses.dataclass(frozen=True)
class Variant:
    name: str
    attend: Attend
    mask: Callable[[jax.Array], AbstractMask]  # of the documents' labels


@dataclasses.dataclass(frozen=True)
class Measured:
    """Seconds of each pass, or why there is no such number."""

    pairs: int
    seconds: dict[str, float | str]

    def rate(self, what: str) -> float | None:
        seconds = self.seconds[what]
        if isinstance(seconds, str):
            return None
        return FLOPS_PER_PAIR[what] * self.pairs / seconds


CUDNN, XLA = "`cudnn`, causal", "`xla`, block-causal"
XLA_PACKED = "`xla`, block-causal, two documents"


def variants(block: int) -> list[Variant]:
    cudnn, xla = (functools.partial(attention, implementation=name) for name in ("cudnn", "xla"))
    return [
        Variant(CUDNN, cudnn, lambda ids: Causal()),
        Variant("dense, block-causal", _dense, lambda ids: BlockCausal(block)),
        Variant(XLA, xla, lambda ids: BlockCausal(block)),
        Variant(XLA_PACKED, xla, lambda ids: BlockCausal(block) & Segments(ids)),
    ]


def passes(variant: Variant) -> dict[str, Any]:
    """The jitted forward pass, and it together with the gradients of q, k and v."""

    def forward(q, k, v, ids, d_out):
        return variant.attend(q, k, v, variant.mask(ids))

    def both(q, k, v, ids, d_out):
        out, pull = jax.vjp(lambda *qkv: forward(*qkv, ids, d_out), q, k, v)
        return out, pull(d_out)

    return {FORWARD: jax.jit(forward), BOTH: jax.jit(both)}


def measure(length: int, block: int, repeats: int) -> dict[str, Measured]:
    """Every variant, in turns."""
    rng = np.random.default_rng(0)
    shape = (length, HEADS, HEAD_DIM)
    q, k, v, d_out = (jnp.asarray(rng.standard_normal(shape, np.float32), DTYPE) for _ in range(4))
    ids = jnp.where(jnp.arange(length) < 0.44 * length, 1, 2)
    args = (q, k, v, ids, d_out)

    results: dict[str, Measured] = {}
    ready: list[tuple[str, str, Callable]] = []
    for variant in variants(block):
        pairs = variant.mask(ids).count(length, length)
        results[variant.name] = Measured(pairs, {})
        for what, run in passes(variant).items():
            try:
                compiled = run.lower(*args).compile()
                jax.block_until_ready(compiled(*args))  # warms up, and finds out whether it fits
            except Exception as error:
                if (why := _excuse(error)) is None:
                    raise
                results[variant.name].seconds[what] = why
            else:
                results[variant.name].seconds[what] = float("inf")
                ready.append((variant.name, what, compiled))
    for _ in range(repeats):
        for name, what, run in ready:
            start = time.perf_counter()
            jax.block_until_ready(run(*args))
            took = time.perf_counter() - start
            seconds = results[name].seconds
            seconds[what] = min(float(seconds[what]), took)
    return results


def _excuse(error: Exception) -> str | None:
    """The answer that an error is, if it is one: too little memory, or the backend's reasons."""
    message = str(error)
    if "RESOURCE_EXHAUSTED" in message or "out of memory" in message.lower():
        return "out of memory"
    if isinstance(error, RuntimeError) and "cannot run this call" in message:
        reasons = [line[4:] for line in message.splitlines() if line.startswith("  - ")]
        return f"cannot run: {'; '.join(reasons)}"
    return None


def tables(length: int, block: int, repeats: int) -> Iterator[str]:
    results = measure(length, block, repeats)
    yield f"\n## {length} tokens, block {block}\n"
    yield f"| | visible pairs | {FORWARD} ms | TFLOP/s | {BOTH} ms | TFLOP/s |"
    yield "|---|---|---|---|---|---|"
    for name, measured in results.items():
        cells = [name, f"{measured.pairs / length**2:.0%}"]
        for what in (FORWARD, BOTH):
            seconds, rate = measured.seconds[what], measured.rate(what)
            cells += [
                seconds.split(":")[0] if isinstance(seconds, str) else f"{seconds * 1e3:.2f}",
                "" if rate is None else f"{rate / 1e12:.{1 if rate > 1e13 else 3}f}",
            ]
        yield f"| {' | '.join(cells)} |"
    yield ""
    for name in (XLA, XLA_PACKED):
        for what in (FORWARD, BOTH):
            yield verdict(name, what, results)


def verdict(name: str, what: str, results: dict[str, Measured]) -> str:
    """Whether the goal is reached."""
    for each in (CUDNN, name):
        if isinstance(why := results[each].seconds[what], str):
            return f"- {name}, {what}: nothing to compare. {each}: {why}."
    share = (results[name].rate(what) or 0.0) / (results[CUDNN].rate(what) or 1.0)
    reached = "reached" if share >= GOAL else "missed"
    return f"- {name}, {what}: {share:.0%} of the rate of {CUDNN}; {GOAL:.0%} is {reached}."


def machine() -> Iterator[str]:
    device = jax.devices()[0]
    versions = f"jax {jax.__version__}, jaxlib {importlib.metadata.version('jaxlib')}"
    yield f"- {datetime.date.today()}, {versions}, Python {platform.python_version()}"
    runtime = " ".join(device.client.platform_version.split())
    yield f"- {device.device_kind} ({device.platform}; {runtime}), {os.cpu_count()} CPU cores"


def report(lengths: list[int], block: int, repeats: int) -> Iterator[str]:
    yield "# Attention on a GPU: `xla` beside cuDNN's causal flash attention\n"
    yield (
        f"Written by `python benchmarks/attention_gpu.py --out FILE`; {HEADS} heads of {HEAD_DIM}, "
        f"{DTYPE}, {repeats} turns. TFLOP/s count visible pairs only.\n"
    )
    yield from machine()
    for length in lengths:
        yield from tables(length, block, repeats)


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--length", type=positive, nargs="+", default=[16384, 65536], help="tokens, one or more"
    )
    parser.add_argument("--block", type=positive, default=2048, help="tokens in a block")
    parser.add_argument("--repeats", type=positive, default=10, help="turns of each variant")
    parser.add_argument("--out", type=Path, help="a Markdown file to write as well")
    parser.add_argument(
        "--any-device", action="store_true", help="run without a GPU, to try the script"
    )
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu" and not arguments.any_device:
        raise SystemExit(
            f"this machine's devices are {jax.devices()[0].device_kind!r} and these are numbers "
            "for GPUs: run it where JAX finds one, or try the script with "
            "--any-device --length 256 --block 64"
        )
    lines = []
    for line in report(arguments.length, arguments.block, arguments.repeats):
        print(line, flush=True)
        lines.append(line)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
