"""Models and quantizers by the names that the command line knows them by."""

import dataclasses
import difflib
from collections.abc import Callable

import jax
from jaxtyping import Array, Key

from elastictok.models import ElasticTok, presets
from elastictok.models.presets import PRESETS
from elastictok.quantizers import FSQ, LFQ, VQ, AbstractQuantizer, GaussianVAE, Residual

from ._commands import QuantizerName, Remat


def make_quantizer(name: QuantizerName, *, key: Key[Array, ""]) -> AbstractQuantizer:
    """The quantizer of that name at a size that suits the small presets."""
    makers: dict[str, Callable[[], AbstractQuantizer]] = {
        "fsq": lambda: FSQ(presets.FSQ_64K),
        "vae": lambda: GaussianVAE(8),
        "vq": lambda: VQ(4096, 16, key=key),
        "lfq": lambda: LFQ(16),
        "residual": lambda: Residual(FSQ((8, 8, 8)), 2),
    }
    return makers[name]()


def make_model(
    preset: str, *, quantizer: QuantizerName | None, context: int | None, seed: int
) -> ElasticTok:
    """A preset with random weights, with another quantizer or context if asked.

    **Raises:** `ValueError` for an unknown preset, with the nearest name.
    """
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"there is no preset {preset!r}{hint} (presets: {', '.join(PRESETS)})")
    weights, book = jax.random.split(jax.random.key(seed))
    options = {} if quantizer is None else {"quantizer": make_quantizer(quantizer, key=book)}
    model = PRESETS[preset].make(key=weights, **options)
    return model if context is None else with_context(model, context)


def remat_policy(name: Remat) -> Callable[..., bool]:
    """What the backward pass keeps of each layer, by the name that the command line has for it."""
    policies = jax.checkpoint_policies
    return {
        "layers": policies.nothing_saveable,
        "attention": policies.save_only_these_names("attention"),
        "products": policies.dots_with_no_batch_dims_saveable,
        "none": policies.everything_saveable,
    }[name]


def with_context(model: ElasticTok, context: int) -> ElasticTok:
    """The same model, to be trained on sequences of `context` blocks."""
    return dataclasses.replace(model, context=context)
