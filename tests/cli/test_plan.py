"""`elastictok plan`, on CPU devices: tests/train/test_plan_aot.py has it for TPUs."""

import importlib.util
import json

import pytest


@pytest.fixture(scope="module")
def planned(run_program, tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    answer = run_program(
        *("plan", "demo", "--topology", "cpu:8", "--mesh", "data=2,fsdp=2,sequence=2"),
        *("--batch-size", 8, "--sequence-length", 512, "--accumulate", 2, "--remat", "layers"),
        *("--average", "--json", path),
    )
    return answer, json.loads(path.read_text())


def test_what_is_said_to_people(planned):
    answer, _ = planned
    assert "demo on cpu:8, compiled in" in answer.out
    assert "8 x cpu: data 2, fsdp 2, sequence 2" in answer.out
    assert "8 x 512 tokens in a step (8 blocks each), in 2 parts" in answer.out
    assert "products in bfloat16" in answer.out
    assert "average of the weights" in answer.out
    assert "collective-permute over sequence" in answer.out


def test_what_is_written(planned):
    _, found = planned
    assert (found["preset"], found["topology"]) == ("demo", "cpu:8")
    assert (found["devices"], found["context"], found["tokens"]) == (8, 8, 512)
    assert found["chip"] is found["seconds"] is found["mfu"] is None
    # The weights that fsdp splits are half of all, but for a few vectors; AdamW keeps two of each.
    whole = 4 * found["parameter_count"]
    assert 0.5 * whole < found["parameters"] < 0.6 * whole
    assert found["optimizer"] == pytest.approx(2 * found["parameters"], rel=0.01)
    assert found["average"] == found["parameters"]
    # Of a device's two examples half the tokens, and their numbers.
    assert found["batch"] == 2 * 4 * (2 * 64 * 64 * 3 + 4 + 1)
    assert sum(found["sent"].values()) > 0
    assert any(name.startswith("all-gather over fsdp") for name in found["sent"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--topology", "cpu:2", "--mesh", "data=3"), "takes 3 devices and there are 2"),
        (("--topology", "cpu:2", "--mesh", "rows=2"), "'rows=2' is no mesh axis"),
        (("--topology", "cpu:1", "--sequence-length", 100), "64 tokens; take 64 or 128"),
        (("--topology", "cpu:1", "--sequence-length", 64, "--context", 1), "give one"),
        (("--topology", "cpu:2", "--batch-size", 3), "choose a multiple of 2"),
        (
            ("--topology", "v9:4x4"),
            "there is no topology 'v9:4x4'"
            if importlib.util.find_spec("libtpu")
            else 'pip install "elastictok[aot]"',
        ),
    ],
)
def test_what_cannot_be_is_refused(run_program, options, said):
    assert said in run_program("plan", "demo", *options, code=2).err


def test_an_unknown_preset_is_refused(run_program):
    answer = run_program("plan", "smal", "--topology", "cpu:1", code=2)
    assert "did you mean small?" in answer.err
