"""RefCOCO on scenes by the shipped MLLM under the real `torchrun` and `deepspeed`: each answer is that of one plain process."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from eval_fixtures import run
from pretraining_fixtures import free_port
from test_scene_files import make

from eval import refcoco
from eval.predictions import load_evaluation

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
pytestmark = pytest.mark.timeout(1800)  # two processes start slowly on a busy machine


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The flags, and the answers of one process by their ids."""
    folder = tmp_path_factory.mktemp("plain")
    make(folder / "scenes", arguments=["--train", "1", "--eval", "24"])
    flags = ["--model", ROOT / "weights/mllm_cloc", "--data", folder / "scenes/refcoco", "--images", folder / "scenes/images"]
    flags += ["--split", "val", "--batch-size", "1", "--device", "cpu"]
    run(refcoco, *flags, "--out", folder / "out")
    return flags, answers(folder / "out")


def answers(out: Path) -> dict[str, tuple]:
    found = {each.id: (each.prompt, each.raw, each.box, each.reason) for each in load_evaluation(out / "refcoco/val").predictions}
    assert len(found) > 16 and any(box for _, _, box, _ in found.values())
    return found


def command(launcher: str, flags: list, out: Path) -> dict:
    """How two processes are started, on the CPU where there is no GPU."""
    start = {
        "torchrun": [BIN / "torchrun", "--nproc_per_node", 2, "--master_port", free_port()],
        "deepspeed": [BIN / "deepspeed", "--num_gpus", 2, "--master_port", free_port()],
    }[launcher]
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return {"args": [*map(str, [*start, ROOT / "eval/refcoco.py", *flags, "--out", out])], "env": environment}


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_processes_answer_as_one(plain, tmp_path, launcher):
    flags, expected = plain
    done = subprocess.run(**command(launcher, flags, tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert answers(tmp_path) == expected
    assert load_evaluation(tmp_path / "refcoco/val").run["launches"][0]["processes"] == 2
    assert not list((tmp_path / "refcoco/val").glob("predictions.rank*"))


def test_two_processes_killed_half_way_go_on(plain, tmp_path):
    """Started by one launcher, killed when the second process has written, gone on with by the other."""
    flags, expected = plain
    process = subprocess.Popen(**command("torchrun", flags, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    second = tmp_path / "refcoco/val/predictions.rank1.jsonl"
    while not (second.exists() and second.read_text()):
        assert process.poll() is None
        time.sleep(0.01)
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.kill()
    process.wait()
    parts = [path.read_text() for path in second.parent.glob("predictions*.jsonl")]
    there = sum(part.count("\n") for part in parts)
    assert second.exists() and 0 < there < len(expected)
    done = subprocess.run(**command("deepspeed", flags, tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert f"going on after {there} of {len(expected)} answers" in done.stdout
    assert answers(tmp_path) == expected
