"""Pictures and measurements during training."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny_training import OPTIMIZER, Counted, make_batch, quantizers, tiny_model

from elastictok.eval import Item
from elastictok.inference import FixedLength, Tokenizer
from elastictok.models import Local, load
from elastictok.train import Pictures, Validation, data_mesh, fit
from elastictok.train._pictures import _BAR, _GAP, _MISSED, _NEEDED

ONE_DEVICE = data_mesh(jax.local_devices()[:1])
FIXED = {
    "optimizer": OPTIMIZER,
    "quantizer_weight": 0.5,
    "mesh": ONE_DEVICE,
    "progress": False,
    "log_every": 2,
}
SIZE = 16


def error_of(model, batch, length):
    """One block after the other, outside of everything under test but the model."""
    one = jax.jit(lambda x, segments, valid: model(x, jnp.full(2, length), segments, valid).pixels)
    errors = []
    for pixels, segments, valid in zip(batch.pixels, batch.segments, batch.valid, strict=True):
        frames = pixels.reshape(-1, SIZE, SIZE, 3) / 127.5 - 1
        out = one(frames.astype(np.float32), segments, valid)
        each = np.square(np.asarray(out) - frames).mean(axis=(1, 2, 3))
        errors += list(each[valid])
    return errors


@pytest.mark.parametrize("name", ["FSQ", "GaussianVAE"])
def test_what_is_measured_and_drawn(name):
    model, batch = tiny_model(quantizers()[name]), make_batch(0)
    errors = {length: error_of(model, batch, length) for length in (1, 2, 4)}
    # Met by some blocks with all tokens and missed by others.
    threshold = float(np.median(errors[4]))
    pictures = Pictures(batch, threshold=threshold)
    metrics, sheet = pictures.measure(model, ONE_DEVICE, Local())
    assert metrics["mse_full"] == pytest.approx(np.mean(errors[4]), rel=1e-4)
    assert metrics["mse_quarter"] == pytest.approx(np.mean(errors[1]), rel=1e-4)

    # The originals, at their places; what is not valid stays white.
    cell = 3 * (SIZE + _GAP) + _BAR + 2 * _GAP
    assert sheet.shape == (4 * cell, 2 * (SIZE + _GAP), 3)
    for i in range(4):
        for b in range(2):
            top, left = i * cell, b * (SIZE + _GAP)
            drawn = sheet[top : top + SIZE, left : left + SIZE]
            valid = batch.valid[i, b]
            np.testing.assert_array_equal(drawn, batch.pixels[i, b, 0] if valid else 255)
            if not valid:
                continue
            block = np.flatnonzero(batch.valid.ravel()).tolist().index(2 * i + b)
            bar = sheet[top + 3 * (SIZE + _GAP) :][:_BAR, left]
            enough = [n for n in (1, 2, 4) if errors[n][block] <= threshold]
            colour = _NEEDED if enough else _MISSED
            filled = (bar == colour).all(axis=-1)
            assert filled.sum() == round(_BAR * min(enough, default=4) / 4)
            assert filled[-1]


def test_a_run_draws_them_when_they_are_due_and_at_the_end(tmp_path):
    pictures = Pictures(make_batch(0), every=4)
    out = tmp_path / "run"
    model = fit(tiny_model(), Counted(), steps=7, out=out, pictures=pictures, **FIXED)
    names = sorted(path.name for path in (out / "pictures").iterdir())
    assert names == ["step-00000004.png", "step-00000007.png"]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "mse_full" in row] == [4, 7]
    metrics, sheet = pictures.measure(model, ONE_DEVICE, Local())
    assert rows[-1]["mse_quarter"] == pytest.approx(metrics["mse_quarter"], rel=1e-5)
    with Image.open(out / "pictures" / names[-1]) as drawn:
        np.testing.assert_array_equal(np.asarray(drawn), sheet)


def test_pictures_that_are_none():
    with pytest.raises(ValueError, match="every 0 steps"):
        Pictures(make_batch(0), every=0)
    with pytest.raises(ValueError, match="threshold is 0"):
        Pictures(make_batch(0), threshold=0)


def test_validation_is_what_a_user_gets(tmp_path):
    rng = np.random.default_rng(0)
    items = [
        Item(f"picture {i}", rng.integers(0, 256, (1, SIZE, SIZE, 3), dtype=np.uint8))
        for i in range(2)
    ] + [Item("clip", rng.integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8), 8.0)]
    out = tmp_path / "run"
    fit(
        tiny_model(),
        Counted(),
        steps=2,
        out=out,
        validate=Validation(items, threshold=0.5),
        **FIXED,
    )
    (row,) = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    model = load(out)
    tokenizer = Tokenizer(model, FixedLength(length=4))
    squares = [
        np.square(tokenizer.decode(tokenizer.encode(item.frames)) - item.frames.astype(float))
        for item in items
    ]
    expected = np.concatenate([square.ravel() for square in squares]).mean() / 127.5**2
    assert row["validation_loss"] == pytest.approx(expected, rel=1e-5)
    assert row["validation_psnr"] == pytest.approx(10 * np.log10(4 / expected), rel=1e-5)
    assert {"validation_mse_quarter", "validation_ssim"} <= row.keys()
    assert 1 <= row["validation_tokens"] <= 4
    assert 0 <= row["validation_met"] <= 1
    with pytest.raises(ValueError, match="nothing to validate on"):
        Validation([])
