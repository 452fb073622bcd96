"""Shards as local files: a remote one is fetched whole, once per machine, and kept in a folder of bounded size.

All processes of a machine share the folder. Locks decide who fetches; a file appears only when it is whole; the one that was
opened longest ago goes first. A file that is removed while another process reads it stays readable to that process.
"""

import fcntl
import hashlib
import io
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from encoder.data.shards import Shard, file_system, is_url
from encoder.data.tars import ShardTable, read_table
from encoder.errors import DataError

TRIES = 5  # to fetch a shard; the pauses between them double from one second: 15 s in all


def default_folder() -> Path:
    """Where remote shards and tables are kept unless another place is given."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cloc_shards"


class ShardCache:
    """folder: of the fetched shards and of the tables of offsets, also those of local shards
    limit_gb: the shards in it take no more than this, the one fetched last aside
    """

    def __init__(self, folder: str | Path | None = None, limit_gb: float = 100.0):
        self.folder = Path(folder) if folder else default_folder()
        self.limit_gb = limit_gb

    def open(self, shard: Shard) -> BinaryIO:
        """The shard's file for reading, unbuffered; fetched first where that is needed."""
        if not is_url(shard):
            return open(shard, "rb", buffering=0)
        path = self._path(shard)
        try:
            file = open(path, "rb", buffering=0)
        except FileNotFoundError:
            with self._lock(path):
                if not path.exists():
                    self._fetch(shard, path)
                file = open(path, "rb", buffering=0)
        os.utime(path, ns=(time.time_ns(), os.fstat(file.fileno()).st_mtime_ns))  # the access time is what `_shrink` goes by
        return file

    def table(self, shard: Shard) -> ShardTable:
        """Where the shard's samples lie. Read from its headers once, then from a small file in the folder."""
        with self.open(shard) as raw, io.BufferedReader(raw) as file:
            state = os.fstat(file.fileno())
            name = shard if is_url(shard) else Path(shard).resolve()
            path = self.folder / f"{_digest(f'{name} {state.st_size} {state.st_mtime_ns}')}.npz"
            if not path.exists():
                with self._lock(path):
                    if not path.exists():
                        table = read_table(file, shard)
                        part = path.with_suffix(".part")
                        with open(part, "wb") as out:
                            np.savez(out, **table._asdict())
                        part.replace(path)
        with np.load(path, allow_pickle=False) as arrays:
            return ShardTable(**arrays)

    def _path(self, url: str) -> Path:
        return self.folder / f"{_digest(url)}.tar"

    @contextmanager
    def _lock(self, path: Path) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _fetch(self, url: str, path: Path) -> None:
        part = path.with_suffix(".part")
        for number in range(TRIES):
            try:
                system, inner = file_system(url)
                system.get_file(inner, str(part))
                break
            except OSError as error:
                if number == TRIES - 1 or isinstance(error, FileNotFoundError | PermissionError):
                    raise DataError(f"{url} cannot be fetched ({error!r}, try {number + 1}); check it and your access") from error
                print(f"{url} cannot be fetched ({error!r}); trying again in {2**number} s", file=sys.stderr, flush=True)
                time.sleep(2**number)
        part.replace(path)
        self._shrink(path)

    def _shrink(self, newest: Path) -> None:
        """Removes the shards that were opened longest ago until the rest fits."""
        found = []
        for entry in os.scandir(self.folder):
            if entry.name.endswith(".tar"):
                try:
                    found.append((entry.stat().st_atime_ns, entry.stat().st_size, entry.path))
                except FileNotFoundError:  # another process removed it just now
                    found.append((0, 0, entry.path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.limit_gb * 1e9:
                break
            if Path(path) != newest:
                Path(path).unlink(missing_ok=True)
                total -= size


class ReadAhead:
    """Fetches the remote shards it is told of in a process of its own, so that they lie here when they are needed."""

    def __init__(self, cache: ShardCache):
        self._cache, self._known = cache, set()
        # Forked, as the loader's workers are. A thread would take turns with the training loop.
        self._context = multiprocessing.get_context("fork")
        self._queue, self._process = self._context.SimpleQueue(), None

    def want(self, shards: list[Shard]) -> None:
        """The shards that will be read next, soonest first; those of the last call are not fetched again."""
        for shard in shards:
            if shard not in self._known and is_url(shard):
                self._queue.put(shard)
        self._known = set(shards)
        if self._process is None and not self._queue.empty():
            self._process = self._context.Process(target=self._run, daemon=True)
            self._process.start()

    def close(self) -> None:
        """Stops fetching."""
        if self._process:
            self._process.terminate()
            self._process.join()

    def _run(self) -> None:
        while True:
            shard = self._queue.get()
            try:
                self._cache.table(shard)
            except (DataError, OSError) as error:  # whoever reads the shard tries again, and stops if that fails too
                print(f"reading ahead: {error}", file=sys.stderr, flush=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
