"""Model folders: what is saved is what is loaded, and nothing else is."""

import json
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elastictok.models import ModelFileError, RankRotary, fingerprint, load, save
from elastictok.quantizers import FSQ, LFQ, VQ, GaussianVAE, Residual


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from pathlib import Path

    return Path(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(
    "quantizer",
    [
        FSQ((5, 5, 5)),
        GaussianVAE(3),
        VQ(16, 3, key=jax.random.key(1)),
        LFQ(4),
        Residual(VQ(16, 3, key=jax.random.key(1)), 2),
    ],
    ids=lambda q: type(q).__name__,
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_saved_model_is_loaded_as_it_was(make_tiny, tmp_path, quantizer, dtype):
    model = make_tiny(quantizer, dtype=dtype)
    save(model, tmp_path / "deep" / "model")
    loaded = load(tmp_path / "deep" / "model")
    assert eqx.tree_equal(model, loaded)
    assert fingerprint(model) == fingerprint(loaded)
    assert sorted(p.name for p in (tmp_path / "deep" / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_the_fingerprint_sees_every_array_and_setting(tiny, make_tiny):
    prints = {fingerprint(tiny)}
    arrays, static = eqx.partition(tiny, eqx.is_array)
    leaves, tree = jax.tree.flatten(arrays)
    for i, leaf in enumerate(leaves):
        changed = [*leaves[:i], leaf.at[(0,) * leaf.ndim].add(1), *leaves[i + 1 :]]
        prints.add(fingerprint(eqx.combine(jax.tree.unflatten(tree, changed), static)))
    prints.add(fingerprint(make_tiny(rotary=RankRotary(101.0))))
    prints.add(fingerprint(make_tiny(min_tokens=3)))
    assert len(prints) == len(leaves) + 3


def test_saving_over_a_model_replaces_it(make_tiny, tmp_path):
    old, new = make_tiny(), make_tiny(key=jax.random.key(5))
    save(old, tmp_path)
    save(new, tmp_path)
    assert eqx.tree_equal(load(tmp_path), new)


def test_a_save_that_dies_between_its_two_files_leaves_a_model(make_tiny, tmp_path, monkeypatch):
    """Whichever file was renamed last, old or new weights load."""
    import os

    from elastictok.models import _io

    old, new = make_tiny(), make_tiny(key=jax.random.key(5))
    save(old, tmp_path / "run")
    renames = 0
    for survive in range(3):
        shutil.rmtree(tmp_path / "run")
        save(old, tmp_path / "run")
        calls = []

        def dying(source, target, survive=survive, calls=calls, replace=os.replace):
            if len(calls) == survive:
                raise KeyboardInterrupt
            calls.append(target)
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(_io.os, "replace", dying)
            with pytest.raises(KeyboardInterrupt):
                save(new, tmp_path / "run")
        renames += len(calls)
        loaded = load(tmp_path / "run")
        assert eqx.tree_equal(loaded, new if survive == 2 else old)
    assert renames == 3


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_an_error_and_never_another_model(make_tiny, folder, name, data):
    model = make_tiny()
    if not (folder / "config.json").exists():
        save(model, folder)
    good = (folder / name).read_bytes()
    if data.draw(st.booleans()):
        bad = good[: data.draw(st.integers(0, len(good) - 1))]
    else:
        at = data.draw(st.integers(0, len(good) - 1))
        bad = good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :]
    try:
        (folder / name).write_bytes(bad)
        try:
            loaded = load(folder)
        except ModelFileError as error:
            assert str(folder) in str(error) or "config.json" in str(error)
        else:
            # White space in JSON may change without a change of sense.
            assert eqx.tree_equal(loaded, model)
    finally:
        (folder / name).write_bytes(good)


def edit(path, change):
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=99), "format version 99; this library reads 1: update"),
        (lambda c: c.update(format="other"), "is not an elastictok-model config"),
        (lambda c: c.pop("sha256"), "lacks the model's description or its sha256"),
        (lambda c: c["model"].update({"class": "os.system"}), "'os.system', which is not in the"),
        (lambda c: c["model"]["quantizer"].update({"class": "LFQ"}), "the fields of quantizer"),
        (lambda c: c["model"].update(context=0), "context is 0 blocks"),
        (
            lambda c: c["model"]["encoder"]["kept"].update(array=[17]),
            r"encoder.kept is float32\[16",
        ),
        (lambda c: c["model"]["encoder"].update(kept=None), "tensors the model lacks"),
        (lambda c: c["model"].update(order=["a"]), "order is a list"),
    ],
)
def test_configs_that_do_not_fit_are_refused_by_name(tiny, tmp_path, change, message):
    save(tiny, tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ModelFileError, match=message):
        load(tmp_path)


def test_weights_of_another_model_are_refused(make_tiny, tmp_path):
    save(make_tiny(), tmp_path / "a")
    save(make_tiny(key=jax.random.key(5)), tmp_path / "b")
    save(make_tiny(dim=32), tmp_path / "c")
    for other, message in (("b", "does not have the sha256"), ("c", "is float32")):
        shutil.copy(tmp_path / other / "model.safetensors", tmp_path / "a" / "model.safetensors")
        with pytest.raises(ModelFileError, match=message):
            load(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    with pytest.raises(ModelFileError, match="is missing"):
        load(tmp_path / "a")
    with pytest.raises(ModelFileError, match="is not a model folder"):
        load(tmp_path / "nothing")


def test_users_classes_are_named_on_load(make_tiny, tmp_path):
    from elastictok.models import AbstractOrder

    class Backwards(AbstractOrder):
        def cells(self, grid):
            return np.arange(int(np.prod(grid)))[::-1]

    model = make_tiny(order=Backwards())
    save(model, tmp_path)
    with pytest.raises(ModelFileError, match=r"pass your own classes as load\(folder, classes="):
        load(tmp_path)
    assert eqx.tree_equal(load(tmp_path, classes=(Backwards,)), model)

    class Raster(AbstractOrder):
        def cells(self, grid):
            return np.arange(int(np.prod(grid)))

    with pytest.raises(ValueError, match="a class named Raster is already in the table"):
        load(tmp_path, classes=(Raster,))


def test_what_cannot_be_saved_is_named(make_tiny, tmp_path):
    model = eqx.tree_at(lambda m: m.encoder.kept, make_tiny(), jnp.zeros(16, jnp.complex64))
    with pytest.raises(ValueError, match=r"encoder.kept has dtype complex64"):
        save(model, tmp_path)
