"""The `elastictok` command: train, encode, decode, inspect, eval, demo."""

from ._main import main

__all__ = ["main"]
