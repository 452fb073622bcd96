"""`ClocProcessor`: pictures, boxes and texts -> tensors, always through `Geometry`."""

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ProcessorMixin

from encoder.config import ClocConfig, ClocSiglipConfig
from encoder.errors import DataError
from encoder.geometry import MODES, Geometry

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)


class ClocImageProcessor(BaseImageProcessor):
    """Pictures -> the model's normalised square input.

    size: side of the input, pixels
    geometry: `pad`, `pad_first`, `squash` or `center_crop`, see `encoder.geometry`
    image_mean, image_std: per channel, of pixels in [0, 1] (OpenAI CLIP's by default)
    """

    model_input_names = ["pixel_values"]

    def __init__(self, size: int = 224, geometry: str = "pad", image_mean=OPENAI_MEAN, image_std=OPENAI_STD, **kwargs):
        super().__init__(**kwargs)
        if isinstance(size, dict):  # transformers' own processors say {"shortest_edge": 224} or {"height": ..., ...}
            size = next(iter(size.values()))
        if geometry not in MODES:
            raise DataError(f"image processor: geometry is '{geometry}'; choose one of {', '.join(MODES)}")
        self.size, self.geometry = int(size), geometry
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    def geometry_of(self, image: Image.Image) -> Geometry:
        """The transform that this processor applies to `image`."""
        return Geometry(self.geometry, *image.size, self.size)

    def __call__(self, images, return_tensors: str = "pt", **kwargs) -> BatchFeature:
        """One PIL image or a list of them -> {"pixel_values": (B, 3, size, size) float32}."""
        images = [images] if isinstance(images, Image.Image) else images
        pixels = torch.empty(len(images), 3, self.size, self.size)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.image_mean, self.image_std))
        fill = tuple(int(255 * channel) for channel in self.image_mean)  # as transformers rounds it
        for place, image in enumerate(images):  # one after the other and in place: as much as a core's cache holds
            square = torch.from_numpy(np.array(self.geometry_of(image).apply(image, fill)))
            pixels[place].copy_(square.permute(2, 0, 1)).div_(255).sub_(mean).div_(std)
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    preprocess = __call__


class ClocProcessor(ProcessorMixin):
    """Image processor and tokenizer of a CLOC, or any CLIP or SigLIP, as one object.

    lowercase: whether texts are lower-cased first, as in the paper
    text_padding: `longest` of the batch, or `max_length`, the tokenizer's maximum, with the padding read like any token:
        SigLIP's way
    """

    attributes = ["image_processor", "tokenizer"]

    def __init__(self, image_processor=None, tokenizer=None, lowercase: bool = True, text_padding: str = "longest", **kwargs):
        if text_padding not in ("longest", "max_length"):
            raise DataError(f"processor: text_padding is '{text_padding}'; choose one of longest, max_length")
        self.lowercase, self.text_padding = lowercase, text_padding
        super().__init__(image_processor, tokenizer)

    def check_argument_for_proper_class(self, argument_name, argument):
        """As in transformers, but a part may be None: the folder of a vision tower alone has no tokenizer."""
        return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    def images(self, images: list[Image.Image]) -> tuple[BatchFeature, list[Geometry]]:
        """Pictures -> {"pixel_values": (B, 3, S, S)} and the geometry of each."""
        return self.image_processor(images), [self.image_processor.geometry_of(image) for image in images]

    def texts(self, texts: list[str]) -> BatchFeature:
        """Texts -> {"input_ids", "attention_mask"}: (T, L), padded, cut to the tokenizer's maximum; the mask is what is read."""
        if self.tokenizer is None:
            raise DataError("this processor has no tokenizer, it is of a vision tower alone; load the whole CLIP or CLOC folder")
        texts = [text.lower() for text in texts] if self.lowercase else list(texts)
        if not texts:
            empty = torch.zeros(0, 1, dtype=torch.long)
            return BatchFeature({"input_ids": empty, "attention_mask": empty})
        encoded = self.tokenizer(
            texts, padding=self.text_padding, truncation=True, return_attention_mask=True, return_tensors="pt"
        )
        if self.text_padding == "max_length":
            encoded["attention_mask"] = torch.ones_like(encoded["input_ids"])
        return BatchFeature({key: encoded[key] for key in ("input_ids", "attention_mask")})

    def __call__(self, images=None, text=None, **kwargs) -> BatchFeature:
        """Pictures and/or texts -> one dictionary of tensors, as any transformers processor."""
        data = {}
        if text is not None:
            data.update(self.texts([text] if isinstance(text, str) else text))
        if images is not None:
            data.update(self.image_processor(images))
        return BatchFeature(data)


AutoImageProcessor.register("ClocImageProcessor", slow_image_processor_class=ClocImageProcessor, exist_ok=True)
for _config in (ClocConfig, ClocSiglipConfig):
    AutoProcessor.register(_config, ClocProcessor, exist_ok=True)
