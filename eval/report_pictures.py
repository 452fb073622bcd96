"""Pictures of the report: one question, the true box and the two answers drawn on it, as JPEG bytes."""

import io
from pathlib import Path

from PIL import Image, ImageColor, ImageDraw

from encoder.errors import DataError
from eval.comparison import Example
from eval.predictions import Evaluation
from eval.report_plots import RUN_COLOURS, TRUTH_COLOUR
from mllm.image_input import read_picture

LONG_SIDE = 400  # pixels of a picture in the report: sharp on a phone


def image_folder(evaluation: Evaluation, override: Path | None) -> Path:
    """Where the pictures of an evaluation are: `override`, else the folder it was run with."""
    recorded = evaluation.run["launches"][-1].get("images")
    if override is None and recorded is None:
        raise DataError(f"{evaluation.folder}/run.json does not say where the pictures are; pass --images, or --examples 0")
    return override or Path(recorded)


def draw_example(example: Example, folder: Path, colours: tuple[str, str] = RUN_COLOURS[:2]) -> bytes:
    """The picture with the true box in dashed green and, where boxes were asked for, both answers in `colours`."""
    target = example.evaluation.targets[example.index]
    path = folder / target.image
    if not path.exists():
        raise DataError(f"{path} is not there; pass the folder of the pictures as --images, or --examples 0")
    picture = read_picture(path)
    scale = LONG_SIDE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(picture)
    if example.evaluation.protocol["task"] in ("grounding", "phrases"):
        for answer, colour in zip(example.answers, colours, strict=True):
            if answer.box:
                _draw_box(draw, [scale * value for value in answer.box], colour, dash=None)
    _draw_box(draw, [scale * value for value in target.box], TRUTH_COLOUR, dash=12)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _draw_box(draw: ImageDraw.ImageDraw, box: list[float], colour: str, dash: int | None) -> None:
    """A frame around the box with a white rim, so that it shows on any background, moved inside the picture.

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
