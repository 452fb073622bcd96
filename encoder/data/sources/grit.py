"""Reads GRIT as Kosmos-2 released it: web pictures, their captions, and boxes for parts of the caption.

A row has `caption`, `noun_chunks` and `ref_exps`; these are lists of [first character, end, x1, y1, x2, y2, score], the
corners in [0, 1] of the picture. A referring expression has its noun chunk's box and starts from it. Pictures are
fetched by img2dataset, which writes the row beside each of them.
"""

import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from encoder.data.sources.labelled import (
    Box,
    Label,
    Source,
    SourceImage,
    check_folder,
    numbers,
    plain_name,
    read_json,
    text_phrases,
)
from encoder.errors import DataError

SUFFIXES = ("jpg", "jpeg", "png", "webp")
END_OF_TAR = 1024  # bytes of zeros
COLUMNS = ("id", "caption", "noun_chunks", "ref_exps")


def read_grit(annotations: list[Path], images: Path) -> Source:
    """Without `annotations`, `images` is what img2dataset wrote: tars, or folders of files. With them (the release's
    .parquet, or .json, .jsonl of the same rows) `images` holds `<id>.jpg` (or .jpeg, .png, .webp) for each row."""
    check_folder(images, "--images")
    images = Path(images)
    if annotations:
        files = tuple(map(Path, annotations))
        for path in files:
            if not path.is_file():
                raise DataError(f"{path} is not there; give the released .parquet files, or .json or .jsonl, as --annotations")
        rows = _table_rows(files, images)
    elif tars := tuple(sorted(images.glob("*.tar"))):
        for tar in tars:
            _check_end(tar)
        files, rows = tars, (row for tar in tars for row in _tar_rows(tar))
    else:
        files, labels = (), sorted(images.glob("*/*.json"))
        if not labels:
            raise DataError(
                f"{images} holds neither .tar files nor folders with .json; give img2dataset's output, or --annotations"
            )
        rows = ((read_json(path), partial(_first_of, path.with_suffix("")), str(path)) for path in labels)
    return Source("grit", "grit", files, (_image(*row) for row in rows), None)


def _image(row: dict, read: Callable[[], bytes], where: str) -> SourceImage:
    """row: as released, perhaps with what img2dataset adds."""
    for key in ("caption", "noun_chunks", "ref_exps"):
        if not isinstance(row, dict) or key not in row:
            raise DataError(
                f'{where} has no \'{key}\'; run img2dataset with --save_additional_columns \'["id","noun_chunks","ref_exps"]\', '
                "or give the released rows as --annotations"
            )
    _refuse_other_frame(row, where)
    caption = row["caption"] if isinstance(row["caption"], str) else ""
    phrases: dict[Box, list[str]] = {}
    scores: dict[Box, float] = {}
    for key in ("noun_chunks", "ref_exps"):
        for index, item in enumerate(row[key] or ()):
            first, end, *box, score = numbers(item, 7, f"{where}: {key}[{index}]")
            inside = 0 <= first < end <= len(caption)
            phrases.setdefault(tuple(box), []).append(caption[int(first) : int(end)] if inside else "")
            scores.setdefault(tuple(box), score)
    labels = tuple(Label(box, text_phrases(*texts), scores[box]) for box, texts in phrases.items())
    counts = Counter(images=1, noun_chunks=len(row["noun_chunks"] or ()), ref_exps=len(row["ref_exps"] or ()))
    return SourceImage(str(row.get("id", where)), read, None, text_phrases(caption), labels, None, counts)


def _refuse_other_frame(row: dict, where: str) -> None:
    """img2dataset pads to a square unless told otherwise, and then the boxes, shares of the original, are elsewhere."""
    width, height, original_width, original_height = (
        row.get(key) for key in ("width", "height", "original_width", "original_height")
    )
    if not (width and height and original_width and original_height):
        return
    if abs(width * original_height - height * original_width) > original_width + original_height:
        raise DataError(
            f"{where}: the picture is {width}x{height}, originally {original_width}x{original_height}, so it was padded or "
            "cropped and its boxes do not fit; run img2dataset with --resize_mode keep_ratio"
        )


