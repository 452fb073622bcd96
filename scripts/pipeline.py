"""The commands that quickstart.py and reproduce.py share: the same evaluations of the same four kinds of runs."""

import sys
from pathlib import Path

PYTHON = sys.executable
TOWERS = ("clip", "cloc")


def scenes_command(folder: Path, pictures: str, train: int, evaluate: int, seed: int) -> list[str]:
    """Draws scenes. train: scenes; evaluate: expressions of each of val, testA and testB, at least."""
    numbers = ["--train", str(train), "--eval", str(evaluate), "--seed", str(seed)]
    return [PYTHON, "scripts/make_scenes.py", "--out", str(folder), "--pictures", pictures, *numbers]


def mllm_evaluations(model: Path, scenes: Path, out: Path) -> list[str]:
    """Grounding and referring of one MLLM on all RefCOCO splits of the scenes, one after the other, as one command."""
    data = ["--model", str(model), "--data", str(scenes / "refcoco"), "--images", str(scenes / "images"), "--out", str(out)]
    return chain([[PYTHON, f"eval/{name}.py", *data] for name in ("refcoco", "referring")])


def region_evaluations(model: Path, tower: str, scenes: Path, out: Path) -> list[str]:
    """Region classification of one encoder on seen and unseen names: CLOC by its Prompter, CLIP by every other way."""
    ways = {"cloc": [["prompter"]], "clip": [["roialign", "--layer", "-1"], ["roialign", "--layer", "-2"], ["crop"]]}
    commands = []
    for names in ("seen", "unseen"):
        files = ["--annotations", str(scenes / "regions" / f"{names}.json"), "--images", str(scenes / "images")]
        for way in ways[tower]:
            target = ["--model", str(model), "--feature", *way, "--out", str(out)]
            commands.append([PYTHON, "eval/region_classification.py", *files, *target])
    return chain(commands)


def chain(commands: list[list[str]]) -> list[str]:
    """Several commands as one that stops at the first failure."""
    script = 'import subprocess, sys, json\nfor c in json.loads(sys.argv[1]):\n    subprocess.run(c, check=True)'
    import json

    return [PYTHON, "-c", script, json.dumps(commands)]
