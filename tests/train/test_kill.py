"""Killed at any moment, a run loses at most what came after its last checkpoint."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from train_until_killed import train

from elastictok.models import load
from elastictok.train import latest_step

HERE = Path(__file__).parent


# `ELASTICTOK_KILLS=20 pytest -m heavy tests/train/test_kill.py` for more of them.
KILLS = int(os.environ.get("ELASTICTOK_KILLS", "3"))
EVERY = 2  # steps between checkpoints


@pytest.mark.heavy
def test_killed_again_and_again(tmp_path):
    out = tmp_path / "killed"
    rng = random.Random(0)
    lost = []
    for _ in range(KILLS):
        child = subprocess.Popen(
            [sys.executable, HERE / "train_until_killed.py", out, "100000", str(EVERY)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        assert child.stdout is not None
        seen = [int(child.stdout.readline()) for _ in range(3)]
        # Nearly all of a step's time is spent on saving it, so the moment is mostly in mid-save.
        time.sleep(rng.uniform(0, 0.5))
        child.kill()
        seen += [int(line) for line in child.stdout]
        child.wait()
        saved = latest_step(out)
        assert saved is not None
        assert seen == list(range(seen[0], seen[-1] + 1))
        # The last step may have been done and not told. At most one checkpoint is being written
        # at any time: the loop waits for it when the next one is due.
        assert saved % EVERY == 0
        lost.append(seen[-1] - saved)
        assert -1 <= lost[-1] <= 2 * EVERY
        load(out)
    print(f"{KILLS} kills, steps lost: {lost}")

    total = saved + 3
    resumed = train(str(out), total, EVERY)
    whole = train(str(tmp_path / "whole"), total, EVERY)
    pairs = zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
    rows = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (out, tmp_path / "whole")
    ]
    assert [row["step"] for row in rows[0]] == list(range(1, total + 1))
    # Each batch decides its step's loss: none was skipped and none was used twice.
    losses = [[row["loss"] for row in side] for side in rows]
    assert losses[0] == losses[1]
