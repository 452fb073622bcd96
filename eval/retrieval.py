"""Retrieval in both directions between pictures, or boxes in them, and their captions: R@1, R@5 and R@10.

`text_to_*`: a caption is given, its picture or box is looked for among all; `*_to_text` the other way round. Captions
are repeated ("man"), and there are two ways to see that, `TEXTS`:
    each       every caption stands for itself: of equal ones only its own is right (the published protocols)
    distinct   equal captions are one, and whatever carries it is right
Equal scores count as in `eval.ranking`.

I items (boxes, or whole pictures), T captions, U distinct texts, E joint space.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from eval.embedding import Embedder, read_ahead
from eval.metrics import chance_at
from eval.predictions import Prediction, PredictionLog, Target
from eval.ranking import rank
from eval.scoring import CUTOFFS, plain_name

TEXTS = ("each", "distinct")
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Picture:
    """name: for people and reports; load: decodes it as RGB; boxes: xyxy pixels, what is looked for in it; captions: per
    box, one or more. A whole picture is the box around it."""

    name: str
    width: int
    height: int
    load: Callable[[], Image.Image]
    boxes: tuple[Box, ...]
    captions: tuple[tuple[str, ...], ...]


class Gallery:
    """The items of all pictures and their captions, numbered; what is asked, and what is right.

    texts: one of `TEXTS`; lowercase: whether the model sees no case
    items: (picture, box) per item; captions: (item, text) per caption
    unique: the distinct texts, as first spelled; text_T: (T,) which of them each caption is
    """

    def __init__(self, pictures: list[Picture], texts: str, lowercase: bool):
        self.pictures, self.distinct = pictures, texts == "distinct"
        self.items = [(picture, box) for picture in pictures for box in picture.boxes]
        of_items = [captions for picture in pictures for captions in picture.captions]
        self.captions = [(item, text) for item, captions in enumerate(of_items) for text in captions]
        self.item_T = torch.tensor([item for item, _ in self.captions])
        number: dict[str, int] = {}
        self.unique: list[str] = []
        of_captions = []
        for _, text in self.captions:
            key = plain_name(text) if self.distinct or lowercase else text
            if key not in number:
                number[key] = len(self.unique)
                self.unique.append(text)
            of_captions.append(number[key])
        self.text_T = torch.tensor(of_captions)

    def text_targets(self) -> list[Target]:
        """One per caption, or per distinct one (then with the first item that carries it)."""
        rows = list(enumerate(self.captions))
        if self.distinct:
            first = dict(reversed(list(zip(self.text_T.tolist(), rows, strict=True))))
            rows = [first[text] for text in range(len(self.unique))]
        return [self._target(str(caption), item, text, "") for caption, (item, text) in rows]

    def item_targets(self) -> list[Target]:
        """One per item; its category is its first caption."""
        firsts = dict(reversed(self.captions))
        return [self._target(str(item), item, "", firsts[item]) for item in range(len(self.items))]

    def _target(self, name: str, item: int, text: str, category: str) -> Target:
        picture, box = self.items[item]
        return Target(name, picture.name, picture.width, picture.height, text, box, category)

    def text_queries(self) -> tuple[Tensor, Tensor]:
        """(Q,) the distinct text of each query, and (P, 2) pairs of a query and an item that is right for it."""
        if self.distinct:
            return torch.arange(len(self.unique)), torch.stack([self.text_T, self.item_T], 1).unique(dim=0)
        return self.text_T, torch.stack([torch.arange(len(self.text_T)), self.item_T], 1)

    def item_answers(self) -> tuple[Tensor, Tensor]:
        """(U,) how many candidates each distinct text stands for, and (P, 2) pairs of an item and a text right for it."""
        pairs = torch.stack([self.item_T, self.text_T], 1)
        if self.distinct:
            return torch.ones(len(self.unique), dtype=torch.long), pairs.unique(dim=0)
        return self.text_T.bincount(minlength=len(self.unique)), pairs


@dataclass(frozen=True)
class Directions:
    """Where the two evaluations go and what they are called.

    names: benchmarks, text query first; split, variant: the folders below; variant may be empty
    """

    out: Path
    names: tuple[str, str]
    split: str
    variant: str = ""

    def logs(self, gallery: Gallery, protocol: dict[str, Any], model: dict, settings: dict) -> list[PredictionLog]:
        """Opens both, with what chance would score in the protocol."""
        _, right_of_texts = gallery.text_queries()
        copies, right_of_items = gallery.item_answers()
        candidates = (len(gallery.items), int(copies.sum()))
        right = (right_of_texts[:, 0].bincount(), right_of_items[:, 0].bincount())
        logs = []
        for name, targets, count, num_right in zip(
            self.names, (gallery.text_targets(), gallery.item_targets()), candidates, right, strict=True
        ):
            chance = {metric: chance_at(k, count, num_right.numpy()) for metric, k in CUTOFFS["retrieval"].items()}
            facts = {"benchmark": name, "split": self.split, "task": "retrieval", **protocol, "candidates": count}
            folder = self.out / name / self.split / self.variant
            record = {**model, "variant": self.variant}
            logs.append(PredictionLog(folder, {**facts, "chance": chance}, record, targets, settings))
        return logs


def evaluate_retrieval(
    pictures: list[Picture],
    texts: str,
    directions: Directions,
    embedder: Embedder,
    embed: Callable[[list[Image.Image], list[list[Box]]], Tensor],
    batch_size: int,
    protocol: dict[str, Any],
    settings: dict[str, Any],
) -> list[Path]:
    """Ranks and writes both evaluations; returns their folders.

    texts: one of `TEXTS`; embed: pictures and their boxes -> (I, E), L2-normalised; batch_size: pictures
    An evaluation that is there already is not computed again.
    """
    gallery = Gallery(pictures, texts, embedder.processor.lowercase)
    protocol = {**protocol, "texts": texts, "pictures": len(pictures)}
    logs = directions.logs(gallery, protocol, embedder.record(), {**settings, "batch_size": batch_size})
    if any(log.remaining() for log in logs):
        item_emb_IE = embed_pictures(pictures, embed, batch_size)
        text_emb_UE = embedder.embed_texts(gallery.unique)
        query_text, right = gallery.text_queries()
        places, best = rank(text_emb_UE[query_text.to(text_emb_UE.device)], item_emb_IE, right)
        _append(logs[0], places, [_item_words(gallery, item) for item in best.tolist()])
        copies, right = gallery.item_answers()
        places, best = rank(item_emb_IE, text_emb_UE, right, copies)
        _append(logs[1], places, [gallery.unique[text] for text in best.tolist()])
    return [log.folder for log in logs]


def embed_pictures(pictures: list[Picture], embed: Callable, batch_size: int) -> Tensor:
    """(I, E) of all boxes, picture by picture, each picture encoded once."""
    batches = (pictures[start : start + batch_size] for start in range(0, len(pictures), batch_size))
    parts = []
    with tqdm(total=len(pictures), unit="picture", desc="pictures") as bar:
        for batch, images in read_ahead(batches, lambda picture: picture.load()):
            parts.append(embed(images, [list(picture.boxes) for picture in batch]))
            bar.update(len(batch))
    return torch.cat(parts)


def _item_words(gallery: Gallery, item: int) -> str:
    picture, box = gallery.items[item]
    return f"{picture.name} {np.round(box, 1).tolist()}"


def _append(log: PredictionLog, places: Tensor, answers: list[str]) -> None:
    """Answers what the log lacks; `answers`: what was ranked first, in words."""
    rows = zip(log.targets, answers, places.tolist(), strict=True)
    log.append([Prediction(t.id, t.image, t.text, raw, place=tuple(p)) for t, raw, p in rows if t.id not in log.answered])
