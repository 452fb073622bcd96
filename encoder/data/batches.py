"""Region records -> training batches, each a function of (seed, step) alone.

A step's batch depends on nothing that came before it, so a run resumes exactly at any step, with any number of loader
workers, and the baseline and the method see the same images in the same order with the same boxes.
"""

import torch
from torch.utils.data import DataLoader, Dataset

from encoder.data.reader import RegionDataset
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
    ):
        if batch_size % world_size:
            raise DataError(f"batch_size {batch_size} does not divide over {world_size} processes; choose a multiple")
        if len(dataset) < batch_size:
            raise DataError(f"the shards hold {len(dataset)} records, fewer than one batch of {batch_size}; lower batch_size")
        self.dataset, self.processor = dataset, processor
        self.batch_size, self.max_boxes, self.seed = batch_size, max_boxes, seed
        self.rank, self.world_size, self.with_regions = rank, world_size, with_regions
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def indices(self, step: int) -> list[int]:
        """Record numbers of the global batch of `step`; each epoch is a new permutation, its incomplete last batch dropped."""
        epoch, position = divmod(step, len(self.dataset) // self.batch_size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.dataset), generator=generator)
        return self._order[position * self.batch_size : (position + 1) * self.batch_size].tolist()

    def __len__(self) -> int:
        """Steps of one epoch."""
        return len(self.dataset) // self.batch_size

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        """Arguments of `ClocModel.forward` for `step`, this rank's share of the images."""
        share = self.batch_size // self.world_size
        first = self.rank * share
        images, captions, boxes, image_index, phrases = [], [], [], [], []
        for place, index in enumerate(self.indices(step)[first : first + share]):
            image, record = self.dataset[index]
            # One generator per sample of the global batch: the draws do not depend on the number of ranks.
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) * self.batch_size + first + place)

            def pick(items, generator=generator):
                return items[int(torch.randint(len(items), (1,), generator=generator))]

            images.append(image)
            captions.append(pick(record.captions))
            geometry = self.processor.image_processor.geometry_of(image)
            chosen = torch.randperm(len(record.regions), generator=generator)[: self.max_boxes].tolist()
            for region in (record.regions[i] for i in chosen):
                boxes.append(geometry.boxes_to_model(torch.tensor(region.box, dtype=torch.float32)))
                image_index.append(place)
                phrases.append(pick(region.phrases))

        batch = {**self.processor.image_processor(images), **self.processor.texts(captions)}
        if self.with_regions:
            # Phrases repeat within a batch: each distinct one is encoded once, at its own length.
            distinct = sorted(set(phrases))
            number = {text: i for i, text in enumerate(distinct)}
            texts = self.processor.texts(distinct)
            batch |= {
                "boxes": torch.stack(boxes) if boxes else torch.zeros(0, 4),
                "image_index": torch.tensor(image_index, dtype=torch.long),
                "region_input_ids": texts["input_ids"],
                "region_attention_mask": texts["attention_mask"],
                "region_text_index": torch.tensor([number[text] for text in phrases], dtype=torch.long),
            }
        return batch


def batch_loader(batches: RegionBatches, first_step: int, last_step: int, workers: int = 0) -> DataLoader:
    """Loads the batches of steps `first_step` to `last_step` - 1 in order; `workers` processes read ahead."""
    return DataLoader(batches, batch_size=None, sampler=range(first_step, last_step), num_workers=workers)
