"""What a labelling run reads: the samples of WebDataset shards, or of a folder of images cut into shards, byte for byte."""

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from encoder.data.cache import ShardCache
from encoder.data.reader import IMAGE_ERRORS, unreadable
from encoder.data.records import parse_object
from encoder.data.shards import Shard, find_sources, is_url
from encoder.data.tars import IMAGE_SUFFIXES, read_samples, without_image
from encoder.errors import DataError


class Sample(NamedTuple):
    """key: what its members' names begin with; image: its image's member name; members: suffix ("jpg", "txt") -> member name
    and where its bytes lie; file: its path in a folder of images, "" in a shard."""

    key: str
    image: str
    members: dict[str, tuple[str, Any]]
    file: str = ""


@dataclass(frozen=True)
class OpenShard:
    """name: for messages; samples: in order; problems: a sentence for each sample or member that is no sample; read: gives the
    bytes at a place, also from several threads at once."""

    name: str
    samples: list[Sample]
    problems: list[str]
    read: Callable[[Any], bytes]

    def member(self, sample: Sample, suffix: str) -> bytes | None:
        """The bytes of the sample's member with this suffix; None where it has none."""
        return self.read(sample.members[suffix][1]) if suffix in sample.members else None

    def where(self, sample: Sample) -> str:
        return f"{self.name}, {sample.file or sample.key}"

    def image_bytes(self, sample: Sample) -> bytes:
        return self.read(next(place for name, place in sample.members.values() if name == sample.image))

    def image(self, sample: Sample) -> Image.Image:
        """The sample's image, RGB, as stored: turned by no EXIF mark, as training reads it. DataError where it is none."""
        try:
            image = Image.open(io.BytesIO(self.image_bytes(sample)))
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
        except IMAGE_ERRORS as error:
            raise unreadable(self.where(sample), sample.file or sample.image, error) from error

    def texts(self, sample: Sample) -> "Texts":
        """What is said of the sample. DataError for a .json or a .txt that cannot be read."""
        return parse_texts(self.member(sample, "json"), self.member(sample, "txt"), self.where(sample))


class Texts(NamedTuple):
    """fields: the .json as it stands; captions: a region record's; alt_text: what the image was found with, "" if nothing."""

    fields: dict[str, Any]
    captions: tuple[str, ...]
    alt_text: str


def parse_texts(label: bytes | None, text: bytes | None, where: str) -> Texts:
    """A sample's .json and .txt, None where there is none -> its texts.

    The alt-text is the record's own, else the .txt, else img2dataset's `caption`, else a region record's first caption.
    """
    fields = {} if label is None else parse_object(label, f"{where}.json")
    try:
        beside = (text or b"").decode().strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}.txt is not UTF-8 text ({error}); write it again") from error
    captions = fields.get("captions")
    captions = tuple(filter(None, map(_text, captions))) if isinstance(captions, list) else ()
    alt_text = _text(fields.get("alt_text")) or beside or _text(fields.get("caption")) or (captions[0] if captions else "")
    return Texts(fields, captions, alt_text)


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""


@dataclass(frozen=True)
class TarInput:
    """A shard. name: of its file without `.tar`; limit: how many of its samples are read, None: all."""

    shard: Shard
    name: str
    limit: int | None = None
    cache: ShardCache = field(default_factory=ShardCache)

    @contextmanager
    def open(self) -> Iterator[OpenShard]:
        """The shard, open for as long as the block lasts; a remote one is fetched first."""
        with self.cache.open(self.shard) as raw:
            buffered = io.BufferedReader(raw)
            samples, problems = [], []
            for found in read_samples(buffered, self.shard):
                if self.limit is not None and len(samples) + len(problems) >= self.limit:
                    break
                if isinstance(found, DataError):
                    problems.append(str(found))
                elif found.image is None:
                    problems.append(without_image(found, self.shard))
                else:
                    members = {suffix: (part.name, (part.offset_data, part.size)) for suffix, part in found.members.items()}
                    samples.append(Sample(found.key, found.image.name, members))
            buffered.detach()
            file = raw.fileno()
            yield OpenShard(str(self.shard), samples, problems, lambda place: os.pread(file, place[1], place[0]))


@dataclass(frozen=True)
class FolderInput:
    """Some images of a folder, by their paths in it, to become a shard. first: the number of the first one."""

    folder: Path
    name: str
    first: int
    files: tuple[str, ...]

    @contextmanager
    def open(self) -> Iterator[OpenShard]:
        """The images with the .txt and .json beside them; keys are their numbers."""
        samples = []
        for number, file in enumerate(self.files, self.first):
            key, path = f"{number:09d}", self.folder / file
            paths = {path.suffix[1:].lower(): path, **{kind: path.with_suffix(f".{kind}") for kind in ("json", "txt")}}
            members = {kind: (f"{key}.{kind}", beside) for kind, beside in paths.items() if beside == path or beside.is_file()}
            samples.append(Sample(key, next(iter(members.values()))[0], members, file))
        yield OpenShard(str(self.folder), samples, [], Path.read_bytes)


Input = TarInput | FolderInput


def open_input(
    source: str | Sequence[str], shard_size: int = 1000, limit: int | None = None, cache: ShardCache | None = None
) -> tuple[list[Input], dict[str, Any]]:
    """What a run labels, and what of it must stay the same for a run to go on.

    source: shards as `find_sources` takes them, or a folder of images, searched through, in the order of their paths
    shard_size: images of a folder in a shard
    limit: samples to label, the first ones; None: all
    """
    if limit is not None and limit < 1 or shard_size < 1:
        raise DataError(f"limit is {limit} and shard_size {shard_size}; give at least 1")
    folder = Path(source) if isinstance(source, str) and not is_url(source) else None
    if folder and folder.is_dir() and not any(folder.glob("*.tar")):
        files = [str(path) for path in _images(folder)][:limit]
        if not files:
            raise DataError(f"{folder} holds no .tar shard and no image ({', '.join(IMAGE_SUFFIXES)}); give another folder")
        firsts = range(0, len(files), shard_size)
        inputs = [
            FolderInput(folder, f"{number:05d}", first, tuple(files[first : first + shard_size]))
            for number, first in enumerate(firsts)
        ]
        digest = hashlib.sha256("\n".join(files).encode("utf-8", "surrogateescape")).hexdigest()[:16]
        return inputs, {"kind": "images", "shard_size": shard_size, "limit": limit, "images": len(files), "names": digest}
    shards = [shard for each in find_sources(source) for shard in each.shards]
    inputs = [
        TarInput(shard, str(shard).rpartition("/")[2].removesuffix(".tar"), None, cache or ShardCache()) for shard in shards
    ]
    names: dict[str, Input] = {}
    for found in inputs:
        if names.setdefault(found.name, found) is not found:
            raise DataError(f"{names[found.name].shard} and {found.shard} have the same name; label them into two folders")
    return _limited(inputs, limit), {"kind": "shards", "limit": limit}


def _images(folder: Path) -> list[Path]:
    """The images under a folder, relative to it; hidden files and folders are left out."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix[1:].lower() in IMAGE_SUFFIXES)
    return sorted(path for path in found if not any(part.startswith(".") for part in path.parts))


def _limited(inputs: list[TarInput], limit: int | None) -> list[TarInput]:
    """The first shards, cut so that they hold `limit` samples together."""
    if limit is None:
        return inputs
    kept = []
    for found in inputs:
        if limit == 0:
            break
        with found.open() as shard:
            count = min(limit, len(shard.samples) + len(shard.problems))
        kept.append(TarInput(found.shard, found.name, count, found.cache))
        limit -= count
    return kept
