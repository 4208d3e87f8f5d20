"""Optax transformations with the settings that train these models."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, Int, PyTree
from optax.contrib import MuonDimensionNumbers

from elastictok.models import Linear


def _ramp(step: Int[ArrayLike, ""], warmup: int) -> Float[Array, ""]:
    # The first step (0) already moves: a rate of zero would waste it.
    return jnp.minimum(1.0, (jnp.asarray(step) + 1.0) / max(warmup, 1))


def _check_warmup(warmup: int) -> None:
    if warmup < 0:
        raise ValueError(f"warmup is {warmup} steps; it must be 0 or more")


class Constant(eqx.Module):
    """Factor of the learning rate: a linear warm-up, then 1."""

    warmup: int = eqx.field(static=True, default=0)

    def __check_init__(self) -> None:
        _check_warmup(self.warmup)

    def __call__(self, step: Int[ArrayLike, ""]) -> Float[Array, ""]:
        return _ramp(step, self.warmup)


class Cosine(eqx.Module):
    """Factor of the learning rate: a linear warm-up, then half a cosine from 1 down to `final`.

    `steps` counts from the start of the run, the warm-up included; afterwards it stays at `final`.
    """

    steps: int = eqx.field(static=True)
    warmup: int = eqx.field(static=True, default=0)
    final: float | int = eqx.field(static=True, default=0.0)

    def __check_init__(self) -> None:
        _check_warmup(self.warmup)
        if self.steps <= self.warmup:
            raise ValueError(
                f"a cosine over {self.steps} steps has no room for {self.warmup} steps of warm-up; "
                "give more steps or a shorter warm-up"
            )
        if not 0 <= self.final <= 1:
            raise ValueError(f"final is {self.final}; it is a factor between 0 and 1")

    def __call__(self, step: Int[ArrayLike, ""]) -> Float[Array, ""]:
        done = (jnp.asarray(step) - self.warmup) / (self.steps - self.warmup)
        wave = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(done, 0, 1)))
        return _ramp(step, self.warmup) * (self.final + (1 - self.final) * wave)


_CONSTANT = Constant()


def adamw(
    learning_rate: float | int,
    *,
    schedule: optax.Schedule = _CONSTANT,
    weight_decay: float | int = 1e-4,
    b1: float = 0.9,
    b2: float = 0.999,
    clip: float | int = 1.0,
) -> optax.GradientTransformation:
    """AdamW behind clipping by the global norm.

    **Arguments:**

    - `learning_rate`: the peak. The released models were trained with 1e-4, constant after 2000
        steps of warm-up; a narrow model (`dim` 128) takes 3e-3.
    - `schedule`: its factor at each step; `Constant()` by default.
    - `weight_decay`: of every trained array, multiplied by the learning rate.
    - `b1`, `b2`: decay of the averages of gradients and of their squares.
    - `clip`: largest global norm of the gradient; `math.inf` clips nothing.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(_scaled(learning_rate, schedule), b1=b1, b2=b2, weight_decay=weight_decay),
    )


def muon(
    learning_rate: float | int = 0.02,
    *,
    adam_learning_rate: float | int = 3e-3,
    schedule: optax.Schedule = _CONSTANT,
    weight_decay: float | int = 0.0,
    beta: float = 0.95,
    b1: float = 0.9,
    b2: float = 0.999,
    clip: float | int = 1.0,
) -> optax.GradientTransformation:
    """Muon for the matrices and Adam for the rest, behind clipping by the global norm.

    Muon (https://github.com/KellerJordan/Muon) makes the momentum of each matrix orthogonal. Which
    arrays are matrices, `matrices` says; norms and embeddings take Adam.

    **Arguments:**

    - `learning_rate`, `adam_learning_rate`: the peaks of the two.
    - `schedule`: the factor of both at each step; `Constant()` by default.
    - `weight_decay`: of every trained array, multiplied by its learning rate.
    - `beta`: decay of Muon's momentum.
    - `b1`, `b2`: Adam's.
    - `clip`: largest global norm of the gradient; `math.inf` clips nothing.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.contrib.muon(
            _scaled(learning_rate, schedule),
            beta=beta,
            weight_decay=weight_decay,
            adam_b1=b1,
            adam_b2=b2,
            adam_weight_decay=weight_decay,
            adam_learning_rate=_scaled(adam_learning_rate, schedule),
            muon_weight_dimension_numbers=matrices,
        ),
    )


def matrices(params: PyTree) -> PyTree:
    """Which arrays Muon takes: the weights of every `Linear`, and other arrays of three axes.

    Those of three axes are `[layers in out]`, each layer a matrix by itself. The usual advice is to
    leave the projections in and out to Adam. Here they are patches and latents, not tables of
    words, and with them the demo's model needed a third of the steps for the same error.
    """

    def choose(node: PyTree) -> PyTree:
        if not isinstance(node, Linear):
            return _MATRICES[3] if node.ndim == 3 else None
        return eqx.tree_at(lambda linear: linear.weight, node, _MATRICES[node.weight.ndim])

    return jax.tree.map(choose, params, is_leaf=lambda node: isinstance(node, Linear))


_MATRICES = {axes: MuonDimensionNumbers(axes - 2, axes - 1) for axes in (2, 3)}


def _scaled(peak: float | int, schedule: optax.Schedule) -> optax.Schedule:
    return lambda step: peak * schedule(step)
