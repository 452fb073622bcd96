"""Records about one picture in one row: the picture once, and each record sees the picture and itself alone.

A row is `[prefix, branch, branch, ...]`: the prefix is all tokens up to the picture's mark, a branch is what one record
says after it. With the mask and the positions of `attention_of` a row gives the losses and gradients of its records in
rows of their own, and costs the picture's tokens once, in a language model whose every token sees all before it. (L tokens of
a row, B rows.)
"""

from dataclasses import dataclass

import numpy as np

NO_TOKEN = -1  # segment of padding


@dataclass(frozen=True)
class TokenRow:
    """One row of tokens.

    ids: (L,) int32; supervised: (L,) bool; image: index of its picture, -1 for none
    segments: (L,) int16, 0 the prefix, which every branch sees, 1, 2, ... the branches; all 0 in a row of one record
    """

    ids: np.ndarray
    supervised: np.ndarray
    segments: np.ndarray
    image: int


def own_row(ids: np.ndarray, supervised: np.ndarray, image: int) -> TokenRow:
    return TokenRow(ids, supervised, np.zeros(len(ids), np.int16), image)


def share_pictures(rows: list[TokenRow], image_token_id: int, num_image_tokens: int, max_length: int) -> list[TokenRow]:
    """Joins rows of one record that have picture and prefix in common, up to `max_length` tokens, pictures included.

    A row without a picture stays alone, and so does one that answers right after the picture's mark: in a joint row that
    first token would be predicted from the branch before it. Rows keep the order of their first records.
    """
    open_rows: dict[tuple, list[TokenRow]] = {}
    joint: list[list[TokenRow]] = []
    for row in rows:
        start = _prefix_length(row, image_token_id)
        if start is None or (start < len(row.ids) and row.supervised[start]):
            joint.append([row])
            continue
        key = row.image, row.ids[:start].tobytes()
        members = open_rows.get(key)
        if members is None or start + num_image_tokens - 1 + _branches(members + [row], start) > max_length:
            members = open_rows[key] = []
            joint.append(members)
        members.append(row)
    return [_join(members, image_token_id) for members in joint]


def _prefix_length(row: TokenRow, image_token_id: int) -> int | None:
    marks = np.flatnonzero(row.ids == image_token_id)
    return int(marks[0]) + 1 if row.image >= 0 and len(marks) == 1 else None


def _branches(members: list[TokenRow], start: int) -> int:
    return sum(len(row.ids) - start for row in members)


def _join(members: list[TokenRow], image_token_id: int) -> TokenRow:
    first = members[0]
    if len(members) == 1:
        return first
    start = _prefix_length(first, image_token_id)
    branches = range(1, len(members) + 1)
    segments = [np.full(len(row.ids) - start, number, np.int16) for number, row in zip(branches, members, strict=True)]
    return TokenRow(
        np.concatenate([first.ids[:start], *(row.ids[start:] for row in members)]),
        np.concatenate([first.supervised[:start], *(row.supervised[start:] for row in members)]),
        np.concatenate([np.zeros(start, np.int16), *segments]),
        first.image,
    )


def attention_of(segments_BL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Who sees whom (B, 1, L, L) bool, and positions (B, L) int64: a branch's count on from the prefix.

    segments_BL: as in `TokenRow`, `NO_TOKEN` for padding, which sees and is seen by padding only
    """
    length = segments_BL.shape[1]
    causal_LL = np.tri(length, dtype=bool)
    seen, seer = segments_BL[:, None, :], segments_BL[:, :, None]
    mask_BLL = causal_LL & ((seen == seer) | ((seen == 0) & (seer > 0)))
    # Tokens that a token sees, itself left out, are as many as stand before it in a row of its own.
    return mask_BLL[:, None], mask_BLL.sum(-1, dtype=np.int64) - 1


def attends_to_all(text_config, length: int) -> bool:
    """Whether a language model's tokens see all before them in a row of `length` tokens: no window, no recurrence.

    text_config: a transformers configuration; `layer_types` and `sliding_window` tell
    """
    window = getattr(text_config, "sliding_window", None)
    if window is not None and not getattr(text_config, "use_sliding_window", True):
        window = None
    types = set(getattr(text_config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    if types - {"full_attention", "sliding_attention"}:
        return False
    return "sliding_attention" not in types or window is None or window >= length
