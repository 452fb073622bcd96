"""Region records at random from WebDataset shards, read where they lie: a table of offsets per shard, no extraction."""

import io
import math
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from encoder.data.cache import ShardCache
from encoder.data.records import RegionRecord, parse_sample
from encoder.data.shards import Shard, Shards, find_sources
from encoder.data.tars import Member, ShardTable, key_of, read_table
from encoder.errors import DataError

# What PIL raises for bytes that are no image, or a broken or a hostile one.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError)
KEPT_TABLES = 128  # of shards whose size is known in advance, per process; about a megabyte each at 10,000 records
SHOWN = 10  # broken records in the message that stops a run


class BrokenRecords:
    """The records that were left out, a sentence each; the one above the limit stops the run.

    limit: how many are accepted, over all ranks and from the run's start on
    log: a file of this rank; the `.txt` files beside it are the other ranks'
    """

    def __init__(self, limit: float = 0, log: str | Path | None = None):
        self.limit, self.log = limit, Path(log) if log else None
        self.sentences: list[str] = []

    def add(self, error: DataError) -> None:
        """Notes one; DataError where that is too many. A record that is met again counts once."""
        if self.limit == 0:
            raise error
        sentence = str(error)
        if sentence in self.sentences:
            return
        self.sentences.append(sentence)
        found = self.sentences
        if self.log:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with open(self.log, "a") as file:  # one write: lines of several workers do not mix
                file.write(f"{sentence}\n")
            found = sorted({line for log in self.log.parent.glob("*.txt") for line in log.read_text().splitlines()})
        if len(found) > self.limit:
            more = f", and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            place = f", listed in {self.log.parent}" if self.log else ""
            raise DataError(f"{len(found)} broken records, max_broken is {self.limit}{place}: {'; '.join(found[:SHOWN])}{more}")


