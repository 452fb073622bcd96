"""Pictures of the chat: from an upload or drawn as examples, and as an address that a page can show."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from encoder.data.pictures import load_library
from encoder.data.prompts import GROUNDING_QUESTION
from encoder.data.scenes import PictureLibrary, SceneConfig, draw_scene
from encoder.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # named, since Pillow would hand some others to outside programs
MAX_BYTES = 30_000_000  # of an uploaded file
MAX_PIXELS = 50_000_000  # of an uploaded picture
KEPT_SIDE = 1536  # pixels; a longer picture is reduced to this, more than any tower sees
EXAMPLES = (3, 12, 4, 5)  # numbers of the scenes drawn as examples
NUM_LABELS = 8


@dataclass(frozen=True)
class Example:
    """image: RGB; question: about one of its objects; labels: names, among them those of its objects."""

    image: Image.Image
    question: str
    labels: tuple[str, ...]


def open_picture(path: str | Path) -> tuple[Image.Image, float]:
    """An uploaded file -> RGB as a viewer shows it (turned upright, transparency on white), at most `KEPT_SIDE` px a side, and
    how many of the file's pixels are one of its.

    DataError, without the file's path, for what is no picture, or has more than `MAX_BYTES` or `MAX_PIXELS`.
    """
    try:
        if (size := Path(path).stat().st_size) > MAX_BYTES:
            raise DataError(f"The file has {size / 1e6:.0f} megabytes; give one of at most {MAX_BYTES // 1_000_000}.")
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height <= MAX_PIXELS:
                side = max(image.size)
                image.draft("RGB", (KEPT_SIDE, KEPT_SIDE))
                picture = _upright_rgb(image)
                return picture, side / max(picture.size)
            size = f"{image.width} x {image.height}"
    except Image.DecompressionBombError:
        size = "far too many"
    except DataError:
        raise
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


def draw_examples() -> list[Example]:
    """Scenes that no training has seen, of the pictures that the shipped model knows."""
    library = PictureLibrary(load_library("base", seed=0)[0])
    examples = []
    for number, index in enumerate(EXAMPLES):
        scene = draw_scene(SceneConfig(), library, seed=0, index=index, split="demo")
        names = sorted({item.name for item in scene.objects})
        others = [name for name in library.names[number::7] if name not in names]
        labels = tuple(sorted([*names, *others][:NUM_LABELS]))
        examples.append(Example(scene.image, GROUNDING_QUESTION.format(scene.expressions[0][1]), labels))
    return examples


def data_url(image: Image.Image) -> str:
    """The picture as an address that holds it: small ones without loss, large ones as JPEG."""
    small = max(image.size) <= 512
    return to_url(encoded(image, "PNG" if small else "JPEG"), "image/png" if small else "image/jpeg")


def to_url(content: bytes, kind: str) -> str:
    """Bytes of a MIME type as a `data:` address."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    """A file's bytes, in the format `kind` of Pillow."""
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=92)
    return buffer.getvalue()
