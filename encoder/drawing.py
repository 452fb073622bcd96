"""Boxes on pictures, for the pages that show them."""

import io
from collections.abc import Sequence

from PIL import Image, ImageColor, ImageDraw


def shown(picture: Image.Image, long_side: int) -> tuple[Image.Image, float]:
    """The picture with its longer side at `long_side` pixels, and by what its coordinates are to be multiplied."""
    scale = long_side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS), scale


def as_jpeg(picture: Image.Image) -> bytes:
    """An RGB picture as a JPEG file's bytes, quality 85."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def draw_box(draw: ImageDraw.ImageDraw, box: Sequence[float], colour: str, dash: int | None = None) -> None:
    """A frame around the box with a white rim, so that it shows on any background, moved inside the picture.

    box: xyxy, pixels of the picture that is drawn on
    dash: length in pixels of dashes and gaps, None for a solid line; dashes let another frame below show through
    """
    limit = [side - 4 for side in draw.im.size]
    x1, y1 = max(3, min(box[0], limit[0] - 4)), max(3, min(box[1], limit[1] - 4))
    x2, y2 = max(x1 + 4, min(box[2], limit[0])), max(y1 + 4, min(box[3], limit[1]))
    for fill, width in ((ImageColor.getrgb("white"), 7), (ImageColor.getrgb(colour), 4)):
        for start, end in (((x1, y1), (x2, y1)), ((x1, y2), (x2, y2)), ((x1, y1), (x1, y2)), ((x2, y1), (x2, y2))):
            for a, b in _dashes(start, end, dash):
                draw.line((*a, *b), fill=fill, width=width)


def _dashes(start: tuple[float, float], end: tuple[float, float], dash: int | None):
    """Yields the (start, end) of each dash of a horizontal or vertical line; the line itself without `dash`."""
    length = end[0] - start[0] + end[1] - start[1]
    if dash is None or length <= dash:
        yield start, end
        return
    pieces = max(1, round(length / dash)) | 1  # an odd number of dashes and gaps begins and ends with a dash
    dx, dy = (end[0] - start[0]) / pieces, (end[1] - start[1]) / pieces
    for index in range(0, pieces, 2):
        a, b = index, index + 1
        yield (start[0] + a * dx, start[1] + a * dy), (start[0] + b * dx, start[1] + b * dy)
