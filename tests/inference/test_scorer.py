"""The network that predicts losses, and its files."""

import json
import math
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from elastictok.inference import (
    L1,
    MSE,
    PSNR,
    AbstractCriterion,
    Block,
    Calibration,
    Criterion,
    ElasticTokCodec,
    Regressor,
    Scorer,
    ScorerFileError,
    criterion_name,
)

SHARES = (0.0, 0.1, 0.5, 1.0)


def make(seed=0, **changes):
    options = {
        "frames_per_block": 2,
        "criterion": "MSE",
        "codec": "ab" * 32,
        "context": 3,
        "patch": 4,
        "shares": SHARES,
        "dim": 16,
        "hidden": 16,
        "layers": 1,
        "heads": 2,
    }
    return Scorer(**{**options, **changes}, key=jax.random.key(seed))


@pytest.fixture(scope="module")
def scorer():
    return make()


def frames(blocks, height=8, width=12, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (2 * blocks, height, width, 3), np.uint8)


def block(pixels, shortest=2, longest=18):
    return Block(shortest, longest, pixels=pixels, frames_per_block=2)


def losses(scorer, *blocks):
    return scorer.curves(blocks)[1]


@pytest.mark.parametrize("logarithmic", [True, False])
def test_curves_fall_over_lengths_in_bounds(logarithmic):
    scorer = make(logarithmic=logarithmic)
    lengths, values = scorer.curves([block(frames(2)), block(frames(1), 5, 105)])
    assert lengths.tolist() == [[2, 4, 10, 18], [5, 15, 55, 105]]
    assert np.all(np.diff(values) < 0)
    assert bool(np.all(values > 0)) is logarithmic


@given(st.lists(st.floats(-1e3, 1e3, width=32, allow_subnormal=False), min_size=2, max_size=6))
def test_falling_whatever_the_network_says(values):
    from elastictok.inference._scorer import falling

    curve = np.asarray(falling(jnp.asarray(values, jnp.float32)))
    assert curve[0] == np.float32(values[0])
    assert np.all(np.diff(curve) <= 0)


def test_between_its_points_the_curve_is_interpolated(scorer):
    pixels = frames(1)
    # Lengths 1 to 4: the share of a rounded length is not the one asked for.
    lengths, values = scorer.curves([block(pixels, 1, 4), block(pixels, 1, 1001)])
    assert lengths[0].tolist() == [1, 1, 3, 4]
    fine = np.interp((lengths[0] - 1) / 3, (lengths[1] - 1) / 1000, np.log(values[1]))
    np.testing.assert_allclose(np.log(values[0]), fine, rtol=1e-6)
    assert values[0, 0] == values[0, 1]


def test_a_block_without_a_choice_is_one_with_all_tokens(scorer):
    pixels = frames(1)
    lengths, values = scorer.curves([block(pixels, 7, 7), block(pixels, 1, 1001)])
    assert lengths[0].tolist() == [7] * 4
    np.testing.assert_allclose(values[0], values[1, -1])


def test_beside_others_and_alone_the_prediction_is_the_same(scorer):
    blocks = [block(frames(n, height, seed=n)) for n in (1, 2, 3, 4) for height in (8, 12)]
    together = losses(scorer, *blocks)
    alone = np.concatenate([losses(scorer, each) for each in blocks])
    np.testing.assert_array_equal(together, alone)
    assert len(np.unique(together[:, 0])) > 5  # not the same for all


def test_batches_as_on_accelerators(scorer, monkeypatch):
    blocks = [block(frames(1 + n % 3, seed=n)) for n in range(11)]
    alone = losses(scorer, *blocks)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    np.testing.assert_allclose(losses(scorer, *blocks), alone, rtol=1e-4)
    np.testing.assert_array_equal(losses(scorer, *blocks)[3:4], losses(scorer, blocks[3]))


