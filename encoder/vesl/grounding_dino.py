"""Grounding DINO: the phrases of an image are one sentence, "a red bus. umbrella.", and a box scores its tokens.

Image and sentence are fused from the first layers on, so nothing of a text can be kept for the next image. The published
post-processing joins the tokens above a threshold into words, which need not be a phrase that was asked for; here a phrase
has the confidence of its best token, the maximum that the published confidence of the box is made of.

S sentences, N boxes of a sentence, L tokens, Q phrases.
"""

import torch
from PIL import Image
from torch import Tensor
from transformers.image_transforms import center_to_corners_format

from encoder.errors import DataError
from encoder.geometry import Geometry

SEPARATORS = str.maketrans({".": " ", "?": " "})  # where the model's attention splits a sentence


class GroundingDinoScores:
    """model: `GroundingDinoForObjectDetection`; processor: its own; for the rest see `Detector`."""

    def __init__(self, model, processor, image_size: int = 448, templates: tuple[str, ...] = ("{}",)):
        if templates != ("{}",):
            raise DataError(f"templates are {list(templates)}; Grounding DINO reads phrases as they are, leave templates out")
        self.model, self.processor, self.image_size = model.eval(), processor, image_size

    def __call__(self, images: list[Image.Image], phrases: list[list[str]]) -> list[tuple[Tensor, Tensor]]:
        """See `encoder.vesl.detector.Scores`. Phrases that do not fit one sentence go into a second one, and so on."""
        texts = [[phrase.lower().translate(SEPARATORS) for phrase in of_image] for of_image in phrases]
        rows = [(image, part) for image, of_image in enumerate(texts) for part in self._sentences(of_image)]
        sentences = [". ".join(texts[image][q] for q in part) + "." for image, part in rows]
        probs_SNL, boxes_SN4, offsets = self._forward(images, [image for image, _ in rows], sentences)
        found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in images]
        for row, (image, part) in enumerate(rows):
            mask_QL = phrase_tokens([len(texts[image][q]) for q in part], offsets[row], probs_SNL.shape[-1])
            scores_NQ = probs_SNL.new_zeros(probs_SNL.shape[1], len(phrases[image]))
            scores_NQ[:, part] = (probs_SNL[row, :, None] * mask_QL.to(probs_SNL.device)).amax(-1)
            # Centre and size in [0, 1] of the image itself, whatever was padded beside it in the batch.
            geometry = Geometry("squash", *images[image].size, self.image_size)
            found[image].append((geometry.boxes_to_image(center_to_corners_format(boxes_SN4[row].float())), scores_NQ))
        return [tuple(torch.cat(tensors) for tensors in zip(*of_image, strict=True)) for of_image in found]

    def _sentences(self, texts: list[str]) -> list[list[int]]:
        """The texts' indices, in order, in as few sentences as the model's longest allows."""
        ids = self.processor.tokenizer(texts, add_special_tokens=False)
        room = self.model.config.max_text_len - 2  # a start and an end
        parts, free = [], 0
        for index, tokens in enumerate(ids["input_ids"]):
            length = len(tokens) + 1  # and its full stop
            if length > free or not parts:
                parts.append([])
                free = room
            parts[-1].append(index)
            free -= length
        return parts

    def _forward(self, images: list[Image.Image], image_of_row: list[int], sentences: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        size = {"shortest_edge": self.image_size, "longest_edge": self.image_size}
        inputs = self.processor.image_processor(images, size=size, return_tensors="pt").to(self.model.device)
        tokens = self.processor.tokenizer(
            sentences,
            padding=True,
            truncation=True,
            max_length=self.model.config.max_text_len,
            return_offsets_mapping=True,
            return_token_type_ids=True,
            return_tensors="pt",
        ).to(self.model.device)
        offsets = tokens.pop("offset_mapping").cpu()
        pixels = inputs["pixel_values"].to(self.model.dtype)[image_of_row]
        output = self.model(pixel_values=pixels, pixel_mask=inputs["pixel_mask"][image_of_row], **tokens)
        return output.logits.float().sigmoid(), output.pred_boxes, offsets


def phrase_tokens(lengths: list[int], offsets_L2: Tensor, width: int) -> Tensor:
    """Which tokens of a sentence are whose: (Q, width) bool.

    lengths: characters of each phrase, which stand in the sentence one after the other, parted by two
    offsets_L2: first and last + 1 character of each token; special tokens have none, 0 and 0
    """
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    start = 0
    for index, length in enumerate(lengths):
        inside = (offsets_L2[:, 0] >= start) & (offsets_L2[:, 1] <= start + length) & (offsets_L2[:, 1] > offsets_L2[:, 0])
        mask[index, : len(inside)] = inside
        start += length + 2
    return mask
