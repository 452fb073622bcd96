"""The order of records: nothing lost or doubled, any cut the same, weights honoured, a billion records in little memory."""

import numpy as np
import pytest

from encoder.data.order import RecordOrder
from encoder.errors import DataError

COUNTS = [[13, 0, 57, 40, 1, 90], [31, 8]]


@pytest.mark.parametrize("lanes, window", [(1, 1000), (1, 32), (4, 16), (7, 5)])
def test_each_epoch_of_a_lane_covers_its_stretch_once(lanes, window):
    """No record is lost or doubled, and epochs differ."""
    order = RecordOrder(COUNTS[:1], [1.0], 0, lanes, window)
    sizes = [(lane + 1) * 201 // lanes - lane * 201 // lanes for lane in range(lanes)]
    epochs = []
    for epoch in range(3):
        parts = [order.records(lane, epoch * size, (epoch + 1) * size).tolist() for lane, size in enumerate(sizes)]
        epochs.append([record for part in parts for record in part])
        assert sorted(epochs[-1]) == list(range(201))
    assert epochs[0] != epochs[1] != epochs[2]


def test_any_cut_gives_the_same_order():
    whole = RecordOrder(COUNTS, [2, 1], 3, 2, 16).records(1, 0, 3000)
    random = np.random.default_rng(0)
    order = RecordOrder(COUNTS, [2, 1], 3, 2, 16)
    for _ in range(50):
        first, last = sorted(random.integers(0, 3001, 2).tolist())
        assert np.array_equal(order.records(1, first, last), whole[first:last])
    assert not np.array_equal(RecordOrder(COUNTS, [2, 1], 4, 2, 16).records(1, 0, 3000), whole)


def test_a_window_holds_few_shards_and_is_shuffled():
    counts = [100] * 50
    order = RecordOrder([counts], [1.0], 0, 5, 200)
    for lane in range(5):
        for start in range(0, 1000, 200):
            records = order.records(lane, start, start + 200)
            shards = set((records // 100).tolist())
            assert len(shards) == 2
            assert shards < {shard for _, shard in order.shards_ahead(lane, start + 60)}
            assert np.mean(np.diff(records) == 1) < 0.05
    ahead = [shard for _, shard in order.shards_ahead(0, 950)]
    assert set((order.records(0, 1000, 1200) // 100).tolist()) <= set(ahead)  # the first window of the next epoch


def test_weights_are_honoured():
    """Exactly over a block, about right over any stretch; each source still gives every record of its own once an epoch."""
    order = RecordOrder([[500, 500], [50], [200]], [5, 3, 2], 0, 1, 64)
    source = np.digitize(order.records(0, 0, 20_000), [1000, 1050])
    assert np.bincount(source).tolist() == [10_000, 6000, 4000]
    for start in range(0, 19_000, 777):
        share = np.bincount(source[start : start + 400], minlength=3) / 400
        assert np.all(np.abs(share - [0.5, 0.3, 0.2]) < 4 * np.sqrt(0.25 / 400))
    records = order.records(0, 0, 20_000)
    assert set(np.bincount(records[source == 0]).tolist()) == {10} and set(np.bincount(records[source == 2])[1050:]) == {20}
    with pytest.raises(DataError, match="a share of 0.0005; shares start at 1/1000"):
        RecordOrder([[9], [9]], [1, 0.0005], 0, 1, 64)
    with pytest.raises(DataError, match="holds 9 records, fewer than the 10 lanes"):
        RecordOrder([[9], [99]], [1, 1], 0, 10, 64)


def test_a_billion_records_take_little():
    order = RecordOrder([[10_000] * 100_000], [1.0], 0, 64, 131_072)
    records = order.records(63, 40_000_000, 40_004_096)  # of the third epoch
    assert len(np.unique(records)) == 4096 and records.max() < 10**9
    assert len(np.unique(records // 10_000)) <= 15
