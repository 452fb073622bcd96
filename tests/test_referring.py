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
