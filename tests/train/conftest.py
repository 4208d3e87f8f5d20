"""The folder's helpers are a module of their own, so that subprocesses can import them too."""

import sys
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def compiled_before(tmp_path_factory):
    """Lets one test use what another one has compiled: most train the same tiny model."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    values = (str(tmp_path_factory.mktemp("compiled")), 0.5, -1)
    for name, value in zip(names, values, strict=True):
        jax.config.update(name, value)
    jax_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()
