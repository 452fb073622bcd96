"""The region record: what a training image is, whoever labelled it. One JSON object beside the image in a shard.

    {"image": "000012.png", "width": 80, "height": 60, "captions": ["a bus and two red apples"],
     "regions": [{"box": [x1, y1, x2, y2], "phrases": ["red apple", "small red apple"], "score": 1.0, "source": "scenes"}]}

Boxes are xyxy floats in pixels of the stored image. `score` and `source` (who labelled it) may be absent; keys that are
not named here are allowed and not read.
"""

import json
import math
from dataclasses import dataclass
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
    """image: name of the image in its shard; width, height: its size in pixels; captions: at least one; regions: any
    number, also none."""

    image: str
    width: int
    height: int
    captions: tuple[str, ...]
    regions: tuple[Region, ...]


def parse_record(record: bytes | str | dict, where: str) -> RegionRecord:
    """A record's JSON, or the object parsed from it -> RegionRecord.

    where: names shard and member in messages. Raises DataError with one sentence: where, the key, the value seen and
    what to do; for a missing key, a wrong type, a size that is not positive, an empty list of captions or phrases, and
    a box that has no area or lies outside its image.
    """
    if not isinstance(record, dict):
        try:
            record = json.loads(record)
        except ValueError as error:
            raise DataError(f"{where} is not valid JSON ({error}); write the record again") from error
        if not isinstance(record, dict):
            raise DataError(f"{where} holds a JSON {type(record).__name__}; a record is an object with image and regions")
    image = _text(record, "image", where)
    width, height = (_positive_integer(record, key, where) for key in ("width", "height"))
    captions = _texts(record, "captions", "", where)
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
    return RegionRecord(image, width, height, captions, tuple(regions))


def _shown(value: Any) -> str:
    """A value as it appears in a message: JSON, cut where it is long."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_number(value: Any) -> bool:
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
