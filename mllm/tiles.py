"""LLaVA-NeXT's anyres: a picture as one square of the whole and, beside it, as tiles of itself at a higher resolution.

Of some grids of tiles the one is taken that shows the most of the picture's own pixels; the picture is resized into it with
its aspect ratio kept, black around it, and cut. The tower sees every square alone. Its patches are then put together again:
the whole picture's, and those of all tiles row by row without what is only padding, each row ended by one more token, a
learned `image_newline`. All as in transformers' `LlavaNextProcessor` and `LlavaNextForConditionalGeneration`.
"""

import re
from collections.abc import Sequence
from math import ceil

from PIL import Image

from encoder.errors import DataError

Grid = tuple[int, int]  # rows and columns of tiles
# LLaVA-NeXT's, in the order of transformers, which decides between grids that show the same pixels.
GRIDS: tuple[Grid, ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
MAX_TILES = 36  # of a grid: OneVision's largest


def read_grids(words: Sequence[str]) -> tuple[Grid, ...]:
    """A recipe's grids, written 2x3 for two rows of three tiles; none are LLaVA-NeXT's. DataError for another word."""
    grids = []
    for word in words:
        match = re.fullmatch(r"(\d+)x(\d+)", str(word))
        if not match or not 1 < int(match[1]) * int(match[2]) <= MAX_TILES:
            raise DataError(f"tile_grids has '{word}'; write 2x3 for two rows of three tiles, 2 to {MAX_TILES} tiles in all")
        grids.append((int(match[1]), int(match[2])))
    return tuple(grids) or GRIDS


def choose_grid(width: int, height: int, size: int, grids: Sequence[Grid]) -> Grid:
    """The grid of tiles of `size` px for a picture of `width` x `height` px: most of its own pixels, then least waste."""

    def shown_and_waste(grid: Grid) -> tuple[int, int]:
        rows, columns = grid
        scale = min(columns * size / width, rows * size / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - rows * columns * size * size

    best = max(grids, key=shown_and_waste)
    if not shown_and_waste(best)[0]:
        raise DataError(f"a picture of {width}x{height} px is too thin to be cut into tiles; drop it, or take geometry squash")
    return best


def cut_tiles(image: Image.Image, size: int, grid: Grid) -> list[Image.Image]:
    """The picture's tiles, row by row, RGB squares of `size` px."""
    rows, columns = grid
    (width, height), frame = image.size, (columns * size, rows * size)
    scale = min(frame[0] / width, frame[1] / height)
    if frame[0] / width < frame[1] / height:
        inside = frame[0], min(ceil(height * scale), frame[1])
    else:
        inside = min(ceil(width * scale), frame[0]), frame[1]
    whole = Image.new("RGB", frame)
    image = image if image.mode == "RGB" else image.convert("RGB")
    whole.paste(image.resize(inside, Image.Resampling.BICUBIC), tuple((f - i) // 2 for f, i in zip(frame, inside, strict=True)))
    return [
        whole.crop((column * size, row * size, (column + 1) * size, (row + 1) * size))
        for row in range(rows)
        for column in range(columns)
    ]


def num_tokens(width: int, height: int, grid: Grid, side: int) -> int:
    """Tokens of a picture of `width` x `height` px in the language model; side: patches along a square's side."""
    rows, columns = grid[0] * side, grid[1] * side
    # Rounded before it is cut off, since 23.999999999 rows are 24.
    if width / height > columns / rows:
        rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
    return side * side + rows * (columns + 1)
