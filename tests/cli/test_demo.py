"""The first thing that a user runs, all of it."""

import json

import pytest

from elastictok.data import find_media, read_media
from elastictok.inference import Tokens
from elastictok.models import load


@pytest.mark.heavy
def test_the_demo_reaches_what_it_promises(tmp_path, run_program):
    """On photographs that it has not seen: against block means, at all tokens and at a quarter."""
    out = tmp_path / "demo"
    answer = run_program("demo", "--out", out)
    assert "8x8 block mean" in answer.out

    assert load(out).max_tokens == 64
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] / 2
    assert len(list((out / "checkpoints").iterdir())) == 1
    clip = Tokens.load(out / "tokens" / "clip.safetensors")
    assert (clip.frames, clip.blocks, clip.fps) == (48, 24, 8.0)
    assert read_media(out / "reconstructions" / "clip.mp4").frames.shape == (48, 64, 64, 3)
    assert len(list((out / "tokens").iterdir())) == 7

    # Train and test material are different photographs.
    train = {path.stem for path in find_media(out / "data" / "train").pictures}
    test = {path.stem.split("-")[0] for path in find_media(out / "data" / "test").pictures}
    assert test == {"camera", "chelsea", "rocket"}
    assert not train & test

    report = (out / "report.html").read_text()
    assert "http://" not in report
    assert "https://" not in report
    assert "coarse-to-fine" in report

    pictures = json.loads((out / "evaluation.json").read_text())["evaluations"][0]
    mse = {row["name"]: row["summary"]["mse"] for row in pictures["rows"]}
    # 0.69 to 0.79 with other seeds, and with the same one when products are summed otherwise.
    assert mse["64 tokens"] <= 0.85 * mse["8x8 block mean"]
    assert mse["16 tokens"] <= 1.1 * mse["16x16 block mean"]
    lengths = [mse[f"{n} tokens"] for n in (4, 8, 16, 32, 48, 64)]
    assert lengths == sorted(lengths, reverse=True)
