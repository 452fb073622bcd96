"""Commands that quickstart.py and reproduce.py share, so that both measure in the same way."""

import json
import sys
from pathlib import Path

PYTHON = sys.executable
TOWERS = ("clip", "cloc")
# Every way to read a box with an encoder alone; a CLIP gets all that need no Prompter, and its best one is compared.
FEATURES = {"cloc": [["prompter"]], "clip": [["roialign", "--layer", "-1"], ["roialign", "--layer", "-2"], ["crop"]]}
RUN_ALL = "import json, subprocess, sys\nfor command in json.loads(sys.argv[1]): subprocess.run(command, check=True)"


def in_order(commands: list[list[str]]) -> list[str]:
    """Several commands as one, which stops at the first that fails."""
    return [PYTHON, "-c", RUN_ALL, json.dumps(commands)]


def scenes_command(folder: Path, pictures: str, train: int, evaluate: int, seed: int) -> list[str]:
    """Draws scenes. train: scenes; evaluate: expressions of each of val, testA and testB, at least."""
    numbers = ["--train", str(train), "--eval", str(evaluate), "--seed", str(seed), "--questions", "8"]
    return [PYTHON, "scripts/make_scenes.py", "--out", str(folder), "--pictures", pictures, *numbers]


def training_data(scenes: Path) -> list[str]:
    """Flags of finetune_mllm.py: the questions of a folder of scenes, and its validation split for the held-out loss."""
    train, val = (str(scenes / "questions" / f"{split}.json") for split in ("train", "val"))
    return ["--data", train, "--val_data", val, "--images", str(scenes / "images")]


def mllm_evaluations(model: Path, scenes: Path, out: Path) -> list[str]:
    """Grounding and referring of one MLLM on all RefCOCO splits of the scenes."""
    data = ["--model", str(model), "--data", str(scenes / "refcoco"), "--images", str(scenes / "images"), "--out", str(out)]
    return in_order([[PYTHON, f"eval/{name}.py", *data] for name in ("refcoco", "referring")])


def region_evaluations(encoder: Path, tower: str, scenes: Path, out: Path) -> list[str]:
    """Region classification of one encoder, on names it was trained with and on names it was not."""
    commands = []
    for names in ("seen", "unseen"):
        files = ["--annotations", str(scenes / "regions" / f"{names}.json"), "--images", str(scenes / "images")]
        for feature in FEATURES[tower]:
            settings = ["--model", str(encoder), "--feature", *feature, "--out", str(out)]
            commands.append([PYTHON, "eval/region_classification.py", *files, *settings])
    return in_order(commands)
