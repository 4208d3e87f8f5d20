"""Model folders: what is saved is what is loaded, and nothing else is."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elastictok.models import (
    ModelFileError,
    RankRotary,
    RecentBlocks,
    count_parameters,
    fingerprint,
    load,
    load_shapes,
    model_card,
    presets,
    save,
    with_compute_dtype,
)
from elastictok.models._describe import describe
from elastictok.quantizers import (
    BSQ,
    FSQ,
    LFQ,
    VQ,
    GaussianVAE,
    Gradient,
    Grouped,
    Identity,
    KMeansStart,
    Projected,
    Residual,
    RotationTrick,
    SimVQ,
    UniformGrid,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Path(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(
    "quantizer",
    [
        FSQ((5, 5, 5)),
        GaussianVAE(3),
        VQ(16, 3, key=jax.random.key(1)),
        LFQ(4),
        Residual(VQ(16, 3, key=jax.random.key(1)), 2),
        VQ(16, 3, key=jax.random.key(1), book=Gradient(), start=KMeansStart(), cosine=True),
        SimVQ(16, 3, key=jax.random.key(1), estimator=RotationTrick()),
        BSQ(4),
        Grouped(VQ(16, 2, key=jax.random.key(1)), 2),
        Projected(4, FSQ((5, 5)), 3, key=jax.random.key(1)),
        Identity(3),
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
        "README.md",
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


ALL_IN_ONE, IN_PARTS = 10**9, 4000


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (ALL_IN_ONE, ALL_IN_ONE),
        (ALL_IN_ONE, IN_PARTS),
        (IN_PARTS, ALL_IN_ONE),
        (IN_PARTS, IN_PARTS),
    ],
)
@pytest.mark.parametrize("alike", [True, False])
def test_a_save_that_dies_anywhere_leaves_a_model(
    make_tiny, tmp_path, monkeypatch, before, after, alike
):
    """Whichever file was renamed or deleted last, the old or the new model loads."""
    old = make_tiny()
    new = make_tiny(key=jax.random.key(5)) if alike else make_tiny(LFQ(4), dim=32)
    loaded, survive = old, 0
    while True:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        save(old, tmp_path / "run", shard_bytes=before)
        left = [survive]

        def dying(name, left=left):
            whole = getattr(os, name)

            def call(*arguments, **options):
                if left[0] == 0:
                    raise KeyboardInterrupt
                left[0] -= 1
                return whole(*arguments, **options)

            return call

        try:
            with monkeypatch.context() as patch:
                for name in ("replace", "unlink"):
                    patch.setattr(os, name, dying(name))
                save(new, tmp_path / "run", shard_bytes=after)
        except KeyboardInterrupt:
            was, loaded = loaded, load(tmp_path / "run")
            assert eqx.tree_equal(loaded, old) or eqx.tree_equal(loaded, new)
            # Once the new one is there, it stays.
            assert eqx.tree_equal(was, old) or eqx.tree_equal(loaded, new)
            survive += 1
        else:
            break
    assert survive >= 4
    assert eqx.tree_equal(load(tmp_path / "run"), new)
    # Nothing of the old one is left.
    whole = {"config.json", "model.safetensors", "README.md"}
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert (names == whole) == (after == ALL_IN_ONE)


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
        (lambda c: c.update(version=99), "format version 99; this library reads 1 and 2: update"),
        (lambda c: c.update(format="other"), "is not an elastictok-model config"),
        (lambda c: c.pop("sha256"), "lacks the model's description or its sha256"),
        (lambda c: c["model"].update({"class": "os.system"}), "'os.system', which is not in the"),
        (lambda c: c["model"]["quantizer"].update({"class": "LFQ"}), "the fields of quantizer"),
        (lambda c: c["model"].update(context=0), "context is 0 blocks"),
        (
            lambda c: c["model"]["encoder"]["kept"].update(array=[17]),
            r"encoder.kept is float32\[16\], where the model has float32\[17\]",
        ),
        (
            lambda c: c["model"]["encoder"].update(kept=None),
            r"holds encoder.kept, float32\[16\], which the model",
        ),
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
    for other, message in (
        ("b", "does not have the sha256"),
        ("c", r"encoder.kept is float32\[32\], where the model has float32\[16\]"),
    ):
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


@pytest.mark.parametrize("change", [{"version": 2, "replacing": 3}, {"replacing": [3]}])
def test_what_is_being_replaced_must_be_a_model(tiny, tmp_path, change):
    save(tiny, tmp_path)
    edit(tmp_path, lambda config: config.update(change))
    with pytest.raises(ModelFileError, match="lacks the model's description"):
        load(tmp_path)


def test_weights_of_another_quantizer_are_refused_by_name(make_tiny, tmp_path):
    save(make_tiny(FSQ((5, 5, 5))), tmp_path / "fsq")
    save(make_tiny(VQ(16, 3, key=jax.random.key(1))), tmp_path / "vq")
    save(make_tiny(GaussianVAE(3)), tmp_path / "vae")
    for model, weights, message in (
        ("fsq", "vq", r"holds quantizer\.\w+, float32\[16, 3\], which the model has not"),
        ("vq", "fsq", r"lacks quantizer\.\w+, float32\[16, 3\]"),
        ("fsq", "vae", r"encoder.out_proj.weight is float32\[16, 6\], where the .* \[16, 3\]"),
    ):
        mixed = tmp_path / f"{model}-{weights}"
        shutil.copytree(tmp_path / model, mixed)
        shutil.copy(tmp_path / weights / "model.safetensors", mixed)
        with pytest.raises(ModelFileError, match=message.replace(r" \[16", r" float32\[16")):
            load(mixed)


def rivals():
    """Quantizers that take and give three values a token, some with the same arrays."""
    key = jax.random.key(1)
    return {
        "fsq": FSQ((5, 4, 3)),
        "fsq_other_order": FSQ((3, 4, 5)),
        "grid": UniformGrid((5, 4, 3), (4, 3, 2)),
        "lfq": LFQ(3),
        "lfq_other_scale": LFQ(3, scale=2.0),
        "bsq": BSQ(3),
        "identity": Identity(3),
        "vq": VQ(16, 3, key=key),
        "vq_cosine": VQ(16, 3, key=key, cosine=True),
        "vq_rotation": VQ(16, 3, key=key, estimator=RotationTrick()),
        "vq_gradient": VQ(16, 3, key=key, book=Gradient()),
        "vq_larger": VQ(17, 3, key=key),
        "simvq": SimVQ(16, 3, key=key),
        "residual": Residual(VQ(16, 3, key=key), 2),
        "residual_fsq": Residual(FSQ((5, 4, 3)), 2),
        "grouped": Grouped(FSQ((5,)), 3),
        "projected": Projected(3, FSQ((5, 4, 3)), 3, key=key),
    }


@pytest.mark.parametrize("trained", rivals())
def test_a_quantizer_cannot_be_swapped_under_trained_weights(make_tiny, tmp_path, trained):
    save(make_tiny(rivals()[trained]), tmp_path)
    before = (tmp_path / "config.json").read_text()
    for name, other in rivals().items():
        if name == trained:
            continue
        edit(tmp_path, lambda config, q=other: config["model"].update(quantizer=describe(q)))
        with pytest.raises(ModelFileError, match=r"a quantizer swapped|does not hold the weights"):
            load(tmp_path)
        (tmp_path / "config.json").write_text(before)
    assert eqx.tree_equal(load(tmp_path), make_tiny(rivals()[trained]))


def test_a_quantizer_of_another_width_does_not_fit_the_encoder(make_tiny, tmp_path):
    save(make_tiny(FSQ((5, 4, 3))), tmp_path)
    edit(tmp_path, lambda config: config["model"].update(quantizer=describe(FSQ((5, 4)))))
    with pytest.raises(ModelFileError, match="the encoder gives 3 values per token where 2 are"):
        load(tmp_path)


def test_a_field_at_its_default_is_not_in_the_config(make_tiny, tmp_path):
    """So that what was saved before a class had it is still the same, and its fingerprint."""
    save(make_tiny(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "visibility" not in config["model"]["encoder"]
    changed = make_tiny()
    visibility = RecentBlocks(window=2)
    changed = dataclasses.replace(
        changed, encoder=replaced_field(changed.encoder, "visibility", visibility)
    )
    assert fingerprint(changed) != fingerprint(make_tiny())
    save(changed, tmp_path)
    assert load(tmp_path).encoder.visibility == visibility
    edit(tmp_path, lambda config: config["model"]["encoder"].pop("visibility"))
    with pytest.raises(ModelFileError, match="was edited"):
        load(tmp_path)


def replaced_field(module, name, value):
    """A copy with one field changed, past a constructor that would make new weights."""
    new = object.__new__(type(module))
    for field in dataclasses.fields(module):
        object.__setattr__(
            new, field.name, value if field.name == name else getattr(module, field.name)
        )
    return new


def test_weights_of_another_geometry_are_refused_before_any_is_read(
    make_tiny, tmp_path, monkeypatch
):
    from elastictok.models import _weights

    save(make_tiny(), tmp_path / "a")
    save(make_tiny(layers=3, hidden=40), tmp_path / "b")
    shutil.copy(tmp_path / "b" / "model.safetensors", tmp_path / "a")
    monkeypatch.setattr(_weights.Tensor, "read", lambda self: pytest.fail("a tensor was read"))
    with pytest.raises(ModelFileError) as caught:
        load(tmp_path / "a")
    # Every one of them, with both shapes.
    for side in ("encoder", "decoder"):
        assert (
            f"{side}.transformer.layers.feed_forward.up.weight is float32[3, 16, 40], "
            "where the model has float32[2, 16, 24]"
        ) in str(caught.value)


# Files of several parts.


def test_large_weights_go_into_several_files_that_other_tools_read(make_tiny, tmp_path):
    from safetensors.numpy import load_file

    model = make_tiny()
    save(model, tmp_path, shard_bytes=IN_PARTS)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3
    assert not (tmp_path / "model.safetensors").exists()
    found, sizes = {}, []
    for shard in shards:
        tensors = load_file(tmp_path / shard)
        assert set(tensors) == {n for n, s in index["weight_map"].items() if s == shard}
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        assert sizes[-1] <= IN_PARTS or len(tensors) == 1
        found |= tensors
    assert index["metadata"]["total_size"] == sum(sizes)
    np.testing.assert_array_equal(found["encoder.kept"], model.encoder.kept)
    assert eqx.tree_equal(load(tmp_path), model)


def test_a_limit_of_no_bytes_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="shard_bytes is 0"):
        save(tiny, tmp_path, shard_bytes=0)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_to_one_of_several_files_is_an_error(make_tiny, tmp_path_factory, data):
    model, folder = make_tiny(), tmp_path_factory.getbasetemp() / "in-parts"
    if not (folder / "config.json").exists():
        save(model, folder, shard_bytes=IN_PARTS)
    # Not the README, which says nothing to programs.
    path = data.draw(st.sampled_from(sorted(p for p in folder.iterdir() if p.suffix != ".md")))
    good = path.read_bytes()
    kind, at = data.draw(st.integers(0, 2)), data.draw(st.integers(0, len(good) - 1))
    flipped = bytes([good[at] ^ data.draw(st.integers(1, 255))])
    bad = [good[:at], good[:at] + flipped + good[at + 1 :], good + b"\0"][kind]
    try:
        path.write_bytes(bad)
        try:
            loaded = load(folder)
        except ModelFileError:
            pass
        else:
            # White space in JSON, or a digit of the total size, which nothing depends on.
            assert path.suffix == ".json"
            assert eqx.tree_equal(loaded, model)
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(dict.fromkeys(m, "../out.safetensors")), "which is no file beside it"),
        (lambda m: m.update({"encoder.kept": 3}), "which is no file beside it"),
        (
            lambda m: m.update({"encoder.kept": "absent.safetensors"}),
            "absent.safetensors is missin",
        ),
        (lambda m: m.pop("encoder.kept"), "disagree about \\['encoder.kept'\\]"),
        (lambda m: m.update({"more": next(iter(m.values()))}), "disagree about \\['more'\\]"),
    ],
)
def test_an_index_cannot_point_elsewhere(tiny, tmp_path, change, message):
    save(tiny, tmp_path, shard_bytes=IN_PARTS)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    with pytest.raises(ModelFileError, match=message):
        load(tmp_path)


# Old folders.


def test_version_1_still_loads_and_computes_what_it_did():
    """A folder that the first version of the format was written with, and what its model gave."""
    folder = Path(__file__).parent / "formats" / "version-1"
    assert json.loads((folder / "config.json").read_text())["version"] == 1
    model = load(folder)
    assert isinstance(model.quantizer, Residual)
    pixels = jnp.linspace(-1, 1, 4 * 16 * 16 * 3).reshape(4, 16, 16, 3)
    out = model(pixels, jnp.asarray([3, 4]))
    kept = [[4, 0], [4, 0], [4, 1], [0, 7], [0, 7], [0, 7], [0, 7]]
    assert np.delete(np.asarray(out.codes), 3, axis=0).tolist() == kept
    assert float(jnp.sum(out.latents)) == pytest.approx(3.5580265522, abs=1e-5)


def test_version_2_still_loads_and_computes_what_it_did():
    folder = Path(__file__).parent / "formats" / "version-2"
    assert json.loads((folder / "config.json").read_text())["version"] == 2
    assert (folder / "model.safetensors.index.json").exists()
    model = load(folder)
    old = load(folder.parent / "version-1")
    assert eqx.tree_equal(model, old)


# Where the arrays go.


def test_weights_are_loaded_in_another_type_all_but_the_quantizers(make_tiny, tmp_path):
    model = make_tiny(VQ(16, 3, key=jax.random.key(1)))
    save(model, tmp_path / "whole")
    half = load(tmp_path / "whole", dtype=jnp.bfloat16)
    assert half.encoder.kept.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half.encoder.kept, model.encoder.kept.astype(jnp.bfloat16))
    assert eqx.tree_equal(half.quantizer, model.quantizer)
    assert half.encoder.transformer.dtype == jnp.float32
    save(half, tmp_path / "half")
    assert eqx.tree_equal(load(tmp_path / "half"), half)
    up = load(tmp_path / "half", dtype=jnp.float32)
    np.testing.assert_array_equal(up.encoder.kept, half.encoder.kept.astype(jnp.float32))
    # The network runs on them as it is.
    out = half(jnp.zeros((2, 16, 16, 3)), jnp.asarray([8]))
    assert out.pixels.dtype == out.latents.dtype == jnp.float32


def test_shapes_are_known_without_reading_weights(make_tiny, tmp_path):
    model = make_tiny(VQ(16, 3, key=jax.random.key(1)))
    save(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    shapes = load_shapes(tmp_path)
    assert count_parameters(shapes) == count_parameters(model)
    assert jax.tree.structure(shapes) == jax.tree.structure(eqx.filter_eval_shape(lambda: model))


def test_shardings_that_do_not_fit_are_refused(tiny, tmp_path):
    save(tiny, tmp_path)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert eqx.tree_equal(load(tmp_path, shardings=here), tiny)
    with pytest.raises(ValueError, match="neither one sharding nor a tree"):
        load(tmp_path, shardings=[here, here])


def test_weights_go_straight_onto_a_mesh(make_tiny, tmp_path):
    save(make_tiny(), tmp_path / "model")
    script = Path(__file__).parent / "load_on_devices.py"
    result = subprocess.run(
        [sys.executable, script, tmp_path / "model"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "loaded onto 8 devices" in result.stdout


# What is written for people.


def test_a_card_is_written_and_an_edited_one_is_kept(make_tiny, tmp_path):
    card = tmp_path / "README.md"
    save(make_tiny(), tmp_path)
    first = card.read_text()
    assert first.startswith("---\nlibrary_name: elastictok\n")
    assert "| quantizer | FSQ, 125 codes |" in first
    save(make_tiny(LFQ(4)), tmp_path)
    assert "| quantizer | LFQ, 16 codes |" in card.read_text()
    save(make_tiny(), tmp_path, card=model_card(make_tiny(), about="Trained on cats."))
    assert "Trained on cats." in card.read_text()
    card.write_text("# My model\n")
    save(make_tiny(), tmp_path)
    assert card.read_text() == "# My model\n"


def test_cards_say_how_many_parameters_there_are(make_tiny):
    model = make_tiny(GaussianVAE(3))
    assert f"| parameters | {count_parameters(model):,} |" in model_card(model)
    shapes = eqx.filter_eval_shape(presets.elastictok_vae_200m, key=jax.random.key(0))
    assert "| parameters | 210,571,264 |" in model_card(shapes)


def test_another_compute_type_changes_nothing_else(make_tiny):
    model = make_tiny()
    half = with_compute_dtype(model, jnp.bfloat16)
    assert half.encoder.transformer.dtype == half.decoder.transformer.dtype == jnp.bfloat16
    assert eqx.tree_equal(with_compute_dtype(half, jnp.float32), model)
    assert eqx.tree_equal(half, make_tiny(dtype=jnp.bfloat16))
