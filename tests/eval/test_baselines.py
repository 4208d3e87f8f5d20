"""Baselines against loops written out here, and the claims they make about bits."""

import itertools
import math

import numpy as np
import pytest
import scipy.fft
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictok.eval import (
    BlockMean,
    ImageMean,
    Patch,
    dct_matrix,
    fit_baselines,
    fit_block_dct,
    fit_patch_pca,
    mse,
)
from elastictok.eval._scalar import Quantiser, allocate, fit_quantisers

TOKEN = math.log2(64000)
PATCH = Patch(1, 8, 8)


def photographs(count: int, height: int, width: int, frames: int = 1, seed: int = 0):
    """Smooth coloured fields: like photographs, most of their variance is in few components."""
    rng = np.random.default_rng(seed)
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    clips = []
    for _ in range(count):
        values = np.full((frames, height, width, 3), 128.0)
        for _ in range(6):
            a, b, c, phase = rng.normal(0, [0.1, 0.25, 0.25, 3])
            wave = np.sin(a * t + b * y + c * x + phase)
            values += wave[..., None] * rng.normal(20, 8, 3)
        clips.append(np.clip(values + rng.normal(0, 4, values.shape), 0, 255).astype(np.uint8))
    return clips


sizes = st.integers(1, 19)


@st.composite
def clips(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = draw(st.integers(1, 3)), draw(sizes), draw(sizes), 3
    return rng.integers(0, 256, shape, dtype=np.uint8)


def mean_of(values):
    """Rounded to the nearest, as integers from 0 to 255 are shown; ties either way."""
    return sum(map(int, values)) / len(values)


@given(clips(), st.sampled_from([1, 2, 5, 8, 16]))
def test_block_means_are_those_of_a_loop(clip, size):
    coded = BlockMean(size)(clip)
    assert coded.dtype == np.uint8
    frames, height, width, _ = clip.shape
    blocks = 0
    for frame, top, left in itertools.product(
        range(frames), range(0, height, size), range(0, width, size)
    ):
        blocks += 1
        box = np.s_[frame, top : top + size, left : left + size]
        for channel in range(3):
            expected = mean_of(clip[box][..., channel].ravel())
            assert np.unique(coded[box][..., channel]).size == 1
            assert abs(int(coded[box][0, 0, channel]) - expected) <= 0.5 + 1e-9
    assert BlockMean(size).bits(frames, height, width) == 3 * 8 * blocks


@given(clips())
def test_image_mean_is_that_of_a_loop(clip):
    coded = ImageMean()(clip)
    assert coded.shape == clip.shape
    for frame, channel in itertools.product(range(len(clip)), range(3)):
        expected = mean_of(clip[frame, :, :, channel].ravel())
        assert np.abs(coded[frame, :, :, channel] - expected).max() <= 0.5 + 1e-9
    assert ImageMean().bits(*clip.shape[:3]) == 24 * len(clip)


def test_a_block_of_one_pixel_is_exact():
    (clip,) = photographs(1, 9, 7)
    np.testing.assert_array_equal(BlockMean(1)(clip), clip)


@given(clips(), st.sampled_from([Patch(1, 8, 8), Patch(2, 4, 3), Patch(1, 1, 1), Patch(3, 16, 2)]))
def test_cut_and_join_are_inverse_and_patches_are_boxes(clip, patch):
    patches = patch.cut(clip)
    frames, height, width, _ = clip.shape
    assert len(patches) == patch.count(frames, height, width)
    assert patches.shape[1] == patch.dim
    np.testing.assert_array_equal(patch.join(patches, frames, height, width), clip)
    # The first and the last patch, pixel by pixel, with the edge repeated.
    grid = patch.grid(frames, height, width)
    for number, corner in ((0, (0, 0, 0)), (len(patches) - 1, tuple(n - 1 for n in grid))):
        pixels = patches[number].reshape(*patch.shape, 3)
        for t, y, x in np.ndindex(patch.shape):
            source = (
                min(corner[0] * patch.frames + t, frames - 1),
                min(corner[1] * patch.height + y, height - 1),
                min(corner[2] * patch.width + x, width - 1),
            )
            np.testing.assert_array_equal(pixels[t, y, x], clip[source])


def test_pca_with_all_components_unquantised_is_exact():
    training = photographs(6, 16, 16, frames=2)
    for patch in (Patch(1, 4, 4), Patch(2, 4, 2)):
        coder = fit_patch_pca(training, components=patch.dim, bits=None, patch=patch)
        # Also on what it was not fitted to, and where patches stick out.
        for clip in (*training, *photographs(2, 10, 7, frames=3, seed=9)):
            np.testing.assert_array_equal(coder(clip), clip)
        assert coder.bits(1, 16, 16) is None


def test_pca_is_the_best_linear_code():
    training = photographs(12, 16, 16)
    patches = np.stack(
        [
            clip[0, top : top + 4, left : left + 4].ravel()
            for clip in training
            for top in range(0, 16, 4)
            for left in range(0, 16, 4)
        ]
    ).astype(float)
    centred = patches - patches.mean(0)
    spectrum = np.linalg.svd(centred, compute_uv=False) ** 2
    for components in (1, 3, 10):
        coder = fit_patch_pca(training, components=components, bits=None, patch=Patch(1, 4, 4))
        np.testing.assert_allclose(coder.basis @ coder.basis.T, np.eye(components), atol=1e-9)
        # Eckart and Young: what is lost is exactly the rest of the spectrum.
        rest = centred - centred @ coder.basis.T @ coder.basis
        assert (rest**2).sum() == pytest.approx(spectrum[components:].sum(), rel=1e-6, abs=1e-3)


@pytest.mark.parametrize("fit", ["pca", "dct"])
def test_more_bits_are_never_worse_on_what_was_fitted(fit):
    training = photographs(16, 24, 24)
    errors = []
    for bits in (0, 1, 2, 5, 9, TOKEN):
        if fit == "pca":
            coder = fit_patch_pca(training, components=8, bits=bits, patch=PATCH)
        else:
            coder = fit_block_dct(training, bits=bits, patch=PATCH)
        patches = np.concatenate([PATCH.cut(clip) for clip in training]).astype(float)
        coefficients = (patches - coder.mean) @ coder.basis.T
        columns = [q(c) for q, c in zip(coder.quantisers, coefficients.T, strict=True)]
        rebuilt = np.array(columns).T.reshape(len(patches), -1) @ coder.basis + coder.mean
        errors.append(((rebuilt - patches) ** 2).mean())
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(errors))
    assert errors[-1] < 0.3 * errors[0]


