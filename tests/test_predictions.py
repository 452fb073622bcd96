"""Predictions on disk: appending, resuming after a kill, joining by id, scoring without a model."""

import json
import signal
import subprocess
import sys
import time

import pytest

from encoder.errors import DataError
from eval.predictions import Prediction, PredictionLog, Target, find_evaluations, load_evaluation
from eval.scoring import score_folder, score_line, score_questions

PROTOCOL = {"benchmark": "refcoco", "split": "val", "task": "grounding", "codec": "int1000", "completeness": "own data"}
MODEL = {"weights_sha256": "aa", "feature_layer": -2}
TARGETS = [
    Target(str(i), f"{i // 2}.png", 100, 50, f"apple {i}", (10.0, 10.0, 30.0, 30.0), "apple", "side" if i % 2 else "size")
    for i in range(4)
]


def open_log(folder, **changes):
    protocol = {**PROTOCOL, **changes.pop("protocol", {})}
    return PredictionLog(folder, protocol, {**MODEL, **changes.pop("model", {})}, changes.pop("targets", TARGETS), {"seed": 0})


def answer(i, box=(10.0, 10.0, 30.0, 30.0), reason=None):
    return Prediction(str(i), f"{i // 2}.png", f"Where is apple {i}?", "[100, 200, 300, 600]", box, reason)


def test_answers_come_back_joined_by_id_with_their_provenance(tmp_path):
    log = open_log(tmp_path)
    log.append([answer(3), answer(0)])
    assert [target.id for target in log.remaining()] == ["1", "2"]
    log.append([answer(2, None, "no box"), answer(1, (20.0, 10.0, 30.0, 30.0))])
    evaluation = load_evaluation(tmp_path)
    assert [p.id for p in evaluation.predictions] == ["0", "1", "2", "3"] and evaluation.name == "refcoco/val"
    assert evaluation.targets == TARGETS and evaluation.predictions[1].box == (20.0, 10.0, 30.0, 30.0)
    launch = evaluation.run["launches"][0]
    assert launch["seed"] == 0 and launch["versions"]["torch"] and launch["command"] and launch["commit"]
    assert evaluation.protocol["n"] == 4 and len(evaluation.protocol["targets_sha256"]) == 64


def test_scores_need_no_model_and_count_what_was_not_parsed(tmp_path):
    log = open_log(tmp_path)
    log.append([answer(0), answer(1, (20.0, 10.0, 30.0, 30.0)), answer(2, None, "no box"), answer(3, (0.0, 0.0, 9.0, 9.0))])
    scores = score_folder(tmp_path)
    assert scores["acc_50"]["value"] == 0.5, "IoU 1 and IoU 0.5 count, unparsed and apart do not"
    assert scores["acc_75"]["value"] == 0.25 and scores["acc_90"] == 0.25 and scores["mean_iou"] == pytest.approx(0.375)
    assert scores["unparsed"] == 1 and scores["unparsed_reasons"] == {"no box": 1}
    assert scores["by_kind"] == {"side": {"accuracy": 0.5, "n": 2}, "size": {"accuracy": 0.5, "n": 2}}
    assert scores["by_size"] == {"20-30%": {"accuracy": 0.5, "n": 4}}
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    assert "acc_50 50.0" in score_line(scores) and "unparsed 1" in score_line(scores)


def test_names_are_compared_without_case_or_outer_blanks(tmp_path):
    log = open_log(tmp_path, protocol={"task": "naming"})
    log.append([Prediction(str(i), f"{i // 2}.png", "", raw) for i, raw in enumerate([" Apple ", "apple", "apples", "an apple"])])
    assert score_questions(load_evaluation(tmp_path)).hits.tolist() == [1, 1, 0, 0]


def test_a_killed_writer_loses_no_whole_answer(tmp_path):
    """A real process, killed with SIGKILL in the middle of its questions; then the same command goes on."""
    script = tmp_path / "writer.py"
    script.write_text(
        "import sys, time\n"
        "from eval.predictions import Prediction, PredictionLog, Target\n"
        "targets = [Target(str(i), 'a.png', 9, 9, '', (0., 0., 1., 1.), 'x') for i in range(300)]\n"
        "log = PredictionLog(sys.argv[1], {'benchmark': 'b', 'split': 's', 'task': 'naming'}, {}, targets, {})\n"
        "for count, target in enumerate(log.remaining()):\n"
        "    if count == int(sys.argv[2]):\n"
        "        time.sleep(600)\n"
        "    log.append([Prediction(target.id, 'a.png', '', 'x' * 5000)])\n"
    )
    folder, answers = tmp_path / "run", tmp_path / "run" / "predictions.jsonl"
    process = subprocess.Popen([sys.executable, script, folder, "25"])
    while process.poll() is None and not (answers.exists() and answers.read_text().count("\n") == 25):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with answers.open("a") as file:
        file.write('{"id": "299", "ima')  # what a torn write leaves
    with pytest.raises(DataError, match="not JSON"):
        load_evaluation(folder)
    subprocess.run([sys.executable, script, folder, "-1"], check=True)
    assert len(load_evaluation(folder).predictions) == 300
    assert len(load_evaluation(folder).run["launches"]) == 2


