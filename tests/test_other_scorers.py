"""Where Ferret's and Shikra's rules for one grounding answer differ from ours: the table of docs/evaluation.md.

Both rules are written here from their published scripts' behaviour (apple/ml-ferret ferret/eval/eval_refexp.py,
shikras/shikra mllm/dataset/single_image_dataset/rec.py), plainly and without our code.
"""

import re

import numpy as np
import pytest
import torch

from encoder.geometry import Geometry
from eval.metrics import THRESHOLDS, paired_iou
from mllm.box_text import BoxCodec

WIDTH, HEIGHT = 1000, 1000


def iou(a, b) -> float:
    """The formula without a guard against boxes turned inside out, as both scripts have it."""
    inner = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return inner / (sum(areas) - inner)


def ferret(answer: str, truth, width: int, height: int) -> bool:
    """First bracket of integers, coordinates floor(c W / 1000); one bracket that is no integers empties the answer."""
    boxes, rest = [], answer
    while "[" in rest and "]" in rest:
        inside, rest = rest[rest.index("[") + 1 :].split("]", 1)
        try:
            corners = [int(part) for part in inside.split(",")]
        except ValueError:
            return iou((0, 0, 0, 0), truth) >= 0.5
        sides = (width, height, width, height)
        boxes.append([int(corner * side / 1000) for corner, side in zip(corners, sides, strict=True)])
        skipped = re.search(r"[.,;!?]", rest)
        rest = rest[skipped.end() :] if skipped else ""
    return bool(iou(boxes[0] if boxes else (0, 0, 0, 0), truth) >= 0.5)


def shikra(answer: str, truth, width: int, height: int) -> bool:
    """One box of three decimals of the padded square, and no second; against the truth as written, in that frame; above 0.5."""
    boxes = re.findall(r"\[(\d(?:\.\d+)?(?:,\d(?:\.\d+)?){3})\]", answer)
    if len(boxes) != 1 or answer.count("[") != 1:
        return False
    side = max(width, height)
    shift = np.array([(side - width) / 2, (side - height) / 2] * 2)
    written = [round(value, 3) for value in ((np.array(truth) + shift) / side).tolist()]
    return bool(iou([float(c) for c in boxes[0].split(",")], written) > 0.5)


def ours(answer: str, truth, width: int, height: int, codec: str = "int1000") -> bool:
    box, _ = BoxCodec(codec).decode(answer)
    if box is None:
        return False
    # Rounded to a thousandth of a pixel: a case of exactly a half must not hang on float32.
    box_px = Geometry("pad", width, height, 1000).boxes_to_image(box).double().numpy().round(3)
    return bool(paired_iou(box_px[None], np.array([truth]))[0] >= THRESHOLDS[0])


SQUARE = (100.5, 100.5, 300.5, 300.5)
FERRET_CASES = {
    # answer, truth -> (Ferret, ours)
    "the same": ("[100, 100, 300, 300]", SQUARE, True, True),
    "a second box": ("[100, 100, 300, 300]. [500, 500, 900, 900]", SQUARE, True, True),
    "IoU of exactly a half": ("[100, 100, 300, 200]", (100, 100, 300, 300), True, True),
    "numbers of other widths": ("[5, 5, 300, 300]", (5, 5, 300, 300), True, False),
    "no blank after the comma": ("[100,100,300,300]", SQUARE, True, False),
    "the value 1000": ("[100, 100, 1000, 1000]", (100, 100, 1000, 1000), True, False),
    "words in brackets before": ("the [red] one: [100, 100, 300, 300]", SQUARE, False, True),
    "floored, not centred": ("[100, 100, 102, 102]", (100.6, 100.6, 102.6, 102.6), False, True),
    "turned inside out": ("[300, 300, 100, 100]", SQUARE, False, False),
    "no box at all": ("a man", SQUARE, False, False),
    "cut off": ("[100, 100, 3", SQUARE, False, False),
}
BIN_CENTRES = {"IoU of exactly a half"}  # ours is exactly a half when the truth, too, lies half a pixel on
SHIKRA_CASES = {
    "the same": ("[0.100,0.100,0.300,0.300]", (100, 100, 300, 300), True, "[100, 100, 300, 300]", True),
    "IoU of exactly a half": ("[0.0,0.0,0.2,0.1]", (0, 0, 200, 200), False, "[100, 100, 300, 200]", True),
    "a second box": (
        "[0.100,0.100,0.300,0.300][0.5,0.5,0.9,0.9]", (100, 100, 300, 300), False,
        "[100, 100, 300, 300] [500, 500, 900, 900]", True,
    ),
    "no box at all": ("a man", (100, 100, 300, 300), False, "a man", False),
}  # fmt: skip


@pytest.mark.parametrize("case", FERRET_CASES)
def test_a_case_of_ferrets_rule(case):
    answer, truth, theirs, own = FERRET_CASES[case]
    assert ferret(answer, truth, WIDTH, HEIGHT) is theirs
    assert ours(answer, SQUARE if case in BIN_CENTRES else truth, WIDTH, HEIGHT) is own


@pytest.mark.parametrize("case", SHIKRA_CASES)
def test_a_case_of_shikras_rule(case):
    answer, truth, theirs, answer_in_our_form, own = SHIKRA_CASES[case]
    assert shikra(answer, truth, WIDTH, HEIGHT) is theirs
    assert ours(answer_in_our_form, SQUARE if case in BIN_CENTRES else truth, WIDTH, HEIGHT) is own


def test_shikras_truth_is_rounded_and_ours_is_not():
    """A thin object on a wide picture: three decimals of the long side move its edges, and with them the verdict."""
    width, height, truth = 2000, 500, (400.0, 200.0, 404.9, 203.0)
    answer = "[0.200,0.475,0.202,0.476]"
    assert shikra(answer, truth, width, height) is True, "against the rounded truth it is a perfect answer"
    box = np.array([[0.200 * 2000, 0.475 * 2000 - 750, 0.202 * 2000, 0.476 * 2000 - 750]])
    assert paired_iou(box, np.array([truth]))[0] == pytest.approx(4 * 2 / (4.9 * 3)), "in pixels it is hardly more than a half"


def test_both_rules_agree_with_ours_on_ordinary_answers():
    """500 drawn answers away from the threshold: nothing but the named cases sets the three apart."""
    rng, torch_codec, compared = np.random.default_rng(0), BoxCodec("int1000"), 0
    while compared < 500:
        corners = rng.uniform(0, 900, (2, 2))
        truth = np.concatenate([corners.min(0), corners.max(0) + 60])
        guess = truth + rng.normal(0, 40, 4)
        guess[2:] = np.maximum(guess[2:], guess[:2] + 5)
        guess = np.clip(guess, 0, 999)
        if not (guess[2:] - guess[:2] > 1).all() or abs(iou(guess, truth) - 0.5) < 0.02:
            continue
        answer = torch_codec.encode(torch.tensor(guess / 1000))
        shikras = "[" + ",".join(f"{c / 1000:.3f}" for c in guess) + "]"
        verdict = bool(iou(guess, truth) >= 0.5)
        assert ours(answer, truth, 1000, 1000) is ferret(answer, truth, 1000, 1000) is verdict
        assert shikra(shikras, truth, 1000, 1000) is verdict
        compared += 1
