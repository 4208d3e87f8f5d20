"""The checks for masks and backends of one's own: they pass what is right and find what is not."""

import equinox as eqx
import numpy as np
import pytest

from elastictok.attention import (
    AbstractBackend,
    BlockCausal,
    Causal,
    KeyValid,
    Reference,
    Segments,
    SlidingBlocks,
    backends,
)
from elastictok.attention import _registry as registry
from elastictok.attention.testing import check_backend, check_mask


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(2))
def test_every_backend_passes(backend, seed):
    assert check_backend(registry._BACKENDS[backend], cases=6, seed=seed) >= 1


def test_there_are_backends_to_check():
    able = [name for name, reasons in backends().items() if not reasons]
    assert {"xla", "reference", "pallas-tpu-interpreted", "loop-over-heads"} <= set(able)


class Wrong(AbstractBackend):
    """The reference with a mistake."""

    scale: float | int = eqx.field(static=True, default=1)
    shift: float | int = eqx.field(static=True, default=0)
    limit: int = eqx.field(static=True, default=10**6)
    name: str = eqx.field(static=True, default="wrong")

    def reasons_against(self, q, k, v, mask):
        return ["too long"] if q.shape[0] > self.limit else []

    def __call__(self, q, k, v, mask, *, scale):
        return Reference()(q, k, v, mask, scale=scale * self.scale) + self.shift


def test_a_backend_that_is_a_little_wrong_is_found():
    assert check_backend(Wrong(), cases=3, longest=40, dtypes=["float32"]) == 3
    with pytest.raises(AssertionError, match=r"output of q \(.*the limit is 2e-06"):
        check_backend(Wrong(scale=1.0001), cases=3, longest=40, dtypes=["float32"])
    with pytest.raises(AssertionError, match="of q"):
        check_backend(Wrong(shift=float("nan")), cases=1, longest=40)
    with pytest.raises(AssertionError, match="reasons against every one of 2 calls"):
        check_backend(Wrong(limit=0), cases=2)


@pytest.mark.parametrize(
    "mask",
    [
        Causal(3),
        BlockCausal(5, 2) & KeyValid(np.arange(41) % 3 > 0),
        SlidingBlocks(4, 2) & Segments(np.arange(29) // 7 % 3, np.arange(41) // 9 % 3),
    ],
    ids=["causal", "blocks", "sliding"],
)
def test_a_right_mask_passes(mask):
    check_mask(mask, 29, 41)


class LateBounds(Causal):
    def key_bounds(self, queries, keys, tile):
        start, stop = super().key_bounds(queries, keys, tile)
        return start + 1, stop


class StrictPredicate(Causal):
    def sees(self, query, key):
        return key < query


class BoldRanges(Causal):
    def sees_all(self, query, key):
        return key[0] <= query[0]


class TimidRanges(Causal):
    def may_see(self, query, key):
        return key[1] <= query[1]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (LateBounds(), "key_bounds with tile 1: .* first at query 0 and key 0, .* visible"),
        (StrictPredicate(), "of_queries, of_keys and sees: disagrees .* at 20 of 480 pairs"),
        (BoldRanges(), "sees_all with tile 3: .* hidden"),
        (TimidRanges(), "may_see with tile"),
    ],
    ids=["bounds", "predicate", "all", "may"],
)
def test_a_wrong_mask_is_found_and_located(mask, message):
    with pytest.raises(AssertionError, match=message):
        check_mask(mask, 20, 24)
