"""The referring command: a box in, a name out, on an MLLM that knows the names by heart."""

import json
import sys

import pytest
from test_refcoco import overfitted_mllm, scenes  # noqa: F401  (fixtures)

from encoder.errors import DataError
from eval import referring
from eval.predictions import load_evaluation


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["referring.py", *map(str, arguments)])
    referring.main()


def test_every_object_is_asked_for_by_its_box_and_named(overfitted_mllm, scenes, monkeypatch, capsys):  # noqa: F811
    run(monkeypatch, "--model", overfitted_mllm, "--data", scenes / "refcoco", "--out", scenes / "run")
    output = capsys.readouterr().out
    assert "refcoco_referring/val" in output and "micro 100.0" in output and "n 2  (own data)" in output
    evaluation = load_evaluation(scenes / "run/refcoco_referring/val")
    assert [(t.id, t.category) for t in evaluation.targets] == [("0", "person"), ("1", "bus")]
    assert [(p.id, p.raw) for p in evaluation.predictions] == [("0", "person"), ("1", "bus")]
    assert evaluation.predictions[0].prompt == "What is <region:0>?" and evaluation.predictions[0].box is None

    answers = scenes / "run/refcoco_referring/val/predictions.jsonl"
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    lines[0]["raw"] = " BUS\n"  # the wrong object, oddly written
    lines[1]["raw"] = " Bus "
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(monkeypatch, "--out", scenes / "run", "--score-only")
    scores = json.loads((scenes / "run/refcoco_referring/val/scores.json").read_text())
    assert scores["micro"]["value"] == scores["macro"]["value"] == 0.5 and scores["classes_with_boxes"] == 2


def test_an_encoder_is_refused_because_it_has_no_words(tiny_folder, scenes, monkeypatch):  # noqa: F811
    with pytest.raises(DataError, match="is an encoder, which has no words"):
        run(monkeypatch, "--model", tiny_folder, "--data", scenes / "refcoco", "--out", scenes / "run")


def test_objects_are_asked_for_by_a_point_or_by_their_outline(overfitted_mllm, scenes, monkeypatch, capsys):  # noqa: F811
    base = "--model", overfitted_mllm, "--data", scenes / "refcoco", "--out", scenes / "run", "--split", "val"
    with pytest.raises(DataError, match="refcoco: ref_id 0 has no segmentation, so it cannot be asked for by its mask"):
        run(monkeypatch, *base, "--region", "mask")
    run(monkeypatch, *base, "--region", "point")
    points = [target.region for target in load_evaluation(scenes / "run/refcoco_referring_point/val").targets]
    assert points == [{"point": [10, 10]}, {"point": [29.25, 13]}]  # middles of the boxes: these data have no outlines

    path = scenes / "refcoco" / "instances.json"
    content = json.loads(path.read_text())
    hook = [[5, 5, 15, 5, 15, 15, 13, 15, 13, 7, 5, 7]]  # of the person's box; its centre of mass lies outside it
    outlines = [hook, [[20, 3, 38, 3, 38, 23, 20, 23]], [[10, 20, 30, 20, 30, 50]]]
    for annotation, outline in zip(content["annotations"], outlines, strict=True):
        annotation["segmentation"] = outline
    path.write_text(json.dumps(content))
    out = scenes / "outlines"
    base = "--model", overfitted_mllm, "--data", scenes / "refcoco", "--out", out, "--split", "val"
    run(monkeypatch, *base, "--region", "mask")
    evaluation = load_evaluation(out / "refcoco_referring_mask/val")
    assert [target.region for target in evaluation.targets] == [{"mask": hook}, {"mask": [[20, 3, 38, 3, 38, 23, 20, 23]]}]
    # Its text is that of the box around it, which the model knows.
    assert evaluation.predictions[0].raw == "person" and "refcoco_referring_mask/val" in capsys.readouterr().out
    run(monkeypatch, *base, "--region", "point")
    points = [target.region["point"] for target in load_evaluation(out / "refcoco_referring_point/val").targets]
    assert points == [[13.5, 6.5], [28.5, 12.5]]  # the hook's only pixel with the mask on all sides; the middle of the bus
