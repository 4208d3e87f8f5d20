"""How fast attention is beside JAX's own dense attention, on this machine and in one run.

    python benchmarks/attention.py [--repeats 7] [--out benchmarks/results/attention_cpu.md]

The variants take turns, and the fastest of each one's turns counts, so that a machine that is busy
with other work slows them alike: read the ratios. A gradient is `jax.vjp`: the output and the
gradients of q, k and v. Memory is what XLA plans for its temporaries, arguments and results aside.
"Of products" is the time as a multiple of what the matrix products over the visible pairs alone
would take, two forward and seven in a gradient, at the rate of a large square product in the same
run.
"""

import argparse
import dataclasses
import datetime
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elastictok.attention import AbstractMask, BlockCausal, KeyValid, Segments, attention

Attend = Callable[[jax.Array, jax.Array, jax.Array, AbstractMask], jax.Array]


def _dense(q: jax.Array, k: jax.Array, v: jax.Array, mask: AbstractMask) -> jax.Array:
    seen = mask.dense(q.shape[0], k.shape[0])[None]
    return jax.nn.dot_product_attention(q, k, v, mask=seen, implementation="xla")


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, mask: AbstractMask) -> jax.Array:
    return attention(q, k, v, mask, implementation="xla")


def _reference(q: jax.Array, k: jax.Array, v: jax.Array, mask: AbstractMask) -> jax.Array:
    return attention(q, k, v, mask, implementation="reference")


@dataclasses.dataclass(frozen=True)
class Case:
    """Arrays of a batch, and a mask made of one array per example."""

    title: str
    queries: int
    keys: int
    fact: np.ndarray  # [batch ...]
    mask: Callable[[jax.Array], AbstractMask]
    heads: int = 4
    head_dim: int = 64
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Measured:
    seconds: float
    temporary: int  # bytes
    compiling: float  # seconds


PRODUCTS = {"forward": 2, "gradient": 7}


def packed(
    length: int, block: int, batch: int = 1, dtype: str = "float32", documents: int = 2
) -> Case:
    """Two documents in each sequence, the first a little shorter; or one."""
    first = 0.44 * length if documents == 2 else length
    ids = np.tile(np.where(np.arange(length) < first, 1, 2), (batch, 1))
    said = "two documents" if documents == 2 else "one document"
    title = f"{batch} x {length} tokens, block {block}, {said}, {dtype}"
    mask = lambda ids: BlockCausal(block) & Segments(ids)  # noqa: E731
    return Case(title, length, length, ids, mask, dtype=dtype)


def cached(capacity: int, written: int, block: int) -> Case:
    """The next block of a stream meets its cache."""

    def mask(at: jax.Array) -> AbstractMask:
        return BlockCausal(block, at) & KeyValid(jnp.arange(capacity) < at + block)

    at = np.asarray([written - block], np.int32)
    title = f"one block of {block} against a cache of {capacity}, {written} written"
    return Case(title, block, capacity, at, mask)


@dataclasses.dataclass(frozen=True)
class Program:
    name: str  # of the variant
    what: str  # "forward" or "gradient"
    run: Any
    args: tuple[jax.Array, ...]
    compiling: float  # seconds, tracing included


def programs(case: Case, variants: dict[str, Attend]) -> Iterator[Program]:
    """Each variant's compiled forward pass and gradient, ready to call."""
    rng = np.random.default_rng(0)
    shape = (len(case.fact), case.queries, case.heads, case.head_dim)
    q, d_out = (jnp.asarray(rng.normal(size=shape), case.dtype) for _ in range(2))
    shape = (len(case.fact), case.keys, case.heads, case.head_dim)
    k, v = (jnp.asarray(rng.normal(size=shape), case.dtype) for _ in range(2))
    fact = jnp.asarray(case.fact)
    for name, attend in variants.items():

        def forward(q, k, v, fact, attend=attend):
            return jax.vmap(lambda q, k, v, fact: attend(q, k, v, case.mask(fact)))(q, k, v, fact)

        def gradient(q, k, v, fact, d_out, forward=forward):
            out, pull = jax.vjp(lambda q, k, v: forward(q, k, v, fact), q, k, v)
            return out, pull(d_out)

        for what, function, args in (
            ("forward", forward, (q, k, v, fact)),
            ("gradient", gradient, (q, k, v, fact, d_out)),
        ):
            start = time.perf_counter()
            run = jax.jit(function).lower(*args).compile()
            yield Program(name, what, run, args, time.perf_counter() - start)


def measure(
    case: Case, variants: dict[str, Attend], repeats: int
) -> dict[tuple[str, str], Measured]:
    ready = list(programs(case, variants))
    fastest = {(program.name, program.what): float("inf") for program in ready}
    for _ in range(repeats):
        for program in ready:
            # Once untimed, or it would pay for the gigabytes that the one before it gave back.
            jax.block_until_ready(program.run(*program.args))
            start = time.perf_counter()
            jax.block_until_ready(program.run(*program.args))
            took = time.perf_counter() - start
            key = program.name, program.what
            fastest[key] = min(fastest[key], took)
    found = {}
    for program in ready:
        key, memory = (program.name, program.what), program.run.memory_analysis()
        temporary = memory.temp_size_in_bytes if memory else 0
        found[key] = Measured(fastest[key], temporary, program.compiling)
    return found


