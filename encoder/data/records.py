"""The region record: what a training image is, whoever labelled it. One JSON object beside the image in a shard.

    {"image": "000012.png", "width": 80, "height": 60, "captions": ["a bus and two red apples"],
     "regions": [{"box": [x1, y1, x2, y2], "phrases": ["red apple", "small red apple"], "score": 1.0, "source": "scenes"}]}

Boxes are xyxy floats in pixels of the stored image. `score` and `source` (who labelled it) may be absent; keys that are
not named here are allowed and not read. `captions` describe the image (recaptions); the text that it was found with is
`alt_text`, or the `.txt` beside it, and where there is one `captions` may be absent.

A JSON without `image`, `captions` and `regions` is no record but what `img2dataset` writes: an image with its alt-text alone.
"""

import json
import math
from dataclasses import dataclass, replace
from typing import Any

from encoder.errors import DataError

BOX_TOLERANCE = 1.0  # px that a box may lie outside its image, since annotators round outwards; it is clipped


@dataclass(frozen=True)
class Region:
    """box: xyxy pixels of the original image, inside it; phrases: at least one, the first is the plain name; score: the
    labeller's confidence; source: who labelled it, "" if unknown."""

    box: tuple[float, float, float, float]
    phrases: tuple[str, ...]
    score: float = 1.0
    source: str = ""


@dataclass(frozen=True)
class RegionRecord:
    """image: name of the image in its shard; width, height: its size in pixels; captions: at least one, or an alt_text;
    regions: any number, also none; alt_text: "" if there is none."""

    image: str
    width: int
    height: int
    captions: tuple[str, ...]
    regions: tuple[Region, ...]
    alt_text: str = ""


def parse_sample(label: bytes | None, text: bytes | None, image: str, size: tuple[int, int], where: str) -> RegionRecord:
    """What lies beside an image in a shard -> RegionRecord; without a region record one that has no regions.

    label, text: the `.json` and the `.txt`, None where there is none
    image, size: the image's member name, and its width and height in pixels, with which a record must agree
    where: names shard and sample in messages. Raises DataError as `parse_record` does, and where no text is found
    """
    try:
        alt_text = (text or b"").decode().strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}.txt is not UTF-8 text ({error}); write it again") from error
    fields = {} if label is None else parse_object(label, f"{where}.json")
    if not fields.keys() & {"image", "captions", "regions"}:
        caption = fields.get("caption")
        alt_text = alt_text or (caption.strip() if isinstance(caption, str) else "")
        if not alt_text:
            raise DataError(f"{where}: neither the .txt nor the .json has a caption; add one, or remove the sample")
        return RegionRecord(image, *size, (), (), alt_text)
    where = f"{where}.json"
    record = parse_record(fields, where, alt_text)
    if record.alt_text in record.captions:  # a writer without an alt-text puts a caption into the .txt
        record = replace(record, alt_text="")
    if record.image not in (image, image.rpartition("/")[2]):
        raise DataError(f"{where}: image is '{record.image}', beside it lies {image}; make them agree")
    if size != (record.width, record.height):
        stated, found = f"{record.width}x{record.height}", f"{size[0]}x{size[1]}"
        raise DataError(f"{where}: width and height say {stated}, image {image} is {found}; correct the record")
    return record


