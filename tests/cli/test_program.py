"""The commands of the README, on the user's own files."""

import dataclasses
import hashlib
import json
import lzma
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from elastictok.cli import main
from elastictok.cli._commands import QuantizerName
from elastictok.data import read_media, write_picture
from elastictok.inference import Tokens
from elastictok.models import load


@pytest.mark.parametrize(
    "command",
    [
        (),
        ("data",),
        ("data", "build"),
        ("data", "show"),
        ("data", "tokenize"),
        ("train",),
        ("plan",),
        ("zoo",),
        ("import-official",),
        ("encode",),
        ("decode",),
        ("inspect",),
        ("eval",),
        ("train-regressor",),
        ("demo",),
    ],
)
def test_help_imports_nothing_that_takes_long(command):
    """Importing jax alone takes over a second."""
    program = f"""
import sys
from elastictok.cli import main
try:
    main([*{command!r}, "--help"])
except SystemExit as end:
    assert end.code == 0
slow = {{"jax", "equinox", "optax", "orbax", "grain", "av", "matplotlib", "numpy"}}
assert not slow & set(sys.modules), slow & set(sys.modules)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "usage: elastictok" in result.stdout


def test_training_leaves_a_run_folder_that_is_a_model_folder(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert load(run).max_tokens == 64
    assert json.loads((run / "train.json").read_text())["batch_size"] == 2


@pytest.mark.heavy
def test_a_run_is_resumed_only_when_asked_and_with_the_same_settings(
    run, media, tmp_path, run_program
):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    base = ("train", "demo", "--data", media, "--out", copy, "--batch-size", 2, "--log-every", 1)
    answer = run_program(*base, "--steps", 6, code=2)
    assert "already holds a run" in answer.err
    assert "--resume" in answer.err
    answer = run_program(*base[:-1], 1, "--batch-size", 3, "--steps", 6, "--resume", code=2)
    assert "was trained with --batch-size 2, now it is 3" in answer.err
    run_program(*base, "--steps", 6, "--resume")
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_a_picture_goes_through_a_token_file_and_back(run, media, tmp_path, run_program):
    tokens, picture = tmp_path / "x.safetensors", tmp_path / "y.png"
    answer = run_program("encode", media / "a.png", "--model", run, "--length", 40, "-o", tokens)
    assert re.search(r"40 tokens in 1 block", answer.out)
    run_program("decode", tokens, "--model", run, "-o", picture)
    # The short side is the model's.
    assert read_media(picture).frames.shape == (1, 64, 80, 3)
    answer = run_program("inspect", tokens)
    assert "picture, 80x64" in answer.out
    assert "original size   100x80" in answer.out
    assert "40 of 80" in answer.out
    few = tmp_path / "few.png"
    run_program("decode", tokens, "--model", run, "-o", few, "--length", 4)
    assert few.read_bytes() != picture.read_bytes()


def test_a_clip_longer_than_the_context_goes_through_and_back(run, media, tmp_path, run_program):
    tokens, clip = tmp_path / "x.safetensors", tmp_path / "y.mp4"
    source = media / "deep" / "clip.mp4"
    answer = run_program("encode", source, "--model", run, "--threshold", 0.2, "-o", tokens)
    read = Tokens.load(tokens)
    assert read.blocks == 6 > load(run).context
    assert f"{int(read.lengths.sum())} tokens in 6 blocks" in answer.out
    run_program("decode", tokens, "--model", run, "-o", clip)
    decoded = read_media(clip)
    assert decoded.frames.shape[0] == 12
    assert decoded.fps == pytest.approx(8.0, rel=0.01)
    assert "tokens per block |" in run_program("inspect", tokens).out
    answer = run_program("decode", tokens, "--model", run, "-o", tmp_path / "y.png", code=2)
    assert "holds a clip of 12 frames" in answer.err


def test_an_impossible_threshold_is_said_to_be_missed(run, media, tmp_path, run_program):
    out = tmp_path / "x.safetensors"
    answer = run_program("encode", media / "a.png", "--model", run, "--threshold", 1e-9, "-o", out)
    assert "1 of 1 blocks miss the threshold of 1e-09" in answer.out
    assert Tokens.load(out).lengths[0] == Tokens.load(out).tokens_per_block


def test_eval_writes_a_report_and_prints_its_table(run, media, tmp_path, run_program):
    # Strategies are compared in test_strategies.py, on a smaller model.
    options = ("--strategy-items", 0, "--out", tmp_path / "eval")
    answer = run_program("eval", "--model", run, "--data", media, *options)
    assert "pictures" in answer.out
    assert "8x8 block mean" in answer.out
    report = (tmp_path / "eval" / "report.html").read_text()
    assert "PCA" in report
    assert "flatters" in report
    numbers = json.loads((tmp_path / "eval" / "evaluation.json").read_text())
    assert numbers


def test_starting_from_a_run_takes_its_weights(run, media, tmp_path, run_program):
    out = tmp_path / "next"
    options = ("--steps", 1, "--batch-size", 2, "--learning-rate", 1e-12, "--init-from", run)
    run_program("train", "demo", "--data", media, "--out", out, *options)
    old, new = load(run), load(out)
    np.testing.assert_allclose(
        old.encoder.in_proj.weight, new.encoder.in_proj.weight, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    "quantizer",
    [pytest.param(n, marks=pytest.mark.heavy) for n in get_args(QuantizerName) if n != "fsq"],
)
def test_another_quantizer_trains_saves_searches_and_decodes(
    media, tmp_path, run_program, quantizer
):
    out, tokens = tmp_path / "run", tmp_path / "x.safetensors"
    options = ("--steps", 2, "--batch-size", 2, "--quantizer", quantizer)
    run_program("train", "demo", "--data", media, "--out", out, *options)
    picture = media / "deep" / "b.jpg"
    run_program("encode", picture, "--model", out, "--threshold", 0.05, "-o", tokens)
    run_program("decode", tokens, "--model", out, "-o", tmp_path / "y.png")
    inspected = run_program("inspect", tokens).out
    assert ("n/a (not quantized)" in inspected) == (quantizer in {"vae", "identity"})


def test_what_a_user_gets_wrong_is_named(run, media, tmp_path, run_program, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "x.safetensors"
    picture = media / "a.png"
    tokens = tmp_path / "ok.safetensors"
    run_program("encode", picture, "--model", run, "--length", 8, "-o", tokens)
    damaged = tmp_path / "damaged.safetensors"
    content = bytearray(tokens.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    train = ("train", "demo", "--out", tmp_path / "r", "--data")
    for arguments, message in (
        ((*train, empty), str(empty)),
        ((*train, tmp_path / "absent"), "absent"),
        (("train", "dmeo", "--data", media, "--out", tmp_path / "r"), "did you mean demo?"),
        (("encode", picture, "--model", run, "-o", out), "give either --threshold"),
        (("encode", picture, "--model", empty, "--length", 8, "-o", out), "no config.json"),
        (
            ("encode", media / "notes.txt", "--model", run, "--length", 8, "-o", out),
            "suffix",
        ),
        (("encode", media / "broken.mp4", "--model", run, "--length", 8, "-o", out), "broken.mp4"),
        (
            ("encode", picture, "--model", run, "--length", 8, "-o", tmp_path / "x.png"),
            "does not end in .safetensors",
        ),
        (("inspect", picture), "a.png"),
        (("inspect", damaged), "damaged"),
        (("decode", tokens, "--model", run, "-o", tmp_path / "y.xyz"), ".xyz"),
        (("demo", "--out", media), "is not empty"),
    ):
        with pytest.raises(SystemExit) as end:  # in this process: starting one takes seconds
            main([str(part) for part in arguments])
        said = capsys.readouterr().err
        assert end.value.code == 2
        assert message in said
        assert len(said.splitlines()) <= 12, said
    assert not out.exists()


@pytest.mark.heavy
def test_tokens_of_another_model_are_refused(run, media, tmp_path, run_program):
    other, tokens = tmp_path / "other", tmp_path / "x.safetensors"
    options = ("--steps", 1, "--batch-size", 2, "--seed", 1)
    run_program("train", "demo", "--data", media, "--out", other, *options)
    run_program("encode", media / "a.png", "--model", run, "--length", 8, "-o", tokens)
    answer = run_program("decode", tokens, "--model", other, "-o", tmp_path / "y.png", code=2)
    assert "the model that made them" in answer.err


def test_a_traceback_is_there_for_those_who_ask(tmp_path):
    result = subprocess.run(
        [Path(sys.executable).parent / "elastictok", "inspect", tmp_path / "absent"],
        env=os.environ | {"ELASTICTOK_TRACEBACK": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" in result.stderr


def test_a_resized_non_square_picture_keeps_its_aspect(run, tmp_path, run_program):
    tall = np.zeros((300, 100, 3), np.uint8)
    write_picture(tmp_path / "tall.png", tall)
    out = tmp_path / "x.safetensors"
    run_program("encode", tmp_path / "tall.png", "--model", run, "--length", 8, "-o", out)
    tokens = Tokens.load(out)
    assert (tokens.height, tokens.width) == (192, 64)


@pytest.fixture(scope="session")
def official(tmp_path_factory):
    """A checkpoint of the official implementation, and its options."""
    data = Path(__file__).parents[1] / "parity" / "data"
    params = tmp_path_factory.mktemp("official") / "params"
    params.write_bytes(lzma.decompress((data / "fsq_params_fp32.xz").read_bytes()))
    return params, data / "fsq_config.json"


def test_an_official_checkpoint_becomes_a_model_folder(official, media, tmp_path, run_program):
    params, config = official
    out, tokens = tmp_path / "model", tmp_path / "x.safetensors"
    sha = hashlib.sha256(params.read_bytes()).hexdigest()
    base = ("import-official", params, "--variant", "fsq", "-o", out)
    # Without its options the released size is meant, and every misfit listed.
    answer = run_program(*base, code=2)
    assert "encoder/in_proj/kernel is [192, 64], where the model has [192, 1024]" in answer.err
    answer = run_program(*base, "--config", config, "--sha256", sha)
    assert "165,376 parameters" in answer.out
    assert sha in (out / "README.md").read_text()
    run_program("encode", media / "a.png", "--model", out, "--threshold", 0.5, "-o", tokens)
    run_program("decode", tokens, "--model", out, "-o", tmp_path / "y.png")
    assert read_media(tmp_path / "y.png").frames.shape == (1, 32, 40, 3)


def test_what_is_wrong_with_an_import_is_named_and_leaves_nothing(official, tmp_path):
    from elastictok.cli._commands import ImportOfficial

    params, config = official
    good = ImportOfficial(params, "fsq", tmp_path / "model", config)
    for change, message in (
        ({"sha256": "0" * 64}, "has the sha256"),
        ({"variant": "vae"}, "is of the variant fsq, and --variant says vae"),
        ({"input": tmp_path / "absent"}, "absent is missing"),
        ({"input": config}, "no checkpoint of this model"),
        ({"config": params}, "is not JSON"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(good, **change).run()
        assert not good.out.exists()
    good.run()
    with pytest.raises(ValueError, match="already holds a model"):
        good.run()
    half = dataclasses.replace(good, out=tmp_path / "half", dtype="bfloat16")
    half.run()
    sizes = [(command.out / "model.safetensors").stat().st_size for command in (good, half)]
    assert sizes[1] < 0.55 * sizes[0]


def test_a_preset_is_made_for_another_context():
    from elastictok.cli._models import make_model

    model = make_model("demo", quantizer=None, context=7, seed=0)
    assert model.context == 7
    with pytest.raises(ValueError, match="context is 0"):
        make_model("demo", quantizer=None, context=0, seed=0)
