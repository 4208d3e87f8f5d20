"""`elastictok reproduce`: published results, made again from nothing.

Another one is a function of the command, and a line in `REPRODUCTIONS`.
"""

from collections.abc import Callable, Mapping

from ._commands import Reproduce
from ._names import find
from ._zoo_small import reproduce_zoo

REPRODUCTIONS: Mapping[str, Callable[[Reproduce], None]] = {"zoo-small": reproduce_zoo}


def reproduce(command: Reproduce) -> None:
    """Makes what the command names.

    **Raises:** `ValueError` for an unknown name, with the nearest one.
    """
    find("reproduction", command.what, REPRODUCTIONS)(command)
