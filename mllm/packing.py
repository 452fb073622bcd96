"""Several records in one row of tokens, each seeing itself alone: for one picture once, and for rows without padding.

A row is a line of documents, a document `[prefix, branch, branch, ...]`: the prefix is all tokens up to the last picture's
mark, a branch is what one record says after it. A document of one record is all prefix. With the mask and the positions of
`attention_of` a row gives the losses and gradients of its records in rows of their own, in a language model whose every
token sees all before it. (L tokens of a row, B rows.)
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

NO_TOKEN = -1  # segment of padding


@dataclass(frozen=True)
class TokenRow:
    """One row of tokens.

    ids: (L,) int32; supervised: (L,) bool; images: indices of its pictures in the order of their marks
    segments: (L,) int16, the number of each token's prefix or branch; roots: (L,) int16, its document's prefix.
        A token sees its own segment and its root's; both are all 0 in a row of one record
    regions: (r,) int32 indices of the regions that region tokens stand for, in the order of their marks
    """

    ids: np.ndarray
    supervised: np.ndarray
    segments: np.ndarray
    roots: np.ndarray
    images: tuple[int, ...]
    regions: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))

    def length(self, image_tokens: Sequence[int]) -> int:
        """Tokens with those of its pictures, which are one mark each here; image_tokens: of each picture, by its index."""
        return len(self.ids) + sum(int(image_tokens[index]) - 1 for index in self.images)


def own_row(ids: np.ndarray, supervised: np.ndarray, images: tuple[int, ...], regions: Sequence[int] = ()) -> TokenRow:
    """A row of one record."""
    alone = np.zeros(len(ids), np.int16)
    return TokenRow(ids, supervised, alone, alone, images, np.asarray(regions, np.int32))


def share_pictures(
    rows: list[TokenRow],
    image_token_id: int,
    image_tokens: Sequence[int],
    max_length: int,
    region_token_id: int | None = None,
) -> list[TokenRow]:
    """Joins rows of one record that have pictures and prefix in common, up to `max_length` tokens, pictures included.

    A row without a picture stays alone, and so does one that answers before its last picture or right after its mark: in a
    joint row that first token would be predicted from the branch before it. So does one with a region's mark before its last
    picture: another row's may be of another region. Rows keep the order of their first records.
    """
    open_rows: dict[tuple, list[TokenRow]] = {}
    joint: list[list[TokenRow]] = []
    for row in rows:
        start = _prefix_length(row, image_token_id)
        if start is None or row.supervised[: start + 1].any() or (row.ids[:start] == region_token_id).any():
            joint.append([row])
            continue
        key = row.images, row.ids[:start].tobytes()
        members = open_rows.get(key)
        if members is None or members[0].length(image_tokens) + _branches(members[1:] + [row], start) > max_length:
            members = open_rows[key] = []
            joint.append(members)
        members.append(row)
    return [_branch(members, image_token_id) for members in joint]


def _prefix_length(row: TokenRow, image_token_id: int) -> int | None:
    return int(np.flatnonzero(row.ids == image_token_id)[-1]) + 1 if row.images else None


def _branches(members: list[TokenRow], start: int) -> int:
    return sum(len(row.ids) - start for row in members)


def _branch(members: list[TokenRow], image_token_id: int) -> TokenRow:
    """One document of records that share their prefix."""
    first = members[0]
    if len(members) == 1:
        return first
    start = _prefix_length(first, image_token_id)
    branches = range(1, len(members) + 1)
    segments = [np.full(len(row.ids) - start, number, np.int16) for number, row in zip(branches, members, strict=True)]
    ids = np.concatenate([first.ids[:start], *(row.ids[start:] for row in members)])
    return TokenRow(
        ids,
        np.concatenate([first.supervised[:start], *(row.supervised[start:] for row in members)]),
        np.concatenate([np.zeros(start, np.int16), *segments]),
        np.zeros(len(ids), np.int16),
        first.images,
        np.concatenate([row.regions for row in members]),
    )


def pack_rows(rows: list[TokenRow], image_tokens: Sequence[int], max_length: int) -> list[TokenRow]:
    """Lines rows up, whatever they are about, into rows of up to `max_length` tokens, pictures included.

    Best fit, longest first: each goes where it leaves the least room. A row keeps the order of its members, and rows that
    of their first ones.
    """
    lengths = [row.length(image_tokens) for row in rows]
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # bins by the tokens that still fit
    rooms: list[int] = []  # its keys, sorted: at most max_length, however many bins there are
    for index in sorted(range(len(rows)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(rooms, lengths[index])
        if place == len(rooms):
            room, number = max(max_length, lengths[index]), len(bins)
            bins.append([])
        else:
            room = rooms[place]
            number = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        bins[number].append(index)
        left = room - lengths[index]
        if left not in by_room:
            by_room[left] = []
            insort(rooms, left)
        by_room[left].append(number)
    return [_line_up([rows[index] for index in members]) for members in sorted(map(sorted, bins))]


def _line_up(members: list[TokenRow]) -> TokenRow:
    """One row of documents. A document's first token is nobody's target, as in a row of its own."""
    if len(members) == 1:
        return members[0]
    firsts = np.cumsum([0] + [len(row.ids) for row in members[:-1]])
    offsets = np.cumsum([0] + [int(row.segments.max()) + 1 for row in members[:-1]], dtype=np.int16)
    supervised = np.concatenate([row.supervised for row in members])
    supervised[firsts] = False
    return TokenRow(
        np.concatenate([row.ids for row in members]),
        supervised,
        *(
            np.concatenate([getattr(row, key) + offset for row, offset in zip(members, offsets, strict=True)])
            for key in ("segments", "roots")
        ),
        sum((row.images for row in members), ()),
        np.concatenate([row.regions for row in members]),
    )


def attention_of(segments_BL: np.ndarray, roots_BL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Who sees whom (B, 1, L, L) bool, and positions (B, L) int64: a document's from 0, a branch's on from its prefix.

    segments_BL, roots_BL: as in `TokenRow`, `NO_TOKEN` for padding, which sees and is seen by padding only
    """
    length = segments_BL.shape[1]
    causal_LL = np.tri(length, dtype=bool)
    seen, seer, root = segments_BL[:, None, :], segments_BL[:, :, None], roots_BL[:, :, None]
    mask_BLL = causal_LL & ((seen == seer) | (seen == root))
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
