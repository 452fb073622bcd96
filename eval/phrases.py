"""Scores phrases that several boxes may answer: merged-box and any-box, as Flickr30k Entities is evaluated."""

import numpy as np

from encoder.data.sources.flickr30k import box_around
from eval.metrics import THRESHOLDS, paired_iou
from eval.predictions import Prediction, Target

RECALLS = (1, 5, 10)


def best_iou(answers: list, truths: list) -> float:
    """The highest IoU of any answer with any truth; 0 where there is no answer."""
    pairs = [(answer, truth) for answer in answers for truth in truths]
    if not pairs:
        return 0.0
    return float(paired_iou(*(np.array(boxes, np.float64) for boxes in zip(*pairs, strict=True))).max())


def phrase_iou(target: Target, prediction: Prediction, ranked: bool, k: int = 1) -> dict[str, float]:
    """IoU of one phrase by both protocols.

    ranked: the boxes are alternatives, the best first, and the first k count; else they are one answer of several parts,
        merged for `merged_box`, and the first one counts for `any_box`
    """
    said = list(prediction.boxes) or ([prediction.box] if prediction.box else [])
    first = said[:k]
    merged = first if ranked or not said else [box_around(said)]
    return {"merged_box": best_iou(merged, [target.box]), "any_box": best_iou(first, list(target.boxes) or [target.box])}


def phrase_hits(targets: list[Target], predictions: list[Prediction], ranked: bool, k: int = 1) -> dict[str, np.ndarray]:
    """(N,) 0 or 1 per protocol."""
    found = [phrase_iou(t, p, ranked, k) for t, p in zip(targets, predictions, strict=True)]
    return {name: np.array([iou[name] >= THRESHOLDS[0] for iou in found], float) for name in ("merged_box", "any_box")}


def by_type(hits_N: np.ndarray, targets: list[Target]) -> dict[str, dict[str, float]]:
    """Accuracy and number per type of phrase; one of two types (`clothing/other`) counts under both, as in the original."""
    grouped: dict[str, list[float]] = {}
    for hit, target in zip(hits_N, targets, strict=True):
        for kind in target.kind.split("/"):
            grouped.setdefault(kind, []).append(float(hit))
    return {kind: {"accuracy": sum(values) / len(values), "n": len(values)} for kind, values in sorted(grouped.items())}
