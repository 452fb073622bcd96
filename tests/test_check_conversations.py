"""The validator of conversations as a user calls it: everything wrong is listed with file and line or id, and counted."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from encoder.errors import DataError

SCRIPT = Path(__file__).parents[1] / "scripts" / "check_conversations.py"


@pytest.fixture
def run(monkeypatch, capsys):
    """Calls the script's main in this process -> (exit status, printed lines)."""
    spec = importlib.util.spec_from_file_location("check_conversations", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        status = script.main()
        return status, capsys.readouterr().out.splitlines()

    return call


@pytest.fixture
def world(tmp_path):
    Image.new("RGB", (40, 20), "white").save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) - 25])
    return tmp_path


def record(answer: str = "<box:0>", **changes) -> dict:
    turns = [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": answer}]
    return {"image": "a.png", "conversations": turns, "regions": [{"box": [1, 2, 3, 4]}]} | changes


def test_lines_of_a_file_are_all_named(run, world):
    lines = [
        json.dumps(record(id="good")),
        json.dumps(record("<box:2> <box:3>", id="two")),
        '{"id": "cut"',
        "",
        "[1]",
        json.dumps(record(image="no.png")),
        json.dumps(record(image="half.png")),
    ]
    (world / "c.jsonl").write_text("\n".join(lines))
    status, printed = run(world / "c.jsonl", "--images", world)
    places = [line.removeprefix(f"problem: {world / 'c.jsonl'}, ").split(":")[0] for line in printed[:-2]]
    assert sorted(places) == ["line 2, id two", "line 2, id two", "line 3", "line 5", "line 6"]
    assert status == 1 and printed[-2] == f"{world / 'c.jsonl'}: 2 good records, 5 problems"
    assert printed[-1] == "2 good records, 5 problems, 2 pictures"
    status, printed = run(world / "c.jsonl", "--images", world, "--decode")
    assert status == 1 and printed[-1] == "1 good records, 6 problems, 2 pictures"
    assert any(
        line.startswith(f"problem: {world / 'c.jsonl'}, line 7: image ") and "cannot be decoded" in line for line in printed
    )


@pytest.mark.parametrize("importer", ["conversations", "llava"])
def test_values_of_the_wrong_kind_are_problems_and_not_crashes(run, world, importer):
    turns = record()["conversations"]
    bad = [
        record(conversations=[turns[0] | {"from": ["human"]}, turns[1]]),
        record(regions=[{"box": [1, 2, 3, 4], "image_index": 0.0}]),
        record(image=5),
        record(image=[5]),
    ]
    (world / "bad.json").write_text(json.dumps(bad))
    (world / "latin.json").write_bytes(json.dumps([record("caf\u00e9")], ensure_ascii=False).encode("latin-1"))
    flags = "--images", world, "--importer", importer
    status, printed = run(world / "bad.json", world / "latin.json", *flags)
    assert status == 1 and printed[-1].startswith("0 good records, 5 problems")
    said = ["from' or 'value' as text", "image_index is 0.0", "'image' is 5;", "'image' is [5];", "latin.json is no UTF-8 text"]
    assert [text for text in said if not any(text in line for line in printed)] == []


def test_a_mixture_is_checked_whole_whatever_its_weights(run, world):
    (world / "good.json").write_text(json.dumps([record(), record()]))
    (world / "llava.json").write_text(json.dumps([record("[0.1, 0.4, 0.2, 0.5]", id=4), record("[0.1, 0.9]", id=5)]))
    (world / "broken.json").write_text("[{")
    entries = [
        {"path": str(world / "good.json"), "images": str(world), "count": 1},
        {"path": str(world / "llava.json"), "images": str(world), "importer": "llava", "weight": 0.5},
        {"path": str(world / "broken.json")},
        {"path": str(world / "absent.json")},
    ]
    (world / "mixture.yaml").write_text(json.dumps(entries))
    status, printed = run(world / "mixture.yaml")
    problems = [line for line in printed if line.startswith("problem: ")]
    assert status == 1 and printed[-1] == "3 good records, 3 problems, 1 pictures"
    assert f"{world / 'llava.json'}, id 5: '[0.1, 0.9]'" in problems[0] and "broken.json, line 1: not JSON" in problems[1]
    assert "absent.json does not exist" in problems[2]


def test_a_good_file_leaves_with_zero(run, world):
    (world / "good.json").write_text(json.dumps([record(image=["a.png", "a.png"], conversations=[
        {"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "<box:0>"}])]))  # fmt: skip
    status, printed = run(world / "good.json", "--images", world)
    assert status == 0 and printed == [
        f"{world / 'good.json'}: 1 good records, 0 problems",
        "1 good records, 0 problems, 1 pictures",
    ]


def test_pictures_outside_their_folder_are_named(run, world):
    """By `..` or as an absolute path; an absolute path into the folder, or of the folder /, is meant."""
    (world / "inside").mkdir()
    Image.new("RGB", (40, 20), "white").save(world / "inside" / "b.png")
    names = ["b.png", "../a.png", str(world / "a.png"), "b.png/../../a.png", str(world / "inside" / "b.png"), "a\0b"]
    (world / "c.jsonl").write_text("\n".join(json.dumps(record(image=name)) for name in names))
    status, printed = run(world / "c.jsonl", "--images", world / "inside")
    assert status == 1 and printed[-1] == "2 good records, 4 problems, 1 pictures"
    assert [line.split(", ")[1].split(":")[0] for line in printed[:4]] == ["line 2", "line 3", "line 4", "line 6"]
    assert printed[0].endswith(f"line 2: image '../a.png' leaves the folder of images {world / 'inside'}; correct it")
    assert printed[1].endswith("; name the folder that holds it, or / where any absolute path is meant")
    absolute = [json.dumps(record(image=str(world / name))) for name in ("a.png", "inside/b.png")]
    (world / "c.jsonl").write_text("\n".join(absolute))
    assert run(world / "c.jsonl", "--images", "/")[0] == 0


def test_what_is_good_is_written_in_our_form(run, world, tmp_path):
    """A file of another project with what is gone left out: it trains by itself, and says the same of the same pictures."""
    floats = record("[0.12, 0.34, 0.56, 0.70]", id=1) | {"regions": []}
    kept = [floats, floats | {"id": 2}]
    (world / "c.json").write_text(json.dumps([kept[0], floats | {"image": "gone.png"}, floats | {"image": "half.png"}, kept[1]]))
    flags = ["--images", world, "--importer", "llava", "--good", tmp_path / "good.json"]
    status, printed = run(world / "c.json", *flags, "--decode")
    assert status == 1 and printed[-1] == f"2 good records, 2 problems, 2 pictures; the good ones are in {tmp_path / 'good.json'}"
    good = json.loads((tmp_path / "good.json").read_text())
    assert [each["id"] for each in good] == [1, 2] and not any(key.startswith("_") for each in good for key in each)
    (region,) = good[0]["regions"]
    above = (40 - 20) / 2  # of the padded square
    assert region["box"] == pytest.approx([0.12 * 40, 0.34 * 40 - above, 0.56 * 40, 0.70 * 40 - above])
    assert run(tmp_path / "good.json", "--images", world, "--decode")[0] == 0
    with pytest.raises(DataError, match="good.json exists already"):
        run(world / "c.json", *flags)
    with pytest.raises(DataError, match="would hold records of 2 files"):
        run(world / "c.json", world / "c.json", *flags[:-1], tmp_path / "other.json")
