"""What a detector says of one image: boxes, each with its phrase and a score. The rules that all detectors share.

P boxes that a detector proposes, Q phrases that it was asked for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from encoder.boxes import box_area, box_iou
from encoder.errors import DataError


@dataclass(frozen=True)
class Detection:
    """box: xyxy, pixels of the original image, inside it; phrase: what it shows; score: the detector's confidence."""

    box: tuple[float, float, float, float]
    phrase: str
    score: float


def check_rule(min_score: float, nms_iou: float | None) -> None:
    """Raises DataError where `best_detections` could not use these."""
    if not -1 <= min_score < 1:
        raise DataError(f"min_score is {min_score}; give a score below 1 (0 keeps every box that has any confidence)")
    if nms_iou is not None and not 0 < nms_iou <= 1:
        raise DataError(f"nms_iou is {nms_iou}; give an overlap above 0 and up to 1, or None for no suppression")


def best_detections(
    boxes_px: Tensor, scores_PQ: Tensor, phrases: Sequence[str], min_score: float, nms_iou: float | None = None
) -> list[Detection]:
    """Every box with its most confident phrase, where that score is above `min_score`; the best box first.

    boxes_px: (P, 4) xyxy pixels of the original image, clipped to it; a box without area is left out
    scores_PQ: (P, Q); of two equal scores the phrase named first wins
    nms_iou: a box that overlaps a better one by more than this (IoU) is left out, whatever their phrases; None keeps all
        (the paper names no suppression, arXiv 2410.02746, Section 4)
    """
    if not len(phrases) or not len(boxes_px):
        return []
    scores_P, best_P = scores_PQ.float().max(dim=1)
    keep = (scores_P > min_score) & (box_area(boxes_px) > 0)
    boxes, scores, best = boxes_px[keep].float().cpu(), scores_P[keep].cpu(), best_P[keep].tolist()
    order = scores.argsort(descending=True, stable=True).tolist()
    if nms_iou is not None:
        order = suppress(boxes, order, nms_iou)
    return [Detection(tuple(boxes[i].tolist()), phrases[best[i]], scores[i].item()) for i in order]


def suppress(boxes: Tensor, order: Sequence[int], max_iou: float) -> list[int]:
    """Of boxes (P, 4), best first in `order`, the indices that overlap no better one that was kept by more than `max_iou`."""
    overlaps = box_iou(boxes, boxes) > max_iou
    dropped, kept = torch.zeros(len(boxes), dtype=torch.bool), []
    for index in order:
        if not dropped[index]:
            kept.append(index)
            dropped |= overlaps[index]
    return kept


class PhraseCache:
    """Embeddings of phrases, each made once and kept: captions name the same things again and again.

    embed: phrases -> (n, E). It is always given `size` of them (the last one repeated), so that an embedding follows from
        its phrase alone, to the last bit, and a restarted run writes what an uninterrupted one would have written
    max_phrases: when it holds this many it starts afresh
    """

    def __init__(self, embed: Callable[[list[str]], Tensor], size: int, max_phrases: int = 200_000):
        self.embed, self.size, self.max_phrases = embed, size, max_phrases
        self._known: dict[str, Tensor] = {}

    def __call__(self, phrases: Sequence[str]) -> Tensor:
        """At least one phrase -> (Q, E)."""
        new = [phrase for phrase in dict.fromkeys(phrases) if phrase not in self._known]
        if len(self._known) + len(new) > self.max_phrases:
            self._known, new = {}, list(dict.fromkeys(phrases))
        for start in range(0, len(new), self.size):
            part = new[start : start + self.size]
            embeddings = self.embed(part + part[-1:] * (self.size - len(part)))
            self._known |= dict(zip(part, embeddings, strict=False))
        return torch.stack([self._known[phrase] for phrase in phrases])
