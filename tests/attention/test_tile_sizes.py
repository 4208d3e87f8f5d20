"""Which tiles a call gets: by chip, type, head_dim and block; from the table that was tuned."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictok.attention import (
    TPU_CHIPS,
    XLA,
    BlockCausal,
    Causal,
    Full,
    KeyValid,
    PallasTPU,
    TileEntry,
    TileKey,
    TileSizes,
    TPUTileSizes,
    XLATileSizes,
    attention,
    read_tiles,
    tile_sizes,
    write_tiles,
)
from elastictok.attention.tune import Setting, main, tune

KEY = TileKey("pallas_tpu", "TPU v5 lite", "bfloat16", 128, 2048)
SIZES = st.builds(TileSizes, st.integers(1, 4096), st.integers(1, 4096))
ENTRIES = st.one_of(
    st.builds(
        TileEntry,
        st.builds(
            TileKey,
            st.just("xla"),
            st.text(max_size=20),
            st.sampled_from(["float32", "bfloat16"]),
            st.integers(1, 512),
            st.integers(1, 10**6),
        ),
        st.builds(XLATileSizes, SIZES, SIZES),
        st.none() | st.text(max_size=20),
    ),
    st.builds(
        TileEntry,
        st.builds(
            TileKey,
            st.just("pallas_tpu"),
            st.sampled_from(TPU_CHIPS),
            st.sampled_from(["float32", "bfloat16"]),
            st.integers(1, 512),
            st.integers(1, 10**6),
        ),
        st.builds(TPUTileSizes, SIZES, SIZES, SIZES, st.integers(1, 2**30)),
        st.none() | st.text(max_size=20),
    ),
)


@given(st.lists(ENTRIES, max_size=4))
def test_a_table_survives_its_file(tmp_path_factory, table):
    path = tmp_path_factory.mktemp("tiles") / "tiles.json"
    write_tiles(path, tuple(table))
    assert read_tiles(path) == tuple(table)
    assert [file.name for file in path.parent.iterdir()] == ["tiles.json"]


def test_a_length_is_no_part_of_the_key():
    assert [field.name for field in dataclasses.fields(TileKey)] == [
        "backend",
        "chip",
        "dtype",
        "head_dim",
        "block",
    ]


@pytest.mark.parametrize("chip", [*TPU_CHIPS, "TPU v99"])
@pytest.mark.parametrize("block", [1, 100, 256, 300, 2048, 4096])
def test_what_nobody_measured_is_marked_and_fits_the_lanes(chip, block):
    entry = tile_sizes(TileKey("pallas_tpu", chip, "bfloat16", 128, block), table=())
    assert entry.tuned is None
    assert isinstance(entry.tiles, TPUTileSizes)
    for sizes in (entry.tiles.forward, entry.tiles.dq, entry.tiles.dkv):
        assert sizes.queries % 128 == sizes.keys % 128 == 0
        assert 256 <= sizes.keys <= 1024


def test_the_nearest_block_that_was_measured_is_taken():
    sizes = [TileSizes(128 * n, 128) for n in (1, 2, 3)]
    table = tuple(
        TileEntry(
            dataclasses.replace(KEY, **change), TPUTileSizes(*[sizes[n]] * 3), f"measured {n}"
        )
        for n, change in enumerate([{"block": 512}, {"block": 4096}, {"head_dim": 64}])
    )
    assert tile_sizes(dataclasses.replace(KEY, block=700), table).tuned == "measured 0"
    assert tile_sizes(dataclasses.replace(KEY, block=4000), table).tuned == "measured 1"
    assert tile_sizes(dataclasses.replace(KEY, head_dim=64), table).tuned == "measured 2"
    for other in ({"head_dim": 32}, {"dtype": "float32"}, {"chip": "TPU v4"}, {"backend": "xla"}):
        assert tile_sizes(dataclasses.replace(KEY, **other), table).tuned is None


def test_masks_say_how_many_tokens_they_treat_alike():
    assert (KeyValid([True]) & BlockCausal(64)).granularity() == 64
    assert (Causal() & Full()).granularity() == 1


@pytest.mark.parametrize("kind", ["xla", "pallas_tpu"])
def test_the_file_that_the_environment_names_is_used(kind, tmp_path, monkeypatch):
    odd = TileSizes(64, 64)
    tiles = XLATileSizes(odd, odd) if kind == "xla" else TPUTileSizes(odd, odd, odd)
    path = tmp_path / "tiles.json"
    write_tiles(path, (TileEntry(TileKey(kind, "cpu", "float32", 16, 32), tiles, "today"),))
    x = jnp.ones((128, 1, 16))
    own = XLA() if kind == "xla" else PallasTPU(interpret=True)

    def shapes() -> str:
        def run(x):  # a new function, so that nothing is remembered
            return attention(x, x, x, BlockCausal(32), implementation=own)

        jax.clear_caches()
        return str(jax.make_jaxpr(run)(x))

    assert not re.search(r"\b64\b", shapes())
    monkeypatch.setenv("ELASTICTOK_ATTENTION_TILES", str(path))
    assert re.search(r"\b64\b", shapes())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "no table of tile sizes"),
        ("[]", "no table of tile sizes"),
        ('{"version": 1}', "no table of tile sizes: KeyError"),
        ('{"version": 7, "entries": []}', "has version 7; this elastictok reads 1"),
        ('{"version": 1, "entries": [3]}', "entry 0"),
        ("backend", "entry 0.*backend is 'magic', not one of xla, pallas_tpu"),
        ("chip", "entry 0.*chip is 5"),
        ("tiles", "entry 0.*forward.queries is '512', not an integer"),
        ("zero", "entry 0.*TileSizes.queries is 0; it must be at least 1"),
        ("tuned", "entry 0.*tuned is 3"),
        ("surplus", "entry 0.*length"),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path, content, message):
    tiles = dataclasses.asdict(XLATileSizes())
    entry = {"key": dataclasses.asdict(KEY) | {"backend": "xla"}, "tiles": tiles, "tuned": None}
    changes = {
        "backend": lambda: entry["key"].update(backend="magic"),
        "chip": lambda: entry["key"].update(chip=5),
        "tiles": lambda: tiles["forward"].update(queries="512"),
        "zero": lambda: tiles["forward"].update(queries=0),
        "tuned": lambda: entry.update(tuned=3),
        "surplus": lambda: entry["key"].update(length=4096),
    }
    if content in changes:
        changes[content]()
        content = json.dumps({"version": 1, "entries": [entry]})
    path = tmp_path / "tiles.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"tiles.json.*{message}"):
        read_tiles(path)


def test_the_command_measures_and_writes(tmp_path, capsys):
    path = tmp_path / "tiles.json"
    other = TileEntry(KEY, TPUTileSizes(*[TileSizes(128, 128)] * 3), "elsewhere")
    write_tiles(path, (other,))
    arguments = "--head-dim 8 --dtype float32 --block 1 32 --length 64 --heads 1 --repeats 1"
    main([*arguments.split(), "--sizes", "32", "64", "--out", str(path)])
    first, causal, blocks = read_tiles(path)
    assert first == other
    assert [causal.key.block, blocks.key.block] == [1, 32]
    for entry in (causal, blocks):
        assert entry.key == TileKey("xla", "cpu", "float32", 8, entry.key.block)
        assert isinstance(entry.tiles, XLATileSizes)
        assert {entry.tiles.forward.queries, entry.tiles.backward.keys} <= {32, 64}
        assert entry.tuned is not None
        assert f"jax {jax.__version__}" in entry.tuned
    said = capsys.readouterr().out
    assert "forward 32 x 64: " in said
    assert f"ELASTICTOK_ATTENTION_TILES={path}" in said


def test_tuning_takes_the_fastest_that_runs_and_says_what_does_not(monkeypatch):
    def seconds(key, tiles, name, setting):
        sizes = getattr(tiles, name)
        if sizes.queries == 512:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: vmem\nmore")
        return {"forward": 1, "dq": 2, "dkv": -1}[name] / sizes.keys

    monkeypatch.setattr("elastictok.attention.tune._seconds", seconds)
    said = []
    entry = tune(KEY, Setting(length=1024, sizes=(128, 256, 512, 2048)), said.append)
    assert isinstance(entry.tiles, TPUTileSizes)
    assert entry.tiles.forward.keys == entry.tiles.dq.keys == 512
    assert entry.tiles.dkv.keys == 128
    assert entry.tiles.forward.queries == 128
    assert any("dq 512 x 128: RESOURCE_EXHAUSTED: vmem" in line for line in said)
    with pytest.raises(RuntimeError, match="no tile sizes of"):
        tune(KEY, Setting(length=1024, sizes=(512,)), said.append)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--block", "0"], "--block must be at least 1"),
        (["--head-dim", "64", "-3"], "--head-dim must be at least 1"),
        (["--dtype", "float8"], "invalid choice: 'float8'"),
    ],
)
def test_the_command_refuses_what_makes_no_sense(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