class RegionDataset:
    """`dataset[i]` -> (RGB image, RegionRecord), by seeking in the shards.

    Shards of unknown size are read at construction and everything but the pixels is checked: the tars' structure, every
    record, every image's header and size. Where the sizes are given (see `find_sources`) nothing is opened before it is
    needed, and each record is checked when it is read. Can be pickled and forked: no file stays open.

    shards: see `find_sources`
    on_error: "raise" the first problem as a DataError, or "collect" them all in `problems`, one sentence each, and leave
        out the records they concern
    progress: a bar over the shards, where there are several
    cache: of remote shards, and of the tables of shards whose size is given
    broken: takes the problems in place of `on_error`
    """

    def __init__(
        self,
        shards: Shards,
        on_error: str = "raise",
        progress: bool = True,
        cache: ShardCache | None = None,
        broken: BrokenRecords | None = None,
    ):
        if on_error not in ("raise", "collect"):
            raise DataError(f"on_error is '{on_error}'; choose raise or collect")
        self.cache = cache or ShardCache()
        self.broken = broken or BrokenRecords(math.inf if on_error == "collect" else 0)
        sources = find_sources(shards)
        self.weights = [source.weight for source in sources]
        self.shards: list[Shard] = [shard for source in sources for shard in source.shards]
        self._tables: dict[int, ShardTable] = {}  # of the shards that were read here: they stay
        self._recent: dict[int, ShardTable] = {}
        self.counts: list[list[int]] = []  # per source, the records of each shard
        unknown = sum(len(source.shards) for source in sources if source.counts is None)
        first = 0
        with tqdm(total=unknown, desc="shards", disable=not progress or unknown < 2) as bar:
            for source in sources:
                if source.counts is None:
                    for number, shard in enumerate(source.shards, first):
                        self._tables[number] = self._checked(shard)
                        bar.update()
                    source.counts = [len(self._tables[first + number].rows) for number in range(len(source.shards))]
                self.counts.append(source.counts)
                first += len(source.shards)
                if not sum(source.counts) and on_error == "raise":
                    raise DataError(
                        f"{source.shards[0]} and {len(source.shards) - 1} more shard(s) hold no record; give other shards"
                    )
        self._ends = np.cumsum([count for counts in self.counts for count in counts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def problems(self) -> list[str]:
        """What was wrong with the records that were left out."""
        return self.broken.sentences

    def name(self, index: int) -> str:
        """A record's key in its shard."""
        number, row = self._place(index)
        return key_of(str(self._table(number).names[row]))

    def record(self, index: int) -> RegionRecord:
        """The record alone, without decoding its image."""
        number, row = self._place(index)
        table = self._table(number)
        with self.cache.open(self.shards[number]) as file:
            return _read_record(file, self.shards[number], table, row)

    def __getitem__(self, index: int) -> tuple[Image.Image, RegionRecord]:
        """The image, RGB as stored, and its record. DataError where one of them cannot be read."""
        number, row = self._place(index)
        table = self._table(number)
        with self.cache.open(self.shards[number]) as file:
            return _read_sample(file, self.shards[number], table, row)

    def sample(self, index: int) -> tuple[Image.Image, RegionRecord]:
        """`dataset[index]`; where that is broken it is counted, and the next good one of its shard takes its place."""
        return self._good(index)[1]

    def where(self, index: int) -> str:
        """Shard and key of what `sample(index)` gives, for messages; reads it again."""
        number, _ = self._place(index)
        return f"{self.shards[number]}, {key_of(str(self._table(number).names[self._good(index)[0]]))}"

    def _good(self, index: int) -> tuple[int, tuple[Image.Image, RegionRecord]]:
        """The first readable sample of the shard from `index` on, around its end, and its row."""
        number, row = self._place(index)
        table, shard = self._table(number), self.shards[number]
        count = len(table.rows)
        with self.cache.open(shard) as file:  # a shard that cannot be had is no broken record
            for other in range(row, row + count):
                try:
                    return other % count, _read_sample(file, shard, table, other % count)
                except DataError as error:
                    self.broken.add(error)
        raise DataError(f"{shard}: none of its {count} records can be read; take it out of the shards")

    def _place(self, index: int) -> tuple[int, int]:
        """A record's shard, and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, int(index - (self._ends[number - 1] if number else 0))

    def _table(self, number: int) -> ShardTable:
        table = self._tables.get(number) or self._recent.get(number)
        if table is None:
            shard, previous = self.shards[number], self._ends[number - 1] if number else 0
            table = self.cache.table(shard)
            for problem in table.problems.tolist():
                self.broken.add(DataError(problem))
            if len(table.rows) != self._ends[number] - previous:
                raise DataError(
                    f"{shard} holds {len(table.rows)} samples, its list of sizes says {self._ends[number] - previous}; "
                    "fetch it again, or write the list again with scripts/index_shards.py"
                )
            if len(self._recent) >= KEPT_TABLES:
                del self._recent[next(iter(self._recent))]
            self._recent[number] = table
        return table

    def _checked(self, shard: Shard) -> ShardTable:
        """The shard's table without the records that have a problem."""
        with self.cache.open(shard) as raw, io.BufferedReader(raw) as file:
            table = read_table(file, shard)
            for problem in table.problems.tolist():
                self.broken.add(DataError(problem))
            good = []
            for row in range(len(table.rows)):
                try:
                    _read_record(file, shard, table, row)
                    good.append(row)
                except DataError as error:
                    self.broken.add(error)
        return table._replace(rows=table.rows[good], names=table.names[good])


def _part(file: BinaryIO, row: np.ndarray, part: int) -> bytes | None:
    """Part 0 (image), 1 (.json) or 2 (.txt) of a sample; None where it has none."""
    offset, size = row[2 * part : 2 * part + 2].tolist()
    return os.pread(file.fileno(), size, offset) if size >= 0 else None


def _read_record(file: BinaryIO, shard: Shard, table: ShardTable, row: int) -> RegionRecord:
    """A record, checked against its image's header."""
    name, offsets = str(table.names[row]), table.rows[row]
    where = f"{shard}, {key_of(name)}"
    try:
        with Image.open(Member(file, *offsets[:2].tolist())) as image:
            size = image.size
    except IMAGE_ERRORS as error:
        raise unreadable(where, name, error) from error
    return parse_sample(_part(file, offsets, 1), _part(file, offsets, 2), name, size, where)


def _read_sample(file: BinaryIO, shard: Shard, table: ShardTable, row: int) -> tuple[Image.Image, RegionRecord]:
    """The decoded image, RGB, and its record."""
    data, label, text = (_part(file, table.rows[row], part) for part in range(3))
    name = str(table.names[row])
    where = f"{shard}, {key_of(name)}"
    try:
        image = Image.open(io.BytesIO(data))
        record = parse_sample(label, text, name, image.size, where)
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB"), record  # `convert` alone would copy
    except DataError:
        raise
    except IMAGE_ERRORS as error:
        raise unreadable(where, name, error) from error


def unreadable(where: str, name: str, error: Exception) -> DataError:
    """What is said of an image that PIL cannot read."""
    # Not PIL's own words: they hold addresses, and a record that is met twice must count once.
    return DataError(f"{where}: image {name} cannot be read ({type(error).__name__}); replace it")
