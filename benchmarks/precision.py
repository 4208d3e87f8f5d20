"""What bfloat16 changes: the share of codes that differ from those computed in float32.

    python benchmarks/precision.py                 # prints
    python benchmarks/precision.py --write         # and keeps benchmarks/results/precision.md

The released discrete model's geometry with random weights, matrix products and attention in
bfloat16; residual stream, norms, rotary angles, the projections in and out and the quantizer in
float32. Pictures that scikit-image carries, one block of 4,096 tokens each, all tokens kept. Twice:
with weights as drawn, which bfloat16 products round, and with weights that are bfloat16 numbers to
begin with, as in the released files.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "precision.md"
PACKAGES = ("elastictok", "jax", "equinox", "numpy", "scikit-image")
PICTURES = ("astronaut", "chelsea", "coffee", "rocket")
STDS = (0.02, 0.06)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    arguments = parser.parse_args()
    rows = [(std, name, *share(std, name)) for std in STDS for name in PICTURES]
    text = describe(rows)
    print(text)
    if arguments.write:
        RESULT.write_text(text, encoding="utf-8")


def share(std: float, name: str) -> tuple[float, float]:
    """Share of codes that differ: with weights as drawn, and with weights rounded before."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import numpy as np
    import skimage.data

    from elastictok.inference import FixedLength, Tokenizer
    from elastictok.models import OFFICIAL_FSQ, with_compute_dtype

    config = dataclasses.replace(OFFICIAL_FSQ, initializer_range=std)
    model = config.build(key=jax.random.key(0))
    picture = Tokenizer(model, FixedLength(length=4096)).fit(getattr(skimage.data, name)()[None])
    left = (picture.shape[2] - 256) // 2
    frames = np.repeat(picture[:, :256, left : left + 256], 4, axis=0)
    pixels = jnp.asarray(frames, jnp.float32) / 127.5 - 1

    @eqx.filter_jit
    def encode(model, pixels):
        return model.encode(pixels, jnp.asarray([4096]))

    def differ(model):
        whole = encode(model, pixels)
        half = encode(with_compute_dtype(model, jnp.bfloat16), pixels)
        return float(np.asarray(whole != half).any(axis=-1).mean())

    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), model)
    return differ(model), differ(rounded)


def describe(rows: list[tuple[float, str, float, float]]) -> str:
    """The result as a page of Markdown."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    lines = [
        "# Codes that bfloat16 changes",
        "",
        f"`python benchmarks/precision.py --write`, {datetime.date.today()}, on {os.cpu_count()} "
        f"CPU cores. Python {platform.python_version()}, {versions}.",
        "",
        "`elastictok_fsq_200m` with random weights of the given standard deviation (0.02 is the "
        "default initialisation), 64,000 codes of six digits, 4,096 tokens a picture.",
        "",
        "| std | picture | codes that differ | with bfloat16 weights |",
        "|---|---|---|---|",
    ]
    for std, name, drawn, rounded in rows:
        lines.append(f"| {std} | {name} | {100 * drawn:.2f} % | {100 * rounded:.2f} % |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
