"""Region records at random from WebDataset shards, read where they lie: an index of offsets, no extraction."""

import glob
import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from encoder.data.records import RegionRecord, parse_record
from encoder.errors import DataError

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
BLOCK = 512  # bytes of a tar block; an archive ends with two blocks of zeros
# What PIL raises for bytes that are no image, or a broken or a hostile one.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

Shards = str | Path | Sequence[str | Path]


def find_shards(shards: Shards) -> list[Path]:
    """A tar file, a folder of them, a pattern with wildcards, or a list of these -> the files, each sorted by name."""
    if not isinstance(shards, str | Path):
        found = [file for entry in shards for file in find_shards(entry)]
        if not found:
            raise FileNotFoundError("the list of shards is empty; give .tar files, folders or patterns")
        return found
    path = Path(shards)
    if path.is_file():
        return [path]
    found = sorted(path.glob("*.tar")) if path.is_dir() else sorted(map(Path, glob.glob(str(shards))))
    if not found:
        seen = "holds no .tar file" if path.is_dir() else "matches no file"
        raise FileNotFoundError(f"{shards} {seen}; give .tar shards, a folder of them, or a pattern in quotes")
    return found


class RegionDataset:
    """`dataset[i]` -> (RGB image, RegionRecord), by seeking in the shards.

    Everything but the pixels is checked at construction: the tars' structure, every record, every image's header and
    size. Can be pickled and forked: no file stays open.

    shards: see `find_shards`
    on_error: "raise" the first problem as a DataError, or "collect" them all in `problems`, one sentence each, and leave
        out the records they concern
    progress: a bar over the shards, where there are several
    """

    def __init__(self, shards: Shards, on_error: str = "raise", progress: bool = True):
        if on_error not in ("raise", "collect"):
            raise DataError(f"on_error is '{on_error}'; choose raise or collect")
        self.shards = find_shards(shards)
        self.problems: list[str] = []
        self.names: list[str] = []  # each record's key in its shard
        rows = []
        for number, shard in enumerate(tqdm(self.shards, "shards", disable=not progress or len(self.shards) < 2)):
            for found in _scan(shard):
                if isinstance(found, DataError):
                    if on_error == "raise":
                        raise found
                    self.problems.append(str(found))
                else:
                    key, *offsets = found
                    self.names.append(key)
                    rows.append((number, *offsets))
        if not rows and on_error == "raise":
            raise DataError(f"{self.shards[0]} and {len(self.shards) - 1} more shard(s) hold no record; give other shards")
        # One row per record: shard, then offset and size in bytes of the image and of the JSON. An array, so that
        # forked workers share its memory.
        self._index = np.array(rows, dtype=np.int64).reshape(-1, 5)

    def __len__(self) -> int:
        return len(self._index)

    def where(self, index: int) -> str:
        """Shard and key of a record, for messages."""
        return f"{self.shards[self._index[index, 0]]}, {self.names[index]}"

    def record(self, index: int) -> RegionRecord:
        """The record alone, without reading its image."""
        shard, _, _, offset, size = self._index[index].tolist()
        with open(self.shards[shard], "rb") as file:
            file.seek(offset)
            return parse_record(file.read(size), f"{self.where(index)}.json")

    def __getitem__(self, index: int) -> tuple[Image.Image, RegionRecord]:
        """The image, RGB as stored, and its record. DataError where the pixels cannot be read."""
        record = self.record(index)
        shard, offset, size, _, _ = self._index[index].tolist()
        with open(self.shards[shard], "rb") as file:
            file.seek(offset)
            data = file.read(size)
        try:
            return Image.open(io.BytesIO(data)).convert("RGB"), record
        except IMAGE_ERRORS as error:
            raise DataError(f"{self.where(index)}: image {record.image} cannot be read ({error}); replace it") from error