@pytest.mark.parametrize("patch", [Patch(1, 8, 8), Patch(2, 8, 8)])
@pytest.mark.parametrize("codes", [64000, 1 << 18])
def test_equal_bits_is_never_more_than_a_token_and_almost_a_token(patch, codes):
    training = photographs(12, 32, 32, frames=patch.frames)
    bits = math.log2(codes)
    rivals = (
        fit_patch_pca(training, components=6, bits=bits, patch=patch),
        fit_block_dct(training, bits=bits, patch=patch),
    )
    for coder in rivals:
        symbols = math.prod(len(q.values) for q in coder.quantisers)
        assert symbols <= codes
        assert coder.bits_per_patch == pytest.approx(math.log2(symbols))
        assert coder.bits_per_patch >= 0.98 * bits
        # 4 x 4 patches, the last ones cut; as many frames as a patch is deep, twice.
        assert coder.bits(2 * patch.frames, 32, 27) == pytest.approx(32 * math.log2(symbols))


def test_large_budgets_are_kept_too():
    # Several streams of codes: far more states than the allocation can carry exactly.
    small = Patch(1, 4, 4)
    coder = fit_block_dct(photographs(8, 32, 32), bits=48, patch=small)
    assert 47 < coder.bits_per_patch <= 48
    assert math.prod(len(q.values) for q in coder.quantisers) <= 2**48


def test_what_is_reproduced_takes_no_more_symbols_than_are_paid_for():
    training = photographs(12, 32, 32)
    bits = 5
    for coder in (
        fit_patch_pca(training, components=6, bits=bits, patch=PATCH),
        fit_block_dct(training, bits=bits, patch=PATCH),
    ):
        seen = {row.tobytes() for clip in training for row in PATCH.cut(coder(clip))}
        assert 1 < len(seen) <= 2**bits


def test_bits_of_zero_reproduce_the_mean():
    training = photographs(4, 16, 16)
    coder = fit_patch_pca(training, components=3, bits=0, patch=PATCH)
    mean = np.concatenate([PATCH.cut(clip) for clip in training]).mean(0)
    np.testing.assert_allclose(PATCH.cut(coder(training[0])), [np.rint(mean)] * 4, atol=1)
    assert coder.bits(1, 16, 16) == 0


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_dct_is_orthonormal_and_scipys(size):
    matrix = dct_matrix(size)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-12)
    np.testing.assert_allclose(
        matrix, scipy.fft.dct(np.eye(size), axis=0, norm="ortho"), atol=1e-12
    )


def test_block_dct_projects_on_cosines():
    training = photographs(12, 16, 16)
    coder = fit_block_dct(training, bits=TOKEN, patch=PATCH)
    np.testing.assert_allclose(coder.basis @ coder.basis.T, np.eye(len(coder.basis)), atol=1e-9)
    box = training[0][0, :8, :8].astype(float)
    coefficients = scipy.fft.dctn(box, norm="ortho").ravel()
    # Each of its coefficients is one of the transform's.
    ours = coder.basis @ box.ravel()
    assert all(np.isclose(coefficients, value).any() for value in ours)
    assert len(ours) <= TOKEN


def test_rivals_are_ranked_as_they_should_be():
    training = photographs(24, 32, 32)
    unseen = photographs(8, 32, 32, seed=1)

    def error(coder):
        return np.mean([mse(clip, coder(clip)) for clip in unseen])

    image, large, small, pca, dct = fit_baselines(training, patch=PATCH, bits=TOKEN)
    assert [c.label() for c in (image, large, small, pca, dct)] == [
        "image mean",
        "16x16 block mean",
        "8x8 block mean",
        "6-component PCA",
        "8x8 block DCT",
    ]
    assert error(image) > error(large) > error(small) > error(pca)
    assert error(small) > error(dct)
    floats = fit_patch_pca(training, components=6, bits=None, patch=PATCH)
    assert error(pca) > error(floats)


