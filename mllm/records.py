"""Conversation records: reading files and checking what they hold.

Everything is checked before training starts, so that a bad record is named at once.
"""

import json
from pathlib import Path

from PIL import Image

from encoder.errors import DataError
from mllm.conversation import IMAGE, PLACEHOLDER, ROLES
from mllm.regions import parse_region


def read_records(path: str | Path) -> list[dict]:
    """A JSON list or JSON lines of LLaVA records, as they are; each gets `_where`, its file and id or position."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"conversation file {path} does not exist; check data in the recipe")
    try:
        if path.suffix == ".jsonl":
            records = []
            for number, line in enumerate(path.read_text().splitlines(), 1):  # noqa: B007 (named below)
                if line.strip():
                    records.append(json.loads(line))
        else:
            number = None
            records = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        line = number or error.lineno
        raise DataError(f"{path}, line {line}: not JSON ({error.msg}); the file may be truncated") from error
    if not isinstance(records, list) or not records:
        raise DataError(f"{path} holds no list of records; a LLaVA file is a JSON list with at least one")
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            raise DataError(f"{path}, record {index}: a {type(record).__name__}, not an object; write one object each")
        record["_where"] = f"{path}, id {record['id']}" if "id" in record else f"{path}, record {index}"
    return records


def texts_of(path: str | Path) -> list[str]:
    """What is said in a conversation file, without marks of pictures and boxes: to train a tokenizer on."""
    records = read_records(path)
    for record in records:
        _check_turns(record)
    turns = [turn["value"] for record in records for turn in record["conversations"]]
    return [PLACEHOLDER.sub("", text).replace(IMAGE, "").strip() for text in turns]


def check_record(record: dict, images: Path, sizes: dict[Path, tuple[int, int]] | None = None) -> None:
    """Raises a `DataError` naming file, id and key where a record cannot be used; fills in width and height.

    sizes: of pictures seen before, so that each is opened once
    """
    _check_turns(record)
    if "image" in record:
        _check_image(record, images, {} if sizes is None else sizes)
    _check_regions(record, record["conversations"])


def _check_turns(record: dict) -> None:
    where = record["_where"]
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: key 'conversations' is missing or empty; give a list of turns")
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or "from" not in turn:
            raise DataError(f"{where}: conversations[{index}] lacks 'from' or a text 'value'; give both")
        if turn["from"] not in ROLES:
            raise DataError(f"{where}: conversations[{index}].from is '{turn['from']}'; use human, gpt or system")
    marks = [index for index, turn in enumerate(turns) for _ in range(turn["value"].count(IMAGE))]
    if "image" in record and marks != [next((i for i, t in enumerate(turns) if t["from"] == "human"), -1)]:
        raise DataError(f"{where}: key 'image' needs one {IMAGE} in the first human turn, {len(marks)} found; put it there")
    if "image" not in record and marks:
        raise DataError(f"{where}: {IMAGE} is written but key 'image' is missing; add it or take the mark out")


def _check_image(record: dict, images: Path, sizes: dict[Path, tuple[int, int]]) -> None:
    where, path = record["_where"], images / str(record["image"])
    try:
        if path not in sizes:
            with Image.open(path) as image:  # reads the header only
                sizes[path] = image.size
    except FileNotFoundError:
        raise DataError(f"{where}: image {path} does not exist; check 'image' and the folder of images") from None
    except OSError:
        raise DataError(f"{where}: image {path} cannot be read as a picture; replace it or drop the record") from None
    size = sizes[path]
    told = (record.get("width", size[0]), record.get("height", size[1]))
    if told != size:
        raise DataError(
            f"{where}: width x height say {told[0]}x{told[1]}, the picture {path} is {size[0]}x{size[1]}; correct them"
        )
    record["width"], record["height"] = size


def _check_regions(record: dict, turns: list[dict]) -> None:
    where, regions = record["_where"], record.get("regions", [])
    if regions and "image" not in record:
        raise DataError(f"{where}: regions are given but key 'image' is missing; add the picture")
    if not isinstance(regions, list):
        raise DataError(f"{where}: regions is a {type(regions).__name__}; give a list of objects with box, point or mask")
    parsed = [parse_region(r, f"{where}: regions[{i}]", record["width"], record["height"]) for i, r in enumerate(regions)]
    for index, turn in enumerate(turns):
        for match in PLACEHOLDER.finditer(turn["value"]):
            if int(match[2]) >= len(regions):
                raise DataError(
                    f"{where}: conversations[{index}] has {match[0]}, but regions holds {len(regions)}; add that region"
                )
            if match[1] == "box" and parsed[int(match[2])].point is not None:
                raise DataError(
                    f"{where}: conversations[{index}] has {match[0]}, but that region is a point; give it a box or a mask"
                )
