"""Pixels to patches and back."""

import equinox as eqx
from jaxtyping import Array, Float


class Patching(eqx.Module):
    """Cuts frames into patches of `(frames, height, width)` pixels (arXiv 2410.08368, section 3).

    Patches come in raster order (time, then rows, then columns); inside a patch the values are
    ordered time, row, column, channel. Blocks are runs of frames, so that the patches of a block
    are contiguous.
    """

    frames: int = eqx.field(static=True)
    height: int = eqx.field(static=True)
    width: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        for name in ("frames", "height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"patch {name} is {getattr(self, name)}; it must be at least 1")

    @property
    def patch_dim(self) -> int:
        """Number of values in a patch, three channels included."""
        return self.frames * self.height * self.width * 3

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Number of patches along time, height and width.

        **Raises:** `ValueError` if the patch does not divide the size.
        """
        for name, size, patch in (
            ("frames", frames, self.frames),
            ("height", height, self.height),
            ("width", width, self.width),
        ):
            if size < 1 or size % patch:
                raise ValueError(
                    f"{name} is {size}, which the patch's {patch} does not divide; crop or pad to "
                    f"a multiple of {patch} (elastictok.inference.Tokenizer does it for you)"
                )
        return frames // self.frames, height // self.height, width // self.width

    def patch(self, pixels: Float[Array, "frames height width 3"]) -> Float[Array, "cells patch"]:
        """Patches of all frames, in raster order."""
        t, h, w = self.grid(*pixels.shape[:3])
        cut = pixels.reshape(t, self.frames, h, self.height, w, self.width, 3)
        return cut.transpose(0, 2, 4, 1, 3, 5, 6).reshape(t * h * w, self.patch_dim)

    def unpatch(
        self, patches: Float[Array, "cells patch"], frames: int, height: int, width: int
    ) -> Float[Array, "frames height width 3"]:
        """The inverse of `patch` for frames of the given size."""
        t, h, w = self.grid(frames, height, width)
        cut = patches.reshape(t, h, w, self.frames, self.height, self.width, 3)
        return cut.transpose(0, 3, 1, 4, 2, 5, 6).reshape(frames, height, width, 3)
