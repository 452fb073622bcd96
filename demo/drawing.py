"""The picture of the chat: from an upload or an example, marked with numbered boxes, drawn with them in their colours."""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from encoder.data.pictures import load_library
from encoder.data.prompts import GROUNDING_QUESTION
from encoder.data.scenes import PictureLibrary, SceneConfig, draw_scene
from encoder.errors import DataError
from mllm.conversation import IMAGE, PLACEHOLDER

Box = tuple[float, float, float, float]
Point = tuple[float, float]

# Dark enough for white text (contrast 4.5 and more, WCAG AA), told apart by hue and by lightness.
COLOURS = ("#c1121f", "#0b5cad", "#1b7f3b", "#8a2be2", "#b3450a", "#0f7173", "#c2188b", "#5a4a00")
SHOWN_SIDE = 640  # pixels; a smaller picture is shown enlarged, so that lines and numbers stay fine

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # named, since Pillow would hand some others to outside programs
MAX_PIXELS = 50_000_000  # of an uploaded picture
KEPT_SIDE = 1536  # pixels; a longer picture is reduced to this, more than any tower sees
MAX_CLICKED = 30  # boxes
MAX_QUESTION = 400  # characters
NUM_EXAMPLES = 4
NAMED = re.compile(r"\[(\d{1,4})\]")  # a box's number in a question
NO_PICTURE = "There is no picture; put one in, or take one of the examples."


def open_picture(path: str | Path) -> Image.Image:
    """An uploaded file -> RGB as a viewer shows it (turned upright, transparency on white), at most `KEPT_SIDE` px a side.

    DataError, without the file's path, for what is no picture or has more than `MAX_PIXELS`.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height <= MAX_PIXELS:
                image.draft("RGB", (KEPT_SIDE, KEPT_SIDE))
                return _upright_rgb(image)
            size = f"{image.width} x {image.height}"
    except Image.DecompressionBombError:
        size = "far too many"
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError("This file cannot be read as a picture; give a PNG, JPEG, WebP, GIF, BMP or TIFF file.") from error
    raise DataError(f"The picture has {size} pixels; give one of at most {MAX_PIXELS // 1_000_000} megapixels.")


def _upright_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB")
    image.thumbnail((KEPT_SIDE, KEPT_SIDE), Image.Resampling.LANCZOS)
    return image


def draw_examples() -> list[tuple[Image.Image, str]]:
    """Scenes that no training has seen, of the pictures that the shipped model knows, and a question about each."""
    library = PictureLibrary(load_library("base", seed=0)[0])
    scenes = [draw_scene(SceneConfig(), library, seed=0, index=index, split="demo") for index in range(NUM_EXAMPLES)]
    return [(scene.image, GROUNDING_QUESTION.format(scene.expressions[0][1])) for scene in scenes]


@dataclass
class Board:
    """A picture and the numbered boxes on it. `click` and `undo` return the sentence that tells the visitor what happened.

    picture: RGB, or None before there is one; boxes: number (from 1) -> xyxy in pixels of `picture`, all that can be named
    clicked: numbers of those that the visitor drew; shown: numbers of those on the picture now
    corner: first corner of a box that is being drawn, x, y in pixels of `picture`; count: numbers given, none twice
    """

    picture: Image.Image | None = None
    boxes: dict[int, Box] = field(default_factory=dict)
    clicked: list[int] = field(default_factory=list)
    shown: list[int] = field(default_factory=list)
    corner: Point | None = None
    count: int = 0

    def add(self, box: Box) -> int:
        """Puts a box on the picture under the next number, which it returns."""
        self.count += 1
        self.boxes[self.count] = box
        self.shown.append(self.count)
        return self.count

    def click(self, x: float, y: float) -> str:
        """A click at x, y in pixels of the drawn picture: a box's first corner, or its second, which completes the box."""
        if self.picture is None:
            return NO_PICTURE
        if len(self.clicked) >= MAX_CLICKED:
            return f"{MAX_CLICKED} boxes are drawn, which is all there may be; undo one first."
        scale, (width, height) = shown_scale(self.picture.size), self.picture.size
        x, y = min(max(x / scale, 0.0), float(width)), min(max(y / scale, 0.0), float(height))
        if self.corner is None:
            self.corner = (x, y)
            return "Now click the opposite corner."
        (x1, x2), (y1, y2) = sorted((self.corner[0], x)), sorted((self.corner[1], y))
        self.corner = None
        if x2 - x1 < 1 or y2 - y1 < 1:
            return "These two clicks enclose nothing; click two corners that lie apart."
        self.clicked.append(self.add((x1, y1, x2, y2)))
        return f"This is box [{self.count}]; name it in a question by its number."

    def undo(self) -> str:
        """Takes back the first corner, or else the box that the visitor drew last."""
        if self.corner is not None:
            self.corner = None
            return "The first corner is gone."
        if not self.clicked:
            return "There is no box of yours to take back; click two corners on the picture to draw one."
        number = self.clicked.pop()
        del self.boxes[number]
        self.shown = [other for other in self.shown if other != number]
        return f"Box [{number}] is gone."

    def read(self, question: str, reserved: Sequence[str] = ()) -> tuple[str, list[int]]:
        """A question that names boxes as "[1]" -> the same with `<region:i>` in their place, and the numbers named.

        DataError for an empty or long question, one with a mark of the model's own (of `reserved`, or a placeholder), and
        for a number that no box has.
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
            if number not in self.boxes:
                raise DataError(f"There is no box [{number}]; click two corners on the picture to draw one.")
        return NAMED.sub(lambda match: f"<region:{numbers.index(int(match[1]))}>", question), numbers

    def drawn(self) -> Image.Image | None:
        if self.picture is None:
            return None
        return draw_boxes(self.picture, {number: self.boxes[number] for number in self.shown}, self.corner)


def colour(number: int) -> str:
    """The colour "#rrggbb" of box `number`, counted from 1; they repeat after the last."""
    return COLOURS[(number - 1) % len(COLOURS)]


def coloured(number: int, words: str = "") -> str:
    """HTML: the box's number, and words (HTML) about it, in the box's colour."""
    return f'<span class="box" style="background-color: {colour(number)}">{f"[{number}] {words}".strip()}</span>'


def shown_scale(size: tuple[int, int]) -> float:
    """How many times larger a picture of (width, height) pixels is shown: its long side has at least `SHOWN_SIDE`."""
    return max(1.0, SHOWN_SIDE / max(size))


def coloured_names(text: str) -> str:
    """A question as HTML: every "[1]" in its box's colour."""
    return NAMED.sub(lambda match: coloured(int(match[1])), html.escape(text))


