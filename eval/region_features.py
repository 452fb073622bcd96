"""Region features of any CLIP or CLOC, and class names as a classifier: what box classification is made of.

Three ways from a box to a feature in the joint space: CLOC's Prompter; RoIAlign over CLIP's projected patch tokens; a
crop of the picture through the whole tower.

B images, N tokens (CLS first), R regions, E joint space, G patches per side, S side of the input, K classes.
"""

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPModel

from encoder.errors import DataError
from encoder.model import ClocModel
from encoder.processor import ClocProcessor

FEATURES = ("prompter", "roialign", "crop")

# OpenAI's 80 ImageNet templates (github.com/openai/CLIP, notebooks/Prompt_Engineering_for_ImageNet.ipynb), by pattern.
_ART = "sculpture, rendering, tattoo, drawing, painting, sketch, doodle, rendition".split(", ")
_BARE_ART = ("graffiti of", "art of", "itap of")
_PHOTO = "bad, low resolution, cropped, bright, dark, close-up, black and white, pixelated, jpeg corrupted, blurry, good"
_ADJECTIVE = "hard to see, clean, dirty, cool, large, nice, weird, small".split(", ")
_MATERIAL = "embroidered, plastic, origami, toy, cartoon, plushie".split(", ")
OPENAI80 = (
    *(f"a {art} of {article} {{}}." for art in _ART for article in ("a", "the")),
    *(f"{art} {article} {{}}." for art in _BARE_ART for article in ("a", "the")),
    *(f"a {photo} photo of {article} {{}}." for photo in _PHOTO.split(", ") for article in ("a", "the")),
    *(f"a photo of {article} {adjective} {{}}." for adjective in _ADJECTIVE for article in ("a", "the")),
    *(f"{article} {material} {{}}." for material in _MATERIAL for article in ("a", "the")),
    *("a photo of a {}.", "a photo of the {}.", "a {} in a video game.", "the {} in a video game."),
    *("a photo of many {}.", "a photo of my {}.", "a photo of one {}.", "itap of my {}."),
)


def templates_named(text: str) -> tuple[str, ...]:
    """`name` (the class name alone, as CLOC does), `openai80`, or one template of your own that holds `{}`."""
    named = {"name": ("{}",), "openai80": OPENAI80}
    if text in named:
        return named[text]
    if text.count("{}") != 1:
        raise DataError(f"--templates is '{text}'; give 'name', 'openai80' or a sentence with one {{}} for the name")
    return (text,)


@torch.inference_mode()
def name_classifier(model: CLIPModel, processor: ClocProcessor, names: list[str], templates: tuple[str, ...]) -> Tensor:
    """Text embeddings (K, E) of the names: L2-normalised mean over templates of the L2-normalised embeddings."""
    rows = []
    for template in templates:
        texts = processor.texts([template.replace("{}", name) for name in names]).to(model.device)
        pooled = model.text_model(input_ids=texts["input_ids"], attention_mask=texts["attention_mask"]).pooler_output
        rows.append(F.normalize(model.text_projection(pooled), dim=-1))
    return F.normalize(torch.stack(rows).mean(0), dim=-1)


def dense_features(model: CLIPModel, pixel_values: Tensor, layer: int) -> Tensor:
    """Patch features in the joint space, (B, 3, S, S) -> (B, E, G, G).

    layer: -1 reads the last block, -2 the one before; the tower's final LayerNorm and projection follow either way
    """
    hidden = model.vision_model(pixel_values=pixel_values, output_hidden_states=True).hidden_states[layer]
    patches_BNE = model.visual_projection(model.vision_model.post_layernorm(hidden[:, 1:]))
    side = round(patches_BNE.shape[1] ** 0.5)
    return patches_BNE.transpose(1, 2).unflatten(2, (side, side))


