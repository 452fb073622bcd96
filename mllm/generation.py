"""Asking an MLLM: pictures and questions in, words and boxes out, greedily and in batches.

A prompt is a prefix that ends with the picture, the same for every question about it, and the question. Tower and language
model run the prefix once for the questions of a batch on one picture; these go on from its keys and values. The questions of
a batch have prefixes of one length: with geometry `anyres` pictures of different shape are asked about in different batches.
(B questions, I pictures, P tokens of the prefix, L of the longest question.)
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from encoder.errors import DataError
from mllm.box_text import BoxCodec
from mllm.checkpoint import load_mllm
from mllm.conversation import IMAGE, number_regions, question_with_boxes, regions_named
from mllm.packing import attends_to_all
from mllm.prefix_cache import CACHE, new_state, spread
from mllm.regions import COORDS, REGION_TOKEN, RegionTable, as_region
from mllm.templates import end_token_ids

Box = tuple[float, float, float, float]
# What a language model's own generation_config may ask for, and greedy decoding must not do.
GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}


class GroundingModel:
    """A trained MLLM folder, ready to answer.

    settings: what `grounding.json` says: geometry, codec, feature layer, template, tower
    """

    def __init__(self, model, tokenizer, settings):
        self.model, self.tokenizer, self.settings = model.eval(), tokenizer, settings
        self.codec = BoxCodec(settings.codec)
        self.image_token_id = model.config.image_token_id
        self.region_token = "" if settings.regions == COORDS else REGION_TOKEN
        self.end_ids = end_token_ids(tokenizer)

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
        """What `mllm.opening` knows, by folder or name; float32 keeps answers independent of the batch size."""
        return cls(*load_mllm(path, dtype, device_map=str(device)))

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

        images: one picture per question; the same object given for several questions of a batch is run once
        questions: without the picture's mark; `<region>` (in order) or `<region:i>` names one of `regions`
        regions: per question its boxes, xyxy in pixels of the original image, or a record's objects with box, point or mask
        """
        regions = regions if regions is not None else [[] for _ in questions]
        prompts = [
            self._prompt_ids(image, question, boxes) for image, question, boxes in zip(images, questions, regions, strict=True)
        ]
        # Questions on one picture lie side by side: few prefixes in a batch.
        first = {id(image): i for i, image in reversed(list(enumerate(images)))}
        prefixes = [(prompts[i][0], self.num_image_tokens(image)) for i, image in enumerate(images)]
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        for (start, num_marks), (_, end), question in zip(prefixes, prompts, questions, strict=True):
            if limit is not None and (length := len(start) - 1 + num_marks + len(end)) > limit:
                raise DataError(
                    f"question '{question[:60]}' has {length} tokens with its picture, the language model reads {limit}; cut it"
                )
        order = sorted(range(len(prompts)), key=lambda i: (prefixes[i], first[id(images[i])], len(prompts[i][1]), i))
        answers: list[str] = [""] * len(prompts)
        with tqdm(total=len(prompts), desc="answers", disable=not progress, unit="answer") as bar:
            while order:
                rows = [i for i in order[:batch_size] if prefixes[i] == prefixes[order[0]]]
                order = order[len(rows) :]
                of_rows = [images[i] for i in rows]
                more = self.region_features([questions[i] for i in rows], of_rows, [regions[i] for i in rows])
                texts = self._answer(prompts[rows[0]][0], [prompts[i][1] for i in rows], of_rows, max_new_tokens, more)
                for i, text in zip(rows, texts, strict=True):
                    answers[i] = text
                bar.update(len(rows))
        return answers

    def decode_box(self, text: str, image_size: tuple[int, int]) -> tuple[Box | None, str | None]:
        """An answer -> (box xyxy in pixels of the original image of (width, height), None) or (None, the reason)."""
        box, reason = self.codec.decode(text)
        if box is None:
            return None, reason
        box_px = self._in_picture(box, image_size)
        return (box_px, None) if box_px else (None, "the box lies in the padding, outside the picture")

    def decode_boxes(self, text: str, image_size: tuple[int, int]) -> tuple[Box, ...]:
        """All boxes of an answer that lie in the picture, xyxy in its pixels, in order."""
        found = (self._in_picture(box, image_size) for box in self.codec.decode_all(text))
        return tuple(box for box in found if box)

    def _in_picture(self, box, image_size: tuple[int, int]) -> Box | None:
        box_px = self.settings.image.geometry(*image_size).boxes_to_image(box)
        inside = box_px[2] > box_px[0] and box_px[3] > box_px[1]
        return tuple(box_px.tolist()) if inside else None

    def question_text(self, image: Image.Image, question: str, regions: list) -> str:
        """The question as the model reads it: regions as text, and marks of their tokens where it has such."""
        if not isinstance(image, Image.Image):
            raise DataError(
                f"the picture of question '{question}' is a {type(image).__name__}; give a PIL image, since questions are asked "
                "about pictures only"
            )
        for mark in (IMAGE, REGION_TOKEN):
            if mark in question:
                raise DataError(f"question '{question}' holds the mark {mark}, which is put in by itself; leave it out")
        geometry = self.settings.image.geometry(*image.size)
        return question_with_boxes(question, regions, geometry, self.codec, self.region_token)

    def num_image_tokens(self, image: Image.Image) -> int:
        """How many tokens of the language model a picture becomes."""
        return self.settings.image.num_tokens(*image.size, self.model.config.image_seq_length)

    def _prompt_ids(self, image: Image.Image, question: str, boxes: list[Box]) -> tuple[tuple[int, ...], list[int]]:
        """Tokens up to the picture's one mark, and those after it."""
        content = IMAGE + "\n" + self.question_text(image, question, boxes)
        ids = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        mark = ids.index(self.image_token_id)
        return tuple(ids[: mark + 1]), ids[mark + 1 :]

    def region_features(self, questions: list[str], images: list[Image.Image], regions: list[list]) -> dict[str, torch.Tensor]:
        """What the region tokens of these questions are made of, as an argument of the model; nothing where there are none."""
        if not self.region_token:
            return {}
        inner, vision = self.model.model, self.model.config.vision_config
        table, pictures = RegionTable(self.settings.regions, vision.image_size // vision.patch_size), {}
        for question, image, given in zip(questions, images, regions, strict=True):
            geometry = self.settings.image.geometry(*image.size)
            for index in regions_named(number_regions(question, len(given))):
                number = pictures.setdefault(id(image), (len(pictures), image))[0]
                table.add(as_region(given[index], f"question '{question}', region {index}", geometry), geometry, number)
        if not len(table):
            return {}
        squares = self.settings.image.processor()([image for _, image in pictures.values()])["pixel_values"]
        tower_output = inner.vision_tower(squares.to(self.model.device, self.model.dtype))
        index = torch.from_numpy(table.images).long().to(self.model.device)
        inputs = {name: value.to(self.model.device) for name, value in table.inputs(np.arange(len(table))).items()}
        tokens_BND = inner.last_tokens(tower_output.last_hidden_state)
        return {"region_features": inner.region_tokens.features(tokens_BND, index, **inputs)}

    def _answer(
        self,
        prefix: tuple[int, ...],
        questions: list[list[int]],
        images: list[Image.Image],
        max_new_tokens: int,
        regions: dict[str, torch.Tensor],
    ) -> list[str]:
        """Greedy decoding of questions with one prefix, each about its picture; `regions` of `region_features`."""
        widened = [*prefix[:-1], *[self.image_token_id] * self.num_image_tokens(images[0])]
        longest = len(widened) + max(map(len, questions)) + max_new_tokens
        if attends_to_all(self.model.config.text_config, longest):
            ids_BL, mask_BL = self._padded([widened] * len(questions), questions)
            more = {CACHE: self._prefix_state(widened, images, longest - len(widened))}
        else:  # A window would count the padding, and forget the prefix: every question in a row of its own from the start.
            ids_BL, mask_BL = self._padded([[]] * len(questions), [widened + question for question in questions])
            more = self.picture_inputs(images)
        device = self.model.device
        output = self.model.generate(
            input_ids=ids_BL.to(device),
            attention_mask=mask_BL.to(device),
            max_new_tokens=max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.end_ids,
            **GREEDY,
            **more,
            **regions,
        )
        new = output[:, ids_BL.shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def picture_inputs(self, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        """What the model takes for pictures, on its device."""
        inputs = self.settings.image.inputs(images)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return {name: value.to(self.model.device) for name, value in inputs.items()}

    def _prefix_state(self, widened: list[int], images: list[Image.Image], room: int):
        """Keys and values of the prefix, a row a question, and room for more tokens; each distinct picture is run once."""
        distinct = {id(image): image for image in images}
        ids_IP = torch.tensor([widened] * len(distinct), device=self.model.device)
        inputs = self.picture_inputs(list(distinct.values()))
        state = new_state(self.model)
        self.model.model(input_ids=ids_IP, **inputs, **{CACHE: state}, use_cache=True)
        place = {key: row for row, key in enumerate(distinct)}
        return spread(state, torch.tensor([place[id(image)] for image in images], device=self.model.device), room)

    def _padded(self, starts: list[list[int]], ends: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of a start, padding and an end, and their attention mask: (B, P + L) each. All starts are of one length."""
        length = len(starts[0]) + max(map(len, ends))
        ids_BL = torch.full((len(ends), length), self.tokenizer.pad_token_id)
        mask_BL = torch.zeros_like(ids_BL)
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            for part, tokens in ((slice(0, len(start)), start), (slice(length - len(end), length), end)):
                ids_BL[row, part], mask_BL[row, part] = torch.tensor(tokens, dtype=torch.long), 1
        return ids_BL, mask_BL
