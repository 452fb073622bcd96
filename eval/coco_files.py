"""Reads COCO's `instances.json` and checks the images it names, for every benchmark that builds on COCO's format."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError

from encoder.boxes import valid_boxes, xywh_to_xyxy
from encoder.errors import DataError


@dataclass(frozen=True)
class Annotation:
    """One annotated object; `box_xywh` as in the file: left, top, width, height in pixels of the original image."""

    id: int
    image_id: int
    category_id: int
    box_xywh: tuple[float, float, float, float]
    crowd: bool


@dataclass(frozen=True)
class Instances:
    """images: id -> (file name, width, height in pixels); categories: id -> name, in file order; annotations: by id."""

    path: Path
    images: dict[int, tuple[str, int, int]]
    categories: dict[int, str]
    annotations: dict[int, Annotation]

    def boxes(self, annotations: list[Annotation]) -> list[tuple[float, float, float, float]]:
        """Their boxes as xyxy pixels. DataError for one without area, or more than a pixel outside its image."""
        xywh_R4 = torch.tensor([row.box_xywh for row in annotations], dtype=torch.float64).reshape(-1, 4)
        frame_R2 = torch.tensor([self.images[row.image_id][1:] for row in annotations]).reshape(-1, 2)
        boxes_R4 = xywh_to_xyxy(xywh_R4)
        valid_R = valid_boxes(boxes_R4, float("inf"), float("inf")) & (boxes_R4[:, 2:] <= frame_R2 + 1).all(-1)
        for index in (~valid_R).nonzero().flatten().tolist()[:1]:
            width, height = frame_R2[index].tolist()
            raise DataError(
                f"{self.path}: annotation {annotations[index].id} has bbox {list(annotations[index].box_xywh)} in an image of "
                f"{width}x{height} px; it needs a positive size and a place inside the image, correct or remove it"
            )
        return [tuple(box) for box in boxes_R4.tolist()]


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
        images = {row["id"]: (row["file_name"], row["width"], row["height"]) for row in content["images"]}
        categories = {row["id"]: row["name"] for row in content["categories"]}
        annotations = {
            row["id"]: Annotation(row["id"], row["image_id"], row["category_id"], tuple(row["bbox"]), bool(row.get("iscrowd", 0)))
            for row in content["annotations"]
        }
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: not a COCO instances file ({error!r}); see cocodataset.org/#format-data") from None
    for what, rows in (("images", images), ("categories", categories), ("annotations", annotations)):
        if len(rows) < len(content[what]):
            raise DataError(f"{path}: an id occurs twice under '{what}'; ids must be unique")
    for row in annotations.values():
        if row.image_id not in images or row.category_id not in categories:
            raise DataError(f"{path}: annotation {row.id} names an image_id or category_id that the file does not have")
        if len(row.box_xywh) != 4:
            raise DataError(f"{path}: annotation {row.id} has bbox {list(row.box_xywh)}; four numbers were expected")
    return Instances(path, images, categories, annotations)


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
        except (UnidentifiedImageError, OSError) as error:
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
