"""`RegionPredictor`: encode an image once, then ask about its regions as often as you like.

    predictor = RegionPredictor.from_pretrained("path/to/cloc")
    predictor.set_image(Image.open("street.jpg"))
    index, cosines = predictor.classify_boxes([[10, 20, 90, 140]], ["bus", "bicycle"])
    boxes, scores = predictor.ground(["the red bicycle"])

Boxes are xyxy in pixels of the image as it was given; the processor's geometry is applied and undone here.
R regions, T texts, E joint space.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from encoder.boxes import clip_boxes, valid_boxes
from encoder.errors import DataError
from encoder.geometry import Geometry
from encoder.model import RegionEncoder
from encoder.pretrained import load_encoder, load_processor
from encoder.processor import ClocProcessor

Boxes = Tensor | np.ndarray | Sequence[Sequence[float]]


class RegionPredictor:
    """Region embeddings, names and places of one image at a time, on the model's device and in its precision.

    model: a `ClocModel`, used in evaluation mode; processor: its processor
    Raises DataError where the model has no Prompter, a box is unusable, or no image has been set.
    """

    def __init__(self, model: RegionEncoder, processor: ClocProcessor):
        if not isinstance(model, RegionEncoder):
            raise DataError(
                f"RegionPredictor was given a {type(model).__name__}, which has no Prompter; load a CLOC folder, or start a "
                "CLOC from that CLIP with ClocModel.from_clip and train it"
            )
        self.model, self.processor = model.eval(), processor
        self._text_emb: dict[str, Tensor] = {}
        self._tokens_1ND: Tensor | None = None
        self._image_emb_E: Tensor | None = None
        self._geometry: Geometry | None = None

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> "RegionPredictor":
        """From a CLOC folder."""
        return cls(load_encoder(folder, dtype).to(device), load_processor(folder))

    @torch.no_grad()
    def set_image(self, image: Image.Image) -> None:
        """Runs the tower on a PIL image; every later call is about it, and costs one Prompter layer."""
        if not isinstance(image, Image.Image):
            raise DataError(f"set_image was given a {type(image).__name__}; open the image with PIL.Image.open first")
        inputs, (geometry,) = self.processor.images([image])
        encoding = self.model.encode_image(inputs["pixel_values"].to(self.model.device, self.model.dtype))
        self._tokens_1ND, self._geometry = encoding.tokens, geometry
        self._image_emb_E = normalize(encoding.feat[0].float(), dim=-1)

    @property
    def image_embedding(self) -> Tensor:
        """(E,) of the whole image, L2-normalised: CLIP's."""
        self._image()
        return self._image_emb_E

    def _image(self) -> tuple[Tensor, Geometry]:
        if self._tokens_1ND is None or self._geometry is None:
            raise DataError("no image is set; call set_image(image) first")
        return self._tokens_1ND, self._geometry

    def _prompt_boxes(self, boxes_R4: Tensor, tokens_1ND: Tensor) -> Tensor:
        index_R = torch.zeros(len(boxes_R4), dtype=torch.long, device=self.model.device)
        return normalize(self.model.embed_boxes(tokens_1ND, boxes_R4, index_R).float(), dim=-1)

    @torch.no_grad()
    def embed_boxes(self, boxes_px: Boxes) -> Tensor:
        """Boxes (R, 4) -> region embeddings (R, E), L2-normalised float32; R may be 0."""
        tokens_1ND, geometry = self._image()
        try:
            boxes = boxes_px if isinstance(boxes_px, Tensor) else torch.from_numpy(np.array(boxes_px, dtype=np.float32))
        except (TypeError, ValueError) as error:
            raise DataError(f"boxes are no table of numbers ({error}); give (R, 4): x1, y1, x2, y2 in pixels") from error
        boxes = boxes.to(self.model.device, torch.float32)
        boxes = boxes.reshape(0, 4) if boxes.numel() == 0 else boxes
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise DataError(f"boxes have the shape {tuple(boxes.shape)}; give (R, 4): x1, y1, x2, y2 in pixels for each region")
        wrong = (~valid_boxes(boxes, geometry.width, geometry.height)).nonzero()[:, 0]
        if len(wrong):
            first = int(wrong[0])
            raise DataError(
                f"box {first} is {[round(value, 2) for value in boxes[first].tolist()]}; give x1 < x2 and y1 < y2 inside "
                f"the {geometry.width}x{geometry.height} px image"
            )
        boxes = clip_boxes(boxes, geometry.width, geometry.height)
        return self._prompt_boxes(geometry.boxes_to_model(boxes), tokens_1ND)

    @torch.no_grad()
    def _text_feat(self, texts: Sequence[str]) -> Tensor:
        """(T, E) unnormalised; each distinct text is encoded once in the predictor's life."""
        new = [text for text in dict.fromkeys(texts) if text not in self._text_emb]
        if new:
            inputs = self.processor.texts(new).to(self.model.device)
            self._text_emb |= dict(zip(new, self.model.encode_text(**inputs), strict=True))
        joint = self.model.config.projection_dim
        empty = torch.zeros(0, joint, device=self.model.device, dtype=self.model.dtype)
        return torch.stack([self._text_emb[text] for text in texts]) if len(texts) else empty

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (T, E), L2-normalised float32; needs no image."""
        if isinstance(texts, str):
            raise DataError(f"texts is the string '{texts}'; give a list of texts")
        return normalize(self._text_feat(texts).float(), dim=-1)

    def classify_boxes(self, boxes_px: Boxes, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Boxes (R, 4) and K names -> index of the best name (R,), and the cosine of every name (R, K).

        The paper's zero-shot protocol: the name of highest cosine (arXiv 2410.02746, Section 5.2). For probabilities
        multiply the cosines by `model.logit_scale.exp()` and take the softmax.
        """
        if not len(names):
            raise DataError("names is empty; give at least one name to choose from")
        cosines_RK = self.embed_boxes(boxes_px) @ self.embed_texts(names).T
        return cosines_RK.argmax(dim=1), cosines_RK

    @torch.no_grad()
    def ground(self, phrases: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Phrases -> one box each, (T, 4) pixels clipped to the image, and scores (T,).

        A score is the cosine of the phrase with the region embedding of its own predicted box: does what lies there
        look like the phrase? The grounded feature itself is trained through the BoxHead alone (Eq. 3), so its cosine
        with a text says nothing.
        """
        tokens_1ND, geometry = self._image()
        text_emb_TE = self.embed_texts(phrases)
        index_T = torch.zeros(len(text_emb_TE), dtype=torch.long, device=self.model.device)
        grounded_TE = self.model.embed_texts(tokens_1ND, self._text_feat(phrases), index_T)
        corners_T22 = self.model.predict_boxes(grounded_TE).float().reshape(-1, 2, 2)
        # The head is linear and may cross the corners or leave the square.
        boxes_T4 = torch.cat([corners_T22.amin(1), corners_T22.amax(1)], dim=1).clamp(0, 1)
        scores_T = (self._prompt_boxes(boxes_T4, tokens_1ND) * text_emb_TE).sum(-1)
        return geometry.boxes_to_image(boxes_T4), scores_T