def _first_of(stem: Path) -> bytes:
    """The picture with this path but for its suffix."""
    for suffix in SUFFIXES:
        path = stem.with_name(f"{stem.name}.{suffix}")
        if path.is_file():
            return path.read_bytes()
    raise FileNotFoundError(f"{stem}.jpg")


def _table_rows(paths: tuple[Path, ...], images: Path) -> Iterator[tuple[dict, Callable[[], bytes], str]]:
    for path in paths:
        for number, row in enumerate(_read_table(path)):
            where = f"{path}, row {number}"
            if not isinstance(row, dict) or "id" not in row:
                raise DataError(f"{where} has no 'id', by which its picture is found; give the released rows")
            name = str(row["id"])
            plain_name(name, where)
            yield row, partial(_first_of, images / name), where


def _read_table(path: Path) -> Iterator[Any]:
    if path.suffix == ".jsonl":
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise DataError(f"{path}, line {number}: not JSON ({error}); download it again") from None
    elif path.suffix == ".json":
        yield from read_json(path)
    else:
        yield from _read_parquet(path)


def _read_parquet(path: Path) -> Iterator[dict]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{path} is read with pyarrow, which is not installed; run: pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path) as file:
            wanted = [name for name in COLUMNS if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=1000, columns=wanted):
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not whole Parquet ({' '.join(str(error).split())}); download it again") from None


def _check_end(tar: Path) -> None:
    """Raises DataError for a tar that is cut off; tarfile takes a cut between two members for the end."""
    with open(tar, "rb") as file:
        length = file.seek(0, 2)
        file.seek(max(0, length - END_OF_TAR))
        if length < END_OF_TAR or any(file.read()):
            raise DataError(f"{tar} does not end as a tar does, it is cut off or no tar; fetch it again with img2dataset")


def _tar_rows(tar: Path) -> Iterator[tuple[dict, Callable[[], bytes], str]]:
    """The samples of one of img2dataset's tars: members of one sample follow each other and share a key."""
    with open(tar, "rb") as file:
        key, members = None, {}
        for member in _members(tar, file):
            stem, _, suffix = member.name.partition(".")
            if stem != key and members:
                yield _tar_row(tar, file, key, members)
                members = {}
            key = stem
            members[suffix.lower()] = member
        if members:
            yield _tar_row(tar, file, key, members)


def _members(tar: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The files in a tar. Raises DataError for one with a broken header or with what is no plain file."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # else every header of a large tar is kept
                if not member.isfile() or member.issparse():
                    raise DataError(f"{tar}: member {member.name} is not a plain file; fetch the tar again with img2dataset")
                yield member
    except tarfile.TarError as error:
        raise DataError(f"{tar} is not a whole tar ({error}); fetch it again with img2dataset") from None


def _tar_row(tar: Path, file: BinaryIO, key: str, members: dict) -> tuple[dict, Callable[[], bytes], str]:
    where = f"{tar}, {key}.json"
    if "json" not in members:
        raise DataError(f"{where} is missing; fetch the tar again with img2dataset")
    label = members["json"]
    file.seek(label.offset_data)
    try:
        row = json.loads(file.read(label.size))
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); fetch the tar again with img2dataset") from None
    picture = next((members[suffix] for suffix in SUFFIXES if suffix in members), None)
    return row, partial(_read_member, tar, key, picture and (picture.offset_data, picture.size)), where


def _read_member(tar: Path, key: str, place: tuple[int, int] | None) -> bytes:
    if place is None:
        raise FileNotFoundError(f"{tar}, {key}.jpg")
    with open(tar, "rb") as file:
        file.seek(place[0])
        return file.read(place[1])
