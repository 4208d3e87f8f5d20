"""Settings shared by every test: CPU only, one hypothesis profile."""

import os

# Before any test imports jax: the suite is about results, which every machine must agree on.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from hypothesis import HealthCheck, settings

# deadline=None: the first call of a jitted function compiles, and is hundreds of times slower than
# the next. Derandomised under CI, so that a red run can be repeated.
settings.register_profile(
    "elastictok",
    deadline=None,
    derandomize="CI" in os.environ,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("elastictok")
