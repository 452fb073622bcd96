"""Training batches are a function of seed and step alone: not of ranks, workers, objective, or where a run started."""

import pytest
import torch

from encoder.data.batches import RegionBatches, batch_loader
from encoder.data.reader import RegionDataset
from encoder.errors import DataError

BATCH = 8


@pytest.fixture(scope="module")
def dataset(region_shards):
    return RegionDataset(region_shards, progress=False)


@pytest.fixture()
def make(dataset, tiny_processor):
    def batches(**fields) -> RegionBatches:
        return RegionBatches(dataset, tiny_processor, **{"batch_size": BATCH, "seed": 3, **fields})

    return batches


def content(batch: dict, decode) -> list[tuple]:
    """A batch as a list of (pixels' checksum, caption, sorted regions), free of padding and of the order of texts."""
    items = []
    for place in range(len(batch["pixel_values"])):
        regions = []
        for region in (batch["image_index"] == place).nonzero()[:, 0].tolist() if "boxes" in batch else []:
            row = batch["region_text_index"][region]
            box = tuple(batch["boxes"][region].tolist())
            regions.append((box, decode(batch["region_input_ids"][row], batch["region_attention_mask"][row])))
        caption = decode(batch["input_ids"][place], batch["attention_mask"][place])
        items.append((batch["pixel_values"][place].sum().item(), caption, regions))
    return items


@pytest.fixture(scope="module")
def decode(tiny_processor):
    return lambda ids, mask: tiny_processor.tokenizer.decode(ids[mask.bool()], skip_special_tokens=True)


def test_equal_to_reading_the_records_by_hand(make, dataset, tiny_processor, decode):
    """Every box and phrase in a batch is its record's, at most M an image, all of them where there are fewer."""
    batches = make()
    for step in range(len(batches)):
        items = content(batches[step], decode)
        assert len(items) == BATCH
        for index, (checksum, caption, regions) in zip(batches.indices(step), items, strict=True):
            image, record = dataset[index]
            inputs, (geometry,) = tiny_processor.images([image])
            assert checksum == pytest.approx(inputs["pixel_values"].sum().item(), rel=1e-5)
            assert any(text.lower().startswith(caption) for text in record.captions)  # cut at the tokenizer's maximum
            known = {
                tuple(geometry.boxes_to_model(torch.tensor(region.box)).tolist()): region.phrases for region in record.regions
            }
            assert len(known) == len(record.regions)
            assert len(regions) == len({box for box, _ in regions}) == min(4, len(record.regions))
            assert all(text in known[box] for box, text in regions)


def test_two_ranks_joined_are_one(make, decode):
    one, halves = make(), [make(rank=rank, world_size=2) for rank in range(2)]
    for step in (0, 1, 4, 17):
        joined = [item for half in halves for item in content(half[step], decode)]
        assert content(one[step], decode) == joined


def test_parts_that_workers_read_are_those_of_the_batch(make, decode):
    """In order, also over ranks; none is larger than its share."""
    one, ranks = make(), [make(rank=rank, world_size=2) for rank in range(2)]
    loaded = [list(batch_loader(batches, 3, 5, workers, parts=2)) for workers, batches in enumerate(ranks)]
    assert all(len(part["pixel_values"]) == BATCH // 4 for parts in loaded for part in parts)
    for number, step in enumerate((3, 4)):
        parts = [part for of_rank in loaded for part in of_rank[2 * number : 2 * number + 2]]
        assert [item for part in parts for item in content(part, decode)] == content(one[step], decode)


def test_some_rank_has_no_region_in_some_step(make):
    """So the other tests do cover uneven and empty ranks."""
    counts = [len(make(rank=rank, world_size=4)[step]["boxes"]) for rank in range(4) for step in range(6)]
    assert 0 in counts and max(counts) > 4


def test_any_step_can_be_the_first(make, decode):
    batches = make()
    expected = [content(batches[step], decode) for step in range(7)]
    for first in (6, 3, 0):
        loaded = list(batch_loader(make(), first, 7))
        assert [content(batch, decode) for batch in loaded] == expected[first:]


def test_workers_change_nothing(make, decode):
    plain = [content(batch, decode) for batch in batch_loader(make(), 1, 5, workers=0)]
    assert [content(batch, decode) for batch in batch_loader(make(), 1, 5, workers=2)] == plain


def test_clip_and_cloc_see_the_same_images_and_captions(make, decode):
    for step in (0, 2, 5):
        with_regions, without = make()[step], make(with_regions=False)[step]
        assert set(without) == {"pixel_values", "input_ids", "attention_mask"}
        assert all(torch.equal(without[key], with_regions[key]) for key in without)


def test_an_epoch_is_a_permutation_and_the_next_is_another(make, dataset):
    batches = make()
    assert len(batches) == len(dataset) // BATCH == 3
    epochs = [[index for step in range(3 * e, 3 * e + 3) for index in batches.indices(step)] for e in range(3)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again = make()
    assert again.indices(7) == batches.indices(7) and again.indices(0) == epochs[0][:BATCH]
    assert make(seed=4).indices(0) != batches.indices(0)


def test_draws_vary_from_epoch_to_epoch(make, dataset, decode):
    """Of a record with more than M regions and two captions, every region and caption is seen sooner or later."""
    batches, index = make(), 7
    assert len(dataset.record(index).regions) == 6
    boxes, captions, phrases = set(), set(), set()
    for step in range(60):
        if index in batches.indices(step):
            _, caption, regions = content(batches[step], decode)[batches.indices(step).index(index)]
            captions.add(caption)
            boxes |= {box for box, _ in regions}
            phrases |= {text.startswith("small ") for _, text in regions}
    assert len(boxes) == len({region.box for region in dataset.record(index).regions})
    assert len(captions) == 2 and phrases == {True, False}


def test_a_batch_without_regions_has_empty_tensors(make):
    batch = make(max_boxes=0)[0]
    assert batch["boxes"].shape == (0, 4) and batch["image_index"].shape == (0,)
    assert batch["region_input_ids"].shape == (0, 1) and batch["region_text_index"].dtype == torch.long


def test_impossible_sizes_are_refused(make):
    with pytest.raises(DataError, match="batch_size 8 does not divide over 3 processes; choose a multiple"):
        make(world_size=3)
    with pytest.raises(DataError, match="the shards hold 24 records, fewer than one batch of 25; lower batch_size"):
        make(batch_size=25)
