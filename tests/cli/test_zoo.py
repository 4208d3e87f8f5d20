"""`elastictok zoo`: all presets and quantizers, in tables that fit."""

import contextlib
import io
import json
import math
import typing

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictok.cli import main
from elastictok.cli._commands import QuantizerName, TailDropName
from elastictok.cli._models import QUANTIZERS, TAIL_DROPS, make_model, make_quantizer
from elastictok.cli._zoo import Row, table
from elastictok.models import count_parameters
from elastictok.models.presets import PRESETS
from elastictok.quantizers import AbstractDiscreteQuantizer


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    """What the command prints on a screen of 100 columns, and the file that it writes."""
    file = tmp_path_factory.mktemp("zoo") / "zoo.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "100")
        return printed("zoo", "--json", str(file)), json.loads(file.read_text(encoding="utf-8"))


def printed(*arguments):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main(arguments)
    return out.getvalue()


def test_every_preset_and_quantizer_is_listed_once_and_fits(listed):
    text, _ = listed
    first = [line.split()[0] for line in text.splitlines() if line[:1].islower()]
    heads = ["name", "name"]
    assert sorted(first) == sorted([*PRESETS, *QUANTIZERS, *heads])
    assert max(map(len, text.splitlines())) <= 100
    (line,) = [x for x in text.splitlines() if x.startswith("elastic_video_once ")]
    assert " ".join(line.split()) == (
        "elastic_video_once 774,912 4-128 4 x 64x64 FSQ uniform, 50% untold"
    )
    flat = " ".join(text.split())
    for preset in PRESETS.values():
        assert preset.about in flat
        assert preset.source in flat


def test_the_file_says_what_the_models_are(listed):
    _, found = listed
    assert list(found["presets"]) == list(PRESETS)
    for name, figures in found["presets"].items():
        preset = PRESETS[name]
        model = eqx.filter_eval_shape(lambda p=preset: p.make(key=jax.random.key(0)))
        assert figures["parameters"] == count_parameters(model)
        assert (figures["min_tokens"], figures["max_tokens"]) == (
            model.min_tokens,
            model.max_tokens,
        )
        assert figures["size"] == list(model.size)
        assert figures["tail_drop"] == repr(preset.tail_drop)
        assert figures["quantizer"]["class"] == type(model.quantizer).__name__
    fsq = found["quantizers"]["fsq"]
    assert (fsq["codebook_size"], fsq["source"]) == (64_000, "arXiv 2309.15505")
    assert found["quantizers"]["identity"]["bits_per_token"] is None


def test_the_command_line_knows_all_quantizers_and_policies():
    assert set(typing.get_args(QuantizerName)) == set(QUANTIZERS)
    assert set(typing.get_args(TailDropName)) == {*TAIL_DROPS, "fixed"}
    assert all(kind.source for kind in QUANTIZERS.values())


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer_fits_into_a_small_preset(name):
    quantizer = make_quantizer(name, key=jax.random.key(0))
    model = eqx.filter_eval_shape(
        lambda: make_model("elastic_image", quantizer=name, context=None, seed=0)
    )
    assert type(model.quantizer) is type(quantizer)
    latents = jax.random.normal(jax.random.key(1), (5, quantizer.input_dim))
    out = quantizer(latents, jnp.arange(5) < 3)
    assert out.latents.shape == (5, quantizer.latent_dim)
    if isinstance(quantizer, AbstractDiscreteQuantizer):
        bits = quantizer.streams * math.log2(quantizer.codebook_size)
        assert quantizer.bits_per_token == pytest.approx(bits)
        assert 10 < bits < 20


def test_a_card_says_where_a_preset_is_from_and_how_it_is_trained():
    card = printed("zoo", "elastic_video_once")
    assert not card.startswith("---")
    flat = " ".join(card.split())
    assert "774,912" in flat
    assert PRESETS["elastic_video_once"].source in flat
    assert "ConditionDropout(inner=UniformDrop(), share=0.5)" in flat
    assert "elastictok train elastic_video_once --data" in flat
    assert "and --quantizer asked" in flat


def test_no_weights_are_made(monkeypatch):
    def made(*_, **__):
        raise AssertionError("weights are made")

    normal = jax.random.normal

    def drawn(key, *arguments, **options):
        out = normal(key, *arguments, **options)
        return out if isinstance(out, jax.core.Tracer) else made()

    monkeypatch.setattr(jax.random, "normal", drawn)
    printed("zoo", "small")
    with pytest.raises(AssertionError, match="weights are made"):
        make_model("demo", quantizer=None, context=None, seed=0)


words = st.text("abcd", min_size=1, max_size=12)


@given(
    rows=st.lists(
        st.builds(Row, st.lists(words, min_size=3, max_size=3), st.lists(words).map(" ".join)),
        min_size=1,
        max_size=5,
    ),
    width=st.integers(30, 100),
)
def test_a_table_fits_and_says_everything(rows, width):
    text = table(("name", "one", "two"), rows, width)
    assert max(map(len, text.splitlines())) <= width
    assert text.count("\n") + 1 >= len(rows)
    left = " ".join(text.replace(";", " ").split())
    for row in rows:
        assert all(cell in left for cell in row.cells)
        assert " ".join(row.note.split()) in left