def test_without_bits_there_is_no_dct():
    rivals = fit_baselines(photographs(4, 16, 16), patch=PATCH, bits=None, components=4)
    assert [rival.label() for rival in rivals][3:] == ["4-component PCA, floats"]
    assert rivals[-1].bits(1, 16, 16) is None


def test_only_training_material_is_looked_at():
    training = photographs(4, 16, 16)
    coder = fit_patch_pca(training, components=6, bits=8, patch=PATCH)
    values = [q.values.copy() for q in coder.quantisers]
    coder(photographs(1, 16, 16, seed=5)[0])
    assert all(np.array_equal(q.values, v) for q, v in zip(coder.quantisers, values, strict=True))


def test_training_material_may_have_any_sizes():
    training = [*photographs(2, 16, 16), *photographs(2, 9, 30, frames=3), *photographs(1, 40, 8)]
    # Several times: run-time types look at one item of a sequence, a random one.
    for _ in range(5):
        coder = fit_patch_pca(training, components=6, bits=8, patch=PATCH)
    assert coder(training[2]).shape == (3, 9, 30, 3)


def test_wrong_requests_say_what_is_possible():
    training = photographs(2, 16, 16)
    with pytest.raises(ValueError, match=r"1\.\.192 principal components, asked for 193"):
        fit_patch_pca(training, components=193, bits=8, patch=PATCH)
    with pytest.raises(ValueError, match="at least one"):
        fit_patch_pca([], components=6, bits=8, patch=PATCH)
    with pytest.raises(ValueError, match="not negative"):
        fit_block_dct(training, bits=-1, patch=PATCH)
    with pytest.raises(ValueError, match="at least one pixel"):
        BlockMean(0)
    with pytest.raises(ValueError, match="at least one pixel"):
        Patch(0, 8, 8)


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=12))
def test_quantisers_are_lloyd_max_or_better_than_a_step_before(numbers):
    data = np.array(numbers, float)
    fitted = fit_quantisers(data, 16)
    errors = []
    for quantiser in fitted:
        nearest = [min((x - v) ** 2 for v in quantiser.values) for x in data]
        assert quantiser.error == pytest.approx(np.mean(nearest), abs=1e-9)
        np.testing.assert_allclose((data - quantiser(data)) ** 2, nearest, atol=1e-9)
        assert np.all(np.diff(quantiser.values) > 0)
        errors.append(quantiser.error)
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(errors))
    assert errors[0] == pytest.approx(data.var())
    if len(set(numbers)) <= 16:
        assert errors[-1] == pytest.approx(0, abs=1e-9)


def test_quantiser_of_a_normal_distribution_is_max():
    # Max 1960, table I: mean squared error of the best quantisers of a unit normal.
    data = scipy.stats.norm.ppf((np.arange(200_000) + 0.5) / 200_000)
    fitted = {len(q.values): q.error for q in fit_quantisers(data, 16)}
    for levels, error in ((2, 0.3634), (4, 0.1175), (8, 0.03454), (16, 0.009497)):
        assert fitted[levels] == pytest.approx(error, rel=0.02)


@settings(max_examples=50)
@given(
    st.lists(
        st.lists(st.floats(0.01, 1), min_size=1, max_size=5).map(lambda xs: sorted(xs)[::-1]),
        min_size=1,
        max_size=4,
    ),
    st.floats(0, 7),
)
def test_allocation_is_that_of_exhaustive_search(errors, bits):
    choices = [
        [Quantiser(np.arange(n, dtype=float), error) for n, error in enumerate(curve, start=1)]
        for curve in errors
    ]
    best = min(
        sum(q.error for q in picks)
        for picks in itertools.product(*choices)
        if math.prod(len(q.values) for q in picks) <= 2**bits * (1 + 1e-9)
    )
    chosen = allocate(choices, bits)
    assert math.prod(len(q.values) for q in chosen) <= 2**bits * (1 + 1e-9)
    assert sum(q.error for q in chosen) == pytest.approx(best)


def test_allocation_of_a_large_budget_is_near_the_best():
    # More states than are carried exactly. The best possible error is bounded from below by its
    # Lagrangian: for any price of a bit, the cheapest choices less the price of the budget.
    variances, bits = np.random.default_rng(0).gamma(0.5, 10.0, 24), 40
    choices = [
        [Quantiser(np.arange(n, dtype=float), variance / n**2) for n in range(1, 17)]
        for variance in variances
    ]
    bound = max(
        sum(min(q.error + price * math.log2(len(q.values)) for q in options) for options in choices)
        - price * bits
        for price in np.geomspace(1e-3, 1e2, 500)
    )
    chosen = allocate(choices, bits)
    assert math.prod(len(q.values) for q in chosen) <= 2**bits
    assert bound <= sum(q.error for q in chosen) <= 1.01 * bound
