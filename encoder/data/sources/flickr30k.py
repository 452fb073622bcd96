"""Reads Flickr30k Entities: five captions a picture with marked phrases, and boxes of what they name.

`Sentences/<id>.txt` has `[/EN#<chain>/<type> words]` around each phrase; `Annotations/<id>.xml` has boxes, each with the
chains it belongs to; `train.txt`, `val.txt` and `test.txt` list the ids of the usual splits.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from encoder.data.sources.labelled import Box, Label, Source, SourceImage, check_folder, image_file, numbers, text_phrases
from encoder.errors import DataError

PHRASE = re.compile(r"\[/EN#(\d+)((?:/[^\s/\]]+)+) ([^\]]+)\]")
NOT_VISUAL = "0"  # the chain of all phrases that were not looked for in the picture


def read_flickr30k(folder: Path, images: Path, split: str = "train") -> Source:
    """`folder` holds Sentences, Annotations and the split lists, `images` the pictures of Flickr30k.

    A chain that several boxes show ("two men") is one region, the box around them all, as phrase grounding is evaluated;
    chains with the same box are one region. split: train, val, test, or all
    """
    for path, flag in ((folder, "--annotations"), (Path(folder) / "Sentences", "--annotations"), (images, "--images")):
        check_folder(path, flag)
    folder = Path(folder)
    if split == "all":
        files, ids = (), sorted(path.stem for path in (folder / "Sentences").glob("*.txt"))
    else:
        files = (folder / f"{split}.txt",)
        if not files[0].is_file():
            raise DataError(f"{files[0]} is not there; choose another --split, or all")
        ids = files[0].read_text(encoding="utf-8").split()

    def go() -> Iterator[SourceImage]:
        for name in ids:
            read = image_file(images, f"{name}.jpg", f"{folder}: list of split {split}")
            captions, chains, counts = _read_sentences(folder, name)
            boxes, size, found = _read_boxes(folder, name)
            phrases: dict[Box, list[str]] = {}
            for chain, members in boxes.items():
                around = tuple(
                    pick(column) for pick, column in zip((min, min, max, max), zip(*members, strict=True), strict=True)
                )
                phrases.setdefault(around, []).extend(chains.get(chain, ()))
            labels = tuple(Label(box, text_phrases(*texts)) for box, texts in phrases.items())
            yield SourceImage(f"{name}.jpg", read, size, captions, labels, None, counts + found)

    return Source("flickr30k", f"flickr30k/{split}", files, go(), len(ids))


def _read_sentences(folder: Path, name: str) -> tuple[tuple[str, ...], dict[str, list[str]], Counter]:
    """The captions without marks, the phrases of each chain, and what was counted."""
    path = folder / "Sentences" / f"{name}.txt"
    captions, chains, counts = [], {}, Counter(images=1)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path} is not there; unpack all of the annotations") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error}); unpack the annotations again") from None
    for number, line in enumerate(filter(None, map(str.strip, text.splitlines())), start=1):
        for chain, _, phrase in PHRASE.findall(line):
            counts["phrases"] += 1
            if chain != NOT_VISUAL:
                chains.setdefault(chain, []).append(phrase)
        caption = PHRASE.sub(lambda match: match[3], line)
        if "[/EN#" in caption:
            raise DataError(f"{path}, line {number}: a phrase's mark is broken; unpack the annotations again")
        captions.append(caption)
        counts["captions"] += 1
    return text_phrases(*captions), chains, counts


def _read_boxes(folder: Path, name: str) -> tuple[dict[str, list[Box]], tuple[int, int], Counter]:
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
