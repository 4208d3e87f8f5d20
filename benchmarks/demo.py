"""What `elastictok demo` reaches, and how long it takes: the table of the README.

    python benchmarks/demo.py                 # prints
    python benchmarks/demo.py --write         # and keeps benchmarks/results/demo.md

Runs the program as a user does, compilation included. Run it on an idle machine.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "demo.md"
PACKAGES = ("elastictok", "jax", "equinox", "optax", "numpy", "scikit-image")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    parser.add_argument("--steps", type=int, help="other than the demo's own")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "demo"
        command = [str(Path(sys.executable).parent / "elastictok"), "demo", "--out", str(out)]
        if arguments.steps is not None:
            command += ["--steps", str(arguments.steps)]
        start = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - start
        steps = json.loads((out / "demo.json").read_text())["steps"]
        evaluations = json.loads((out / "evaluation.json").read_text())["evaluations"]
    text = describe(evaluations, steps, seconds)
    print(text)
    if arguments.write:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(text, encoding="utf-8")


def describe(evaluations: list[dict[str, Any]], steps: int, seconds: float) -> str:
    """The result as a page of Markdown."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    lines = [
        "# `elastictok demo`",
        "",
        f"`python benchmarks/demo.py --write`, {datetime.date.today()}: {steps} steps, "
        f"{seconds:.0f} s in all, on {os.cpu_count()} CPU cores ({processor()}). "
        f"Python {platform.python_version()}, {versions}.",
        "",
        "MSE over pixels in [-1, 1]; bpp = bits per pixel, lengths included.",
    ]
    for evaluation in evaluations:
        count = len(evaluation["rows"][0]["measurements"])
        lines += ["", f"## {evaluation['name']} ({count})", "", *table(evaluation)]
    return "\n".join(lines) + "\n"


def table(evaluation: dict[str, Any]) -> list[str]:
    """A row for each length, threshold and baseline."""
    lines = ["| | tokens | bpp | MSE | PSNR, dB | SSIM |", "|---|---|---|---|---|---|"]
    for row in evaluation["rows"]:
        summary = row["summary"]
        tokens = summary["tokens"]
        lines.append(
            f"| {row['name']} | {'-' if tokens is None else f'{tokens:.1f}'} "
            f"| {summary['bits_per_pixel']:.4f} | {summary['mse']:.4f} "
            f"| {summary['psnr_dataset']:.2f} | {summary['ssim_gaussian']:.3f} |"
        )
    return lines


def processor() -> str:
    """The processor's name, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
