"""Boxes and points as words: the codecs between coordinates and the text that a language model reads and writes.

A coordinate c lies in [0, 1] of the model's square input; `encoder.geometry.Geometry` goes from there to pixels.

| codec | a box | a coordinate is | furthest it moves |
|---|---|---|---|
| `int1000` | [012, 345, 678, 999] | floor(1000 c), read as the middle of its bin (Ferret, arXiv 2310.07704) | 0.0005 |
| `float2` | [0.01, 0.35, 0.68, 1.00] | c to two decimals (LLaVA-1.5's RefCOCO and Visual Genome) | 0.005 |
| `float3` | [0.012, 0.345, 0.679, 1.000] | c to three decimals (Shikra, arXiv 2306.15195) | 0.0005 |
| `loc_tokens` | <loc_12><loc_345><loc_678><loc_999> | as `int1000`, one token each (Kosmos-2, arXiv 2306.14824) | 0.0005 |

Each has a fixed form, so that nothing has to be guessed from what a model wrote. A point is its two coordinates, likewise.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from encoder.errors import DataError


@dataclass(frozen=True)
class _Form:
    """How a coordinate is written.

    steps: in the unit length; binned: floor to a bin and read its middle, else round to a step
    number: format of a step's number n, or of n / steps; read: regular expression of what it writes
    marks: before the first coordinate, between two, after the last; example: a box
    """

    steps: int
    binned: bool
    number: str
    read: str
    marks: tuple[str, str, str]
    example: str


_LIST = ("[", ", ", "]")
_FORMS = {
    "int1000": _Form(1000, True, "{:03d}", r"\d{3}", _LIST, "[000, 000, 999, 999]"),
    "float2": _Form(100, False, "{:.2f}", r"(?:0\.\d{2}|1\.00)", _LIST, "[0.00, 0.00, 1.00, 1.00]"),
    "float3": _Form(1000, False, "{:.3f}", r"(?:0\.\d{3}|1\.000)", _LIST, "[0.000, 0.000, 1.000, 1.000]"),
    "loc_tokens": _Form(1000, True, "{:d}", r"(?:0|[1-9]\d{0,2})", ("<loc_", "><loc_", ">"), "<loc_0><loc_0><loc_999><loc_999>"),
}
CODECS = tuple(_FORMS)
DEFAULT_CODEC = "int1000"


@dataclass(frozen=True)
class BoxCodec:
    """Box <-> text, point -> text.

    name: one of `CODECS`
    """

    name: str = DEFAULT_CODEC

    def __post_init__(self):
        if self.name not in _FORMS:
            raise DataError(f"box codec '{self.name}' is not known; choose one of {', '.join(CODECS)}")

    @property
    def quantisation_error(self) -> float:
        """The most by which a coordinate in [0, 1] moves through encode and decode: half a step, see above."""
        return 0.5 / self._form.steps

    @property
    def tokens(self) -> list[str]:
        """What the vocabulary of a language model must hold for this codec; empty where the text is ordinary."""
        return [f"<loc_{n}>" for n in range(self._form.steps)] if self.name == "loc_tokens" else []

    def encode(self, box: Tensor) -> str:
        """(4,) xyxy in [0, 1] of the model's square -> its text; a coordinate outside is moved to the edge.

        A box thinner than one step is widened by one, so that what is written can always be read back.
        """
        x1, y1, x2, y2 = self._steps_of(box)
        (x1, x2), (y1, y2) = self._at_least_one_step(x1, x2), self._at_least_one_step(y1, y2)
        return self._write((x1, y1, x2, y2))

    def encode_point(self, point: Tensor) -> str:
        """(2,) x, y in [0, 1] of the model's square -> its text, "[x, y]" (Ferret's form) or two tokens."""
        return self._write(self._steps_of(point))

    def decode(self, text: str) -> tuple[Tensor | None, str | None]:
        """The first well-formed box of `text` -> ((4,) xyxy in [0, 1], None), or (None, why there is none).

        Nothing but the exact form is read.
        """
        match = self._pattern(4).search(text)
        if match is None:
            return None, f"no box of the form {self._form.example}"
        x1, y1, x2, y2 = box = [self._read(number) for number in match.groups()]
        if x1 >= x2:
            return None, f"left edge {match[1]} is not left of right edge {match[3]}"
        if y1 >= y2:
            return None, f"top edge {match[2]} is not above bottom edge {match[4]}"
        return torch.tensor(box, dtype=torch.float32), None

    def decode_all(self, text: str) -> list[Tensor]:
        """All well-formed boxes of `text`, in order, each (4,) as of `decode`; one that `decode` would refuse is left out."""
        found = (self.decode(text[start:end])[0] for start, end in self.spans(text))
        return [box for box in found if box is not None]

    def decode_points(self, text: str) -> list[Tensor]:
        """All well-formed points of `text`, in order, each (2,) x, y in [0, 1] of the model's square."""
        found = self._pattern(2).finditer(self._pattern(4).sub(" ", text))  # half a box is no point
        return [torch.tensor([self._read(number) for number in match.groups()]) for match in found]

    def replace(self, text: str, write: Callable[[Tensor], str]) -> str:
        """`text` with `write(box)` for each box that `decode_all` gives; all else stays."""

        def written(match: re.Match) -> str:
            box, _ = self.decode(match[0])
            return match[0] if box is None else write(box)

        return self._pattern(4).sub(written, text)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Start and end, in characters, of all that has the form of a box."""
        return [match.span() for match in self._pattern(4).finditer(text)]

    @property
    def _form(self) -> _Form:
        return _FORMS[self.name]

    @property
    def _last(self) -> int:
        """The highest number of a step that is written."""
        return self._form.steps - self._form.binned

    def _steps_of(self, coordinates: Tensor) -> list[int]:
        form = self._form
        scaled = (c * form.steps for c in torch.as_tensor(coordinates).double().tolist())
        return [min(max(int(s) if form.binned else round(s), 0), self._last) for s in scaled]

    def _at_least_one_step(self, low: int, high: int) -> tuple[int, int]:
        if high > low:
            return low, high
        return (low, low + 1) if low < self._last else (self._last - 1, self._last)

    def _write(self, steps: Iterable[int]) -> str:
        form = self._form
        first, between, last = form.marks
        numbers = (form.number.format(n if form.binned else n / form.steps) for n in steps)
        return first + between.join(numbers) + last

    def _pattern(self, count: int) -> re.Pattern:
        first, between, last = map(re.escape, self._form.marks)
        return re.compile(first + between.join([f"({self._form.read})"] * count) + last, re.ASCII)

    def _read(self, number: str) -> float:
        return (int(number) + 0.5) / self._form.steps if self._form.binned else float(number)
