"""Reads COCO's `instances_*.json` and what shares its form: LVIS v1, Objects365 v2, and COCO's `captions_*.json`.

Boxes there are left, top, width, height in pixels. A million-image file is read whole: see docs/data.md for what it takes.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from encoder.data.sources.labelled import (
    Label,
    Source,
    SourceImage,
    check_folder,
    image_file,
    last_parts,
    numbers,
    read_json,
    text_phrases,
)
from encoder.errors import DataError

KEEP = {
    "images", "annotations", "categories", "id", "image_id", "category_id", "bbox", "iscrowd",
    "file_name", "coco_url", "width", "height", "name", "synonyms",
}  # fmt: skip


def read_coco(path: Path, images: Path) -> Source:
    """COCO: `instances_train2017.json` with `train2017/`, and any file of its form. Phrase: the category's name."""
    return _read("coco", path, images, lambda row, where: row["file_name"], lambda row: text_phrases(row["name"]), True)


def read_lvis(path: Path, images: Path) -> Source:
    """LVIS v1: `lvis_v1_train.json`; its pictures lie in COCO's `train2017/` and `val2017/`, `images` holds both.

    Phrases: the name, then its synonyms, underscores as spaces ("bow (weapon)", "archery bow").
    """

    def phrases(row: dict) -> tuple[str, ...]:
        return text_phrases(*(text.replace("_", " ") for text in (row["name"], *row.get("synonyms", ()))))

    return _read("lvis", path, images, lambda row, where: last_parts(row["coco_url"], where), phrases, True)


def read_objects365(path: Path, images: Path) -> Source:
    """Objects365 v2: `zhiyuan_objv2_train.json`; `images` holds patch0, patch1, ... Phrases: the name in lower case,
    split where it joins two ("Cabinet/shelf")."""

    def phrases(row: dict) -> tuple[str, ...]:
        return text_phrases(*row["name"].lower().split("/"))

    return _read("objects365", path, images, lambda row, where: last_parts(row["file_name"], where), phrases, False)


def read_captions(paths: list[Path]) -> dict[int, tuple[str, ...]]:
    """COCO's `captions_*.json` files -> the captions of each image, by COCO's id."""
    captions: dict[int, list[str]] = {}
    for path in paths:
        content = read_json(path)
        try:
            for row in content["annotations"]:
                captions.setdefault(row["image_id"], []).append(row["caption"])
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}: not a COCO captions file ({error!r}); give captions_train2017.json or its like") from None
    return {image_id: text_phrases(*texts) for image_id, texts in captions.items()}


def read_tables(path: Path) -> tuple[dict[int, dict], dict[int, dict], dict[int, dict]]:
    """images, annotations and categories of a COCO-style file, each by id, only the keys used here. Raises DataError for
    a missing or broken file, a missing key, an id that occurs twice, and an annotation of an unknown image or category."""
    content, tables = read_json(path, KEEP), {}
    for name in ("images", "annotations", "categories"):
        try:
            tables[name] = {row["id"]: row for row in content[name]}
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}: '{name}' is missing or not as in COCO's format ({error!r}); download it again") from None
        if len(tables[name]) < len(content[name]):
            raise DataError(f"{path}: an id occurs twice under '{name}'; ids must be unique")
    images, annotations, categories = tables.values()
    for number, row in annotations.items():
        if row.get("image_id") not in images or row.get("category_id") not in categories:
            raise DataError(f"{path}: annotation {number} names an image_id or category_id that the file does not have")
    return images, annotations, categories


def box_of(annotation: dict, path: Path) -> tuple[float, float, float, float]:
    """An annotation's `bbox` as xyxy pixels."""
    left, top, width, height = numbers(annotation.get("bbox"), 4, f"{path}: bbox of annotation {annotation['id']}")
    return left, top, left + width, top + height


def _read(
    dataset: str,
    path: Path,
    folder: Path,
    file_name: Callable[[dict, str], str],
    phrases_of: Callable[[dict], tuple[str, ...]],
    coco_ids: bool,
) -> Source:
    check_folder(folder, "--images")
    path = Path(path)
    images, annotations, categories = read_tables(path)
    by_image: dict[int, list[dict]] = {number: [] for number in images}
    for row in annotations.values():
        by_image[row["image_id"]].append(row)
    try:
        phrases = {number: phrases_of(row) for number, row in categories.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: a category is not as {dataset} has it ({error!r}); download the file again") from None

    def go() -> Iterator[SourceImage]:
        for number, row in images.items():
            where = f"{path}: image {number}"
            try:
                name, size = file_name(row, where), (row["width"], row["height"])
            except KeyError as error:
                raise DataError(f"{where} has no {error}; this is not a file of {dataset}, or it is damaged") from None
            rows = by_image[number]
            labels = tuple(Label(box_of(a, path), phrases[a["category_id"]]) for a in rows if not a.get("iscrowd"))
            counts = Counter(images=1, annotations=len(rows), crowd=len(rows) - len(labels))
            read = image_file(folder, name, where)
            yield SourceImage(name, read, size, (), labels, number if coco_ids else None, counts)

    return Source(dataset, f"{dataset}/{path.stem}", (path,), go(), len(images), coco_ids)
