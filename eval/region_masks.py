"""Outlines of objects as weights of image patches: what pooling under a mask needs.

An outline is polygons, a run-length encoding (both by pycocotools) or a segment of a panoptic PNG; `encoder.masks` weighs the
patches under it. H, W the original image.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from encoder.errors import DataError
from encoder.masks import decode_mask, mask_area, run_lengths
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
        return rle if mask_area(rle) > 0 else None

    def of(self, annotation_id: str) -> np.ndarray | None:
        """(H, W) bool, or None where the outline is empty."""
        outline = self.outlines[annotation_id]
        if outline is None:
            return None
        if isinstance(outline, dict):
            return decode_mask(outline)
        name, segment = outline
        mask = segment_ids(self.png_folder / name) == segment
        if not mask.any():
            raise DataError(f"{self.png_folder / name} has no pixel of segment {segment}; use the PNGs of that JSON file")
        return mask


@lru_cache(maxsize=2)
def segment_ids(path: Path) -> np.ndarray:
    """(H, W) segment ids of a panoptic PNG: red + 256 green + 65,536 blue, as in COCO's panoptic API."""
    try:
        with Image.open(path) as image:
            rgb = np.asarray(image.convert("RGB"), np.int64)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); give the folder of the panoptic PNGs as --masks") from None
    return rgb @ np.array([1, 256, 65536])
