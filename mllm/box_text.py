"""Boxes as words: the codec between a box and the text that a language model reads and writes.

`int1000` (Ferret, arXiv 2310.07704): four three-digit integers, "[012, 345, 678, 999]", each floor(1000 c) of a corner
coordinate c in [0, 1] of the model's square input. `encoder.geometry.Geometry` goes from there to pixels.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from encoder.errors import DataError

CODECS = ("int1000",)
BINS = 1000
_BOX = re.compile(r"\[(\d{3}), (\d{3}), (\d{3}), (\d{3})\]", re.ASCII)


@dataclass(frozen=True)
class BoxCodec:
    """Box <-> text.

    name: which form; `int1000` is the one there is
    """

    name: str = "int1000"

    def __post_init__(self):
        if self.name not in CODECS:
            raise DataError(f"box codec '{self.name}' is not known; choose one of {', '.join(CODECS)}")

    @property
    def quantisation_error(self) -> float:
        """The most by which a coordinate in [0, 1] may move through encode and decode: half a bin, 0.0005."""
        return 0.5 / BINS

    def encode(self, box: Tensor) -> str:
        """(4,) xyxy in [0, 1] of the model's square -> "[x1, y1, x2, y2]"; a coordinate outside is moved to the edge.

        A box thinner than one bin is widened by one, so that what is written can always be read back.
        """
        x1, y1, x2, y2 = (min(max(int(c * BINS), 0), BINS - 1) for c in torch.as_tensor(box).double().tolist())
        (x1, x2), (y1, y2) = _at_least_one_bin(x1, x2), _at_least_one_bin(y1, y2)
        return f"[{x1:03d}, {y1:03d}, {x2:03d}, {y2:03d}]"

    def decode(self, text: str) -> tuple[Tensor | None, str | None]:
        """The first well-formed box of `text` -> ((4,) xyxy in [0, 1], None), or (None, why there is none).

        A coordinate is the centre of its bin, (n + 0.5) / 1000. Nothing but the exact form is read.
        """
        match = _BOX.search(text)
        if match is None:
            return None, "no box of the form [000, 000, 999, 999]"
        x1, y1, x2, y2 = map(int, match.groups())
        if x1 >= x2:
            return None, f"left edge {x1} is not left of right edge {x2}"
        if y1 >= y2:
            return None, f"top edge {y1} is not above bottom edge {y2}"
        return (torch.tensor([x1, y1, x2, y2], dtype=torch.float32) + 0.5) / BINS, None


def _at_least_one_bin(low: int, high: int) -> tuple[int, int]:
    if high > low:
        return low, high
    return (low, low + 1) if low < BINS - 1 else (BINS - 2, BINS - 1)
