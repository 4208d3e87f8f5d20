"""Stages: one run, ever longer contexts, each from the weights of the last."""

import json

import jax
import numpy as np
import pytest
from tiny_training import Counted, tiny_model

from elastictok.models import load
from elastictok.train import (
    Average,
    Stage,
    _devices,
    adamw,
    data_mesh,
    fit,
    fit_stages,
    latest_step,
)

ONE_DEVICE = data_mesh(jax.local_devices()[:1])
FIXED = {"quantizer_weight": 0.5, "mesh": ONE_DEVICE, "progress": False, "log_every": 1}


def stages():
    return [
        Stage(Counted(blocks=1), 3, adamw(1e-2), context=1),
        Stage(Counted(blocks=2), 4, adamw(3e-3), context=2),
        Stage(Counted(blocks=3), 2, adamw(1e-3), context=3),
    ]


def equal(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in leaves)


def losses(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of three stages, and how often a step was compiled."""
    out = tmp_path_factory.mktemp("stages") / "whole"
    count = 0
    lower = _devices.CompiledStep._lower

    def counted(self, *arguments):
        nonlocal count
        count += 1
        return lower(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_devices.CompiledStep, "_lower", counted)
        model = fit_stages(tiny_model(), stages(), out=out, save_every=100, **FIXED)
    return out, model, count


def test_steps_are_counted_through_and_compiled_once_per_stage(whole):
    out, model, count = whole
    assert count == 3
    assert [step for step, _ in losses(out)] == list(range(1, 10))
    assert model.context == 3
    assert load(out).context == 3
    assert latest_step(out) == 9


@pytest.mark.heavy
def test_a_stage_starts_from_the_weights_of_the_last(whole):
    """The first stage is a run by itself, and the second one starts as such a run did, but with
    those weights and at its own step."""
    out, _, _ = whole
    first = stages()[0]
    alone = fit_stages(tiny_model(), [first], **FIXED)
    again = fit_stages(tiny_model(), stages()[:2], **FIXED)
    assert not equal(alone, again)
    assert equal(
        alone, fit(tiny_model(), Counted(blocks=1), steps=3, optimizer=adamw(1e-2), **FIXED)
    )
    # Lengths are drawn by the step's number, so the loss of the second stage's first step is that
    # of no other: compare with a run whose first stage trains nothing.
    still = [Stage(Counted(blocks=1), 3, adamw(0.0, weight_decay=0.0)), stages()[1]]
    found = out.parent / "still"
    fit_stages(alone, still, out=found, save_every=100, **FIXED)
    assert losses(found)[3] == pytest.approx(losses(out)[3], rel=1e-6)


@pytest.mark.parametrize(
    "stop", [3, *(pytest.param(step, marks=pytest.mark.heavy) for step in (2, 5, 7))]
)
def test_resuming_in_any_stage_gives_the_whole_run(whole, tmp_path, stop):
    """Stopped inside of a stage and exactly between two."""
    out, model, _ = whole

    class Ends(Counted):
        def __iter__(self):
            inner = super().__iter__()
            outer = self

            class Iterator(type(inner)):
                def __next__(self):
                    if self._state["next"] == outer.last:
                        raise OSError("the disk is gone")
                    return super().__next__()

            return Iterator(self)

    parts = stages()
    starts = [0, 3, 7]
    for i, part in enumerate(parts):
        data = Ends(blocks=part.data.blocks)
        data.last = stop - starts[i] if starts[i] <= stop < starts[i] + part.steps else 1000
        parts[i] = Stage(data, part.steps, part.optimizer, part.context)
    where = tmp_path / "parts"
    with pytest.raises(OSError, match="the disk is gone"):
        fit_stages(tiny_model(), parts, out=where, save_every=1, **FIXED)
    assert latest_step(where) == stop
    other = tiny_model(seed=5)  # its values do not matter
    resumed = fit_stages(other, stages(), out=where, save_every=1, resume=True, **FIXED)
    assert equal(resumed, model)
    assert losses(where) == losses(out)


@pytest.mark.heavy
def test_the_average_goes_on_from_stage_to_stage():
    found = fit_stages(tiny_model(), stages()[:2], average=Average(0.5), **FIXED)
    plain = fit_stages(tiny_model(), stages()[:2], **FIXED)
    assert found.context == 2
    assert not equal(found, plain)
    last = fit_stages(tiny_model(), stages()[:2], average=Average(0.0), **FIXED)
    assert equal(last, plain)


def test_stages_that_are_none():
    with pytest.raises(ValueError, match="the number of stages is 0"):
        fit_stages(tiny_model(), [], **FIXED)
    with pytest.raises(ValueError, match="steps is 0"):
        fit_stages(tiny_model(), [Stage(Counted(), 0)], **FIXED)
