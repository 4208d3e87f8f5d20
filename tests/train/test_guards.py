"""What stops a run or is reported, and what it says."""

import dataclasses
import itertools
import os
import re
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import OPTIMIZER, Counted, make_batch, tiny_model

from elastictok.data import Batch
from elastictok.train import (
    CheckpointError,
    DataError,
    NonFiniteError,
    _checkpoints,
    data_mesh,
    fit,
    latest_step,
)
from elastictok.train._checkpoints import Checkpoints
from elastictok.train._devices import place
from elastictok.train._watch import StepWatch

ONE_DEVICE = data_mesh(jax.local_devices()[:1])
FIXED = {"optimizer": OPTIMIZER, "quantizer_weight": 0.5, "mesh": ONE_DEVICE}


def test_what_is_not_finite_is_reported_with_the_documents_of_its_batch(tmp_path):
    def blows_up(prediction, target, valid, *, key=None):
        # The fifth batch alone has a first pixel of this value.
        bad = jnp.any(target[:, 0, 0, 0, 0, 0] > 0.996)
        return jnp.mean(jnp.square(prediction - target)) + jnp.where(bad, jnp.nan, 0)

    def batches():
        for number in itertools.count(1):
            batch = make_batch(number)
            pixels = np.minimum(batch.pixels, 254)
            if number == 5:
                pixels[0, 0, 0, 0, 0, 0] = 255
            names = tuple((f"cat-{number}.jpg", f"dog-{number}.mp4") for _ in range(12))
            yield dataclasses.replace(batch, pixels=pixels, names=names)

    with pytest.raises(NonFiniteError) as error:
        fit(
            tiny_model(),
            batches(),
            steps=9,
            out=tmp_path / "run",
            loss=blows_up,
            save_every=2,
            log_every=1,
            progress=False,
            **FIXED,
        )
    said = str(error.value)
    assert "loss is nan at step 5" in said
    assert "cat-5.jpg, dog-5.mp4" in said
    assert "and 8 more" in said
    assert "cat-4" not in said
    assert "cat-6" not in said
    assert "checkpoint 4 was saved before it" in said
    assert latest_step(tmp_path / "run") == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixels": "float"}, r"pixels of a batch are float32\[8, 2, 1, 16, 16, 3\]; .* 0 to 255"),
        ({"pixels": "grey"}, r"must be uint8\[batch, blocks, frames, height, width, 3\]"),
        ({"pixels": "flat"}, r"pixels of a batch are uint8\[8, 2, 768\]"),
        ({"segments": "float"}, r"segments of a batch is float64\[8, 2\]; .* one integer"),
        ({"valid": "short"}, r"valid of a batch is bool\[8, 1\]; .* boolean for each"),
    ],
)
def test_what_is_no_batch_is_refused(change, message):
    """As from a dataset of one's own; the class itself is checked in tests only."""
    batch = make_batch(0)
    changed = {
        "float": lambda x: x.astype(np.float32 if x.dtype == np.uint8 else np.float64),
        "grey": lambda x: x[..., :1],
        "flat": lambda x: x.reshape(8, 2, -1),
        "short": lambda x: x[:, :1],
    }
    ((name, how),) = change.items()
    fields = {"pixels": batch.pixels, "segments": batch.segments, "valid": batch.valid}
    fields[name] = changed[how](fields[name])
    odd = object.__new__(Batch)
    for field, value in (fields | {"names": ()}).items():
        object.__setattr__(odd, field, value)
    with pytest.raises(DataError, match=message):
        place(odd, ONE_DEVICE)


def test_a_slow_step_is_reported_with_where_the_time_went():
    watch = StepWatch()
    for step in range(1, 40):
        assert watch.add(step, data=0.01, compute=0.04, saving=0.0) is None
    assert watch.add(40, data=0.01, compute=0.4, saving=0.0) is None  # 8 times the median
    said = watch.add(41, data=0.9, compute=0.05, saving=0.05)
    assert said == (
        "step 41 took 1 s, 20 times the median: 0.9 s waiting for data, 0.05 s computing, "
        "0.05 s saving a checkpoint"
    )
    quick = StepWatch()
    for step in range(1, 40):
        quick.add(step, data=0.0, compute=0.001, saving=0.0)
    assert quick.add(40, data=0.05, compute=0.0, saving=0.0) is None  # a hiccup


def test_the_loop_reports_it(capsys):
    class Slow(Counted):
        def __iter__(self):
            for number, batch in enumerate(super().__iter__()):
                if number == 30:
                    time.sleep(1.5)
                yield batch

    fit(tiny_model(), Slow(), steps=40, **FIXED)
    said = re.findall(r"step (\d+) took .* ([\d.]+) s waiting for data", capsys.readouterr().err)
    assert [(step, float(wait) > 1) for step, wait in said] == [("31", True)]


def test_a_save_that_fails_in_the_background_is_done_again(tmp_path, monkeypatch):
    """With the state of then; the run goes on."""
    monkeypatch.setattr(_checkpoints, "_PAUSES", (0.0, 0.0))
    failing = iter([True, True])  # in the background, and then once more
    seal = _checkpoints._seal

    def sometimes(folder):
        if next(failing, False):
            raise OSError("no space left")
        seal(folder)

    monkeypatch.setattr(_checkpoints, "_seal", sometimes)
    out = tmp_path / "run"
    with pytest.warns(UserWarning, match="no space left.*trying again"):
        fit(tiny_model(), Counted(), steps=9, out=out, save_every=4, progress=False, **FIXED)
    steps = sorted(int(path.name) for path in (out / "checkpoints").iterdir())
    assert steps[-1] == 9
    assert len(steps) == 2


def test_a_save_that_fails_again_and_again_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(_checkpoints, "_PAUSES", (0.0, 0.0))

    def never(folder):
        raise OSError("no space left")

    out = tmp_path / "run"
    fit(tiny_model(), Counted(), steps=2, out=out, progress=False, **FIXED)
    monkeypatch.setattr(_checkpoints, "_seal", never)
    with (
        pytest.warns(UserWarning, match="trying again"),
        pytest.raises(CheckpointError, match=r"could not be saved.*no space left.*resume"),
    ):
        fit(
            tiny_model(),
            Counted(),
            steps=400,
            out=out,
            save_every=2,
            resume=True,
            progress=False,
            **FIXED,
        )
    assert latest_step(out) == 2  # what was there is there
    assert not [thread for thread in threading.enumerate() if "elastictok" in thread.name]


def test_a_checkpoint_holds_the_state_of_its_step(tmp_path):
    """It is written while later steps overwrite that state's memory."""
    every, out = [], tmp_path / "run"
    save = Checkpoints.start

    def spying(self, state, loop):
        save(self, state, loop)
        every.append((int(state.step), [np.array(x) for x in jax.tree.leaves(state.model)]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "start", spying)
        fit(tiny_model(), Counted(), steps=9, out=out, save_every=4, progress=False, **FIXED)
    for step, expected in every[-2:]:
        found = fit_at(tmp_path, out, step)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)


def fit_at(tmp_path, out, step):
    """The weights in a checkpoint: a run of so many steps resumed there has nothing to do."""
    copy = tmp_path / f"at-{step}"
    os.makedirs(copy / "checkpoints")
    os.rename(out / "checkpoints" / str(step), copy / "checkpoints" / str(step))
    model = fit(
        tiny_model(seed=7), Counted(), steps=step, out=copy, resume=True, progress=False, **FIXED
    )
    return [np.array(x) for x in jax.tree.leaves(model)]
