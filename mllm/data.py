"""Checked records -> token rows -> batches.

Everything is read, checked and tokenised before training starts, so that a step costs nothing but its tensors. (B rows,
L tokens, N image tokens, I pictures of the batch, T squares of them: one each, or with `anyres` several.)
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from encoder.errors import DataError
from encoder.geometry import ANYRES, Geometry
from mllm.box_text import BoxCodec
from mllm.conversation import IGNORE, IMAGE, messages_of, regions_named, tokenize
from mllm.image_input import ImageInput, no_picture, read_picture
from mllm.mixture import read_mixture, sources_of
from mllm.packing import NO_TOKEN, TokenRow, attention_of, own_row, pack_rows, share_pictures
from mllm.records import pictures_of, sizes_of
from mllm.regions import COORDS, REGION_TOKEN, RegionTable, as_region

CHUNK = 1000
PER_TOKEN = ("ids", "supervised", "segments", "roots")  # of a TokenRow
BLANK = -1  # index of the picture that stands in where a batch has none


class ConversationDataset(Dataset):
    """Checked and tokenised conversations: one a row, or all about one picture, or, packed, as many as fit.

    sources: a line about each file: how many conversations it holds, and how many an epoch has
    image_files: distinct pictures in order of first use, image_folders: where each lies
    image_sizes: (I + 1, 2) their heights and widths in pixels, image_tokens: (I + 1,) how many tokens each has in the language
        model; the last is the blank picture
    lengths: (n,) tokens of each row with those of its pictures
    num_records: conversations in all rows; num_cut: distinct ones that were cut at `max_length`
    regions: those that region tokens stand for, None where there are no region tokens
    """

    def __init__(
        self,
        data: list,
        images: str | Path | None,
        tokenizer,
        image: ImageInput,
        codec: BoxCodec,
        num_image_tokens: int,
        max_length: int,
        shared_pictures: bool = False,
        packed: bool = False,
        seed: int = 0,
        progress: bool = True,
        region_tokens: str = COORDS,
    ):
        self.image, self.num_image_tokens = image, num_image_tokens
        records, order, self.sources = read_mixture(sources_of(data, images), seed, progress)
        self.regions = None if region_tokens == COORDS else RegionTable(region_tokens, round(num_image_tokens**0.5))
        used: dict[tuple[Path, str], int] = {}
        sizes: list[tuple[int, int]] = []
        for record in records:
            for name, size in zip(pictures_of(record), sizes_of(record), strict=True):
                if used.setdefault((record["_folder"], name), len(used)) == len(sizes):
                    sizes.append(size)
        self.image_files, self.image_folders = [name for _, name in used], [folder for folder, _ in used]
        sizes.append((image.size, image.size))
        self.image_sizes = np.array([size[::-1] for size in sizes])
        self.image_tokens = np.array([self._num_tokens(index, size) for index, size in enumerate(sizes)])
        rows, self.num_cut = self._tokenise(records, used, tokenizer, codec, max_length, progress)
        rows, self.num_records = [rows[index] for index in order], len(order)
        if shared_pictures:
            marks = [tokenizer.convert_tokens_to_ids(token) for token in (IMAGE, REGION_TOKEN)]
            rows = share_pictures(rows, marks[0], self.image_tokens, max_length, None if self.regions is None else marks[1])
        if packed:
            rows = pack_rows(rows, self.image_tokens, max_length)
        self._keep(rows)

    def _tokenise(self, records, used, tokenizer, codec: BoxCodec, max_length: int, progress: bool) -> tuple[list[TokenRow], int]:
        rows, num_cut, mark = [], 0, tokenizer.convert_tokens_to_ids(IMAGE)
        token = "" if self.regions is None else REGION_TOKEN
        for start in tqdm(range(0, len(records), CHUNK), desc="tokenise", unit="k", disable=not progress):
            chunk = records[start : start + CHUNK]
            messages = [messages_of(record, self._geometries(record), codec, token) for record in chunk]
            indices = [[used[r["_folder"], name] for name in pictures_of(r)] for r in chunk]
            lengths = [self.image_tokens[images].tolist() for images in indices]
            tokens = tokenize(tokenizer, messages, [r["_where"] for r in chunk], lengths, max_length)
            for record, images, (ids, supervised, cut) in zip(chunk, indices, tokens, strict=True):
                images = tuple(images[: int((ids == mark).sum())])  # those that were not cut off
                num_regions = int((ids == tokenizer.convert_tokens_to_ids(token)).sum()) if token else 0
                rows.append(own_row(ids, supervised, images, self._add_regions(record, images, num_regions)))
                num_cut += cut
        return rows, num_cut

    def _add_regions(self, record: dict, images: tuple[int, ...], count: int) -> range:
        """Puts the first `count` regions that a record's questions name into the table; returns their indices there."""
        named = [index for turn in record["conversations"] if turn["from"] == "human" for index in regions_named(turn["value"])]
        if count > len(named):
            raise DataError(f"{record['_where']}: a turn holds {REGION_TOKEN}, which <region:i> puts in by itself; leave it out")
        geometries = self._geometries(record) if count else []
        for index in named[:count]:
            value = record["regions"][index]
            number = value.get("image_index", 0)
            if number >= len(images):
                raise DataError(
                    f"{record['_where']}: regions[{index}] is of a picture that max_length cuts off behind it; raise max_length"
                )
            self.regions.add(as_region(value, record["_where"], geometries[number]), geometries[number], images[number])
        return range(len(self.regions) - count, len(self.regions)) if count else range(0)

    def _num_tokens(self, index: int, size: tuple[int, int]) -> int:
        try:
            return self.image.num_tokens(*size, self.num_image_tokens)
        except DataError as error:
            raise DataError(f"{self.image_path(index)}: {error}") from None

    def _geometries(self, record: dict) -> list[Geometry]:
        return [self.image.geometry(*size) for size in sizes_of(record)]

    def _keep(self, rows: list[TokenRow]) -> None:
        """Few long arrays in place of many objects: forked workers then share their memory."""
        self._starts = np.cumsum([0] + [len(row.ids) for row in rows])
        self._tokens = [np.concatenate([getattr(row, key) for row in rows]) for key in PER_TOKEN]
        self._image_starts = np.cumsum([0] + [len(row.images) for row in rows])
        self._images = np.asarray([index for row in rows for index in row.images], np.int32)
        self._region_starts = np.cumsum([0] + [len(row.regions) for row in rows])
        self._regions = np.concatenate([row.regions for row in rows])
        self.lengths = np.asarray([row.length(self.image_tokens) for row in rows])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> TokenRow:
        """The row, each of its pictures still one mark."""
        part = slice(self._starts[index], self._starts[index + 1])
        images = self._images[self._image_starts[index] : self._image_starts[index + 1]]
        regions = self._regions[self._region_starts[index] : self._region_starts[index + 1]]
        return TokenRow(*(values[part] for values in self._tokens), tuple(images.tolist()), regions)

    def pixels(self, index: int) -> Tensor:
        """(T, 3, size, size) float32: the picture of that index in `image_files`."""
        return self.image.pixels([read_picture(self.image_path(index))])

    def image_path(self, index: int) -> Path:
        return self.image_folders[index] / self.image_files[index]


