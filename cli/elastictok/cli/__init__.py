"""The `elastictok` command: demo, zoo, train, encode, decode, inspect, eval and others."""

from ._main import main

__all__ = ["main"]
