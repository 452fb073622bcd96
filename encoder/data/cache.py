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

STREAMS = 4  # shards that a rank reads ahead at the same time
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
        # The access time is what `_shrink` goes by.
        os.utime(file.fileno(), ns=(time.time_ns(), os.fstat(file.fileno()).st_mtime_ns))
        return file

    def prefetch(self, url: str) -> None:
        """Fetches the shard, unless it is here or another process is at it."""
        path = self._path(url)
        try:
            with self._lock(path, wait=False):
                if not path.exists():
                    self._fetch(url, path)
        except BlockingIOError:
            return
        self.table(url)

    def table(self, shard: Shard) -> ShardTable:
        """Where the shard's samples lie. Read from its headers once, then from a small file in the folder."""
        with self.open(shard) as raw, io.BufferedReader(raw) as file:
            if is_url(shard):
                path = self._path(shard).with_suffix(".npz")
            else:
                state = os.fstat(file.fileno())
                key = f"{Path(shard).resolve()} {state.st_size} {state.st_mtime_ns}"
                path = self.folder / f"{_digest(key)}.npz"
            table = _load(path)
            if table is None:
                with self._lock(path):
                    table = _load(path)
                    if table is None:
                        table = read_table(file, shard)
                        part = path.with_suffix(".npz.part")
                        with open(part, "wb") as out:
                            np.savez_compressed(out, **table._asdict())
                        part.replace(path)
        return table

    def _path(self, url: str) -> Path:
        return self.folder / f"{_digest(url)}.tar"

    @contextmanager
    def _lock(self, path: Path, wait: bool = True) -> Iterator[None]:
        """Held by one process at a time; BlockingIOError where another has it and `wait` is False."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield

    def _fetch(self, url: str, path: Path) -> None:
        part = path.with_suffix(".tar.part")
        system, inner = file_system(url)
        for number in range(TRIES):
            try:
                system.get_file(inner, str(part))
                if part.stat().st_size != (size := system.size(inner)) and size is not None:
                    raise OSError(f"{part.stat().st_size} of {size} bytes came")
                break
            except Exception as error:  # each file system has its own
                if number == TRIES - 1 or isinstance(error, FileNotFoundError | PermissionError):
                    raise DataError(f"{url} cannot be fetched ({error!r}, try {number + 1}); check it and your access") from error
                print(f"{url} cannot be fetched ({error!r}); trying again in {2**number} s", file=sys.stderr, flush=True)
                time.sleep(2**number)
        path.with_suffix(".npz").unlink(missing_ok=True)
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
                for file in (Path(path), Path(path).with_suffix(".npz")):
                    file.unlink(missing_ok=True)
                total -= size


class ReadAhead:
    """Fetches the remote shards it is told of in processes of its own, so that they lie here when they are needed."""

    def __init__(self, cache: ShardCache):
        self._cache, self._known = cache, set()
        # Forked, as the loader's workers are. A thread would take turns with the training loop.
        self._context = multiprocessing.get_context("fork")
        self._queue = self._context.Queue()
        self._processes = [self._context.Process(target=self._run, daemon=True) for _ in range(STREAMS)]
        self._started = False

    def want(self, shards: list[Shard]) -> None:
        """The shards that will be read next, soonest first; those of the last call are not fetched again."""
        new = [shard for shard in shards if shard not in self._known and is_url(shard)]
        self._known = set(shards)
        if new and not self._started:  # before the first put, which starts a thread of the queue's
            self._started = True
            for process in self._processes:
                process.start()
        for shard in new:
            self._queue.put(shard)

    def close(self) -> None:
        """Stops fetching."""
        self._queue.cancel_join_thread()
        for process in self._processes if self._started else ():
            process.terminate()
            process.join()

    def _run(self) -> None:
        while True:
            shard = self._queue.get()
            try:
                self._cache.prefetch(shard)
            except (DataError, OSError) as error:  # whoever reads the shard tries again, and stops if that fails too
                print(f"reading ahead: {error}", file=sys.stderr, flush=True)


def _load(path: Path) -> ShardTable | None:
    """A saved table; None where there is none, or not any more."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return ShardTable(**arrays)
    except FileNotFoundError:
        return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
