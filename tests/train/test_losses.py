import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from elastictok.train import L1, MSE, mean_over_valid

SHAPE = (2, 3, 1, 2, 2, 3)
PIXELS = hnp.arrays(np.float32, SHAPE, elements=st.floats(-1, 1, width=32))
VALID = hnp.arrays(bool, SHAPE[:2])


def loop(prediction, target, valid, distance):
    """Mean over valid blocks of the mean over pixels, one number at a time."""
    means = []
    for index in np.ndindex(valid.shape):
        if valid[index]:
            pairs = zip(prediction[index].ravel(), target[index].ravel(), strict=True)
            values = [distance(float(a), float(b)) for a, b in pairs]
            means.append(sum(values) / len(values))
    return sum(means) / len(means) if means else 0.0


@pytest.mark.parametrize(
    ("loss", "distance"),
    [(MSE(), lambda a, b: (a - b) ** 2), (L1(), lambda a, b: abs(a - b))],
    ids=["MSE", "L1"],
)
@given(prediction=PIXELS, target=PIXELS, valid=VALID)
def test_equal_to_a_loop(loss, distance, prediction, target, valid):
    found = loss(jnp.asarray(prediction), jnp.asarray(target), jnp.asarray(valid))
    assert float(found) == pytest.approx(loop(prediction, target, valid, distance), abs=1e-6)


@given(values=hnp.arrays(np.float32, (3, 4), elements=st.floats(-9, 9, width=32)), valid=...)
def test_mean_over_valid_ignores_nan_in_padding(values, valid: bool):
    mask = np.zeros((3, 4), bool)
    mask[1] = valid
    values[2] = np.nan

    def mean(x):
        return mean_over_valid(x, jnp.asarray(mask))

    value, gradient = jax.value_and_grad(mean)(jnp.asarray(values))
    assert float(value) == pytest.approx(values[1].mean() if valid else 0.0, abs=1e-5)
    assert np.array_equal(np.asarray(gradient), mask / max(mask.sum(), 1))
