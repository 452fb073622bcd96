"""How an original image became the model's square input, and back.

One object carries both directions, so that boxes, points and pixels cannot disagree. Modes:
`pad`          the long side is resized to `size`, the rest is filled centred (CLOC's, arXiv 2410.02746 Table A)
`pad_first`    filled centred to a square, which is then resized to `size` (LLaVA-1.5's: `pad` but for the seam)
`squash`       both sides are resized to `size`, aspect ratio lost (Ferret's)
`center_crop`  the short side is resized to `size` and the middle kept (CLIP's own); refuses boxes, since it cuts them
`pad_corner`   filled with black at the right and the bottom to a square, which is then resized to `size`: OWLv2's, for
               reading its boxes; no encoder of ours is trained with it
`anyres`       as `squash`, of a picture that also enters an MLLM in tiles (LLaVA-NeXT's): boxes are of the whole picture
"""

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from encoder.boxes import clip_boxes
from encoder.errors import DataError

MODES = ("pad", "squash", "center_crop", "pad_first")  # of an encoder or an MLLM
DETECTOR_MODES = ("pad_corner",)
PADDED_FIRST = ("pad_first", "pad_corner")  # and resized then
ANYRES = "anyres"  # of an MLLM alone; `mllm.tiles` cuts the tiles


@dataclass(frozen=True)
class Geometry:
    """The transform of one image.

    mode: one of `pad`, `pad_first`, `squash`, `center_crop`, `pad_corner`, `anyres`
    width, height: the original image, pixels
    size: side of the model's square input, pixels
    """

    mode: str
    width: int
    height: int
    size: int

    def __post_init__(self):
        if self.mode not in (*MODES, *DETECTOR_MODES, ANYRES):
            raise DataError(f"geometry '{self.mode}' is not known; choose one of {', '.join((*MODES, ANYRES))}")
        if min(self.width, self.height, self.size) <= 0:
            raise DataError(f"an image of {self.width}x{self.height} px cannot become {self.size} px; sizes must be positive")

    @property
    def resized(self) -> tuple[int, int]:
        """Width and height in pixels after the resize, before padding or cropping; never 0."""
        if self.mode in ("squash", ANYRES):
            return self.size, self.size
        side = min(self.width, self.height) if self.mode == "center_crop" else max(self.width, self.height)
        scale = self.size / side
        return max(1, round(self.width * scale)), max(1, round(self.height * scale))

    @property
    def offset(self) -> tuple[int, int]:
        """Where the resized image's corner lies in the square, pixels; negative when cropped."""
        if self.mode == "pad_corner":
            return 0, 0
        width, height = self.resized
        return (self.size - width) // 2, (self.size - height) // 2

    def apply(self, image: Image.Image, fill: tuple[int, int, int] | None = None) -> Image.Image:
        """The image, of `width` x `height` px, as the model's RGB square; padding is the image's mean colour.

        fill: colour of the padding of `pad_first` instead
        """
        if image.size != (self.width, self.height):
            raise DataError(
                f"this geometry is of a {self.width}x{self.height} image, the image given is {image.size[0]}x{image.size[1]}"
            )
        image = image if image.mode == "RGB" else image.convert("RGB")  # which would copy
        if self.mode in PADDED_FIRST:
            side = max(self.width, self.height)
            square = Image.new("RGB", (side, side), (0, 0, 0) if self.mode == "pad_corner" else fill or _mean_colour(image))
            square.paste(image, self._corner)
            return square.resize((self.size, self.size), Image.Resampling.BICUBIC)
        resized = image.resize(self.resized, Image.Resampling.BICUBIC)
        if self.mode in ("squash", ANYRES):
            return resized
        square = Image.new("RGB", (self.size, self.size), _mean_colour(resized))
        square.paste(resized, self.offset)
        return square

    @property
    def _corner(self) -> tuple[int, int]:
        """Where the image's corner lies in the square that it is padded to before the resize, its own pixels."""
        side = max(self.width, self.height)
        return (0, 0) if self.mode == "pad_corner" else ((side - self.width) // 2, (side - self.height) // 2)

    def _scale_offset(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.mode in PADDED_FIRST:  # both axes by the same factor, nothing rounded
            side = max(self.width, self.height)
            return like.new_tensor([1, 1]) / side, like.new_tensor(self._corner) / side
        (width, height), (left, top) = self.resized, self.offset
        scale = like.new_tensor([width / self.width, height / self.height]) / self.size
        return scale, like.new_tensor([left, top]) / self.size

    def points_to_model(self, points_px: Tensor) -> Tensor:
        """(..., 2) x, y in pixels of the original image -> (..., 2) in [0, 1] of the model's square."""
        points_px = torch.as_tensor(points_px)
        points_px = points_px if points_px.is_floating_point() else points_px.float()
        scale, offset = self._scale_offset(points_px)
        return points_px * scale + offset

    def points_to_image(self, points: Tensor) -> Tensor:
        """The inverse: (..., 2) in [0, 1] of the model's square -> pixels of the original image, not clipped."""
        scale, offset = self._scale_offset(points)
        return (points - offset) / scale

    def boxes_to_model(self, boxes_px: Tensor) -> Tensor:
        """(..., 4) xyxy pixels of the original image -> (..., 4) xyxy in [0, 1] of the model's square."""
        if self.mode == "center_crop":
            raise DataError("geometry 'center_crop' cuts boxes off; use 'pad' or 'squash' where boxes matter")
        boxes_px = torch.as_tensor(boxes_px)
        return self.points_to_model(boxes_px.reshape(*boxes_px.shape[:-1], 2, 2)).reshape(boxes_px.shape)

    def boxes_to_image(self, boxes: Tensor) -> Tensor:
        """The inverse: (..., 4) xyxy in [0, 1] of the model's square -> pixels of the original, clipped to the image."""
        pixels = self.points_to_image(boxes.reshape(*boxes.shape[:-1], 2, 2)).reshape(boxes.shape)
        return clip_boxes(pixels, self.width, self.height)


def _mean_colour(image: Image.Image) -> tuple[int, int, int]:
    return image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
