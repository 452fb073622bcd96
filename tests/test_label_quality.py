"""Precision and recall of labels, on a scene of two apples and a bus whose right answers are counted by hand."""

import sys
from pathlib import Path

from PIL import Image

from encoder.data.scenes import Scene, SceneObject
from encoder.vesl.detections import Detection

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from label_quality import is_true_of, match, score_boxes, score_phrases  # noqa: E402

APPLE = ("red apple", "small red apple")
SCENE = Scene(
    Image.new("RGB", (80, 60)),
    (
        SceneObject("red apple", (0, 0, 20, 20), APPLE),
        SceneObject("red apple", (30, 0, 50, 20), ("red apple",)),
        SceneObject("bus", (50, 30, 80, 60), ("bus",)),
    ),
    "two red apples and a bus on a grey background",
    [],
)
FOUND = [
    Detection((0, 0, 20, 19), "red apples", 0.9),  # right
    Detection((1, 0, 21, 20), "the red apple", 0.8),  # the same apple again
    Detection((50, 30, 80, 58), "small red apple", 0.7),  # the bus' place under another name
    Detection((30, 0, 50, 20), "small red apple", 0.6),  # there is an apple, and it is not small
    Detection((0, 40, 10, 50), "a bus", 0.2),  # nothing there
]


def test_a_phrase_is_true_in_any_form():
    assert all(is_true_of(phrase, APPLE) for phrase in ("red apple", "a red apple", "red apples", "the small red apples"))
    assert not any(is_true_of(phrase, APPLE) for phrase in ("apple", "two red apples", "a bus", "large red apple"))


def test_boxes_alone_and_with_their_phrase():
    assert match(FOUND, SCENE, names_count=False) == ([True, False, True, True, False], [True, True, True])
    assert match(FOUND, SCENE, names_count=True) == ([True, False, False, False, False], [True, False, False])


def test_shares_count_boxes_and_objects():
    scores = score_boxes([SCENE, SCENE], [FOUND, []], 0.5)
    assert [(round(s.value, 3), s.n) for s in scores.values()] == [(0.75, 4), (0.5, 6), (0.25, 4), (0.167, 6)]
    scores = score_phrases([SCENE, SCENE], [["red apples", "a grey"], ["a bus", "the red apple", "bus"]])
    assert [(s.value, s.n) for s in scores.values()] == [(0.8, 5), (0.75, 4)]
    assert scores["phrase precision"].low < 0.8 < scores["phrase precision"].high
