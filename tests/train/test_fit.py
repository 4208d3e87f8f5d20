"""The loop: what it leaves behind, how it stops, and that it goes on as if it had not stopped."""

import itertools
import json
import os
import re
import shutil
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_training import (
    OPTIMIZER,
    QUANTIZER_WEIGHT,
    Counted,
    CountedIterator,
    make_batch,
    quantizers,
    tiny_model,
)

from elastictok.data import Batch, Clip, Geometry, load_clips
from elastictok.models import fingerprint, load
from elastictok.train import (
    MSE,
    AbstractTracker,
    CheckpointError,
    DataError,
    NonFiniteError,
    RecompilationError,
    RunFolderError,
    _devices,
    data_mesh,
    fit,
    latest_step,
)

ONE_DEVICE = data_mesh(jax.local_devices()[:1])
SPEED = {"steps_per_second", "tokens_per_second", "waiting_for_data"}


def train(data=None, *, model=None, progress=False, **settings):
    model = tiny_model() if model is None else model
    data = Counted() if data is None else data
    fixed = {
        "optimizer": OPTIMIZER,
        "quantizer_weight": QUANTIZER_WEIGHT,
        "mesh": ONE_DEVICE,
        "progress": progress,
    }
    return fit(model, data, **(fixed | settings))


