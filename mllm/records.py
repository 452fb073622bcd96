"""Conversation records: reading files and checking what they hold.

A record is one of LLaVA's JSON, with our `regions`. Its pictures are `image`, a path or a list of paths, or `images`, a list.
Everything is checked before training starts, so that a bad record is named at once.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image

from encoder.errors import DataError
from mllm.conversation import IMAGE, PLACEHOLDER, ROLES
from mllm.regions import parse_region

Sizes = dict[Path, tuple[int, int]]  # of pictures seen before, so that each is opened once


def read_records(path: str | Path, problems: list[str] | None = None) -> list[dict]:
    """A JSON list or JSON lines of LLaVA records, as they are; each gets `_where`: its file with id, line or position.

    problems: where given, lines and entries that are no records are left out and told here; else they are errors
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"conversation file {path} does not exist; check data in the recipe")
    found: list[str] = []
    try:
        entries = list(_read_lines(path, found) if path.suffix == ".jsonl" else _read_list(path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text (byte {error.start}: {error.reason}); write it as UTF-8") from None
    records = []
    for where, record in entries:
        if not isinstance(record, dict):
            found.append(f"{path}, {where}: a {type(record).__name__}, not an object; write one object each")
            continue
        if "id" in record:
            where = f"{where}, id {record['id']}" if path.suffix == ".jsonl" else f"id {record['id']}"
        records.append(record | {"_where": f"{path}, {where}"})
    if found and problems is None:
        raise DataError(found[0])
    if not records and not found:
        raise DataError(f"{path} holds no list of records; a LLaVA file is a JSON list with at least one")
    if problems is not None:
        problems += found
    return records


def _read_list(path: Path) -> Iterator[tuple[str, object]]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg}); the file may be truncated") from error
    if not isinstance(records, list):
        raise DataError(f"{path} holds no list of records; a LLaVA file is a JSON list with at least one")
    yield from ((f"record {index}", record) for index, record in enumerate(records))


def _read_lines(path: Path, problems: list[str]) -> Iterator[tuple[str, object]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                problems.append(f"{path}, line {number}: not JSON ({error.msg}); the file may be truncated")


def texts_of(records: Iterable[dict]) -> Iterator[str]:
    """What is said in records, without marks of pictures and boxes: to train a tokenizer on."""
    for record in records:
        _raise_first(_turn_problems(record))
        for turn in record["conversations"]:
            yield PLACEHOLDER.sub("", turn["value"]).replace(IMAGE, "").strip()


def pictures_of(record: dict) -> list[str]:
    """Paths of a record's pictures, in the order of their marks; none for a record of text alone."""
    given = record.get("images", record.get("image"))
    return [given] if isinstance(given, str) else given or []


def sizes_of(record: dict) -> list[tuple[int, int]]:
    """(width, height) in pixels of each picture of a checked record."""
    width, height = record.get("width"), record.get("height")
    return list(zip(width, height, strict=True)) if isinstance(width, list) else [(width, height)] * len(pictures_of(record))


def check_record(record: dict, images: Path, sizes: Sizes | None = None) -> None:
    """Raises a `DataError` naming file, id and key where a record cannot be used; fills in width and height."""
    _raise_first(problems_of(record, images, sizes))


def _raise_first(problems: Iterator[str]) -> None:
    for problem in problems:
        raise DataError(problem)


def problems_of(record: dict, images: Path, sizes: Sizes | None = None) -> Iterator[str]:
    """Everything that `check_record` would say of a record, one sentence each. What hangs on a bad part is not looked at."""
    sound = True
    parts = (_turn_problems(record), _picture_problems(record, images, {} if sizes is None else sizes), _region_problems(record))
    for part in parts:
        if not sound:
            return
        for problem in part:
            sound = False
            yield problem


def _turn_problems(record: dict) -> Iterator[str]:
    where, turns = record["_where"], record.get("conversations")
    if not isinstance(turns, list) or not turns:
        yield f"{where}: key 'conversations' is missing or empty; give a list of turns"
        return
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("from", "value")):
            yield f"{where}: conversations[{index}] lacks 'from' or 'value' as text; give both"
        elif turn["from"] not in ROLES:
            yield f"{where}: conversations[{index}].from is '{turn['from']}'; use human, gpt or system"
        elif turn["from"] != "human" and IMAGE in turn["value"]:
            yield f"{where}: conversations[{index}] has {IMAGE} in a {turn['from']} turn; pictures are shown in human turns"
    if not any(isinstance(turn, dict) and turn.get("from") == "gpt" for turn in turns):
        yield f"{where}: conversations has no gpt turn, so there is nothing to learn; add one or drop the record"


