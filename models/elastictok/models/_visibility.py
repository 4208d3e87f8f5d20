"""Which blocks of a sequence a block sees: the attention mask of an encoder or decoder."""

import abc
from typing import final

import equinox as eqx
from jaxtyping import Array, Int

from elastictok.attention import AbstractMask, BlockCausal, SlidingBlocks


class AbstractVisibility(eqx.Module):
    """Who sees whom inside a document. A block must not see later ones: clips are encoded as a
    stream. Documents and padding are no business of it; their masks are put in front of it.
    """

    @abc.abstractmethod
    def mask(self, block: int, offset: int | Int[Array, ""]) -> AbstractMask:
        """The mask of a sequence.

        **Arguments:**

        - `block`: positions in a block.
        - `offset`: of the first query among the keys; in a stream, the position of the block at
            hand among those remembered. An array in a stream.
        """

    @property
    @abc.abstractmethod
    def in_any_order(self) -> bool:
        """Whether the last block of a sequence sees the same whatever the order of those before it.

        The blocks that a stream remembers are then left where they are in memory; else they are
        put in order first, which costs a copy of them.
        """


@final
class EarlierBlocks(AbstractVisibility):
    """A block sees itself and all blocks before it (arXiv 2410.08368, section 3)."""

    def mask(self, block: int, offset: int | Int[Array, ""]) -> AbstractMask:
        return BlockCausal(block=block, offset=offset)

    @property
    def in_any_order(self) -> bool:
        return True


@final
class RecentBlocks(AbstractVisibility):
    """A block sees itself and the `window - 1` blocks before it."""

    window: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window is {self.window} blocks; it must be at least 1, the own one")

    def mask(self, block: int, offset: int | Int[Array, ""]) -> AbstractMask:
        return SlidingBlocks(block=block, window=self.window, offset=offset)

    @property
    def in_any_order(self) -> bool:
        return False


EARLIER_BLOCKS = EarlierBlocks()
