"""Open-vocabulary detectors of transformers: OWLv2 (the paper's), OWL-ViT and Grounding DINO, by their own processors.

    detector = Detector.from_pretrained("google/owlv2-large-patch14-finetuned")
    detector.detect([image], [["a red bus", "umbrella"]])   ->  [[Detection(box, phrase, score), ...]]

As in the paper (arXiv 2410.02746, Section 4): a field of 448 px, all phrases of an image in one pass, boxes of confidence
above 0.1, each with its most confident phrase. One call is one batch.
"""

from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

from encoder.errors import DataError
from encoder.pretrained import load_strict, model_kind, weights_hash
from encoder.vesl.detections import Detection, best_detections, check_rule
from encoder.vesl.grounding_dino import GroundingDinoScores
from encoder.vesl.owl import OwlScores

# By the model_type of config.json.
FAMILIES = {
    "owlv2": OwlScores,
    "owlvit": OwlScores,
    "grounding-dino": GroundingDinoScores,
    "mm-grounding-dino": GroundingDinoScores,
}


class Scores(Protocol):
    """What differs between detectors: images and phrases -> per image boxes (P, 4), xyxy pixels of the original image and
    clipped to it, and the confidence of every phrase for every box, (P, Q)."""

    def __call__(self, images: list[Image.Image], phrases: list[list[str]]) -> list[tuple[Tensor, Tensor]]: ...


class Detector:
    """A detector and the rule by which its boxes are kept.

    scores: what a family of models says of a batch
    min_score: a box is kept where its best phrase has more confidence than this
    nms_iou: a box that overlaps a better one by more is left out, whatever their phrases; None keeps all
    described: what `describe` adds: the checkpoint and how it is used
    """

    def __init__(self, scores: Scores, min_score: float = 0.1, nms_iou: float | None = None, described: dict | None = None):
        check_rule(min_score, nms_iou)
        self.scores, self.min_score, self.nms_iou, self.described = scores, min_score, nms_iou, described or {}

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        image_size: int = 448,
        min_score: float = 0.1,
        nms_iou: float | None = None,
        templates: tuple[str, ...] = ("{}",),
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str = torch.float32,
    ) -> "Detector":
        """A folder, or a name on the model hub.

        image_size: side of the field in pixels; position tables are interpolated where the checkpoint's differs
        templates: texts with `{}` for the phrase, whose embeddings are averaged; the paper names none. OWL's alone
        Raises DataError for another kind of model, weights that do not fit, and templates where they have no meaning
        """
        check_rule(min_score, nms_iou)
        kind = model_kind(path, f"{path} holds no model that transformers can read ({{reason}}); give a detector's folder")
        if kind not in FAMILIES:
            raise DataError(f"{path} holds a '{kind}' model; give a detector of one of the kinds {', '.join(FAMILIES)}")
        wrong = [template for template in templates if template.count("{}") != 1]
        if wrong or not templates:
            raise DataError(f"templates: {wrong or 'none given'}; give texts with {{}} once in each, for the phrase")
        model = load_strict(AutoModelForZeroShotObjectDetection, path, dtype=dtype).to(device)
        scores = FAMILIES[kind](model, AutoProcessor.from_pretrained(path), image_size, tuple(templates))
        described = {
            "detector": kind,
            "checkpoint": str(path),
            "weights": weights_hash(model),
            "image_size": image_size,
            "templates": list(templates),
            "dtype": str(model.dtype).removeprefix("torch."),
        }
        return cls(scores, min_score, nms_iou, described)

    def detect(self, images: list[Image.Image], phrases: list[list[str]]) -> list[list[Detection]]:
        """RGB images and the phrases of each (none: no box, and no work) -> their detections, the most confident first."""
        return detect_batch(self.scores, images, phrases, self.min_score, self.nms_iou)

    def describe(self) -> dict:
        """Everything that decides what comes out, as JSON can hold it."""
        return {**self.described, "min_score": self.min_score, "nms_iou": self.nms_iou}


@torch.inference_mode()
def detect_batch(
    scores: Scores, images: list[Image.Image], phrases: list[list[str]], min_score: float, nms_iou: float | None
) -> list[list[Detection]]:
    """What `Detector.detect` does with any `Scores`; images without phrases are not looked at."""
    if len(images) != len(phrases):
        raise DataError(f"{len(images)} images came with {len(phrases)} lists of phrases; give one list for each image")
    asked = [index for index, of_image in enumerate(phrases) if of_image]
    found: list[list[Detection]] = [[] for _ in images]
    if asked:
        results = scores([images[index] for index in asked], [phrases[index] for index in asked])
        for index, (boxes_px, scores_PQ) in zip(asked, results, strict=True):
            found[index] = best_detections(boxes_px, scores_PQ, phrases[index], min_score, nms_iou)
    return found
