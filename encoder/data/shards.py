"""Which shards a run reads: files, folders, patterns, URLs, lists with sizes, and mixtures of these with weights."""

import glob
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import fsspec
import yaml

from encoder.errors import DataError

Shard = str | Path  # a URL, or a local file
Shards = str | Path | Sequence[str | Path] | Mapping[str, float]

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass
class Source:
    """Shards that are shuffled together. counts: records of each shard, None where they must be read to know it; weight:
    relative share of the images of a run."""

    shards: list[Shard]
    counts: list[int] | None = None
    weight: float = 1.0


def is_url(path: Shard) -> bool:
    """Whether `path` is for fsspec (`s3://...`) and not a local file."""
    return isinstance(path, str) and "://" in path


def file_system(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """fsspec's file system for a URL and the path in it. Asked for in each process anew: connections do not outlive a fork."""
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(f"{url} cannot be opened by fsspec ({error}); install what it names, or correct the URL") from error


def expand_braces(pattern: str) -> list[str]:
    """`a{000..012}.tar` and `{cat,dog}.tar` -> every name, in order; zeros in front are kept."""
    found = BRACES.search(pattern)
    if not found:
        return [pattern]
    inside = found[1]
    if numbers := RANGE.fullmatch(inside):
        first, last = numbers.groups()
        choices = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
        if not choices:
            raise DataError(f"{pattern}: the range {{{inside}}} is empty; write the smaller number first")
    else:
        choices = inside.split(",")
    head, tail = pattern[: found.start()], expand_braces(pattern[found.end() :])
    return [f"{head}{choice}{rest}" for choice in choices for rest in tail]


def find_shards(shards: str | Path | Sequence[str | Path]) -> list[Shard]:
    """A tar file, a folder of them, a pattern (wildcards, braces), a URL of these, or a list -> the shards, each entry's
    sorted by name. URLs without wildcards are taken at their word: nothing is listed or opened."""
    if not isinstance(shards, str | Path):
        found = [shard for entry in shards for shard in find_shards(entry)]
        if not found:
            raise FileNotFoundError("the list of shards is empty; give .tar files, folders or patterns")
        return found
    if isinstance(shards, str) and len(names := expand_braces(shards)) > 1 and not Path(shards).exists():
        return find_shards(names)
    if is_url(shards):
        return _find_urls(shards)
    path = Path(shards)
    if path.is_file():
        return [path]
    found = sorted(path.glob("*.tar")) if path.is_dir() else sorted(map(Path, glob.glob(str(shards))))
    if not found:
        seen = "holds no .tar file" if path.is_dir() else "matches no file"
        raise FileNotFoundError(f"{shards} {seen}; give .tar shards, a folder of them, or a pattern in quotes")
    return found


def _find_urls(url: str) -> list[Shard]:
    if url.endswith(".tar") and not glob.has_magic(url):
        return [url]
    system, path = file_system(url)
    found = sorted(system.glob(path if glob.has_magic(path) else f"{path.rstrip('/')}/*.tar"))
    if not found:
        raise FileNotFoundError(f"{url} matches no .tar file; give .tar shards, a folder of them, or a pattern in quotes")
    return [system.unstrip_protocol(name) for name in found]


def find_sources(shards: Shards) -> list[Source]:
    """What `shards` names, as sources.

    a mapping, or a `.yaml` file that holds one: path -> weight, a source each; a path is anything below
    a `.json` file: shard -> number of records, names relative to the file (`scripts/index_shards.py` writes it)
    anything else: see `find_shards`; how many records there are is found by reading
    """
    if isinstance(shards, str | Path) and str(shards).endswith((".yaml", ".yml")):
        shards = _read(shards, yaml.safe_load, yaml.YAMLError, "path: weight")
    if not isinstance(shards, Mapping):
        return [_source(shards)]
    sources = []
    for path, weight in shards.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise DataError(f"source {path}: weight is {weight!r}; give a positive number")
        sources.append(_source(path))
        sources[-1].weight = float(weight)
    return sources


def _source(shards: str | Path | Sequence[str | Path]) -> Source:
    if not (isinstance(shards, str | Path) and str(shards).endswith(".json")):
        return Source(find_shards(shards))
    sizes = _read(shards, json.loads, ValueError, "shard: number of records")
    for name, count in sizes.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise DataError(f"{shards}: {name} has {count!r} records; write it again with scripts/index_shards.py")
    return Source([_beside(shards, name) for name in sizes], list(sizes.values()))


def _beside(file: Shard, name: str) -> Shard:
    """`name` as it is meant in `file`: a URL and an absolute path as they are, anything else relative to the file."""
    if is_url(name):
        return name
    return f"{file.rpartition('/')[0]}/{name}" if is_url(file) else Path(file).parent / name


def _read(path: Shard, parse, error: type[Exception], meaning: str) -> dict:
    """A text file, local or URL, that holds one non-empty mapping."""
    if is_url(path):
        system, inner = file_system(path)
        text = system.cat_file(inner).decode()
    elif Path(path).is_file():
        text = Path(path).read_text()
    else:
        raise FileNotFoundError(f"{path} does not exist; it would map {meaning}")
    try:
        values = parse(text)
    except error as problem:
        raise DataError(f"{path} cannot be parsed ({' '.join(str(problem).split())}); write '{meaning}' entries") from problem
    if not isinstance(values, dict) or not values:
        raise DataError(f"{path} holds no mapping; write '{meaning}' entries")
    return values
