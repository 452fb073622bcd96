"""Outlines of objects: COCO's polygons and run-length encodings, their boxes, and the weights of image patches under them.

A patch weighs what share of it the mask covers, worked out in pixels of the original image: nothing is resized, thin objects
keep weight. H, W the original image, G patches per side, R regions, E joint space.
"""

import numpy as np
import torch
from torch import Tensor

from encoder.errors import DataError
from encoder.geometry import Geometry


def _rle_tools():
    try:
        from pycocotools import mask
    except ImportError as error:
        raise DataError("masks need pycocotools; install it with: pip install 'open-cloc[eval]'") from error
    return mask


def run_lengths(outline: list | dict, width: int, height: int) -> dict:
    """Polygons [[x, y, x, y, ...], ...] or a run-length encoding, compressed or not -> the compressed one."""
    if isinstance(outline, list):
        return _rle_tools().merge(_rle_tools().frPyObjects(outline, height, width))
    compressed = not isinstance(outline["counts"], list)
    runs = _decompress(outline["counts"]) if compressed else outline["counts"]
    pixels = outline["size"][0] * outline["size"][1] if compressed else width * height
    if sum(runs) != pixels or min(runs) < 0:  # pycocotools would fill the rest with whatever lies in memory
        raise ValueError(f"its runs add up to {sum(runs)} pixels, {pixels} are needed")
    if compressed:
        return outline
    return _rle_tools().frPyObjects(outline, height, width)


def _decompress(counts: str | bytes) -> list[int]:
    """Runs of a compressed encoding: groups of five bits, low ones first, each from the second last before it on (COCO)."""
    runs: list[int] = []
    value = shift = 0
    for code in counts.encode() if isinstance(counts, str) else counts:
        bits = code - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the group's last
            if bits & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def plain_run_lengths(mask_HW: np.ndarray) -> dict:
    """(H, W) bool -> COCO's uncompressed encoding: column by column, the first run of pixels outside. Needs no pycocotools."""
    line = mask_HW.flatten(order="F")
    edges = np.flatnonzero(np.diff(line, prepend=False, append=not line[-1]))
    return {"size": list(mask_HW.shape), "counts": np.diff(edges, prepend=0).tolist()}


def inner_pixels(mask_HW: np.ndarray) -> np.ndarray:
    """(H, W) bool: the pixels that have the mask on all four sides, or the mask itself where there are none."""
    padded = np.pad(mask_HW, 1)
    inner = mask_HW & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inner if inner.any() else mask_HW


def decode_mask(rle: dict) -> np.ndarray:
    """A compressed run-length encoding -> (H, W) bool."""
    return _rle_tools().decode(rle).astype(bool)


def mask_area(rle: dict) -> int:
    """How many pixels a run-length encoding covers."""
    return int(_rle_tools().area(rle))


def mask_box(rle: dict) -> tuple[float, float, float, float]:
    """The box around the pixels of a run-length encoding: xyxy, outer edges of the pixels."""
    left, top, width, height = _rle_tools().toBbox(rle).tolist()
    return left, top, left + width, top + height


def patch_weights(mask_HW: np.ndarray, geometry: Geometry, grid: int) -> Tensor:
    """Share of each patch that the mask covers, (G, G) float64; row 0 is the top of the model's square input."""
    if mask_HW.shape != (geometry.height, geometry.width):
        shape, size = mask_HW.shape[::-1], (geometry.width, geometry.height)
        raise DataError(
            f"a mask is of {shape[0]}x{shape[1]} px, its image of {size[0]}x{size[1]}; they belong to different images"
        )
    x_GW, y_GH = _coverage(geometry, grid)
    return y_GH @ torch.from_numpy(mask_HW).double() @ x_GW.T


def box_weights(box: tuple[float, float, float, float], geometry: Geometry, grid: int) -> Tensor:
    """The same of a box, xyxy pixels of the original image."""
    return square_box_weights(geometry.boxes_to_model(torch.tensor(box, dtype=torch.float64)), grid)


def square_box_weights(box: Tensor, grid: int) -> Tensor:
    """The same of a box (4,), xyxy in [0, 1] of the model's square input."""
    corners = box.double().reshape(2, 2) * grid
    low = torch.arange(grid, dtype=torch.float64)[:, None]
    share_G2 = (torch.minimum(corners[1], low + 1) - torch.maximum(corners[0], low)).clamp(min=0)
    return share_G2[:, 1:] * share_G2[:, 0]


def _coverage(geometry: Geometry, grid: int) -> tuple[Tensor, Tensor]:
    """How much of each patch column (row) each pixel column (row) fills, as shares of the patch: (G, W) and (G, H)."""
    edges = geometry.points_to_image(torch.linspace(0, 1, grid + 1, dtype=torch.float64)[:, None].expand(-1, 2))
    shares = []
    for axis, size in ((0, geometry.width), (1, geometry.height)):
        low, high = edges[:-1, axis, None], edges[1:, axis, None]
        pixel = torch.arange(size, dtype=torch.float64)
        shares.append((torch.minimum(high, pixel + 1) - torch.maximum(low, pixel)).clamp(min=0) / (high - low))
    return shares[0], shares[1]


def pool_under(maps_BEGG: Tensor, weights_RGG: Tensor, image_index_R: Tensor) -> Tensor:
    """Weighted mean (R, E) of patch features; every region weighs something."""
    weights = weights_RGG.to(maps_BEGG)
    pooled = torch.einsum("regh,rgh->re", maps_BEGG[image_index_R], weights)
    return pooled / weights.sum(dim=(1, 2))[:, None]
