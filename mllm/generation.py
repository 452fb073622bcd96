"""Asking an MLLM: pictures and questions in, words and boxes out, greedily and in batches.

A prompt is a prefix that ends with the picture, the same for every question about it, and the question. Tower and language
model run the prefix once per picture; the questions go on from its keys and values. (B questions, N image tokens, P tokens
of the prefix, L of the longest question.)
"""

from collections import OrderedDict
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm
from transformers import DynamicCache

from mllm.box_text import BoxCodec
from mllm.checkpoint import load_mllm
from mllm.conversation import IMAGE, question_with_boxes

Box = tuple[float, float, float, float]
STATE_BYTES = 1 << 30  # of pictures' keys and values, kept for further questions


class GroundingModel:
    """A trained MLLM folder, ready to answer.

    settings: what `grounding.json` says: geometry, codec, feature layer, template, tower
    """

    def __init__(self, model, tokenizer, settings):
        self.model, self.tokenizer, self.settings = model.eval(), tokenizer, settings
        self.codec = BoxCodec(settings.codec)
        self.image_token_id = model.config.image_token_id
        # id of a picture and its prefix -> (the picture, which holds the id; its keys and values); the latest used last.
        self._seen: OrderedDict[tuple, tuple[Image.Image, DynamicCache]] = OrderedDict()

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

        images: one picture per question; the same object given for several questions, or again later, is run once
        questions: without the picture's mark; `<region>` (in order) or `<region:i>` names a box of `regions`
        regions: per question its boxes, xyxy in pixels of the original image
        """
        regions = regions if regions is not None else [[] for _ in questions]
        prompts = [
            self._prompt_ids(image, question, boxes) for image, question, boxes in zip(images, questions, regions, strict=True)
        ]
        # Questions on one picture lie side by side, those of one length too: few prefixes at a time, little padding.
        order = sorted(range(len(prompts)), key=lambda i: (prompts[i][0], id(images[i]), len(prompts[i][1]), i))
        answers: list[str] = [""] * len(prompts)
        with tqdm(total=len(prompts), desc="answers", disable=not progress, unit="answer") as bar:
            while order:
                prefix = prompts[order[0]][0]
                rows = [i for i in order[:batch_size] if prompts[i][0] == prefix]
                order = order[len(rows) :]
                self._see([images[i] for i in rows], prefix)
                texts = self._answer([prompts[i] for i in rows], [images[i] for i in rows], max_new_tokens)
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

    def _prompt_ids(self, image: Image.Image, question: str, boxes: list[Box]) -> tuple[tuple[int, ...], list[int]]:
        """Tokens up to the picture's one mark, and those after it."""
        geometry = self.settings.image.geometry(*image.size)
        content = IMAGE + "\n" + question_with_boxes(question, boxes, geometry, self.codec)
        ids = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        mark = ids.index(self.image_token_id)
        return tuple(ids[: mark + 1]), ids[mark + 1 :]

    def _see(self, images: list[Image.Image], prefix: tuple[int, ...]) -> None:
        """Keys and values of the prefix with each picture not at hand, in one call; the longest unused make room."""
        batch = {(id(image), prefix): image for image in images}
        new = {key: image for key, image in batch.items() if key not in self._seen}
        if new:
            pixels = self.settings.image.pixels(list(new.values())).to(self.model.device, self.model.dtype)
            ids = torch.tensor([self._widened(prefix)] * len(new), device=self.model.device)
            state = self.model.model(input_ids=ids, pixel_values=pixels, use_cache=True).past_key_values
            for row, (key, image) in enumerate(new.items()):
                self._seen[key] = image, _rows(state, [row])
        for key in batch:
            self._seen.move_to_end(key)
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in next(iter(self._seen.values()))[1].layers)
        while len(self._seen) > max(len(batch), STATE_BYTES // size):
            self._seen.popitem(last=False)

    def _widened(self, prefix: tuple[int, ...]) -> list[int]:
        return [*prefix[:-1], *[self.image_token_id] * self.model.config.image_seq_length]

    def _answer(self, prompts: list[tuple], images: list[Image.Image], max_new_tokens: int) -> list[str]:
        """Greedy decoding of prompts with one prefix; questions are left-padded, between the prefix and themselves."""
        prefix = prompts[0][0]
        numbers = {key: row for row, key in enumerate(dict.fromkeys(id(image) for image in images))}
        states = [self._seen[key, prefix][1] for key in numbers]
        state = _rows(_stacked(states), [numbers[id(image)] for image in images])
        widened, length = self._widened(prefix), max(len(question) for _, question in prompts)
        ids_BL = torch.full((len(prompts), len(widened) + length), self.tokenizer.pad_token_id)
        mask_BL = torch.zeros_like(ids_BL)
        ids_BL[:, : len(widened)], mask_BL[:, : len(widened)] = torch.tensor(widened), 1
        for row, (_, question) in enumerate(prompts):
            ids_BL[row, ids_BL.shape[1] - len(question) :] = torch.tensor(question)
            mask_BL[row, ids_BL.shape[1] - len(question) :] = 1
        output = self.model.generate(
            input_ids=ids_BL.to(self.model.device),
            attention_mask=mask_BL.to(self.model.device),
            past_key_values=state,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        new = output[:, ids_BL.shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]


def _rows(state: DynamicCache, rows: list[int]) -> DynamicCache:
    """A state of these rows of `state`, copied."""
    chosen = DynamicCache()
    for number, layer in enumerate(state.layers):
        chosen.update(layer.keys[rows], layer.values[rows], number)
    return chosen


def _stacked(states: list[DynamicCache]) -> DynamicCache:
    joint = DynamicCache()
    for number in range(len(states[0].layers)):
        layers = [state.layers[number] for state in states]
        joint.update(torch.cat([layer.keys for layer in layers]), torch.cat([layer.values for layer in layers]), number)
    return joint
