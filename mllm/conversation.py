"""Conversations as text and as tokens: boxes written into sentences, labels from the chat template's marks.

A record (LLaVA's JSON with regions) becomes chat messages, the chat template writes them as one string, and the
template's `{% generation %}` marks say which tokens are the assistant's. Labels never come from lengths of re-tokenised
pieces, the source of LLaVA's "tokenization mismatch".
"""

import re

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from encoder.errors import DataError
from encoder.geometry import Geometry
from mllm.box_text import BoxCodec

IMAGE = "<image>"
IGNORE = -100
PLACEHOLDER = re.compile(r"<(region|box):(\d+)>")
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def write_boxes(text: str, boxes_px: list, geometry: Geometry | None, codec: BoxCodec) -> str:
    """`<region:i>` and `<box:i>` in `text` become the i-th box (xyxy, pixels of the original image) as words."""

    def words(match: re.Match) -> str:
        box = torch.as_tensor(boxes_px[int(match[2])], dtype=torch.float64)
        return codec.encode(geometry.boxes_to_model(box))

    return PLACEHOLDER.sub(words, text)


def question_with_boxes(question: str, boxes_px: list, geometry: Geometry, codec: BoxCodec) -> str:
    """A question that names boxes by `<region:i>` or, one per box and in order, by `<region>`."""
    for index in range(question.count("<region>")):
        question = question.replace("<region>", f"<region:{index}>", 1)
    missing = [m[0] for m in PLACEHOLDER.finditer(question) if int(m[2]) >= len(boxes_px)]
    if missing:
        raise DataError(f"question '{question}' has {missing[0]}, but {len(boxes_px)} boxes came with it; give that box")
    return write_boxes(question, boxes_px, geometry, codec)


def messages_of(record: dict, geometry: Geometry | None, codec: BoxCodec) -> list[dict]:
    """A validated record -> chat messages; the picture's mark stands first in its turn, as in LLaVA."""
    boxes_px = [region["box"] for region in record.get("regions", [])]
    messages = []
    for turn in record["conversations"]:
        text = turn["value"]
        if IMAGE in text:
            text = IMAGE + "\n" + text.replace(IMAGE, "").strip()
        messages.append({"role": ROLES[turn["from"]], "content": write_boxes(text, boxes_px, geometry, codec)})
    return messages


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[list[dict]],
    names: list[str],
    pictures: list[bool],
    num_image_tokens: int,
    max_length: int,
) -> list[tuple[np.ndarray, np.ndarray, bool]]:
    """Messages -> per conversation (input ids (L,) int32, True where the assistant speaks (L,), whether it was cut).

    names: what to call each conversation in an error (its file and id)
    pictures: whether it has a picture, which is one mark here and `num_image_tokens` tokens in the model
    max_length: tokens, picture's included, after which a conversation is cut
    """
    encoded = tokenizer.apply_chat_template(conversations, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    rows = []
    for name, picture, ids, mask in zip(names, pictures, encoded["input_ids"], encoded["assistant_masks"], strict=True):
        limit = max_length - (num_image_tokens - 1) * picture
        cut = len(ids) > limit
        ids, mask = np.asarray(ids[:limit], np.int32), np.asarray(mask[:limit], bool)
        if not mask.any():
            raise DataError(
                f"{name} has no supervised token within {max_length} tokens; give it a gpt turn with text, or raise max_length"
            )
        rows.append((ids, mask, cut))
    return rows
