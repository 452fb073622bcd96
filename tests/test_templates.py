"""Chat templates against the published texts of their families, written out by hand, on tokenizers of the same make."""

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from encoder.errors import DataError
from mllm.conversation import tokenize
from mllm.templates import TEMPLATES, choose_template, end_token_ids
from mllm.tokenizer import add_image_token

CHAT = [
    {"role": "user", "content": "<image>\nWhere is the bus?"},
    {"role": "assistant", "content": "[012, 345, 678, 999]"},
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "a red bus"},
]
SYSTEM = {"role": "system", "content": "Be brief."}
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
    "answers to the user's questions."
)
QWEN = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
SMOLLM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
THOUGHT = "<think>\n\n</think>\n\n"
FIRST, LAST = "<image>\nWhere is the bus?", "What is it?"
A, B = "[012, 345, 678, 999]", "a red bus"
# Per family: the whole chat, what of it the assistant says, how a system turn opens it, and the prompt of one question.
CHATML_TURNS = (
    f"<|im_start|>user\n{FIRST}<|im_end|>\n<|im_start|>assistant\n{A}<|im_end|>\n"
    f"<|im_start|>user\n{LAST}<|im_end|>\n<|im_start|>assistant\n{{}}{B}<|im_end|>\n"
)
CHATML_PROMPT = f"<|im_start|>user\n{LAST}<|im_end|>\n<|im_start|>assistant\n"
PUBLISHED = {
    "simple": (
        f"<s>USER: {FIRST} ASSISTANT: {A}</s>USER: {LAST} ASSISTANT: {B}</s>",
        [f" {A}</s>", f" {B}</s>"],
        "<s>Be brief. USER: <image>",
        f"<s>USER: {LAST} ASSISTANT:",
    ),
    "vicuna_v1": (
        f"<s>{VICUNA} USER: {FIRST} ASSISTANT: {A}</s>USER: {LAST} ASSISTANT: {B}</s>",
        [f" {A}</s>", f" {B}</s>"],
        "<s>Be brief. USER: <image>",
        f"<s>{VICUNA} USER: {LAST} ASSISTANT:",
    ),
    "llama_2": (
        f"<s>[INST] {FIRST} [/INST] {A} </s><s>[INST] {LAST} [/INST] {B} </s>",
        [f" {A} </s>", f" {B} </s>"],
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>",
        f"<s>[INST] {LAST} [/INST]",
    ),
    "mistral": (
        f"<s>[INST] {FIRST}[/INST] {A}</s>[INST] {LAST}[/INST] {B}</s>",
        [f" {A}</s>", f" {B}</s>"],
        "<s>[INST] Be brief.\n\n<image>",
        f"<s>[INST] {LAST}[/INST]",
    ),
    "llama_3": (
        f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{FIRST}<|eot_id|>"
        f"<|start_header_id|>assistant<|end_header_id|>\n\n{A}<|eot_id|>"
        f"<|start_header_id|>user<|end_header_id|>\n\n{LAST}<|eot_id|>"
        f"<|start_header_id|>assistant<|end_header_id|>\n\n{B}<|eot_id|>",
        [f"{A}<|eot_id|>", f"{B}<|eot_id|>"],
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user",
        f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{LAST}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "gemma": (
        f"<bos><start_of_turn>user\n{FIRST}<end_of_turn>\n<start_of_turn>model\n{A}<end_of_turn>\n"
        f"<start_of_turn>user\n{LAST}<end_of_turn>\n<start_of_turn>model\n{B}<end_of_turn>\n",
        [f"{A}<end_of_turn>", f"{B}<end_of_turn>"],
        "<bos><start_of_turn>user\nBe brief.\n\n<image>",
        f"<bos><start_of_turn>user\n{LAST}<end_of_turn>\n<start_of_turn>model\n",
    ),
    "chatml": (CHATML_TURNS.format(""), [f"{A}<|im_end|>", f"{B}<|im_end|>"], None, CHATML_PROMPT),
    "qwen_2_5": (QWEN + CHATML_TURNS.format(""), [f"{A}<|im_end|>", f"{B}<|im_end|>"], None, QWEN + CHATML_PROMPT),
    "qwen_3": (CHATML_TURNS.format(THOUGHT), [f"{A}<|im_end|>", f"{B}<|im_end|>"], None, CHATML_PROMPT + THOUGHT),
    "smollm_2": (SMOLLM + CHATML_TURNS.format(""), [f"{A}<|im_end|>", f"{B}<|im_end|>"], None, SMOLLM + CHATML_PROMPT),
}
# Unmarked templates that say the same as the checkpoints' do.
UNMARKED = {
    "smollm_2": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '"
    + SMOLLM
    + "' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama_2": "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]'"
    " }}{% elif m['role'] == 'assistant' %}{{ ' '  + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + "
    "m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
}


def llama_like(special: list[str], prefix: bool = True, **tokens) -> PreTrainedTokenizerFast:
    """Sentencepiece's make: spaces are letters, a space before all where `prefix`, bytes for the unknown."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    start = [normalizers.Prepend("▁")] if prefix else []
    if not prefix:  # Gemma's: ends of lines are pieces of their own
        tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    tokenizer.normalizer = normalizers.Sequence([*start, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return trained(tokenizer, ["<unk>", *(f"<0x{i:02X}>" for i in range(256))], special, **tokens)


def bytes_like(special: list[str], **tokens) -> PreTrainedTokenizerFast:
    """Llama 3's and Qwen's make: pieces of bytes, cut first into words, numbers, signs and ends of lines."""
    tokenizer, words = Tokenizer(BPE()), Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
    split, as_bytes = pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return trained(tokenizer, [], special, **tokens)


def trained(tokenizer: Tokenizer, plain: list[str], special: list[str], **tokens) -> PreTrainedTokenizerFast:
    # Little else than the templates' own words, so that pieces reach across the borders of what is said.
    texts = [text for published in PUBLISHED.values() for text in (published[0].replace("<", " "), *published[1])]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=plain, initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if not plain else []
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)
    fast.add_special_tokens({"additional_special_tokens": special})
    add_image_token(fast)
    return fast


IM, TURNS, HEADERS = ["<|im_start|>", "<|im_end|>"], ["<start_of_turn>", "<end_of_turn>"], ["<|start_header_id|>"]
MAKES = {
    **dict.fromkeys(
        ("simple", "vicuna_v1", "llama_2"), lambda: llama_like([], bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    ),
    "mistral": lambda: llama_like(["[INST]", "[/INST]"], bos_token="<s>", eos_token="</s>", unk_token="<unk>"),
    "gemma": lambda: llama_like(TURNS, prefix=False, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"),
    "llama_3": lambda: bytes_like(
        [*HEADERS, "<|end_header_id|>", "<|eot_id|>"], bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
    ),
    **dict.fromkeys(("chatml", "qwen_2_5"), lambda: bytes_like(IM, eos_token="<|endoftext|>")),
    "qwen_3": lambda: bytes_like([*IM, "<think>", "</think>"], eos_token="<|im_end|>"),
    "smollm_2": lambda: bytes_like(IM, bos_token="<|im_start|>", eos_token="<|im_end|>"),
}


@pytest.fixture(scope="module")
def tokenizers():
    return {name: make() for name, make in MAKES.items()}


def test_every_template_has_its_published_text():
    assert {*PUBLISHED, "plain"} == set(TEMPLATES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_text_is_the_published_one(tokenizers, name):
    tokenizer, (whole, _, with_system, prompt) = tokenizers[name], PUBLISHED[name]
    assert choose_template(tokenizer, name) == name
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == whole
    assert tokenizer.apply_chat_template(CHAT[2:3], tokenize=False, add_generation_prompt=True) == prompt
    opened = tokenizer.apply_chat_template([SYSTEM, *CHAT], tokenize=False)
    assert opened.startswith(with_system or "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>")
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is the bus?"}]}]
    assert tokenizer.apply_chat_template(parts + CHAT[1:], tokenize=False) == whole


@pytest.mark.parametrize("name", PUBLISHED)
def test_labels_are_exactly_what_the_assistant_says_and_its_end(tokenizers, name):
    """From character offsets alone: a token is supervised where it covers a character that the assistant says."""
    tokenizer, (whole, said, *_) = tokenizers[name], PUBLISHED[name]
    choose_template(tokenizer, name)
    ((ids, mask, _),) = tokenize(tokenizer, [CHAT], ["a"], [[1]], 500)
    spoken, position = np.zeros(len(whole), bool), 0
    for part in said:
        position = whole.index(part, position)
        spoken[position : position + len(part)] = True
        position += len(part)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    assert ids.tolist() == encoded["input_ids"]
    expected = [bool(spoken[start:end].any()) for start, end in encoded["offset_mapping"]]
    assert mask.tolist() == expected
    inside = [bool(spoken[start:end].all()) for start, end in encoded["offset_mapping"]]
    assert inside == expected, "a token reaches across the border of an answer"
    # The prompt of the first question is how the whole begins, so that training and asking meet.
    prompt = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    if name != "qwen_3":  # whose earlier answers are published without the empty thought
        assert prompt == ids[: int(np.argmax(mask))].tolist()
    ends = [tokenizer.convert_tokens_to_ids(part[part.rindex("<") :]) for part in said]
    assert ends[0] in end_token_ids(tokenizer) and tokenizer.eos_token_id in end_token_ids(tokenizer)
    assert set(ids[mask].tolist()) & set(end_token_ids(tokenizer)) == set(ends)


@pytest.mark.parametrize("name", UNMARKED)
def test_a_checkpoints_unmarked_template_gets_ours_of_the_same_text(tokenizers, name):
    tokenizer = tokenizers[name]
    tokenizer.chat_template = UNMARKED[name]
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert text == PUBLISHED[name][0]
    assert choose_template(tokenizer, "auto") == name
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == text


def test_an_unknown_unmarked_template_is_not_replaced_in_silence(tokenizers):
    tokenizer = tokenizers["llama_2"]
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="does not mark the assistant's text.*name the nearest in template: simple, "):
        choose_template(tokenizer, "auto")
    tokenizer.chat_template = None
    assert choose_template(tokenizer, "auto") == "simple"


def test_an_own_mark_with_a_newline_inside_still_ends_at_the_mark(tokenizers):
    tokenizer = tokenizers["chatml"]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% generation %}{{ m['content'] + '<|im_end|>\n' }}"
        "{% endgeneration %}{% endfor %}"
    )
    assert choose_template(tokenizer, "auto") == "own"
    ends = [tokenizer.convert_tokens_to_ids(mark) for mark in ("<|im_end|>", "<|endoftext|>")]
    assert end_token_ids(tokenizer) == sorted(ends)
