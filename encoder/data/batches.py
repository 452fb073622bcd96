"""Region records -> training batches, each a function of (seed, step) alone.

A step's batch depends on nothing that came before it, so a run resumes exactly at any step, with any number of loader
workers, and the baseline and the method see the same images in the same order with the same boxes. A rank takes a slice of
the global batch, so the number of ranks does not change it either.
"""

import hashlib
from collections.abc import Iterator
from itertools import product

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from encoder.data.cache import ReadAhead
from encoder.data.order import RecordOrder
from encoder.data.reader import RegionDataset
from encoder.data.records import RegionRecord
from encoder.data.shards import Shard, is_url
from encoder.errors import DataError
from encoder.processor import ClocProcessor


class RegionBatches(Dataset):
    """`batches[step]` is this rank's part of the global batch of that step.

    dataset: the region records
    processor: makes the tensors, and the geometry of the boxes
    batch_size: images of the global batch, divided evenly over the ranks
    max_boxes: at most M regions an image, drawn uniformly without replacement (arXiv 2410.02746, Table A: 4)
    seed: of the order of images and of the draws of regions, phrases and captions
    with_regions: False leaves the regions out, for the CLIP objective; nothing else changes
    recaption_ratio: how often an image that has both is shown with one of its captions and not with its alt-text
    lanes, window: of the order, see `RecordOrder`
    """

    def __init__(
        self,
        dataset: RegionDataset,
        processor: ClocProcessor,
        batch_size: int,
        max_boxes: int = 4,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        with_regions: bool = True,
        recaption_ratio: float = 0.5,
        lanes: int = 1,
        window: int = 131_072,
    ):
        for name, number in (("processes", world_size), ("lanes", lanes)):
            if batch_size % number:
                raise DataError(f"batch_size {batch_size} does not divide over {number} {name}; choose a multiple")
        if len(dataset) < batch_size:
            raise DataError(f"the shards hold {len(dataset)} records, fewer than one batch of {batch_size}; lower batch_size")
        self.dataset, self.processor = dataset, processor
        self.batch_size, self.max_boxes, self.seed = batch_size, max_boxes, seed
        self.rank, self.world_size, self.with_regions = rank, world_size, with_regions
        self.recaption_ratio = recaption_ratio
        self._remote = any(map(is_url, dataset.shards))
        self.order = RecordOrder(dataset.counts, dataset.weights, seed, lanes, window)

    def identity(self) -> dict[str, object]:
        """What the order of records follows from beside the configuration: a run goes on exactly where these are equal."""
        counts = hashlib.sha256(b"".join(source.tobytes() + b"|" for source in self.order.counts)).hexdigest()[:16]
        return {"data.records": self.order.sizes, "data.weights": self.dataset.weights, "data.counts": counts}

    def indices(self, step: int, first: int = 0, last: int | None = None) -> list[int]:
        """Record numbers of the global batch of `step`, or of its places `first` to `last` - 1."""
        last, length = self.batch_size if last is None else last, self.batch_size // self.order.lanes
        found = []
        for lane in range(first // length, -(-last // length)):
            begin, end = max(first - lane * length, 0), min(last - lane * length, length)
            found.append(self.order.records(lane, step * length + begin, step * length + end))
        return np.concatenate(found).tolist()

    def shards_ahead(self, step: int) -> list[Shard]:
        """The remote shards that this rank reads from `step` on, about two windows, soonest first."""
        if not self._remote:
            return []
        share, length = self.batch_size // self.world_size, self.batch_size // self.order.lanes
        lanes = range(self.rank * share // length, -(-(self.rank + 1) * share // length))
        first_shard = np.cumsum([0, *map(len, self.dataset.counts)])
        found = [place for lane in lanes for place in self.order.shards_ahead(lane, step * length)]
        return [self.dataset.shards[first_shard[source] + shard] for source, shard in dict.fromkeys(found)]

    def __len__(self) -> int:
        """Steps in which as many images are seen as there are."""
        return len(self.dataset) // self.batch_size

    def text_of(self, record: RegionRecord, generator: torch.Generator) -> str:
        """The text for an image: a caption or its alt-text."""
        caption = torch.rand((), generator=generator) < self.recaption_ratio
        texts = record.captions if record.captions and (caption or not record.alt_text) else (record.alt_text,)
        return texts[int(torch.randint(len(texts), (1,), generator=generator))]

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        """Arguments of `ClocModel.forward` for `step`, this rank's share of the images."""
        return self.part(step, 0, 1)

    def part(self, step: int, number: int, count: int) -> dict[str, torch.Tensor]:
        """The same for part `number` of `count` equal parts of that share. A text that two parts use is in both."""
        share = self.batch_size // self.world_size // count
        first = (self.rank * count + number) * share
        images, captions, boxes, image_index, phrases = [], [], [], [], []
        for place, index in enumerate(self.indices(step, first, first + share)):
            image, record = self.dataset.sample(index)
            # One generator per sample of the global batch: the draws do not depend on the number of ranks.
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) * self.batch_size + first + place)
            images.append(image)
            captions.append(self.text_of(record, generator))
            geometry = self.processor.image_processor.geometry_of(image)
            chosen = torch.randperm(len(record.regions), generator=generator)[: self.max_boxes].tolist()
            boxes_px = torch.tensor([record.regions[i].box for i in chosen], dtype=torch.float32).reshape(-1, 4)
            boxes.append(geometry.boxes_to_model(boxes_px))
            image_index += [place] * len(chosen)
            for region in (record.regions[i] for i in chosen):
                phrases.append(region.phrases[int(torch.randint(len(region.phrases), (1,), generator=generator))])

        batch = {**self.processor.image_processor(images), **self.processor.texts(captions)}
        if self.with_regions:
            # Phrases repeat within a batch: each distinct one is encoded once, at its own length.
            distinct = sorted(set(phrases))
            number = {text: i for i, text in enumerate(distinct)}
            texts = self.processor.texts(distinct)
            batch |= {
                "boxes": torch.cat(boxes),
                "image_index": torch.tensor(image_index, dtype=torch.long),
                "region_input_ids": texts["input_ids"],
                "region_attention_mask": texts["attention_mask"],
                "region_text_index": torch.tensor([number[text] for text in phrases], dtype=torch.long),
            }
        return batch


