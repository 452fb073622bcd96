"""Conversations as text and as tokens: boxes written into sentences, labels from the chat template's marks.

A record (LLaVA's JSON with regions) becomes chat messages, the chat template writes them as one string, and the
template's `{% generation %}` marks say which tokens are the assistant's. Labels never come from lengths of re-tokenised
pieces, the source of LLaVA's "tokenization mismatch".
"""

import re

import numpy as np
from transformers import PreTrainedTokenizerBase

from encoder.errors import DataError
from encoder.geometry import Geometry
from mllm.box_text import BoxCodec
from mllm.regions import Region, as_region

IMAGE = "<image>"
IGNORE = -100
PLACEHOLDER = re.compile(r"<(region|box):(\d+)>")
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def write_boxes(text: str, regions: list[Region], geometries: list[Geometry], codec: BoxCodec, token: str = "") -> str:
    """`<region:i>` in `text` becomes the i-th region as words, followed by `token`; `<box:i>` its box as words.

    geometries: of the picture that each region lies in
    """

    def words(match: re.Match) -> str:
        region, geometry = regions[int(match[2])], geometries[int(match[2])]
        return region.box_text(geometry, codec) if match[1] == "box" else region.text(geometry, codec) + token

    return PLACEHOLDER.sub(words, text)


def number_regions(question: str, num_regions: int) -> str:
    """The question with `<region:0>`, `<region:1>`, ... for `<region>`, of which there is one per region, in order."""
    for index in range(question.count("<region>")):
        question = question.replace("<region>", f"<region:{index}>", 1)
    missing = [m[0] for m in PLACEHOLDER.finditer(question) if int(m[2]) >= num_regions]
    if missing:
        raise DataError(f"question '{question}' has {missing[0]}, but {num_regions} boxes came with it; give that box")
    unnamed = set(range(num_regions)) - {int(m[2]) for m in PLACEHOLDER.finditer(question)}
    if unnamed:
        raise DataError(
            f"question '{question}' does not name region {min(unnamed)} of the {num_regions} that came with it, so the model "
            "would not see it; write <region> where it is meant"
        )
    return question


def regions_named(text: str) -> list[int]:
    """Which regions `<region:i>` names, in order, as often as it does."""
    return [int(match[2]) for match in PLACEHOLDER.finditer(text) if match[1] == "region"]


def question_with_boxes(question: str, regions: list, geometry: Geometry, codec: BoxCodec, token: str = "") -> str:
    """A question that names regions by `<region:i>` or, one per region and in order, by `<region>`.

    regions: of each kind that `mllm.regions.as_region` takes; token: written behind each
    """
    question = number_regions(question, len(regions))
    regions = [as_region(value, f"question '{question}', region {i}", geometry) for i, value in enumerate(regions)]
    return write_boxes(question, regions, [geometry] * len(regions), codec, token)


def messages_of(record: dict, geometries: list[Geometry], codec: BoxCodec, token: str = "") -> list[dict]:
    """A validated record -> chat messages.

    geometries: of the record's pictures, in order; token: written behind each region that a question names
    A turn's only picture goes to its start, as in LLaVA; of several each stays where it is written.
    """
    values, where = record.get("regions", []), record.get("_where", "record")
    own = [geometries[value.get("image_index", 0)] for value in values]
    regions = [as_region(value, where, geometry) for value, geometry in zip(values, own, strict=True)]
    messages = []
    for turn in record["conversations"]:
        text = turn["value"]
        if text.count(IMAGE) == 1:
            text = IMAGE + "\n" + text.replace(IMAGE, "").strip()
        mark = token if turn["from"] == "human" else ""
        messages.append({"role": ROLES[turn["from"]], "content": write_boxes(text, regions, own, codec, mark)})
    return messages


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[list[dict]],
    names: list[str],
    pictures: list[list[int]],
    max_length: int,
) -> list[tuple[np.ndarray, np.ndarray, bool]]:
    """Messages -> per conversation (input ids (L,) int32, True where the assistant speaks (L,), whether it was cut).

    names: what to call each conversation in an error (its file and id)
    pictures: how many tokens each of its pictures has in the model; here each is one mark
    max_length: tokens, pictures' included, after which a conversation is cut; a picture is cut off whole
    """
    encoded = tokenizer.apply_chat_template(conversations, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    mark = tokenizer.convert_tokens_to_ids(IMAGE)
    rows = []
    for name, lengths, ids, mask in zip(names, pictures, encoded["input_ids"], encoded["assistant_masks"], strict=True):
        is_mark = np.asarray(ids) == mark
        if is_mark.sum() != len(lengths):
            raise DataError(
                f"{name} has {len(lengths)} pictures, but the chat template writes {is_mark.sum()} {IMAGE} for it; choose another"
            )
        widths = np.ones(len(ids), int)
        widths[is_mark] = lengths
        fits = np.cumsum(widths) <= max_length
        limit, cut = int(fits.sum()), not fits.all()
        ids, mask = np.asarray(ids[:limit], np.int32), np.asarray(mask[:limit], bool)
        if not mask.any():
            raise DataError(
                f"{name} has no supervised token within {max_length} tokens; give it a gpt turn with text, or raise max_length"
            )
        rows.append((ids, mask, cut))
    return rows
