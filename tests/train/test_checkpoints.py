"""Checkpoints come back bit for bit, or not at all."""

import resource
import shutil
import subprocess
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import quantizers, tiny_model

from elastictok.train import CheckpointError, adamw, init_state, latest_step, muon
from elastictok.train._checkpoints import Checkpoints, _arrays

LOOP = {"data": {"next": 7}, "best": 0.1 + 0.2}


def make_state(seed=0, *, step=0, optimizer=None, quantizer="VQ"):
    model = tiny_model(quantizers()[quantizer], seed=seed)
    state = init_state(model, optimizer or adamw(1e-3), jax.random.key(seed))
    return at_step(state, step)


def at_step(state, step):
    return eqx.tree_at(lambda s: s.step, state, jnp.asarray(step, jnp.int32))


def numbers(state):
    return {name: np.asarray(array) for name, array in _arrays(state).items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with steps 10 and 20, and the state of step 20."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(folder)
    state = make_state(3, step=20)
    checkpoints.save(at_step(state, 10), LOOP)
    checkpoints.save(state, LOOP)
    checkpoints.close()
    return folder, state


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of that folder to be damaged."""
    shutil.copytree(saved[0], tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("optimizer", [adamw(1e-3), muon()], ids=["adamw", "muon"])
@pytest.mark.parametrize("quantizer", ["FSQ", "Residual"])
def test_round_trip_is_exact(tmp_path, optimizer, quantizer):
    state = make_state(5, step=4, optimizer=optimizer, quantizer=quantizer)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(state, LOOP)
    assert checkpoints.newest() == 4
    like = make_state(6, optimizer=optimizer, quantizer=quantizer)
    back, loop = checkpoints.restore(4, like)
    checkpoints.close()
    assert loop == LOOP
    expected, found = numbers(state), numbers(back)
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert jnp.array_equal(jax.random.key_data(back.key), jax.random.key_data(state.key))


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    state = make_state()
    for step in (1, 2, 5):
        checkpoints.save(at_step(state, step), LOOP)
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "5"]
    assert latest_step(tmp_path) == 5


def test_nothing_to_restore(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.newest() is None
    assert latest_step(tmp_path) is None
    assert latest_step(tmp_path / "nowhere") is None
    checkpoints.close()


@settings(max_examples=40)
@given(data=st.data())
def test_every_flipped_bit_is_found(saved, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("flipped") / "checkpoints"
    shutil.copytree(saved[0], folder)
    files = sorted(path for path in (folder / "20").rglob("*") if path.is_file())
    file = data.draw(st.sampled_from(files))
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    checkpoints = Checkpoints(folder)
    with pytest.warns(UserWarning, match="checkpoint 20 is damaged .*going back to 10"):
        assert checkpoints.newest() == 10
    checkpoints.close()
    shutil.rmtree(folder.parent)


@pytest.mark.parametrize("damage", ["cut", "lost", "added"])
def test_changed_files_are_named_and_the_step_is_moved_aside(copied, saved, damage):
    file = max((copied / "20").rglob("*"), key=lambda path: path.stat().st_size)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "lost":
        file.unlink()
    else:
        file = copied / "20" / "extra"
        file.write_bytes(b"")
    checkpoints = Checkpoints(copied)
    with pytest.warns(UserWarning, match=file.relative_to(copied / "20").as_posix()):
        assert checkpoints.newest() == 10
    assert [path.name for path in (copied.parent / "damaged").iterdir()] == ["20-1"]
    back, loop = checkpoints.restore(10, make_state())
    assert (int(back.step), loop) == (10, LOOP)
    # The step is done again, and may then be saved again.
    checkpoints.save(saved[1], LOOP)
    assert checkpoints.newest() == 20
    checkpoints.close()


def test_when_all_are_damaged_nothing_is_guessed(copied):
    for step in ("10", "20"):
        (copied / step / "_CHECKPOINT_METADATA").write_text("{}")
    checkpoints = Checkpoints(copied)
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(CheckpointError, match=r"every checkpoint in .* was damaged"),
    ):
        checkpoints.newest()
    checkpoints.close()


def test_a_step_cut_off_before_it_was_sealed_is_removed(copied):
    (copied / "20" / "SHA256SUMS").unlink()
    assert latest_step(copied.parent) == 10
    checkpoints = Checkpoints(copied)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoints.newest() == 10
    assert not (copied / "20").exists()
    checkpoints.close()


def test_the_seal_is_what_sha256sum_reads(saved):
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum here")
    check = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    subprocess.run(check, cwd=saved[0] / "20", check=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: eqx.tree_at(
                lambda t: t.model.encoder.kept, s, s.model.encoder.kept.astype(jnp.bfloat16)
            ),
            r"model\.encoder\.kept is float32\[16\] there and bfloat16\[16\] here",
        ),
        (
            lambda s: eqx.tree_at(lambda t: t.model.encoder.kept, s, jnp.zeros(17)),
            r"model\.encoder\.kept is float32\[16\] there and float32\[17\] here",
        ),
        (
            lambda s: eqx.tree_at(
                lambda t: t.opt_state, s, optax.sgd(1e-3, momentum=0.9).init(s.model.encoder.kept)
            ),
            r"opt_state.*absent",
        ),
        (
            lambda s: eqx.tree_at(lambda t: t.model, s, tiny_model(quantizers()["VQ"], heads=4)),
            r"heads is 2 there and 4 here",
        ),
    ],
    ids=["dtype", "shape", "optimizer", "heads"],
)
def test_a_checkpoint_of_something_else_is_refused_by_name(copied, change, message):
    checkpoints = Checkpoints(copied)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoints.restore(20, change(make_state()))
    assert len(str(caught.value)) < 700
    checkpoints.close()


@pytest.mark.heavy
def test_a_full_disk_fails_in_one_line_and_leaves_what_was_there(tmp_path, capfd):
    """A limit on file sizes stands for the full disk: writes fail half way through."""
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder)
    checkpoints.save(make_state(step=1), LOOP)
    state = make_state(step=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
    try:
        with (
            pytest.warns(UserWarning, match="step 2 could not be saved.*trying again"),
            pytest.raises(
                CheckpointError, match=r"step 2 could not be saved in .* resume"
            ) as error,
        ):
            checkpoints.save(state, LOOP)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(str(error.value).splitlines()) == 1
    assert capfd.readouterr() == ("", "")
    again = Checkpoints(folder)
    assert again.newest() == 1
    # Not step 2 once more: threads of Orbax may still be removing what was begun of it. A run that
    # is resumed is another process.
    again.save(make_state(step=3), LOOP)
    assert again.newest() == 3
    again.close()
