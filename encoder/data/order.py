"""The order of records: a function of (seed, records per shard, place), with no state. Exact whoever asks and in which order.

The shards of a source are permuted anew each epoch and laid end to end. That line of records is cut in `lanes` of equal
length, each lane in windows, and each window is permuted. So whoever reads one lane meets every record of a few shards at
random, then those of the next few: shuffled over shards and within them, and still read near-sequentially. Memory is two
numbers per shard and one window per lane, whatever the number of records.

A lane goes through its stretch again and again; stretches differ by at most one record. When all lanes have gone through
theirs once, every record has come once.
"""

from collections.abc import Sequence

import numpy as np

from encoder.errors import DataError

BLOCK = 1000  # places over which sources have exactly their shares


class RecordOrder:
    """Records as numbers 0 to N - 1, in the order of sources, shards, and records in a shard.

    counts: per source, the number of records of each shard
    weights: per source, its relative share
    lanes: parts that are read side by side
    window: records that are permuted together
    """

    def __init__(self, counts: Sequence[Sequence[int]], weights: Sequence[float], seed: int, lanes: int, window: int):
        for name, value in (("lanes", lanes), ("shuffle_window", window)):
            if value < 1:
                raise DataError(f"{name} is {value}; it must be at least 1")
        self.counts = [np.asarray(source, dtype=np.int64) for source in counts]
        self.sizes = [int(source.sum()) for source in self.counts]
        if min(self.sizes) < lanes:
            raise DataError(f"a source holds {min(self.sizes)} records, fewer than the {lanes} lanes; lower lanes")
        self.seed, self.lanes, self.window = seed, lanes, window
        flat = np.concatenate(self.counts)
        starts = np.split(np.cumsum(flat) - flat, np.cumsum([len(source) for source in self.counts])[:-1])
        self._starts = starts  # per source, the number of each shard's first record
        self.quotas = _quotas(weights)
        self._shard_orders: dict[int, tuple] = {}
        self._windows: dict[tuple[int, int], tuple] = {}

    def records(self, lane: int, first: int, last: int) -> np.ndarray:
        """Record numbers at places `first` to `last` - 1 of a lane, int64."""
        if len(self.counts) == 1:
            return self._stretch(0, lane, first, last)
        found = np.empty(last - first, dtype=np.int64)
        of, before = self._sources(lane, first, last)
        for source in range(len(self.counts)):
            mine = of == source
            found[mine] = self._stretch(source, lane, before[source], before[source] + int(mine.sum()))
        return found

    def shards_ahead(self, lane: int, place: int) -> list[tuple[int, int]]:
        """(source, shard) of what the lane reads from `place` on: this window's and the next one's, without repeats."""
        before = [place] if len(self.counts) == 1 else self._sources(lane, place, place + 1)[1]
        found = []
        for source, position in enumerate(before):
            for _ in range(2):
                epoch, start, stop, begin = self._window_at(source, lane, position)
                order, cumulated = self._shard_order(source, epoch)
                low, high = np.searchsorted(cumulated, (start, stop - 1), side="right") - 1
                found += [(source, shard) for shard in order[low : high + 1].tolist()]
                position = begin + stop - start
        return list(dict.fromkeys(found))

    def _sources(self, lane: int, first: int, last: int) -> tuple[np.ndarray, list[int]]:
        """The source of each place, and how many places before `first` each source had in this lane."""
        block = first // BLOCK
        pattern = np.repeat(np.arange(len(self.quotas)), self.quotas)
        blocks = [self._random(1, lane, number).permutation(pattern) for number in range(block, (last - 1) // BLOCK + 1)]
        of = np.concatenate(blocks)
        inside = first - block * BLOCK
        before = block * self.quotas + np.bincount(of[:inside], minlength=len(self.quotas))
        return of[inside : inside + last - first], before.tolist()

    def _stretch(self, source: int, lane: int, first: int, last: int) -> np.ndarray:
        """Records `first` to `last` - 1 of what a lane reads from one source."""
        parts = [np.empty(0, dtype=np.int64)]
        while first < last:
            epoch, start, stop, begin = self._window_at(source, lane, first)
            part = self._window(source, lane, epoch, start, stop)[first - begin : last - begin]
            parts.append(part)
            first += len(part)
        return np.concatenate(parts)

    def _window_at(self, source: int, lane: int, position: int) -> tuple[int, int, int, int]:
        """(epoch, start and stop on the epoch's line of records, position of its first record) of the window around it."""
        low, high = (number * self.sizes[source] // self.lanes for number in (lane, lane + 1))
        epoch, inside = divmod(position, high - low)
        start = low + inside // self.window * self.window
        return epoch, start, min(start + self.window, high), epoch * (high - low) + start - low

    def _window(self, source: int, lane: int, epoch: int, start: int, stop: int) -> np.ndarray:
        """The window's record numbers, permuted. A lane's last window is kept: it is asked for step by step."""
        key, records = self._windows.get((source, lane), (None, None))
        if key != (epoch, start):
            order, cumulated = self._shard_order(source, epoch)
            places = start + self._random(2, source, epoch, start).permutation(stop - start)
            rank = np.searchsorted(cumulated, places, side="right") - 1
            records = self._starts[source][order[rank]] + places - cumulated[rank]
            self._windows[source, lane] = (epoch, start), records
        return records

    def _shard_order(self, source: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's shards in order, and where each begins on the epoch's line of records."""
        key, order, cumulated = self._shard_orders.get(source, (None, None, None))
        if key != epoch:
            order = self._random(3, source, epoch).permutation(len(self.counts[source]))
            counts = self.counts[source][order]
            cumulated = np.cumsum(counts) - counts
            self._shard_orders[source] = epoch, order, cumulated
        return order, cumulated

    def _random(self, *key: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, *key))


def _quotas(weights: Sequence[float]) -> np.ndarray:
    """Weights -> whole places of a block for each source, by largest remainder."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * BLOCK
    quotas = np.floor(exact).astype(np.int64)
    quotas[np.argsort(quotas - exact, kind="stable")[: BLOCK - quotas.sum()]] += 1
    if quotas.min() < 1:
        share = min(weights) / sum(weights)
        raise DataError(f"a source has weight {min(weights)}, a share of {share:.2g}; shares start at 1/{BLOCK}")
    return quotas
