import sys
import types

import pytest

from elastictok.train import TensorBoard, WeightsAndBiases


def scalars(folder):
    """Every scalar in a folder of event files, read back by tensorboardX's own parser."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return found


def test_tensorboard_files_hold_every_number(tmp_path):
    pytest.importorskip("tensorboardX")
    tracker = TensorBoard(tmp_path / "events")
    for step in (10, 20):
        tracker.log(step, {"loss": step / 8, "psnr": 12.5})
    tracker.close()
    tracker.close()
    found = scalars(tmp_path / "events")
    assert sorted(found) == [
        ("loss", 10, 1.25),
        ("loss", 20, 2.5),
        ("psnr", 10, 12.5),
        ("psnr", 20, 12.5),
    ]


def test_weights_and_biases_gets_every_number(monkeypatch, tmp_path):
    calls = []

    class Run:
        def log(self, metrics, step):
            calls.append(("log", step, metrics))

        def finish(self):
            calls.append(("finish",))

    def init(*, project, name, id, resume, dir, config):
        calls.append(("init", project, name, id, resume, dir, config))
        return Run()

    module = types.ModuleType("wandb")
    monkeypatch.setattr(module, "init", init, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", module)
    tracker = WeightsAndBiases("p", run_id="abc", folder=tmp_path, config={"steps": 3})
    tracker.log(10, {"loss": 0.5})
    tracker.close()
    tracker.close()
    assert calls == [
        ("init", "p", None, "abc", "allow", str(tmp_path), {"steps": 3}),
        ("log", 10, {"loss": 0.5}),
        ("finish",),
    ]


@pytest.mark.parametrize(
    ("module", "make", "command"),
    [
        ("wandb", lambda: WeightsAndBiases("project"), r'pip install "elastictok\[wandb\]"'),
        ("tensorboardX", lambda: TensorBoard("x"), r'pip install "elastictok\[tensorboard\]"'),
    ],
)
def test_a_missing_package_names_the_command_that_installs_it(monkeypatch, module, make, command):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=command):
        make()
