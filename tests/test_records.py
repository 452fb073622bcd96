"""Region records: what is accepted, and that each problem gets one sentence with place, key and value."""

import copy
import json

import pytest

from encoder.data.records import Region, parse_record, parse_sample
from encoder.errors import DataError

GOOD = {
    "image": "000001.png",
    "width": 80,
    "height": 60,
    "captions": ["a bus and a red apple"],
    "regions": [
        {"box": [1, 2, 30.5, 40], "phrases": ["bus", "large bus"], "score": 0.5, "source": "scenes"},
        {"box": [40, 10, 80.5, 60], "phrases": ["red apple"]},
    ],
}


def changed(path, value=None, delete=False):
    record = copy.deepcopy(GOOD)
    *parents, last = path
    place = record
    for key in parents:
        place = place[key]
    if delete:
        del place[last]
    else:
        place[last] = value
    return record


def test_good_record_from_bytes_and_dict():
    record = parse_record(json.dumps(GOOD).encode(), "here")
    assert record == parse_record(GOOD, "here")
    assert (record.image, record.width, record.height, record.captions) == ("000001.png", 80, 60, ("a bus and a red apple",))
    assert record.regions[0] == Region((1.0, 2.0, 30.5, 40.0), ("bus", "large bus"), 0.5, "scenes")
    # Half a pixel outside is an annotator's rounding: clipped.
    assert record.regions[1] == Region((40.0, 10.0, 80.0, 60.0), ("red apple",), 1.0, "")


def test_no_regions_and_further_keys_are_fine():
    assert parse_record({**GOOD, "regions": [], "licence": "CC-BY"}, "here").regions == ()


@pytest.mark.parametrize("key", ["image", "width", "height", "captions", "regions"])
def test_missing_key(key):
    with pytest.raises(DataError, match=f"^a.tar, 1.json: key '{key}' is missing"):
        parse_record(changed([key], delete=True), "a.tar, 1.json")


@pytest.mark.parametrize("key", ["box", "phrases"])
def test_missing_key_of_a_region(key):
    with pytest.raises(DataError, match=rf"key 'regions\[1\].{key}' is missing"):
        parse_record(changed(["regions", 1, key], delete=True), "here")


@pytest.mark.parametrize(
    "path, value, message",
    [
        (["width"], 0, "width is 0"),
        (["width"], 80.0, "width is 80.0"),
        (["height"], True, "height is true"),
        (["height"], "60", 'height is "60"'),
        (["image"], "", 'image is ""'),
        (["captions"], [], r"captions is \[\]"),
        (["captions"], "a bus", 'captions is "a bus"; give a list'),
        (["captions"], ["a bus", " "], "no empty one"),
        (["regions"], None, "regions is null; give a list"),
        (["regions", 0], [1, 2, 3, 4], r"regions\[0\] is \[1, 2, 3, 4\]"),
        (["regions", 0, "phrases"], [], r"regions\[0\].phrases is \[\]"),
        (["regions", 0, "phrases"], [3], r"regions\[0\].phrases is \[3\]"),
        (["regions", 0, "score"], "high", r"regions\[0\].score"),
        (["regions", 0, "source"], 7, r"regions\[0\].source is 7"),
        (["regions", 0, "box"], [1, 2, 3], "four finite numbers"),
        (["regions", 0, "box"], [1, 2, float("nan"), 4], "four finite numbers"),
        (["regions", 0, "box"], [1, 2, float("inf"), 4], "four finite numbers"),
        (["regions", 0, "box"], [1, 2, 10**400, 4], "four finite numbers"),
        (["regions", 0, "box"], ["1", 2, 3, 4], "four finite numbers"),
        (["regions", 0, "box"], [5, 5, 5, 9], r"regions\[0\].box \[5, 5, 5, 9\] has no area"),
        (["regions", 0, "box"], [9, 5, 5, 9], "has no area"),
        (["regions", 1, "box"], [70, 5, 90, 9], r"regions\[1\].box \[70, 5, 90, 9\] lies outside its 80x60 image"),
        (["regions", 0, "box"], [-5, 5, 10, 9], "lies outside"),
        (["regions", 0, "box"], [80.2, 5, 80.9, 9], "lies outside"),
    ],
)
def test_one_sentence_per_problem(path, value, message):
    with pytest.raises(DataError, match=message) as caught:
        parse_record(changed(path, value), "a.tar, 1.json")
    assert str(caught.value).startswith("a.tar, 1.json: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b'"text"', b"\xff\xfe\x00"])
def test_not_a_json_object(text):
    with pytest.raises(DataError, match="^here "):
        parse_record(text, "here")


def test_a_caption_in_the_txt_is_no_alt_text():
    record = {"image": "a.png", "width": 8, "height": 8, "captions": ["one", "two"], "regions": []}
    for text, expected in (("two\n", ""), ("a web page's words", "a web page's words")):
        found = parse_sample(json.dumps(record).encode(), text.encode(), "a.png", (8, 8), "shard.tar, a")
        assert found.alt_text == expected and list(found.captions) == ["one", "two"]