def test_another_model_protocol_or_question_is_refused_in_the_same_folder(tmp_path):
    open_log(tmp_path).append([answer(0)])
    with pytest.raises(DataError, match="protocol.codec 'int1000', this run has 'float3'"):
        open_log(tmp_path, protocol={"codec": "float3"})
    with pytest.raises(DataError, match="model.feature_layer -2, this run has -1; choose another --out"):
        open_log(tmp_path, model={"feature_layer": -1})
    with pytest.raises(DataError, match="protocol.n 4, this run has 3"):
        open_log(tmp_path, targets=TARGETS[:3])
    assert len(open_log(tmp_path).remaining()) == 3
    (tmp_path / "run.json").unlink()
    with pytest.raises(DataError, match="without the run.json"):
        open_log(tmp_path)


def test_missing_doubled_unknown_and_broken_answers_are_errors(tmp_path):
    log = open_log(tmp_path)
    log.append([answer(i) for i in range(3)])
    with pytest.raises(DataError, match=r"1 of 4 questions are not answered \(the first is id 3\)"):
        load_evaluation(tmp_path)
    log.append([answer(3), answer(1)])
    with pytest.raises(DataError, match="id 1 is answered twice"):
        load_evaluation(tmp_path)
    path = tmp_path / "predictions.jsonl"
    lines = path.read_text().splitlines()[:4]
    path.write_text("\n".join([*lines, json.dumps({**json.loads(lines[0]), "id": "77"})]) + "\n")
    with pytest.raises(DataError, match="id 77 answers no question"):
        load_evaluation(tmp_path)
    for broken, message in (('{"id": "3"}', "line 4: not a prediction"), ("[]", "line 4: a JSON object was expected")):
        path.write_text("\n".join([*lines[:3], broken]) + "\n")
        with pytest.raises(DataError, match=message):
            load_evaluation(tmp_path)
    with pytest.raises(ValueError):
        log.append([answer(3, (float("nan"), 0.0, 1.0, 1.0))])
    with pytest.raises(DataError, match="no evaluation"):
        find_evaluations(tmp_path / "elsewhere")


def test_predictions_of_another_split_or_codec_are_refused(tmp_path):
    log = open_log(tmp_path)
    log.append([answer(i) for i in range(4)])
    path = tmp_path / "predictions.jsonl"
    whole = path.read_text()
    path.write_text(whole.replace('"image": "1.png"', '"image": "7.png"'))
    with pytest.raises(DataError, match="id 2 is answered about 7.png, the question is about 1.png; .*another split"):
        score_folder(tmp_path)
    path.write_text(whole.replace("apple 2", "bus 2"))  # another drawing of the same pictures' names and ids
    with pytest.raises(DataError, match="id 2 was asked 'Where is bus 2.', the question is about 'apple 2'; .*another split"):
        score_folder(tmp_path)
    path.write_text(whole.replace("[100, 200, 300, 600]", "[0.100, 0.200, 0.300, 0.600]"))
    with pytest.raises(DataError, match="id 0 has a box, but its words .*hold none in codec 'int1000'"):
        score_folder(tmp_path)
    assert not (tmp_path / "scores.json").exists()


def test_boxes_that_are_not_what_the_words_say_are_refused(tmp_path):
    """The frame is the picture's pixels: not the padded square's, not thousandths."""
    words = {"0": "[100, 300, 299, 499]", "1": "[100, 300, 299, 499]", "2": "[100, 010, 300, 100]", "3": "a bus"}
    right = {"0": (10.05, 5.05, 29.95, 24.95), "1": (10.05, 5.05, 29.95, 24.95), "2": None, "3": None}

    def write(name, **boxes):
        changes = {"protocol": {"geometry": "pad"}, "model": {"image_size": 200}}  # the middle half of the square
        log = open_log(tmp_path / name, **changes)
        chosen = right | {key.removeprefix("box"): box for key, box in boxes.items()}
        rows = [(i, chosen[i], None if chosen[i] else "why") for i in words]
        log.append([Prediction(i, f"{int(i) // 2}.png", f"Where is apple {i}?", words[i], box, why) for i, box, why in rows])
        return tmp_path / name

    assert score_folder(write("right"))["acc_50"]["value"] == 0.5
    for name, boxes in {
        "thousandths": {"box1": (100.0, 300.0, 299.0, 499.0)},
        "of the square": {"box1": (10.05, 30.05, 29.95, 49.95)},
        "left out": {"box1": None},
        "in the padding": {"box2": (10.0, 0.0, 30.0, 5.0)},
    }.items():
        with pytest.raises(DataError, match=r"has the box .* are .* in pixels of the picture; boxes are in another frame"):
            score_folder(write(name, **boxes))


def test_a_run_that_states_no_known_task_is_refused(tmp_path):
    log = open_log(tmp_path, protocol={"task": "poetry"})
    log.append([answer(i) for i in range(4)])
    with pytest.raises(DataError, match="protocol.task is 'poetry'"):
        score_folder(tmp_path)
