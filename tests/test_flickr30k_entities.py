"""Phrase grounding: phrases from the original files, both protocols against a plain scorer, commands on a tiny model."""

import json

import numpy as np
import pytest
from dataset_fixtures import write_flickr30k
from eval_fixtures import run, write_json

from encoder.errors import DataError
from eval import flickr30k_entities
from eval.metrics import THRESHOLDS
from eval.phrases import by_type, phrase_hits
from eval.predictions import Prediction, Target, load_evaluation
from mllm.box_text import BoxCodec


def naive_iou(a, b):
    inner = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return inner / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner)


def naive_hit(said, truths, merged, ranked, k):
    """One phrase by the papers' words, without our code."""
    if not said:
        return 0
    if merged:
        truths = [[min(b[0] for b in truths), min(b[1] for b in truths), max(b[2] for b in truths), max(b[3] for b in truths)]]
    if ranked:
        said = said[:k]
    elif merged:
        said = [[min(b[0] for b in said), min(b[1] for b in said), max(b[2] for b in said), max(b[3] for b in said)]]
    else:
        said = said[:1]
    return int(any(naive_iou(a, b) >= THRESHOLDS[0] for a in said for b in truths))


def drawn_phrases(count):
    """Phrases with one to four boxes, and answers with none to twelve, near the true ones."""
    rng = np.random.default_rng(4)
    targets, predictions = [], []
    for index in range(count):
        corners = rng.uniform(0, 80, (rng.integers(1, 5), 2))
        boxes = [tuple(row) for row in np.hstack([corners, corners + rng.uniform(5, 40, corners.shape)]).tolist()]
        around = tuple(f(b[i] for b in boxes) for i, f in enumerate((min, min, max, max)))
        answers = tuple(
            tuple(map(float, np.array(boxes[rng.integers(len(boxes))]) + rng.uniform(-6, 6, 4) * [1, 1, 0, 0]))
            for _ in range(rng.integers(0, 13))
        )
        targets.append(Target(str(index), "a.jpg", 120, 120, "men", around, "", "people", tuple(boxes)))
        several = answers if len(answers) > 1 else ()
        predictions.append(Prediction(str(index), "a.jpg", "", "", answers[0] if answers else None, boxes=several))
    return targets, predictions


@pytest.mark.parametrize(("ranked", "k"), [(False, 1), (True, 1), (True, 5), (True, 10)])
def test_both_protocols_equal_a_plain_scorer_on_600_phrases(ranked, k):
    targets, predictions = drawn_phrases(600)
    hits = phrase_hits(targets, predictions, ranked, k)
    for name, merged in (("merged_box", True), ("any_box", False)):
        said = [list(p.boxes) or ([p.box] if p.box else []) for p in predictions]
        expected = [naive_hit(s, list(t.boxes), merged, ranked, k) for s, t in zip(said, targets, strict=True)]
        assert hits[name].tolist() == expected and 0.1 < np.mean(expected) < 0.95


def test_a_phrase_of_two_types_counts_under_both():
    targets = [Target(str(i), "", 9, 9, "", (0, 0, 1, 1), "", kind) for i, kind in enumerate(["people", "clothing/other"])]
    assert by_type(np.array([1.0, 0.0]), targets) == {
        "clothing": {"accuracy": 0.0, "n": 1}, "other": {"accuracy": 0.0, "n": 1}, "people": {"accuracy": 1.0, "n": 1},
    }  # fmt: skip


def test_phrases_come_from_the_original_files_and_an_encoder_answers(tmp_path, tiny_folder):
    """Two phrases for the two men, one for the hair; the shirts' box has no width, the yard has none, the hands no chain."""
    annotations, images = write_flickr30k(tmp_path)
    flags = ["--model", tiny_folder, "--data", annotations, "--images", images, "--split", "train", "--out", tmp_path / "run"]
    run(flickr30k_entities, *flags)
    evaluation = load_evaluation(tmp_path / "run/flickr30k_entities/train")
    men = ((5.0, 6.0, 20.0, 40.0), (30.0, 4.0, 45.0, 41.0))
    found = [(t.id, t.text, t.kind, t.box, t.boxes) for t in evaluation.targets]
    assert found == [
        ("1000092795-0-0", "Two young guys", "people", (5.0, 4.0, 45.0, 41.0), men),
        ("1000092795-0-1", "shaggy hair", "bodyparts", (30.0, 4.0, 45.0, 41.0), men[1:]),
        ("1000092795-1-3", "Two men", "people", (5.0, 4.0, 45.0, 41.0), men),
    ]
    assert evaluation.protocol["phrases_without_box"] == 3
    assert evaluation.protocol["completeness"] == "PARTIAL: 1 of 29783 images"
    scores = json.loads((tmp_path / "run/flickr30k_entities/train/scores.json").read_text())
    assert {"merged_box", "any_box", "merged_box_by_type", "any_box_by_type"} <= scores.keys()
    with pytest.raises(DataError, match="--rank needs --proposals"):
        run(flickr30k_entities, *flags, "--rank", "prompter")
    detections = [{"image_id": 1000092795, "bbox": [30, 4, 15, 37], "score": 1.0}]
    detections.append({"image_id": 1000092795, "bbox": [0, 0, 3, 3], "score": 0.1})
    run(flickr30k_entities, *flags, "--rank", "prompter", "--proposals", write_json(tmp_path / "found.json", detections))
    scores = json.loads((tmp_path / "run/flickr30k_entities_ranking/train/prompter/scores.json").read_text())
    assert scores["any_box_recall_5"] == 1.0 and scores["merged_box_recall_10"] == pytest.approx(1 / 3)
    with pytest.raises(DataError, match="no phrase of split test has a box"):
        run(flickr30k_entities, *flags[:7], "test", "--out", tmp_path / "b")
    with pytest.raises(DataError, match="gone is not a folder; give the dataset's own with --data"):
        run(flickr30k_entities, *flags, "--data", tmp_path / "gone")
    (images / "1000092795.jpg").unlink()
    with pytest.raises(DataError, match="1 of 1 images are not in .*1000092795.jpg"):
        run(flickr30k_entities, *flags[:-1], tmp_path / "c")


def test_all_boxes_of_an_answer_are_read_in_order():
    codec = BoxCodec("int1000")
    found = codec.decode_all("[100, 100, 200, 200] and [300, 300, 100, 100], [500, 500, 900, 900]")
    assert [box.tolist()[0] for box in found] == pytest.approx([0.1005, 0.5005]) and codec.decode_all("none") == []
