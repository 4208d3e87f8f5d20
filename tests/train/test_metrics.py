import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictok.train import NonFiniteError
from elastictok.train._metrics import Meter, MetricsFile, psnr

LOSSES = st.lists(st.floats(0, 8, width=32), min_size=1, max_size=12)


def metrics(loss):
    return {"mse": jnp.float32(loss), "loss": jnp.float32(loss), "kept": jnp.float32(0.5)}


@given(LOSSES)
def test_means_are_over_the_steps_since_the_last_line(losses):
    meter = Meter()
    meter.add(1, metrics(7.0))
    meter.fetch()
    meter.clear()
    for step, loss in enumerate(losses, start=2):
        meter.add(step, metrics(loss))
    meter.fetch()
    means = meter.means()
    mean = float(np.mean(np.asarray(losses, np.float64)))
    assert means["loss"] == pytest.approx(mean, rel=1e-6)
    assert means["kept"] == 0.5
    assert means["psnr"] == pytest.approx(10 * math.log10(4 / max(mean, 1e-12)), abs=1e-6)
    assert list(means)[:2] == ["loss", "psnr"]


@given(LOSSES, st.data())
def test_a_restored_meter_goes_on_exactly(losses, data):
    cut = data.draw(st.integers(0, len(losses)))
    whole, first = Meter(), Meter()
    for step, loss in enumerate(losses):
        whole.add(step, metrics(loss))
        if step < cut:
            first.add(step, metrics(loss))
    whole.fetch()
    first.fetch()
    second = Meter(json.loads(json.dumps(first.state())))
    for step, loss in enumerate(losses[cut:], start=cut):
        second.add(step, metrics(loss))
    second.fetch()
    assert second.means() == whole.means()
    assert second.running_loss == whole.running_loss


def test_the_running_loss_forgets():
    meter = Meter()
    meter.add(0, metrics(8.0))
    for step in range(1, 200):
        meter.add(step, metrics(1.0))
    meter.fetch()
    assert meter.running_loss == pytest.approx(1 + 7 * 0.98**199, rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_number_that_is_not_finite_is_named(value):
    meter = Meter()
    for step in range(5, 9):
        bad = {"kept": jnp.float32(value)} if step >= 7 else {}
        meter.add(step, metrics(1.0) | bad)
    with pytest.raises(NonFiniteError, match=f"kept is {value} at step 7"):
        meter.fetch()


def test_bad_numbers_are_found_in_time_when_nobody_asks():
    meter = Meter()
    for step in range(1, 256):
        meter.add(step, metrics(math.nan if step == 3 else 1.0))
    with pytest.raises(NonFiniteError, match="at step 3"):
        meter.add(256, metrics(1.0))


def test_psnr_of_known_errors():
    assert psnr(4.0) == 0
    assert psnr(0.04) == pytest.approx(20)
    assert psnr(0.0) == pytest.approx(10 * math.log10(4e12))


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@given(
    written=st.lists(st.integers(1, 50), unique=True, max_size=8).map(sorted),
    after=st.integers(0, 50),
    torn=st.sampled_from(["", '{"st', '{"step": 3, "loss": 1.', '{"step": 3}']),
)
def test_lines_after_the_restored_step_are_dropped(tmp_path_factory, written, after, torn):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    first = MetricsFile(path, after=0)
    for step in written:
        first.write(step, {"loss": step / 3})
    with open(path, "a") as file:
        file.write(torn)
    second = MetricsFile(path, after=after)
    second.write(after + 1, {"loss": 0.5})
    assert steps_in(path) == [step for step in written if step <= after] + [after + 1]
    losses = [json.loads(line)["loss"] for line in path.read_text().splitlines()]
    assert losses[:-1] == [step / 3 for step in written if step <= after]


def test_lines_are_strict_json(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", after=0)
    with pytest.raises(ValueError, match="JSON"):
        file.write(1, {"loss": math.nan})
