"""The promise of a calibration, on scores that are made up and on clips that are encoded."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictok.inference import (
    AbstractScorer,
    Calibration,
    Codes,
    Criterion,
    ElasticCodec,
    Regressor,
    ScorerFileError,
    Tokenizer,
    calibrate,
)

ALPHAS = st.sampled_from([0.01, 0.05, 0.1, 0.2, 0.29, 0.5, 0.7, 0.9]) | st.floats(1e-3, 0.999)


def made_of(clips, **changes):
    margins = sorted({float(x) for x in clips if x < math.inf} | {0.0})
    fields = {
        "needed": tuple(float(x) for x in clips),
        "margins": tuple(margins),
        "criterion": "MSE",
        "threshold": 0.003,
        "codec": "ab" * 32,
        "scorer": "cd" * 32,
        "window": 4,
    }
    return Calibration(**{**fields, **changes})


def share_missing(draw, clips, alpha, repeats, seed=0):
    """Of new clips, at the margins of as many calibrations: a clip misses below what it needs."""
    rng = np.random.default_rng(seed)
    missing = 0
    for _ in range(repeats):
        *needed, new = draw(rng, clips + 1)
        missing += new > made_of(needed).margin(alpha)
    return missing / repeats


def continuous(rng, count):
    return rng.exponential(size=count)


def tied(rng, count):
    return rng.choice([0.0, 0.1, 0.5, math.inf], p=[0.6, 0.2, 0.1, 0.1], size=count)


def hopeless(rng, count):
    return np.full(count, math.inf)


def mixed(rng, count):
    """Exchangeable, but not independent: all clips of a draw share a scale."""
    return rng.gamma(0.3) * rng.exponential(size=count)


@pytest.mark.parametrize("draw", [continuous, tied, hopeless, mixed])
@pytest.mark.parametrize(
    ("clips", "alpha"), [(0, 0.1), (1, 0.5), (5, 0.1), (9, 0.1), (20, 0.3), (40, 0.05)]
)
def test_at_most_a_share_alpha_misses(draw, clips, alpha):
    repeats = 1000
    spread = math.sqrt(alpha * (1 - alpha) / repeats)
    assert share_missing(draw, clips, alpha, repeats) <= alpha + 4 * spread


@pytest.mark.parametrize(("clips", "alpha"), [(1, 0.5), (9, 0.1), (10, 0.1), (20, 0.3), (3, 0.2)])
def test_just_the_share_that_theory_gives_where_nothing_is_tied(clips, alpha):
    rank = math.ceil((clips + 1) * (1 - Fraction(str(alpha))))
    expected = float(1 - Fraction(min(rank, clips + 1), clips + 1))
    repeats = 4000
    spread = math.sqrt(max(expected * (1 - expected), 1e-9) / repeats)
    assert abs(share_missing(continuous, clips, alpha, repeats) - expected) <= 4 * spread + 1e-9


@given(st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.4, math.inf]), max_size=60), ALPHAS)
def test_the_margin_is_the_least_that_enough_clips_are_content_with(needed, alpha):
    calibration = made_of(needed)
    margin = calibration.margin(alpha)

    def share(at):
        """Of the calibration clips and one that always misses, those that miss."""
        return Fraction(sum(x > at for x in needed) + (at < math.inf), len(needed) + 1)

    assert share(margin) <= Fraction(repr(alpha))
    smaller = [x for x in calibration.margins if x < margin]
    assert all(share(x) > Fraction(repr(alpha)) for x in smaller if x in needed)
    assert calibration.enough(alpha) is (Fraction(1, len(needed) + 1) <= Fraction(repr(alpha)))
    if not calibration.enough(alpha):
        assert margin == math.inf


def test_whole_numbers_are_not_lost_to_rounding():
    # (n + 1) * (1 - alpha) in floats is above 9 for some of these.
    assert made_of(range(1, 10)).margin(0.1) == 9
    assert made_of(range(1, 100)).margin(0.29) == 71
    assert made_of(range(1, 10)).margin(0.7) == 3
    assert made_of(range(1, 9)).margin(0.1) == math.inf


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, math.nan, math.inf])
def test_shares_that_are_none(alpha):
    with pytest.raises(ValueError, match=r"such as 0\.1"):
        made_of([0.0]).margin(alpha)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"needed": (0.3,)}, "none of those tried"),
        ({"needed": (math.nan,)}, "none of those tried"),
        ({"margins": ()}, "must rise"),
        ({"margins": (0.2, 0.1)}, "must rise"),
        ({"margins": (0.0, math.inf)}, "finite"),
        ({"margins": (-1.0, 0.0)}, "0 or more"),
        ({"window": 0}, "window is 0"),
    ],
)
def test_what_is_no_calibration(changes, message):
    with pytest.raises(ValueError, match=message):
        made_of([0.0], **changes)


# Clips whose blocks say in their pixels what they lose at each length, and what is predicted.

LONGEST = 8
THRESHOLD = 40.0
COUPLING = 3


class Prescribed(ElasticCodec[int, int]):
    """A frame is a block. Its first row are its losses at 1 to 8 tokens, to which the tokens that
    the block before lacked are added."""

    size = (2, LONGEST)
    patch = (2, LONGEST)
    frames_per_block = 1
    context = 4
    min_tokens = 1
    kind = Codes(256)
    bits_per_token = 8.0
    fingerprint = "prescribed"

    def __init__(self):
        self.windows = set()

    def tokens_per_block(self, height, width):
        return LONGEST

    def encoder_state(self, window, height, width):
        self.windows.add(window)
        return 0

    def decoder_state(self, window, height, width):
        return 0  # tokens that the block before lacked

    def encode(self, pixels, length, state):
        return pixels[0, 0, :, 0].astype(np.int32), state + 1

    def decode(self, values, length, state):
        loss = min(255, int(values[length - 1]) + COUPLING * state)
        return np.full((1, 2, LONGEST, 3), loss, np.uint8), LONGEST - length


class Reader(AbstractScorer):
    """Predicts what the second row says."""

    @property
    def history(self):
        return 0

    @property
    def fingerprint(self):
        return "reader"

    def curves(self, blocks):
        lengths = np.tile(np.arange(1, LONGEST + 1), (len(blocks), 1))
        return lengths, np.stack([b.pixels[-1, 1, :, 0] for b in blocks]).astype(np.float64)


def loss_that_is_painted(truth, reconstruction):
    return reconstruction[0, 0, 0, 0]


CRITERION = Criterion(loss_that_is_painted, THRESHOLD)
MARGINS = (0.0, 0.1, 0.25, 0.5, 1.0)


def clips_of(rng, count):
    """Losses that mostly fall, and predictions that are off; some clips cannot meet."""
    clips = []
    for _ in range(count):
        blocks = int(rng.integers(1, 4))
        start = rng.uniform(40, 200, (blocks, 1))
        curve = start * np.exp(-rng.uniform(0.1, 0.6, (blocks, 1)) * np.arange(LONGEST))
        curve += rng.normal(0, 12, curve.shape)
        predicted = curve * np.exp(rng.normal(-0.1, 0.4, (blocks, 1)))
        rows = np.stack([curve, -np.sort(-predicted, axis=1)], axis=1)
        pixels = np.clip(np.rint(rows), 0, 255).astype(np.uint8)
        clips.append(np.repeat(pixels[..., None], 3, axis=-1))
    return clips


def meets(clip, margin):
    """Whether a clip meets the threshold in each block, by going through its blocks by hand."""
    lacking, good = 0, True
    for frame in clip:
        losses, predicted = frame[0, :, 0].astype(float), frame[1, :, 0].astype(float)
        length = LONGEST
        if margin < math.inf:
            fitting = [k for k in range(LONGEST) if predicted[k] <= THRESHOLD * math.exp(-margin)]
            length = fitting[0] + 1 if fitting else LONGEST
        good &= min(255, losses[length - 1] + COUPLING * lacking) <= THRESHOLD
        lacking = LONGEST - length
    return bool(good)


def misses(clip, margin):
    return meets(clip, math.inf) and not meets(clip, margin)


def needed_by(clip):
    """By the definition, from all margins."""
    content = [m for m in MARGINS if not any(misses(clip, n) for n in MARGINS if n >= m)]
    return content[0] if content else math.inf


def test_a_calibration_says_what_each_clip_needs():
    clips = clips_of(np.random.default_rng(0), 150)
    codec = Prescribed()
    tokenizer = Tokenizer(codec, Regressor(Reader(), CRITERION), window=3)
    start = Regressor(Reader(), CRITERION, verify=False)
    regressor = calibrate(start, tokenizer, clips, alpha=0.2, margins=MARGINS[::-1])
    calibration = regressor.calibration
    assert calibration == Calibration(
        tuple(map(needed_by, clips)),
        MARGINS,
        "loss_that_is_painted",
        THRESHOLD,
        "prescribed",
        "reader",
        3,
    )
    assert codec.windows == {1, 2, 3}  # those of clips that fill it, and not the codec's own, 4
    assert len(set(calibration.needed)) > 3  # else the clips test nothing
    assert any(not meets(clip, math.inf) for clip in clips)
    # Some clip misses at a larger margin than one at which it does not.
    assert any(
        misses(c, n) and not misses(c, m) for c in clips for m in MARGINS for n in MARGINS if n > m
    )
    assert regressor.margin == calibration.margin(0.2)
    assert (regressor.alpha, regressor.verify) == (0.2, False)


@pytest.mark.parametrize(("count", "alpha"), [(5, 0.2), (20, 0.1), (3, 0.1)])
def test_new_clips_meet_the_threshold_as_often_as_promised(count, alpha):
    rng = np.random.default_rng(1)
    repeats = 500
    missing = 0
    for _ in range(repeats):
        *known, new = clips_of(rng, count + 1)
        calibration = made_of([], needed=tuple(map(needed_by, known)), margins=MARGINS)
        margin = calibration.margin(alpha)
        missing += misses(new, margin)
    assert missing / repeats <= alpha + 4 * math.sqrt(alpha * (1 - alpha) / repeats)


def test_the_regressor_misses_where_the_oracle_does():
    rng = np.random.default_rng(2)
    clips = clips_of(rng, 40)
    for margin in (0.0, 0.25, math.inf):
        strategy = Regressor(Reader(), CRITERION, margin=margin)
        for clip, tokens in zip(
            clips, Tokenizer(Prescribed(), strategy).encode_batch(clips), strict=True
        ):
            assert bool(tokens.met.all()) is meets(clip, margin)


def test_too_few_clips_keep_all_tokens_and_say_so():
    clips = clips_of(np.random.default_rng(3), 8)
    tokenizer = Tokenizer(Prescribed(), Regressor(Reader(), CRITERION))
    regressor = calibrate(Regressor(Reader(), CRITERION), tokenizer, clips, alpha=0.1)
    assert regressor.margin == math.inf
    assert not regressor.calibration.enough(0.1)
    assert regressor.calibration.enough(0.2)
    tokens = Tokenizer(Prescribed(), regressor).encode(clips[0])
    assert set(tokens.lengths.tolist()) == {LONGEST}


@pytest.mark.parametrize("margins", [(), (-0.1,), (0.0, math.inf), (math.nan,)])
def test_margins_that_are_none(margins):
    tokenizer = Tokenizer(Prescribed(), Regressor(Reader(), CRITERION))
    with pytest.raises(ValueError, match="margins are"):
        calibrate(Regressor(Reader(), CRITERION), tokenizer, [], alpha=0.1, margins=margins)


@given(st.lists(st.floats(0, 5) | st.just(math.inf), max_size=9), st.sampled_from([0.1, math.inf]))
def test_files(tmp_path_factory, needed, threshold):
    path = tmp_path_factory.mktemp("calibration") / "calibration.json"
    calibration = made_of(needed, threshold=threshold)
    calibration.save(path)
    assert Calibration.load(path) == calibration
    assert "Infinity" not in path.read_text()
    assert list(path.parent.iterdir()) == [path]


def test_files_that_are_damaged_or_foreign(tmp_path):
    path = tmp_path / "calibration.json"
    made_of([0.0, 0.5, math.inf]).save(path)
    good = path.read_bytes()
    about = json.loads(good)

    def fails(raw, message):
        path.write_bytes(raw if isinstance(raw, bytes) else json.dumps(raw).encode())
        with pytest.raises(ScorerFileError, match=message) as caught:
            Calibration.load(path)
        assert str(path) in str(caught.value)

    fails(b"", "not JSON")
    fails(good[:-9], "not JSON")
    fails([], "no version")
    fails({"version": 1}, "no elastictok-calibration")
    fails(about | {"version": 2}, "version 2 .* reads version 1")
    fails(about | {"facts": about["facts"] | {"threshold": 0.1}}, "damaged")
    fails(about | {"facts": 3}, "damaged")
    for change, message in (
        ({"window": "4"}, "window is '4'"),
        ({"window": True}, "window is True"),
        ({"needed": [0.3]}, "none of those tried"),
        ({"needed": ["0.3"]}, "no margins"),
        ({"margins": [None]}, "no margins"),
        ({"more": 1}, "differ in .'more'"),
    ):
        fails(resealed(about, about["facts"] | change), message)


def resealed(about, facts):
    """With a checksum that is right, as only somebody who means harm would."""
    import hashlib

    sha = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return about | {"facts": facts, "sha256": sha}
