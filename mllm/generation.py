"""Asking an MLLM: pictures and questions in, words and boxes out, greedily and in batches."""

from collections import OrderedDict
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mllm.box_text import BoxCodec
from mllm.checkpoint import load_mllm
from mllm.conversation import IMAGE, question_with_boxes

Box = tuple[float, float, float, float]
FEATURE_BYTES = 1 << 30  # projected pictures kept for further questions


class GroundingModel:
    """A trained MLLM folder, ready to answer.

    settings: what `grounding.json` says: geometry, codec, feature layer, template, tower
    """

    def __init__(self, model, tokenizer, settings):
        self.model, self.tokenizer, self.settings = model.eval(), tokenizer, settings
        self.codec = BoxCodec(settings.codec)
        self.image_token_id = model.config.image_token_id

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
        """A folder written by `scripts/finetune_mllm.py`; float32 keeps answers independent of the batch size."""
        model, tokenizer, settings = load_mllm(path, dtype=dtype)
        return cls(model.to(device), tokenizer, settings)

    @torch.inference_mode()
    def generate(
        self,
        images: list[Image.Image],
        questions: list[str],
        regions: list[list[Box]] | None = None,
        batch_size: int = 64,
        max_new_tokens: int = 32,
        progress: bool = True,
    ) -> list[str]:
        """One answer per (image, question), greedy, in the order asked.

        images: one picture per question; the same object given for several questions is seen by the tower once
        questions: without the picture's mark; `<region>` (in order) or `<region:i>` names a box of `regions`
        regions: per question its boxes, xyxy in pixels of the original image
        """
        regions = regions if regions is not None else [[] for _ in questions]
        prompts = [
            self._prompt_ids(image, question, boxes) for image, question, boxes in zip(images, questions, regions, strict=True)
        ]
        # Prompts of one length lie side by side, and questions on one picture too: little padding, few tower calls.
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), id(images[i]), i))
        answers: list[str] = [""] * len(prompts)
        features: OrderedDict[int, Tensor] = OrderedDict()
        with tqdm(total=len(prompts), desc="answers", disable=not progress, unit="answer") as bar:
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                self._see([images[i] for i in rows], features)
                texts = self._answer([prompts[i] for i in rows], [features[id(images[i])] for i in rows], max_new_tokens)
                for i, text in zip(rows, texts, strict=True):
                    answers[i] = text
                bar.update(len(rows))
        return answers

    def decode_box(self, text: str, image_size: tuple[int, int]) -> tuple[Box | None, str | None]:
        """An answer -> (box xyxy in pixels of the original image of (width, height), None) or (None, the reason)."""
        box, reason = self.codec.decode(text)
        if box is None:
            return None, reason
        box_px = self.settings.image.geometry(*image_size).boxes_to_image(box)
        if not (box_px[2] > box_px[0] and box_px[3] > box_px[1]):
            return None, "the box lies in the padding, outside the picture"
        return tuple(box_px.tolist()), None

    def _prompt_ids(self, image: Image.Image, question: str, boxes: list[Box]) -> list[int]:
        geometry = self.settings.image.geometry(*image.size)
        content = IMAGE + "\n" + question_with_boxes(question, boxes, geometry, self.codec)
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]

    def _see(self, images: list[Image.Image], features: "OrderedDict[int, Tensor]") -> None:
        """Projected image tokens (N, D) of the pictures not at hand, in one tower call; the longest unused make room."""
        batch = {id(image): image for image in images}
        new = {key: image for key, image in batch.items() if key not in features}
        if new:
            pixels = self.settings.image.pixels(list(new.values())).to(self.model.device, self.model.dtype)
            features.update(zip(new, self.model.get_image_features(pixels).pooler_output, strict=True))
        for key in batch:
            features.move_to_end(key)
        size = features[next(iter(batch))].nbytes
        while len(features) > max(len(batch), FEATURE_BYTES // size):
            features.popitem(last=False)

    def _answer(self, prompts: list[list[int]], features: list[Tensor], max_new_tokens: int) -> list[str]:
        """Left-padded greedy decoding of prompts (each with one image mark) and their image tokens (N, D)."""
        embed = self.model.get_input_embeddings()
        rows = []
        for ids, image_ND in zip(prompts, features, strict=True):
            tokens_LD = embed(torch.tensor(ids, device=image_ND.device))
            mark = ids.index(self.image_token_id)
            rows.append(torch.cat([tokens_LD[:mark], image_ND, tokens_LD[mark + 1 :]]))
        length = max(len(row) for row in rows)
        embeds_BLD = rows[0].new_zeros(len(rows), length, rows[0].shape[-1])
        mask_BL = torch.zeros(len(rows), length, dtype=torch.long, device=embeds_BLD.device)
        for index, row in enumerate(rows):
            embeds_BLD[index, length - len(row) :] = row
            mask_BL[index, length - len(row) :] = 1
        output = self.model.generate(
            inputs_embeds=embeds_BLD,
            attention_mask=mask_BL,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        return [text.strip() for text in self.tokenizer.batch_decode(output, skip_special_tokens=True)]
