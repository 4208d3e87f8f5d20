"""The average of the weights over the steps."""

import itertools

import jax
import numpy as np
import pytest
from tiny_training import OPTIMIZER, Counted, make_batch, quantizers, tiny_model

from elastictok.models import fingerprint, load
from elastictok.train import Average, data_mesh, fit

FIXED = {
    "optimizer": OPTIMIZER,
    "quantizer_weight": 0.5,
    "progress": False,
    "log_every": 1,
    "mesh": data_mesh(jax.local_devices()[:1]),
}


def arrays(model):
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(model)]


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["GaussianVAE", "Residual"])
def test_it_is_the_formula(tmp_path, name):
    """Against runs of one, two, ... steps without an average; what is not trained is the last."""
    decay, model = 0.5, tiny_model(quantizers()[name])
    expected = arrays(model)
    for step in range(4):
        after = arrays(fit(model, Counted(), steps=step + 1, **FIXED))
        rate = min(decay, (1 + step) / (10 + step))
        expected = [rate * old + (1 - rate) * new for old, new in zip(expected, after, strict=True)]
    out = tmp_path / "run"
    found = fit(model, Counted(), steps=4, out=out, average=Average(decay), **FIXED)
    trained = {id(leaf) for leaf in jax.tree.leaves(found)} - {
        id(leaf) for leaf in jax.tree.leaves(found.quantizer)
    }
    for leaf, want in zip(jax.tree.leaves(found), expected, strict=True):
        if id(leaf) in trained:
            np.testing.assert_allclose(leaf, want, rtol=1e-5, atol=1e-7)
    last = fit(model, Counted(), steps=4, **FIXED)
    for a, b in zip(arrays(found.quantizer), arrays(last.quantizer), strict=True):
        np.testing.assert_array_equal(a, b)
    assert fingerprint(load(out)) == fingerprint(found)


def test_a_resumed_run_goes_on_with_it(tmp_path):
    whole = fit(tiny_model(), Counted(), steps=4, average=Average(0.9), **FIXED)
    out = tmp_path / "run"
    fit(tiny_model(), Counted(), steps=2, out=out, average=Average(0.9), **FIXED)
    parts = fit(
        tiny_model(seed=4), Counted(), steps=4, out=out, average=Average(0.9), resume=True, **FIXED
    )
    for a, b in zip(arrays(whole), arrays(parts), strict=True):
        np.testing.assert_array_equal(a, b)


def test_it_trains_as_without():
    seen = []

    def validate(model):
        seen.append(model)
        return {"loss": 0.0}

    data = itertools.repeat(make_batch(0))
    averaged = fit(tiny_model(), data, steps=3, average=Average(0.0), **FIXED)
    plain = fit(tiny_model(), data, steps=3, validate=validate, **FIXED)
    for a, b in zip(arrays(averaged), arrays(plain), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_decays_that_are_none(decay):
    with pytest.raises(ValueError, match="at least 0 and less than 1"):
        Average(decay)
