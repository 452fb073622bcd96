"""Records with several pictures, and none, against the stock LlavaProcessor on the same conversations."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mllm_fixtures import write_conversations
from transformers import AutoTokenizer, CLIPImageProcessor, LlavaProcessor

from encoder.errors import DataError
from encoder.processor import OPENAI_MEAN, OPENAI_STD
from mllm.box_text import BoxCodec
from mllm.checkpoint import MllmSettings
from mllm.conversation import ROLES
from mllm.data import ConversationDataset, pixel_collator
from mllm.image_input import ImageInput, read_picture
from mllm.records import check_record, problems_of, read_records
from mllm.tokenizer import add_image_token

SHIPPED = Path(__file__).parents[1] / "weights" / "mllm_clip"
SIZE, PATCH, NUM_TOKENS = 40, 8, 25
A, B, C = "0_0000.png", "0_0001.png", "0_0002.png"


def turns(*values: str) -> list[dict]:
    return [{"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)]


RECORDS = [
    {"id": "list", "image": [A, B], "conversations": turns("<image> beside <image>: which is redder?", "the first")},
    {"id": "turns", "images": [B, C, B], "conversations": turns("<image>\nHere?", "no", "But <image><image> here?", "yes")},
    {"id": "later", "image": C, "conversations": turns("Hello", "hi", "<image>\nWhat is this?", "a square")},
    {"id": "text", "conversations": turns("What is a square?", "four equal sides")},
    {"id": "same", "image": [A, A], "conversations": turns("<image>\n<image>\nIs it the same?", "yes")},
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_conversations(folder, 3)
    (folder / "several.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return folder, AutoTokenizer.from_pretrained(SHIPPED), ImageInput("squash", SIZE, OPENAI_MEAN, OPENAI_STD)


def dataset_of(world, records: str | Path, **more) -> ConversationDataset:
    folder, tokenizer, image = world
    arguments = [str(records)], folder / "images", tokenizer, image, BoxCodec(), NUM_TOKENS, more.pop("max_length", 256)
    return ConversationDataset(*arguments, **more, progress=False)


def test_rows_and_pixels_are_the_stock_processors(world):
    folder, tokenizer, image = world
    dataset = dataset_of(world, folder / "several.jsonl")
    stock = LlavaProcessor(
        CLIPImageProcessor(size={"height": SIZE, "width": SIZE}, do_center_crop=False),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    texts, pictures = [], []
    for record in RECORDS:
        messages = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in record["conversations"]]
        texts.append(tokenizer.apply_chat_template(messages, tokenize=False))
        names = record.get("images", record.get("image", []))
        pictures += [read_picture(folder / "images" / name) for name in ([names] if isinstance(names, str) else names)]
    tokenizer.padding_side = "right"
    expected = stock(text=texts, images=pictures, padding=True, return_tensors="pt", add_special_tokens=False)
    batch = pixel_collator(dataset, add_image_token(tokenizer), tokenizer.pad_token_id)([dataset[i] for i in range(5)])
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], rtol=0, atol=1e-6)
    assert batch["pixel_values"].shape[0] == 8 and len(dataset.image_files) == 3
    assert dataset.lengths.tolist() == batch["attention_mask"].sum(1).tolist()


def test_boxes_are_of_the_picture_they_name(world, tmp_path):
    folder, tokenizer, image = world
    regions = [{"box": [10, 10, 30, 30], "image_index": 1}, {"box": [0, 0, 20, 20]}]
    record = {"image": [A, B], "regions": regions, "conversations": turns("<image> or <image>? <region:1>", "<box:0>")}
    (tmp_path / "r.json").write_text(json.dumps([record]))
    text = tokenizer.decode(dataset_of(world, tmp_path / "r.json")[0].ids)
    sizes = [read_picture(folder / "images" / name).size for name in (A, B)]
    words = [
        BoxCodec().encode(
            image.geometry(*sizes[region.get("image_index", 0)]).boxes_to_model(torch.tensor(region["box"]).double())
        )
        for region in regions
    ]
    assert sizes[0] != sizes[1]
    assert text == f"<s>USER: <image> or <image>? {words[1]} ASSISTANT: {words[0]}</s>"


def test_a_cut_takes_whole_pictures(world, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(RECORDS[1:2]))
    whole = dataset_of(world, tmp_path / "r.json")[0]
    second = int(np.flatnonzero(whole.ids == add_image_token(world[1]))[1])  # after one widened picture
    for room, images in ((NUM_TOKENS, 2), (NUM_TOKENS - 1, 1)):
        row = dataset_of(world, tmp_path / "r.json", max_length=second + NUM_TOKENS - 1 + room)[0]
        assert row.images == whole.images[:images] and row.ids.tolist() == whole.ids[: second + images - 1].tolist()


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"image": [A]}, ["1 pictures need as many <image> in the human turns, 2 found"]),
        ({"image": [A, B, C]}, ["3 pictures need as many <image> in the human turns, 2 found"]),
        ({"images": [A, B]}, ["keys 'image' and 'images' are both given"]),
        ({"image": [A, 7]}, ["give a path or a list of paths"]),
        ({"image": ["no.png", "nor.png"]}, ["no.png does not exist", "nor.png does not exist"]),
        ({"width": [60, 60], "height": [40, 40]}, ["width x height say"]),
        ({"conversations": turns("<image>", "<image>")}, ["<image> in a gpt turn"]),
        ({"regions": [{"box": [0, 0, 1, 1], "image_index": 2}]}, ["image_index is 2, but the record has 2 pictures"]),
        ({"regions": [{"box": [1, 1, 1, 1]}, {"box": 3}]}, ["has no area", "regions[1].box is 3"]),
        ({"regions": {"box": [1, 1, 1, 1]}}, ["regions is a dict"]),
    ],
)
def test_everything_wrong_with_a_record_is_told(world, changes, messages):
    folder = world[0]
    record = read_records(folder / "several.jsonl")[0] | changes
    found = list(problems_of(record, folder / "images"))
    assert len(found) == len(messages)
    for message, problem in zip(messages, found, strict=True):
        assert message in problem and f"{folder / 'several.jsonl'}, line 1, id list: " in problem and "\n" not in problem
    with pytest.raises(DataError) as error:
        check_record(record, folder / "images")
    assert str(error.value) == found[0]


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [
        (160, "5cab2e87baa0e1ade67eae6397adf4869d098bdb2f3d52a19d32b362ffce00ab"),
        (1024, "44045093c3bffaa4c6c2ab665a505c4cf17626a741aa815032879bf99c46a296"),
    ],
)
def test_the_rows_of_recipes_that_exist_have_not_moved(world, tmp_path, max_length, expected):
    """Hashes taken before records could have several pictures and rows several documents."""
    settings = MllmSettings.read(SHIPPED)
    path = write_conversations(tmp_path, 20, seed=3, text_only=3)
    arguments = [path], tmp_path / "images", world[1], settings.image, BoxCodec(settings.codec), 100, max_length
    dataset, digest = ConversationDataset(*arguments, progress=False), hashlib.sha256()
    for index in range(len(dataset)):
        row = dataset[index]
        for values in (row.ids, row.supervised, row.segments, np.int32(row.images[0] if row.images else -1)):
            digest.update(values.tobytes())
    assert digest.hexdigest() == expected
