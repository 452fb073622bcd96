"""Reads Visual Genome: `image_data.json` with `region_descriptions.json`, `objects.json`, or both."""

from collections import Counter
from collections.abc import Iterator
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
    "id", "image_id", "url", "width", "height", "coco_id", "regions", "objects", "phrase", "names", "x", "y", "w", "h",
}  # fmt: skip
KINDS = ("image_data", "region_descriptions", "objects")


def read_visual_genome(paths: list[Path], images: Path) -> Source:
    """`images` holds VG_100K and VG_100K_2; files are told apart by how their names begin. Phrases: a region's
    description, an object's names. Boxes of both are regions side by side."""
    check_folder(images, "--images")
    files = {kind: [Path(path) for path in paths if Path(path).name.startswith(kind)] for kind in KINDS}
    if any(len(found) > 1 for found in files.values()) or sum(map(len, files.values())) < len(paths):
        raise DataError(f"--annotations {' '.join(map(str, paths))}: give image_data.json once, and each label file at most once")
    if not files["image_data"] or len(paths) < 2:
        raise DataError("Visual Genome needs image_data.json and region_descriptions.json or objects.json as --annotations")
    image_path = files["image_data"][0]
    pictures = _by_image(image_path, ("url", "width", "height"))
    labels = {}
    for kind, key in (("region_descriptions", "regions"), ("objects", "objects")):
        for path in files[kind]:
            labels[path] = {image_id: row[key] for image_id, row in _by_image(path, (key,)).items()}
            if unknown := next((image_id for image_id in labels[path] if image_id not in pictures), None):
                raise DataError(f"{path}: image {unknown} is not in {image_path}; take files of the same version")

    def go() -> Iterator[SourceImage]:
        for image_id, row in pictures.items():
            where = f"{image_path}: image {image_id}"
            name = last_parts(row["url"], where)
            found, counts = [], Counter(images=1)
            for path, by_image in labels.items():
                kind = "regions" if path in files["region_descriptions"] else "objects"
                rows = by_image.get(image_id, [])
                counts[kind] += len(rows)
                found += [_label(item, kind, f"{path}: image {image_id}, {kind}[{i}]") for i, item in enumerate(rows)]
            read = image_file(images, name, where)
            counts["without_coco_id"] += row.get("coco_id") is None
            yield SourceImage(name, read, (row["width"], row["height"]), (), tuple(found), row.get("coco_id"), counts)

    return Source("visual_genome", "visual_genome", tuple(map(Path, paths)), go(), len(pictures), True)


def _by_image(path: Path, keys: tuple[str, ...]) -> dict[int, dict]:
    """A list with one object per image, by the image's id (`image_id`; `id` in version 1.0 and in the descriptions)."""
    rows = read_json(path, KEEP)
    try:
        table = {row["image_id"] if "image_id" in row else row["id"]: row for row in rows}
        for row in rows:
            for key in keys:
                row[key]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: not as in Visual Genome ({error!r}); download it again") from None
    if len(table) < len(rows):
        raise DataError(f"{path}: an image's id occurs twice; download it again")
    return table


def _label(item: dict, kind: str, where: str) -> Label:
    """A region has width and height, an object w and h; both lie at x, y, in pixels."""
    keys = ("x", "y", "width", "height") if kind == "regions" else ("x", "y", "w", "h")
    try:
        values = [item[key] for key in keys]
        texts = [item["phrase"]] if kind == "regions" else item["names"]
    except (KeyError, TypeError) as error:
        raise DataError(f"{where}: not as in Visual Genome ({error!r}); download the file again") from None
    left, top, width, height = numbers(values, 4, f"{where}: {', '.join(keys)}")
    return Label((left, top, left + width, top + height), text_phrases(*texts))