class Collator:
    """Token rows -> a batch: right-padded, each picture's mark widened to its tokens, pictures one behind the other.

    A batch without pictures gets one more row of nothing but a blank picture and no labels. It adds exactly zero to the
    loss, and every rank then runs tower and projector in every step, so that no collective waits for a missing one.
    pictures: index into `image_files` -> its part of `pixel_values`: pixels, or features kept on disk
    blank: that of the blank picture
    image_tokens, image_sizes: as in `ConversationDataset`; sizes where the model takes them
    regions: what region tokens stand for; region_features: their features (R, F), where they are kept on disk
    """

    def __init__(
        self,
        pictures,
        blank: Tensor,
        image_token_id: int,
        pad_token_id: int,
        image_tokens: np.ndarray,
        regions: RegionTable | None = None,
        region_features: Tensor | None = None,
        image_sizes: np.ndarray | None = None,
    ):
        self.pictures, self.blank = pictures, blank
        self.image_token_id, self.pad_token_id, self.image_tokens = image_token_id, pad_token_id, image_tokens
        self.regions, self.region_features, self.image_sizes = regions, region_features, image_sizes

    def __call__(self, rows: list[TokenRow]) -> dict[str, Tensor]:
        """-> input_ids, labels: (B, L) int64; pixel_values: (T, ...); attention_mask: (B, L) int64; image_sizes: (I, 2).

        Where a row holds several records: attention_mask (B, 1, L, L) bool, and position_ids (B, L) int64.
        With region tokens also what `mllm.region_tokens.WithRegionTokens.forward` takes for them.
        """
        if not any(row.images for row in rows):
            mark = np.array([self.image_token_id], np.int32)
            rows = [*rows, own_row(mark, np.zeros(1, bool), (BLANK,))]
        images = [index for row in rows for index in row.images]
        pictures = [self.blank if index == BLANK else self.pictures(index) for index in images]
        more = {} if self.regions is None else self._regions_of(rows, images, [len(picture) for picture in pictures])
        if self.image_sizes is not None:
            more["image_sizes"] = torch.from_numpy(self.image_sizes[images])
        rows = [self._widen(row) for row in rows]
        shape = len(rows), max(len(row.ids) for row in rows)
        input_ids, labels = np.full(shape, self.pad_token_id, np.int64), np.full(shape, IGNORE, np.int64)
        segments, roots = np.full((2, *shape), NO_TOKEN, np.int16)
        for index, row in enumerate(rows):
            input_ids[index, : len(row.ids)] = row.ids
            labels[index, : len(row.ids)] = np.where(row.supervised, row.ids, IGNORE)
            segments[index, : len(row.ids)] = row.segments
            roots[index, : len(row.ids)] = row.roots
        batch = {"input_ids": input_ids, "labels": labels}
        if segments.max() > 0:
            batch["attention_mask"], batch["position_ids"] = attention_of(segments, roots)
        else:
            batch["attention_mask"] = (segments != NO_TOKEN).astype(np.int64)
        batch = {key: torch.from_numpy(value) for key, value in batch.items()}
        return batch | {"pixel_values": torch.cat(pictures)} | more

    def _regions_of(self, rows: list[TokenRow], images: list[int], num_squares: list[int]) -> dict[str, Tensor]:
        """Each region lies in the first square of its picture, the whole one."""
        indices = np.concatenate([row.regions for row in rows])
        if self.region_features is not None:
            return {"region_features": self.region_features[indices]}
        place = dict(zip(images, np.cumsum([0, *num_squares]).tolist(), strict=False))
        index = torch.tensor([place[image] for image in self.regions.images[indices].tolist()], dtype=torch.long)
        return {"region_image_index": index, **self.regions.inputs(indices)}

    def _widen(self, row: TokenRow) -> TokenRow:
        times = np.ones(len(row.ids), int)
        times[row.ids == self.image_token_id] = self.image_tokens[list(row.images)]
        return TokenRow(*(np.repeat(getattr(row, key), times) for key in PER_TOKEN), row.images, row.regions)


def pixel_collator(dataset: ConversationDataset, image_token_id: int, pad_token_id: int) -> Collator:
    """The collator that reads pictures from disk."""
    sizes = dataset.image_sizes if dataset.image.mode == ANYRES else None
    parts = no_picture(dataset.image), image_token_id, pad_token_id, dataset.image_tokens, dataset.regions
    return Collator(dataset.pixels, *parts, image_sizes=sizes)
