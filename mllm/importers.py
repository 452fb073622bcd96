"""Conversation files of other projects as our records: each box is a region in pixels, and a mark where its text stood.

An importer takes a record as the file has it and a function from a picture's name to its (width, height); it raises a
`DataError` for a box it cannot read. In a question a box becomes `<region:i>`, in an answer `<box:i>`, so that it is written
by the training's own codec and geometry. A coordinate that was rounded down to a bin is read as the bin's middle.

`llava`   [0.12, 0.34, 0.56, 0.78], parts of the picture padded to a square, centred (LLaVA-1.5's mix665k)
`shikra`  `<boxes>` and `<points>` numbered by `boxes_seq` and `points_seq` into `target`, pixels; and
          [0.123,0.345,0.567,0.789;...], parts of the padded square (arXiv 2306.15195)
`ferret`  `<bbox_location0>` of the turn's list in `box_x1y1x2y2`, pixels, with `masks`; and [012, 345, 678, 999],
          thousandths of width and height (arXiv 2310.07704)
`qwen`    `<ref>a dog</ref><box>(12,345),(678,999)</box>`, thousandths of width and height; pictures as `<img>path</img>`
          in the text (Qwen-VL, arXiv 2308.12966)
`qwen2_5` {"bbox_2d": [12, 34, 567, 789]} and {"point_2d": [12, 34]} in the text, pixels of the picture (Qwen2.5-VL)
`qwen3`   the same, thousandths of width and height, rounded to the nearest (Qwen2-VL, Qwen3-VL)
"""

import re
from collections.abc import Callable, Iterable
from functools import partial

import torch

from encoder.errors import DataError
from encoder.geometry import Geometry
from mllm.conversation import IMAGE
from mllm.records import pictures_of

NATIVE = "conversations"
SizeOf = Callable[[str], tuple[int, int]]
_DECIMAL, _WHOLE = r"\s*(?:\d+\.\d*|\d*\.\d+|\d)\s*", r"\s*\d+\s*"


class _Imported:
    """A record's regions as they are found."""

    def __init__(self, record: dict, size: tuple[int, int] | None):
        self.record, self.size, self.regions = record, size, []

    def mark(self, region: dict, turn: dict) -> str:
        """`<region:i>` in a question, `<box:i>` in an answer; a region that was there before is named again."""
        asked = turn.get("from") == "human"
        if "point" in region and not asked:
            raise DataError(f"the point {region['point']} stands in an answer, which can hold boxes only; take it out")
        if region not in self.regions:
            self.regions.append(region)
        return f"<{'region' if asked else 'box'}:{self.regions.index(region)}>"

    def box(self, corners: list[float], step: float, geometry: Geometry, text: str) -> dict:
        """The region of a box in [0, 1] of `geometry`'s square, written in steps of `step` as `text`.

        Corners that fell on the same step are taken half a step apart each way.
        """
        x1, y1, x2, y2 = corners
        if x1 > x2 or y1 > y2 or not all(0 <= c <= 1 for c in corners):
            raise DataError(f"box '{text}' does not run from left to right and from top to bottom inside the picture; correct it")
        x1, x2 = (x1, x2) if x1 < x2 else (x1 - step / 2, x2 + step / 2)
        y1, y2 = (y1, y2) if y1 < y2 else (y1 - step / 2, y2 + step / 2)
        box_px = geometry.boxes_to_image(torch.tensor([x1, y1, x2, y2], dtype=torch.float64)).tolist()
        if not (box_px[0] < box_px[2] and box_px[1] < box_px[3]):
            raise DataError(f"box '{text}' lies in the padding, outside the picture; is this the right importer?")
        return {"box": box_px}

    def done(self, turns: list[dict], **more) -> dict:
        record = self.record | {"conversations": turns} | more
        return record | {"regions": self.regions} if self.regions else record


def _open(record: dict, size_of: SizeOf) -> _Imported:
    names = pictures_of(record)
    return _Imported(record, size_of(names[0]) if len(names) == 1 else None)


def _sound(record: dict) -> bool:
    """Whether the turns can be read at all; where not, the record goes on as it is, to the check that says why."""
    turns, names = record.get("conversations"), pictures_of(record)
    named = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return named and isinstance(turns, list) and all(isinstance(t, dict) and isinstance(t.get("value"), str) for t in turns)


def _replace(text: str, start: re.Pattern, whole: re.Pattern, word: Callable[[re.Match], str], example: str) -> str:
    """`text` with `word` for each `whole`; something that begins like one, as `start` says, and is none is an error."""
    parts, at = [], 0
    for begin in start.finditer(text):
        if begin.start() >= at:
            match = whole.match(text, begin.start())
            if match is None:
                shown = text[begin.start() : begin.start() + 40]
                raise DataError(f"'{shown}' begins like a box and is none; write {example}, or leave the importer out")
            parts += [text[at : match.start()], word(match)]
            at = match.end()
    return "".join([*parts, text[at:]])


