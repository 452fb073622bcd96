import json

import numpy as np
import pytest
import torch
from mllm_fixtures import write_conversations
from PIL import Image

from encoder.errors import DataError
from encoder.geometry import Geometry
from encoder.processor import OPENAI_MEAN, OPENAI_STD
from mllm.box_text import BoxCodec
from mllm.conversation import IGNORE
from mllm.data import ConversationDataset, pixel_collator
from mllm.image_input import ImageInput, no_picture, read_picture
from mllm.records import check_record, read_records, texts_of
from mllm.templates import choose_template
from mllm.tokenizer import add_image_token, fast_tokenizer, train_sentencepiece

IMAGE = ImageInput("pad", 40, OPENAI_MEAN, OPENAI_STD)
NUM_TOKENS = 25


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    path = write_conversations(folder, 6, text_only=2)
    tokenizer = fast_tokenizer(train_sentencepiece(texts_of(read_records(path)), 360), 256)
    choose_template(tokenizer, "auto")
    dataset = ConversationDataset([path], folder / "images", tokenizer, IMAGE, BoxCodec(), NUM_TOKENS, 256, progress=False)
    return folder, path, tokenizer, dataset


def collator_of(world):
    _, _, tokenizer, dataset = world
    return pixel_collator(dataset, add_image_token(tokenizer), tokenizer.pad_token_id)


def test_rows_are_what_a_processor_by_hand_gives(world):
    folder, path, tokenizer, dataset = world
    record = read_records(path)[0]
    geometry = Geometry("pad", record["width"], record["height"], 40)
    words = [BoxCodec().encode(geometry.boxes_to_model(torch.tensor(r["box"], dtype=torch.float64))) for r in record["regions"]]
    text = "<s>"
    for turn in record["conversations"]:
        value = turn["value"]
        for index, word in enumerate(words):
            value = value.replace(f"<region:{index}>", word).replace(f"<box:{index}>", word)
        text += f"USER: {value} ASSISTANT:" if turn["from"] == "human" else f" {value}</s>"
    assert tokenizer.decode(dataset[0].ids) == text
    assert dataset.lengths[0] == len(dataset[0].ids) - 1 + NUM_TOKENS
    assert [dataset[index].images for index in range(8)] == [(0,), (1,), (2,), (3,), (4,), (5,), (), ()]


def test_a_batch_is_right_padded_with_the_picture_widened(world):
    _, _, tokenizer, dataset = world
    mark = add_image_token(tokenizer)
    batch = collator_of(world)([dataset[0], dataset[6], dataset[1]])
    assert batch["pixel_values"].shape == (2, 3, 40, 40)
    assert (batch["input_ids"] == mark).sum(1).tolist() == [NUM_TOKENS, 0, NUM_TOKENS]
    assert batch["attention_mask"].sum(1).tolist() == dataset.lengths[[0, 6, 1]].tolist()
    for row in range(3):
        length = int(batch["attention_mask"][row].sum())
        assert batch["attention_mask"][row, :length].all()
        assert (batch["input_ids"][row, length:] == tokenizer.pad_token_id).all()
        assert (batch["labels"][row, length:] == IGNORE).all()
        supervised = batch["labels"][row] != IGNORE
        assert torch.equal(batch["labels"][row][supervised], batch["input_ids"][row][supervised])
        assert int(supervised.sum()) == int(dataset[[0, 6, 1][row]].supervised.sum())


def test_a_batch_without_pictures_gets_a_blank_one_without_labels(world):
    _, _, tokenizer, dataset = world
    batch = collator_of(world)([dataset[6], dataset[7]])
    assert batch["pixel_values"].shape == (1, 3, 40, 40) and not batch["pixel_values"].any()
    assert len(batch["input_ids"]) == 3 and (batch["labels"][2] == IGNORE).all()
    assert (batch["input_ids"][2] == add_image_token(tokenizer)).sum() == NUM_TOKENS


def test_pictures_go_through_geometry(world):
    folder, _, _, dataset = world
    picture = read_picture(folder / "images" / dataset.image_files[0])
    square = np.asarray(Geometry("pad", *picture.size, 40).apply(picture), np.float64) / 255
    expected = (square - np.array(OPENAI_MEAN)) / np.array(OPENAI_STD)
    np.testing.assert_allclose(dataset.pixels(0)[0].permute(1, 2, 0), expected, atol=1e-5)
    assert no_picture(IMAGE).shape == (1, 3, 40, 40)


def test_json_lines_read_as_the_list_does(world, tmp_path):
    _, path, _, _ = world
    lines = tmp_path / "same.jsonl"
    lines.write_text("\n".join(json.dumps(r) for r in json.loads(path.read_text())) + "\n")
    strip = lambda records: [{k: v for k, v in r.items() if k != "_where"} for r in records]  # noqa: E731
    assert strip(read_records(lines)) == strip(read_records(path))


