"""Reads COCO-style annotation files and checks the images they name, for every benchmark that builds on that format.

Read as they are: `instances_*.json` of COCO and of all that is written like it (RefCOCO, ADE20K's instances), LVIS v1,
Objects365 v2, and `panoptic_*.json` of COCO or ADE20K, whose segments become annotations of their own.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from encoder.boxes import valid_boxes, xywh_to_xyxy
from encoder.data.reader import IMAGE_ERRORS
from encoder.data.sources.labelled import plain_name
from encoder.errors import DataError

FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}  # LVIS: in up to 10, up to 100, more training images


@dataclass(frozen=True)
class Annotation:
    """One annotated object; `box_xywh` as in the file: left, top, width, height in pixels of the original image.

    id: of a panoptic segment `<image id>-<segment id>`
    outline: as in the file, polygons or a run-length encoding, or (file name, segment id) of a panoptic PNG; None where
        the file has none
    """

    id: int | str
    image_id: int
    category_id: int
    box_xywh: tuple[float, float, float, float]
    crowd: bool
    outline: list | dict | tuple[str, int] | None = None


@dataclass(frozen=True)
class Instances:
    """images: id -> (file name, width, height in pixels); categories: id -> name, in file order; annotations: by id.

    sorts: category id -> rare, common, frequent (LVIS) or thing, stuff (panoptic); "" elsewhere
    """

    path: Path
    images: dict[int, tuple[str, int, int]]
    categories: dict[int, str]
    annotations: dict[int | str, Annotation]
    sorts: dict[int, str]

    def boxes(self, annotations: list[Annotation]) -> list[tuple[float, float, float, float]]:
        """Their boxes as xyxy pixels. DataError for one without area, or more than a pixel outside its image."""
        boxes_R4, _, valid_R = self._boxes(annotations)
        if not valid_R.all():
            raise DataError(self.fault(annotations[int((~valid_R).nonzero()[0])]))
        return [tuple(box) for box in boxes_R4.tolist()]

    def unusable(self, annotations: list[Annotation]) -> list[Annotation]:
        """Those whose box has no area, or lies more than a pixel outside its image."""
        return [annotations[index] for index in (~self._boxes(annotations)[2]).nonzero().flatten().tolist()]

    def fault(self, row: Annotation) -> str:
        """What is wrong with an unusable one, as a sentence."""
        width, height = self.images[row.image_id][1:]
        return (
            f"{self.path}: annotation {row.id} has bbox {list(row.box_xywh)} in an image of {width}x{height} px; it needs a "
            "positive size and a place inside the image, correct or remove it"
        )

    def _boxes(self, annotations: list[Annotation]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        xywh_R4 = torch.tensor([row.box_xywh for row in annotations], dtype=torch.float64).reshape(-1, 4)
        frame_R2 = torch.tensor([self.images[row.image_id][1:] for row in annotations]).reshape(-1, 2)
        boxes_R4 = xywh_to_xyxy(xywh_R4)
        inside_R = (boxes_R4[:, 2:] <= frame_R2 + 1).all(-1)
        return boxes_R4, frame_R2, valid_boxes(boxes_R4, float("inf"), float("inf")) & inside_R


def read_instances(path: Path) -> Instances:
    """Reads images, annotations and categories. DataError for a missing or broken file, naming the key."""
    path = Path(path)
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{path} is not there; a COCO-style instances file was expected") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not JSON ({error}); write or download it again") from None
    try:
        images = {row["id"]: (_file_name(row, path), row["width"], row["height"]) for row in content["images"]}
        categories = {row["id"]: row["name"] for row in content["categories"]}
        sorts = {row["id"]: _sort(row) for row in content["categories"]}
        rows = [annotation for row in content["annotations"] for annotation in _annotations(row, path)]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a COCO instances file ({error!r}); see cocodataset.org/#format-data") from None
    annotations = {row.id: row for row in rows}
    for what, table, listed in (
        ("images", images, content["images"]),
        ("categories", categories, content["categories"]),
        ("annotations", annotations, rows),
    ):
        if len(table) < len(listed):
            raise DataError(f"{path}: an id occurs twice under '{what}'; ids must be unique")
    for row in rows:
        if row.image_id not in images or row.category_id not in categories:
            raise DataError(f"{path}: annotation {row.id} names an image_id or category_id that the file does not have")
        if len(row.box_xywh) != 4:
            raise DataError(f"{path}: annotation {row.id} has bbox {list(row.box_xywh)}; four numbers were expected")
    return Instances(path, images, categories, annotations, sorts)


def _file_name(row: dict, path: Path) -> str:
    """Path of an image below the folder of images.

    LVIS names a URL, whose last folder counts (it draws on COCO's train2017 and val2017); Objects365 puts
    `images/v1/` or `images/v2/` before the `patchN` folders that it is delivered in.
    """
    where = f"{path}: image {row['id']}"
    if "file_name" not in row:
        return plain_name("/".join(row["coco_url"].split("/")[-2:]), where)
    return re.sub(r"^images/v[12]/(?=patch\d+/)", "", plain_name(row["file_name"], where))


def _sort(category: dict) -> str:
    if "isthing" in category:
        return "thing" if category["isthing"] else "stuff"
    return FREQUENCIES.get(category.get("frequency"), "")


def _annotations(row: dict, path: Path) -> list[Annotation]:
    """An instance, or all segments of a panoptic image."""
    if "segments_info" not in row:
        box, crowd, outline = tuple(row["bbox"]), bool(row.get("iscrowd", 0)), row.get("segmentation")
        return [Annotation(row["id"], row["image_id"], row["category_id"], box, crowd, outline or None)]
    png = plain_name(row["file_name"], f"{path}: annotation of image {row['image_id']}")
    return [
        Annotation(
            f"{row['image_id']}-{segment['id']}",
            row["image_id"],
            segment["category_id"],
            tuple(segment["bbox"]),
            bool(segment.get("iscrowd", 0)),
            (png, segment["id"]),
        )
        for segment in row["segments_info"]
    ]


def check_images(named: dict[str, tuple[int, int]], folder: Path) -> None:
    """Looks at every image's header once, before a model is loaded.

    named: file name, relative to `folder` -> (width, height) in pixels that the annotations state
    Raises DataError when one is missing, cannot be read, or has another size.
    """
    missing = []
    for name, stated in named.items():
        path = Path(folder) / name
        try:
            with Image.open(path) as image:
                size = image.size
        except FileNotFoundError:
            missing.append(name)
            continue
        except IMAGE_ERRORS as error:
            raise DataError(f"{path} cannot be read as an image ({error}); download or write it again") from None
        if size != stated:
            raise DataError(
                f"{path} is {size[0]}x{size[1]} px, the annotations say {stated[0]}x{stated[1]}; "
                "boxes would be misplaced, use the original images"
            )
    if missing:
        raise DataError(
            f"{len(missing)} of {len(named)} images are not in {folder}, the first is {missing[0]}; "
            "pass the folder that holds them as --images"
        )
