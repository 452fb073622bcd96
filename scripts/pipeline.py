"""Commands that quickstart.py and reproduce.py share, so that both measure in the same way."""

import json
import sys
from pathlib import Path

import yaml

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


def training_data(scenes: Path, train: Path | None = None) -> list[str]:
    """Flags of finetune_mllm.py: the questions of a folder of scenes, or `train`, and its val split for the held-out loss."""
    questions = scenes / "questions"
    data = ["--data", str(train or questions / "train.json"), "--val_data", str(questions / "val.json")]
    return [*data, "--images", str(scenes / "images")]


def balanced_data(scenes: Path, names: str = "names") -> list[str]:
    """As `training_data`, but with the name of every object and three tenths of the questions, most of which are for a box.

    names: the folder of questions for names, `names` or `pointed`

    A box in words has 18 tokens and a name 2.5, and tokens are what the loss counts: names are 6% of those in the questions
    alone, and 29% in this mixture.
    """
    scenes.parent.mkdir(parents=True, exist_ok=True)
    mixture = scenes.parent / f"{scenes.name}_{'balanced' if names == 'names' else names}.yaml"
    asked, questions = (str(scenes / kind / "train.json") for kind in (names, "questions"))
    mixture.write_text(yaml.safe_dump([{"path": asked}, {"path": questions, "weight": 0.3}]))
    return training_data(scenes, mixture)


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