def bad(record, **changes):
    return {**json.loads(json.dumps(record)), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conversations": []}, "'conversations' is missing or empty"),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\] lacks"),
        ({"conversations": [{"from": "bot", "value": "<image>"}]}, "'bot'; use human"),
        ({"conversations": [{"from": "human", "value": "<image>"}]}, "no gpt turn, so there is nothing to learn"),
        ({"image": "nowhere.png"}, "nowhere.png does not exist"),
        ({"image": "broken.png"}, "broken.png cannot be read"),
        ({"width": 7}, "width x height say 7x"),
        ({"regions": [{"box": [0, 0, 5, 5]}]}, r"<(box|region):1>, but regions holds 1"),
        ({"regions": [{"box": [5, 5, 5, 9]}, {"box": [0, 0, 5, 5]}]}, r"regions\[0\].box \[5, 5, 5, 9\] has no area"),
        ({"regions": [{"box": [0, 0, 500, 9]}, {"box": [0, 0, 5, 5]}]}, r"regions\[0\].box .* leaves the"),
        ({"regions": [{"bbox": [0, 0, 5, 9]}, {"box": [0, 0, 5, 5]}]}, r"regions\[0\] is {'bbox'"),
        (
            {"conversations": [{"from": "human", "value": "no mark"}, {"from": "gpt", "value": "no"}]},
            "1 pictures need as many <image> in the human turns, 0 found",
        ),
    ],
)
def test_bad_records_are_named_by_file_id_and_key(world, changes, message):
    folder, path, _, _ = world
    (folder / "images" / "broken.png").write_bytes(b"not a picture")
    record = bad(read_records(path)[0], **changes)
    with pytest.raises(DataError, match=message) as error:
        check_record(record, folder / "images")
    assert f"{path}, id scene0" in str(error.value) and "\n" not in str(error.value)


def test_a_record_without_picture_must_not_speak_of_one(world):
    folder, path, _, _ = world
    record = bad(read_records(path)[6])
    record["conversations"][0]["value"] = "<image> hi"
    with pytest.raises(DataError, match="key 'image' is missing"):
        check_record(record, folder / "images")
    record = bad(read_records(path)[6], regions=[{"box": [0, 0, 1, 1]}])
    with pytest.raises(DataError, match="regions are given but key 'image'"):
        check_record(record, folder / "images")


def test_width_and_height_may_be_left_out(world):
    folder, path, _, _ = world
    record = read_records(path)[0]
    size = record.pop("width"), record.pop("height")
    check_record(record, folder / "images")
    assert (record["width"], record["height"]) == size


def test_bad_files(world, tmp_path):
    with pytest.raises(DataError, match="absent.json does not exist"):
        read_records(tmp_path / "absent.json")
    (tmp_path / "cut.json").write_text('[{"id": 1},\n{"id"')
    with pytest.raises(DataError, match="cut.json, line 2: not JSON"):
        read_records(tmp_path / "cut.json")
    (tmp_path / "cut.jsonl").write_text('{"id": 1}\n{"id"\n')
    with pytest.raises(DataError, match="cut.jsonl, line 2: not JSON"):
        read_records(tmp_path / "cut.jsonl")
    (tmp_path / "object.json").write_text("{}")
    with pytest.raises(DataError, match="holds no list of records"):
        read_records(tmp_path / "object.json")
    (tmp_path / "strings.json").write_text('["a"]')
    with pytest.raises(DataError, match="record 0: a str"):
        read_records(tmp_path / "strings.json")
    (tmp_path / "truncated.png").write_bytes(b"")
    with pytest.raises(DataError, match="truncated.png cannot be decoded"):
        read_picture(tmp_path / "truncated.png")
    Image.effect_noise((300, 300), 90).save(tmp_path / "chunk.png")  # of several chunks; Pillow says SyntaxError to a wrong one
    data = (tmp_path / "chunk.png").read_bytes()
    last = data.rindex(b"IDAT")
    (tmp_path / "chunk.png").write_bytes(data[:last] + bytes(4) + data[last + 4 :])
    with pytest.raises(DataError, match="chunk.png cannot be decoded .broken PNG"):
        read_picture(tmp_path / "chunk.png")
    Image.new("RGB", (64, 64), (9, 8, 7)).save(tmp_path / "whole.png")
    _, path, tokenizer, _ = world
    with pytest.raises(DataError, match="folder of images .* does not exist"):
        ConversationDataset([path], tmp_path / "no", tokenizer, IMAGE, BoxCodec(), NUM_TOKENS, 256, progress=False)