def test_only_as_many_blocks_as_the_context_are_seen(scorer):
    long = frames(5)
    np.testing.assert_array_equal(losses(scorer, block(long)), losses(scorer, block(long[-6:])))
    assert not np.array_equal(losses(scorer, block(long)), losses(scorer, block(long[-4:])))
    assert not np.array_equal(losses(scorer, block(long)), losses(scorer, block(long[-2:])))
    assert scorer.history == 2


def test_what_is_before_the_beginning_is_not_seen(scorer):
    valid = jnp.array([False, False, True])
    one, other = jnp.asarray(frames(3, seed=1)), jnp.asarray(frames(3, seed=2))
    other = other.at[-2:].set(one[-2:])
    predict = eqx.filter_jit(scorer)
    np.testing.assert_array_equal(predict(one, valid), predict(other, valid))
    everything = jnp.array([True, True, True])
    assert not np.array_equal(predict(one, everything), predict(other, everything))


def test_neither_position_nor_number_compiles(scorer):
    from elastictok.inference._scorer import _predict

    losses(scorer, block(frames(1)))
    compiled = _predict._cached._cache_size()
    for count in (1, 2, 3, 7):
        losses(scorer, *[block(frames(n + 1), longest=9 + n) for n in range(count)])
    assert _predict._cached._cache_size() == compiled
    losses(scorer, block(frames(1, 16, 12)))
    assert _predict._cached._cache_size() == compiled + 1


def test_sizes_that_patches_do_not_divide_are_continued_by_their_edge(scorer):
    odd = frames(2, 5, 11)
    whole = np.pad(odd, [(0, 0), (0, 3), (0, 1), (0, 0)], mode="edge")
    np.testing.assert_array_equal(losses(scorer, block(odd)), losses(scorer, block(whole)))


def energies(pixels, valid):
    """What the network is told of each patch of 4x4 pixels, one by one."""
    from elastictok.inference._scorer import _features

    measure = jax.jit(lambda *arrays: _features(*arrays, 2, 4))
    features = measure(jnp.asarray(pixels), jnp.asarray(valid))
    return np.asarray(features).reshape(len(valid), 2, 2, -1)


