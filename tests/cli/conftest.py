"""The real program, on material made here."""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from elastictok.data import write_clip, write_picture

PROGRAM = Path(sys.executable).parent / "elastictok"


class Answer(NamedTuple):
    code: int
    out: str
    err: str


def elastictok(*arguments: object, code: int = 0) -> Answer:
    """Runs the program and checks its exit code."""
    result = subprocess.run(
        [PROGRAM, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    answer = Answer(result.returncode, result.stdout, result.stderr)
    assert answer.code == code, answer
    # Whatever happens, a user never sees a traceback.
    assert "Traceback" not in answer.err, answer.err
    return answer


@pytest.fixture(scope="session")
def run_program():
    return elastictok


def waves(height: int, width: int, phase: float) -> np.ndarray:
    y, x = np.mgrid[:height, :width] / 12.0
    channels = [np.sin(x + phase), np.cos(y - phase), np.sin(x + y + 2 * phase)]
    return (127.5 + 120 * np.stack(channels, axis=-1)).astype(np.uint8)


@pytest.fixture(scope="session")
def media(tmp_path_factory) -> Path:
    """Pictures and clips in nested folders, none of them square, and files that are broken."""
    folder = tmp_path_factory.mktemp("media")
    (folder / "deep" / "deeper").mkdir(parents=True)
    write_picture(folder / "a.png", waves(80, 100, 0.0))
    write_picture(folder / "deep" / "b.jpg", waves(120, 70, 1.0))
    write_picture(folder / "deep" / "deeper" / "c.webp", waves(64, 64, 2.0))
    clip = np.stack([waves(72, 96, t / 4) for t in range(12)])
    write_clip(folder / "deep" / "clip.mp4", clip, 8.0)
    (folder / "broken.mp4").write_bytes(b"")
    (folder / "notes.txt").write_text("not a picture")
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory, media, run_program) -> Path:
    """A run folder after four steps."""
    out = tmp_path_factory.mktemp("runs") / "run"
    options = ("--steps", 4, "--save-every", 2, "--batch-size", 2, "--log-every", 1)
    answer = run_program("train", "demo", "--data", media, "--out", out, *options)
    assert "broken.mp4" in answer.err
    assert answer.err.count("skipped") >= 2  # the warning, and the count at the end
    return out
