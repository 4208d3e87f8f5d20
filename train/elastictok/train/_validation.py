"""`elastictok.eval`'s measurements while a model is being trained."""

from collections.abc import Sequence

from elastictok.eval import Item, evaluate, share_settings, threshold_settings
from elastictok.inference import MSE, FixedLength, Tokenizer
from elastictok.models import ElasticTok


class Validation:
    """Encodes and decodes pictures and clips as a user would, and measures what came back.

    For `fit(validate=...)`. Gives `loss` (mean squared error over all pixels with all tokens),
    `mse_quarter`, `psnr` (of `loss`) and `ssim` with all tokens and, if there is a threshold,
    `tokens` (mean per block, of the fewest that meet it) and `met` (share of the blocks that do).
    """

    def __init__(self, items: Sequence[Item], *, threshold: float | None = None):
        """**Arguments:**

        - `items`: not trained on.
        - `threshold`: mean squared error of a block, pixels in [-1, 1]; None searches nothing.

        **Raises:** `ValueError` if there is no item.
        """
        if not items:
            raise ValueError("nothing to validate on: give at least one picture or clip")
        self._items = tuple(items)
        self._searched = () if threshold is None else threshold_settings([MSE(threshold)])

    def __call__(self, model: ElasticTok) -> dict[str, float]:
        """The measurements of a model."""
        fixed = share_settings((1, 1 / 4))
        found = evaluate(
            Tokenizer(model, FixedLength(length=model.max_tokens)),
            self._items,
            settings=(*fixed, *self._searched),
            name="validation",
        )
        everything, quarter, *searched = found.rows
        numbers = {
            "loss": everything.mse,
            "mse_quarter": quarter.mse,
            "psnr": everything.psnr_dataset,
            "ssim": everything.ssim_gaussian,
        }
        for row in searched:
            numbers |= {"tokens": row.tokens, "met": row.blocks_met}
        return {name: value for name, value in numbers.items() if value is not None}
