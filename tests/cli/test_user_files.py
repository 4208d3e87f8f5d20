"""Files of the user's own: those of docs/extend.md, and such as are wrong."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from elastictok.cli import main
from elastictok.data import read_media, write_picture
from elastictok.inference import Tokens

DOCUMENT = Path(__file__).parents[2] / "docs" / "extend.md"
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", DOCUMENT.read_text(), re.S))
# The classes of a policy are no part of the model.
IN_THE_MODEL = {
    "my_quantizer.py": "Phases",
    "my_decoder.py": "Filled",
    "my_visibility.py": "EveryOtherBlock",
}

TINY = '''
from elastictok.models import CoarseToFine, Patching, PowerOfTwoDrop, Preset, RankRotary, presets
from elastictok.quantizers import FSQ


def tiny(*, key, quantizer=None):
    """A tiny one,

    for tests.
    """
    return presets.build(
        size=(16, 16),
        context=1,
        frames_per_block=1,
        min_tokens=1,
        patching=Patching(1, 8, 8),
        order=CoarseToFine(),
        quantizer=FSQ((5, 5, 5)) if quantizer is None else quantizer,
        dim=16,
        hidden=16,
        layers=1,
        heads=2,
        rotary=RankRotary(1e4),
        key=key,
    )


powers = Preset(tiny, PowerOfTwoDrop(), about="Tiny.", source="nowhere")
'''
OWN = """
import os

from elastictok.quantizers import FSQ, AbstractQuantizer, QuantizerOutput
from tiny import tiny

with open("imported.txt", "a") as file:
    file.write(f"{os.getpid()}\\n")


class Wrapped(AbstractQuantizer):
    inner: FSQ

    @property
    def input_dim(self):
        return self.inner.input_dim

    @property
    def latent_dim(self):
        return self.inner.latent_dim

    @property
    def bits_per_token(self):
        return None

    def __call__(self, latents, keep, *, key=None):
        out = self.inner(latents, keep, key=key)
        return QuantizerOutput(out.latents, None, out.loss, out.statistics)


def mine(*, key):
    return tiny(key=key, quantizer=Wrapped(FSQ((5, 5, 5))))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with pictures; what is imported from it is forgotten afterwards."""
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        picture = rng.integers(0, 256, (20, 24, 3)).astype(np.uint8)
        write_picture(tmp_path / "pictures" / f"{i}.png", picture)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = dict(sys.modules)
    yield tmp_path
    for name in sys.modules.keys() - before.keys():
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def elastictok(*arguments):
    main([str(argument) for argument in arguments])


def refused(capsys, *arguments):
    """What is said of arguments that are wrong."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        elastictok(*arguments)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1, said
    return said


def train(preset, *options, steps=2):
    """In the working directory, without what takes long."""
    fixed = ("--batch-size", 2, "--pictures-every", 0, "--steps", steps, "--log-every", 1)
    elastictok("train", preset, "--data", "pictures", "--out", "run", *fixed, *options)


ENCODE = ("encode", "pictures/0.png", "--model", "run", "--length", 4, "-o", "x.safetensors")


def test_the_document_has_its_four_examples():
    assert set(FILES) == {*IN_THE_MODEL, "my_taildrop.py"}
    for name in FILES:
        assert f"elastictok train {name}:my_preset" in DOCUMENT.read_text()


@pytest.mark.heavy
@pytest.mark.parametrize("name", sorted(FILES))
def test_an_example_of_the_document_trains_and_its_tokens_come_back(name, folder, capsys):
    (folder / name).write_text(FILES[name])
    train(f"{name}:my_preset", "--context", 2, steps=3)
    if name in IN_THE_MODEL:
        said = refused(capsys, *ENCODE)
        assert f"is of class '{IN_THE_MODEL[name]}'" in said
        assert f"--code {name}" in said
    code = ("--code", name) if name in IN_THE_MODEL else ()
    elastictok(*ENCODE, *code)
    assert Tokens.load(folder / "x.safetensors").lengths.tolist() == [4]
    elastictok("decode", "x.safetensors", "--model", "run", "-o", "y.png", *code)
    assert read_media(folder / "y.png").frames.shape == (1, 64, 77, 3)


@pytest.mark.heavy
def test_a_model_of_own_classes_is_trained_resumed_and_started_from(folder, capsys):
    (folder / "tiny.py").write_text(TINY)
    (folder / "own.py").write_text(OWN)
    train("own.py:mine", "--workers", 1)
    # Once, and in no worker.
    assert len((folder / "imported.txt").read_text().split()) == 1
    settings = json.loads((folder / "run" / "train.json").read_text())
    assert settings["preset"] == "own.py:mine"
    assert settings["tail_drop_policy"] == "UniformDrop()"
    assert settings["code"] == []
    train("own.py:mine", "--resume", "--workers", 1, steps=3)
    rows = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3]

    start = ("train", "tiny.py:powers", "--data", "pictures", "--out", "next", "--init-from", "run")
    start += ("--steps", 1, "--batch-size", 2, "--pictures-every", 0)
    assert "--code own.py" in refused(capsys, *start)
    elastictok(*start, "--code", "own.py")
    settings = json.loads((folder / "next" / "train.json").read_text())
    assert settings["tail_drop_policy"] == "PowerOfTwoDrop()"
    # The preset's own file need not be named again; of several, all are imported.
    elastictok(*ENCODE, "--code", "tiny.py", "--code", "own.py")


