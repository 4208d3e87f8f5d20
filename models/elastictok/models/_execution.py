"""How a transformer's layers are carried out: where its arrays lie, and by which attention."""

import abc
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from elastictok.attention import AbstractBackend

Weights = TypeVar("Weights")


class AbstractExecution(eqx.Module):
    """What a forward pass is told besides its inputs. It never changes what is computed.

    - `remat`: which values of a layer the backward pass keeps, one of `jax.checkpoint_policies`;
        None leaves it to the model's `remat`, which keeps each layer's input alone. The output of
        attention and its log-sum-exp are named `"attention"`:
        `jax.checkpoint_policies.save_only_these_names("attention")` computes all again but those.
    - `batch_axes`: the mesh axes that a batch is split over, None without a mesh:
        `jax.vmap(model, spmd_axis_name=execution.batch_axes)`.
    """

    remat: eqx.AbstractVar[Callable[..., Any] | None]
    batch_axes: eqx.AbstractVar[tuple[str, ...] | None]

    @abc.abstractmethod
    def backend(self) -> AbstractBackend | None:
        """That computes attention; None for the best one that can run the call."""

    def product(
        self, x: Float[Array, "tokens in_dim"], weight: Float[Array, "in_dim out_dim"]
    ) -> Float[Array, "tokens out_dim"]:
        """Tokens times one of a layer's matrices, accumulated and returned in float32."""
        return jnp.matmul(x, weight.astype(x.dtype), preferred_element_type=jnp.float32)

    def stream(self, x: Float[Array, "tokens dim"]) -> Float[Array, "tokens dim"]:
        """The residual stream, where it is to lie: where it is. Called between layers."""
        return x

    def weights(self, layer: Weights) -> Weights:
        """A layer's weights, where they are to lie while it is computed: where they are."""
        return layer


class Local(AbstractExecution):
    """Everything where it is: on one device, or wherever the compiler puts it.

    - `implementation`: of attention; None takes the best backend that can run the call.
    """

    implementation: AbstractBackend | None = eqx.field(static=True, default=None)
    remat: Callable[..., Any] | None = eqx.field(static=True, default=None)
    batch_axes: tuple[str, ...] | None = eqx.field(static=True, default=None)

    def backend(self) -> AbstractBackend | None:
        return self.implementation


LOCAL = Local()
