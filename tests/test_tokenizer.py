"""The tokenizer trained on its own captions: T5's special tokens, no unknown names, the same from the same texts."""

import pytest
from transformers import AutoTokenizer

from encoder.errors import DataError
from encoder.tokenizer import train_text_tokenizer

TEXTS = ["a red heart", "Small red heart", "the smaller apple left of the bus", "two green books and a taxi"] * 5


def test_special_tokens_and_round_trip():
    tokenizer = train_text_tokenizer(TEXTS, 120, 24)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert len(tokenizer) <= 120
    for text in ("a red heart", "the smaller apple left of the bus"):
        ids = tokenizer(text)["input_ids"]
        assert ids[-1] == 1 and 1 not in ids[:-1]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_new_name_is_spelled_out_not_unknown():
    tokenizer = train_text_tokenizer(TEXTS, 120, 64)
    ids = tokenizer("purple xylophone, 42%!")["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "purple xylophone, 42%!"


def test_long_texts_are_cut_and_still_end():
    tokenizer = train_text_tokenizer(TEXTS, 120, 8)
    ids = tokenizer("the smaller apple left of the bus " * 4, truncation=True)["input_ids"]
    assert len(ids) == 8 and ids[-1] == 1


def test_depends_on_the_set_of_texts_alone():
    one, two = train_text_tokenizer(TEXTS, 120, 24), train_text_tokenizer(reversed(TEXTS[:4]), 120, 24)
    assert one.get_vocab() == two.get_vocab()
    assert one("a small red apple")["input_ids"] == two("a small red apple")["input_ids"]


def test_few_texts_give_fewer_pieces_than_asked():
    assert len(train_text_tokenizer(["a red heart"], 5000, 24)) < 200


def test_saved_and_loaded_the_same(tmp_path):
    tokenizer = train_text_tokenizer(TEXTS, 120, 24)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("small red heart", "purple xylophone"):
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.model_max_length == 24


@pytest.mark.parametrize("vocab_size, hint", [(30, "give at least the 7. of their characters$"), (0, "give a few hundred$")])
def test_too_few_pieces_are_one_sentence(vocab_size, hint):
    with pytest.raises(DataError, match=f"^vocab_size {vocab_size} is too small for a .* of these 4 different texts; {hint}"):
        train_text_tokenizer(TEXTS, vocab_size, 24)
