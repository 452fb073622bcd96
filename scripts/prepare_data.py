"""Turns a public dataset, in its own files, into WebDataset shards of region records.

    python scripts/prepare_data.py coco --annotations instances_train2017.json --images train2017 --out runs/coco

Images are copied as they are. Counts are held against the published ones. The same command again goes on behind the
last whole shard. docs/data.md says what each dataset needs.
"""

import argparse
import hashlib
import json
from pathlib import Path

from encoder.data.sources.coco import read_captions, read_coco, read_lvis, read_objects365
from encoder.data.sources.flickr30k import read_flickr30k
from encoder.data.sources.grit import read_grit
from encoder.data.sources.labelled import Source
from encoder.data.sources.published import completeness
from encoder.data.sources.refcoco import held_out_images, read_refcoco
from encoder.data.sources.shards import ShardJob, write_json, write_shards
from encoder.data.sources.visual_genome import read_visual_genome
from encoder.errors import DataError, run_main

ONE_FILE = {"coco": read_coco, "lvis": read_lvis, "objects365": read_objects365}
SPLIT = {"refcoco": read_refcoco, "flickr30k": read_flickr30k}  # datasets that say in their files which images are for training
ARGUMENTS, SUMMARY = "arguments.json", "summary.json"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", choices=(*ONE_FILE, "visual_genome", "grit", *SPLIT), help="dataset")
    parser.add_argument("--annotations", type=Path, nargs="+", default=[], help="the dataset's files, or the folder of them")
    parser.add_argument("--images", type=Path, required=True, help="folder of its images")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; holds nothing but this dataset")
    parser.add_argument("--split", help="refcoco, flickr30k: train (default), val, test, ..., or all")
    parser.add_argument("--split-by", help="refcoco: unc, umd or google, where the folder holds several refs files")
    parser.add_argument(
        "--captions", type=Path, nargs="+", default=[], metavar="JSON", help="COCO's captions_*.json, for images with COCO ids"
    )
    parser.add_argument(
        "--exclude-refcoco",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="leave out images of the val and test sets of all refs(...).p files under these folders",
    )
    parser.add_argument("--shard-size", type=int, default=1000, help="images of a shard, before any is left out (default 1000)")
    parser.add_argument("--limit", type=int, help="look at the first N images only")
    parser.add_argument(
        "--max-missing",
        type=int,
        default=0,
        help="images that may be missing, unreadable or of another size than stated; they are counted and listed (default 0)",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    excluded, captions = held_out_images(arguments.exclude_refcoco), read_captions(arguments.captions)
    job = ShardJob(arguments.shard_size, arguments.limit, excluded, captions, arguments.max_missing)
    source = open_source(arguments)
    if (excluded or captions) and not source.has_coco_ids:
        raise DataError(
            f"images of {source.dataset} have no COCO ids, so --exclude-refcoco and --captions find none; leave them out"
        )
    out = arguments.out
    wanted = {
        "dataset": source.dataset,
        "part": source.part,
        "files": digest([[path.name, path.stat().st_size] for path in source.files]),
        "images": source.total,
        "excluded": digest(sorted(excluded)),
        "captions": digest(sorted(captions.items())),
        "shard_size": job.shard_size,
        "limit": job.limit,
    }
    claim_folder(out, wanted)
    counts, missing = write_shards(source, out, job)
    result = completeness(source.part, counts, len(missing), job.limit)
    counts = dict(sorted(counts.items()))
    write_json(out / SUMMARY, {**wanted, "completeness": result, "counts": counts, "missing": missing})
    if not counts.get("records"):
        raise DataError(f"no record of {source.part} could be written; {out / SUMMARY} says what was left out")
    print(f"counts: {', '.join(f'{name} {number}' for name, number in counts.items())}; missing {len(missing)}")
    print(f"{counts['records']} records, {counts['record_regions']} regions of {source.part} are in {out}; {result}", flush=True)


def open_source(arguments: argparse.Namespace) -> Source:
    """The dataset's reader on the given files. DataError where flags do not go with the dataset."""
    name, files, images = arguments.source, arguments.annotations, arguments.images
    if name not in SPLIT and arguments.split or name != "refcoco" and arguments.split_by:
        raise DataError(
            f"--split is for {' and '.join(SPLIT)}, --split-by for refcoco; {name} is split by its files, leave it out"
        )
    if name == "grit":
        return read_grit(files, images)
    if name == "visual_genome":
        return read_visual_genome(files, images)
    if len(files) != 1:
        raise DataError(f"{name} takes one --annotations, {len(files)} were given; see docs/data.md")
    if name in ONE_FILE:
        return ONE_FILE[name](files[0], images)
    more = {"split_by": arguments.split_by} if name == "refcoco" else {}
    return SPLIT[name](files[0], images, arguments.split or "train", **more)


def digest(value) -> str:
    """A short name of a JSON value, to see whether it changed."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def claim_folder(out: Path, wanted: dict) -> None:
    """Makes `out`, or finds it as an earlier run with the same arguments left it. DataError if it holds anything else."""
    path = out / ARGUMENTS
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; give a folder for --out")
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{out} is not empty and has no readable {ARGUMENTS}; give another --out, or remove it") from error
    if not any(out.glob("*_stats.json")):  # no shard is there yet
        write_json(path, wanted)
        return
    for key, value in wanted.items():
        if found.get(key) != value:
            raise DataError(
                f"{out} holds data of other arguments ({key}: {found.get(key)} there, {value} asked); "
                "give another --out, or remove it"
            )


if __name__ == "__main__":
    run_main(main)
