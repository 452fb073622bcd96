"""Captions of images by any image-text-to-text model of transformers: BLIP, LLaVA, Qwen-VL and their relatives.

    captioner = Captioner.from_pretrained("llava-hf/llava-1.5-7b-hf")
    captioner.caption([image], ["IMG_0042.jpg"])   ->  ["A red bus ..."]

One call is one batch, decoded greedily (or by beams) and padded at the left: in float32 an image has the caption that it has
alone. Other captioners need `caption` and `describe`, nothing else; `mllm.captioner` is one.
"""

from pathlib import Path

import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, ProcessorMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available

from encoder.errors import DataError
from encoder.pretrained import load_strict, model_kind, weights_hash

CHAT_PROMPT = "Describe this image in detail."
ALT_TEXT = "{alt_text}"


class Captioner:
    """A captioner and how it is asked.

    model, processor: of `AutoModelForImageTextToText` and its own
    prompt: what is asked of every image, put into the processor's chat template where it has one; `{alt_text}` stands for
        the text that the image was found with. None: a request to describe the image where there is a template, else nothing
    max_new_tokens: longest caption in tokens
    num_beams: 1 is greedy
    described: what `describe` adds: the checkpoint
    """

    def __init__(
        self,
        model,
        processor,
        prompt: str | None = None,
        max_new_tokens: int = 96,
        num_beams: int = 1,
        described: dict | None = None,
    ):
        for name, value in (("max_new_tokens", max_new_tokens), ("num_beams", num_beams)):
            if value < 1:
                raise DataError(f"captioner: {name} is {value}; give at least 1")
        self.model, self.processor = model.eval(), processor
        self.max_new_tokens, self.num_beams, self.described = max_new_tokens, num_beams, described or {}
        self.has_template = getattr(processor, "chat_template", None) is not None
        self.prompt = prompt if prompt is not None else CHAT_PROMPT if self.has_template else ""
        self.is_blip = model.config.model_type == "blip"
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        prompt: str | None = None,
        max_new_tokens: int = 96,
        num_beams: int = 1,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str = torch.float32,
    ) -> "Captioner":
        """A folder, or a name on the model hub. Raises DataError for another kind of model, and weights that do not fit."""
        kind = model_kind(path, f"{path} holds no model that transformers can read ({{reason}}); give a captioner's folder")
        if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            raise DataError(
                f"{path} holds a '{kind}' model, which writes no text about images; give one such as BLIP, LLaVA, Qwen-VL"
            )
        model = load_strict(AutoModelForImageTextToText, path, dtype=dtype).to(device)
        dtype = str(model.dtype).removeprefix("torch.")
        described = {"captioner": kind, "checkpoint": str(path), "weights": weights_hash(model), "dtype": dtype}
        return cls(model, load_caption_processor(path), prompt, max_new_tokens, num_beams, described)

    def describe(self) -> dict:
        """Everything that decides what is written, as JSON can hold it."""
        asked = {"prompt": self.prompt, "max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams}
        return {**self.described, **asked}

    @torch.inference_mode()
    def caption(self, images: list[Image.Image], alt_texts: list[str]) -> list[str]:
        """RGB images and the text that each was found with ("" if none) -> a caption of each, in one line."""
        if len(images) != len(alt_texts):
            raise DataError(
                f'{len(images)} images came with {len(alt_texts)} texts; give one for each image, "" where there is none'
            )
        if not images:
            return []
        texts = [self._text(alt_text) for alt_text in alt_texts]
        if self.is_blip:
            return self._blip(images, texts)
        inputs = self._inputs([[image] for image in images], texts)
        output = self._generate(inputs)
        # A decoder writes after what it read, unless its inputs were embeddings or it has an encoder to read with.
        read = inputs["input_ids"].shape[1]
        repeats = output.shape[1] >= read and torch.equal(output[:, :read], inputs["input_ids"])
        return self._decode(output[:, read:] if repeats else output)

    def _text(self, alt_text: str) -> str:
        prompt = self.prompt.replace(ALT_TEXT, alt_text)
        if self.has_template:
            content = [{"type": "image"}, {"type": "text", "text": prompt}]
            return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        mark = getattr(self.processor, "image_token", None)
        return f"{mark}\n{prompt}" if mark and mark not in prompt else prompt

    def _inputs(self, images: list, texts: list[str] | None):
        options = {}
        if texts is not None:
            bos = self.processor.tokenizer.bos_token
            # A template writes the start token itself.
            options = {"text": texts, "padding": True, "add_special_tokens": not (bos and texts[0].startswith(bos))}
        inputs = self.processor(images=images, return_tensors="pt", **options)
        return inputs.to(self.model.device, self.model.dtype)

    def _generate(self, inputs):
        return self.model.generate(**inputs, do_sample=False, num_beams=self.num_beams, max_new_tokens=self.max_new_tokens)

    def _decode(self, tokens) -> list[str]:
        return [" ".join(text.split()) for text in self.processor.batch_decode(tokens, skip_special_tokens=True)]

    def _blip(self, images: list[Image.Image], texts: list[str]) -> list[str]:
        """BLIP goes on from its prompt, or from nothing. It overwrites the first token of a row, padding or not: rows of one
        length go together."""
        lengths = [len(self.processor.tokenizer(text)["input_ids"]) if text else 0 for text in texts]
        captions = [""] * len(images)
        for length in sorted(set(lengths)):
            rows = [index for index, other in enumerate(lengths) if other == length]
            inputs = self._inputs([images[index] for index in rows], [texts[index] for index in rows] if length else None)
            # Its last token, a separator, is taken off; without a prompt it starts from one token.
            output = self._generate(inputs)[:, max(1, length - 1) :]
            for index, caption in zip(rows, self._decode(output), strict=True):
                captions[index] = caption
        return captions


def load_caption_processor(path: str | Path) -> ProcessorMixin:
    """A captioner's own processor. One that wants torchvision, to read videos with, is made without that where there is none."""
    kind = PROCESSOR_MAPPING.get(type(AutoConfig.from_pretrained(path)), None)
    if kind is None or "video_processor" not in kind.get_attributes() or is_torchvision_available():
        return AutoProcessor.from_pretrained(path)

    class ImagesOnly(kind):
        def check_argument_for_proper_class(self, argument_name, argument):
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    tokenizer = AutoTokenizer.from_pretrained(path)
    parts = {"image_processor": AutoImageProcessor.from_pretrained(path), "tokenizer": tokenizer, "video_processor": None}
    return ImagesOnly(**parts, chat_template=tokenizer.chat_template)
