"""Parts of a labelling run whose answers are known: they say what they see in a few pixels, the same way every time."""

import hashlib
import io
import json
import tarfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from PIL import Image

from encoder.vesl.inputs import open_input
from encoder.vesl.pipeline import label
from encoder.vesl.stage_files import LabelFolder
from encoder.vesl.stages import LabelJob, Part

PIXELS = 100  # that an image must have for the scripted captioner and detector: a smaller one is refused with a ValueError


@dataclass
class ScriptedCaptioner:
    """A caption made of the image's own bytes; nothing of the other images of the batch."""

    prompt: str = ""
    pause: float = 0.0

    def caption(self, images, alt_texts):
        time.sleep(self.pause * len(images))
        return [self._one(image, alt) for image, alt in zip(images, alt_texts, strict=True)]

    def _one(self, image, alt):
        if image.width * image.height < PIXELS:
            raise ValueError("mean must have 3 elements")
        digest = hashlib.sha256(image.tobytes()).hexdigest()
        return f"a {digest[:4]} cat and a {digest[4:8]} dog near {alt or 'nothing'} "

    def describe(self):
        return {"captioner": "scripted", "prompt": self.prompt}


@dataclass(frozen=True)
class ScriptedPhrases:
    """Pairs of words."""

    max_phrases: int = 20

    def extract(self, caption):
        words = caption.split()
        return [" ".join(words[i : i + 2]) for i in range(0, len(words) - 1, 3)][: self.max_phrases]

    def describe(self):
        return {"rule": "scripted", "max_phrases": self.max_phrases}


@dataclass
class ScriptedDetector:
    """A box for every second phrase, the first of them reaching outside the image, the last one wholly outside."""

    min_score: float = 0.1
    pause: float = 0.0

    def detect(self, images, phrases):
        time.sleep(self.pause * len(images))
        found = []
        for image, asked in zip(images, phrases, strict=True):
            assert asked, "an image without phrases costs a detector for nothing"
            boxes = [
                SimpleNamespace(
                    box=(-3.0, 1.0, image.width / (number + 1), image.height - 1.0), phrase=phrase, score=0.9 / (1 + number)
                )
                for number, phrase in enumerate(asked[::2])
            ]
            outside = SimpleNamespace(box=(image.width + 1.0, 0.0, image.width + 9.0, 5.0), phrase=asked[0], score=0.5)
            found.append([*boxes, outside])
        return found

    def describe(self):
        return {"detector": "scripted", "min_score": self.min_score}


def scripted_job(output, pause: float = 0.0, **changes) -> LabelJob:
    """A run with scripted parts. pause: seconds that captioner and detector take for an image."""
    parts = {
        "captioner": Part(partial(ScriptedCaptioner, "Describe.", pause), {"captioner": "scripted", "prompt": "Describe."}),
        "phrases": Part(ScriptedPhrases, {"rule": "scripted"}),
        "detector": Part(partial(ScriptedDetector, 0.1, pause), {"detector": "scripted", "min_score": 0.1}),
    }
    return LabelJob(LabelFolder(output), **{**parts, "caption_batch": 3, "detection_batch": 4, **changes})


def run(collection, output, pause: float = 0.0, stages=None, engine=None, redo=None, limit=None, shard_size=1000, **changes):
    """One run over a collection with scripted parts; what it counted."""
    inputs, described = open_input(str(collection), shard_size, limit)
    more = {"engine": engine} if engine else {}
    return label(scripted_job(output, pause, **changes), inputs, described, stages, redo=redo, progress=False, **more)


def contents(folder) -> dict[str, bytes]:
    """Every file under a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def members(tar: Path) -> dict[str, bytes]:
    """name -> bytes of a tar's members, in order."""
    with tarfile.open(tar) as opened:
        return {member.name: opened.extractfile(member).read() for member in opened}


def records(output) -> dict[str, dict]:
    """Key -> record of all labelled shards."""
    return {
        name.removesuffix(".json"): json.loads(data)
        for tar in sorted(Path(output).glob("*.tar"))
        for name, data in members(tar).items()
        if name.endswith(".json")
    }


def encoded(size=(30, 20), kind="JPEG", colour=(200, 30, 60)) -> bytes:
    """An image file's bytes."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, names: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in names.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def img2dataset_shard(path: Path, count: int = 7, first: int = 0) -> Path:
    """A shard as img2dataset writes it: .jpg, .json with its metadata, .txt."""
    names = {}
    for index in range(first, first + count):
        metadata = {
            "caption": f"alt {index}",
            "url": f"https://example.org/{index}.jpg",
            "key": f"{index:09d}",
            "status": "success",
        }
        metadata |= {"width": 30 + index, "height": 20, "original_width": 512, "sha256": "0" * 8}
        names[f"{index:09d}.jpg"] = encoded((30 + index, 20), colour=(index * 20 % 256, 30, 60))
        names[f"{index:09d}.json"] = json.dumps(metadata).encode()
        names[f"{index:09d}.txt"] = f"alt {index}".encode()
    return write_tar(path, names)


def img2dataset_shards(folder: Path, counts: tuple[int, ...]) -> Path:
    """A shard of each of these numbers of images; returns the folder."""
    for number, count in enumerate(counts):
        img2dataset_shard(folder / f"{number:05d}.tar", count, first=100 * number)
    return folder
