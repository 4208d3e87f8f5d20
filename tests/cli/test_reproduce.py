"""`elastictok reproduce zoo-small`: what it says, what it leaves, and that it goes on."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest
from PIL import Image

from elastictok.cli import _zoo_small
from elastictok.cli._gallery import Exhibit, draw_sheet, gallery_page, write_sheet
from elastictok.cli._zoo_small import (
    THRESHOLDS,
    Entry,
    Figures,
    settings_for,
    small_tokenizers,
    steps_of,
    tables,
)
from elastictok.eval import format_markdown
from elastictok.inference import EncodeOnce
from elastictok.models import (
    ConditionDropout,
    FixedDrop,
    InformationDrop,
    Patching,
    RankRotary,
    Raster,
    UniformDrop,
    count_parameters,
    fingerprint,
    load,
    presets,
)
from elastictok.models.presets import PRESETS
from elastictok.quantizers import FSQ


def test_the_zoo_is_every_small_tokenizer_and_nothing_else():
    sizes = {
        name: eqx.filter_eval_shape(lambda make=preset.make: make(key=jax.random.key(0))).size
        for name, preset in PRESETS.items()
    }
    assert {sizes[name] for name in small_tokenizers()} == {_zoo_small.SIZE}
    left_out = {name for name, size in sizes.items() if size == _zoo_small.SIZE} - set(
        small_tokenizers()
    )
    assert left_out == {"demo"}
    assert len(small_tokenizers()) >= 10


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["zoo-smal"], "did you mean zoo-small?"),
        (["zoo-small", "--presets", "elastic_imag"], "did you mean elastic_image?"),
        (["zoo-small", "--presets", "demo"], "there is no preset 'demo'"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(words, said, tmp_path, run_program):
    answer = run_program("reproduce", *words, "-o", tmp_path / "out", code=2)
    assert said in answer.err
    assert not (tmp_path / "out").exists()


def test_equal_compute_is_a_number_of_steps():
    assert steps_of(1.5, 5e9) == 300
    assert steps_of(1, 3e9) == 333  # the nearest, which is at most half a step away
    assert steps_of(1, 1e12 / 2.6) == 3
    with pytest.raises(ValueError, match=r"--budget 0.001 .* takes 0.005"):
        steps_of(0.001, 5e9)


@pytest.mark.heavy
def test_the_cost_of_a_step_is_that_of_the_step_that_runs():
    """Against a count by hand: each product once forward and twice backward, and the optimizer."""
    layers, tokens, dim, hidden, patch, code = 2, 64, 64, 128, 192, 6
    model = presets.build(
        size=_zoo_small.SIZE,
        context=1,
        frames_per_block=1,
        min_tokens=4,
        patching=Patching(1, 8, 8),
        order=Raster(),
        quantizer=FSQ(presets.FSQ_64K),
        dim=dim,
        hidden=hidden,
        layers=layers,
        heads=2,
        rotary=RankRotary(100.0),
        key=jax.random.key(0),
    )
    weights = 2 * layers * (4 * dim * dim + 3 * dim * hidden) + 2 * patch * dim + 2 * code * dim
    pairs = 2 * layers * 2 * tokens * tokens * dim
    forward = 2 * _zoo_small.BLOCKS * (tokens * weights + pairs)
    # Muon's five rounds for a matrix of m rows and more columns n: X X', its square, (...) X.
    muon = (
        2 * 5 * sum(2 * m * m * n + m**3 for m, n in muon_shapes(layers, dim, hidden, patch, code))
    )
    counted = _zoo_small.flops_of_step(model, UniformDrop())
    # Without a gradient of the pixels, and with the scores of attention computed again.
    assert 0.97 < counted / (3 * forward + muon) < 1.03
    # One pass more where the tail-drop asks how hard the blocks are; its patches are projected
    # once for both, by the same weights.
    informed = _zoo_small.flops_of_step(model, InformationDrop())
    assert 0.9 < (informed - counted) / forward < 1.01


def muon_shapes(layers: int, dim: int, hidden: int, patch: int, code: int) -> list[tuple[int, int]]:
    """Of all matrices, the shorter side first."""
    layer = [(dim, dim)] * 4 + [(dim, hidden)] * 3
    ends = [tuple(sorted(shape)) for shape in [(patch, dim), (dim, code)] * 2]
    return 2 * layers * layer + ends


def entry(preset="elastic_image", *, clips=False, trained_length=None, **changes) -> Entry:
    figures = Figures("1/2 of the tokens", False, 32.0, 0.5, 0.1262, 20.5, 0.5, None, 0.01)
    searched = Figures("MSE ≤ 0.1", True, 20.25, 0.3, None, 19.0, None, 0.875, 0.02)
    made = Entry(
        preset=preset,
        items="27 items, 64x64",
        clips=clips,
        parameters=725_760,
        steps=300,
        step_flops=5e9,
        seconds=21.4,
        trained_length=trained_length,
        fingerprint="0" * 64,
        figures=(figures, searched),
    )
    return dataclasses.replace(made, **changes)


def test_tables_tell_pictures_from_clips_and_say_what_was_trained():
    found = tables([entry(), entry("elastic_image_fixed", trained_length=32), entry(clips=True)])
    training, pictures, clips = map(format_markdown, found)
    assert "| elastic_image | 725,760 | 300 | 5.00 | 1.500 | 21 |" in training
    assert "| 1/2 of the tokens | 32.0 | 0.1262 | 20.50 | 0.500 | - | 0.010 |" in pictures
    assert "| 1/2 of the tokens (trained) | 32.0 |" in pictures
    assert "| MSE ≤ 0.1 | 20.2 | - | 19.00 | - | 88 % | 0.020 |" in pictures
    assert "(trained)" not in clips
    assert len(tables([entry()])) == 2
    for text in (training, pictures, clips):
        assert_is_table(text)


def assert_is_table(text: str) -> None:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert set(lines[1]) <= set("|-: ")


def test_what_is_searched_follows_from_how_it_was_trained():
    elastic = settings_for(UniformDrop())
    assert [each.searched for each in elastic] == [False] * 3 + [True] * 3
    assert [each.strategy.criterion.threshold for each in elastic[3:]] == list(THRESHOLDS)
    assert not any(isinstance(each.strategy, EncodeOnce) for each in elastic)
    once = settings_for(ConditionDropout(UniformDrop(), 0.5))
    assert [each.name for each in once] == [each.name for each in elastic]
    assert all(isinstance(each.strategy, EncodeOnce) for each in once)
    assert [each.searched for each in settings_for(FixedDrop(32))] == [False] * 3


def test_a_sheet_shows_frames_and_their_psnr(tmp_path):
    rng = np.random.default_rng(0)
    truth, other = (rng.integers(0, 256, (16, 24, 3), dtype=np.uint8) for _ in range(2))
    sheet = draw_sheet(["original", "8 tokens"], [[truth, other], [other, truth]])
    shown = truth.repeat(2, axis=0).repeat(2, axis=1)
    found = [
        (top, left)
        for top, left in np.ndindex(sheet.shape[0] - 31, sheet.shape[1] - 47)
        if (sheet[top : top + 32, left : left + 48] == shown).all()
    ]
    # Enlarged twice, in the first column of the first row and the second one of the second row.
    (first_top, first_left), (second_top, second_left) = found
    assert first_top + 32 < second_top
    assert first_left + 48 < second_left
    blank = np.full_like(truth, 255)
    same = draw_sheet(["", ""], [[blank, blank]])
    assert (same[:20] == 255).all()
    assert (same < 255).any()  # the PSNR, under what is white

    write_sheet(tmp_path / "new" / "sheet.png", sheet)
    with Image.open(tmp_path / "new" / "sheet.png") as picture:
        assert np.abs(np.asarray(picture.convert("RGB"), int) - sheet).mean() < 12
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["sheet.png"]


def test_the_page_shows_every_tokenizer():
    shown = [
        Exhibit("one", "The first.", "a paper", "3 steps.", "gallery/one.png"),
        Exhibit("two", "The second.", "", "4 steps.", "gallery/two.png"),
    ]
    page = gallery_page("Gallery", ["How it was made."], shown)
    assert "The first. (a paper)\n" in page
    assert "The second.\n" in page
    assert re.findall(r"\]\((.*)\)", page) == ["gallery/one.png", "gallery/two.png"]


def rows(out) -> Sequence[dict]:
    return json.loads((out / "zoo-small.json").read_text())["tokenizers"]


@pytest.mark.heavy
def test_the_zoo_is_made_interrupted_and_goes_on(tmp_path, run_program):
    out, names = tmp_path / "out", ("elastic_image_fixed", "elastic_video_once")
    words = ("reproduce", "zoo-small", "-o", out, "--budget", 0.12, "--presets", *names)
    # Stopped in the training of the first: as Ctrl-C would.
    program = Path(sys.executable).parent / "elastictok"
    with subprocess.Popen(
        [program, *map(str, words)], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step 10/"):
                process.send_signal(signal.SIGINT)
                break
        process.stderr.read()
    assert process.returncode == 130
    assert not (out / "zoo-small.json").exists()

    answer = run_program(*words)
    assert "resuming at step" in answer.err
    assert "nothing to resume" in answer.err  # the second one

    first, second = rows(out)
    assert (first["preset"], second["preset"]) == names
    assert first["step_flops"] < second["step_flops"]
    for row in (first, second):
        assert abs(row["flops"] - 0.12e12) <= row["step_flops"] / 2
        model = load(out / "models" / row["preset"])
        assert count_parameters(model) == row["parameters"]
        assert fingerprint(model) == row["fingerprint"]
        start = PRESETS[row["preset"]].make(key=jax.random.key(0))
        assert fingerprint(start) != row["fingerprint"]
        assert (
            PRESETS[row["preset"]].about
            in (out / "models" / row["preset"] / "README.md").read_text()
        )
        lines = (out / "models" / row["preset"] / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["step"] == row["steps"]
        sheet = out / "gallery" / f"{row['preset']}.png"
        assert 1_000 < sheet.stat().st_size < 100_000
        assert f"(gallery/{row['preset']}.png)" in (out / "gallery.md").read_text()
    assert [each["searched"] for each in first["figures"]] == [False] * 3
    assert [each["searched"] for each in second["figures"]] == [False] * 3 + [True] * 3
    assert (first["trained_length"], second["trained_length"]) == (32, None)
    assert first["figures"][1]["bits_per_pixel"] > 32 * np.log2(64_000) / 64**2  # lengths included
    assert (out / "zoo-small.md").read_text().count("elastic_image_fixed") == 2
    # Training and test material are different photographs.
    trained_on = {path.stem for path in (out / "data" / "train").glob("*.png")}
    assert not trained_on & {"camera", "chelsea", "rocket"}

    # Again: nothing is trained or measured, and nothing changes.
    before = (out / "zoo-small.json").read_bytes()
    again = run_program(*words)
    assert again.err.count("is trained and measured") == 2
    assert "step " not in again.err
    assert (out / "zoo-small.json").read_bytes() == before

    refused = run_program(*words[:5], 0.2, *words[6:], code=2)
    assert "was made with another budget (0.12, now 0.2)" in refused.err
