"""How a picture enters an MLLM: one small record, written into its folder and read back by every evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from encoder.data.reader import IMAGE_ERRORS
from encoder.errors import DataError
from encoder.geometry import ANYRES, MODES, Geometry
from encoder.pretrained import load_image_processor
from encoder.processor import ClocImageProcessor
from mllm.tiles import Grid, choose_grid, cut_tiles, num_tokens, read_grids


@dataclass(frozen=True)
class ImageInput:
    """The image settings of an MLLM.

    mode: geometry, see `encoder.geometry`
    size: side of the square input, pixels
    mean, std: per channel, of pixels in [0, 1]
    tile_grids: of mode `anyres`, what a picture may be cut into, see `mllm.tiles`; of others none
    boxes: geometry of the square that boxes are written in, where it is another than `mode`
    """

    mode: str
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tile_grids: tuple[Grid, ...] = ()
    boxes: str | None = None

    @classmethod
    def of_tower(cls, path: str | Path, mode: str | None = None, tile_grids: Sequence[str] = ()) -> "ImageInput":
        """The settings a tower's folder was trained with; `mode` replaces its geometry; tile_grids: a recipe's."""
        processor = load_image_processor(path)
        mode = mode or processor.geometry
        if mode not in (*MODES, ANYRES):
            raise DataError(f"geometry '{mode}' is not known; choose one of {', '.join((*MODES, ANYRES))}")
        grids = read_grids(tile_grids) if mode == ANYRES else ()
        return cls(mode, processor.size, tuple(processor.image_mean), tuple(processor.image_std), grids)

    @property
    def frame(self) -> str:
        """Geometry of the square that boxes are written in."""
        return self.boxes or self.mode

    def geometry(self, width: int, height: int) -> Geometry:
        """The transform between boxes in a picture of `width` x `height` pixels and boxes as they are written."""
        return Geometry(self.frame, width, height, self.size)

    def pixels(self, images: list[Image.Image]) -> Tensor:
        """Pictures -> (T, 3, size, size) float32, normalised: the square of each and, with `anyres`, its tiles behind it."""
        return self.processor()([square for image in images for square in self._squares(image)])["pixel_values"]

    def _squares(self, image: Image.Image) -> list[Image.Image]:
        if self.mode != ANYRES:
            return [image]  # the processor makes its square
        return [image, *cut_tiles(image, self.size, choose_grid(*image.size, self.size, self.tile_grids))]

    def inputs(self, images: list[Image.Image]) -> dict[str, Tensor]:
        """What a model takes for pictures: `pixel_values` and, with `anyres`, `image_sizes` (B, 2), their heights and widths."""
        sizes = {"image_sizes": torch.tensor([image.size[::-1] for image in images])} if self.mode == ANYRES else {}
        return {"pixel_values": self.pixels(images), **sizes}

    def num_tokens(self, width: int, height: int, num_square_tokens: int) -> int:
        """Tokens of a picture of that size in the language model, where a square has `num_square_tokens`."""
        if self.mode != ANYRES:
            return num_square_tokens
        grid = choose_grid(width, height, self.size, self.tile_grids)
        return num_tokens(width, height, grid, round(num_square_tokens**0.5))

    def processor(self) -> ClocImageProcessor:
        """Of one square, the whole picture's; a tile is one already."""
        return ClocImageProcessor(self.size, "squash" if self.mode == ANYRES else self.mode, list(self.mean), list(self.std))

    def as_dict(self) -> dict:
        grids = {"tile_grids": [list(grid) for grid in self.tile_grids]} if self.tile_grids else {}
        frame = {"boxes": self.boxes} if self.boxes else {}
        return {"mode": self.mode, "size": self.size, "mean": list(self.mean), "std": list(self.std), **grids, **frame}

    @classmethod
    def from_dict(cls, values: dict) -> "ImageInput":
        grids = tuple(map(tuple, values.get("tile_grids", ())))
        return cls(values["mode"], int(values["size"]), tuple(values["mean"]), tuple(values["std"]), grids, values.get("boxes"))


def read_picture(path: str | Path) -> Image.Image:
    """Opens and decodes a picture as RGB."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; check the folder of images") from None
    except IMAGE_ERRORS as error:
        raise DataError(f"{path} cannot be decoded ({error}); replace it or drop its records") from error


def no_picture(image: ImageInput) -> Tensor:
    """(T, 3, size, size): the mean colour, as of a picture of size x size px; stands where a batch without pictures must still
    run the tower."""
    return torch.zeros_like(image.pixels([Image.new("RGB", (image.size, image.size))]))
