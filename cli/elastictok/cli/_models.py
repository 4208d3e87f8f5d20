"""Models, quantizers and tail-drop policies by the names that the command line knows them by."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import final

import jax
from jaxtyping import Array, Key

from elastictok.models import (
    AbstractTailDrop,
    ElasticTok,
    InformationDrop,
    LogUniformDrop,
    PowerOfTwoDrop,
    Preset,
    UniformDrop,
    presets,
)
from elastictok.models.presets import PRESETS
from elastictok.quantizers import (
    BSQ,
    FSQ,
    LFQ,
    VQ,
    AbstractQuantizer,
    GaussianVAE,
    Grouped,
    Identity,
    Projected,
    Residual,
    SimVQ,
)

from ._commands import QuantizerName, Remat
from ._names import find
from ._user import names_file, user_preset


@final
@dataclasses.dataclass(frozen=True)
class QuantizerKind:
    """A quantizer at a size that suits the small presets, and the paper that it is from."""

    make: Callable[[Key[Array, ""]], AbstractQuantizer]
    source: str


QUANTIZERS: dict[str, QuantizerKind] = {
    "fsq": QuantizerKind(lambda key: FSQ(presets.FSQ_64K), "arXiv 2309.15505"),
    "vae": QuantizerKind(lambda key: GaussianVAE(8), "arXiv 1312.6114"),
    "vq": QuantizerKind(lambda key: VQ(4096, 16, key=key), "arXiv 1711.00937"),
    "simvq": QuantizerKind(lambda key: SimVQ(4096, 16, key=key), "arXiv 2411.02038"),
    "lfq": QuantizerKind(lambda key: LFQ(16), "arXiv 2310.05737"),
    "bsq": QuantizerKind(lambda key: BSQ(16), "arXiv 2406.07548"),
    "residual": QuantizerKind(lambda key: Residual(FSQ((8, 8, 8)), 2), "arXiv 2107.03312"),
    "grouped": QuantizerKind(
        lambda key: Grouped(FSQ((8, 5, 5)), 2), "Jégou, Douze and Schmid 2011"
    ),
    "projected": QuantizerKind(
        lambda key: Projected(16, FSQ(presets.FSQ_64K), 16, key=key), "arXiv 2110.04627"
    ),
    "identity": QuantizerKind(lambda key: Identity(8), "a plain autoencoder"),
}
"""By the names of `--quantizer`."""

TAIL_DROPS: dict[str, AbstractTailDrop] = {
    "uniform": UniformDrop(),
    "log-uniform": LogUniformDrop(),
    "power-of-two": PowerOfTwoDrop(),
    "information": InformationDrop(),
}
"""By the names of `--tail-drop`, which has `fixed` besides."""


def make_quantizer(name: QuantizerName, *, key: Key[Array, ""]) -> AbstractQuantizer:
    """The quantizer of that name at a size that suits the small presets."""
    return QUANTIZERS[name].make(key)


def find_preset(preset: str) -> Preset:
    """One of the library's presets by its name, or one of the user's by `FILE.py:NAME`.

    **Raises:** `ValueError` for an unknown preset, with the nearest name, and as of `user_preset`.
    """
    return user_preset(preset) if names_file(preset) else find("preset", preset, PRESETS)


def takes_quantizer(preset: Preset) -> bool:
    """Whether it can be had with another quantizer."""
    return "quantizer" in inspect.signature(preset.make).parameters


def make_model(
    preset: str, *, quantizer: QuantizerName | None, context: int | None, seed: int
) -> ElasticTok:
    """A preset with random weights, with another quantizer or context if asked.

    **Raises:** `ValueError` for a preset that cannot be found, or that takes no quantizer.
    """
    made = find_preset(preset)
    weights, book = jax.random.split(jax.random.key(seed))
    if quantizer is None:
        model = made.make(key=weights)
    elif takes_quantizer(made):
        model = made.make(key=weights, quantizer=make_quantizer(quantizer, key=book))
    else:
        raise ValueError(
            f"{preset} takes no other quantizer; leave out --quantizer, or give its function the "
            "argument quantizer=None"
        )
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