def _picture_problems(record: dict, images: Path, sizes: Sizes) -> Iterator[str]:
    where, names = record["_where"], pictures_of(record)
    if "image" in record and "images" in record:
        yield f"{where}: keys 'image' and 'images' are both given; keep one"
        return
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        yield f"{where}: key 'image' is {names}; give a path or a list of paths"
        return
    marks = sum(turn["value"].count(IMAGE) for turn in record["conversations"])
    if marks and not names:
        yield f"{where}: {IMAGE} is written but key 'image' is missing; add it or take the mark out"
    elif marks != len(names):
        yield f"{where}: {len(names)} pictures need as many {IMAGE} in the human turns, {marks} found; write one each"
    found, unread = [], False
    for name in names:
        try:
            found.append(picture_size(picture_path(images, name), sizes))
        except DataError as error:
            unread = True
            yield f"{where}: {error}"
    if found and not unread:
        yield from _size_problems(record, images / names[0], found)


def picture_path(images: Path, name: str) -> Path:
    """Where a record's picture lies. DataError for a name that leaves the folder of images, by `..` or as an absolute path.

    So a file of conversations from elsewhere opens no other picture of the machine. An absolute name in the folder is meant, and
    with the folder `/` any is.
    """
    folder = os.path.abspath(images)
    if not Path(os.path.abspath(os.path.join(folder, name))).is_relative_to(folder) or "\0" in name:
        how = "name the folder that holds it, or / where any absolute path is meant" if os.path.isabs(name) else "correct it"
        raise DataError(f"image {name!r} leaves the folder of images {images}; {how}")
    return images / name


def picture_size(path: Path, sizes: Sizes) -> tuple[int, int]:
    """(width, height) in pixels, from the file's header."""
    try:
        if path not in sizes:
            with Image.open(path) as image:
                sizes[path] = image.size
        return sizes[path]
    except FileNotFoundError:
        raise DataError(f"image {path} does not exist; check 'image' and the folder of images") from None
    except (OSError, Image.DecompressionBombError):
        raise DataError(f"image {path} cannot be read as a picture; replace it or drop the record") from None


def _size_problems(record: dict, path: Path, found: list[tuple[int, int]]) -> Iterator[str]:
    """Where width and height are given they must be the pictures'; else they are filled in: numbers, or lists for several."""
    where = record["_where"]
    for key, values in zip(("width", "height"), zip(*found, strict=True), strict=True):
        right = values[0] if len(values) == 1 else list(values)
        if record.setdefault(key, right) != right:
            told, true = f"{record.get('width')}x{record.get('height')}", "x".join(map(str, found[0]))
            yield f"{where}: width x height say {told}, the picture {path} is {true}; correct them"
            return


def _region_problems(record: dict) -> Iterator[str]:
    where, regions, sizes = record["_where"], record.get("regions", []), sizes_of(record)
    if not isinstance(regions, list):
        yield f"{where}: regions is a {type(regions).__name__}; give a list of objects with box, point or mask"
        return
    if regions and not sizes:
        yield f"{where}: regions are given but key 'image' is missing; add the picture"
        return
    points = set()
    for index, value in enumerate(regions):
        picture = value.get("image_index", 0) if isinstance(value, dict) else 0
        if not isinstance(picture, int) or picture not in range(len(sizes)):
            yield f"{where}: regions[{index}].image_index is {picture}, but the record has {len(sizes)} pictures; count from 0"
            continue
        try:
            if parse_region(value, f"{where}: regions[{index}]", *sizes[picture]).point is not None:
                points.add(index)
        except DataError as error:
            yield str(error)
    for index, turn in enumerate(record["conversations"]):
        for match in PLACEHOLDER.finditer(turn["value"]):
            if int(match[2]) >= len(regions):
                yield f"{where}: conversations[{index}] has {match[0]}, but regions holds {len(regions)}; add that region"
            elif match[1] == "box" and int(match[2]) in points:
                yield f"{where}: conversations[{index}] has {match[0]}, but that region is a point; give it a box or a mask"
