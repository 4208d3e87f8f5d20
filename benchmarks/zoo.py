"""What the small tokenizers reach at equal training compute: the table, and the gallery of docs/.

    python benchmarks/zoo.py OUT              # runs `elastictok reproduce zoo-small -o OUT`, prints
    python benchmarks/zoo.py OUT --write      # and keeps benchmarks/results/zoo.md, docs/gallery.md

Goes on where OUT was left. Run it on an idle machine.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from demo import PACKAGES, processor

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "zoo.md"
PAGE = ROOT / "docs" / "gallery.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the reproduction")
    parser.add_argument("--write", action="store_true", help="write the results' pages")
    parser.add_argument("--budget", type=float, help="other than the command's own")
    arguments = parser.parse_args()
    program = Path(sys.executable).parent / "elastictok"
    command = [str(program), "reproduce", "zoo-small", "--out", str(arguments.out)]
    if arguments.budget is not None:
        command += ["--budget", str(arguments.budget)]
    subprocess.run(command, check=True)
    if arguments.write:
        keep(arguments.out)


def keep(out: Path) -> None:
    """Copies the table, and the gallery in place of the one that was there."""
    table = (out / "zoo-small.md").read_text(encoding="utf-8")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    title, rest = table.split("\n", 1)
    note = (
        f"`python benchmarks/zoo.py OUT --write`, {datetime.date.today()}: on {os.cpu_count()} CPU "
        f"cores ({processor()}). Python {platform.python_version()}, {versions}. "
        "[The pictures](../../docs/gallery.md)."
    )
    RESULT.write_text(f"{title}\n\n{note}\n{rest}", encoding="utf-8")
    found = json.loads((out / "zoo-small.json").read_text(encoding="utf-8"))
    shutil.copyfile(out / "gallery.md", PAGE)
    pictures = PAGE.with_suffix("")
    shutil.rmtree(pictures, ignore_errors=True)
    pictures.mkdir()
    for name in (each["preset"] for each in found["tokenizers"]):
        shutil.copyfile(out / "gallery" / f"{name}.png", pictures / f"{name}.png")


if __name__ == "__main__":
    main()
