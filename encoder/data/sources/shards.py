"""Writes labelled images as WebDataset shards of region records, whatever dataset they come from.

Shard i holds what is usable of images i * size to (i + 1) * size - 1 of the dataset: so a shard depends on no other, and
an interrupted run goes on behind the last whole one. `00000_stats.json` beside `00000.tar` says that it is whole, and what
was counted.
"""

import io
import json
import math
import os
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from encoder.data.reader import IMAGE_ERRORS
from encoder.data.sources.labelled import Box, Label, Source, SourceImage
from encoder.errors import DataError

# PIL's name of a format -> the suffix of its member; these are the formats that the reader of shards takes.
SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
MAX_NAMES = 8  # phrases that make up a caption where there is none
CLIP_TOLERANCE = 1e-6  # px that a box may lie outside before it counts as clipped: sums of decimal fractions


@dataclass(frozen=True)
class ShardJob:
    """How a dataset is written.

    shard_size: images of the dataset in a shard, before any is left out
    limit: how many images of the dataset to look at; None: all
    excluded: COCO's ids of images to leave out
    captions: captions by COCO's id, for images that the dataset gives none
    max_missing: images that may be missing, unreadable or of another size than stated, in all
    """

    shard_size: int = 1000
    limit: int | None = None
    excluded: frozenset[int] = frozenset()
    captions: dict[int, tuple[str, ...]] = field(default_factory=dict)
    max_missing: int = 0

    def __post_init__(self):
        if self.shard_size < 1 or (self.limit is not None and self.limit < 1) or self.max_missing < 0:
            raise DataError("--shard-size and --limit must be at least 1, --max-missing at least 0")


def write_shards(source: Source, out: Path, job: ShardJob, progress: bool = True) -> tuple[Counter, list[str]]:
    """Writes the shards that `out` does not have yet. Returns what was counted over all of them, those found there
    included, and a line for each image that could not be used. Raises DataError where these are too many."""
    totals, missing = Counter(), []
    images = islice(iter(source.images), job.limit)
    total = source.total if job.limit is None or source.total is None else min(source.total, job.limit)
    with tqdm(total=total, desc=source.dataset, unit="image", disable=not progress) as bar:
        for number in count():
            chunk = list(islice(images, job.shard_size))
            if not chunk:
                return totals, missing
            found = _finished(out, number)
            if found is None:
                found = _write_shard(source.dataset, chunk, out, number, job, len(missing), bar)
            else:
                bar.update(len(chunk))
            totals.update(found["counts"])
            missing += found["missing"]


def _finished(out: Path, number: int) -> dict | None:
    """The stats of a shard that is there, else None."""
    path = _stats_path(out, number)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        whole = not found["counts"].get("records") or _shard_path(out, number).is_file()
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not as this script writes it ({error!r}); remove it, its shard is written again") from None
    return found if whole else None


def _shard_path(out: Path, number: int) -> Path:
    return out / f"{number:05d}.tar"


def _stats_path(out: Path, number: int) -> Path:
    return out / f"{number:05d}_stats.json"


def _write_shard(
    dataset: str, chunk: list[SourceImage], out: Path, number: int, job: ShardJob, already_missing: int, bar: tqdm
) -> dict:
    counts, missing = Counter(), []
    path = _shard_path(out, number)
    partial = path.with_name(path.name + ".partial")
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for place, image in enumerate(chunk):
            counts.update(image.counts)
            bar.update()
            if image.coco_id is not None and image.coco_id in job.excluded:
                counts["images_excluded"] += 1
                continue
            data, size, suffix, problem = _look_at(image)
            if problem:
                missing.append(problem)
                continue
            key = f"{number * job.shard_size + place:09d}"
            record = _record(dataset, image, f"{key}.{suffix}", size, job.captions, counts)
            if not record["captions"]:
                counts["images_without_text"] += 1
                continue
            counts["records"] += 1
            counts["record_regions"] += len(record["regions"])
            texts = {"json": json.dumps(record).encode(), "txt": record["captions"][0].encode()}
            for ending, content in {suffix: data, **texts}.items():
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    if already_missing + len(missing) > job.max_missing:
        partial.unlink()
        raise DataError(
            f"{already_missing + len(missing)} of the first {number * job.shard_size + len(chunk)} images cannot be used, "
            f"{job.max_missing} are allowed, the last is {missing[-1]}; put them in place, or allow them with --max-missing"
        )
    if counts["records"]:
        os.replace(partial, path)
    else:
        partial.unlink()
    stats = {"counts": {name: number for name, number in counts.items() if number}, "missing": missing}
    write_json(_stats_path(out, number), stats)
    return stats


def write_json(path: Path, value) -> None:
    """A file that is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _look_at(image: SourceImage) -> tuple[bytes, tuple[int, int], str, str]:
    """The image's bytes, its size, the suffix of its format, and what is wrong with it, "" if nothing is."""
    nothing = b"", (0, 0), ""
    try:
        data = image.read()
    except FileNotFoundError as error:
        return *nothing, f"{image.name} (not there: {error.filename or error})"
    except OSError as error:
        return *nothing, f"{image.name} (cannot be read: {error})"
    try:
        with Image.open(io.BytesIO(data)) as opened:
            size, kind = opened.size, opened.format
    except IMAGE_ERRORS as error:
        return *nothing, f"{image.name} (no whole image: {type(error).__name__})"
    if kind not in SUFFIXES:
        return *nothing, f"{image.name} (is {kind}; {', '.join(SUFFIXES)} are read)"
    if image.size is not None and size != image.size:
        return *nothing, f"{image.name} (is {size[0]}x{size[1]}, its annotations say {image.size[0]}x{image.size[1]})"
    return data, size, SUFFIXES[kind], ""


def _record(
    dataset: str,
    image: SourceImage,
    member: str,
    size: tuple[int, int],
    captions: dict[int, tuple[str, ...]],
    counts: Counter,
) -> dict:
    """The region record (see `encoder.data.records`); `dataset` and `file` are there for people."""
    regions = []
    for label in image.labels:
        box = _box(label, size, image.size is None, counts)
        if box is None:
            counts["boxes_without_area"] += 1
        elif not label.phrases:
            counts["boxes_without_phrase"] += 1
        else:
            regions.append({"box": box, "phrases": label.phrases, "score": label.score, "source": dataset})
    texts = image.captions or captions.get(image.coco_id, ())
    if not texts and regions:
        texts = (_names(regions),)
        counts["captions_from_phrases"] += 1
    width, height = size
    return {
        "image": member,
        "width": width,
        "height": height,
        "captions": texts,
        "regions": regions,
        "dataset": dataset,
        "file": image.name,
    }


def _box(label: Label, size: tuple[int, int], relative: bool, counts: Counter) -> Box | None:
    """The box in pixels inside the image, None where nothing of it is there."""
    width, height = size
    box = [value * (size[axis % 2] if relative else 1) for axis, value in enumerate(label.box)]
    if not all(map(math.isfinite, box)):
        return None
    clipped = tuple(min(max(value, 0.0), float(size[axis % 2])) for axis, value in enumerate(box))
    if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
        return None
    counts["boxes_clipped"] += max(abs(a - b) for a, b in zip(box, clipped, strict=True)) > CLIP_TOLERANCE
    return clipped


def _names(regions: list[dict]) -> str:
    """A caption for an image without one: the first phrases of its regions, the largest region's first, each once."""
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (region["box"] for region in regions)]
    order = sorted(range(len(regions)), key=lambda index: -areas[index])
    names = dict.fromkeys(regions[index]["phrases"][0] for index in order)
    return ", ".join(list(names)[:MAX_NAMES])
