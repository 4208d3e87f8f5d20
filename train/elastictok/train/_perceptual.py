"""A perceptual distance as a training loss: one random frame at a time."""

from collections.abc import Callable
from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ._losses import AbstractLoss


@final
class Perceptual(AbstractLoss):
    """A distance of pictures, such as LPIPS, at random frames of random valid blocks.

    The recipe of arXiv 2410.08368 is `Sum((1.0, MSE()), (0.1, Perceptual(load_lpips(path))))` with
    VGG16. It draws one frame for each device and step; this class one for each sequence, so that a
    run does not depend on the number of devices.

    Frames that are shrunk are smoothed on the way (`antialias`). Without, every pixel of the small
    frame would be made of the same four pixels of the large one in each step: those in between
    would have no gradient, and what is too fine for the small frame would fold into patterns that
    are not there.

    **Arguments:**

    - `distance`: of `(prediction, target)`, two `f32[height width 3]` in [-1, 1], as one number. No
        gradient reaches its arrays if it is `LPIPS`.
    - `samples`: frames per sequence and step, each of a block drawn anew.
    - `size`: pixels of the short side that frames are brought to, both ways. LPIPS was trained on
        patches of 64 pixels and its networks on 224.
    """

    distance: Callable[..., Float[Array, ""]]
    samples: int = eqx.field(static=True, default=1)
    size: int = eqx.field(static=True, default=224)

    def __check_init__(self) -> None:
        for name, value in (("samples", self.samples), ("size", self.size)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")

    @property
    def whole_frames(self) -> bool:
        return True

    def __call__(
        self,
        prediction: Float[Array, "batch blocks frames height width 3"],
        target: Float[Array, "batch blocks frames height width 3"],
        valid: Bool[Array, "batch blocks"],
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, ""]:
        """The mean over the sequences that have a valid block; 0 if there is none.

        **Raises:** `ValueError` without a key.
        """
        if key is None:
            raise ValueError("Perceptual looks at random frames: call it with a key, of this step")
        keys = jax.random.split(key, valid.shape[0])
        values = jax.vmap(self._sequence)(prediction, target, valid, keys)
        seen = jnp.any(valid, axis=1)
        return jnp.sum(jnp.where(seen, values, 0)) / jnp.maximum(jnp.sum(seen), 1)

    def _sequence(
        self,
        prediction: Float[Array, "blocks frames height width 3"],
        target: Float[Array, "blocks frames height width 3"],
        valid: Bool[Array, "blocks"],
        key: Key[Array, ""],
    ) -> Float[Array, ""]:
        blocks, frames = _draw(key, valid, prediction.shape[1], self.samples)
        some = jnp.any(valid)

        def one(block: Int[Array, ""], frame: Int[Array, ""]) -> Float[Array, ""]:
            # A sequence of padding alone is looked at like any other, and its distance left out of
            # the mean. This keeps a gradient that is not finite from coming back all the same.
            ours = jnp.where(some, prediction[block, frame], 0)
            return self.distance(_resize(ours, self.size), _resize(target[block, frame], self.size))

        return jnp.mean(jax.vmap(one)(blocks, frames))


def _draw(
    key: Key[Array, ""], valid: Bool[Array, "blocks"], frames: int, samples: int
) -> tuple[Int[Array, "samples"], Int[Array, "samples"]]:
    """Numbers of valid blocks, and of a frame in each; block 0 if none is valid."""
    block_key, frame_key = jax.random.split(key)
    rank = jax.random.randint(block_key, (samples,), 0, jnp.maximum(jnp.sum(valid), 1))
    blocks = jnp.argmax(jnp.cumsum(valid) > rank[:, None], axis=1)
    return blocks, jax.random.randint(frame_key, (samples,), 0, frames)


def _resize(picture: Float[Array, "_ _ 3"], size: int) -> Float[Array, "_ _ 3"]:
    """The picture with a short side of `size` pixels, its shape kept."""
    height, width, _ = picture.shape
    short = min(height, width)
    if short == size:
        return picture
    shape = (round(height * size / short), round(width * size / short), 3)
    return jax.image.resize(picture, shape, "bilinear", antialias=True)