def product_rate(repeats: int, size: int = 2048) -> float:
    """Floating point operations per second of a large square float32 product."""
    x = jnp.ones((size, size))
    multiply = jax.jit(jnp.matmul)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(multiply(x, x))
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times[1:])


def visible(case: Case) -> int:
    """Visible pairs, over the batch."""
    return sum(case.mask(jnp.asarray(x)).count(case.queries, case.keys) for x in case.fact)


def of_products(case: Case, what: str, seconds: float, rate: float) -> float:
    """A time as a multiple of that of the visible products."""
    each = 2 * case.heads * case.head_dim * visible(case)
    return seconds / (PRODUCTS[what] * each / rate)


def compare(case: Case, repeats: int) -> Iterator[str]:
    """A table of all variants against the dense one."""
    variants = {"dense": _dense, "reference": _reference, "xla": _xla}
    results, rate = measure(case, variants, repeats), product_rate(repeats)
    yield f"\n### {case.title}\n"
    share = visible(case) / (len(case.fact) * case.queries * case.keys)
    yield (
        f"{share:.0%} of the pairs are visible. Square products run at {rate / 1e9:.0f} GFLOP/s.\n"
    )
    yield (
        "| | forward ms | times faster | of products | gradient ms | times faster | of products "
        "| memory MB | of dense |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    dense = {what: results["dense", what] for what in PRODUCTS}
    for name in variants:
        cells = [f"`{name}`"]
        for what in PRODUCTS:
            seconds = results[name, what].seconds
            ratio = dense[what].seconds / seconds
            share = of_products(case, what, seconds, rate)
            cells += [f"{seconds * 1e3:.2f}", f"{ratio:.2f}", f"{share:.1f}"]
        own, theirs = results[name, "gradient"].temporary, dense["gradient"].temporary
        cells += [f"{own / 2**20:.1f}", f"{own / theirs:.2f}"]
        yield f"| {' | '.join(cells)} |"


def per_pair(lengths: list[int], block: int, repeats: int) -> Iterator[str]:
    """Whether the time of a visible pair, and that of compiling, stay as the sequence grows."""
    yield f"\n### Time per visible pair of tokens, four heads, block {block}\n"
    yield "| documents | tokens | visible | forward ns | gradient ns | memory MB | compiling s |"
    yield "|---|---|---|---|---|---|---|"
    spread = []
    for documents in (1, 2):
        times = []
        for length in lengths:
            case = packed(length, block, documents=documents)
            pairs = visible(case)
            results = measure(case, {"xla": _xla}, repeats)
            forward, gradient = results["xla", "forward"], results["xla", "gradient"]
            times.append([result.seconds / pairs * 1e9 for result in (forward, gradient)])
            yield (
                f"| {documents} | {length} | {pairs / length**2:.0%} | {times[-1][0]:.2f} "
                f"| {times[-1][1]:.2f} | {gradient.temporary / 2**20:.1f} "
                f"| {gradient.compiling:.2f} |"
            )
        spread += [max(side) / min(side) for side in zip(*times, strict=True)]
    said = "one document {:.2f} forward, {:.2f} gradient; two documents {:.2f} and {:.2f}"
    yield f"\nSlowest over fastest: {said.format(*spread)}."
    yield "The end of a document cuts tiles, of which short sequences have few."


def machine() -> Iterator[str]:
    device = jax.devices()[0]
    yield f"- {datetime.date.today()}, jax {jax.__version__}, Python {platform.python_version()}"
    yield f"- {device.device_kind} ({device.platform}), {os.cpu_count()} cores"
    yield f"- runnable processes at the start: {load()}"


def load() -> str:
    """How busy the machine was: more processes than cores, and times stretch."""
    one, five, _ = os.getloadavg()
    return f"{one:.1f} over the last minute, {five:.1f} over the last five"


def report(repeats: int) -> Iterator[str]:
    yield "# Attention: `xla` beside `jax.nn.dot_product_attention` with a dense mask\n"
    yield "Written by `python benchmarks/attention.py --out FILE`; four heads of 64 throughout.\n"
    yield from machine()
    yield "\n## Long sequences"
    yield from compare(packed(4096, 512), repeats)
    yield from compare(packed(4096, 512, dtype="bfloat16"), repeats)
    yield from per_pair([2048, 4096, 8192, 16384, 32768], 512, max(repeats, 5))
    yield "\n## Short sequences, in a batch"
    for length in (64, 128, 256):
        yield from compare(packed(length, length // 4, batch=32), 4 * repeats)
    yield "\n## A stream"
    yield from compare(cached(16384, 2304, 256), repeats)
    yield f"\nRunnable processes at the end: {load()}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="turns of each variant")
    parser.add_argument("--out", type=Path, help="a Markdown file to write as well")
    arguments = parser.parse_args()
    lines = []
    for line in report(arguments.repeats):
        print(line, flush=True)
        lines.append(line)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
