"""Tiny real fixtures: region shards, a tokenizer, a CLOC folder. Everything is made once per session and from a seed.

The shards are written here with `tarfile` alone, in WebDataset's layout, so that the reader is tested against the format
and not against our own writer.
"""

import io
import json
import os
import tarfile

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image

from encoder.config import tiny
from encoder.model import ClocModel
from encoder.processor import ClocImageProcessor, ClocProcessor
from encoder.tokenizer import train_text_tokenizer

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 220), "yellow": (230, 220, 40)}
SHAPES = ("square", "bar", "tower", "dot")
REGIONS_PER_RECORD = (3, 0, 1, 5, 2, 0, 0, 6)  # uneven on purpose: more than 4, and none


def paint_record(index: int) -> tuple[Image.Image, dict]:
    """A non-square picture of coloured rectangles and its record, pixel boxes as drawn."""
    random = np.random.default_rng(index)
    width, height = int(random.integers(40, 72)), int(random.integers(36, 80))
    pixels = np.full((height, width, 3), 128 + int(random.integers(-40, 40)), dtype=np.uint8)
    regions = []
    for _ in range(REGIONS_PER_RECORD[index % len(REGIONS_PER_RECORD)]):
        colour, shape = str(random.choice(list(COLOURS))), str(random.choice(SHAPES))
        w, h = {"square": (14, 14), "bar": (20, 8), "tower": (8, 20), "dot": (6, 6)}[shape]
        left, top = int(random.integers(0, width - w)), int(random.integers(0, height - h))
        pixels[top : top + h, left : left + w] = COLOURS[colour]
        name = f"{colour} {shape}"
        regions.append(
            {"box": [left, top, left + w, top + h], "phrases": [name, f"small {name}"], "score": 1.0, "source": "test"}
        )
    names = [region["phrases"][0] for region in regions]
    captions = [f"a picture of {' and '.join(names)}" if names else f"an empty grey wall {index}", f"Picture number {index}"]
    image = f"{index:06d}.png"
    return Image.fromarray(pixels), {"image": image, "width": width, "height": height, "captions": captions, "regions": regions}


def write_shards(folder, records: int, per_shard: int = 16):
    """`records` painted records as WebDataset tars in `folder`; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, records, per_shard):
        with tarfile.open(folder / f"{first // per_shard:05d}.tar", "w") as tar:
            for index in range(first, min(first + per_shard, records)):
                image, record = paint_record(index)
                encoded = io.BytesIO()
                image.save(encoded, "PNG")
                members = {
                    "png": encoded.getvalue(),
                    "json": json.dumps(record).encode(),
                    "txt": record["captions"][0].encode(),
                }
                for extension, data in members.items():
                    member = tarfile.TarInfo(f"{index:06d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


@pytest.fixture(scope="session")
def region_shards(tmp_path_factory):
    """A folder of two shards, 24 records, 8 of which have no region."""
    return write_shards(tmp_path_factory.mktemp("shards") / "train", 24)


@pytest.fixture(scope="session")
def tiny_texts() -> list[str]:
    return [f"small {colour} {shape}" for colour in COLOURS for shape in SHAPES] + ["a picture of an empty grey wall"]


@pytest.fixture(scope="session")
def tiny_processor(tiny_texts) -> ClocProcessor:
    """A 32 px padding processor with a tokenizer of its own."""
    return ClocProcessor(ClocImageProcessor(size=32), train_text_tokenizer(tiny_texts, 96, 32))


@pytest.fixture()
def tiny_model(tiny_processor) -> ClocModel:
    """A fresh CLOC, the same weights every time, evaluation mode."""
    torch.manual_seed(0)
    return ClocModel(tiny(vocab_size=len(tiny_processor.tokenizer))).eval()


@pytest.fixture(scope="session")
def tiny_folder(tiny_processor, tmp_path_factory):
    """A saved CLOC folder with its processor."""
    folder = tmp_path_factory.mktemp("tiny_cloc")
    torch.manual_seed(0)
    ClocModel(tiny(vocab_size=len(tiny_processor.tokenizer))).save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def painted():
    """`painted(i)` -> (PIL image, record) of the i-th record of `region_shards`."""
    return paint_record
