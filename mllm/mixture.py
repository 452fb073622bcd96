"""What a training reads: conversation files with their folders of pictures, how much of each, and in which format.

A recipe's `data` is a list. An entry is a conversation file, an object that says more about one, or the name of a YAML file
that holds such a list:

    - runs/scenes/conversations/train.json
    - {path: mix665k.json, images: /data/llava, importer: llava, weight: 0.5}
    - {path: ferret/refexp.json, images: /data/coco, importer: ferret, count: 20000}

`weight` is how often a record comes in an epoch: 1 (the default) is the file once, 3 three times, 0.2 a fifth of its records,
2.5 twice all of them and half of them once more. `count` says how many records an epoch has of the file instead. What is left
over after whole copies is drawn without repetition from the seed, the file's place in the list and its path; it is the same
in every epoch, in every process and after a resume.
"""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import inf
from pathlib import Path
from random import Random

import yaml
from tqdm import tqdm

from encoder.errors import DataError
from mllm.importers import IMPORTERS, NATIVE
from mllm.records import Sizes, check_record, picture_path, picture_size, pictures_of, problems_of, read_records

YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class Source:
    """One conversation file.

    path: JSON list or JSON lines; images: folder that its paths of pictures start from, none for text alone
    weight: how often each record comes in an epoch; count: records an epoch has of it, instead
    importer: the file's format, one of `mllm.importers.IMPORTERS`
    """

    path: str
    images: str | None = None
    weight: float | None = None
    count: int | None = None
    importer: str = NATIVE

    def __post_init__(self):
        if self.importer not in IMPORTERS:
            raise DataError(f"{self.path}: importer '{self.importer}' is not known; choose one of {', '.join(IMPORTERS)}")
        if self.weight is not None and self.count is not None:
            raise DataError(f"{self.path}: weight and count are both given; drop one of the two")
        for name, kinds in (("weight", int | float), ("count", int)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < inf):
                raise DataError(f"{self.path}: {name} is {value}; give a {'whole ' * (name == 'count')}number above 0")

    @property
    def folder(self) -> Path:
        return Path(self.images or "")

    def read(self, sizes: Sizes) -> Iterator[dict]:
        """All its records in our own form, not checked. sizes: of pictures seen before"""
        return (self.take(record, sizes) for record in read_records(self.path))

    def take(self, record: dict, sizes: Sizes) -> dict:
        """A record of the file in our own form, with `_folder`, where its pictures lie."""
        try:
            record = IMPORTERS[self.importer](record, lambda name: picture_size(picture_path(self.folder, name), sizes))
            if self.images is None and pictures_of(record):
                raise DataError("it has a picture, but images is not given; name the folder in the recipe")
        except DataError as error:
            raise DataError(f"{record['_where']}: {error}") from error
        return record | {"_folder": self.folder}

    def check_folder(self) -> None:
        if self.images and not self.folder.is_dir():
            raise DataError(f"folder of images {self.images} does not exist; check images of {self.path} in the recipe")

    def draw(self, number: int, place: int, seed: int) -> list[int]:
        """Which of its `number` records an epoch has, in order: whole copies, then the rest."""
        wanted = self.count or round(number * (1 if self.weight is None else self.weight))
        if not wanted:
            raise DataError(f"{self.path}: weight {self.weight:g} of {number} conversations is none; raise it, or drop the entry")
        copies, rest = divmod(wanted, number)
        return [*range(number)] * copies + sorted(Random(f"{seed} {place} {self.path}").sample(range(number), rest))

    def describe(self, number: int, drawn: int) -> str:
        how = f"count {self.count}" if self.count else f"weight {self.weight:g}" if self.weight else ""
        form = "" if self.importer == NATIVE else f"{self.importer}: "
        return f"{self.path}: {form}{drawn} of {number} conversations an epoch" + f" ({how})" * bool(how)


def sources_of(data: list, images: str | Path | None = None, importer: str = NATIVE) -> list[Source]:
    """A recipe's `data` as sources; `images` and `importer` are those of entries that name none."""
    sources = []
    for entry in expand(data):
        values = dict(entry) if isinstance(entry, dict) else {"path": str(entry)}
        known = [field.name for field in fields(Source)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
                raise DataError(f"data has an entry with '{key}'; {hint}")
        if not isinstance(values.get("path"), str):
            raise DataError(f"data has the entry {entry}, which names no path; give each a path, or write the path alone")
        folder = values.pop("images", None) or images
        sources.append(Source(**{"importer": importer} | values, images=None if folder is None else str(folder)))
    return sources


def expand(data: list) -> list:
    """The entries of `data`, those of a YAML file in the place of its name."""
    entries = []
    for entry in data:
        if not (isinstance(entry, str | Path) and Path(entry).suffix in YAML):
            entries.append(entry)
            continue
        try:
            found = yaml.safe_load(Path(entry).read_text())
        except FileNotFoundError:
            raise DataError(f"mixture {entry} does not exist; check data in the recipe") from None
        except yaml.YAMLError as error:
            raise DataError(f"mixture {entry} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(found, list) or not found:
            raise DataError(f"mixture {entry} holds no list; write one '- path' or '- {{path: ..., weight: ...}}' a line")
        entries += found
    return entries


def good_records(source: Source, sizes: Sizes, problems: list[str], progress: bool = True) -> list[dict]:
    """All records of a source that a training can use; everything that is wrong with the others goes to `problems`."""
    source.check_folder()
    good = []
    records = read_records(source.path, problems)
    for record in tqdm(records, desc=f"check {Path(source.path).name}", unit="record", disable=not progress):
        try:
            record = source.take(record, sizes)
            found = list(problems_of(record, source.folder, sizes))
        except DataError as error:
            found = [str(error)]
        problems += found
        if not found:
            good.append(record)
    return good


def read_mixture(sources: list[Source], seed: int, progress: bool = True) -> tuple[list[dict], list[int], list[str]]:
    """-> the records that an epoch has, checked; the index of each place's record among them; a line about each source."""
    records: list[dict] = []
    order: list[int] = []
    lines: list[str] = []
    sizes: Sizes = {}
    for place, source in enumerate(sources):
        source.check_folder()
        all_records = read_records(source.path)
        drawn = source.draw(len(all_records), place, seed)
        used = sorted(set(drawn))
        index = dict(zip(used, range(len(records), len(records) + len(used)), strict=True))
        for number in tqdm(used, desc=f"check {Path(source.path).name}", unit="record", disable=not progress):
            record = source.take(all_records[number], sizes)
            check_record(record, source.folder, sizes)
            records.append(record)
        order += [index[number] for number in drawn]
        lines.append(source.describe(len(all_records), len(drawn)))
    return records, order, lines
