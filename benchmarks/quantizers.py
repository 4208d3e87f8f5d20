"""How fast the quantizers are on a CPU, beside vector-quantize-pytorch.

    pip install torch vector-quantize-pytorch
    python benchmarks/quantizers.py            # prints; about three minutes
    python benchmarks/quantizers.py --write    # and keeps benchmarks/results/quantizers.md

Each pair takes the same number of latents of the same width to a book of the same size: a forward
pass in eval mode without gradients, and a training step, which is forward, loss, backward to the
latents, and the update of the book where it follows averages. The two take turns in one process,
each with all cores. What is compiled is compiled before, and so is torch's first call.
"""

import argparse
import datetime
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import torch
import vector_quantize_pytorch as theirs
from train import processor

from elastictok.quantizers import (
    BSQ,
    FSQ,
    LFQ,
    VQ,
    AbstractDiscreteQuantizer,
    Gradient,
    Grouped,
    Residual,
    RotationTrick,
    SimVQ,
)

RESULT = Path(__file__).parent / "results" / "quantizers.md"
PACKAGES = ("elastictok", "jax", "jaxlib", "equinox", "torch", "vector-quantize-pytorch")
BATCH, TOKENS = 8, 1024
CODES, DIM, STAGES, GROUPS, BITS = 1024, 16, 4, 2, 12
LEVELS = (8, 8, 8, 5, 5, 5)
KEY = jax.random.key(0)

