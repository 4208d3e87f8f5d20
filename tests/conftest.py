"""Settings shared by every test: CPU only, one hypothesis profile."""

import os
import sys
from pathlib import Path

# Before any test imports jax: the suite is about results, which every machine must agree on.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pytest
from hypothesis import HealthCheck, settings

# deadline=None: the first call of a jitted function compiles, and is hundreds of times slower than
# the next. Derandomised under CI, so that a red run can be repeated; there, what ran once with all
# examples is run in other environments with fewer.
settings.register_profile(
    "elastictok",
    deadline=None,
    derandomize="CI" in os.environ,
    max_examples=int(os.environ.get("ELASTICTOK_EXAMPLES", "25")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("elastictok")

# Of the 65,530 that Linux allows a process.
_MAPPINGS = 20_000


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """A compiled program takes some twenty memory mappings, and a process that has no more to take
    ends by a segmentation fault: after a module, forget the programs if there are many."""
    yield
    mappings = Path("/proc/self/maps")
    if "jax" in sys.modules and mappings.exists():
        with mappings.open() as lines:
            if sum(1 for _ in lines) > _MAPPINGS:
                sys.modules["jax"].clear_caches()
