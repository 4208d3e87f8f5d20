"""`elastictok data build` and `data show`, and training on what they make."""

import json

import pytest
from PIL import Image

from elastictok.cli import main
from elastictok.cli._data import weighted


def answer(capsys, *arguments):
    """What the program prints when it runs in this process."""
    main([str(argument) for argument in arguments])
    return capsys.readouterr()


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_a_data_set_is_built_and_shown(media, tmp_path, capsys):
    out = tmp_path / "set"
    said = answer(capsys, "data", "build", media, "--out", out, "--licence", "CC0-1.0")
    assert "3 pictures and 1 clips; 2 files rejected" in said.out
    assert f"elastictok train small --data {out}" in said.out
    assert "broken.mp4\tan empty file" in (out / "rejected.tsv").read_text()
    shown = answer(capsys, "data", "show", out).out
    for text in ("pictures: 3", "clips: 1", "12 frames", "CC0-1.0 (3)", "rejected: 2 files"):
        assert text in shown
    assert Image.open(out / "contact-sheet.png").size[0] > 500
    answer(capsys, "data", "show", out, "--sheet", tmp_path / "other.png")
    assert (tmp_path / "other.png").exists()
    # The sheet in the folder is no reason to build again.
    again = answer(capsys, "data", "build", media, "--out", out, "--licence", "CC0-1.0")
    assert "3 pictures and 1 clips" in again.out


def test_jobs_build_one_data_set_together(media, tmp_path, capsys):
    out = tmp_path / "set"
    base = ("data", "build", media, "--out", out, "--resolution", 32, "--fps", 4)
    said = answer(capsys, *base, "--shard", "1/2")
    assert "0 of 1 tasks done: run the same command to go on" in said.out
    assert "not complete; run the same `elastictok data build`" in refused(
        capsys, "data", "show", out
    )
    assert "3 pictures" in answer(capsys, *base, "--shard", "0/2").out
    assert "encoded anew above: resolution 32, fps 4" in answer(capsys, "data", "show", out).out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shard", "2/2"), "must be I/N with I from 0 to N - 1"),
        (("--shard", "half"), "must be I/N"),
        (("--resolution", 0), "resolution is 0"),
        (("--workers", -1), "workers is -1"),
        (("--table", "nowhere.tsv"), "nowhere.tsv"),
        (("--runner-options", "x"), "are for a --runner"),
        (("--runner", "DirectRunner", "--workers", 2), "divides the work itself"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(options, message, media, tmp_path, capsys):
    said = refused(capsys, "data", "build", media, "--out", tmp_path / "set", *options)
    assert message in said
    assert said.count("\n") == 1


def test_other_mistakes(media, tmp_path, capsys):
    assert "no folder was given" in refused(capsys, "data", "build", "--out", tmp_path / "set")
    missing = refused(capsys, "data", "build", tmp_path / "nowhere", "--out", tmp_path / "set")
    assert "no such file or folder" in missing
    assert "not a built data set; make one by `elastictok data build" in refused(
        capsys, "data", "show", media
    )


def test_weights_on_the_command_line(tmp_path):
    (tmp_path / "a:0.5").mkdir()
    one, two = tmp_path / "one", tmp_path / "two"
    assert weighted([str(one), str(two)]) == [one, two]
    assert weighted([f"{one}:0.25", f"{two}:3"]) == {one: 0.25, two: 3.0}
    # A folder of that very name is a folder.
    assert weighted([f"{tmp_path}/a:0.5"]) == [tmp_path / "a:0.5"]
    for data, message in [
        ([f"{one}:0.5", str(two)], "has a weight and .*two has none"),
        ([f"{one}:0.5", f"{one}:0.5"], "given twice"),
        ([f"{one}:half"], "half is no weight"),
    ]:
        with pytest.raises(ValueError, match=message):
            weighted(data)


@pytest.mark.heavy
def test_training_on_data_sets_by_weight(media, tmp_path, run_program):
    pictures, clips = tmp_path / "pictures", tmp_path / "clips"
    run_program("data", "build", media / "a.png", media / "deep" / "b.jpg", "--out", pictures)
    run_program("data", "build", media / "deep", "--out", clips, "--workers", 2)
    options = ("--steps", 2, "--batch-size", 2, "--log-every", 1, "--whole-clips")
    data = (f"{pictures}:0.75", f"{clips}:0.25")
    said = run_program("train", "demo", "--data", *data, "--out", tmp_path / "run", *options)
    assert f"pictures of {pictures}: 2 in" in said.err
    assert f"clips of {clips}: 1 in" in said.err
    settings = json.loads((tmp_path / "run" / "train.json").read_text())
    assert settings["data"] == list(data)
    assert settings["whole_clips"] is True
    said = run_program(
        "train", "demo", "--data", f"{pictures}:1", "--out", tmp_path / "run", *options[2:],
        "--steps", 4, "--resume", code=2,
    )  # fmt: skip
    assert "was trained with --data" in said.err