class _Guarded(Dataset):
    """The batches, or what was wrong with one: a worker's exception would arrive wrapped in a page of traceback."""

    def __init__(self, batches: RegionBatches):
        self.batches = batches

    def __getitem__(self, place: tuple[int, int, int]) -> dict[str, torch.Tensor] | Exception:
        try:
            return self.batches.part(*place)
        except (DataError, FileNotFoundError) as error:
            return error


def batch_loader(
    batches: RegionBatches, first_step: int, last_step: int, workers: int = 0, parts: int = 1
) -> Iterator[dict[str, torch.Tensor]]:
    """Loads the batches of steps `first_step` to `last_step` - 1 in order, each in `parts` parts; `workers` processes read
    ahead, two parts each.

    Remote shards of the next window are fetched meanwhile, by processes of their own.
    """
    axes = range(first_step, last_step), range(parts), (parts,)
    pinned = torch.cuda.is_available()  # memory that a GPU copies from while the process goes on
    settings = {"batch_size": None, "sampler": product(*axes), "num_workers": workers, "pin_memory": pinned}
    loader = iter(DataLoader(_Guarded(batches), **settings))
    ahead = ReadAhead(batches.dataset.cache)
    try:
        for (step, number, _), batch in zip(product(*axes), loader, strict=True):
            if isinstance(batch, Exception):
                raise batch
            if number == 0:
                ahead.want(batches.shards_ahead(step))
            yield batch
    finally:
        del loader  # ends its workers now; an error's traceback would keep it, and its end would take many seconds
        ahead.close()