def test_a_run_goes_on_with_its_policy_only(folder, capsys):
    from elastictok.cli._commands import Train
    from elastictok.cli._train import SETTINGS, _check_unchanged, _settings, _tail_drop

    (folder / "tiny.py").write_text(TINY)
    (folder / "run").mkdir()

    def settings(**options):
        command = Train(
            **({"preset": "tiny.py:powers", "data": ("pictures",), "out": Path("run")} | options)
        )
        policy = _tail_drop(command)
        return command.out, _settings(command, policy)

    _, first = settings()
    (folder / "run" / SETTINGS).write_text(json.dumps(first))
    _check_unchanged(*settings())
    _check_unchanged(*settings(tail_drop="power-of-two"))  # which is the preset's
    for options, now in (
        ({"tail_drop": "uniform"}, r"UniformDrop\(\)"),
        ({"tail_drop": "fixed", "length": 3}, r"FixedDrop\(length=3\)"),
        ({"tail_drop": "information"}, r"InformationDrop\(\)"),
        (
            {"condition_dropout": 0.5},
            r"ConditionDropout\(inner=PowerOfTwoDrop\(\), share=0.5\)",
        ),
    ):
        with pytest.raises(ValueError, match=rf"the policy PowerOfTwoDrop\(\), now it is {now};"):
            _check_unchanged(*settings(**options))
    with pytest.raises(ValueError, match=r"--preset tiny\.py:powers, now it is tiny\.py:tiny"):
        _check_unchanged(*settings(preset="tiny.py:tiny", tail_drop="power-of-two"))


WRONG = """
import equinox as eqx
from elastictok.models import presets

number = 3


def no_key():
    pass


def other(*, key):
    return number


def fails(*, key):
    size = number
    raise TypeError("first line\\nsecond line")


def inside(*, key):
    return presets.build(size=size)


def fixed(*, key):
    return presets.demo(key=key)
"""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("absent.py:x", "there is no file absent.py, seen from {folder}"),
        ("wrong.txt:x", "wrong.txt is no Python file; write FILE.py"),
        ("wrong:x", "wrong is no Python file; write FILE.py"),
        ("wrong.py", "say which preset, wrong.py:NAME (it has other, fails, inside, fixed)"),
        ("wrong.py:othr", "there is no preset 'othr'; did you mean other? (presets: other, fails"),
        ("wrong.py:number", "number is int; a preset is a function of key that returns an"),
        ("wrong.py:no_key", "no_key takes no key; a preset is a function of key"),
        ("wrong.py:other", "other returns int, not an ElasticTok"),
        ("wrong.py:fails", "wrong.py, line 18: TypeError: first line\n"),
        ("wrong.py:inside", "wrong.py, line 22: NameError: name 'size' is not defined"),
        ("wrong.py:fixed --quantizer vq", "takes no other quantizer; leave out --quantizer"),
        ("syntax.py:x", "syntax.py, line 2: SyntaxError: "),
        ("import.py:x", "import.py, line 1: ModuleNotFoundError: No module named 'absent_too'"),
        ("exit.py:x", "exit.py, line 2: SystemExit: 3"),
        ("empty.py:x", "empty.py has no preset 'x', nor another; a preset is"),
        ("clash.py:x", "clash.py has a class Decoder, and so has elastictok.models"),
        ("wrong.py:fixed --tail-drop fixed", "--tail-drop fixed --length 32"),
        ("wrong.py:fixed --length 3", "--length is for --tail-drop fixed"),
        ("dmeo", "did you mean demo?"),
    ],
)
@pytest.mark.parametrize("command", ["train", "plan", "zoo"])
def test_what_is_wrong_with_a_file_is_said_in_a_line(command, arguments, said, folder, capsys):
    for name, content in {
        "wrong.py": WRONG,
        "syntax.py": "x = 1\ndef f(:\n",
        "import.py": "import absent_too\n",
        "exit.py": "import sys\nsys.exit(3)\n",
        "empty.py": "",
        "clash.py": "import equinox\nclass Decoder(equinox.Module):\n    pass\n",
        "wrong.txt": WRONG,
    }.items():
        (folder / name).write_text(content)
    preset, *options = arguments.split()
    if command != "train" and options:
        return
    more = {
        "train": ("--data", "pictures", "--out", "run"),
        "plan": ("--topology", "cpu:1"),
        "zoo": (),
    }[command]
    told = refused(capsys, command, preset, *options, *more)
    assert said.format(folder=folder) in told
    assert not (folder / "run").exists()


def test_a_file_that_failed_is_not_half_imported(folder):
    from elastictok.cli._user import load_file

    path = folder / "later.py"
    path.write_text("import absent_too\n")
    for _ in range(2):
        with pytest.raises(ValueError, match="absent_too"):
            load_file(path)
    path.write_text("value = 1\n")
    module = load_file(path)
    assert module.value == 1
    assert load_file(Path("later.py")) is module


def test_classes_are_those_of_the_file_and_those_it_imports(folder):
    from elastictok.cli._user import user_classes

    (folder / "tiny.py").write_text(TINY)
    (folder / "own.py").write_text(OWN)
    names = {kind.__name__ for kind in user_classes([Path("own.py"), Path("tiny.py")])}
    assert {"Wrapped", "FSQ", "AbstractQuantizer", "PowerOfTwoDrop"} <= names
