"""Regions of a picture that a question speaks of: a box, a point or a free-form mask, checked, as text and as model inputs.

A record's `regions` holds objects with one of the keys `box` ([x1, y1, x2, y2]), `point` ([x, y]) and `mask` (COCO's polygons
or run-length encoding), all in pixels of the original image. (R regions, N patches, G patches per side.)
"""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
import torch
from torch import Tensor

from encoder.boxes import clip_boxes, valid_boxes
from encoder.errors import DataError
from encoder.geometry import Geometry
from encoder.masks import decode_mask, mask_area, mask_box, patch_weights, run_lengths, square_box_weights
from mllm.box_text import BoxCodec

KINDS = ("box", "point", "mask")
# How a region enters a model beside its coordinates in text, see `mllm.region_tokens`; the token that stands for it there.
COORDS = "coords"
REGION_TOKENS = (COORDS, "prompter", "pooling")
REGION_TOKEN = "<region_feature>"
# A point stands for the square around it that reaches this share of the picture's long side to each of its sides.
POINT_REACH = 0.05


@dataclass(frozen=True)
class Region:
    """One region, in pixels of the original image.

    box: xyxy; of a point the square around it, of a mask the box around its pixels
    point: x, y, where the region is a point; mask: a compressed run-length encoding, where it is free-form
    """

    box: tuple[float, float, float, float]
    point: tuple[float, float] | None = None
    mask: dict | None = None

    def text(self, geometry: Geometry, codec: BoxCodec) -> str:
        """How a question names it: a point by its coordinates, a box by its own, a mask by those of its box."""
        if self.point is None:
            return self.box_text(geometry, codec)
        return codec.encode_point(geometry.points_to_model(torch.tensor(self.point, dtype=torch.float64)))

    def box_text(self, geometry: Geometry, codec: BoxCodec) -> str:
        """Its box as text, which is also an answer's form."""
        return codec.encode(geometry.boxes_to_model(torch.tensor(self.box, dtype=torch.float64)))


def parse_region(value: dict, where: str, width: int, height: int) -> Region:
    """A record's region, checked against its picture of `width` x `height` pixels.

    where: names file, record and region in messages. Raises DataError with the key, what was seen and what to do.
    """
    found = [kind for kind in KINDS if kind in value] if isinstance(value, dict) else []
    if len(found) != 1:
        seen = f"has {' and '.join(found)}" if found else f"is {_shown(value)}"
        raise DataError(f"{where} {seen}; give an object with one of box, point and mask")
    (kind,) = found
    where, value = f"{where}.{kind}", value[kind]
    if kind == "mask":
        return _mask(value, where, width, height)
    names = ("x1", "y1", "x2", "y2") if kind == "box" else ("x", "y")
    if not isinstance(value, list | tuple) or len(value) != len(names) or not all(_is_number(c) for c in value):
        count = {4: "four", 2: "two"}[len(names)]
        raise DataError(f"{where} is {_shown(value)}; give {count} numbers {', '.join(names)} in pixels")
    if kind == "point":
        if not (0 <= value[0] <= width and 0 <= value[1] <= height):
            raise DataError(f"{where} {_shown(value)} lies outside the {width}x{height} picture; correct it (x, y, pixels)")
        return around_point(value, width, height)
    if not valid_boxes(torch.tensor([value], dtype=torch.float32), width, height)[0]:
        raise DataError(
            f"{where} {_shown(value)} has no area or leaves the {width}x{height} picture; correct it (x1 < x2, y1 < y2, pixels)"
        )
    return Region(tuple(map(float, value)))


def around_point(point: Sequence[float], width: int, height: int) -> Region:
    """The region of a point: its square is cut at the picture's border."""
    reach = POINT_REACH * max(width, height)
    x, y = map(float, point)
    box = max(x - reach, 0.0), max(y - reach, 0.0), min(x + reach, float(width)), min(y + reach, float(height))
    return Region(box, point=(x, y))


