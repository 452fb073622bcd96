import numpy as np
import pytest
import sentencepiece
import torch
from transformers import AutoTokenizer, LlavaConfig

from encoder.errors import DataError
from encoder.geometry import Geometry
from mllm.box_text import BoxCodec
from mllm.conversation import messages_of, question_with_boxes, tokenize
from mllm.templates import choose_template
from mllm.tokenizer import add_image_token, fast_tokenizer, save_tokenizer, train_sentencepiece

TEXTS = [
    f"{question} the {size} {colour} {name} {side}?"
    for question in ("Where is", "What is")
    for size in ("smaller", "bigger")
    for colour in ("red", "blue", "green")
    for name in ("heart", "apple", "bus", "square")
    for side in ("on the left", "at the top")
]
RECORD = {
    "id": "a",
    "image": "a.png",
    "conversations": [
        {"from": "human", "value": "Where is the zebra?\n<image>"},
        {"from": "gpt", "value": "<box:0>"},
        {"from": "human", "value": "What is <region:1>?"},
        {"from": "gpt", "value": "red heart"},
    ],
    "regions": [{"box": [10, 20, 30, 40]}, {"box": [0, 0, 80, 60]}],
}
GEOMETRY = Geometry("pad", 80, 60, 40)


@pytest.fixture(scope="module")
def proto():
    return train_sentencepiece(TEXTS, 420)


@pytest.fixture
def tokenizer(proto):
    tokenizer = fast_tokenizer(proto, 256)
    choose_template(tokenizer, "auto")
    return tokenizer


def test_boxes_and_the_picture_are_written_into_the_turns():
    messages = messages_of(RECORD, [GEOMETRY], BoxCodec())
    assert [message["content"] for message in messages] == [
        "<image>\nWhere is the zebra?",
        "[125, 375, 375, 625]",
        "What is [000, 125, 999, 875]?",
        "red heart",
    ]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2


def test_a_question_names_its_boxes_by_index_or_in_order():
    boxes = [[10, 20, 30, 40], [0, 0, 80, 60]]
    one = question_with_boxes("Is <region> in <region>?", boxes, GEOMETRY, BoxCodec())
    assert one == question_with_boxes("Is <region:0> in <region:1>?", boxes, GEOMETRY, BoxCodec())
    assert one == "Is [125, 375, 375, 625] in [000, 125, 999, 875]?"
    with pytest.raises(DataError, match="<region:1>.*1 boxes"):
        question_with_boxes("Is <region> in <region>?", boxes[:1], GEOMETRY, BoxCodec())
    for question, number in (("What is this?", 0), ("What is <region>?", 1)):
        with pytest.raises(DataError, match=f"does not name region {number} of the 2 that came with it"):
            question_with_boxes(question, boxes, GEOMETRY, BoxCodec())


@pytest.mark.parametrize("template", ["simple", "vicuna_v1", "plain"])
def test_the_mask_is_exactly_the_assistants_text_and_its_end(tokenizer, template):
    choose_template(tokenizer, template)
    messages = messages_of(RECORD, [GEOMETRY], BoxCodec())
    ((ids, mask, cut),) = tokenize(tokenizer, [messages], ["a"], [[25]], 256)
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    spoken = [f"{text}\n" if template == "plain" else f" {text}</s>" for text in answers]
    assert tokenizer.decode(ids[mask]) == "".join(spoken) and not cut
    expected = [i for text in spoken for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert ids[mask].tolist() == expected
    if template != "plain":
        assert tokenizer.eos_token_id in ids[mask] and ids[0] == tokenizer.bos_token_id


def test_a_prompt_is_the_beginning_of_the_training_text(tokenizer):
    messages = messages_of(RECORD, [GEOMETRY], BoxCodec())
    ((ids, mask, _),) = tokenize(tokenizer, [messages[:2]], ["a"], [[25]], 256)
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    assert prompt == ids[: int(np.argmax(mask))].tolist()


def test_a_system_turn_replaces_vicunas_sentence(tokenizer):
    choose_template(tokenizer, "vicuna_v1")
    turns = [{"role": "user", "content": "hi"}]
    assert "curious user" in tokenizer.apply_chat_template(turns, tokenize=False)
    text = tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}, *turns], tokenize=False)
    assert text == "<s>Be brief. USER: hi ASSISTANT:"


def test_processors_lists_of_parts_are_understood(tokenizer):
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]}]
    assert tokenizer.apply_chat_template(parts, tokenize=False) == "<s>USER: <image>\nhi ASSISTANT:"


def test_a_sample_without_supervised_token_is_an_error_with_its_name(tokenizer):
    with pytest.raises(DataError, match="file.json, id 7 has no supervised token within 256"):
        tokenize(tokenizer, [[{"role": "user", "content": "hi"}]], ["file.json, id 7"], [[]], 256)
    messages = messages_of(RECORD, [GEOMETRY], BoxCodec())
    with pytest.raises(DataError, match="within 30 tokens"):  # the picture's 25 tokens count
        tokenize(tokenizer, [messages], ["a"], [[25]], 30)


def test_cutting_counts_the_pictures_tokens(tokenizer):
    messages = messages_of(RECORD, [GEOMETRY], BoxCodec())
    ((ids, _, cut),) = tokenize(tokenizer, [messages], ["a"], [[25]], 60)
    assert cut and len(ids) - 1 + 25 == 60


@pytest.mark.parametrize(
    "text",
    [
        "Where is the zebra? [012, 345, 678, 999]",
        " two  spaces\nand a line, really",
        "unknown: \u6f22\u5b57 \U0001f917 na\u00efve",
        "[ 1,2 ]USER: USER:x ASSISTANT: y",
        "",
        *TEXTS[:20],
    ],
)
def test_the_fast_tokenizer_encodes_as_sentencepiece(proto, tokenizer, text):
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == pieces.encode(text)
    assert tokenizer.decode(ids) == text


def test_a_box_is_seventeen_tokens_and_a_new_word_is_spelled(tokenizer):
    assert len(tokenizer.tokenize("[012, 345, 678, 999]")) == 17
    assert tokenizer.unk_token not in tokenizer.tokenize("quixotic zyzzyva \u00df")


@pytest.mark.parametrize("beside_a_model", [False, True])
def test_saved_and_loaded_it_is_the_same(proto, tokenizer, tmp_path, beside_a_model):
    save_tokenizer(tokenizer, tmp_path, proto)
    if beside_a_model:
        LlavaConfig().save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    messages = messages_of(RECORD, [GEOMETRY], BoxCodec())
    for one, two in zip(
        tokenize(tokenizer, [messages], ["a"], [[25]], 256)[0],
        tokenize(again, [messages], ["a"], [[25]], 256)[0],
        strict=True,
    ):
        assert np.array_equal(one, two)
    assert (tmp_path / "tokenizer.model").read_bytes() == proto
    assert add_image_token(again) == add_image_token(tokenizer) == len(tokenizer) - 1


def test_the_tokenizer_depends_on_the_set_of_texts_only(proto):
    assert train_sentencepiece(list(reversed(TEXTS)) + TEXTS[:5], 420) == proto
    with pytest.raises(DataError, match="no text"):
        train_sentencepiece([], 420)
    with pytest.raises(DataError, match="vocab_size"):
        train_sentencepiece(TEXTS, 20)


def test_template_names_are_checked(tokenizer):
    with pytest.raises(DataError, match="template 'llama_9' is not known"):
        choose_template(tokenizer, "llama_9")
    assert torch.is_tensor(tokenizer("a", return_tensors="pt")["input_ids"])
