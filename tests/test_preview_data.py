"""The preview as a user calls it: problems counted and listed, samples drawn after the model's transform."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from encoder.errors import DataError

SCRIPT = Path(__file__).parents[1] / "scripts" / "preview_data.py"


@pytest.fixture
def run(monkeypatch, capsys):
    """Calls the script's main in this process -> (exit status, printed lines)."""
    spec = importlib.util.spec_from_file_location("preview_data", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "preview_data", script)
    spec.loader.exec_module(script)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        status = script.main()
        return status, capsys.readouterr().out.splitlines()

    return call


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


def test_shards(run, region_shards, tmp_path):
    status, lines = run(region_shards, "--out", tmp_path / "deep" / "p.png", "--samples", 5)
    assert status == 0 and lines[0] == "24 good records, 0 problems"
    assert lines[-1] == f"5 samples are drawn in {tmp_path / 'deep' / 'p.png'}"
    assert Image.open(tmp_path / "deep" / "p.png").width > 1000


def test_broken_shards_are_counted_and_listed(run, region_shards, tmp_path):
    for shard in region_shards.glob("*.tar"):
        data = shard.read_bytes()
        (tmp_path / shard.name).write_bytes(data if shard.name == "00000.tar" else data[:3000])
    status, lines = run(tmp_path, "--out", tmp_path / "p.png")
    problems = [line for line in lines if line.startswith("problem: ")]
    assert status == 1 and problems and all("00001.tar" in line for line in problems)
    assert any("3000" in line for line in problems)
    assert lines[-1].endswith(str(tmp_path / "p.png"))


def test_conversation_problems(run, conversations):
    folder, record = conversations
    records = [
        record("good"),
        record("gone", image="b.png"),
        record("half", image="half.png"),
        record("outside", box=(10, 5, 90, 15)),
        record("flat", box=(10, 5, 10, 15)),
        record("index", number=3),
    ]
    where = ["--images", folder / "images", "--out", folder / "p.png"]
    status, lines = run(write(folder, records), *where)
    assert status == 1 and lines[0] == "1 good records, 5 problems"
    for name in ("gone", "half", "outside", "flat", "index"):
        assert sum(f"id {name}:" in line for line in lines if line.startswith("problem: ")) == 1, lines
    _, lines = run(write(folder, records), *where, "--listed", 2)
    assert sum(line.startswith("problem: ") for line in lines) == 2
    assert "and 3 more problems; see them with --listed 5" in lines


def test_each_picture_of_a_record_is_drawn_with_its_own_boxes(run, conversations):
    folder, record = conversations
    turns = [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "<box:0>"}]
    several = record("two", image=["a.png", "a.png"]) | {"conversations": turns}
    several["regions"][0]["image_index"] = 1
    (folder / "m.yaml").write_text(json.dumps([{"path": str(write(folder, [several])), "images": str(folder / "images")}]))
    status, lines = run(folder / "m.yaml", "--out", folder / "p.png")
    assert status == 0 and lines[0] == "1 good records, 0 problems"
    sheet = np.asarray(Image.open(folder / "p.png").convert("RGB"))
    framed = [(sheet[8:308, left : left + 300] == (0xE6, 0x19, 0x4B)).all(-1).any() for left in (8, 316)]
    assert framed == [False, True]


@pytest.mark.parametrize("geometry, expected", [("pad", (0.25, 0.375, 0.75, 0.625)), ("squash", (0.25, 0.25, 0.75, 0.75))])
def test_boxes_lie_on_what_the_model_sees(run, conversations, geometry, expected):
    folder, record = conversations
    run(write(folder, [record("good")]), "--images", folder / "images", "--out", folder / "p.png", "--geometry", geometry)
    cell = np.asarray(Image.open(folder / "p.png").convert("RGB"))[8:308, 8:308]
    frame = (cell == (0xE6, 0x19, 0x4B)).all(-1)  # the first box's colour; the tile itself is pure red
    ys, xs = np.nonzero(frame)
    found = np.array([xs.min(), ys.min(), xs.max(), ys.max()]) / 300
    np.testing.assert_allclose(found, expected, atol=0.01)


def test_points_and_masks_are_drawn_where_they_are(run, conversations):
    folder, record = conversations
    sample = record("both")
    sample["conversations"] = [
        {"from": "human", "value": "<image>\nIs <region:0> in <region:1>?"},
        {"from": "gpt", "value": "yes"},
    ]
    sample["regions"] = [{"point": [30, 10]}, {"mask": [[10, 5, 20, 5, 20, 15, 10, 15]]}]
    status, _ = run(write(folder, [sample]), "--images", folder / "images", "--out", folder / "p.png")
    assert status == 0
    cell = np.asarray(Image.open(folder / "p.png").convert("RGB")).astype(int)[8:308, 8:308]
    ys, xs = np.nonzero((cell == (0xE6, 0x19, 0x4B)).all(-1))  # of the point's colour; its label lies left and above
    assert abs(xs.max() - 230) <= 2 and abs(ys.max() - 155) <= 2  # a dot of 5 px around (225, 150)
    half_green = np.abs(cell - (np.array((0x3C, 0xB4, 0x4B)) + (255, 0, 0)) // 2).max(-1) < 5  # over the red tile
    ys, xs = np.nonzero(half_green)
    np.testing.assert_allclose(np.array([xs.min(), ys.max() + 1, xs.max() + 1]) / 300, [0.25, 0.625, 0.5], atol=0.02)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere/*.tar"], r"nowhere/\*.tar matches no file"),
        (["nowhere.json"], "say with --images"),
        (["nowhere.json", "--images", "."], "nowhere.json"),
        (["nowhere.json", "a.tar"], "stands beside other data"),
        (["a.tar", "--samples", "0"], "at least 1"),
        (["a.tar", "--images", "."], "shards hold their images"),
        (["a.tar", "--importer", "llava"], "shards hold their images"),
    ],
)
def test_what_cannot_be_previewed(run, arguments, message, tmp_path):
    with pytest.raises((DataError, FileNotFoundError), match=message):
        run(*arguments, "--out", tmp_path / "p.png")
    assert not (tmp_path / "p.png").exists()


def test_as_a_user_runs_it(tmp_path):
    done = subprocess.run([sys.executable, str(SCRIPT), "nowhere.tar"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.startswith("error: nowhere.tar matches no file;")