def parse_record(record: bytes | str | dict, where: str, alt_text: str = "") -> RegionRecord:
    """A record's JSON, or the object parsed from it -> RegionRecord.

    where: names shard and member in messages. Raises DataError with one sentence: where, the key, the value seen and
    what to do; for a missing key, a wrong type, a size that is not positive, an empty list of captions or phrases, and
    a box that has no area or lies outside its image.
    alt_text: taken where the record itself has none
    """
    if not isinstance(record, dict):
        record = parse_object(record, where)
    image = _text(record, "image", where)
    width, height = (_positive_integer(record, key, where) for key in ("width", "height"))
    alt_text = _text(record, "alt_text", where) if "alt_text" in record else alt_text
    captions = () if alt_text and "captions" not in record else _texts(record, "captions", "", where)
    regions = []
    for index, region in enumerate(_list(record, "regions", "", where)):
        prefix = f"regions[{index}]"
        if not isinstance(region, dict):
            raise DataError(f"{where}: {prefix} is {_shown(region)}; a region is an object with box and phrases")
        box = _box(region, prefix, width, height, where)
        phrases = _texts(region, "phrases", f"{prefix}.", where)
        score, source = region.get("score", 1.0), region.get("source", "")
        if not _is_number(score):
            raise DataError(f"{where}: {prefix}.score is {_shown(score)}; give a finite number or leave it out")
        if not isinstance(source, str):
            raise DataError(f"{where}: {prefix}.source is {_shown(source)}; give a string or leave it out")
        regions.append(Region(box, phrases, float(score), source))
    return RegionRecord(image, width, height, captions, tuple(regions), alt_text)


def parse_object(label: bytes | str, where: str) -> dict:
    """The JSON object in `label`."""
    try:
        value = json.loads(label)
    except ValueError as error:
        raise DataError(f"{where} is not valid JSON ({error}); write the record again") from error
    if not isinstance(value, dict):
        raise DataError(f"{where} holds a JSON {type(value).__name__}; a record is an object with image and regions")
    return value


def _shown(value: Any) -> str:
    """A value as it appears in a message: JSON, cut where it is long."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_number(value: Any) -> bool:
    if type(value) is float:
        return math.isfinite(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too long for a float
        return False


def _get(record: dict, key: str, prefix: str, where: str) -> Any:
    if key not in record:
        found = ", ".join(sorted(record)) or "none"
        raise DataError(f"{where}: key '{prefix}{key}' is missing (keys found: {found}); add it")
    return record[key]


def _text(record: dict, key: str, where: str) -> str:
    value = _get(record, key, "", where)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {key} is {_shown(value)}; give a string that is not empty")
    return value


def _positive_integer(record: dict, key: str, where: str) -> int:
    value = _get(record, key, "", where)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise DataError(f"{where}: {key} is {_shown(value)}; give the image's size in whole pixels, above 0")
    return value


def _list(record: dict, key: str, prefix: str, where: str) -> list:
    value = _get(record, key, prefix, where)
    if not isinstance(value, list):
        raise DataError(f"{where}: {prefix}{key} is {_shown(value)}; give a list")
    return value


def _texts(record: dict, key: str, prefix: str, where: str) -> tuple[str, ...]:
    values = _list(record, key, prefix, where)
    if not values or not all(isinstance(value, str) and value.strip() for value in values):
        raise DataError(f"{where}: {prefix}{key} is {_shown(values)}; give at least one string, and no empty one")
    return tuple(values)


def _box(region: dict, prefix: str, width: int, height: int, where: str) -> tuple[float, float, float, float]:
    value = _get(region, "box", f"{prefix}.", where)
    if not isinstance(value, list) or len(value) != 4 or not all(_is_number(number) for number in value):
        raise DataError(f"{where}: {prefix}.box is {_shown(value)}; give four finite numbers x1, y1, x2, y2 in pixels")
    left, top, right, bottom = map(float, value)
    if right <= left or bottom <= top:
        raise DataError(f"{where}: {prefix}.box {_shown(value)} has no area; give corners x1, y1, x2, y2 with x1 < x2, y1 < y2")
    inside = min(left, top) >= -BOX_TOLERANCE and right <= width + BOX_TOLERANCE and bottom <= height + BOX_TOLERANCE
    left, top, right, bottom = max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))
    if not inside or right <= left or bottom <= top:
        raise DataError(f"{where}: {prefix}.box {_shown(value)} lies outside its {width}x{height} image; correct or remove it")
    return left, top, right, bottom
