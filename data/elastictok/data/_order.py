"""In which order items are used."""

import numpy as np

_LISTED = 2**16  # shuffled as a list up to here


class EpochOrder:
    """Every item of a shard once per epoch, each epoch in an order of its own.

    Takes no memory to speak of: orders of many items are computed place by place, by Grain's
    permutation. That one walks through at least 65 536 numbers, whatever the number of items, so
    fewer are shuffled as a list.

    **Arguments:**

    - `items`: how many there are, over all shards.
    - `shard`: (index, count): items `index`, `index + count`, ... are used.
    - `seed`: of the orders.
    """

    def __init__(self, items: int, shard: tuple[int, int], seed: int):
        self.items = range(items)[shard[0] :: shard[1]]
        self._seed = seed
        self._epochs: dict[int, np.ndarray] = {}
        self._long = None

    def __reduce__(self):
        # Permutations are made anew in a worker, not sent there.
        first, step = self.items.start, self.items.step
        return EpochOrder, (self.items.stop, (first, step), self._seed)

    def __call__(self, position: int) -> int:
        """The item at a position of the endless sequence of epochs."""
        epoch, place = divmod(position, len(self.items))
        if len(self.items) > _LISTED:
            return self.items[self._far(position)]
        if epoch not in self._epochs:
            rng = np.random.default_rng([self._seed, epoch])
            # The last one stays: prefetching may have begun with the next.
            self._epochs = {e: o for e, o in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = rng.permutation(np.arange(len(self.items), dtype=np.uint32))
        return self.items[int(self._epochs[epoch][place])]

    def _far(self, position: int) -> int:
        if self._long is None:
            # Grain is slow to import.
            import grain

            self._long = grain.MapDataset.range(len(self.items)).shuffle(self._seed).repeat()
        item = self._long[position]
        assert item is not None, "a range has no holes"
        return item
