"""The comparison of strategies that `elastictok eval` makes, on a model of 16 tokens."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from elastictok.cli import _strategies
from elastictok.cli._commands import Eval
from elastictok.data import write_clip, write_picture
from elastictok.eval import Item, evaluate, share_settings
from elastictok.inference import FixedLength, Tokenizer
from elastictok.models import CellRotary, CoarseToFine, Patching, load, presets, save
from elastictok.quantizers import FSQ


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    made = presets.build(
        size=(16, 16),
        context=2,
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
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save(made, folder)
    return folder


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Five pictures and two clips of 16x16 pixels."""
    folder = tmp_path_factory.mktemp("material")
    y, x = np.mgrid[:16, :16] / 3.0
    frames = [
        (127.5 + 120 * np.stack([np.sin(x + t), np.cos(y - t), np.sin(x + y)], -1)).astype(np.uint8)
        for t in range(8)
    ]
    for n in range(5):
        write_picture(folder / f"{n}.png", frames[n])
    for n in range(2):
        write_clip(folder / f"{n}.mp4", np.stack(frames[n : n + 6]), 8.0)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model):
    return Tokenizer(load(model), FixedLength(length=16))


def pictures(count):
    rng = np.random.default_rng(0)
    return [Item(str(n), rng.integers(0, 256, (1, 16, 16, 3), np.uint8)) for n in range(count)]


def command(**options):
    return Eval(model=Path(), data=(), out=Path(), **({"threshold": (0.5,)} | options))


def test_strategies_are_compared_on_a_few_files_and_shown(model, material, tmp_path, capsys):
    out = tmp_path / "out"
    options = {"threshold": (0.5,), "max_items": 3, "strategy_items": 2, "strategy_frames": 4}
    Eval(model=model, data=(material,), out=out, **options).run()
    facts = json.loads((out / "evaluation.json").read_text("utf-8"))
    found = {each["name"]: each for each in facts["comparisons"]}
    assert set(found) == {"pictures", "clips"}
    names = ["exhaustive optimum", "binary", "4-ary", "4 bins", "warm start", "encode once"]
    for name, blocks in (("pictures", 1), ("clips", 2)):
        results = found[name]["results"]
        asked = list(dict.fromkeys(result["requirement"] for result in results))
        assert "MSE ≤ 0.5" in asked
        assert len(results) == 7 * len(asked)
        assert [each["strategy"] for each in results[:7]] == [*names, "equal lengths"]
        thresholds = [result["threshold"] for result in results]
        assert thresholds == sorted(thresholds, reverse=True)
        for result in results:
            lengths = [m["spent"]["lengths"] for m in result["measurements"]]
            assert [len(each) for each in lengths] == [blocks] * 2
        best = [each for each in results if each["strategy"] == "exhaustive optimum"]
        # 4 to 16 tokens, each once.
        assert {each["summary"]["encoder_evaluations"] for each in best} == {13}
    # Evenly chosen, the first and the last among them.
    items = [m["item"] for m in found["pictures"]["results"][0]["measurements"]]
    assert [Path(item).name for item in items] == ["0.png", "4.png"]
    printed = capsys.readouterr().out
    assert re.search(r"^pictures: strategies, 2 items, 16x16, on ", printed, flags=re.MULTILINE)
    report = (out / "report.html").read_text("utf-8")
    assert "clips: what strategies reach" in report
    assert "--condition-dropout" in report


def test_strategies_can_be_chosen_or_left_out(tokenizer):
    asked = command(strategies=("binned", "binary", "binned"), threshold=(0.9,))
    found = _strategies.comparison(asked, tokenizer, "pictures", pictures(5))
    assert found is not None
    assert found.strategies == ("exhaustive optimum", "4 bins", "binary")
    assert [len(row.measurements) for row in found.fixed] == [4] * 9
    asked = command(strategy_items=0)
    assert _strategies.comparison(asked, tokenizer, "pictures", pictures(5)) is None
    with pytest.raises(ValueError, match="--strategy-items is -1; 0 leaves the comparison out"):
        _strategies.comparison(command(strategy_items=-1), tokenizer, "pictures", pictures(1))
    with pytest.raises(ValueError, match="--strategy-frames is 0"):
        _strategies.comparison(command(strategy_frames=0), tokenizer, "pictures", pictures(1))


def test_thresholds_that_were_asked_for_stand_apart_from_those_between():
    asked = command(threshold=(0.1, 0.0))
    # 0.105 and 0.095 are as good as 0.1.
    between = (0.2, 0.105, 0.095, 0.085, 0.01)
    assert _strategies._thresholds(asked, between) == [0.2, 0.1, 0.085, 0.01, 0.0]


def test_what_the_optimum_takes_is_foreseen(tokenizer):
    seconds = _strategies._optimum_seconds(tokenizer, pictures(2))
    (row,) = evaluate(tokenizer, pictures(2), settings=share_settings([1])).rows
    # 13 lengths for each of two pictures. Machines are not that even: the order is what counts.
    assert 0.05 < seconds / (13 * 2 * row.encode_seconds) < 20


@pytest.mark.parametrize(
    ("asked", "hours", "count", "said"),
    [
        # Ten minutes, of an hour for four items, are not enough for one; of 20 minutes, for two.
        (None, 1.0, 0, "not at all: the exhaustive optimum of 4 would take about 60 minutes"),
        (None, 1 / 3, 2, "on 2 only: the exhaustive optimum of 4 would take about 20 minutes"),
        (4, 3.0, 4, "the exhaustive optimum takes about 3 hours; --strategy-items 0 leaves it out"),
        (None, 0.001, 4, ""),
    ],
)
def test_what_takes_long_is_announced_or_cut_short(
    tokenizer, monkeypatch, capsys, asked, hours, count, said
):
    compared = []
    # For each of two thresholds: the one asked for, and one between.
    monkeypatch.setattr(_strategies, "_optimum_seconds", lambda tokenizer, items: 1800 * hours)
    monkeypatch.setattr(_strategies, "spread_thresholds", lambda tokenizer, items: (0.1,))
    monkeypatch.setattr(
        _strategies, "compare_strategies", lambda _, items, *__, **___: compared.append(items)
    )
    _strategies.comparison(command(strategy_items=asked), tokenizer, "clips", pictures(9))
    assert [len(each) for each in compared] == ([count] if count else [])
    err = capsys.readouterr().err
    assert said in err
    assert ("optimum" in err) == bool(said)
