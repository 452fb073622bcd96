"""`scripts/study_mllm.py`: what each variant changes of the recipe, and its tables by hand."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from encoder.arguments import add_fields
from encoder.errors import DataError
from eval.predictions import Prediction, PredictionLog, Target
from mllm.config import MllmConfig, load_config

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import study_mllm  # noqa: E402
from study_mllm_table import write_table  # noqa: E402


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["study_mllm.py", "--out", str(tmp_path / "out"), "--steps", "50"])
    return study_mllm.parse_arguments()


def configuration(arguments, variant, tower) -> dict:
    """The run that a variant's command line asks for, but for its output."""
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    add_fields(parser, MllmConfig, "fields")
    flags = vars(parser.parse_args(study_mllm.train_command(variant, tower, arguments)[2:]))
    return vars(load_config(flags.pop("recipe"), flags)) | {"output": None}


def test_a_variant_changes_its_own_fields_and_no_other(arguments):
    expected = {
        "pooling": {"region_tokens": "pooling"},
        "prompter": {"region_tokens": "prompter", "prompter": str(ROOT / "weights" / "cloc")},
        "tuned_tower": {
            "train": ["projector", "llm", "tower"],
            "tower_learning_rate": study_mllm.TUNED_RATE,
            "cache_features": False,
        },
    }
    for tower in ("clip", "cloc"):
        base = configuration(arguments, "coords", tower)
        assert base["model"] == str(ROOT / "weights" / f"mllm_{tower}") and base["max_steps"] == 50 and base["seed"] == 0
        assert [Path(entry["path"]).parent.name for entry in base["data"]] == ["pointed", "questions"]
        assert study_mllm.TUNED_RATE == pytest.approx(base["learning_rate"] / 10)
        for variant, fields in expected.items():
            if tower in study_mllm.VARIANTS[variant].towers:
                other = configuration(arguments, variant, tower)
                assert {key: value for key, value in other.items() if value != base[key]} == fields
        first, second = (configuration(arguments, f"layer_{layer}", tower) for layer in (-1, -2))
        assert {key: (first[key], second[key]) for key in first if first[key] != second[key]} == {"feature_layer": (-1, -2)}
        assert first["llm_preset"] == "nano" and first["model"] is None and first["images"].endswith("easy/images")


def test_stages_draw_and_then_run_each_variant_on_its_towers(arguments):
    arguments.variants = ["coords", "prompter"]
    stages = study_mllm.stages_of(arguments)
    assert [(stage.name, len(stage.commands)) for stage in stages] == [("scenes", 1), ("coords", 2), ("prompter", 1)]
    commands = json.loads(stages[2].commands[0][3])
    assert [Path(command[1]).name for command in commands] == ["finetune_mllm.py", *["referring.py"] * 3, "refcoco.py"]
    assert [command[-1] for command in commands[1:4]] == ["box", "point", "mask"]
    (draw,) = json.loads(stages[0].commands[0][3])
    assert draw[draw.index("--train") + 1] == "400"  # 50 steps of 8, each picture once
    arguments.variants = ["layer_-1"]
    drawn = json.loads(study_mllm.stages_of(arguments)[0].commands[0][3])
    assert len(drawn) == 2 and drawn[1][-3:] == ["--objects", "1", "2"]


def write_answers(folder: Path, benchmark: str, right: np.ndarray) -> None:
    """An evaluation of as many questions about half as many pictures."""
    targets = [Target(str(i), f"{i // 2}.png", 80, 60, "", (0.0, 0.0, 10.0, 10.0), "bus") for i in range(len(right))]
    protocol = {"benchmark": benchmark, "split": "val", "task": "naming", "completeness": "own data"}
    log = PredictionLog(folder / benchmark / "val", protocol, {"kind": "mllm"}, targets, {})
    log.append([Prediction(t.id, t.image, "?", "bus" if ok else "cat") for t, ok in zip(targets, right, strict=True)])


def test_tables_show_accuracies_and_paired_differences(tmp_path):
    rng = np.random.default_rng(0)
    right = {}
    for name, tower in [("coords", "clip"), ("coords", "cloc"), ("prompter", "cloc"), ("layer_-2", "cloc")]:
        for benchmark in ["refcoco_referring", *["refcoco_referring_point"] * (name != "layer_-2")]:
            right[tower, name, benchmark] = rng.random(80) < 0.6
            write_answers(tmp_path / f"{tower}_{name}" / "eval", benchmark, right[tower, name, benchmark])
    text = write_table(tmp_path, study_mllm.VARIANTS)
    record = json.loads((tmp_path / "study.json").read_text())
    titles = ["clip coords", "cloc coords", "cloc prompter", "cloc layer_-2"]
    changes = ["cloc prompter − cloc coords", "cloc coords − clip coords"]
    assert list(record) == [f"val/{title}" for title in titles + changes]
    for title in titles:
        tower, name = title.split()
        value = record[f"val/{title}"]["name by box"]
        assert value["value"] == pytest.approx(right[tower, name, "refcoco_referring"].mean()) and value["n"] == 80
        assert value["low"] < value["value"] < value["high"]
    for title in changes:
        one, base = (tuple(part.split()) for part in title.split(" − "))
        for column, benchmark in (("name by box", "refcoco_referring"), ("by point", "refcoco_referring_point")):
            expected = right[*one, benchmark].mean() - right[*base, benchmark].mean()
            assert record[f"val/{title}"][column]["value"] == pytest.approx(expected)
    assert [line.count(" - ") for line in text.splitlines() if line.startswith("| cloc layer_-2")] == [3]
    with pytest.raises(DataError, match="holds no evaluated variant"):
        write_table(tmp_path / "nothing", study_mllm.VARIANTS)
