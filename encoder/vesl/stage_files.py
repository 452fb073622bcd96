"""The folder that a labelling run writes: what each stage found for each shard, the labelled shards, and how they were made.

    manifest.json                      the settings of every stage, and what its part says of itself
    stages/captions/00000.jsonl        a line per sample of shard 00000, in its order; so for phrases and detections
    00000.tar, 00000_stats.json        the labelled shard; its counts and problems, written last: it says the shard is finished
    summary.json, problems.txt         the counts of all finished shards; a line for every sample that was left out

A file appears under its name when it is whole, so whatever a killed run left is either finished or written again.
"""

import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from encoder.data.sources.shards import write_json
from encoder.errors import DataError

STAGES = ("captions", "phrases", "detections", "shards")
FORMAT = 1


class LabelFolder:
    """The files of a run, by stage and shard's name."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def shard(self, name: str) -> Path:
        return self.path / f"{name}.tar"

    def stats(self, name: str) -> Path:
        return self.path / f"{name}_stats.json"

    def rows_file(self, stage: str, name: str) -> Path:
        return self.path / "stages" / stage / f"{name}.jsonl"

    def is_finished(self, name: str) -> bool:
        """Whether the labelled shard is there, whatever became of the stages behind it."""
        return self.stats(name).is_file() and self.shard(name).is_file()

    def has(self, stage: str, name: str) -> bool:
        """Whether a stage is through with a shard."""
        return self.is_finished(name) or (stage != "shards" and self.rows_file(stage, name).is_file())

    def write_rows(self, stage: str, name: str, rows: list[dict]) -> None:
        """A line per sample."""
        path = self.rows_file(stage, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            partial.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")

    def read_rows(self, stage: str, name: str, keys: list[str]) -> list[dict]:
        """What a stage found, a row per sample. DataError where it has not run, or the samples are not those of `keys`."""
        path = self.rows_file(stage, name)
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            same = [row["key"] for row in rows] == keys
        except FileNotFoundError:
            raise DataError(f"{path} is not there; run the stage {stage} first") from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is not as the stage {stage} writes it ({error!r}); remove it and run the stage again"
            ) from None
        if not same:
            raise DataError(f"{path} is of other samples than the shard has now; remove it and run the stage {stage} again")
        return rows

    def read_stats(self, name: str) -> dict[str, Any]:
        """{"counts": ..., "problems": ...} of a finished shard."""
        path = self.stats(name)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return {"counts": dict(found["counts"]), "problems": list(found["problems"])}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is not as labelling writes it ({error!r}); remove it, its shard is written again") from None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder and keeps other runs off it. DataError where one is at work there."""
        if self.path.exists() and not self.path.is_dir():
            raise DataError(f"{self.path} is a file; give a folder for the output")
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"another run is writing {self.path}; wait for it, or give another output") from None
            yield
        finally:
            os.close(descriptor)

    def manifest(self) -> dict[str, Any] | None:
        """How what is there was made; None in an empty folder. DataError where the folder is not ours."""
        path = self.path / "manifest.json"
        if not path.is_file():
            unfinished = path.with_name(path.name + ".partial")  # of a run that was killed at its very start
            if self.path.is_dir() and any(found != unfinished for found in self.path.iterdir()):
                raise DataError(f"{self.path} is not empty and has no manifest.json; give another output, or empty it")
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["format"] == FORMAT and found["stages"].keys() <= set(STAGES):
                return found
            problem = f"format {found['format']}"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problem = repr(error)
        raise DataError(f"{path} is not as this version writes it ({problem}); give another output, or remove the folder")

    def claim(self, source: dict[str, Any], settings: dict[str, dict]) -> None:
        """Starts the manifest or finds that it says the same. DataError for another input, or for a stage with results that
        was made with other settings.

        source: what `open_input` says of the input; settings: of each stage that will run
        """
        found = self.manifest() or {"format": FORMAT, "input": source, "stages": {}}
        for cut_off in [*self.path.glob("*.partial"), *self.path.glob("stages/*/*.partial")]:
            cut_off.unlink(missing_ok=True)
        if difference := first_difference(found["input"], source):
            raise DataError(f"{self.path} was made of another input ({difference}); give another output, or remove the folder")
        for stage, wanted in settings.items():
            there = found["stages"].get(stage)
            if there is None or not self._has_results(stage):
                found["stages"][stage] = {"settings": wanted, "part": None}
            elif difference := first_difference(there["settings"], wanted):
                raise self._refusal(stage, difference)
        write_json(self.path / "manifest.json", found)

    def record_part(self, stage: str, part: dict[str, Any]) -> None:
        """Notes what a stage's part says of itself. DataError where results of another part are there."""
        found = self.manifest()
        there = found["stages"][stage]["part"]
        part = json.loads(json.dumps(part))
        if there is not None and (difference := first_difference(there, part)) and self._has_results(stage):
            raise self._refusal(stage, difference)
        found["stages"][stage]["part"] = part
        write_json(self.path / "manifest.json", found)

    def redo(self, stage: str) -> None:
        """Removes what a stage and those after it wrote; they then run again, with any settings. Of an empty folder, nothing."""
        found = self.manifest()
        if found is None:
            return
        for later in reversed(STAGES[STAGES.index(stage) :]):  # the last first: what is left when this is cut off fits together
            for path in self._results(later):
                path.unlink()
            found["stages"].pop(later, None)
            write_json(self.path / "manifest.json", found)

    def _results(self, stage: str) -> list[Path]:
        if stage == "shards":
            return sorted([*self.path.glob("*_stats.json"), *self.path.glob("*.tar")], reverse=True)
        return sorted((self.path / "stages" / stage).glob("*.jsonl"))

    def _has_results(self, stage: str) -> bool:
        """Whether the stage, or one that builds on it, has written anything."""
        return any(self._results(later) for later in STAGES[STAGES.index(stage) :])

    def _refusal(self, stage: str, difference: str) -> DataError:
        return DataError(
            f"{self.path} holds {stage} of other settings ({difference}); give another output, or --redo {stage} to replace them"
        )


def first_difference(there: Any, asked: Any, key: str = "") -> str:
    """Where two JSON values differ first, in words; "" where they do not."""
    if isinstance(there, dict) and isinstance(asked, dict):
        differences = (first_difference(there.get(k), asked.get(k), f"{key}.{k}" if key else k) for k in [*there, *asked])
        return next(filter(None, differences), "")
    return "" if there == asked else f"{key}: {json.dumps(there)} there, {json.dumps(asked)} asked"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` at the end of the block; a reader of `path` never sees a part.

    No two writers share one: on a cluster, a process that was thought dead may still be at the same shard.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    yield partial
    os.replace(partial, path)
