"""Which backends there are, and which one runs a call."""

import difflib
import warnings

import jax
import jax.numpy as jnp

from elastictok.attention._backend import AbstractBackend, Shaped
from elastictok.attention._cudnn import CuDNN
from elastictok.attention._masks import AbstractMask, Full
from elastictok.attention._pallas_tpu import PallasTPU
from elastictok.attention._reference import Reference
from elastictok.attention._xla import XLA

# In the order in which the default tries them. A new backend of this package: its own file, and one
# entry here, before those that it should be preferred to.
_BACKENDS: dict[str, AbstractBackend] = {
    backend.name: backend for backend in (PallasTPU(), CuDNN(), XLA(), Reference())
}
_SAID: set[tuple[str, ...]] = set()


def register(backend: AbstractBackend, *, before: str | None = None) -> None:
    """Makes a backend known by its name.

    **Arguments:**

    - `backend`: the backend.
    - `before`: the name of the backend that the default tries after this one. Default: it comes
      last, and runs only when named.

    **Raises:**

    `ValueError` if the name is taken, or `before` names no backend.
    """
    if backend.name in _BACKENDS:
        raise ValueError(
            f"there is a backend named {backend.name!r} already; choose another name than "
            f"{', '.join(_BACKENDS)}"
        )
    entries = list(_BACKENDS.items())
    place = len(entries) if before is None else list(_BACKENDS).index(_named(before).name)
    entries.insert(place, (backend.name, backend))
    _BACKENDS.clear()
    _BACKENDS.update(entries)


def backends() -> dict[str, list[str]]:
    """Every backend's name, in the order in which the default tries them, and the reasons why it
    cannot run on this machine: an empty list if it can.
    """
    return {name: _reasons_here(backend) for name, backend in _BACKENDS.items()}


def choose(
    implementation: str | AbstractBackend | None,
    q: Shaped,
    k: Shaped,
    v: Shaped,
    mask: AbstractMask,
) -> AbstractBackend:
    """The backend that runs this call."""
    if implementation is None:
        return _default(q, k, v, mask)
    if isinstance(implementation, str):
        implementation = _named(implementation)
    reasons = implementation.reasons_against(q, k, v, mask)
    if reasons:
        raise RuntimeError(
            f"attention backend {implementation.name!r} cannot run this call:"
            + "".join(f"\n  - {reason}" for reason in reasons)
            + "\nWithout implementation=, the first backend that can is taken."
        )
    return implementation


def _default(q: Shaped, k: Shaped, v: Shaped, mask: AbstractMask) -> AbstractBackend:
    refused: dict[str, list[str]] = {}
    for name, backend in _BACKENDS.items():
        reasons = backend.reasons_against(q, k, v, mask)
        if not reasons:
            _say_once(refused, name)
            return backend
        refused[name] = reasons
    raise RuntimeError("no attention backend can run this call:" + _listed(refused))


def _say_once(refused: dict[str, list[str]], chosen: str) -> None:
    """That a backend cannot run on this machine is no news, nor is what a specialist refuses; that
    another refuses this call is."""
    news = {
        name: why
        for name, why in refused.items()
        if not (_BACKENDS[name].is_specialist() or _reasons_here(_BACKENDS[name]))
    }
    message = (chosen, *(f"{name}: {reason}" for name, why in news.items() for reason in why))
    if news and message not in _SAID:
        _SAID.add(message)
        warnings.warn(
            f"attention falls back to {chosen!r}:" + _listed(news), RuntimeWarning, stacklevel=4
        )


def _listed(reasons: dict[str, list[str]]) -> str:
    return "".join(f"\n  - {name}: {reason}" for name, why in reasons.items() for reason in why)


def _reasons_here(backend: AbstractBackend) -> list[str]:
    """The reasons against the plainest call that there is, in the type that suits the backend best:
    one for bfloat16 alone can run on this machine."""
    plainest = (jax.ShapeDtypeStruct((128, 1, 64), t) for t in (jnp.float32, jnp.bfloat16))
    return min((backend.reasons_against(x, x, x, Full()) for x in plainest), key=len)


def _named(name: str) -> AbstractBackend:
    if name not in _BACKENDS:
        close = difflib.get_close_matches(name, _BACKENDS, n=1)
        raise ValueError(
            f"there is no attention backend named {name!r}"
            + (f"; did you mean {close[0]!r}?" if close else "")
            + f" Known: {', '.join(_BACKENDS)}"
        )
    return _BACKENDS[name]
