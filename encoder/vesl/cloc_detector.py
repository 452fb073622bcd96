"""A CLOC as detector: the encoder labels its own next training set.

Where boxes come from:
`text`     every phrase of an image is a text prompt: the Prompter grounds it and the BoxHead reads a box. One box a phrase,
           however many such objects there are
`windows`  the same few hundred boxes for every image, in steps of size, shape and place. It finds several objects of a name
           and needs no BoxHead, at the cost of a prompt for each: for a CLOC with `prompter_readout="prompt"`

What they are called: each box is a prompt itself, and its region embedding is compared with all phrases of the image. The
phrase of highest cosine is its caption, the cosine its score. So what lies in a box decides, not what was looked for: the
head always answers, also where there is nothing to find. Boxes of one thing overlap, and `nms_iou` keeps the best. A cosine
is no probability: a useful `min_score` depends on the model, and `benchmarks/label_quality.py` shows it.

B images, R boxes of all images, T phrases of all images, E joint space.
"""

from functools import lru_cache
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

PROPOSALS = ("text", "windows")
WINDOW_SIDES = (0.25, 0.35, 0.5, 0.7, 1.0)  # of the model's square
WINDOW_STEP = 0.25  # of a window's own side
PROMPTS_AT_ONCE = 2048  # of all images; bounds the memory


class ClocDetector:
    """model: a CLOC with a Prompter; processor: its own; proposals: `text` or `windows`, see above; min_score: a box is kept
    where its cosine is above this; nms_iou: see `Detector`."""

    def __init__(
        self,
        model: RegionEncoder,
        processor: ClocProcessor,
        min_score: float = 0.1,
        nms_iou: float | None = 0.5,
        proposals: str = "text",
        checkpoint: str = "",
    ):
        check_rule(min_score, nms_iou)
        if proposals not in PROPOSALS:
            raise DataError(f"proposals is '{proposals}'; choose one of {', '.join(PROPOSALS)}")
        if getattr(model, "box_head", None) is None:
            raise DataError(
                f"{checkpoint or 'the model'} is a {type(model).__name__} that finds no boxes; give a CLOC with a Prompter"
            )
        self.model, self.processor = model.eval(), processor
        self.min_score, self.nms_iou = min_score, nms_iou
        self.proposals, self.checkpoint = proposals, checkpoint
        self.embed_phrases = PhraseCache(self._embed, 1)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        min_score: float = 0.1,
        nms_iou: float | None = 0.5,
        proposals: str = "text",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "ClocDetector":
        """A CLOC folder."""
        return cls(load_encoder(path, dtype).to(device), load_processor(path), min_score, nms_iou, proposals, str(path))

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
            "proposals": self.proposals,
            "min_score": self.min_score,
            "nms_iou": self.nms_iou,
        }

    def _scores(self, images: list[Image.Image], phrases: list[list[str]]) -> list[tuple[Tensor, Tensor]]:
        inputs, geometries = self.processor.images(images)
        tokens_BND = self.model.encode_image(inputs["pixel_values"].to(self.model.device, self.model.dtype)).tokens
        counts = [len(of_image) for of_image in phrases]
        feat_TE = self.embed_phrases([phrase for of_image in phrases for phrase in of_image])
        if self.proposals == "text":
            squares = self._text_boxes(tokens_BND, feat_TE, counts).split(counts)
        else:
            squares = [windows().to(feat_TE.device)] * len(images)
        # A box ends where the image does: the padding is no part of it, and what is embedded is what is written.
        boxes_px = [geometry.boxes_to_image(boxes) for geometry, boxes in zip(geometries, squares, strict=True)]
        boxes_R4 = torch.cat([geometry.boxes_to_model(boxes) for geometry, boxes in zip(geometries, boxes_px, strict=True)])
        sizes = [len(boxes) for boxes in boxes_px]
        parts = zip(boxes_R4.split(PROMPTS_AT_ONCE), image_index(sizes, boxes_R4).split(PROMPTS_AT_ONCE), strict=True)
        region_RE = torch.cat([self.model.embed_boxes(tokens_BND, boxes, index) for boxes, index in parts])
        regions = normalize(region_RE.float(), dim=-1).split(sizes)
        texts = normalize(feat_TE.float(), dim=-1).split(counts)
        return [(boxes, regions_NE @ texts_TE.T) for boxes, regions_NE, texts_TE in zip(boxes_px, regions, texts, strict=True)]

    def _text_boxes(self, tokens_BND: Tensor, feat_TE: Tensor, counts: list[int]) -> Tensor:
        """(T, 4) xyxy in [0, 1] of the square, where the BoxHead sees each phrase; it is linear and may leave the square."""
        parts = zip(feat_TE.split(PROMPTS_AT_ONCE), image_index(counts, feat_TE).split(PROMPTS_AT_ONCE), strict=True)
        grounded = torch.cat([self.model.embed_texts(tokens_BND, feat, index) for feat, index in parts])
        corners = self.model.predict_boxes(grounded).float().reshape(-1, 2, 2)
        return torch.cat([corners.amin(1), corners.amax(1)], dim=1)  # it may cross them, too

    def _embed(self, phrases: list[str]) -> Tensor:
        return self.model.encode_text(**self.processor.texts(phrases).to(self.model.device))


def image_index(counts: list[int], like: Tensor) -> Tensor:
    """[2, 0, 3] -> [0, 0, 2, 2, 2], on the device of `like`."""
    return torch.repeat_interleave(torch.tensor(counts)).to(like.device)


@lru_cache
def windows() -> Tensor:
    """(W, 4) xyxy in [0, 1]: every pair of `WINDOW_SIDES`, up to twice as long as wide, evenly over the square, no further
    apart than about `WINDOW_STEP` of their side."""
    places = {side: torch.linspace(0, 1 - side, round((1 - side) / (WINDOW_STEP * side)) + 1).tolist() for side in WINDOW_SIDES}
    pairs = [(w, h) for w in WINDOW_SIDES for h in WINDOW_SIDES if max(w, h) <= 2 * min(w, h)]
    return torch.tensor([[x, y, x + w, y + h] for w, h in pairs for x in places[w] for y in places[h]])
