"""Samples drawn as the model sees them: each picture after the model's transform, its regions on it, its text below."""

from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont

from encoder.geometry import Geometry
from encoder.masks import decode_mask
from mllm.regions import Region

CELL = 300  # px of a drawn square
LINE = 14  # px of a line of text
MARGIN = 8
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#000075")


@dataclass
class Sample:
    """One cell: the original image (RGB), its regions with a short label each, and lines to write below."""

    image: Image.Image
    regions: list[Region]
    labels: list[str]
    lines: list[str]


def draw_sheet(samples: list[Sample], mode: str, size: int) -> Image.Image:
    """The samples side by side: each the model's square, enlarged to `CELL` px, with its regions, and its lines below."""
    font = ImageFont.load_default(11)
    columns = min(4, len(samples))
    wrapped = [[part for line in sample.lines for part in _wrap(line, font)] for sample in samples]
    rows = [range(start, min(start + columns, len(samples))) for start in range(0, len(samples), columns)]
    heights = [CELL + LINE * max(len(wrapped[index]) for index in row) + 2 * MARGIN for row in rows]
    sheet = Image.new("RGB", (columns * (CELL + MARGIN) + MARGIN, sum(heights) + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, index in enumerate(row):
            left = MARGIN + column * (CELL + MARGIN)
            sheet.paste(_draw_sample(samples[index], mode, size, font), (left, top))
            for number, line in enumerate(wrapped[index]):
                draw.text((left, top + CELL + 2 + number * LINE), line, fill="black", font=font)
        top += height
    return sheet


def _draw_sample(sample: Sample, mode: str, size: int, font) -> Image.Image:
    geometry = Geometry(mode, *sample.image.size, size)
    square = geometry.apply(sample.image).resize((CELL, CELL), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(square)
    places = []
    for number, (region, label) in enumerate(zip(sample.regions, sample.labels, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        box = (geometry.boxes_to_model(torch.tensor(region.box, dtype=torch.float64)) * CELL).tolist()
        if region.mask is not None:
            square.paste(colour, mask=_mask_on_square(region.mask, geometry))
        if region.point is None:
            draw.rectangle(box, outline=colour, width=2)
        else:
            x, y = (geometry.points_to_model(torch.tensor(region.point, dtype=torch.float64)) * CELL).tolist()
            draw.ellipse((x - 5, y - 5, x + 5, y + 5), fill=colour, outline="white")
        # The label sits in the box's upper left corner, moved down where another label is.
        x, y = max(0, min(box[0], CELL - draw.textlength(label, font=font) - 4)), min(max(0, box[1]), CELL - LINE)
        while any(abs(y - other_y) < LINE and abs(x - other_x) < 60 for other_x, other_y in places) and y < CELL - LINE:
            y += LINE
        places.append((x, y))
        draw.rectangle((x, y, x + draw.textlength(label, font=font) + 4, y + LINE), fill=colour)
        draw.text((x + 2, y), label, fill="white", font=font)
    return square


def _mask_on_square(rle: dict, geometry: Geometry) -> Image.Image:
    """Half opaque where the mask is, on the drawn square."""
    mask = Image.fromarray(decode_mask(rle)).convert("L").point(lambda value: 128 if value else 0)
    square = Image.new("L", (geometry.size, geometry.size))
    square.paste(mask.resize(geometry.resized, Image.Resampling.NEAREST), geometry.offset)
    return square.resize((CELL, CELL), Image.Resampling.NEAREST)


def _wrap(line: str, font) -> list[str]:
    """The line in parts that fit a cell."""
    parts = [""]
    for word in line.split():
        joined = f"{parts[-1]} {word}".strip()
        if font.getlength(joined) <= CELL or not parts[-1]:
            parts[-1] = joined
        else:
            parts.append(word)
    return parts