def conversations(record: dict, size_of: SizeOf) -> dict:
    """Our own form, and plain LLaVA whose boxes, if any, stay the text that they are."""
    return record


_FLOATS_START = re.compile(r"\[\s*(?:\d*\.\d+\s*[,;]|(?:[01]\s*,\s*){1,3}\d*\.\d)")
_FOUR = rf"{_DECIMAL}(?:,{_DECIMAL}){{3}}"
_FLOATS = re.compile(rf"\[{_FOUR}(?:;{_FOUR})*\]")


def _float_boxes(imported: _Imported, turn: dict) -> str:
    """Boxes as decimals of the padded square."""
    if imported.size is None:
        return turn["value"]
    geometry = Geometry("pad", *imported.size, max(imported.size))

    def word(match: re.Match) -> str:
        marks = []
        for box in match[0][1:-1].split(";"):
            numbers = [number.strip() for number in box.split(",")]
            step = 10.0 ** -max(2, *(len(number.partition(".")[2]) for number in numbers))  # 0.5 is written for 0.50
            marks.append(imported.mark(imported.box([float(n) for n in numbers], step, geometry, match[0]), turn))
        return ", ".join(marks)

    return _replace(turn["value"], _FLOATS_START, _FLOATS, word, "[0.12, 0.34, 0.56, 0.78]")


def llava(record: dict, size_of: SizeOf) -> dict:
    """LLaVA-1.5's records with boxes as decimals of the padded square; text without a picture is left alone."""
    if not _sound(record):
        return record
    imported = _open(record, size_of)
    return imported.done([turn | {"value": _float_boxes(imported, turn)} for turn in record["conversations"]])


def shikra(record: dict, size_of: SizeOf) -> dict:
    """Shikra's records: marks that `boxes_seq` and `points_seq` number, and boxes written out."""
    if not _sound(record):
        return record
    imported = _open(record, size_of)
    target = record.get("target") or {}
    turns = []
    for turn in record["conversations"]:
        text = turn["value"]
        for kind, key in (("boxes", "box"), ("points", "point")):
            sequence, mark = turn.get(f"{kind}_seq") or [], f"<{kind}>"
            if text.count(mark) != len(sequence):
                raise DataError(f"a turn has {text.count(mark)} {mark}, but {kind}_seq numbers {len(sequence)}; correct it")
            for numbers in sequence:
                known = target.get(kind) or []
                missing = [n for n in numbers if not isinstance(n, int) or not 0 <= n < len(known)]
                if missing:
                    raise DataError(f"{kind}_seq names number {missing[0]} of {len(known)} {kind} in target; correct it")
                words = [imported.mark({key: list(known[n])}, turn) for n in numbers]
                text = text.replace(mark, ", ".join(words), 1)
        rest = {name: value for name, value in turn.items() if not name.endswith("_seq")}
        turns.append(rest | {"value": _float_boxes(imported, rest | {"value": text})})
    return imported.done(turns)


_FERRET_START = re.compile(r"\[\s*\d+\s*,")
_FERRET = re.compile(rf"\[({_WHOLE}(?:,{_WHOLE}){{3}}|{_WHOLE},{_WHOLE})\]")
_FERRET_TOKEN = re.compile(r" ?<region_fea>")


def ferret(record: dict, size_of: SizeOf) -> dict:
    """Ferret's records: marks that `box_x1y1x2y2` numbers turn by turn, and thousandths written out.

    A mask beside a box of a question makes the region free-form.
    """
    if not _sound(record):
        return record
    imported = _open(record, size_of)
    boxes, masks = record.get("box_x1y1x2y2") or [], record.get("masks") or []
    turns = []
    for index, turn in enumerate(record["conversations"]):
        own = boxes[index] if index < len(boxes) else []

        def word(match: re.Match, turn=turn, own=own, index=index) -> str:
            number = int(match[1])
            if number >= len(own):
                raise DataError(f"conversations[{index}] has {match[0]}, but box_x1y1x2y2 has {len(own)} boxes for it; add it")
            mask = masks[index][number] if index < len(masks) and number < len(masks[index]) else None
            return imported.mark({"mask": mask} if mask and turn.get("from") == "human" else {"box": list(own[number])}, turn)

        text = re.sub(r"<bbox_location(\d+)>", word, turn["value"])
        text = _FERRET_TOKEN.sub("", _whole_boxes(imported, turn, text))
        turns.append(turn | {"value": text})
    sides = {ours: record[theirs] for ours, theirs in (("width", "image_w"), ("height", "image_h")) if theirs in record}
    return imported.done(turns, **sides)


