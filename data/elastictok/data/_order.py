"""In which order items are used."""

import numpy as np


class EpochOrder:
    """Every item of a shard once per epoch, each epoch in an order of its own.

    Grain's own shuffle walks through at least 65 536 numbers, whatever the number of items: for
    a dozen it takes longer than to prepare the document.

    **Arguments:**

    - `items`: how many there are, over all shards.
    - `shard`: (index, count): items `index`, `index + count`, ... are used.
    - `seed`: of the orders.
    """

    def __init__(self, items: int, shard: tuple[int, int], seed: int):
        self.items = range(items)[shard[0] :: shard[1]]
        self._seed = seed
        self._epochs: dict[int, np.ndarray] = {}

    def __reduce__(self):
        # Permutations are made anew in a worker, not sent there.
        first, step = self.items.start, self.items.step
        return EpochOrder, (self.items.stop, (first, step), self._seed)

    def __call__(self, position: int) -> int:
        """The item at a position of the endless sequence of epochs."""
        epoch, place = divmod(position, len(self.items))
        if epoch not in self._epochs:
            rng = np.random.default_rng([self._seed, epoch])
            # The last one stays: prefetching may have begun with the next.
            self._epochs = {e: o for e, o in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = rng.permutation(np.arange(len(self.items), dtype=np.uint32))
        return self.items[int(self._epochs[epoch][place])]
