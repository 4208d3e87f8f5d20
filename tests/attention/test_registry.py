"""Choosing a backend: by name, by object, by default; and what the errors say."""

import os
import subprocess
import sys
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from elastictok.attention import (
    XLA,
    AbstractBackend,
    BlockCausal,
    Full,
    Reference,
    attention,
    backends,
    register,
)

X = jnp.ones((4, 1, 80))


class Picky(AbstractBackend):
    """Refuses what it is told to refuse, and returns a number that tells it from the others."""

    name: str = eqx.field(static=True, default="picky")
    limit: int = eqx.field(static=True, default=128)

    def reasons_against(self, q, k, v, mask):
        reasons = (
            [f"head_dim is {q.shape[2]}, above {self.limit}"] if q.shape[2] > self.limit else []
        )
        return reasons + (["it is for long sequences"] if q.shape[0] < 5 else [])

    def __call__(self, q, k, v, mask, *, scale):
        return jnp.full_like(q, 7.0)


@pytest.fixture
def registry(monkeypatch):
    from elastictok.attention import _registry

    own = {name: _registry._BACKENDS[name] for name in ("xla", "reference")}
    monkeypatch.setattr(_registry, "_BACKENDS", own)
    monkeypatch.setattr(_registry, "_SAID", set())


def test_what_comes_with_the_package():
    known = backends()
    assert list(known)[:4] == ["pallas_tpu", "cudnn", "xla", "reference"]
    assert known["xla"] == known["reference"] == []
    assert "runs on TPUs and this machine's devices are 'cpu'" in known["pallas_tpu"][0]
    assert "PallasTPU(interpret=True)" in known["pallas_tpu"][0]
    assert "runs on NVIDIA GPUs and this machine's devices are 'cpu'" in known["cudnn"][0]


def test_a_registered_backend_runs_by_name_and_in_its_place(registry):
    register(Picky())
    assert list(backends())[-1] == "picky"
    longer = jnp.ones((6, 1, 80))
    assert float(attention(longer, longer, longer, Full())[0, 0, 0]) == pytest.approx(1)
    assert float(attention(longer, longer, longer, Full(), implementation="picky")[0, 0, 0]) == 7
    register(Picky(name="first"), before="xla")
    assert list(backends())[:2] == ["first", "xla"]
    assert float(attention(longer, longer, longer, Full())[0, 0, 0]) == 7


def test_an_object_runs_unregistered():
    longer = jnp.ones((6, 1, 80))
    assert float(attention(longer, longer, longer, Full(), implementation=Picky())[0, 0, 0]) == 7
    with pytest.raises(RuntimeError, match="it is for long sequences"):
        attention(X, X, X, Full(), implementation=Picky())


def test_naming_one_that_cannot_run_gives_every_reason(registry):
    register(Picky(limit=32))
    assert backends()["picky"] == ["head_dim is 64, above 32"]
    with pytest.raises(RuntimeError, match=r"'picky' cannot run") as error:
        attention(X, X, X, Full(), implementation="picky")
    assert "head_dim is 80, above 32" in str(error.value)
    assert "it is for long sequences" in str(error.value)


def test_the_default_falls_back_and_says_so_once(registry):
    register(Picky(), before="xla")
    with pytest.warns(RuntimeWarning, match=r"falls back to 'xla'(.|\n)*picky: it is for long"):
        attention(X, X, X, Full())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(X, X, X, BlockCausal(2))


def test_one_that_cannot_run_on_this_machine_is_passed_over_silently(registry):
    register(Picky(limit=32), before="xla")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(X, X, X, Full())


class Half(AbstractBackend):
    """For bfloat16 and nothing else, and a specialist or not."""

    name: str = eqx.field(static=True, default="half")
    specialist: bool = eqx.field(static=True, default=False)

    def reasons_against(self, q, k, v, mask):
        return [f"q is {q.dtype}"] if q.dtype != jnp.bfloat16 else []

    def is_specialist(self):
        return self.specialist

    def __call__(self, q, k, v, mask, *, scale):
        return jnp.full_like(q, 7.0)


def test_one_for_a_single_type_can_run_on_this_machine(registry):
    register(Half(), before="xla")
    assert backends()["half"] == []
    with pytest.warns(RuntimeWarning, match=r"falls back to 'xla'(.|\n)*half: q is float32"):
        attention(X, X, X, Full())


def test_a_specialist_is_preferred_where_it_can_and_passed_over_silently_elsewhere(registry):
    register(Half(specialist=True), before="xla")
    assert not XLA().is_specialist()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(attention(X, X, X, Full())[0, 0, 0]) == pytest.approx(1)
        half = X.astype(jnp.bfloat16)
        assert float(attention(half, half, half, Full())[0, 0, 0]) == 7
    with pytest.raises(RuntimeError, match="q is float32"):
        attention(X, X, X, Full(), implementation="half")


def test_when_nothing_can_run(registry):
    wide = jax.ShapeDtypeStruct((4, 1, 8), jnp.float64)
    assert "q is float64" in XLA().reasons_against(wide, wide, wide, Full())[0]
    assert len(Reference().reasons_against(wide, wide, wide, Full())) == 3
    with jax.enable_x64(True):
        x = jnp.ones((4, 1, 8), jnp.float64)
        with pytest.raises(
            RuntimeError, match=r"xla: q is float64.*(.|\n)*reference: q is float64"
        ):
            attention(x, x, x, Full())


def test_names_that_are_unknown_or_taken(registry):
    with pytest.raises(
        ValueError, match=r"no attention backend named 'refrence'.*mean 'reference'"
    ):
        attention(X, X, X, Full(), implementation="refrence")
    with pytest.raises(ValueError, match="a backend named 'xla' already"):
        register(XLA())
    with pytest.raises(ValueError, match="no attention backend named 'nobody'"):
        register(Picky(), before="nobody")


# Without the import hook of the test run, as users run it.
PROGRAM = """
import jax.numpy as jnp
from elastictok.attention import BlockCausal, KeyValid, attention
def shaped(*shapes):
    return [jnp.zeros(shape) for shape in shapes]
for arrays, mask in [
    (shaped((4, 3, 8), (4, 2, 8), (4, 2, 8)), BlockCausal(2)),
    (shaped((4, 2, 8), (4, 2, 16), (4, 2, 16)), BlockCausal(2)),
    (shaped((4, 2, 8), (4, 2, 8), (5, 2, 8)), BlockCausal(2)),
    (shaped((2, 4, 2, 8), (2, 4, 2, 8), (2, 4, 2, 8)), BlockCausal(2)),
    (shaped((4, 2, 8), (4, 2, 8), (4, 2, 8)), KeyValid(jnp.ones(3, bool))),
]:
    try:
        attention(*arrays, mask)
    except Exception as error:
        print(type(error).__name__, error)
"""


def run(**environment: str) -> str:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_errors_name_the_value_and_the_remedy():
    lines = run(ELASTICTOK_TYPECHECK="0").splitlines()
    assert len(lines) == 5
    assert all(line.startswith("ValueError") for line in lines)
    assert "3 heads and k 2; the number of key heads must divide" in lines[0]
    assert "q has head_dim 8 and k 16" in lines[1]
    assert "k has shape (4, 2, 8) and v (5, 2, 8)" in lines[2]
    assert "use jax.vmap for a batch" in lines[3]
    assert "KeyValid.valid has shape (3,) but there are 4 keys" in lines[4]


def test_run_time_types_are_the_users_choice():
    assert run(ELASTICTOK_TYPECHECK="1").count("TypeCheckError") == 3