def draw_boxes(image: Image.Image, boxes: Mapping[int, Box], corner: Point | None = None) -> Image.Image:
    """A copy of the picture, `shown_scale` times as large, with every box outlined and numbered.

    image: RGB, not changed
    boxes: number (from 1) -> xyxy in pixels of `image`; what lies outside the picture is moved to its edge
    corner: x, y in pixels of `image` of a box's first corner, marked by a cross
    """
    scale = shown_scale(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    shown = image.convert("RGB")
    shown = shown.resize((width, height), Image.Resampling.BICUBIC) if scale > 1 else shown.copy()
    draw = ImageDraw.Draw(shown)
    line = max(3, round(max(width, height) / 200))
    font = ImageFont.load_default(size=max(14, max(width, height) // 22))
    numbers = []
    for number, box in boxes.items():
        x1, y1, x2, y2 = _inside(box, scale, width, height)
        # A white line around the coloured one keeps it visible on a ground of its own colour.
        draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline="white", width=line + 2)
        draw.rectangle((x1, y1, x2, y2), outline=colour(number), width=line)
        numbers.append((number, x1, y1))
    for number, x1, y1 in numbers:  # last, so that no outline crosses a number
        _draw_number(draw, number, x1, y1, width, font)
    if corner is not None:
        x, y = corner[0] * scale, corner[1] * scale
        for arm_width, fill in ((line + 4, "white"), (line, "black")):
            arm = 3 * line + arm_width // 2
            draw.line((x - arm, y, x + arm, y), fill=fill, width=arm_width)
            draw.line((x, y - arm, x, y + arm), fill=fill, width=arm_width)
    return shown


def _inside(box: Box, scale: float, width: int, height: int) -> tuple[int, int, int, int]:
    """The outermost pixels of the box on the shown picture, ordered and inside it."""
    x1, y1, x2, y2 = (round(value * scale) for value in box)
    x1, y1 = min(max(x1, 0), width - 1), min(max(y1, 0), height - 1)
    return x1, y1, min(max(x2 - 1, x1), width - 1), min(max(y2 - 1, y1), height - 1)


def _draw_number(draw: ImageDraw.ImageDraw, number: int, x1: int, y1: int, width: int, font) -> None:
    """A filled label above the box's top left corner, or inside it where there is no room above."""
    left, top, right, bottom = font.getbbox(str(number))
    pad = max(3, (bottom - top) // 4)
    label_width, label_height = right - left + 2 * pad, bottom - top + 2 * pad
    x = min(x1, width - label_width)
    y = y1 - label_height if y1 >= label_height else y1
    draw.rectangle((x, y, x + label_width - 1, y + label_height - 1), fill=colour(number))
    draw.text((x + pad - left, y + pad - top), str(number), fill="white", font=font)