def as_region(value: Region | dict | Sequence[float], where: str, geometry: Geometry) -> Region:
    """What a caller gives for a region: a `Region`, a record's object, or a box's four numbers, which may leave the picture."""
    if isinstance(value, Region):
        return value
    if isinstance(value, dict):
        return parse_region(value, where, geometry.width, geometry.height)
    try:
        x1, y1, x2, y2 = box = tuple(map(float, value))
    except (TypeError, ValueError):
        box = ()
    if not box or not all(map(isfinite, box)) or x1 > x2 or y1 > y2:
        raise DataError(f"{where} is {_shown(value)}; give a box x1, y1, x2, y2 in pixels, or an object with box, point or mask")
    return Region(box)


def _mask(value, where: str, width: int, height: int) -> Region:
    try:
        if not value or not isinstance(value, list | dict):
            raise ValueError(f"it is {_shown(value)}")
        if isinstance(value, list) and any(len(polygon) < 6 or len(polygon) % 2 for polygon in value):
            raise ValueError("a polygon is x, y of three points or more")
        rle = run_lengths(value, width, height)
        size = tuple(rle["size"])
        if size == (height, width):
            decode_mask(rle)
    except DataError:
        raise
    except Exception as error:  # whatever pycocotools raises for it
        raise DataError(f"{where} is no COCO polygon and no run-length encoding ({error}); correct it") from None
    if size != (height, width):
        raise DataError(f"{where} is of {size[1]}x{size[0]} px, its picture of {width}x{height}; correct it")
    if mask_area(rle) == 0:
        raise DataError(f"{where} covers no pixel; give a mask that does, or a point")
    return Region(mask_box(rle), mask=rle)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _shown(value) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class RegionTable:
    """The regions that region tokens stand for, ready for the model, in the order in which they are named.

    by: `prompter` or `pooling`, see `mllm.region_tokens`; grid: G
    """

    def __init__(self, by: str, grid: int):
        self.by, self.grid = by, grid
        self._boxes, self._images = array("f"), array("i")
        self._masks: dict[int, tuple[dict, Geometry]] = {}

    def add(self, region: Region, geometry: Geometry, image: int) -> None:
        """A region of the picture number `image`, whose transform `geometry` is."""
        if region.mask is not None and self.by == "pooling":
            self._masks[len(self)] = region.mask, geometry
        box = clip_boxes(torch.tensor(region.box, dtype=torch.float64), geometry.width, geometry.height)
        self._boxes.extend(geometry.boxes_to_model(box).tolist())
        self._images.append(image)

    def __len__(self) -> int:
        return len(self._images)

    @property
    def images(self) -> np.ndarray:
        """(R,) int32: number of the picture that each region is of."""
        return np.asarray(self._images)

    def fingerprint(self) -> str:
        """Equal for equal regions of equal pictures."""
        digest = hashlib.sha256(f"{self.by} {self.grid}".encode() + self._boxes.tobytes() + self._images.tobytes())
        digest.update(repr(self._masks).encode())
        return digest.hexdigest()

    def inputs(self, indices: np.ndarray) -> dict[str, Tensor]:
        """What the model takes for the regions of these indices (r,): boxes (r, 4), or weights of patches (r, N)."""
        boxes_R4 = torch.from_numpy(np.asarray(self._boxes).reshape(-1, 4)[indices])
        if self.by == "prompter":
            return {"region_boxes": boxes_R4}
        weights = [self._weights(index, box) for index, box in zip(indices.tolist(), boxes_R4, strict=True)]
        return {"region_weights": torch.stack(weights) if weights else torch.zeros(0, self.grid**2)}

    def _weights(self, index: int, box: Tensor) -> Tensor:
        """(N,) float32 that sum to 1: the share of the region that each patch holds."""
        if index in self._masks:
            rle, geometry = self._masks[index]
            weights_GG = patch_weights(decode_mask(rle), geometry, self.grid)
        else:
            weights_GG = square_box_weights(box, self.grid)
        return (weights_GG / weights_GG.sum().clamp(min=1e-9)).flatten().float()
