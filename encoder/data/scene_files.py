"""Scenes in the formats that real data has: WebDataset region shards, LLaVA conversations, RefCOCO, COCO instances.

A folder of scenes holds `manifest.json` (written last), `images/<split>/<id>.png`, `shards/train/*.tar`,
`conversations/{train,val}.json`, and with one question a record `questions/`, `names/` and `pointed/{train,val}.json`,
`refcoco/{refs(unc).p, instances.json}` and `regions/{seen,unseen}.json`. Boxes are pixel xyxy floats, but xywh in the two
COCO-style files, as that format has it.
"""

import io
import json
import pickle
import signal
import tarfile
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from encoder.data.pictures import Picture, load_library, photographs
from encoder.data.scene_questions import conversation, name_questions, pointed_questions, single_questions
from encoder.data.scenes import DrawnScene, PictureLibrary, SceneConfig, draw_scene
from encoder.errors import DataError
from encoder.masks import plain_run_lengths

FORMAT = "scenes/1"
SHARD_SCENES = 1000
EVAL_SPLITS = ("val", "testA", "testB")
LLAVA_KINDS = ("conversations", "questions", "names", "pointed")
EVAL_CHUNK = 50  # scenes drawn by a worker at a time where the number needed is not known beforehand


@dataclass(frozen=True)
class SceneJob:
    """What a folder of scenes is made from.

    seed: everything drawn follows from it
    num_train: training scenes
    num_eval: expressions wanted, at least, in each of val, testA and testB
    pictures: "base", "new", or a folder of RGBA cut-outs
    backgrounds: a folder of photographs, or None for plain colours and gradients
    turns: most question and answer pairs in a conversation
    questions: most records of one question about a scene
    config: how scenes look
    """

    seed: int = 0
    num_train: int = 1000
    num_eval: int = 100
    pictures: str = "base"
    backgrounds: str | None = None
    turns: int = 6
    questions: int = 8
    config: SceneConfig = SceneConfig()

    def __post_init__(self):
        for key in ("num_train", "num_eval", "turns", "questions"):
            if getattr(self, key) < 1:
                raise DataError(f"{key} is {getattr(self, key)}; give at least 1")

    def split_config(self, split: str) -> SceneConfig:
        """testA has two or three objects; testB has the most that the configuration allows, or one less, and a name
        twice in every scene; the others follow the configuration. Evaluations ask for an object once: more questions
        about the same picture would add little information and much computing."""
        low, high = self.config.num_objects
        config = self.config if split == "train" else replace(self.config, expressions_per_object=1)
        if split == "testA":
            return replace(config, num_objects=(min(2, high), min(3, high)))
        if split == "testB":
            return replace(config, num_objects=(max(low, high - 1), high), repeat_fraction=1.0)
        return config


def region_record(drawn: DrawnScene) -> dict:
    """The `.json` member of a region shard (see `encoder.data.records`)."""
    width, height = drawn.size
    return {
        "image": f"{drawn.name.split('/')[-1]}.png",
        "width": width,
        "height": height,
        "captions": [drawn.scene.caption],
        "regions": [
            {"box": list(item.box), "phrases": list(item.phrases), "score": 1.0, "source": "scenes"}
            for item in drawn.scene.objects
        ],
    }