def test_what_is_measured_in_patches():
    pixels = frames(3, 8, 8, seed=3)
    found = energies(pixels, [False, True, True])
    unit = pixels / 127.5 - 1.0
    # To the next pixel, also where that is another patch's; at the edge there is none.
    right = np.diff(unit, axis=2, append=unit[:, :, -1:]) ** 2
    down = np.diff(unit, axis=1, append=unit[:, -1:]) ** 2
    for b in range(3):
        for row in range(2):
            for column in range(2):
                place = np.s_[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                own, all_frames = unit[2 * b : 2 * b + 2][place], unit[place]
                halves = own.reshape(2, 2, 2, 2, 2, 3).mean(axis=(2, 4))
                onset = np.mean((own[0] - all_frames[2 * b - 1]) ** 2) if b == 2 else 0.0
                motion = np.mean((own[1] - own[0]) ** 2)
                values = [
                    own.var(axis=(1, 2)).mean(),
                    halves.var(axis=(1, 2)).mean(),
                    0.0,
                    right[2 * b : 2 * b + 2][place].mean(),
                    down[2 * b : 2 * b + 2][place].mean(),
                    motion / 2,  # the first frame has none
                    motion,
                    onset,
                ]
                expected = [
                    *np.zeros(3),
                    *own.mean(axis=(0, 1, 2)),
                    *(np.log10(np.array(values) + 1.5e-5) + 2.5),
                    b != 2,
                ]
                np.testing.assert_allclose(found[b, row, column], expected, atol=2e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Block(1, 4), "this block has none"),
        (Block(1, 4, pixels=frames(1), frames_per_block=1), "made for 2 .* has 1"),
        (
            Block(1, 4, pixels=frames(1)[:1], frames_per_block=2),
            "1 frames are no whole blocks of 2",
        ),
        (Block(1, 4, pixels=frames(1)[:0], frames_per_block=2), "0 frames are no whole blocks"),
    ],
)
def test_blocks_that_cannot_be_scored(scorer, given, message):
    with pytest.raises(ValueError, match=message):
        scorer.curves([given])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 0}, "context is 0"),
        ({"frames_per_block": 0}, "frames_per_block is 0"),
        ({"patch": 6}, "patch is 6"),
        ({"patch": 0}, "patch is 0"),
        ({"shares": (0.0,)}, "rise from 0 to 1"),
        ({"shares": (0.0, 0.5)}, "rise from 0 to 1"),
        ({"shares": (0.0, 0.5, 0.5, 1.0)}, "rise from 0 to 1"),
        ({"shares": (0.0, math.nan, 1.0)}, "rise from 0 to 1"),
        ({"heads": 3}, "3 heads"),
    ],
)
def test_scorers_that_are_none(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def painted(truth, reconstruction):
    return 0.0


def test_names_of_criteria():
    class Own(AbstractCriterion):
        threshold: float

        def __call__(self, truth, reconstruction):
            return 0.0

    assert [criterion_name(x) for x in (MSE(1), L1(1), PSNR(9))] == ["MSE", "L1", "PSNR"]
    assert criterion_name(Criterion(painted, 1)) == "painted"
    assert criterion_name(Criterion(np.mean, 1)) == "mean"
    assert criterion_name(Own(1.0)).endswith("Own")


# Files


def equal(one, other):
    return eqx.tree_equal(one, other) is True or bool(eqx.tree_equal(one, other))


@pytest.mark.parametrize("changes", [{}, {"logarithmic": False, "layers": 2, "patch": 8}])
def test_there_and_back(tmp_path, changes):
    scorer = make(3, **changes)
    path = tmp_path / "scorer.safetensors"
    scorer.save(path)
    back = Scorer.load(path)
    assert equal(back, scorer)
    assert back.fingerprint == scorer.fingerprint != make(4, **changes).fingerprint
    assert list(tmp_path.iterdir()) == [path]
    first = path.read_bytes()
    scorer.save(path)
    assert path.read_bytes() == first


def test_the_model_that_it_was_trained_for(tmp_path, model, make_model):
    fingerprint = ElasticTokCodec(model).fingerprint
    path = tmp_path / "scorer.safetensors"
    make(codec=fingerprint).save(path)
    assert Scorer.load(path, model).codec == fingerprint
    other = make_model(seed=1)
    with pytest.raises(ScorerFileError, match=fingerprint) as caught:
        Scorer.load(path, other)
    assert ElasticTokCodec(other).fingerprint in str(caught.value)


def test_files_that_are_damaged_or_foreign(tmp_path, scorer):
    path = tmp_path / "scorer.safetensors"
    scorer.save(path)
    good = path.read_bytes()
    with safetensors.safe_open(path, "numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(file.metadata()["elastictok.scorer"])

    def fails(raw, message):
        path.write_bytes(raw)
        with pytest.raises(ScorerFileError, match=message) as caught:
            Scorer.load(path)
        assert str(path) in str(caught.value)

    def remade(about, arrays=arrays):
        metadata = {"elastictok.scorer": about if isinstance(about, str) else json.dumps(about)}
        return safetensors.numpy.save(arrays, metadata=metadata)

    assert len(good) == len(remade(json.dumps(about, sort_keys=True)))
    fails(b"", "not a safetensors file")
    fails(good[:-1], "damaged or cut short")
    fails(b"\x80\x02}q\x00.", "not a safetensors file")
    fails(safetensors.numpy.save(arrays), "without 'elastictok.scorer'")
    fails(remade("{"), "not JSON")
    fails(remade("[" * 100_000), "not JSON")
    fails(remade("[]"), "no version")
    fails(remade(about | {"version": 2}), "version 2 .* reads version 1")
    fails(remade(about | {"facts": about["facts"] | {"criterion": "L1"}}), "checksum")
    changed = dict(arrays)
    changed["bias"] = changed["bias"] + 1
    fails(remade(about, changed), "checksum")
    for place in range(9, len(good), 997):
        flipped = bytearray(good)
        flipped[place] ^= 16
        path.write_bytes(bytes(flipped))
        with pytest.raises(ScorerFileError):
            Scorer.load(path)


def test_files_whose_checksum_is_right_and_that_are_wrong_all_the_same(tmp_path, scorer):
    from elastictok.inference._scorer_file import facts_of
    from elastictok.inference._sealed import checksum

    path = tmp_path / "scorer.safetensors"
    scorer.save(path)
    with safetensors.safe_open(path, "numpy") as file:
        arrays = {name: file.get_tensor(name) for name in sorted(file.keys())}
    facts, _ = facts_of(scorer)

    def fails(facts, arrays, message):
        sha = checksum(facts, arrays)
        about = json.dumps({"version": 1, "sha256": sha, "facts": facts})
        path.write_bytes(safetensors.numpy.save(arrays, metadata={"elastictok.scorer": about}))
        with pytest.raises(ScorerFileError, match=message):
            Scorer.load(path)

    for change, message in (
        ({"dim": 10**9}, "dim is 1000000000"),
        ({"dim": "16"}, "dim is '16'"),
        ({"layers": True}, "layers is True"),
        ({"layers": 3}, "has shape .* needs"),
        ({"patch": 6}, "multiple of 4"),
        ({"shares": [0.0, "x", 1.0]}, "no numbers"),
        ({"shares": [0.0, 1.0]}, "needs"),
        ({"heads": 5}, "5 heads"),
        ({"more": 1}, "differ in .'more'"),
    ):
        fails(facts | change, arrays, message)
    fails(facts, {k: v for k, v in arrays.items() if k != "bias"}, "differ in .'bias'")
    fails(facts, {**arrays, "bias": arrays["bias"][:2]}, "bias has shape")
    fails(facts, {**arrays, "bias": arrays["bias"] * np.float32("nan")}, "not finite")
    fails(facts, {**arrays, "bias": arrays["bias"].astype(np.float64)}, "of type F64")


def test_a_regressor_in_a_folder(tmp_path, model, make_model):
    scorer = make(codec=ElasticTokCodec(model).fingerprint)
    calibration = Calibration(
        (0.0, 0.5, 0.5), (0.0, 0.5), "MSE", 0.1, scorer.codec, scorer.fingerprint, 3
    )
    Regressor(scorer, MSE(0.1), alpha=0.5, calibration=calibration).save(tmp_path / "new" / "r")
    back = Regressor.load(tmp_path / "new" / "r", model, MSE(0.1), alpha=0.3, verify=False)
    assert (back.calibration, back.margin, back.verify) == (calibration, 0.5, False)
    assert equal(back.scorer, scorer)
    plain = Regressor.load(tmp_path / "new" / "r", model, MSE(0.7), margin=0.25)
    assert (plain.calibration, plain.margin) == (None, 0.25)
    with pytest.raises(ValueError, match=r"threshold 0\.1, and this one is 0\.7"):
        Regressor.load(tmp_path / "new" / "r", model, MSE(0.7), alpha=0.3)
    with pytest.raises(ScorerFileError, match="fingerprint"):
        Regressor.load(tmp_path / "new" / "r", make_model(seed=1), MSE(0.1))
    replace(calibration, codec="x").save(tmp_path / "new" / "r" / "calibration.json")
    with pytest.raises(ScorerFileError, match="fingerprint x, and the scorer beside it"):
        Regressor.load(tmp_path / "new" / "r", model, MSE(0.1), alpha=0.3)
    # A new scorer without a calibration takes the old one away.
    Regressor(scorer, MSE(0.1)).save(tmp_path / "new" / "r")
    with pytest.raises(FileNotFoundError, match=r"calibration\.json"):
        Regressor.load(tmp_path / "new" / "r", model, MSE(0.1), alpha=0.3)
