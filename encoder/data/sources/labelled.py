"""What a reader of a public dataset gives: its images with their labels, as the files say it, and nothing decided yet.

Clipping, dropping, counting and writing are the same for all datasets and live in `shards.py`.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from encoder.errors import DataError

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Label:
    """box: xyxy in its image's frame, perhaps outside it or without area; phrases: perhaps none; score: the labeller's."""

    box: Box
    phrases: tuple[str, ...]
    score: float = 1.0


@dataclass(frozen=True)
class SourceImage:
    """One image of a dataset.

    name: what the dataset calls it, for messages and for finding it again
    read: gives the file's bytes; raises FileNotFoundError where there is none
    size: (width, height) in pixels that the annotations state, the frame of the boxes; None where boxes are in [0, 1]
    captions: perhaps none
    coco_id: COCO's number of the same picture, None where it has none
    counts: what the files hold for this image, by the names that `published.py` uses
    """

    name: str
    read: Callable[[], bytes]
    size: tuple[int, int] | None
    captions: tuple[str, ...]
    labels: tuple[Label, ...]
    coco_id: int | None = None
    counts: Counter = field(default_factory=Counter)


@dataclass(frozen=True)
class Source:
    """A dataset, or the part of it that is read.

    dataset: "coco", "lvis", ...; every region carries it as its source
    part: which part, as in `published.py`: "coco/instances_train2017"
    files: annotation files, so that a changed input is noticed
    images: to be gone through once, always in the same order
    total: number of images where it is known beforehand
    has_coco_ids: whether pictures can be told apart from RefCOCO's
    """

    dataset: str
    part: str
    files: tuple[Path, ...]
    images: Iterable[SourceImage]
    total: int | None
    has_coco_ids: bool = False


def read_json(path: Path, keep: set[str] | None = None) -> Any:
    """A JSON file. keep: keys of objects worth keeping, at any depth; dropping the others while reading (the outlines of
    COCO's objects are most of its file) saves memory. Raises DataError for a file that is missing or cut off."""
    hook = None if keep is None else lambda row: {key: value for key, value in row.items() if key in keep}
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file, object_hook=hook)
    except FileNotFoundError:
        raise DataError(f"{path} is not there; give the dataset's own file as --annotations") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder; give the file in it as --annotations") from None
    except ValueError as error:
        raise DataError(f"{path}: not whole JSON ({error}); download it again") from None


def image_file(folder: Path, name: str, where: str) -> Callable[[], bytes]:
    """What reads `name` under `folder`. Raises DataError for a name that is not a plain relative path."""
    return partial(Path(folder, plain_name(name, where)).read_bytes)


def plain_name(name: Any, where: str) -> str:
    """The name of an image file, as it is. DataError where it is no plain relative path, and so may lie outside its folder."""
    path = PurePosixPath(name) if isinstance(name, str) else PurePosixPath()
    if not path.name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise DataError(f"{where}: image file {name!r} leaves the folder of images; correct the annotations, do not trust them")
    return name


def last_parts(url: str, where: str) -> str:
    """The last folder and the file's name of an address or a path: `.../train2017/000000000009.jpg`."""
    parts = url.split("/") if isinstance(url, str) else []
    if len(parts) < 2:
        raise DataError(f"{where}: {url!r} has no folder and file name; download the annotations again")
    return "/".join(parts[-2:])


def numbers(values: Any, count: int, where: str) -> tuple[float, ...]:
    """`count` numbers as floats. Raises DataError for anything else; infinite or not a number is left to the caller."""
    try:
        if len(values) == count and not any(isinstance(value, str | bool) for value in values):
            return tuple(float(value) for value in values)
        found = f"{values!r:.80}"
    except (TypeError, ValueError, OverflowError) as error:
        found = f"{values!r:.80} ({error})"
    raise DataError(f"{where} is {found}; {count} numbers were expected, download the annotations again")


def check_folder(folder: Path, flag: str) -> None:
    """Raises DataError where `folder`, given with `flag`, is not one."""
    if not Path(folder).is_dir():
        raise DataError(f"{folder} is not a folder; give the dataset's own with {flag}")


def text_phrases(*texts: Any) -> tuple[str, ...]:
    """The texts without what surrounds them, each once, in order; empty ones and what is no text are left out. A half of
    a surrogate pair, which JSON can spell and UTF-8 cannot, becomes a question mark."""
    strings = (text.encode("utf-8", "replace").decode("utf-8").strip() for text in texts if isinstance(text, str))
    return tuple(dict.fromkeys(filter(None, strings)))
