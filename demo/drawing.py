"""Colours of numbered marks, the same in the page, in its text and in pictures; and marks drawn into a picture."""

from collections.abc import Iterable

from PIL import Image, ImageDraw, ImageFont

from demo.board import Mark

# Dark enough for white text (contrast 4.5 and more, WCAG AA), told apart by hue and by lightness.
COLOURS = ("#c1121f", "#0b5cad", "#1b7f3b", "#8a2be2", "#b3450a", "#0f7173", "#c2188b", "#5a4a00")
SHOWN_SIDE = 640  # pixels; a smaller picture is drawn enlarged, so that lines and numbers stay fine


def colour(number: int) -> str:
    """The colour "#rrggbb" of mark `number`, counted from 1; they repeat after the last."""
    return COLOURS[(number - 1) % len(COLOURS)]


def shown_scale(size: tuple[int, int]) -> float:
    """How many times larger a picture of (width, height) pixels is drawn: its long side has at least `SHOWN_SIDE`."""
    return max(1.0, SHOWN_SIDE / max(size))


def draw_marks(image: Image.Image, marks: Iterable[Mark]) -> Image.Image:
    """A copy of the picture, `shown_scale` times as large, with every mark outlined and numbered.

    image: RGB, not changed; marks: what lies outside the picture is moved to its edge
    """
    scale, marks = shown_scale(image.size), list(marks)
    width, height = round(image.width * scale), round(image.height * scale)
    shown = image.convert("RGB")
    shown = shown.resize((width, height), Image.Resampling.BICUBIC) if scale > 1 else shown.copy()
    draw = ImageDraw.Draw(shown)
    line = max(3, round(max(width, height) / 200))
    font = ImageFont.load_default(size=max(14, max(width, height) // 22))
    numbers = []
    for mark in marks:
        x1, y1, x2, y2 = _inside(mark.box, scale, width, height)
        points = [(x * scale, y * scale) for x, y in mark.points]
        # A white line around the coloured one keeps it visible on a ground of its own colour.
        for fill, more in (("white", 1), (colour(mark.number), 0)):
            if mark.kind == "point":
                ((x, y),) = points
                reach = 2 * line + 2 * more
                draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=fill)
            elif mark.kind == "scribble":
                draw.line(points, fill=fill, width=line + 2 * more, joint="curve")
            else:
                draw.rectangle((x1 - more, y1 - more, x2 + more, y2 + more), outline=fill, width=line + 2 * more)
        numbers.append((mark.number, x1, y1))
    for number, x1, y1 in numbers:  # last, so that no outline crosses a number
        _draw_number(draw, number, x1, y1, width, font)
    return shown


def _inside(box: tuple[float, float, float, float], scale: float, width: int, height: int) -> tuple[int, int, int, int]:
    """The outermost pixels of the box on the drawn picture, ordered and inside it."""
    x1, y1, x2, y2 = (round(value * scale) for value in box)
    x1, y1 = min(max(x1, 0), width - 1), min(max(y1, 0), height - 1)
    return x1, y1, min(max(x2 - 1, x1), width - 1), min(max(y2 - 1, y1), height - 1)


def _draw_number(draw: ImageDraw.ImageDraw, number: int, x1: int, y1: int, width: int, font) -> None:
    """A filled label above the mark's top left corner, or inside it where there is no room above."""
    left, top, right, bottom = font.getbbox(str(number))
    pad = max(3, (bottom - top) // 4)
    label_width, label_height = right - left + 2 * pad, bottom - top + 2 * pad
    x = min(x1, width - label_width)
    y = y1 - label_height if y1 >= label_height else y1
    draw.rectangle((x, y, x + label_width - 1, y + label_height - 1), fill=colour(number))
    draw.text((x + pad - left, y + pad - top), str(number), fill="white", font=font)
