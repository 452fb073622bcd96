"""The four stages of labelling, each a function of a shard and of what the stage before it wrote for that shard.

    captions    image, alt-text -> caption            batches of images, decoded ahead in threads
    phrases     caption, or the alt-text -> phrases    one text after the other, on the CPU
    detections  image, phrases -> boxes               batches of images, all phrases of a batch in one pass
    shards      all of these -> the labelled shard    image bytes copied

A batch never holds images of two shards, so that what is written for a shard depends on that shard and the settings alone.
"""

import io
import json
import tarfile
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from PIL import Image

from encoder.data.records import parse_sample
from encoder.errors import DataError
from encoder.vesl.inputs import Input, OpenShard, Sample
from encoder.vesl.stage_files import STAGES, LabelFolder, whole_file

Progress = Callable[[float], None]  # told the share of the shard that is done since the last call
AHEAD = 2  # batches whose images are decoded before they are asked for


@dataclass(frozen=True)
class Part:
    """A captioner, a rule for phrases or a detector, not yet loaded.

    make: gives it, in each process that needs it, so it must be picklable for Ray; None where nothing is loaded
    settings: what the user chose, JSON values; results are kept only as long as these stay the same
    """

    make: Callable[[], Any] | None
    settings: dict[str, Any]


KEPT_CAPTIONS = Part(None, {"captioner": "keep"})  # the input's own captions, or its alt-text where it has none


@dataclass(frozen=True)
class LabelJob:
    """How a collection is labelled.

    captioner, phrases, detector: None where their stage does not run now
    from_alt_text: no captions are made, phrases come from the alt-text
    source: who labelled it, as each region's `source`
    caption_batch, detection_batch: images in a batch
    decoders: threads that decode images
    torch_threads: of a process that runs a model; None: torch's own number
    """

    output: LabelFolder
    captioner: Part | None
    phrases: Part | None
    detector: Part | None
    from_alt_text: bool = False
    source: str = "vesl"
    caption_batch: int = 8
    detection_batch: int = 8
    decoders: int = 2
    torch_threads: int | None = None

    def __post_init__(self):
        if min(self.caption_batch, self.detection_batch, self.decoders) < 1:
            raise DataError("batches and decoders must be at least 1")

    @property
    def stages(self) -> list[str]:
        """Those that this job has, in order."""
        return [stage for stage in STAGES if stage != "captions" or not self.from_alt_text]

    @property
    def parts(self) -> dict[str, Part | None]:
        return {"captions": self.captioner, "phrases": self.phrases, "detections": self.detector}

    def settings(self, stage: str) -> dict[str, Any]:
        """What the results of a stage depend on, but for the weights."""
        if stage == "shards":
            return {"source": self.source, "captions": not self.from_alt_text}
        if (part := self.parts[stage]) is None:
            raise DataError(f"the stage {stage} is to run, and nothing was given to run it; name its model or rule")
        batches = {"captions": {"batch": self.caption_batch}, "detections": {"batch": self.detection_batch}}
        texts = {"phrases": {"of": "alt_text" if self.from_alt_text else "captions"}}
        return part.settings | batches.get(stage, {}) | texts.get(stage, {})