def write_shard(path: Path, scenes: list[DrawnScene]) -> None:
    """A WebDataset tar: `<id>.png`, `.json` (the region record) and `.txt` (the caption) per scene. Equal bytes for
    equal scenes: members carry no time and no owner."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for drawn in scenes:
            key = drawn.name.split("/")[-1]
            members = {"png": drawn.png, "json": json.dumps(region_record(drawn)).encode(), "txt": drawn.scene.caption.encode()}
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


class CocoFiles:
    """Collects COCO-style instances, and refs in the layout of lichengunc/refer. Ids count from 1, boxes are xywh."""

    def __init__(self, names: list[str]):
        self.category_ids = {name: index for index, name in enumerate(sorted(set(names)), start=1)}
        self.images, self.annotations, self.refs = [], [], []
        self.num_sentences = 0

    def add(self, drawn: DrawnScene, split: str | None = None) -> None:
        """Adds a scene's image and objects and, with a split, one ref per object that has expressions."""
        image_id = len(self.images) + 1
        file_name = f"{drawn.name}.png"
        width, height = drawn.size
        self.images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        first_annotation = len(self.annotations) + 1
        for offset, item in enumerate(drawn.scene.objects):
            left, top, right, bottom = item.box
            box_xywh = [left, top, right - left, bottom - top]
            self.annotations.append(
                {
                    "id": first_annotation + offset,
                    "image_id": image_id,
                    "category_id": self.category_ids[item.name],
                    "bbox": box_xywh,
                    "area": box_xywh[2] * box_xywh[3],
                    "iscrowd": 0,
                    "segmentation": plain_run_lengths(item.on_canvas(width, height)),
                }
            )
        if split is None:
            return
        for offset, item in enumerate(drawn.scene.objects):
            texts = [text for index, text, _ in drawn.scene.expressions if index == offset]
            if not texts:
                continue
            sent_ids = [self.num_sentences + position for position in range(1, len(texts) + 1)]
            self.num_sentences += len(texts)
            self.refs.append(
                {
                    "ref_id": len(self.refs) + 1,
                    "ann_id": first_annotation + offset,
                    "category_id": self.category_ids[item.name],
                    "image_id": image_id,
                    "file_name": file_name,
                    "split": split,
                    "sent_ids": sent_ids,
                    "sentences": [
                        {"raw": text, "sent": text, "sent_id": sent_id, "tokens": text.split()}
                        for sent_id, text in zip(sent_ids, texts, strict=True)
                    ],
                }
            )

    def instances(self) -> dict:
        return {
            "info": {"description": "composed scenes"},
            "licenses": [],
            "images": self.images,
            "annotations": self.annotations,
            "categories": [
                {"id": number, "name": name, "supercategory": "picture"} for name, number in self.category_ids.items()
            ],
        }


# What every worker process works with; pictures are loaded, and their errors raised, in the main process.
_worker: dict = {}


