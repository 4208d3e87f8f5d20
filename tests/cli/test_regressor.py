"""`elastictok train-regressor`."""

import json
import re

import numpy as np
import pytest

from elastictok.cli import main
from elastictok.data import read_media, write_clip, write_picture
from elastictok.inference import (
    MSE,
    Binary,
    Calibration,
    EncodeOnce,
    Full,
    Regressor,
    Scorer,
    Secant,
    Tokenizer,
    Tokens,
    WarmStart,
    least_clips,
)
from elastictok.models import CellRotary, CoarseToFine, Patching, load, presets, save
from elastictok.quantizers import FSQ

THRESHOLD = 1.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that was not trained, pictures and a clip of unequal sizes."""
    import jax

    folder = tmp_path_factory.mktemp("regressor")
    model = presets.build(
        size=(16, 16),
        context=1,  # one window to compile for
        frames_per_block=2,
        min_tokens=4,
        patching=Patching(2, 4, 4),
        order=CoarseToFine(),
        quantizer=FSQ((5, 5, 5)),
        dim=16,
        hidden=32,
        layers=1,
        heads=2,
        rotary=CellRotary(30.0, 100.0),
        place_frequencies=4,
        std=0.4,
        key=jax.random.key(0),
    )
    save(model, folder / "model")
    (folder / "data").mkdir()
    (folder / "other").mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        picture = rng.integers(0, 256, (16, 16, 3)) * rng.uniform(0.2, 1)
        write_picture(folder / "data" / f"{i}.png", picture.astype(np.uint8))
    write_clip(folder / "data" / "clip.mp4", rng.integers(0, 256, (6, 16, 16, 3), np.uint8), 8.0)
    for i in range(10):
        picture = rng.integers(0, 256, (16, 16, 3)) * rng.uniform(0.2, 1)
        write_picture(folder / "other" / f"{i}.png", picture.astype(np.uint8))
    return folder


def answer(capsys, folder, *more, out="out"):
    options = ("--threshold", THRESHOLD, "--steps", 3, "--out", folder / out)
    arguments = ("--model", folder / "model", "--data", folder / "data", *options, *more)
    main(["train-regressor", *map(str, arguments)])
    return capsys.readouterr().out


@pytest.mark.heavy
def test_a_folder_that_encodes(folder, capsys):
    out = answer(capsys, folder, "--calibration-data", folder / "other", "--alpha", 0.1)
    assert "measured 11 blocks of 9 pictures and clips" in out
    assert "held out: 10 pictures and clips of 10 blocks" in out
    # What it says is so.
    model = load(folder / "model")
    pictures = [read_media(folder / "other" / f"{i}.png").frames for i in range(10)]
    regressor = Regressor.load(folder / "out", model, MSE(THRESHOLD), alpha=0.1)
    calibration = regressor.calibration
    assert calibration.clips == 10
    assert calibration.enough(0.1)
    for row, strategy in (
        ("binary search", Binary(MSE(THRESHOLD))),
        ("predicted", Regressor.load(folder / "out", model, MSE(THRESHOLD))),
        ("predicted, alpha 0.1", regressor),
    ):
        tokens = Tokenizer(model, strategy).encode_batch(pictures)
        lengths = np.concatenate([each.lengths for each in tokens])
        met = np.concatenate([each.met for each in tokens])
        (line,) = re.findall(rf"^{row}  +([\d.].*)$", out, re.MULTILINE)
        mean, _, share, *_ = line.split()
        assert mean == f"{lengths.mean():.1f}"
        assert share == f"{met.mean():.1%}"
    # Of the very clips of the calibration, at most alpha miss.
    (missing, able) = re.findall(r"(\d+) of (\d+)$", out, re.MULTILINE)[-1]
    assert int(missing) <= 0.1 * 11
    assert 0 < int(able) <= 10


def test_a_share_is_held_out(folder, capsys):
    out = answer(capsys, folder, "--held-out", 0.34, "--alpha", 0.2, out="held")
    assert "held out: 3 pictures and clips" in out
    assert "--alpha 0.2 takes at least 4 held-out pictures and clips, and there are 3" in out
    assert "all tokens are kept, because 3 held-out clips are too few; give at least 4" in out
    assert Calibration.load(folder / "held" / "calibration.json").margin(0.2) == np.inf
    assert Scorer.load(folder / "held" / "scorer.safetensors").context == 2


def test_least_clips():
    assert [least_clips(x) for x in (0.5, 0.2, 0.1, 0.05, 0.3)] == [1, 4, 9, 19, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--alpha", 1.5), "alpha is 1.5"),
        (("--threshold", -1), "MSE threshold is -1"),
        (("--steps", 0), "--steps is 0"),
        (("--context", 0), "--context 0"),
        (("--held-out", 1.5), "--held-out is 1.5"),
        (("--max-items", 0), "--max-items is 0"),
        (("--calibration-data", "absent"), "absent"),
    ],
)
def test_what_a_user_gets_wrong(folder, capsys, options, message):
    with pytest.raises(SystemExit) as end:
        answer(capsys, folder, *options, out="wrong")
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (folder / "wrong").exists()


@pytest.fixture(scope="module")
def regressor(folder):
    """A calibrated one."""
    data, other = folder / "data", folder / "other"
    options = ("--threshold", THRESHOLD, "--steps", 2, "--calibration-data", other, "--out")
    arguments = ("--model", folder / "model", "--data", data, *options, folder / "calibrated")
    main(["train-regressor", *map(str, arguments)])
    return folder / "calibrated"


def run(*arguments):
    main(list(map(str, arguments)))


def encoded(folder, *options):
    out = folder / "x.safetensors"
    run("encode", folder / "data" / "clip.mp4", "--model", folder / "model", *options, "-o", out)
    return Tokens.load(out)


def test_encode_by_every_search(folder, regressor, capsys):
    model = load(folder / "model")
    clip = read_media(folder / "data" / "clip.mp4")
    criterion, goal = MSE(THRESHOLD), ("--threshold", THRESHOLD)
    predicted = Regressor.load(regressor, model, criterion, alpha=0.1)
    for options, strategy in (
        ((), WarmStart(Secant(criterion))),
        (("--search", "binary"), Binary(criterion)),
        (("--search", "exhaustive"), Full(criterion)),
        (("--search", "binary", "--encode-once"), EncodeOnce(Binary(criterion))),
        (("--regressor", regressor), Regressor.load(regressor, model, criterion)),
        (("--regressor", regressor, "--alpha", 0.1), predicted),
    ):
        tokens = encoded(folder, *goal, *options)
        assert tokens == Tokenizer(model, strategy).encode(clip.frames, clip.fps)
        assert tokens.measured.all()
    told = encoded(folder, *goal, "--regressor", regressor, "--alpha", 0.1, "--unverified")
    assert told.lengths.tolist() == tokens.lengths.tolist()
    assert not told.measured.any()
    assert told.decoder_evaluations.sum() == 0
    capsys.readouterr()
    run("inspect", folder / "x.safetensors")
    assert "not measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--length", 4, "--regressor", "R"), "predicts lengths for a --threshold"),
        (("--threshold", 1, "--alpha", 0.1), "--alpha and --unverified are for a --regressor"),
        (("--threshold", 1, "--unverified"), "--alpha and --unverified are for a --regressor"),
        (("--threshold", 1, "--length", 4), "either --threshold"),
        (("--threshold", 0.5, "--regressor", "R", "--alpha", 0.1), "of the threshold 1.0"),
        (
            ("--threshold", 1, "--regressor", "R", "--alpha", 0.1, "--window", 3),
            "calibrated with a window of 1 blocks, and the window is 3",
        ),
    ],
)
def test_options_that_do_not_go_together(folder, regressor, capsys, options, message):
    options = [regressor if option == "R" else option for option in options]
    with pytest.raises(SystemExit):
        encoded(folder, *options)
    assert message in capsys.readouterr().err


def test_eval_compares_it(folder, regressor, tmp_path, capsys):
    options = ("--strategies", "binary", "--strategy-items", 2, "--max-items", 2)
    options += ("--regressor", regressor, "--alpha", 0.1, "--threshold", THRESHOLD)
    run("eval", "--model", folder / "model", "--data", folder / "other", "-o", tmp_path, *options)
    results = json.loads((tmp_path / "evaluation.json").read_text())["comparisons"][0]["results"]
    names = ["exhaustive optimum", "binary", "regressor", "regressor, alpha 0.1", "equal lengths"]
    assert [each["strategy"] for each in results[:5]] == names
