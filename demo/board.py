"""The board of the chat: one picture, and numbered marks on it, drawn by the visitor or answered by a model."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import isfinite

import numpy as np
from PIL import Image, ImageDraw

from encoder.errors import DataError
from mllm.conversation import IMAGE, PLACEHOLDER
from mllm.regions import POINT_REACH as REGION_REACH
from mllm.regions import Region

Box = tuple[float, float, float, float]
Point = tuple[float, float]

MAX_DRAWN = 30  # marks of the visitor's own
MAX_POINTS = 1000  # of a scribble
MAX_QUESTION = 400  # characters
POINT_REACH = 0.15  # of the picture's long side; see `Board`
BRUSH = 0.02  # half the width of a scribble's line, of the picture's long side
ENCODER = "encoder"  # who answered a box that no MLLM said
NAMED = re.compile(r"\[(\d{1,4})\]", re.ASCII)  # a mark's number in a question
NO_PICTURE = "There is no picture; put one in, or take one of the examples."
NUM_POINTS = {"box": (2, 2), "point": (1, 1), "scribble": (2, MAX_POINTS)}


@dataclass(frozen=True)
class Mark:
    """A numbered place. Lengths in pixels of the picture.

    kind: `box`, `point` or `scribble` of the visitor, `answer` of a model
    box: xyxy; of a point and a scribble the box that stands for it; points: (x, y), the point, or the scribble's path
    phrase: what the box is said to be; by: name of the model that said so
    """

    number: int
    kind: str
    box: Box
    points: tuple[Point, ...] = ()
    phrase: str = ""
    by: str = ""


@dataclass
class Board:
    """A picture and the numbered marks on it.

    picture: RGB, or None before there is one; marks: by number (from 1), all that can be named
    shown: numbers of those on the picture now; count: numbers given, none twice
    scale: how many pixels of the visitor's own file are one of `picture`, which may be reduced
    point_reach: a point stands for the square that reaches this share of the picture's long side to each of its sides; 0
        gives a model the point's own coordinates, which it must have been trained on
    """

    picture: Image.Image | None = None
    marks: dict[int, Mark] = field(default_factory=dict)
    shown: list[int] = field(default_factory=list)
    count: int = 0
    scale: float = 1.0
    point_reach: float = POINT_REACH

    @property
    def drawn(self) -> list[int]:
        """Numbers of the visitor's own marks."""
        return [number for number, mark in self.marks.items() if mark.kind != "answer"]

    def to_file(self, values: Sequence[float]) -> list[float]:
        """Pixels of `picture` -> pixels of the visitor's own file, to two decimals."""
        return [round(value * self.scale, 2) for value in values]

    def draw(self, kind: str, points: Sequence[Sequence[float]]) -> int:
        """Puts a visitor's mark on the picture under the next number, which it returns.

        points: (x, y) in pixels of the picture, outside it too: two opposite corners of a box, a point, a scribble's path
        DataError for a mark that is none.
        """
        if self.picture is None:
            raise DataError(NO_PICTURE)
        if len(self.drawn) >= MAX_DRAWN:
            raise DataError(f"{MAX_DRAWN} marks are drawn, which is all there may be; undo one first.")
        path, (width, height) = _points(kind, points), self.picture.size
        path = tuple((min(max(x, 0.0), float(width)), min(max(y, 0.0), float(height))) for x, y in path)
        reach = {"box": 0.0, "point": self.point_reach or REGION_REACH, "scribble": BRUSH}[kind] * max(width, height)
        (x1, x2), (y1, y2) = ((min(values) - reach, max(values) + reach) for values in zip(*path, strict=True))
        box = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
        if kind != "point" and (box[2] - box[0] < 1 or box[3] - box[1] < 1):
            raise DataError(f"This {kind} has no area in the picture; draw a larger one, or click a point.")
        return self._put(Mark(self.count + 1, kind, box, () if kind == "box" else path))

    def answer(self, box: Box, phrase: str, by: str) -> int:
        """Puts a model's box on the picture under the next number, which it returns."""
        return self._put(Mark(self.count + 1, "answer", box, phrase=phrase, by=by))

    def _put(self, mark: Mark) -> int:
        self.count = mark.number
        self.marks[mark.number] = mark
        self.shown.append(mark.number)
        return mark.number

    def take_back(self, numbers: Iterable[int]) -> None:
        """Takes marks off the picture for good; their numbers are not given again."""
        gone = set(numbers)
        self.marks = {number: mark for number, mark in self.marks.items() if number not in gone}
        self.shown = [number for number in self.shown if number not in gone]

    def show(self, numbers: Iterable[int]) -> None:
        """Only the visitor's own marks and these are on the picture."""
        self.shown = sorted({*self.drawn, *numbers} & self.marks.keys())

    def read(self, question: str, reserved: Sequence[str] = ()) -> tuple[str, list[int]]:
        """A question that names marks as "[1]" -> the same with `<region:i>` in their place, and the numbers named.

        DataError for an empty or long question, one with a mark of the model's own (of `reserved`, or a placeholder), and
        for a number that no mark has.
        """
        if self.picture is None or not question:
            raise DataError(NO_PICTURE if self.picture is None else "The question is empty; write one.")
        if len(question) > MAX_QUESTION:
            raise DataError(f"The question has {len(question)} characters; ask in at most {MAX_QUESTION}.")
        placeholders = [match[0] for match in PLACEHOLDER.finditer(question)]
        for mark in [IMAGE, "<region>", *placeholders, *reserved]:
            if mark in question:
                raise DataError(f"The question holds {mark}, which is a mark of the model's own; leave it out.")
        numbers = list(dict.fromkeys(int(match[1]) for match in NAMED.finditer(question)))
        for number in numbers:
            if number not in self.marks:
                raise DataError(f"There is no mark [{number}]; draw one on the picture.")
        return NAMED.sub(lambda match: f"<region:{numbers.index(int(match[1]))}>", question), numbers

    def region(self, number: int, outlined: bool = False) -> Region:
        """A mark as a model takes it; `outlined`: a scribble with the mask of its line, for one that pools under masks."""
        mark = self.marks[number]
        if mark.kind == "point" and not self.point_reach:
            return Region(mark.box, point=mark.points[0])
        mask = _line_mask(mark.points, self.picture.size) if outlined and mark.kind == "scribble" else None
        return Region(mark.box, mask=mask)


