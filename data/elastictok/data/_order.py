"""In which order items are used."""

from collections.abc import Callable

import numpy as np

_LISTED = 2**16  # shuffled as a list up to here
_ROUNDS = 6
_MASK = 2**64 - 1


class EpochOrder:
    """Every item of a shard once per epoch, each epoch in an order of its own.

    Takes no memory to speak of: few items are shuffled as a list, and the order of many is computed
    place by place. Not by Grain's shuffle: that of 65 537 items uses one of them twice and leaves
    one out (Grain 0.2.18), and its epochs are those of the next seed, one later.

    **Arguments:**

    - `items`: how many there are, over all shards.
    - `shard`: (index, count): items `index`, `index + count`, ... are used.
    - `seed`: of the orders.
    """

    def __init__(self, items: int, shard: tuple[int, int], seed: int):
        self.items = range(items)[shard[0] :: shard[1]]
        self._seed = seed
        self._epochs: dict[int, Callable[[int], int]] = {}

    def __reduce__(self):
        # Orders are made anew in a worker, not sent there.
        first, step = self.items.start, self.items.step
        return EpochOrder, (self.items.stop, (first, step), self._seed)

    def __call__(self, position: int) -> int:
        """The item at a position of the endless sequence of epochs."""
        epoch, place = divmod(position, len(self.items))
        if epoch not in self._epochs:
            # The last one stays: prefetching may have begun with the next.
            self._epochs = {e: o for e, o in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = self._order([self._seed, epoch])
        return self.items[self._epochs[epoch](place)]

    def _order(self, seed: list[int]) -> Callable[[int], int]:
        count = len(self.items)
        if count > _LISTED:
            return _Permutation(count, seed)
        shuffled = np.random.default_rng(seed).permutation(np.arange(count, dtype=np.uint32))
        return lambda place: int(shuffled[place])


class _Permutation:
    """A permutation of the numbers below `count`, of which any place is found at once.

    A Feistel network permutes the numbers of 2 * half bits, for any round function; numbers that
    are not below `count` are sent through again until they are, fewer than four times on average
    (cycle walking: Black and Rogaway, Ciphers with arbitrary finite domains, CT-RSA 2002).
    """

    def __init__(self, count: int, seed: list[int]):
        self._count = count
        self._half = (max(1, (count - 1).bit_length()) + 1) // 2
        self._low = 2**self._half - 1
        state = np.random.SeedSequence(seed).generate_state(_ROUNDS, np.uint64)
        self._keys = [int(key) for key in state]

    def __call__(self, place: int) -> int:
        while True:
            left, right = place >> self._half, place & self._low
            for key in self._keys:
                left, right = right, left ^ (_mixed(right ^ key) & self._low)
            place = left << self._half | right
            if place < self._count:
                return place


def _mixed(number: int) -> int:
    """A number of 64 bits that depends on all of another's (the finalizer of SplitMix64: Steele,
    Lea and Flood, OOPSLA 2014)."""
    number = (number + 0x9E3779B97F4A7C15) & _MASK
    number = ((number ^ number >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    number = ((number ^ number >> 27) * 0x94D049BB133111EB) & _MASK
    return number ^ number >> 31
