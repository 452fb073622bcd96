"""Outlines of objects as weights of image patches: what pooling under a mask needs.

An outline is polygons, a run-length encoding (both by pycocotools) or a segment of a panoptic PNG. A patch weighs what
share of it the mask covers, worked out in pixels of the original image: nothing is resized, thin objects keep weight.

H, W the original image, G patches per side, R regions, E joint space.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle_tools
from torch import Tensor

from encoder.errors import DataError
from encoder.geometry import Geometry
from eval.coco_files import Annotation, Instances


class Masks:
    """The outlines of annotations, by annotation id.

    png_folder: of a panoptic file's PNGs
    empty: how many outlines cover no pixel (LVIS and COCO have a few): the box stands in for them
    Raises DataError for an annotation without an outline, or with one that cannot be read.
    """

    def __init__(self, instances: Instances, annotations: list[Annotation], png_folder: Path | None):
        self.png_folder = png_folder
        self.outlines: dict[str, dict | tuple[str, int] | None] = {}
        for row in annotations:
            _, width, height = instances.images[row.image_id]
            where = f"{instances.path}: annotation {row.id}"
            self.outlines[str(row.id)] = self._outline(row, width, height, where)
        self.empty = sum(outline is None for outline in self.outlines.values())

    def _outline(self, row: Annotation, width: int, height: int, where: str) -> dict | tuple[str, int] | None:
        if row.outline is None:
            raise DataError(f"{where} has no segmentation; --feature maskpool needs one, use another feature for these data")
        if isinstance(row.outline, tuple):
            if self.png_folder is None:
                raise DataError(f"{where} is a panoptic segment; give the folder of the PNGs as --masks")
            return row.outline
        try:
            rle = run_lengths(row.outline, width, height)
        except Exception as error:  # what pycocotools raises for it
            raise DataError(f"{where}: its segmentation is no polygon and no run-length encoding ({error}); correct it") from None
        if tuple(rle["size"]) != (height, width):
            raise DataError(f"{where}: its segmentation is of {rle['size'][::-1]} px, its image of {[width, height]}; correct it")
        return rle if rle_tools.area(rle) > 0 else None

    def of(self, annotation_id: str) -> np.ndarray | None:
        """(H, W) bool, or None where the outline is empty."""
        outline = self.outlines[annotation_id]
        if outline is None:
            return None
        if isinstance(outline, dict):
            return rle_tools.decode(outline).astype(bool)
        name, segment = outline
        mask = segment_ids(self.png_folder / name) == segment
        if not mask.any():
            raise DataError(f"{self.png_folder / name} has no pixel of segment {segment}; use the PNGs of that JSON file")
        return mask


def run_lengths(outline: list | dict, width: int, height: int) -> dict:
    """Polygons [[x, y, x, y, ...], ...] or a run-length encoding, compressed or not -> the compressed one."""
    if isinstance(outline, list):
        return rle_tools.merge(rle_tools.frPyObjects(outline, height, width))
    if not isinstance(outline["counts"], list):
        return outline
    if sum(outline["counts"]) != width * height:  # pycocotools would fill the rest with whatever lies in memory
        raise ValueError(f"its runs add up to {sum(outline['counts'])} pixels, {width * height} are needed")
    return rle_tools.frPyObjects(outline, height, width)


@lru_cache(maxsize=2)
def segment_ids(path: Path) -> np.ndarray:
    """(H, W) segment ids of a panoptic PNG: red + 256 green + 65,536 blue, as in COCO's panoptic API."""
    try:
        with Image.open(path) as image:
            rgb = np.asarray(image.convert("RGB"), np.int64)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); give the folder of the panoptic PNGs as --masks") from None
    return rgb @ np.array([1, 256, 65536])


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
    corners = geometry.points_to_model(torch.tensor(box, dtype=torch.float64).reshape(2, 2)) * grid
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
