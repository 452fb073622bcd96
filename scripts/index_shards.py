"""Counts the records of shards once, so that training opens a shard only when it needs it.

    python scripts/index_shards.py 's3://bucket/laion/{00000..41407}.tar' --out laion.json
    python scripts/pretrain_encoder.py RECIPE --shards laion.json ...

Writes JSON, shard -> number of records; names are relative to the file where the shards lie below it. Where `img2dataset`
left its statistics beside a shard (`00000_stats.json`) the count is taken from there, else the shard is read. Started again,
it goes on where it was stopped.
"""

import argparse
import json
from functools import partial
from multiprocessing import Pool
from pathlib import Path

from tqdm import tqdm

from encoder.data.cache import ShardCache
from encoder.data.shards import Shard, file_system, find_shards, is_url
from encoder.errors import DataError, run_main

SAVE_EVERY = 1000  # shards


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", help="a folder, a pattern with wildcards or braces, a tar file, a URL of these")
    parser.add_argument("--out", required=True, type=Path, help="the JSON file to write")
    parser.add_argument("--workers", type=int, default=8, help="shards that are read at the same time (default 8)")
    parser.add_argument("--shard_cache", help="folder for remote shards (default ~/.cache/cloc_shards)")
    parser.add_argument("--shard_cache_gb", type=float, default=100.0, help="what the shards in it may take (default 100)")
    arguments = parser.parse_args()
    if arguments.workers < 1:
        raise DataError(f"--workers is {arguments.workers}; give at least 1")
    cache = ShardCache(arguments.shard_cache, arguments.shard_cache_gb)
    named = {name_of(shard, arguments.out): shard for shard in find_shards(arguments.shards)}
    saved = read_saved(arguments.out)
    counts = {name: saved[name] for name in named if name in saved}
    left = [name for name in named if name not in counts]
    num_problems = 0
    with Pool(arguments.workers) as pool:
        found = pool.imap(partial(count_records, cache), [named[name] for name in left])
        for done, (name, (count, problems)) in enumerate(zip(left, tqdm(found, "shards", len(left)), strict=True), 1):
            counts[name] = count
            num_problems += len(problems)
            for problem in problems:
                tqdm.write(f"problem: {problem}")
            if done % SAVE_EVERY == 0:
                save(counts, arguments.out)
    save({name: counts[name] for name in named}, arguments.out)
    print(f"{arguments.out}: {sum(counts.values())} records in {len(counts)} shards, {num_problems} problems")
    return 1 if num_problems else 0


def name_of(shard: Shard, out: Path) -> str:
    """The shard's name in the list: relative to it where the shard lies below, else in full."""
    if is_url(shard):
        return shard
    path, folder = Path(shard).resolve(), out.resolve().parent
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()


def count_records(cache: ShardCache, shard: Shard) -> tuple[int, list[str]]:
    """The shard's number of records, and what is wrong with others in it."""
    stem = str(shard).removesuffix(".tar")
    system, path = file_system(f"{stem}_stats.json")
    try:
        written = json.loads(system.cat_file(path)).get("successes")  # our own scripts' statistics have none
    except (FileNotFoundError, PermissionError, ValueError):  # S3 says no permission where nothing may be listed
        written = None
    if written is not None:
        return int(written), []
    table = cache.table(shard)
    return len(table.rows), table.problems.tolist()


def read_saved(out: Path) -> dict[str, int]:
    """What an earlier run wrote; makes the folder, so that nothing is counted in vain."""
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        return json.loads(out.read_text()) if out.is_file() else {}
    except ValueError as error:
        raise DataError(f"{out} is no list of an earlier run ({error}); remove it, or give another --out") from error


def save(counts: dict[str, int], out: Path) -> None:
    """Writes the list, whole or not at all."""
    part = out.with_suffix(".part")
    part.write_text(json.dumps(counts, indent=0) + "\n")
    part.replace(out)


if __name__ == "__main__":
    run_main(main)