def _middles(numbers: Iterable[str]) -> list[float]:
    """Thousandths as [0, 1]: the middles of their bins; 1000, which some write, is the edge."""
    return [(n + 0.5 * (n < 1000)) / 1000 for n in map(int, numbers)]


def _whole_boxes(imported: _Imported, turn: dict, text: str) -> str:
    """Ferret's boxes and points in thousandths of each side."""
    if imported.size is None:
        return text
    geometry = Geometry("squash", *imported.size, 1000)

    def word(match: re.Match) -> str:
        middles = _middles(match[1].split(","))
        if len(middles) == 4:
            return imported.mark(imported.box(middles, 0.001, geometry, match[0]), turn)
        if max(middles) > 1:
            raise DataError(f"point '{match[0]}' lies outside the picture; correct it")
        return imported.mark({"point": geometry.points_to_image(torch.tensor(middles, dtype=torch.float64)).tolist()}, turn)

    return _replace(text, _FERRET_START, _FERRET, word, "[012, 345, 678, 999] or [012, 345]")


_QWEN_START = re.compile(r"<box>|<quad>")
_QWEN = re.compile(rf"<box>\(({_WHOLE}),({_WHOLE})\),?\s*\(({_WHOLE}),({_WHOLE})\)</box>")
_QWEN_PICTURE = re.compile(r"<img>(.*?)</img>", re.DOTALL)
_QWEN_ROLES = {"user": "human", "assistant": "gpt"}


def qwen(record: dict, size_of: SizeOf) -> dict:
    """Qwen-VL's records: pictures named in the text, phrases in `<ref>`, boxes in `<box>` in thousandths."""
    if not _sound(record):
        return record
    names = [name.strip() for turn in record["conversations"] for name in _QWEN_PICTURE.findall(turn["value"])]
    imported = _Imported(record, size_of(names[0]) if len(names) == 1 else None)
    turns = []
    for turn in record["conversations"]:
        turn = turn | {"from": _QWEN_ROLES.get(turn.get("from"), turn.get("from"))}
        text = re.sub(r"Picture 1: (?=<img>)", "", turn["value"]) if len(names) == 1 else turn["value"]
        text = _QWEN_PICTURE.sub(IMAGE, text)

        def word(match: re.Match, turn=turn) -> str:
            if imported.size is None:
                raise DataError(f"'{match[0]}' stands in a record of {len(names)} pictures and does not say in which; split it")
            middles = _middles(match.groups())
            return imported.mark(imported.box(middles, 0.001, Geometry("squash", *imported.size, 1000), match[0]), turn)

        text = _replace(text, _QWEN_START, _QWEN, word, "<box>(12,345),(678,999)</box>")
        turns.append(turn | {"value": re.sub(r"</?ref>", "", text)})
    return imported.done(turns, **({"images": names} if names else {}))


_NUMBER = r"\s*(\d+(?:\.\d+)?)\s*"
_KEYED_START = re.compile(r"[\"'](?:bbox|point)_2d[\"']")
_KEYED = re.compile(rf"([\"'](bbox|point)_2d[\"']\s*:\s*)\[{_NUMBER},{_NUMBER}(?:,{_NUMBER},{_NUMBER})?\]")


def _keyed(record: dict, size_of: SizeOf, thousandths: bool) -> dict:
    """Boxes and points that a JSON key names in the text; the rest of the JSON stays as it is."""
    if not _sound(record):
        return record
    imported = _open(record, size_of)

    def word(match: re.Match, turn: dict) -> str:
        kind, numbers = match[2], [float(n) for n in match.groups()[2:] if n is not None]
        if len(numbers) != {"bbox": 4, "point": 2}[kind]:
            raise DataError(f"'{match[0]}' has {len(numbers)} numbers; a bbox_2d has 4, a point_2d 2")
        if imported.size is None:
            raise DataError(f"'{match[0]}' stands in a record that has not one picture; split it")
        if thousandths:
            if max(numbers) > 1000:
                raise DataError(f"'{match[0]}' has {max(numbers):g} thousandths; is it in pixels, for the importer qwen2_5?")
            numbers = [n * side / 1000 for n, side in zip(numbers, imported.size * 2, strict=False)]
        return match[1] + imported.mark({"box" if kind == "bbox" else "point": numbers}, turn)

    turns = []
    for turn in record["conversations"]:
        text = _replace(turn["value"], _KEYED_START, _KEYED, partial(word, turn=turn), '"bbox_2d": [12, 34, 567, 789]')
        turns.append(turn | {"value": text})
    return imported.done(turns)


IMPORTERS = {
    NATIVE: conversations,
    "llava": llava,
    "shikra": shikra,
    "ferret": ferret,
    "qwen": qwen,
    "qwen2_5": partial(_keyed, thousandths=False),
    "qwen3": partial(_keyed, thousandths=True),
}
