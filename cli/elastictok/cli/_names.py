"""What several modules call by the same name."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

SETTINGS = "train.json"
"""The file in a run folder with the settings that `elastictok train` was called with."""

_T = TypeVar("_T")


def find(kind: str, name: str, among: Mapping[str, _T], *, where: str = "") -> _T:
    """What is known by that name.

    **Arguments:**

    - `kind`: of what has names, in a word.
    - `where`: what the message begins with.

    **Raises:** `ValueError` for an unknown name, with the nearest one.
    """
    if name not in among:
        near = difflib.get_close_matches(name, among, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{where}there is no {kind} {name!r}{hint} ({kind}s: {', '.join(among)})")
    return among[name]
