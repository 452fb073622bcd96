"""Regions of questions: checked with file and key, written as text, weighed on the patches."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle_tools

from encoder.errors import DataError
from encoder.geometry import Geometry
from mllm.box_text import BoxCodec
from mllm.conversation import messages_of, question_with_boxes, regions_named
from mllm.records import check_record, read_records
from mllm.regions import RegionTable, as_region, parse_region

WIDTH, HEIGHT = 40, 20
GEOMETRY = Geometry("pad", WIDTH, HEIGHT, 40)
OUTLINE = [[10, 5, 30, 5, 30, 15, 10, 15]]


def rle_of(left, top, right, bottom, width=WIDTH) -> dict:
    mask = np.zeros((HEIGHT, width), np.uint8, order="F")
    mask[top:bottom, left:right] = 1
    rle = rle_tools.encode(mask)
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def record_with(regions, question="Is <region:0> here?", answer="yes", **more) -> dict:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"_where": "a.json, id x", "image": "a.png", "conversations": turns, "regions": regions, **more}


@pytest.fixture
def images(tmp_path):
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "a.png")
    return tmp_path


def test_boxes_points_and_masks_become_boxes_and_words():
    box = parse_region({"box": [10, 5, 30, 15]}, "r", WIDTH, HEIGHT)
    point = parse_region({"point": [30, 1]}, "r", WIDTH, HEIGHT)
    outline = parse_region({"mask": OUTLINE}, "r", WIDTH, HEIGHT)
    runs = parse_region({"mask": rle_of(10, 5, 30, 15)}, "r", WIDTH, HEIGHT)
    assert box.box == outline.box == runs.box == (10, 5, 30, 15)
    assert point.box == (28, 0, 32, 3)  # a twentieth of the long side each way, cut at the border
    words = [region.text(GEOMETRY, BoxCodec("float2")) for region in (box, point, outline, runs)]
    assert words == ["[0.25, 0.38, 0.75, 0.62]", "[0.75, 0.28]", words[0], words[0]]
    assert point.box_text(GEOMETRY, BoxCodec("float2")) == "[0.70, 0.25, 0.80, 0.32]"


def test_a_conversation_of_all_kinds(images):
    record = record_with(
        [{"point": [30, 10]}, {"box": [10, 5, 30, 15]}, {"mask": OUTLINE}], "Is <region:0> in <region:2>?", "<box:1> and <box:2>"
    )
    (images / "a.json").write_text(json.dumps([{k: v for k, v in record.items() if k != "_where"}]))
    (read,) = read_records(images / "a.json")
    check_record(read, images)
    contents = [message["content"] for message in messages_of(read, [GEOMETRY], BoxCodec(), "<t>")]
    box = "[250, 375, 750, 625]"
    assert contents == [f"<image>\nIs [750, 500]<t> in {box}<t>?", f"{box} and {box}"]
    asked = question_with_boxes("Is <region> in <region>?", [{"point": [30, 10]}, (10, 5, 30, 15)], GEOMETRY, BoxCodec())
    assert asked == f"Is [750, 500] in {box}?"
    assert regions_named("<region:2> <box:1> <region:0> <region:2>") == [2, 0, 2]


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ({}, r"regions\[0\] is {}; give an object with one of box, point and mask"),
        ([1, 2, 3, 4], r"regions\[0\] is \[1, 2, 3, 4\]; give an object"),
        ({"box": [1, 2, 3, 4], "point": [1, 2]}, r"regions\[0\] has box and point; give an object with one"),
        ({"box": [1, 2, 3]}, r"regions\[0\].box is \[1, 2, 3\]; give four numbers x1, y1, x2, y2 in pixels"),
        ({"box": [1, 2, 3, "4"]}, "give four numbers"),
        ({"box": [10, 5, 50, 15]}, r"regions\[0\].box \[10, 5, 50, 15\] has no area or leaves the 40x20 picture"),
        ({"point": [1]}, r"regions\[0\].point is \[1\]; give two numbers x, y in pixels"),
        ({"point": [1, float("nan")]}, "give two numbers"),
        ({"point": [41, 1]}, r"regions\[0\].point \[41, 1\] lies outside the 40x20 picture"),
        ({"mask": []}, r"regions\[0\].mask is no COCO polygon and no run-length encoding \(it is \[\]\)"),
        ({"mask": [[1, 2, 3, 4]]}, "a polygon is x, y of three points or more"),
        ({"mask": "abc"}, r"\(it is abc\)"),
        ({"mask": {"size": [20, 40], "counts": [1, 2]}}, "its runs add up to 3 pixels, 800 are needed"),
        ({"mask": {"size": [20, 40]}}, "no run-length encoding"),
        ({"mask": rle_of(0, 0, 9, 9, width=30)}, "is of 30x20 px, its picture of 40x20"),
        ({"mask": {"size": [20, 40], "counts": "0123"}}, "no run-length encoding"),
        ({"mask": [[50, 5, 60, 5, 60, 15]]}, "covers no pixel"),
    ],
)
def test_bad_regions_are_named_with_file_and_key(images, region, message):
    with pytest.raises(DataError, match=f"a.json, id x: {message}" if message.startswith("regions") else message):
        check_record(record_with([region]), images)


@pytest.mark.parametrize("value", [(20, 4, 4, 20), (4, 20, 20, 4), (float("nan"), 4, 20, 20), ("a", 4, 20, 20), (1, 2, 3), 7])
def test_what_a_caller_gives_for_a_box_must_be_one(value):
    with pytest.raises(DataError, match="question 'q', region 0 is .*; give a box x1, y1, x2, y2 in pixels"):
        as_region(value, "question 'q', region 0", GEOMETRY)
    assert as_region([-5, 4, 400, 4], "r", GEOMETRY).box == (-5.0, 4.0, 400.0, 4.0)


def test_a_point_is_no_answer_and_regions_need_their_picture(images):
    with pytest.raises(DataError, match=r"conversations\[1\] has <box:0>, but that region is a point"):
        check_record(record_with([{"point": [1, 2]}], "Where?", "<box:0>"), images)
    with pytest.raises(DataError, match="regions holds 1; add that region"):
        check_record(record_with([{"point": [1, 2]}], "Is <region:1> here?"), images)
    record = record_with([{"point": [1, 2]}])
    record["conversations"][0]["value"] = "Is <region:0> here?"
    del record["image"]
    with pytest.raises(DataError, match="key 'image' is missing"):
        check_record(record, images)


def test_patches_weigh_what_they_hold_of_a_region():
    """Against the share of each patch counted pixel by pixel; patches are of 8 px, the picture lies 10 px from the top."""
    table = RegionTable("pooling", 5)
    for value in ({"mask": rle_of(3, 2, 20, 13)}, {"box": [3, 2, 20, 13]}, {"point": [20, 10]}):
        table.add(parse_region(value, "r", WIDTH, HEIGHT), GEOMETRY, image=7)
    covered = np.zeros((3, 40, 40))
    covered[:2, 12:23, 3:20] = 1
    covered[2, 18:22, 18:22] = 1
    expected = covered.reshape(3, 5, 8, 5, 8).sum((2, 4))
    expected = (expected / expected.sum((1, 2), keepdims=True)).reshape(3, 25)
    weights = table.inputs(np.array([0, 1, 2]))["region_weights"]
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float32), atol=1e-6, rtol=0)
    assert table.images.tolist() == [7, 7, 7] and table.inputs(np.zeros(0, int))["region_weights"].shape == (0, 25)
    boxes = RegionTable("prompter", 5)
    boxes.add(parse_region({"box": [-1, 0, 20.5, 20]}, "r", WIDTH, HEIGHT), GEOMETRY, image=0)
    torch.testing.assert_close(boxes.inputs(np.array([0]))["region_boxes"], torch.tensor([[0, 0.25, 0.5125, 0.75]]))
