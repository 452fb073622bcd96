"""A CLOC as detector: the encoder labels its own next training set.

Every phrase of an image is a text prompt: the Prompter grounds it and the BoxHead reads a box. That box is then a prompt
itself. Its region embedding is compared with all phrases of the image: the phrase of highest cosine is the box's caption,
and the cosine is its score. So what a box is called is decided by what lies in it, not by what was looked for: the head
always answers, also where there is nothing to find. A cosine is no probability; a useful `min_score` depends on the model.

A phrase gives one box, however many such objects there are. Phrases of one object give one box each, of which `nms_iou`
keeps the best.

B images, R phrases of all images, E joint space.
"""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from encoder.errors import DataError
from encoder.model import RegionEncoder
from encoder.pretrained import load_encoder, load_processor, weights_hash
from encoder.processor import ClocProcessor
from encoder.vesl.detections import Detection, PhraseCache, check_rule
from encoder.vesl.detector import detect_batch


class ClocDetector:
    """model: a CLOC with a Prompter; processor: its own; min_score: smallest cosine, not included; nms_iou: see `Detector`."""

    def __init__(
        self,
        model: RegionEncoder,
        processor: ClocProcessor,
        min_score: float = 0.1,
        nms_iou: float | None = 0.5,
        checkpoint: str = "",
    ):
        check_rule(min_score, nms_iou)
        if getattr(model, "box_head", None) is None:
            raise DataError(
                f"{checkpoint or 'the model'} is a {type(model).__name__} that finds no boxes; give a CLOC with a Prompter"
            )
        self.model, self.processor = model.eval(), processor
        self.min_score, self.nms_iou, self.checkpoint = min_score, nms_iou, checkpoint
        self.embed_phrases = PhraseCache(self._embed, 1)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        min_score: float = 0.1,
        nms_iou: float | None = 0.5,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "ClocDetector":
        """A CLOC folder."""
        return cls(load_encoder(path, dtype).to(device), load_processor(path), min_score, nms_iou, str(path))

    def detect(self, images: list[Image.Image], phrases: list[list[str]]) -> list[list[Detection]]:
        """As `Detector.detect`."""
        return detect_batch(self._scores, images, phrases, self.min_score, self.nms_iou)

    def describe(self) -> dict:
        """As `Detector.describe`."""
        return {
            "detector": self.model.config.model_type,
            "checkpoint": self.checkpoint,
            "weights": weights_hash(self.model),
            "image_size": self.processor.image_processor.size,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "min_score": self.min_score,
            "nms_iou": self.nms_iou,
        }

    def _scores(self, images: list[Image.Image], phrases: list[list[str]]) -> list[tuple[Tensor, Tensor]]:
        inputs, geometries = self.processor.images(images)
        tokens_BND = self.model.encode_image(inputs["pixel_values"].to(self.model.device, self.model.dtype)).tokens
        counts = [len(of_image) for of_image in phrases]
        index_R = torch.repeat_interleave(torch.tensor(counts)).to(self.model.device)
        feat_RE = self.embed_phrases([phrase for of_image in phrases for phrase in of_image])
        corners = self.model.predict_boxes(self.model.embed_texts(tokens_BND, feat_RE, index_R)).float().reshape(-1, 2, 2)
        # The head is linear and may cross the corners or leave the square. The padding is no part of a box either.
        squares = torch.cat([corners.amin(1), corners.amax(1)], dim=1).split(counts)
        boxes_px = [geometry.boxes_to_image(boxes) for geometry, boxes in zip(geometries, squares, strict=True)]
        boxes_R4 = torch.cat([geometry.boxes_to_model(boxes) for geometry, boxes in zip(geometries, boxes_px, strict=True)])
        region_RE = normalize(self.model.embed_boxes(tokens_BND, boxes_R4, index_R).float(), dim=-1)
        text_RE = normalize(feat_RE.float(), dim=-1)
        cosines = [regions @ texts.T for regions, texts in zip(region_RE.split(counts), text_RE.split(counts), strict=True)]
        return list(zip(boxes_px, cosines, strict=True))

    def _embed(self, phrases: list[str]) -> Tensor:
        return self.model.encode_text(**self.processor.texts(phrases).to(self.model.device))