def roi_align(maps_BEGG: Tensor, boxes_R4: Tensor, image_index_R: Tensor, num_samples: int) -> Tensor:
    """Mean of bilinear samples on a regular grid inside each box: RoIAlign with a 1x1 output, `aligned`.

    maps_BEGG: (B, E, G, G); boxes_R4: (R, 4) xyxy in [0, 1] of the square input; image_index_R: (R,)
    num_samples: points per side of the grid. Returns (R, E). Source: arXiv 1703.06870, Section 3.
    """
    steps = (torch.arange(num_samples, device=boxes_R4.device, dtype=boxes_R4.dtype) + 0.5) / num_samples
    x = boxes_R4[:, 0:1] + steps * (boxes_R4[:, 2:3] - boxes_R4[:, 0:1])
    y = boxes_R4[:, 1:2] + steps * (boxes_R4[:, 3:4] - boxes_R4[:, 1:2])
    points = torch.stack([x[:, None, :].expand(-1, num_samples, -1), y[:, :, None].expand(-1, -1, num_samples)], dim=-1)
    # Without align_corners, -1 and 1 are the outer edges of the corner patches: exactly 0 and 1 of our frame.
    grid = (2 * points - 1).to(maps_BEGG.dtype)
    samples = F.grid_sample(maps_BEGG[image_index_R], grid, padding_mode="border", align_corners=False)
    return samples.mean(dim=(2, 3))


def crop_boxes(image: Image.Image, boxes_px: list[tuple[float, float, float, float]], scale: float) -> list[Image.Image]:
    """The picture inside each box, xyxy pixels, rounded outwards and cut at the border.

    scale: 1.0 crops the box itself, 1.5 a box half as large again around the same centre (context, as CLIPSelf does)
    """
    crops = []
    for x1, y1, x2, y2 in boxes_px:
        dx, dy = (scale - 1) * (x2 - x1) / 2, (scale - 1) * (y2 - y1) / 2
        left, top = max(0, int(x1 - dx)), max(0, int(y1 - dy))
        right, bottom = min(image.width, -int(-(x2 + dx) // 1)), min(image.height, -int(-(y2 + dy) // 1))
        crops.append(image.crop((left, top, max(right, left + 1), max(bottom, top + 1))))
    return crops


class RegionFeatures:
    """Embeds the boxes of several pictures, one way of `FEATURES`.

    layer: for RoIAlign, -1 or -2; crop_scale: for crops. Raises DataError where the model cannot do what is asked.
    """

    def __init__(self, model: CLIPModel, processor: ClocProcessor, feature: str, layer: int = -1, crop_scale: float = 1.0):
        if feature == "prompter" and not isinstance(model, ClocModel):
            raise DataError("--feature prompter needs a CLOC folder, this is a plain CLIP; use roialign or crop for it")
        if processor.image_processor.geometry == "center_crop" and feature != "crop":
            raise DataError("this model's images are centre-cropped, which cuts boxes off; pass --geometry pad or squash")
        self.model, self.processor, self.feature = model, processor, feature
        self.layer, self.crop_scale = layer, crop_scale

    @torch.inference_mode()
    def embed(self, images: list[Image.Image], boxes_px: list[list[tuple[float, float, float, float]]]) -> Tensor:
        """L2-normalised embeddings (R, E) of all boxes, image by image; boxes xyxy in pixels of their image."""
        return F.normalize(self._features(images, boxes_px).float(), dim=-1)

    def _features(self, images: list[Image.Image], boxes_px: list) -> Tensor:
        model, device = self.model, self.model.device
        if self.feature == "crop":
            pairs = zip(images, boxes_px, strict=True)
            crops = [crop for image, boxes in pairs for crop in crop_boxes(image, boxes, self.crop_scale)]
            pixels = self.processor.images(crops)[0]["pixel_values"].to(device)
            pooled = [model.vision_model(pixel_values=part).pooler_output for part in pixels.split(64)]
            return model.visual_projection(torch.cat(pooled))
        inputs, geometries = self.processor.images(images)
        pixels = inputs["pixel_values"].to(device)
        pairs = zip(geometries, boxes_px, strict=True)
        boxes_R4 = torch.cat([geometry.boxes_to_model(torch.tensor(boxes)) for geometry, boxes in pairs]).to(device)
        counts = torch.tensor([len(boxes) for boxes in boxes_px])
        image_index_R = torch.arange(len(images)).repeat_interleave(counts).to(device)
        if self.feature == "prompter":
            return model.embed_boxes(model.encode_image(pixels).tokens, boxes_R4, image_index_R)
        maps = dense_features(model, pixels, self.layer)
        # One point per patch side and more: no patch inside a large box is stepped over.
        return roi_align(maps, boxes_R4, image_index_R, num_samples=max(4, maps.shape[-1]))
