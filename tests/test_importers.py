"""Other projects' conversation files: fixtures in each official format, pixel boxes there and back, bad boxes named."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from encoder.errors import DataError
from encoder.geometry import Geometry
from mllm.box_text import BoxCodec
from mllm.conversation import messages_of
from mllm.importers import IMPORTERS
from mllm.mixture import Source, read_mixture
from mllm.records import check_record, sizes_of

SIZES = {"wide.png": (640, 427), "tall.png": (333, 500), "flat.png": (101, 40)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name, size in SIZES.items():
        Image.new("RGB", size, "gray").save(folder / name)
    return folder


def imported(importer: str, record: dict, pictures) -> dict:
    record = IMPORTERS[importer](record | {"_where": "f.json, id x"}, SIZES.__getitem__)
    check_record(record, pictures)
    return record


def in_padded_square(box, width: int, height: int) -> list[float]:
    """Parts of the square that LLaVA and Shikra pad a picture to, written out here."""
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    return [(box[0] + left) / side, (box[1] + top) / side, (box[2] + left) / side, (box[3] + top) / side]


def as_llava(box, width, height):
    return "[" + ", ".join(str(round(c, 2)) for c in in_padded_square(box, width, height)) + "]"


def as_shikra(box, width, height):
    return "[" + ",".join(f"{c:.3f}" for c in in_padded_square(box, width, height)) + "]"


def as_ferret(box, width, height):
    return "[" + ", ".join(str(int(c * 1000 / side)) for c, side in zip(box, (width, height) * 2, strict=True)) + "]"


def as_qwen(box, width, height):
    x1, y1, x2, y2 = (int(c * 1000 / side) for c, side in zip(box, (width, height) * 2, strict=True))
    return f"<box>({x1},{y1}),({x2},{y2})</box>"


def as_qwen2_5(box, width, height):
    return json.dumps({"bbox_2d": [round(c) for c in box], "label": "dog"})


def as_qwen3(box, width, height):
    return json.dumps({"bbox_2d": [round(c * 1000 / side) for c, side in zip(box, (width, height) * 2, strict=True)]})


# importer -> how it writes, furthest a coordinate may move (parts of the longer side), codec and geometry that write the same
FORMATS = {
    "llava": (as_llava, 0.005, "float2", "pad"),
    "shikra": (as_shikra, 0.0005, "float3", "pad"),
    "ferret": (as_ferret, 0.0005, "int1000", "squash"),
    "qwen": (as_qwen, 0.0005, None, None),
    "qwen2_5": (as_qwen2_5, 0.005, None, None),  # a pixel is a hundredth of the smallest picture
    "qwen3": (as_qwen3, 0.0005, None, None),
}


@pytest.mark.parametrize("importer", FORMATS)
@pytest.mark.parametrize("name", SIZES)
def test_boxes_written_out_come_back_in_pixels(pictures, importer, name):
    write, error, codec, mode = FORMATS[importer]
    width, height = SIZES[name]
    rng, moved = np.random.default_rng(7), 0
    for _ in range(40):
        corners = np.sort(rng.uniform(0, 1, (2, 2, 2)), axis=1) * 0.98 + [[[0, 0], [0.02, 0.02]]]  # (box, corner, xy)
        asked, said = (corners * (width, height)).reshape(2, 4).tolist()
        turns = [f"<image>\nWhat is {write(asked, width, height)}?", f"A dog {write(said, width, height)}."]
        if importer == "qwen":
            turns[0] = turns[0].replace("<image>", f"Picture 1: <img>{name}</img>")
            record = {"conversations": [{"from": f, "value": v} for f, v in zip(("user", "assistant"), turns, strict=True)]}
        else:
            record = {
                "image": name,
                "conversations": [{"from": f, "value": v} for f, v in zip(("human", "gpt"), turns, strict=True)],
            }
        found = imported(importer, record, pictures)
        values = [turn["value"] for turn in found["conversations"]]
        if importer.startswith("qwen") and importer != "qwen":
            values = [re.sub(r'\{"bbox_2d": (<\w+:\d>)(, "label": "dog")?\}', r"\1", value) for value in values]
        assert values == ["<image>\nWhat is <region:0>?", "A dog <box:1>."]
        boxes = np.array([region["box"] for region in found["regions"]])
        # An edge in the padding's last half step is moved to the picture's border, which is nearer to the truth.
        np.testing.assert_allclose(boxes, [asked, said], atol=error * max(width, height) + 1e-9)
        if codec:
            geometries = [Geometry(mode, *size, max(size)) for size in sizes_of(found)]
            # What a training then writes is the file's own text, but for edges that were in the padding.
            written = messages_of(found, geometries, BoxCodec(codec))[1]["content"]
            numbers = [[float(n) for n in text.partition("[")[2].rstrip("].").split(",")] for text in (written, turns[1])]
            step = {"float2": 0.01, "float3": 0.001, "int1000": 1}[codec]
            np.testing.assert_allclose(numbers[0], numbers[1], atol=step + 1e-9)
            moved += sum(a != b for a, b in zip(*numbers, strict=True))
    assert moved <= 8  # of 160


def test_shikras_marks(pictures):
    record = {
        "image": "wide.png",
        "target": {"boxes": [[10, 10, 256, 265], [24, 18, 378, 400], [100, 310, 640, 427]], "points": [[30, 40]]},
        "conversations": [
            {
                "from": "human",
                "value": "How do the dogs <boxes> and the man <boxes> in <image> relate to <points>?",
                "boxes_seq": [[0, 1], [2]],
                "points_seq": [[0]],
            },
            {
                "from": "gpt",
                "value": "The man <boxes> walks them [0.100,0.300,0.200,0.400;0.500,0.500,0.600,0.700].",
                "boxes_seq": [[2]],
            },
        ],
    }
    found = imported("shikra", record, pictures)
    assert [turn["value"] for turn in found["conversations"]] == [
        "How do the dogs <region:0>, <region:1> and the man <region:2> in <image> relate to <region:3>?",
        "The man <box:2> walks them <box:4>, <box:5>.",
    ]
    assert found["regions"][:4] == [
        {"box": [10, 10, 256, 265]}, {"box": [24, 18, 378, 400]}, {"box": [100, 310, 640, 427]}, {"point": [30, 40]},
    ]  # fmt: skip
    assert found["regions"][4]["box"] == pytest.approx([64, 0.3 * 640 - 106, 128, 0.4 * 640 - 106])
    assert not any(key.endswith("_seq") for turn in found["conversations"] for key in turn)


def test_ferrets_marks(pictures):
    mask_utils = pytest.importorskip("pycocotools.mask")
    mask = np.zeros((427, 640), np.uint8, order="F")
    mask[20:40, 100:160] = 1
    rle = mask_utils.encode(mask)
    rle["counts"] = rle["counts"].decode()
    record = {
        "image": "wide.png",
        "image_w": 640,
        "image_h": 427,
        "box_x1y1x2y2": [[[0, 0, 50, 60], [100, 20, 160, 40]], [[5, 6, 70, 80]]],
        "masks": [[None, rle], [rle]],
        "conversations": [
            {"from": "human", "value": "<image>\nWhat are <bbox_location0> and <bbox_location1> at [500, 250] <region_fea>?"},
            {"from": "gpt", "value": "A cat <bbox_location0>."},
        ],
    }
    found = imported("ferret", record, pictures)
    assert [turn["value"] for turn in found["conversations"]] == [
        "<image>\nWhat are <region:0> and <region:1> at <region:2>?", "A cat <box:3>.",
    ]  # fmt: skip
    assert found["regions"][0] == {"box": [0, 0, 50, 60]} and found["regions"][1] == {"mask": rle}
    assert found["regions"][3] == {"box": [5, 6, 70, 80]} and (found["width"], found["height"]) == (640, 427)
    assert found["regions"][2]["point"] == pytest.approx([0.5005 * 640, 0.2505 * 427])


def test_qwens_pictures_and_phrases(pictures):
    turns = [
        {"from": "user", "value": "Picture 1: <img>wide.png</img>\nPicture 2: <img>tall.png</img>\nWhich is wider?"},
        {"from": "assistant", "value": "The first."},
    ]
    found = imported("qwen", {"id": "identity_1", "conversations": turns}, pictures)
    assert found["images"] == ["wide.png", "tall.png"] and [t["from"] for t in found["conversations"]] == ["human", "gpt"]
    assert found["conversations"][0]["value"] == "Picture 1: <image>\nPicture 2: <image>\nWhich is wider?"
    turns = [
        {"from": "user", "value": "Picture 1: <img>wide.png</img>\nFrame the shirt"},
        {"from": "assistant", "value": "<ref>the shirt</ref><box>(588,499),(725,789)</box><box>(0,0),(0,1000)</box>"},
    ]
    found = imported("qwen", {"conversations": turns}, pictures)
    assert [t["value"] for t in found["conversations"]] == ["<image>\nFrame the shirt", "the shirt<box:0><box:1>"]
    assert found["regions"][0]["box"] == pytest.approx([0.5885 * 640, 0.4995 * 427, 0.7255 * 640, 0.7895 * 427])
    assert found["regions"][1]["box"] == pytest.approx([0, 0.0005 * 427, 0.64, 427])  # as wide as its bin
    text = [{"from": "user", "value": "Hello"}, {"from": "assistant", "value": "Hi"}]
    assert "images" not in imported("qwen", {"conversations": text}, pictures)


def test_qwens_json_keeps_its_labels_and_asks_by_points(pictures):
    said = '```json\n[\n  {"bbox_2d": [64, 42.7, 320, 427], "label": "dog"},\n  {\'bbox_2d\': [0,0,640,427]}\n]\n```'
    turns = [{"from": "human", "value": '<image>\nWhat is at {"point_2d": [500, 250]}?'}, {"from": "gpt", "value": said}]
    for importer, box, point in (("qwen2_5", [64, 42.7, 320, 427], [500, 250]), ("qwen3", None, [320, 106.75])):
        known = [dict(turn) for turn in turns]
        if importer == "qwen3":
            known[1]["value"] = said.replace("640,427", "1000,1000")
            box = [0.064 * 640, 0.0427 * 427, 0.32 * 640, 0.427 * 427]
        found = imported(importer, {"image": "wide.png", "conversations": known}, pictures)
        assert found["conversations"][0]["value"] == '<image>\nWhat is at {"point_2d": <region:0>}?'
        expected = '```json\n[\n  {"bbox_2d": <box:1>, "label": "dog"},\n  {\'bbox_2d\': <box:2>}\n]\n```'
        assert found["conversations"][1]["value"] == expected
        assert found["regions"][0]["point"] == pytest.approx(point) and found["regions"][1]["box"] == pytest.approx(box)
        assert found["regions"][2]["box"] == pytest.approx([0, 0, 640, 427])


def test_thin_boxes_and_text_that_is_no_box(pictures):
    turns = [
        {"from": "human", "value": "<image>\nWhere is the pole? Not [1, 2, 3, 4] or [a]."},
        {"from": "gpt", "value": "[0.5, 0.2, 0.5, 0.6]"},
    ]
    found = imported("llava", {"image": "wide.png", "conversations": turns}, pictures)
    assert found["regions"][0]["box"] == pytest.approx([0.495 * 640, 0.2 * 640 - 106, 0.505 * 640, 0.6 * 640 - 106])
    assert found["conversations"][0]["value"].endswith("Not [1, 2, 3, 4] or [a].")
    code = {"conversations": [{"from": "human", "value": "x = [0.5, 7.5]"}, {"from": "gpt", "value": "[0.5, 1.5, 2.5]"}]}
    assert imported("llava", code, pictures)["conversations"] == code["conversations"]


@pytest.mark.parametrize(
    ("importer", "said", "message"),
    [
        ("llava", "[0.1, 0.2, 0.3]", r"'\[0.1, 0.2, 0.3\].*' begins like a box and is none; write \[0.12, 0.34"),
        ("llava", "[0.1, 0.2, 0.3, 0.4", "begins like a box and is none"),
        ("llava", "[0.1, 0.2, 0.3, 1.4]", r"box '\[0.1, 0.2, 0.3, 1.4\]' does not run from left to right"),
        ("llava", "[0.5, 0.2, 0.3, 0.4]", "does not run from left to right"),
        ("llava", "[0.1, 0.01, 0.3, 0.05]", "lies in the padding, outside the picture"),
        ("shikra", "[0.1,0.2,0.3,0.4;0.5,0.6]", "begins like a box and is none"),
        ("shikra", "the man <boxes>", "a turn has 1 <boxes>, but boxes_seq numbers 0"),
        ("ferret", "<bbox_location3>", r"conversations\[1\] has <bbox_location3>, but box_x1y1x2y2 has 0 boxes"),
        ("ferret", "[10, 20, 30]", "begins like a box and is none"),
        ("ferret", "[10, 20, 30, 1040]", "does not run from left to right"),
        ("ferret", "[10, 20]", r"the point \[.*\] stands in an answer"),
        ("qwen", "<box>(10,20),(30)</box>", "begins like a box and is none"),
        ("qwen", "<quad>(1,2),(3,4),(5,6),(7,8)</quad>", "begins like a box and is none"),
        ("qwen2_5", '{"bbox_2d": [1, 2, 3]}', "begins like a box and is none"),
        ("qwen2_5", '{"bbox_2d": [1, 2]}', "has 2 numbers; a bbox_2d has 4, a point_2d 2"),
        ("qwen2_5", '{"bbox_2d": [1, 2, 900, 400]}', "leaves the 640x427 picture"),
        ("qwen3", '{"bbox_2d": [1, 2, 1001, 400]}', "has 1001 thousandths; is it in pixels"),
        ("qwen3", '{"point_2d": [1, 2]}', r"the point \[.*\] stands in an answer"),
    ],
)
def test_a_box_that_cannot_be_read_is_named_by_file_and_record(pictures, tmp_path, importer, said, message):
    shown = "<img>wide.png</img>" if importer == "qwen" else "<image>"
    record = {"id": "r7", "conversations": [{"from": "human", "value": shown}, {"from": "gpt", "value": said}]}
    if importer != "qwen":
        record["image"] = "wide.png"
    (tmp_path / "f.json").write_text(json.dumps([record]))
    with pytest.raises(DataError, match=message) as error:
        read_mixture([Source(str(tmp_path / "f.json"), str(pictures), importer=importer)], 0, progress=False)
    assert str(error.value).startswith(f"{tmp_path / 'f.json'}, id r7: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("importer", IMPORTERS)
def test_what_is_no_conversation_is_left_to_the_check(pictures, importer):
    for broken in ({}, {"conversations": [{"value": 3}]}, {"conversations": "x", "image": "wide.png"}):
        with pytest.raises(DataError, match="conversations"):
            imported(importer, broken, pictures)