def _points(kind: str, points: Sequence[Sequence[float]]) -> tuple[Point, ...]:
    """What a page sent for a mark, checked."""
    if kind not in NUM_POINTS:
        raise DataError(f"A mark is a box, a point or a scribble, this is '{str(kind)[:40]}'.")
    low, high = NUM_POINTS[kind]
    try:
        path = tuple((float(x), float(y)) for x, y in points)
    except (TypeError, ValueError) as error:
        raise DataError(f"The points of a {kind} are pairs of numbers, x and y in pixels; these are not.") from error
    if not low <= len(path) <= high or not all(isfinite(x) and isfinite(y) for x, y in path):
        count = low if low == high else f"{low} to {high}"
        raise DataError(f"A {kind} has {count} points with finite coordinates; this one has {len(path)}.")
    return path


def _line_mask(points: Sequence[Point], size: tuple[int, int]) -> dict:
    """A scribble's line as a compressed run-length encoding (COCO) of the picture's (width, height) pixels."""
    from encoder.masks import run_lengths

    canvas, brush = Image.new("L", size), max(1, round(2 * BRUSH * max(size)))
    draw = ImageDraw.Draw(canvas)
    draw.line(points, fill=1, width=brush, joint="curve")
    for x, y in (points[0], points[-1]):
        draw.ellipse((x - brush / 2, y - brush / 2, x + brush / 2, y + brush / 2), fill=1)
    columns = np.asarray(canvas).T.reshape(-1)  # run lengths go down the columns
    edges = np.flatnonzero(np.diff(np.concatenate([[0], columns, [0]]))).tolist()
    counts = np.diff([0, *edges, len(columns)]).tolist()
    return run_lengths({"size": [size[1], size[0]], "counts": counts}, *size)
