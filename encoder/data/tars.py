"""What lies where in a shard: a WebDataset tar's members found by their headers, no extraction."""

import io
import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from encoder.data.shards import Shard
from encoder.errors import DataError

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
LABEL_SUFFIXES = ("json", "txt")
BLOCK = 512  # bytes of a tar block; an archive ends with two blocks of zeros


class ShardTable(NamedTuple):
    """rows: (n, 6) int64, offset and size in bytes of image, .json and .txt, size -1 where there is none; names: (n,) the
    image's member name; problems: a sentence for each sample or member that is left out."""

    rows: np.ndarray
    names: np.ndarray
    problems: np.ndarray


def key_of(name: str) -> str:
    """A member's name -> its sample's key: everything before the first dot of the file name."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


class TarSample(NamedTuple):
    """What shares a key in a shard, in order. members: suffix in lower case ("jpg", "json") -> its header."""

    key: str
    members: dict[str, tarfile.TarInfo]

    @property
    def image(self) -> tarfile.TarInfo | None:
        """The image's header; the first of `IMAGE_SUFFIXES` where there are several."""
        return next((self.members[suffix] for suffix in IMAGE_SUFFIXES if suffix in self.members), None)


def read_samples(file: BinaryIO, shard: Shard) -> Iterator[TarSample | DataError]:
    """The samples of the tar in `file`, by headers alone, and a DataError for each member or archive that is broken; `shard`
    names it in messages."""
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    key, members = None, {}
    for member in _members(shard, file, length):
        if isinstance(member, DataError):
            yield member
            continue
        if key_of(member.name) != key:
            if members:
                yield TarSample(key, members)
            key, members = key_of(member.name), {}
        members[member.name.rpartition("/")[2].partition(".")[2].lower()] = member
    if members:
        yield TarSample(key, members)


def without_image(sample: TarSample, shard: Shard) -> str:
    """What is said of a sample that has no image."""
    return _lacking(sample, shard, f"an image ({', '.join(IMAGE_SUFFIXES)})")


def _lacking(sample: TarSample, shard: Shard, lacking: str) -> str:
    return f"{shard}: sample {sample.key} has only {', '.join(sorted(sample.members))}; add {lacking}"


def read_table(file: BinaryIO, shard: Shard) -> ShardTable:
    """The samples of the tar in `file`, by headers alone; `shard` names it in messages."""
    rows, names, problems = [], [], []
    for sample in read_samples(file, shard):
        if isinstance(sample, DataError):
            problems.append(str(sample))
            continue
        labels = [sample.members.get(suffix) for suffix in LABEL_SUFFIXES]
        if sample.image is None:
            problems.append(without_image(sample, shard))
        elif not any(labels):
            problems.append(_lacking(sample, shard, "a .json record or a .txt caption"))
        else:
            parts = [sample.image, *labels]
            rows.append([number for part in parts for number in ((part.offset_data, part.size) if part else (0, -1))])
            names.append(sample.image.name)
    return ShardTable(np.array(rows, dtype=np.int64).reshape(-1, 6), np.array(names, dtype=str), np.array(problems, dtype=str))


def _members(shard: Shard, file: BinaryIO, length: int) -> Iterator[tarfile.TarInfo | DataError]:
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


class Member(io.RawIOBase):
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
