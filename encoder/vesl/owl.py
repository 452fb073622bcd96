"""OWLv2 and OWL-ViT, part by part, so that the embedding of a phrase is made once and not once per image.

Their `forward` runs the text tower for every image anew. What follows runs the same parts with texts that are remembered;
`tests/test_vesl_detector.py` holds the two equal. An OWL proposes one box per patch and says no more of a phrase than its
embedding does, so the phrases of an image do not influence one another.

B images, P patches, Q phrases, D width, E joint space, T templates.
"""

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.image_transforms import center_to_corners_format

from encoder.errors import DataError
from encoder.geometry import Geometry
from encoder.vesl.detections import PhraseCache

GEOMETRY = {"owlv2": "pad_corner", "owlvit": "squash"}
PHRASES_AT_ONCE = 8


class OwlScores:
    """model: `Owlv2ForObjectDetection` or `OwlViTForObjectDetection`; processor: its own; for the rest see `Detector`."""

    def __init__(self, model, processor, image_size: int = 448, templates: tuple[str, ...] = ("{}",)):
        patch = model.config.vision_config.patch_size
        if image_size < patch or image_size % patch:
            nearest = max(1, round(image_size / patch)) * patch
            raise DataError(
                f"image_size is {image_size}, the detector's patches are {patch} px; give a multiple, such as {nearest}"
            )
        self.model, self.processor = model.eval(), processor
        self.image_size, self.templates = image_size, templates
        self.geometry = GEOMETRY[model.config.model_type]
        self.interpolate = image_size != model.config.vision_config.image_size
        self.embed_phrases = PhraseCache(self._embed, PHRASES_AT_ONCE)

    def __call__(self, images: list[Image.Image], phrases: list[list[str]]) -> list[tuple[Tensor, Tensor]]:
        """See `encoder.vesl.detector.Scores`."""
        logits_BPQ, boxes_BP4 = self.forward(self.pixels(images), phrases)
        results = []
        for index, (image, of_image) in enumerate(zip(images, phrases, strict=True)):
            boxes = center_to_corners_format(boxes_BP4[index].float())
            geometry = Geometry(self.geometry, *image.size, self.image_size)
            results.append((geometry.boxes_to_image(boxes), logits_BPQ[index, :, : len(of_image)].float().sigmoid()))
        return results

    def forward(self, pixels_B3SS: Tensor, phrases: list[list[str]]) -> tuple[Tensor, Tensor]:
        """Normalised pixels and the phrases of each -> logits (B, P, Q), of the longest list of phrases and the lowest number
        there is past the end of the others, and boxes (B, P, 4): centre and size in [0, 1] of the square."""
        feature_map, _ = self.model.image_embedder(pixels_B3SS, interpolate_pos_encoding=self.interpolate)
        feat_BPD = feature_map.flatten(1, 2)
        emb_BQE = pad_sequence([self.embed_phrases(of_image) for of_image in phrases], batch_first=True)
        counts = torch.tensor([len(of_image) for of_image in phrases], device=emb_BQE.device)
        mask_BQ = torch.arange(emb_BQE.shape[1], device=emb_BQE.device) < counts[:, None]
        logits_BPQ, _ = self.model.class_predictor(feat_BPD, emb_BQE, mask_BQ)
        return logits_BPQ, self.model.box_predictor(feat_BPD, feature_map, self.interpolate)

    def pixels(self, images: list[Image.Image]) -> Tensor:
        """(B, 3, S, S), as the processor prepares them, at this field's size."""
        size = {"height": self.image_size, "width": self.image_size}
        # Some published OWL-ViT processors crop, at the size they were published with.
        inputs = self.processor.image_processor(images, size=size, do_center_crop=False, return_tensors="pt")
        return inputs["pixel_values"].to(self.model.device, self.model.dtype)

    def _embed(self, phrases: list[str]) -> Tensor:
        """Phrases -> (Q, E), the mean of their normalised embeddings in all templates; the class head normalises it again."""
        texts = [template.replace("{}", phrase) for phrase in phrases for template in self.templates]
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.processor.tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        feat = self.model.base_model.get_text_features(**tokens.to(self.model.device)).pooler_output
        emb = feat / feat.norm(dim=-1, keepdim=True)
        return emb.unflatten(0, (len(phrases), len(self.templates))).mean(1)
