"""How a picture enters an MLLM: one small record, written into its folder and read back by every evaluation."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from encoder.errors import DataError
from encoder.geometry import MODES, Geometry
from encoder.pretrained import load_image_processor
from encoder.processor import ClocImageProcessor


@dataclass(frozen=True)
class ImageInput:
    """The image settings of an MLLM.

    mode: geometry, see `encoder.geometry`
    size: side of the square input, pixels
    mean, std: per channel, of pixels in [0, 1]
    """

    mode: str
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of_tower(cls, path: str | Path, mode: str | None = None) -> "ImageInput":
        """The settings a tower's folder was trained with; `mode` replaces its geometry."""
        processor = load_image_processor(path)
        mode = mode or processor.geometry
        if mode not in MODES:
            raise DataError(f"geometry '{mode}' is not known; choose one of {', '.join(MODES)}")
        return cls(mode, processor.size, tuple(processor.image_mean), tuple(processor.image_std))

    def geometry(self, width: int, height: int) -> Geometry:
        """The transform of a picture of `width` x `height` pixels."""
        return Geometry(self.mode, width, height, self.size)

    def pixels(self, images: list[Image.Image]) -> Tensor:
        """Pictures -> (B, 3, size, size) float32, normalised."""
        return self.processor()(images)["pixel_values"]

    def processor(self) -> ClocImageProcessor:
        return ClocImageProcessor(self.size, self.mode, list(self.mean), list(self.std))

    def as_dict(self) -> dict:
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: dict) -> "ImageInput":
        return cls(values["mode"], int(values["size"]), tuple(values["mean"]), tuple(values["std"]))


def read_picture(path: str | Path) -> Image.Image:
    """Opens and decodes a picture as RGB."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; check the folder of images") from None
    except OSError as error:
        raise DataError(f"{path} cannot be decoded ({error}); replace it or drop its records") from error


def no_picture(image: ImageInput) -> Tensor:
    """(1, 3, size, size): the mean colour; stands where a batch without pictures must still run the tower."""
    return torch.zeros(1, 3, image.size, image.size)