Pair = tuple[AbstractDiscreteQuantizer, torch.nn.Module]
PAIRS: dict[str, Callable[[], Pair]] = {
    f"FSQ {LEVELS}": lambda: (FSQ(LEVELS), theirs.FSQ(list(LEVELS))),
    f"LFQ, {BITS} bits": lambda: (
        LFQ(BITS),
        theirs.LFQ(dim=BITS, commitment_loss_weight=0.25),
    ),
    f"BSQ, {BITS} bits": lambda: (
        BSQ(BITS),
        theirs.LFQ(dim=BITS, commitment_loss_weight=0.25, spherical=True),
    ),
    f"VQ {CODES} x {DIM}": lambda: (
        VQ(CODES, DIM, key=KEY),
        theirs.VectorQuantize(dim=DIM, codebook_size=CODES),
    ),
    "VQ, by gradient": lambda: (
        VQ(CODES, DIM, key=KEY, book=Gradient()),
        theirs.VectorQuantize(
            dim=DIM, codebook_size=CODES, ema_update=False, learnable_codebook=True
        ),
    ),
    "VQ, cosine": lambda: (
        VQ(CODES, DIM, key=KEY, cosine=True),
        theirs.VectorQuantize(dim=DIM, codebook_size=CODES, use_cosine_sim=True),
    ),
    "VQ, rotation trick": lambda: (
        VQ(CODES, DIM, key=KEY, estimator=RotationTrick()),
        theirs.VectorQuantize(dim=DIM, codebook_size=CODES, rotation_trick=True),
    ),
    f"SimVQ {CODES} x {DIM}": lambda: (
        SimVQ(CODES, DIM, key=KEY),
        theirs.SimVQ(dim=DIM, codebook_size=CODES, rotation_trick=False),
    ),
    f"residual VQ, {STAGES} stages": lambda: (
        Residual(VQ(CODES, DIM, key=KEY), STAGES),
        theirs.ResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=STAGES),
    ),
    f"residual FSQ, {STAGES} stages": lambda: (
        Residual(FSQ(LEVELS), STAGES),
        theirs.ResidualFSQ(dim=len(LEVELS), levels=list(LEVELS), num_quantizers=STAGES),
    ),
    f"grouped VQ, {GROUPS} groups of {DIM}": lambda: (
        Grouped(VQ(CODES, DIM, key=KEY), GROUPS),
        theirs.GroupedResidualVQ(
            dim=GROUPS * DIM, codebook_size=CODES, num_quantizers=1, groups=GROUPS
        ),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each pair")
    parser.add_argument("--only", default="", help="the pairs whose name contains this")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    rows = []
    for name, make in PAIRS.items():
        if arguments.only in name:
            rows.append(row(name, *make(), arguments.repeats))
            print(rows[-1], flush=True)
    text = describe(rows, arguments.repeats)
    print(text)
    if arguments.write:
        RESULT.write_text(text, encoding="utf-8")


def row(name: str, ours: AbstractDiscreteQuantizer, other: torch.nn.Module, repeats: int) -> str:
    """One line of the table."""
    cells = [name]
    programs = zip(of_jax(ours), of_torch(other, ours.input_dim), strict=True)
    for mine, their in programs:
        pairs = alternate(mine, their, repeats)
        ratios = sorted(their / mine for mine, their in pairs)
        cells += [
            f"{1e3 * statistics.median(mine for mine, _ in pairs):.1f}",
            f"{1e3 * statistics.median(their for _, their in pairs):.1f}",
            f"{statistics.median(ratios):.1f}x ({ratios[0]:.1f} .. {ratios[-1]:.1f})",
        ]
    return "| " + " | ".join(cells) + " |"


def alternate(
    mine: Callable[[], Any], their: Callable[[], Any], repeats: int
) -> list[tuple[float, float]]:
    """Seconds of each, turn by turn, the first turn not counted."""
    pairs = [(seconds(mine), seconds(their)) for _ in range(repeats + 1)]
    return pairs[1:]


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def of_jax(quantizer: AbstractDiscreteQuantizer) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A forward pass and a training step of a batch."""
    latents = jax.random.normal(KEY, (BATCH, TOKENS, quantizer.input_dim))
    weights = jax.random.normal(jax.random.key(1), latents.shape)
    keep = jnp.ones((BATCH, TOKENS), bool)

    @eqx.filter_jit
    def forward(q: Any, latents: jax.Array) -> Any:
        out = jax.vmap(q)(latents, keep)
        return out.latents, out.codes

    @eqx.filter_jit
    def step(q: Any, latents: jax.Array) -> Any:
        params, rest = eqx.partition(q, q.trainable())

        def objective(params: Any, latents: jax.Array) -> Any:
            out = jax.vmap(eqx.combine(params, rest))(latents, keep)
            sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), out.statistics)
            loss = jnp.sum(out.loss) / keep.size + q.batch_loss(sums)
            return jnp.sum(out.latents * weights) + loss, (out.latents, out.codes, sums)

        (loss, (points, codes, sums)), gradients = jax.value_and_grad(
            objective, argnums=(0, 1), has_aux=True
        )(params, latents)
        return loss, points, codes, gradients, q.update(sums)

    return (
        lambda: jax.block_until_ready(forward(quantizer, latents)),
        lambda: jax.block_until_ready(step(quantizer, latents)),
    )


def of_torch(module: torch.nn.Module, dim: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The same of theirs."""
    latents = torch.randn(BATCH, TOKENS, dim)
    weights = torch.randn(BATCH, TOKENS, dim)

    def forward() -> Any:
        module.eval()
        with torch.no_grad():
            return module(latents)

    def step() -> Any:
        module.train()
        module.zero_grad()
        x = latents.clone().requires_grad_()
        # FSQ and its residual have no loss.
        points, codes, *losses = module(x)
        loss = (points * weights).sum() + sum(part.sum() for part in losses)
        loss.backward()
        return loss, points, codes, x.grad

    return forward, step


def describe(rows: list[str], repeats: int) -> str:
    """The result as a page of Markdown."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    lines = [
        "# Quantizers beside vector-quantize-pytorch",
        "",
        f"`python benchmarks/quantizers.py --write`, {datetime.date.today()}, on {os.cpu_count()} "
        f"CPU cores ({processor()}). Python {platform.python_version()}, {versions}.",
        "",
        f"{BATCH} x {TOKENS} latents, float32. `forward`: eval mode, no gradient. `step`: forward, "
        "loss, backward, update of the book. Milliseconds, ours and theirs: medians of "
        f"{repeats} turns. `faster`: the median of the turns' ratios (least .. greatest). "
        "Theirs as it is called by default, without torch.compile. Their LFQ sums the entropy over "
        f"all {2**BITS} codes, which this library does not: its own is a sum over bits, see `LFQ`.",
        "",
        "| quantizer | forward, ours | theirs | faster | step, ours | theirs | faster |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def version(name: str) -> str:
    """Of a distribution; the quantizers may be installed alone."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return importlib.metadata.version(f"{name}-quantizers")


if __name__ == "__main__":
    main()
