"""Region features of any CLIP or CLOC: what box classification and region retrieval are made of.

Four ways from a region to a feature in the joint space: CLOC's Prompter; RoIAlign over the projected patch tokens; a
crop of the picture through the whole tower; the mean of the projected patch tokens under the object's mask.

B images, N tokens, R regions, E joint space, G patches per side, S side of the input.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from encoder.errors import DataError
from encoder.masks import box_weights, patch_weights, pool_under
from encoder.processor import ClocProcessor
from encoder.roi_align import points_per_side, roi_align

FEATURES = ("prompter", "roialign", "crop", "maskpool")
DENSE = ("roialign", "maskpool")  # read the patch grid of one layer
Box = tuple[float, float, float, float]


def add_feature_flags(parser: argparse.ArgumentParser, features: tuple[str, ...] = FEATURES) -> None:
    """The flags that say how a box is read."""
    parser.add_argument(
        "--feature", choices=features, default="prompter", help="how a box becomes a feature (default: %(default)s)"
    )
    parser.add_argument(
        "--layer", type=int, choices=(-1, -2), default=-1, help="roialign and maskpool read the last block or the one before"
    )
    parser.add_argument(
        "--crop-scale", type=float, default=1.0, help="crop this many times the box (1.5 adds context); default 1.0"
    )


def feature_variant(args: argparse.Namespace) -> str:
    """A name of this way of reading a box: `prompter`, `roialign-2`, `maskpool-1`, `crop1.5`."""
    crop = "" if args.crop_scale == 1 else f"{args.crop_scale:g}"
    return args.feature + {"prompter": "", "crop": crop}.get(args.feature, str(args.layer))


def dense_features(model: PreTrainedModel, pixel_values: Tensor, layer: int) -> Tensor:
    """Patch features in the joint space, (B, 3, S, S) -> (B, E, G, G).

    layer: -1 reads the last block, -2 the one before; the tower's final LayerNorm and projection follow either way.
    A SigLIP has a pooling head for a projection: each patch goes through it alone.
    """
    tower = model.vision_model
    hidden = tower(pixel_values=pixel_values, output_hidden_states=True).hidden_states[layer]
    if hasattr(tower, "head"):
        tokens = tower.post_layernorm(hidden)
        patches_BNE = tower.head(tokens.flatten(0, 1)[:, None]).unflatten(0, tokens.shape[:2])
    else:
        patches_BNE = model.visual_projection(tower.post_layernorm(hidden[:, 1:]))
    side = round(patches_BNE.shape[1] ** 0.5)
    return patches_BNE.transpose(1, 2).unflatten(2, (side, side))


def crop_boxes(image: Image.Image, boxes_px: list[Box], scale: float) -> list[Image.Image]:
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

    layer: for RoIAlign and masks, -1 or -2; crop_scale: for crops. Raises DataError where the model cannot do what is asked.
    """

    def __init__(self, model: PreTrainedModel, processor: ClocProcessor, feature: str, layer: int = -1, crop_scale: float = 1.0):
        if feature == "prompter" and not hasattr(model, "embed_boxes"):
            raise DataError("--feature prompter needs a CLOC folder, this is a plain CLIP; use roialign or crop for it")
        if processor.image_processor.geometry == "center_crop" and feature != "crop":
            raise DataError("this model's images are centre-cropped, which cuts boxes off; pass --geometry pad or squash")
        if layer != -1 and feature not in DENSE:
            raise DataError(f"--layer {layer} is for {' and '.join(DENSE)}, {feature} does not read it; leave it out")
        if crop_scale != 1 and feature != "crop":
            raise DataError(f"--crop-scale {crop_scale:g} is for crop, {feature} does not read it; leave it out")
        if not crop_scale > 0:
            raise DataError(f"--crop-scale is {crop_scale:g}; give a positive number of times the box")
        self.model, self.processor, self.feature = model, processor, feature
        self.layer, self.crop_scale = layer, crop_scale

    @torch.inference_mode()
    def embed(self, images: list[Image.Image], boxes_px: list[list[Box]], masks: list[np.ndarray | None] = ()) -> Tensor:
        """L2-normalised embeddings (R, E) of all boxes, image by image; boxes xyxy in pixels of their image.

        masks: for maskpool, (H, W) bool per box, all in one list; None where the box stands in for it
        """
        return F.normalize(self._features(images, boxes_px, masks).float(), dim=-1)

    def _features(self, images: list[Image.Image], boxes_px: list[list[Box]], masks: list[np.ndarray | None]) -> Tensor:
        model, device = self.model, self.model.device
        if self.feature == "crop":
            pairs = zip(images, boxes_px, strict=True)
            crops = [crop for image, boxes in pairs for crop in crop_boxes(image, boxes, self.crop_scale)]
            pixels = self.processor.images(crops)[0]["pixel_values"].to(device)
            return torch.cat([model.get_image_features(pixel_values=part).pooler_output for part in pixels.split(64)])
        inputs, geometries = self.processor.images(images)
        pixels = inputs["pixel_values"].to(device)
        pairs = zip(geometries, boxes_px, strict=True)
        boxes_R4 = torch.cat([geometry.boxes_to_model(torch.tensor(boxes)) for geometry, boxes in pairs]).to(device)
        counts = torch.tensor([len(boxes) for boxes in boxes_px])
        image_index_R = torch.arange(len(images)).repeat_interleave(counts).to(device)
        if self.feature == "prompter":
            return model.embed_boxes(model.encode_image(pixels).tokens, boxes_R4, image_index_R)
        maps = dense_features(model, pixels, self.layer)
        if self.feature == "maskpool":
            of_boxes = [(geometries[index], box) for index, boxes in enumerate(boxes_px) for box in boxes]
            weights = [
                box_weights(box, geometry, maps.shape[-1]) if mask is None else patch_weights(mask, geometry, maps.shape[-1])
                for (geometry, box), mask in zip(of_boxes, masks, strict=True)
            ]
            return pool_under(maps, torch.stack(weights).to(device), image_index_R)
        return roi_align(maps, boxes_R4, image_index_R, points_per_side(maps.shape[-1]))
