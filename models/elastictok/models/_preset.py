"""A preset: a model to train, and how."""

import dataclasses
from collections.abc import Callable
from typing import final

from ._elastictok import ElasticTok
from ._taildrop import AbstractTailDrop, UniformDrop

_UNIFORM = UniformDrop()


@final
@dataclasses.dataclass(frozen=True)
class Preset:
    """A model to train, and how its tails are dropped: what `elastictok train NAME` runs.

    - `make`: makes the model, called as `make(key=key)`; or as `make(key=key, quantizer=quantizer)`
        to have it with another quantizer, if it takes one.
    - `tail_drop`: draws the kept lengths in training.
    - `about`: what it is, in a sentence.
    - `source`: the papers that it is from.
    """

    make: Callable[..., ElasticTok]
    tail_drop: AbstractTailDrop = _UNIFORM
    about: str = ""
    source: str = ""