def lines(out, *, speed=False):
    """metrics.jsonl, without what depends on the machine's mood."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return rows if speed else [{k: v for k, v in row.items() if k not in SPEED} for row in rows]


def equal(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in leaves)


class Interrupting(Counted):
    """Sends a signal to this process when batch `number` is made."""

    def __init__(self, number, name):
        super().__init__()
        self.number = number
        self.name = name

    def __iter__(self):
        outer = self

        class Iterator(CountedIterator):
            def __next__(self):
                if self._state["next"] + 1 == outer.number:
                    os.kill(os.getpid(), outer.name)
                return super().__next__()

        return Iterator(self)


@pytest.mark.parametrize("name", [pytest.param("GaussianVAE", marks=pytest.mark.heavy), "Residual"])
def test_a_resumed_run_is_the_whole_run(tmp_path, name):
    model = tiny_model(quantizers()[name])
    every = {"save_every": 4, "log_every": 3}
    whole = train(model=model, steps=12, out=tmp_path / "whole", **every)

    # Ended in the middle of a line of metrics (5), and by a signal at some later step.
    out = tmp_path / "parts"
    train(model=model, steps=5, out=out, **every)
    train(Interrupting(10, signal.SIGTERM), model=model, steps=12, out=out, resume=True, **every)
    assert 5 < latest_step(out) < 12
    other = tiny_model(quantizers()[name], seed=9)  # its values do not matter
    parts = train(model=other, steps=12, out=out, resume=True, **every)

    assert equal(whole, parts)
    assert [line["step"] for line in lines(tmp_path / "whole")] == [3, 6, 9, 12]
    assert [line["step"] for line in lines(out)] == [3, 5, 6, 9, 12]  # 5 ended a session
    assert [line for line in lines(out) if line["step"] != 5] == lines(tmp_path / "whole")
    assert (out / "config.json").read_bytes() == (tmp_path / "whole/config.json").read_bytes()
    assert fingerprint(load(out)) == fingerprint(load(tmp_path / "whole"))


def test_resuming_a_real_dataset(tmp_path):
    rng = np.random.default_rng(0)
    clips = [
        Clip(rng.integers(0, 256, (n, 20, 24, 3), dtype=np.uint8), fps=None if n == 1 else 8.0)
        for n in (1, 1, 1, 3, 5)
    ]
    data = load_clips(clips, Geometry((16, 16), 1, 2), batch_size=8, seed=3)
    whole = train(data, steps=4, out=tmp_path / "whole", log_every=1)
    train(data, steps=2, out=tmp_path / "parts", log_every=1)
    parts = train(data, steps=4, out=tmp_path / "parts", log_every=1, resume=True)
    assert equal(whole, parts)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


@pytest.mark.heavy
@pytest.mark.parametrize("iterator", [False, True])
def test_buckets_compile_once_for_each_size(tmp_path, monkeypatch, iterator):
    rng = np.random.default_rng(0)
    sizes = ((16, 16), (8, 16), (16, 8))
    clips = [Clip(rng.integers(0, 256, (1, *size, 3), dtype=np.uint8), None) for size in sizes * 2]
    data = load_clips(clips, Geometry((16, 16), 1, 2, buckets=sizes[1:]), batch_size=8, seed=3)
    seen = []
    original = _devices.CompiledStep.__call__

    def counting(self, state, batch):
        result = original(self, state, batch)
        seen.append((_devices._size(batch), len(self._compiled)))
        return result

    monkeypatch.setattr(_devices.CompiledStep, "__call__", counting)
    whole = train(iter(data) if iterator else data, steps=8, out=tmp_path / "whole", log_every=1)
    assert {size for size, _ in seen} == set(sizes)
    assert [count for _, count in seen] == [len({s for s, _ in seen[: i + 1]}) for i in range(8)]
    train(data, steps=3, out=tmp_path / "parts", log_every=1)
    parts = train(data, steps=8, out=tmp_path / "parts", log_every=1, resume=True)
    assert equal(whole, parts)


def test_what_a_run_folder_holds(tmp_path, capsys):
    out = tmp_path / "runs" / "a"
    model = tiny_model()
    trained = train(model=model, steps=4, out=out, save_every=2, log_every=2, progress=True)
    assert {path.name for path in out.iterdir()} == {
        "checkpoints",
        "README.md",
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
        "sessions.jsonl",
    }
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["2", "4"]
    assert not equal(model, trained)
    assert fingerprint(load(out)) == fingerprint(trained)
    last = lines(out, speed=True)[-1]
    assert list(last)[:3] == ["step", "loss", "psnr"]
    assert SPEED | {"mse", "kept", "gradient_norm", "quantizer", "reconstruction"} < set(last)
    assert 0 <= last["waiting_for_data"] <= 1
    (session,) = [json.loads(line) for line in (out / "sessions.jsonl").read_text().splitlines()]
    assert session["from_step"] == 0
    assert session["steps"] == 4
    assert session["loss"] == "MSE()"
    assert session["versions"]["jax"] == jax.__version__
    printed = capsys.readouterr().err
    assert re.search(r"step 4/4  loss \d\.\d+  PSNR [\d.]+ dB  [\d.]+k? tokens/s", printed)


def test_the_given_model_is_left_alone_and_the_seed_decides():
    model = tiny_model(quantizers()["VQ"])
    before = fingerprint(model)
    first = train(model=model, steps=2)
    assert fingerprint(model) == before
    assert equal(first, train(model=model, steps=2))
    assert not equal(first, train(model=model, steps=2, seed=1))


def test_a_used_folder_needs_resume(tmp_path):
    (tmp_path / "train.json").write_text("{}")  # the command line's own file
    train(steps=1, out=tmp_path)
    with pytest.raises(RunFolderError, match=r"already holds a run \(model\.safetensors.*--resume"):
        train(steps=1, out=tmp_path)
    assert latest_step(tmp_path) == 1


def test_resume_starts_anew_where_there_is_nothing_and_ends_where_all_is_done(tmp_path, capsys):
    first = train(steps=1, out=tmp_path / "a", resume=True, progress=True)
    assert "nothing to resume: starting anew" in capsys.readouterr().err

    class Untouchable(Counted):
        def __iter__(self):
            raise AssertionError("no data is needed")

    again = train(Untouchable(), steps=1, out=tmp_path / "a", resume=True, progress=True)
    assert "all 1 steps are done" in capsys.readouterr().err
    assert equal(first, again)


def test_resume_after_a_crash_before_the_first_checkpoint(tmp_path):
    with pytest.raises(DataError, match="ended after 3 batches"):
        train([make_batch(n) for n in range(3)], steps=9, out=tmp_path, log_every=1)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    train(steps=2, out=tmp_path, log_every=1, resume=True)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_what_cannot_be_resumed_says_so(tmp_path):
    train(itertools.repeat(make_batch(0)), steps=1, out=tmp_path / "plain")
    with pytest.raises(DataError, match="cannot say where it was"):
        train(steps=2, out=tmp_path / "plain", resume=True)
    train(steps=1, out=tmp_path / "counted")
    with pytest.raises(DataError, match=r"repeat cannot be resumed"):
        train(itertools.repeat(make_batch(0)), steps=2, out=tmp_path / "counted", resume=True)
    with pytest.raises(CheckpointError, match=r"of another model or optimizer.*heads is 2"):
        train(model=tiny_model(heads=4), steps=2, out=tmp_path / "counted", resume=True)
    with pytest.raises(CheckpointError, match="of another model or optimizer"):
        train(optimizer=optax.sgd(0.1), steps=2, out=tmp_path / "counted", resume=True)


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    whole = train(steps=6, out=tmp_path / "whole", save_every=2, log_every=1)
    out = tmp_path / "damaged"
    train(steps=4, out=out, save_every=2, log_every=1)
    largest = max((out / "checkpoints" / "4").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 16
    largest.write_bytes(content)
    with pytest.warns(UserWarning, match="checkpoint 4 is damaged .* going back to 2"):
        resumed = train(steps=6, out=out, save_every=2, log_every=1, resume=True)
    assert equal(whole, resumed)
    assert lines(out) == lines(tmp_path / "whole")


class _White(Counted):
    """Batch 5 is white all over."""

    def __iter__(self):
        class Iterator(CountedIterator):
            def __next__(self):
                batch = super().__next__()
                if self._state["next"] == 5:
                    return Batch(np.full_like(batch.pixels, 255), batch.segments, batch.valid)
                return batch

        return Iterator(self)


def _nan_on_white(prediction, target, valid, *, key=None):
    white = jnp.all(jnp.where(valid[:, :, None, None, None, None], target, 1) > 0.99)
    return jnp.where(white, jnp.nan, MSE()(prediction, target, valid))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    closed = []

    class Tracker(AbstractTracker):
        def log(self, step, metrics):
            pass

        def close(self):
            closed.append(True)

    message = "loss is nan at step 5; checkpoint 4 was saved before it"
    with pytest.raises(NonFiniteError, match=message):
        train(
            _White(),
            steps=20,
            out=tmp_path,
            save_every=2,
            log_every=10,  # found when the metrics are next fetched, named all the same
            loss=_nan_on_white,
            trackers=[Tracker()],
        )
    assert closed == [True]
    assert latest_step(tmp_path) == 4
    assert not [t for t in threading.enumerate() if t.name == "elastictok-batches"]
    assert np.isfinite(np.asarray(load(tmp_path).encoder.kept)).all()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    def init(params):
        return optax.EmptyState()

    def update(updates, state, params=None):
        return jax.tree.map(lambda u: jnp.full_like(u, jnp.inf), updates), state

    with pytest.raises(NonFiniteError, match="not finite after step 1; nothing was saved"):
        train(steps=1, out=tmp_path, optimizer=optax.GradientTransformation(init, update))
    assert latest_step(tmp_path) is None


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_returns(tmp_path, name, capsys):
    before = signal.getsignal(name)
    model = train(Interrupting(4, name), steps=100, out=tmp_path, progress=True)
    assert signal.getsignal(name) is before
    step = latest_step(tmp_path)
    assert step is not None
    assert 1 <= step <= 4
    assert fingerprint(load(tmp_path)) == fingerprint(model)
    assert f"{name.name}: stopping after step {step} of 100" in capsys.readouterr().err


def test_outside_of_the_main_thread(tmp_path):
    models = []
    thread = threading.Thread(target=lambda: models.append(train(steps=2, out=tmp_path)))
    thread.start()
    thread.join()
    assert equal(models[0], train(steps=2))


def test_the_best_model_is_kept(tmp_path):
    losses = iter([3.0, 1.0, 2.0])
    seen = []

    def validate(model):
        seen.append(fingerprint(model))
        return {"loss": next(losses), "ssim": 0.5}

    last = train(steps=6, out=tmp_path, save_every=2, log_every=3, validate=validate)
    assert fingerprint(last) == seen[2]
    assert fingerprint(load(tmp_path)) == seen[1]
    rows = lines(tmp_path)
    assert [row["step"] for row in rows] == [2, 3, 4, 6]
    assert [row.get("validation_loss") for row in rows] == [3.0, None, 1.0, 2.0]
    assert "loss" not in rows[0]
    assert rows[3]["validation_ssim"] == 0.5
    assert "loss" in rows[3]


def test_validation_must_have_a_finite_loss(tmp_path):
    with pytest.raises(ValueError, match=r"returned \['validation_ssim'\] without 'loss'"):
        train(steps=1, out=tmp_path / "a", validate=lambda model: {"ssim": 1.0})
    with pytest.raises(NonFiniteError, match="validation_loss is nan at step 1"):
        train(steps=1, out=tmp_path / "b", validate=lambda model: {"loss": float("nan")})


def test_a_batch_of_another_shape_stops_the_run():
    with pytest.raises(RecompilationError, match=r"uint8\[8, 2, 1.* -> uint8\[8, 1, 1"):
        train([make_batch(0), make_batch(1, blocks=1)], steps=2)


def test_batches_for_another_model_are_refused():
    batch = make_batch(0)
    two = Batch(np.repeat(batch.pixels, 2, axis=2), batch.segments, batch.valid)
    with pytest.raises(DataError, match="blocks of 2 frames and the model of 1"):
        train([two], steps=1)


def test_trackers_get_every_line(tmp_path):
    got = []

    class Tracker(AbstractTracker):
        def log(self, step, metrics):
            got.append({"step": step} | dict(metrics))

        def close(self):
            got.append(None)

    train(steps=3, out=tmp_path, log_every=2, trackers=[Tracker()])
    assert got == [*lines(tmp_path, speed=True), None]


def test_an_unwritable_folder_fails_before_the_first_step(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(OSError, match="run"):
        train(steps=1, out=tmp_path / "run")
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("name", ["steps", "save_every", "log_every"])
def test_numbers_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        train(**({"steps": 1} | {name: 0}))