class _Member(io.RawIOBase):
    """A member's bytes as a file of their own, so that PIL reads no more of it than the header."""

    def __init__(self, file: BinaryIO, offset: int, size: int):
        self._file, self._offset, self._size, self._position = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + position)
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._position)
        self._file.seek(self._offset + self._position)
        data = self._file.read(left if size is None or size < 0 else min(size, left))
        self._position += len(data)
        return data


def _scan(shard: Path) -> Iterator[tuple[str, int, int, int, int] | DataError]:
    """The shard's records as (key, image offset, image size, JSON offset, JSON size), and its problems."""
    length = os.path.getsize(shard)
    with open(shard, "rb") as file:
        key, members = None, {}
        for member in _members(shard, file, length):
            if isinstance(member, DataError):
                yield member
                continue
            folder, _, base = member.name.rpartition("/")
            stem, _, suffix = base.partition(".")
            member_key = f"{folder}/{stem}" if folder else stem
            if member_key != key:
                if members:
                    yield _check(shard, file, key, members)
                key, members = member_key, {}
            members[suffix.lower()] = member
        if members:
            yield _check(shard, file, key, members)


def _members(shard: Path, file: BinaryIO, length: int) -> Iterator[tarfile.TarInfo | DataError]:
    """The files in a tar, in order. A problem of one member is yielded in its place; a broken archive ends it."""
    end = 0  # of the last member that lies whole in the file
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # else every header of a large shard is kept
                if member.offset_data + member.size > length:
                    yield DataError(
                        f"{shard} is truncated at byte {length}: member {member.name} ends at byte "
                        f"{member.offset_data + member.size}; fetch or write it again"
                    )
                    return
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                if member.name.startswith("/") or ".." in member.name.split("/"):
                    yield DataError(f"{shard}: member path '{member.name}' leaves the archive; write it with plain names")
                elif member.isfile() and not member.issparse():
                    yield member
                elif not member.isdir():
                    yield DataError(f"{shard}: member {member.name} is a link, a device or sparse; write plain files")
    except tarfile.TarError as error:
        yield DataError(f"{shard} is not a whole uncompressed tar ({error}, after byte {end} of {length}); write it again")
        return
    # tarfile takes a broken header, and a file that stops between two members, for the archive's end.
    file.seek(end)
    mark = file.read(2 * BLOCK)
    if any(mark):
        yield DataError(f"{shard} has a broken member header at byte {end} of {length}; fetch or write it again")
    elif len(mark) < 2 * BLOCK:
        yield DataError(f"{shard} is truncated at byte {length}: the end-of-archive mark is missing; fetch or write it again")


def _check(
    shard: Path, file: BinaryIO, key: str, members: dict[str, tarfile.TarInfo]
) -> tuple[str, int, int, int, int] | DataError:
    """A sample's members -> its index row, or what is wrong with it."""
    suffixes = [suffix for suffix in IMAGE_SUFFIXES if suffix in members]
    if "json" not in members or not suffixes:
        lacking = "a .json record" if suffixes else f"an image ({', '.join(IMAGE_SUFFIXES)})"
        return DataError(f"{shard}: sample {key} has only {', '.join(sorted(members))}; add {lacking}")
    picture, label = members[suffixes[0]], members["json"]
    where = f"{shard}, {label.name}"
    try:
        file.seek(label.offset_data)
        record = parse_record(file.read(label.size), where)
        if record.image not in (picture.name, picture.name.rpartition("/")[2]):
            raise DataError(f"{where}: image is '{record.image}', beside it lies {picture.name}; make them agree")
        with Image.open(_Member(file, picture.offset_data, picture.size)) as image:
            if image.size != (record.width, record.height):
                stated, found = f"{record.width}x{record.height}", f"{image.size[0]}x{image.size[1]}"
                raise DataError(f"{where}: width and height say {stated}, image {picture.name} is {found}; correct the record")
    except DataError as error:
        return error
    except IMAGE_ERRORS as error:
        return DataError(f"{shard}: image {picture.name} cannot be read ({type(error).__name__}); replace it")
    return key, picture.offset_data, picture.size, label.offset_data, label.size
