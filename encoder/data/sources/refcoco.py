"""Reads RefCOCO, RefCOCO+ and RefCOCOg for training, and tells which pictures their val and test sets use.

The form is that of github.com/lichengunc/refer: a folder per set with `refs(unc).p` (or umd, google) and `instances.json`,
the pictures COCO's train2014.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from encoder.data.plain_pickle import read_plain_pickle
from encoder.data.sources.coco import box_of, read_tables
from encoder.data.sources.labelled import Label, Source, SourceImage, check_folder, image_file, text_phrases
from encoder.errors import DataError


def read_refcoco(folder: Path, images: Path, split: str = "train", split_by: str | None = None) -> Source:
    """One set. Phrases of a region: the expressions for that object.

    split: train, val, testA, ..., or all; split_by: unc, umd or google where the folder holds several refs files
    """
    check_folder(folder, "--annotations")
    check_folder(images, "--images")
    path, tables = refs_file(Path(folder), split_by), Path(folder) / "instances.json"
    pictures, annotations, _ = read_tables(tables)
    refs = _read_refs(path)
    by_image: dict[int, list[dict]] = {}
    for ref in refs:
        if split in ("all", ref["split"]):
            by_image.setdefault(ref["image_id"], []).append(ref)
    if not by_image:
        raise DataError(
            f"{path}: no object has split '{split}'; there are {', '.join(sorted({r['split'] for r in refs}))}, or all"
        )

    def go() -> Iterator[SourceImage]:
        for image_id, rows in by_image.items():
            where = f"{path}: image {image_id}"
            phrases: dict[int, list[str]] = {}
            for ref in rows:
                if image_id not in pictures or ref["ann_id"] not in annotations:
                    raise DataError(f"{where} or annotation {ref['ann_id']} is not in {tables}; they belong to different sets")
                phrases.setdefault(ref["ann_id"], []).extend(sentence["sent"] for sentence in ref["sentences"])
            labels = tuple(Label(box_of(annotations[a], tables), text_phrases(*texts)) for a, texts in phrases.items())
            expressions = sum(len(ref["sentences"]) for ref in rows)
            counts = Counter(images=1, objects=len(rows), expressions=expressions)
            try:
                name, size = pictures[image_id]["file_name"], (pictures[image_id]["width"], pictures[image_id]["height"])
            except KeyError as error:
                raise DataError(f"{tables}: image {image_id} has no {error}; download it again") from None
            yield SourceImage(name, image_file(images, name, where), size, (), labels, image_id, counts)

    set_name, kind = Path(folder).resolve().name, path.stem.removeprefix("refs(").removesuffix(")")
    return Source("refcoco", f"{set_name}/{kind}/{split}", (path, tables), go(), len(by_image), True)


def held_out_images(paths: list[Path]) -> frozenset[int]:
    """COCO's ids of all images with an object outside split train, in refs(...).p files or in all those under folders."""
    files = []
    for path in map(Path, paths):
        found = sorted(path.rglob("refs(*).p")) if path.is_dir() else [path]
        if not found:
            raise DataError(f"{path} holds no refs(...).p; give the folder of refcoco, refcoco+ and refcocog, or one refs file")
        files += found
    return frozenset(ref["image_id"] for file in files for ref in _read_refs(file) if ref["split"] != "train")


def refs_file(folder: Path, split_by: str | None) -> Path:
    """The refs(...).p of a folder: the one there is, or that of `split_by`."""
    found = sorted(folder.glob("refs(*).p"))
    if split_by is not None:
        return folder / f"refs({split_by}).p"
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise DataError(f"{folder} must hold one refs(...).p, it holds {names}; choose with --split-by unc|umd|google")
    return found[0]


def _read_refs(path: Path) -> list[dict]:
    """The refs with the keys used here. Raises DataError naming the item."""
    refs = read_plain_pickle(path)
    if not isinstance(refs, list):
        raise DataError(f"{path}: holds a {type(refs).__name__}, a list of referred objects was expected")
    rows = []
    for index, ref in enumerate(refs):
        try:
            row = {key: ref[key] for key in ("split", "ann_id", "image_id")}
            row["sentences"] = [{"sent": sentence["sent"]} for sentence in ref["sentences"]]
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}, item {index}: not a referred object ({error!r}); see github.com/lichengunc/refer") from None
        rows.append(row)
    return rows
