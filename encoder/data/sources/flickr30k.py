"""Reads Flickr30k Entities: five captions a picture with marked phrases, and boxes of what they name.

`Sentences/<id>.txt` has `[/EN#<chain>/<type> words]` around each phrase; `Annotations/<id>.xml` has boxes, each with the
chains it belongs to; `train.txt`, `val.txt` and `test.txt` list the ids of the usual splits.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from encoder.data.sources.labelled import Box, Label, Source, SourceImage, check_folder, image_file, numbers, text_phrases
from encoder.errors import DataError

PHRASE = re.compile(r"\[/EN#(\d+)((?:/[^\s/\]]+)+) ([^\]]+)\]")
NOT_VISUAL = "0"  # the chain of all phrases that were not looked for in the picture


@dataclass(frozen=True)
class Phrase:
    """A marked phrase. sentence: which caption, from 0; chain: what it names, shared with others; kinds: `people`, ..."""

    sentence: int
    chain: str
    kinds: tuple[str, ...]
    text: str


def read_flickr30k(folder: Path, images: Path, split: str = "train") -> Source:
    """`folder` holds Sentences, Annotations and the split lists, `images` the pictures of Flickr30k.

    A chain that several boxes show ("two men") is one region, the box around them all, as phrase grounding is evaluated;
    chains with the same box are one region. split: train, val, test, or all
    """
    check_folder(images, "--images")
    folder = Path(folder)
    files, ids = split_ids(folder, split)

    def go() -> Iterator[SourceImage]:
        for name in ids:
            read = image_file(images, f"{name}.jpg", f"{folder}: list of split {split}")
            captions, marked, counts = read_sentences(folder, name)
            boxes, size, found = read_boxes(folder, name)
            chains: dict[str, list[str]] = {}
            for phrase in marked:
                if phrase.chain != NOT_VISUAL:
                    chains.setdefault(phrase.chain, []).append(phrase.text)
            phrases: dict[Box, list[str]] = {}
            for chain, members in boxes.items():
                phrases.setdefault(box_around(members), []).extend(chains.get(chain, ()))
            labels = tuple(Label(box, text_phrases(*texts)) for box, texts in phrases.items())
            yield SourceImage(f"{name}.jpg", read, size, captions, labels, None, counts + found)

    return Source("flickr30k", f"flickr30k/{split}", files, go(), len(ids))


def split_ids(folder: Path, split: str, flag: str = "--annotations") -> tuple[tuple[Path, ...], list[str]]:
    """The list of a split, where it is one, and the numbers of its pictures. flag: that `folder` was given with"""
    for path in (folder, folder / "Sentences"):
        check_folder(path, flag)
    if split == "all":
        return (), sorted(path.stem for path in (folder / "Sentences").glob("*.txt"))
    file = folder / f"{split}.txt"
    if not file.is_file():
        raise DataError(f"{file} is not there; choose another --split, or all")
    return (file,), file.read_text(encoding="utf-8").split()


def box_around(boxes: list[Box]) -> Box:
    """The smallest box around all of them."""
    return tuple(pick(column) for pick, column in zip((min, min, max, max), zip(*boxes, strict=True), strict=True))


def read_sentences(folder: Path, name: str) -> tuple[tuple[str, ...], list[Phrase], Counter]:
    """The captions without marks, the marked phrases in their order, and what was counted."""
    path = folder / "Sentences" / f"{name}.txt"
    captions, phrases, counts = [], [], Counter(images=1)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path} is not there; unpack all of the annotations") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error}); unpack the annotations again") from None
    for number, line in enumerate(filter(None, map(str.strip, text.splitlines())), start=1):
        for chain, kinds, phrase in PHRASE.findall(line):
            counts["phrases"] += 1
            phrases.append(Phrase(number - 1, chain, tuple(kinds.split("/")[1:]), phrase))
        caption = PHRASE.sub(lambda match: match[3], line)
        if "[/EN#" in caption:
            raise DataError(f"{path}, line {number}: a phrase's mark is broken; unpack the annotations again")
        captions.append(caption)
        counts["captions"] += 1
    return text_phrases(*captions), phrases, counts


def read_boxes(folder: Path, name: str) -> tuple[dict[str, list[Box]], tuple[int, int], Counter]:
    """Boxes of each chain, xyxy pixels; the picture's size; boxes, and objects without one, counted."""
    path = folder / "Annotations" / f"{name}.xml"
    try:
        data = path.read_bytes()
        if b"<!DOCTYPE" in data:  # entities could make a small file huge, and these files have none
            raise DataError(f"{path} declares a document type; unpack the annotations again, do not trust this file")
        root = ElementTree.fromstring(data)
        size = int(root.findtext("size/width")), int(root.findtext("size/height"))
    except FileNotFoundError:
        raise DataError(f"{path} is not there; unpack all of the annotations") from None
    except (ElementTree.ParseError, TypeError) as error:
        raise DataError(f"{path}: not whole, or without a size ({error}); unpack the annotations again") from None
    boxes, counts = {}, Counter()
    for item in root.iter("object"):
        corners = item.find("bndbox")
        if corners is None:
            counts["objects_without_box"] += 1
            continue
        texts = [corners.findtext(key) for key in ("xmin", "ymin", "xmax", "ymax")]
        try:
            values = [float(text) for text in texts]
        except (TypeError, ValueError):
            values = texts
        box = numbers(values, 4, f"{path}: a bndbox")
        counts["boxes"] += 1
        for chain in item.iter("name"):
            boxes.setdefault((chain.text or "").strip(), []).append(box)
    return boxes, size, counts