class Worker:
    """One stage in one process. Its part is loaded when it is first needed."""

    def __init__(self, job: LabelJob, stage: str):
        self.job, self.stage = job, stage
        if job.torch_threads:
            torch.set_num_threads(job.torch_threads)

    @cached_property
    def part(self) -> Any:
        part = self.job.parts.get(self.stage)
        return part.make() if part and part.make else None

    def describe(self) -> dict[str, Any]:
        """What the part says of itself, with its weights' hash; {} for a stage without one."""
        return self.part.describe() if self.part else {}

    def run(self, source: Input, progress: Progress = lambda share: None) -> None:
        """Writes what the stage finds for one shard. DataError where nothing can be done with any of its images."""
        job, folder = self.job, self.job.output
        with source.open() as shard:
            keys = [sample.key for sample in shard.samples]
            rows = {stage: folder.read_rows(stage, source.name, keys) for stage in job.stages[: job.stages.index(self.stage)]}
            if self.stage == "shards":
                write_shard(job, shard, rows, source.name)
                progress(1.0)
                return
            before = list(rows.values())[-1] if rows else [{"key": key} for key in keys]
            found = self._rows(shard, before, progress)
        failed = [row["problem"] for row in found if row.get("reason") == "model"]
        if len(failed) > 1 and all("problem" in row for row in found):
            raise DataError(f"{shard.name}: no image of {len(found)} can be labelled; the first: {failed[0]}")
        folder.write_rows(self.stage, source.name, found)

    def _rows(self, shard: OpenShard, before: list[dict], progress: Progress) -> list[dict]:
        """A row per sample; one that an earlier stage could not use keeps its problem."""
        job = self.job
        if self.stage == "phrases" or (self.stage == "captions" and self.part is None):
            one = self._phrases if self.stage == "phrases" else _kept_captions
            rows = [one(shard, sample, row) for sample, row in zip(shard.samples, before, strict=True)]
            progress(1.0)
            return rows
        work, size = {
            "captions": (self._captions, job.caption_batch),
            "detections": (self._detections, job.detection_batch),
        }[self.stage]
        rows = [row if "problem" in row else {} for row in before]
        live = [index for index, row in enumerate(before) if "problem" not in row]
        with ThreadPoolExecutor(job.decoders) as pool:
            for indexes, images in _decoded(shard, live, size, pool):
                good = []
                for index, image in zip(indexes, images, strict=True):
                    if isinstance(image, dict):
                        rows[index] = image
                    else:
                        good.append((index, image))
                for (index, _), row in zip(good, _attempt(partial(work, shard, before), shard, good), strict=True):
                    rows[index] = row
                progress(len(indexes) / len(before))
        return rows

    def _captions(self, shard: OpenShard, before: list[dict], batch: list) -> list[dict]:
        samples = [shard.samples[index] for index, _ in batch]
        texts = self.part.caption([image for _, image in batch], [shard.texts(sample).alt_text for sample in samples])
        return [
            {"key": sample.key, "captions": [text.strip()] if text.strip() else []}
            for sample, text in zip(samples, texts, strict=True)
        ]

    def _phrases(self, shard: OpenShard, sample: Sample, row: dict) -> dict:
        if "problem" in row:
            return row
        if not self.job.from_alt_text:
            text = "".join(row["captions"][:1])
        else:
            try:
                text = shard.texts(sample).alt_text
            except DataError as error:
                return _problem(sample, "text", error)
        return {"key": sample.key, "phrases": self.part.extract(text) if text else []}

    def _detections(self, shard: OpenShard, before: list[dict], batch: list) -> list[dict]:
        asked = [(index, image) for index, image in batch if before[index]["phrases"]]
        found = self.part.detect([image for _, image in asked], [before[index]["phrases"] for index, _ in asked]) if asked else []
        boxes = {index: _clipped(each, image) for (index, image), each in zip(asked, found, strict=True)}
        return [{"key": shard.samples[index].key} | boxes.get(index, {"detections": [], "dropped": 0}) for index, _ in batch]


def _problem(sample: Sample, reason: str, error: Exception) -> dict:
    return {"key": sample.key, "problem": str(error), "reason": reason}


def _kept_captions(shard: OpenShard, sample: Sample, row: dict) -> dict:
    try:
        texts = shard.texts(sample)
    except DataError as error:
        return _problem(sample, "text", error)
    return {"key": sample.key, "captions": list(texts.captions) or [texts.alt_text][: bool(texts.alt_text)]}


def _decoded(
    shard: OpenShard, indexes: list[int], size: int, pool: ThreadPoolExecutor
) -> Iterator[tuple[list[int], list[Image.Image | dict]]]:
    """Batches of samples with their images, or the row of one that cannot be read; the next batches are decoded meanwhile."""

    def decode(index: int) -> Image.Image | dict:
        sample, reason = shard.samples[index], "text"
        try:
            shard.texts(sample)  # broken texts cost no captioning
            reason = "image"
            return shard.image(sample)
        except DataError as error:
            return _problem(sample, reason, error)

    waiting: deque = deque()
    for first in range(0, len(indexes), size):
        chunk = indexes[first : first + size]
        waiting.append((chunk, [pool.submit(decode, index) for index in chunk]))
        if len(waiting) > AHEAD:
            chunk, futures = waiting.popleft()
            yield chunk, [future.result() for future in futures]
    for chunk, futures in waiting:
        yield chunk, [future.result() for future in futures]


