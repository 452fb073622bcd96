"""The preview as a user calls it: problems counted and listed, samples drawn after the model's transform."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


def run(*arguments):
    command = [sys.executable, str(ROOT / "scripts" / "preview_data.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def conversations(tmp_path):
    """A red tile at (10, 5) to (30, 15) of a 40x20 image, and records about it, some broken."""
    image = Image.new("RGB", (40, 20), "white")
    image.paste((255, 0, 0), (10, 5, 30, 15))
    (tmp_path / "images").mkdir()
    image.save(tmp_path / "images" / "a.png")
    data = (tmp_path / "images" / "a.png").read_bytes()
    (tmp_path / "images" / "half.png").write_bytes(data[: len(data) - 25])

    def record(name, image="a.png", box=(10, 5, 30, 15), number=0):
        turns = [{"from": "human", "value": "<image>\nWhere is the tile?"}, {"from": "gpt", "value": f"<box:{number}>"}]
        return {"id": name, "image": image, "conversations": turns, "regions": [{"box": list(box)}]}

    return tmp_path, record


def write(folder, records):
    (folder / "c.json").write_text(json.dumps(records))
    return folder / "c.json"


def test_shards(region_shards, tmp_path):
    done = run(region_shards, "--out", tmp_path / "deep" / "p.png", "--samples", 5)
    assert done.returncode == 0, done.stderr
    assert "24 good records, 0 problems" in done.stdout
    assert done.stdout.strip().splitlines()[-1] == f"5 samples are drawn in {tmp_path / 'deep' / 'p.png'}"
    assert Image.open(tmp_path / "deep" / "p.png").width > 1000


def test_broken_shards_are_counted_and_listed(region_shards, tmp_path):
    for shard in region_shards.glob("*.tar"):
        data = shard.read_bytes()
        (tmp_path / shard.name).write_bytes(data if shard.name == "00000.tar" else data[:3000])
    done = run(tmp_path, "--out", tmp_path / "p.png")
    assert done.returncode == 1
    problems = [line for line in done.stdout.splitlines() if line.startswith("problem: ")]
    assert problems and all("00001.tar" in line for line in problems) and "truncated at byte 3000" in done.stdout
    assert done.stdout.strip().endswith(str(tmp_path / "p.png"))


def test_conversation_problems(conversations):
    folder, record = conversations
    records = [record("good"), record("gone", image="b.png"), record("half", image="half.png"),
               record("outside", box=(10, 5, 90, 15)), record("flat", box=(10, 5, 10, 15)), record("index", number=3)]  # fmt: skip
    done = run(write(folder, records), "--images", folder / "images", "--out", folder / "p.png")
    assert done.returncode == 1 and "1 good records, 5 problems" in done.stdout
    for name in ("gone", "half", "outside", "flat", "index"):
        assert sum(f"id {name}:" in line for line in done.stdout.splitlines() if line.startswith("problem: ")) == 1, done.stdout
    short = run(write(folder, records), "--images", folder / "images", "--out", folder / "p.png", "--listed", 2)
    assert short.stdout.count("problem: ") == 2 and "and 3 more problems" in short.stdout


@pytest.mark.parametrize("geometry, expected", [("pad", (0.25, 0.375, 0.75, 0.625)), ("squash", (0.25, 0.25, 0.75, 0.75))])
def test_boxes_lie_on_what_the_model_sees(conversations, geometry, expected):
    folder, record = conversations
    done = run(write(folder, [record("good")]), "--images", folder / "images", "--out", folder / "p.png", "--geometry", geometry)
    assert done.returncode == 0, done.stderr
    cell = np.asarray(Image.open(folder / "p.png").convert("RGB"))[8:308, 8:308]
    frame = (cell == (0xE6, 0x19, 0x4B)).all(-1)  # the first box's colour; the tile itself is pure red
    ys, xs = np.nonzero(frame)
    found = np.array([xs.min(), ys.min(), xs.max(), ys.max()]) / 300
    np.testing.assert_allclose(found, expected, atol=0.01)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere/*.tar"], "nowhere/*.tar matches no file"),
        (["nowhere.json"], "say with --images"),
        (["nowhere.json", "--images", "."], "nowhere.json"),
        (["nowhere.json", "a.tar"], "stands beside other data"),
        (["a.tar", "--samples", "0"], "at least 1"),
    ],
)
def test_what_cannot_be_previewed(arguments, message, tmp_path):
    done = run(*arguments, "--out", tmp_path / "p.png")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert message in done.stderr and not (tmp_path / "p.png").exists()
