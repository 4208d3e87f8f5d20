"""`elastictok train` with meshes, stages and several processes."""

import json
import os
import socket
import subprocess

import numpy as np
import pytest

from elastictok.cli import main
from elastictok.cli._processes import is_one_of_several
from elastictok.models import load

from .conftest import PROGRAM

TINY = ("--batch-size", 4, "--log-every", 1)


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def started(devices, *arguments):
    flags = os.environ.get("XLA_FLAGS", "")
    flags += f" --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [PROGRAM, *map(str, arguments)],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err[-3000:]
    assert "Traceback" not in err
    return out, err


@pytest.mark.heavy
def test_stages_on_a_mesh_in_one_command(media, tmp_path):
    out = tmp_path / "run"
    options = ("--mesh", "data=2", "--accumulate", 2, "--average", 0.9, "--precision", "bfloat16")
    more = ("--remat", "attention", "--validation", media / "deep", "--pictures-every", 2)
    stages = ("--stages", "1:2:1.0", "2:1:0.5:0.01")
    train = ("train", "demo", "--data", media, "--out", out, *TINY, *options, *more, *stages)
    _, err = ended(started(2, *train))
    assert "stage 2 of 2: to step 3" in err
    assert [row["step"] for row in rows(out)] == [1, 2, 3]
    last = rows(out)[-1]
    assert {"mse_full", "mse_quarter", "validation_loss", "validation_met"} <= last.keys()
    model = load(out)
    assert model.context == 2
    assert model.encoder.transformer.dtype == "bfloat16"
    names = sorted(path.name for path in (out / "pictures").iterdir())
    assert names == ["step-00000002.png", "step-00000003.png"]
    (session,) = [json.loads(x) for x in (out / "sessions.jsonl").read_text().splitlines()]
    assert session["mesh"] == {"data": 2, "fsdp": 1, "sequence": 1, "tensor": 1}
    assert session["stages"] == [2, 1]


def test_what_a_user_gets_wrong_about_training(media, tmp_path, capsys):
    weights = tmp_path / "vgg.pth"
    weights.write_bytes(b"\x80\x02}q\x00.")
    train = ("train", "demo", "--data", media, "--out", tmp_path / "run", *TINY)
    # Some are noticed before jax is asked for anything, none leaves a run behind.
    for arguments, message in (
        (("--mesh", "model=2"), "'model=2' is no mesh axis; write AXIS=DEVICES"),
        (("--mesh", "data=3"), "takes 3 devices and there are"),
        (("--stages", "4"), "--stages has '4'; write CONTEXT:STEPS"),
        (("--stages", "4:0"), "--stages has '4:0'"),
        (("--stages", "4:9:0.5:0.1:1"), "such as 4:5000:0.5:0.01"),
        (("--stages", "4:9", "--steps", 3), "leave out --steps"),
        (("--coordinator", "localhost:1"), "--processes and --process belong together"),
        (("--average", 1.0), "less than 1"),
        (("--accumulate", 3), "is 4 and cannot be computed in 3 parts"),
        (("--perceptual", tmp_path / "absent.safetensors"), "absent.safetensors"),
        (("--perceptual", weights), ".pth"),
        (("--overfit-one", "--resume"), "leave out --resume"),
    ):
        with pytest.raises(SystemExit) as end:  # in this process: starting one takes seconds
            main([str(part) for part in (*train, *arguments)])
        said = capsys.readouterr().err
        assert end.value.code == 2
        assert message in said
        assert len(said.splitlines()) < 12
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.heavy
def test_one_batch_is_learnt_by_heart(media, tmp_path, run_program):
    base = ("train", "demo", "--data", media, "--batch-size", 1, "--context", 1, "--overfit-one")
    vae = ("--quantizer", "vae", "--log-every", 100)
    answer = run_program(*base, *vae, "--out", tmp_path / "run", "--steps", 600)
    assert "learnt" in answer.out
    full = [row["mse_full"] for row in rows(tmp_path / "run") if "mse_full" in row]
    assert full[-1] < 1e-3 < full[0]
    answer = run_program(*base, *vae, "--out", tmp_path / "short", "--steps", 3, code=2)
    assert "not below 0.001" in answer.err
    assert "look at" in answer.err


@pytest.mark.heavy
def test_two_processes_train_one_model(media, tmp_path):
    """Each reads its half of the data; the same command goes on after it was stopped."""
    out = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"

    def both(*options):
        train = ("train", "demo", "--data", media, "--out", out, *TINY, "--mesh", "data=2,fsdp=2")
        meet = ("--coordinator", address, "--processes", 2)
        processes = [started(2, *train, *meet, "--process", i, *options) for i in range(2)]
        return [ended(process) for process in processes]

    said = both("--steps", 2)
    assert "holds the model" in said[0][0]
    assert "holds the model" not in said[1][0]
    both("--steps", 3, "--resume")
    assert [row["step"] for row in rows(out)] == [1, 2, 3]
    assert np.isfinite(np.asarray(load(out).encoder.kept)).all()


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "8"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a"}, True),
    ],
)
def test_where_the_environment_speaks_of_other_processes(environment, several):
    assert is_one_of_several(environment) == several