def _attempt(work: Callable[[list], list[dict]], shard: OpenShard, batch: list) -> list[dict]:
    """The rows of a batch. Where a model or its processor refuses it (a ValueError: Qwen-VL's of a strip of 1 x 300 pixels),
    each image is tried alone, and the refused ones become problems."""
    try:
        return work(batch) if batch else []
    except ValueError as error:
        if len(batch) > 1:
            return [row for item in batch for row in _attempt(work, shard, [item])]
        sample = shard.samples[batch[0][0]]
        message = f"{shard.where(sample)}: the model refuses the image ({' '.join(str(error).split())}); replace it"
        return [_problem(sample, "model", DataError(message))]


def _clipped(detections: list, image: Image.Image) -> dict:
    """Detections as JSON: boxes inside the image, hundredths of a pixel; those without area there are dropped and counted."""
    kept = []
    for detection in detections:
        limits = (image.width, image.height) * 2
        box = [round(min(max(float(value), 0.0), float(limit)), 2) for value, limit in zip(detection.box, limits, strict=True)]
        if box[0] < box[2] and box[1] < box[3]:
            kept.append({"box": box, "phrase": detection.phrase, "score": round(float(detection.score), 4)})
    return {"detections": kept, "dropped": len(detections) - len(kept)}


def write_shard(job: LabelJob, shard: OpenShard, rows: dict[str, list[dict]], name: str) -> None:
    """The labelled shard: every usable sample's members as they are, its .json replaced by the region record. Then its stats."""
    counts, problems = Counter(), list(shard.problems)
    counts["left_out_member"] = len(problems)
    with whole_file(job.output.shard(name)) as path, tarfile.open(path, "w") as tar:
        for index, sample in enumerate(shard.samples):
            results = {stage: found[index] for stage, found in rows.items()}
            try:
                record = _record(job, shard, sample, results)
            except DataError as error:
                problems.append(str(error))
                counts[f"left_out_{results['detections'].get('reason', 'text')}"] += 1
                continue
            counts["records"] += 1
            counts["regions"] += len(record["regions"])
            counts["images_without_region"] += not record["regions"]
            counts["boxes_dropped"] += results["detections"]["dropped"]
            for suffix in dict.fromkeys([*sample.members, "json"]):
                member_name, _ = sample.members.get(suffix, (f"{sample.key}.json", None))
                content = json.dumps(record).encode() if suffix == "json" else shard.member(sample, suffix)
                member = tarfile.TarInfo(member_name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    stats = {"counts": {key: number for key, number in counts.items() if number}, "problems": problems}
    with whole_file(job.output.stats(name)) as path:
        path.write_text(json.dumps(stats, indent=1) + "\n", encoding="utf-8")


def _record(job: LabelJob, shard: OpenShard, sample: Sample, results: dict[str, dict]) -> dict[str, Any]:
    """The sample's region record, such as training takes; `queries` are the phrases that the detector was asked for, and what
    the input's .json held beside is kept. DataError for a sample that training would not take."""
    found = results["detections"]
    if "problem" in found:
        raise DataError(found["problem"])
    texts = shard.texts(sample)
    with Image.open(io.BytesIO(shard.image_bytes(sample))) as image:
        width, height = image.size
    captions = [] if job.from_alt_text else results["captions"]["captions"]
    if not captions and not texts.alt_text:
        raise DataError(f"{shard.where(sample)}: neither a caption nor an alt-text; give a .txt, or a captioner that answers")
    regions = [
        {"box": each["box"], "phrases": [each["phrase"]], "score": each["score"], "source": job.source}
        for each in found["detections"]
    ]
    record = {"image": sample.image.rpartition("/")[2], "width": width, "height": height}
    record |= {"captions": captions} if captions else {}
    record |= {"regions": regions, "queries": results["phrases"]["phrases"]}
    record |= {"alt_text": texts.alt_text} if texts.alt_text else {}
    record |= {"file": sample.file} if sample.file else {}
    record |= {key: value for key, value in texts.fields.items() if key not in {*record, "captions"}}
    parse_sample(json.dumps(record).encode(), shard.member(sample, "txt"), sample.image, (width, height), shard.where(sample))
    return record
