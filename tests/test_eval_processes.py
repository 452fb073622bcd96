"""A benchmark on two processes of a real launcher gives the answers of one; a killed run goes on from all that was written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from eval_fixtures import run
from test_refcoco import write_images, write_refcoco

from encoder.errors import DataError
from eval import refcoco
from eval.predictions import load_evaluation, read_predictions

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.timeout(1800)  # two processes start slowly on a busy machine


@pytest.fixture(scope="module")
def one_process(tiny_folder, tmp_path_factory):
    """The flags, and the answers of one process."""
    folder = tmp_path_factory.mktemp("scenes")
    write_images(folder / "images")
    flags = ["--model", tiny_folder, "--data", write_refcoco(folder / "refcoco"), "--batch-size", 2, "--device", "cpu"]
    flags += ["--local_rank", 0]  # as the deepspeed launcher adds it
    run(refcoco, *flags, "--out", folder / "one")
    return flags, {split: load_evaluation(folder / "one/refcoco" / split) for split in ("val", "testA")}, folder


def test_two_processes_answer_as_one(one_process, tmp_path):
    flags, expected, _ = one_process
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone"]
    arguments = [*command, str(ROOT / "eval/refcoco.py"), *map(str, flags), "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refcoco/val") == 1 and done.stdout.count("answers and scores:") == 1
    for split, one in expected.items():
        two = load_evaluation(tmp_path / "refcoco" / split)
        assert two.targets == one.targets and two.protocol == one.protocol
        for a, b in zip(one.predictions, two.predictions, strict=True):
            assert (a.id, a.prompt, a.reason) == (b.id, b.prompt, b.reason) and b.box == pytest.approx(a.box, abs=1e-3)
        assert two.run["launches"][0]["processes"] == 2
        assert not list((tmp_path / "refcoco" / split).glob("predictions.rank*"))


def test_a_killed_run_of_several_processes_goes_on_in_one(one_process, tmp_path, capsys):
    """As a kill leaves them: an answer of each process, and in both files half a line."""
    flags, expected, _ = one_process
    run(refcoco, *flags, "--out", tmp_path, "--split", "val")
    whole = tmp_path / "refcoco/val/predictions.jsonl"
    lines = whole.read_text().splitlines()
    lines[0] = json.dumps({**json.loads(lines[0]), "raw": "kept"})
    whole.write_text(lines[0] + "\n" + lines[2][:30])
    (whole.parent / "predictions.rank1.jsonl").write_text(lines[0] + "\n" + lines[1] + "\n" + lines[3][:-1])
    with pytest.raises(DataError, match="not JSON"):
        load_evaluation(whole.parent)
    capsys.readouterr()
    run(refcoco, *flags, "--out", tmp_path, "--split", "val")
    output = capsys.readouterr().out
    assert "going on after 2 of 4 answers" in output and "bytes of a half-written answer removed" in output
    resumed = load_evaluation(whole.parent)
    assert read_predictions(whole)[0].raw == "kept" and len(read_predictions(whole)) == 4
    expected_boxes = [p.box and pytest.approx(p.box, abs=1e-3) for p in expected["val"].predictions]
    assert [p.box for p in resumed.predictions] == expected_boxes


def test_nothing_is_written_where_the_split_is_not_there(one_process, tmp_path):
    flags, _, _ = one_process
    with pytest.raises(DataError, match="no referred object has split 'test'"):
        run(refcoco, *flags, "--out", tmp_path, "--split", "test")
    assert not list(tmp_path.iterdir())