def _start_worker(job: SceneJob, folder: Path, seen: list[Picture], unseen: list[Picture], photos: list[Image.Image]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process' business
    libraries = {"seen": PictureLibrary(seen, photos), "unseen": PictureLibrary(unseen, photos)}
    _worker.update(job=job, folder=folder, **libraries)


def _draw_chunk(chunk: tuple[str, int, int]) -> list[DrawnScene]:
    split, start, stop = chunk
    job, library = _worker["job"], _worker["unseen" if chunk[0] == "unseen" else "seen"]
    drawn = []
    for index in range(start, stop):
        scene = draw_scene(job.split_config(split), library, job.seed, index, split)
        buffer = io.BytesIO()
        scene.image.save(buffer, "PNG", compress_level=1)
        drawn.append(DrawnScene(f"{split}/{index:06d}", buffer.getvalue(), scene))
    return drawn


def _write_images(folder: Path, scenes: list[DrawnScene]) -> None:
    for drawn in scenes:
        (folder / "images" / f"{drawn.name}.png").write_bytes(drawn.png)


def _train_chunk(chunk: tuple[str, int, int]) -> tuple[int, dict[str, list[dict]]]:
    """Draws and writes one shard with its images; returns its number of scenes and their LLaVA records by kind."""
    scenes, job, folder = _draw_chunk(chunk), _worker["job"], _worker["folder"]
    write_shard(folder / "shards" / "train" / f"{chunk[1] // SHARD_SCENES:05d}.tar", scenes)
    _write_images(folder, scenes)
    return len(scenes), _llava_records(scenes, job)


def _llava_records(scenes: list[DrawnScene], job: SceneJob) -> dict[str, list[dict]]:
    return {
        "conversations": [conversation(drawn, job.seed, job.turns) for drawn in scenes],
        "questions": [record for drawn in scenes for record in single_questions(drawn, job.seed, job.questions)],
        "names": [record for drawn in scenes for record in name_questions(drawn)],
        "pointed": [record for drawn in scenes for record in pointed_questions(drawn, job.seed)],
    }


def write_scenes(folder: Path, job: SceneJob, workers: int, progress: bool = True) -> dict:
    """Draws all splits into `folder` (which exists and is empty) and returns counts and names for the manifest.

    What is written does not depend on `workers`. Raises DataError where the pictures do not suffice.
    """
    seen, unseen = load_library(job.pictures, job.seed)
    photos = photographs(job.backgrounds) if job.backgrounds else []
    image_folders = [f"images/{split}" for split in ("train", *EVAL_SPLITS, "unseen")]
    for sub in ("shards/train", *LLAVA_KINDS, "refcoco", "regions", *image_folders):
        (folder / sub).mkdir(parents=True)
    pool = ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(job, folder, seen, unseen, photos))
    names = {"seen": sorted({item.name for item in seen}), "unseen": sorted({item.name for item in unseen})}
    try:
        counts = {"train": _write_train(pool, folder, job, progress), **_write_eval(pool, folder, job, names, workers, progress)}
    except BrokenProcessPool as error:
        raise DataError("a drawing process was killed, perhaps for memory; run again with fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)
    return {"counts": counts, "names": names}


def _write_train(pool: Executor, folder: Path, job: SceneJob, progress: bool) -> dict:
    total = job.num_train
    llava: dict[str, list[dict]] = {kind: [] for kind in LLAVA_KINDS}
    shards = [("train", start, min(start + SHARD_SCENES, total)) for start in range(0, total, SHARD_SCENES)]
    with tqdm(total=total, desc="train", unit="scene", disable=not progress) as bar:
        for number, records in pool.map(_train_chunk, shards):
            for kind in LLAVA_KINDS:
                llava[kind] += records[kind]
            bar.update(number)
    _write_llava(folder, "train", llava)
    return {"scenes": total}


def _write_eval(pool: Executor, folder: Path, job: SceneJob, names: dict, workers: int, progress: bool) -> dict:
    """val, testA and testB until each has the expressions wanted, and as many scenes of unseen pictures as val has."""
    counts: dict[str, dict[str, int]] = {}
    refcoco, seen, unseen = CocoFiles(names["seen"]), CocoFiles(names["seen"]), CocoFiles(names["unseen"])
    for split in EVAL_SPLITS:
        scenes, before = [], refcoco.num_sentences
        with tqdm(total=job.num_eval, desc=split, unit="expression", disable=not progress) as bar:
            for drawn in _scenes_of(pool, split, workers):
                scenes.append(drawn)
                refcoco.add(drawn, split)
                bar.update(refcoco.num_sentences - before - bar.n)
                if refcoco.num_sentences - before >= job.num_eval:
                    break
        _write_images(folder, scenes)
        objects = sum(len(drawn.scene.objects) for drawn in scenes)
        counts[split] = {"scenes": len(scenes), "objects": objects, "expressions": refcoco.num_sentences - before}
        if split == "val":
            for drawn in scenes:
                seen.add(drawn)
            _write_llava(folder, "val", _llava_records(scenes, job))
    for drawn in islice(_scenes_of(pool, "unseen", workers), counts["val"]["scenes"]):
        unseen.add(drawn)
        _write_images(folder, [drawn])
    counts["unseen"] = {"scenes": len(unseen.images), "objects": len(unseen.annotations)}
    _write_json(folder / "regions" / "seen.json", seen.instances())
    _write_json(folder / "regions" / "unseen.json", unseen.instances())
    _write_json(folder / "refcoco" / "instances.json", refcoco.instances())
    with open(folder / "refcoco" / "refs(unc).p", "wb") as file:
        pickle.dump(refcoco.refs, file, protocol=2)
    return counts


def _scenes_of(pool: Executor, split: str, workers: int) -> Iterator[DrawnScene]:
    """The scenes of a split, one after the other, without end; drawn ahead by all workers."""
    for first in count(step=EVAL_CHUNK * workers):
        chunks = [(split, first + number * EVAL_CHUNK, first + (number + 1) * EVAL_CHUNK) for number in range(workers)]
        for scenes in pool.map(_draw_chunk, chunks):
            yield from scenes


def _write_llava(folder: Path, split: str, records: dict[str, list[dict]]) -> None:
    for kind in LLAVA_KINDS:
        _write_json(folder / kind / f"{split}.json", records[kind])


def _write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
