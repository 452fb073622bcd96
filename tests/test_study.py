"""`scripts/study.py` end to end on a tiny recipe; its scores against the predictor's own answers, its table by hand."""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from encoder.arguments import read_recipe
from encoder.boxes import paired_iou
from encoder.errors import DataError
from encoder.predictor import RegionPredictor
from encoder.pretraining_config import RUN_FIELDS, build_configs

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import study  # noqa: E402
from study_table import pooled, read_run, write_table  # noqa: E402

pytestmark = pytest.mark.timeout(1800)

RUNS = ("clip", "cloc", "roi_align", "from_clip")
RECIPE = """
preset: tiny
vocab_size: 96
batch_size: 4
warmup_steps: 2
learning_rate: 1e-3
precision: fp32
log_every: 2
"""


def do_runs(arguments: argparse.Namespace) -> None:
    """In a process of its own, one variant after the other, as `--variant-here` does each in one."""
    torch.set_num_threads(1)
    import study_run

    study_run.start_process_group()
    study_run.start_process_group = lambda: None
    for variant in RUNS:
        values, folder = study.variant_values(arguments, variant, 0), study.run_folder(arguments.out, variant, 0)
        study_run.train_and_evaluate(values, arguments.scenes, folder, study.VARIANTS[variant])
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """A finished study of four variants, five steps each."""
    base = tmp_path_factory.mktemp("study")
    command = [sys.executable, str(SCRIPTS / "make_scenes.py"), "--out", str(base / "scenes"), "--train", "24", "--eval", "20"]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent)}
    subprocess.run([*command, "--workers", "1"], check=True, env=environment, capture_output=True)
    (base / "recipe.yaml").write_text(RECIPE)
    arguments = argparse.Namespace(
        scenes=base / "scenes", out=base / "out", recipe=base / "recipe.yaml", steps=5, seeds=[0], variants=list(RUNS), parallel=2
    )
    study.check_settings(arguments)
    process = multiprocessing.get_context("spawn").Process(target=do_runs, args=(arguments,))
    process.start()
    process.join()
    assert process.exitcode == 0
    return arguments


def result(arguments, variant):
    return json.loads((study.run_folder(arguments.out, variant, 0) / "result.json").read_text())


@torch.no_grad()
def box_head_answers(predictor, picture, names):
    """The BoxHead's boxes as they are, in pixels: `RegionPredictor.ground` also puts crossed corners in order."""
    model, processor = predictor.model, predictor.processor
    inputs, (geometry,) = processor.images([picture])
    texts = model.encode_text(**processor.texts(names))
    tokens = model.encode_image(inputs["pixel_values"]).tokens
    grounded = model.embed_texts(tokens, texts, torch.zeros(len(names), dtype=torch.long))
    return geometry.boxes_to_image(model.predict_boxes(grounded))


def test_scores_are_what_the_predictor_answers(arguments):
    scores = result(arguments, "cloc")["scores"]
    predictor = RegionPredictor.from_pretrained(study.run_folder(arguments.out, "cloc", 0) / "training" / "model")
    seen = json.loads((arguments.scenes / "regions" / "seen.json").read_text())
    names = [category["name"] for category in seen["categories"]]
    number = {category["id"]: index for index, category in enumerate(seen["categories"])}
    hits, ious = [], []
    for image in seen["images"]:
        rows = [row for row in seen["annotations"] if row["image_id"] == image["id"]]
        boxes = torch.tensor([row["bbox"] for row in rows])
        boxes[:, 2:] += boxes[:, :2]
        true = [number[row["category_id"]] for row in rows]
        picture = Image.open(arguments.scenes / "images" / image["file_name"]).convert("RGB")
        predictor.set_image(picture)
        hits += (predictor.classify_boxes(boxes, names)[0] == torch.tensor(true)).tolist()
        once = [index for index, name in enumerate(true) if true.count(name) == 1]
        if once:
            ious += paired_iou(box_head_answers(predictor, picture, [names[true[index]] for index in once]), boxes[once]).tolist()
    assert scores["region_classification/seen/prompter"]["micro"]["value"] == pytest.approx(np.mean(hits))
    pointed = scores["text_to_box/seen"]
    assert pointed["n"] == len(ious) > 5 and pointed["mean_iou"] == pytest.approx(np.mean(ious), abs=1e-5)


def test_each_variant_is_read_in_its_own_ways(arguments):
    ways = {variant: {key.rpartition("/")[2] for key in result(arguments, variant)["scores"]} for variant in RUNS}
    assert ways["clip"] == {"roialign-1", "roialign-2", "crop"}
    assert ways["cloc"] == {"prompter", "roialign-1", "seen"}  # seen: of text_to_box, which has no ways
    assert ways["roi_align"] == {"prompter"} and ways["from_clip"] == {"prompter", "seen"}
    made = json.loads((study.run_folder(arguments.out, "from_clip", 0) / "training" / "model" / "training.json").read_text())
    assert made["init"] == str(study.run_folder(arguments.out, "clip", 0) / "training" / "model")
    assert made["warmup_steps"] == 0  # a tenth of five steps
    for variant in RUNS:
        assert result(arguments, variant)["images_per_cpu_second"] > 0


def test_the_table_pools_seeds_and_pairs_questions(arguments, tmp_path):
    out = tmp_path / "out"
    for seed in (0, 1):  # a second seed whose `cloc` is the first one's roi_align
        shutil.copytree(arguments.out / "seed_0", out / f"seed_{seed}", ignore=shutil.ignore_patterns("training"))
    shutil.rmtree(out / "seed_1" / "cloc" / "eval")
    shutil.copytree(out / "seed_1" / "roi_align" / "eval", out / "seed_1" / "cloc" / "eval")
    for name in ("region_classification/seen", "region_classification/unseen", "text_to_region/seen", "region_to_text/seen"):
        source = arguments.out / "seed_0" / "cloc" / "eval" / name / "roialign-1"
        shutil.copytree(source, out / "seed_1" / "cloc" / "eval" / name / "roialign-1")
    shutil.copytree(arguments.out / "seed_0/cloc/eval/text_to_box", out / "seed_1/cloc/eval/text_to_box")
    text = write_table(out, list(study.VARIANTS))
    record = json.loads((out / "study.json").read_text())
    accuracy = {v: result(arguments, v)["scores"] for v in RUNS}
    own = {v: accuracy[v]["region_classification/seen/prompter"]["micro"]["value"] for v in RUNS if v != "clip"}
    pooled_value = record["cloc"]["seen names"]["value"]
    assert pooled_value == pytest.approx((own["cloc"] + own["roi_align"]) / 2) and record["cloc"]["seeds"] == [0, 1]
    change = record["roi_align"]["seen names"]["difference"]
    assert change["value"] == pytest.approx((own["roi_align"] - own["cloc"]) / 2)
    assert change["low"] <= change["value"] <= change["high"] and change["n"] == record["cloc"]["seen names"]["n"]
    clip = accuracy["clip"]
    ways = {way: clip[f"region_classification/unseen/{way}"]["micro"]["value"] for way in ("roialign-1", "roialign-2", "crop")}
    best = record["clip"]["unseen names"]
    assert best["value"] == pytest.approx(max(ways.values())) and ways[best["read_by"]] == max(ways.values())
    lines = text.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:7]] == [
        "clip",
        "cloc",
        "cloc, read by RoIAlign",
        "roi_align",
        "from_clip",
    ]
    assert f"{100 * pooled_value:.1f} [" in lines[3] and lines[5].count(" - ") == 2  # RoIAlign points at nothing
    # An interval redraws pictures, not questions: of the same answers twice it is no narrower.
    scored = read_run(out / "seed_0" / "cloc").scored["region_classification/seen"]["prompter"]
    one, two = pooled([scored], "micro"), pooled([scored, scored], "micro")
    assert (one.value, one.low, one.high, 2 * one.n) == (two.value, two.low, two.high, two.n)


def test_what_is_done_is_not_done_again_and_other_settings_are_refused(arguments, monkeypatch):
    monkeypatch.setattr(study.subprocess, "run", lambda *_, **__: pytest.fail("a finished run was started again"))
    assert study.run_all(arguments) == []
    other = argparse.Namespace(**{**vars(arguments), "steps": 7})
    with pytest.raises(DataError, match="made with steps = 5, this one has 7; choose another --out"):
        study.check_settings(other)
    with pytest.raises(DataError, match="has no manifest.json"):
        study.check_settings(argparse.Namespace(**{**vars(arguments), "scenes": arguments.out}))


def test_a_failure_stops_what_goes_on_from_it_and_nothing_else(arguments, monkeypatch, tmp_path):
    done = []

    def run_variant(args, variant, seed):
        if variant == "clip":
            raise DataError("clip broke")
        done.append((variant, seed))

    monkeypatch.setattr(study, "run_variant", run_variant)
    wanted = {**vars(arguments), "out": tmp_path, "variants": ["from_clip", "clip", "cloc"], "seeds": [0, 1]}
    assert set(study.run_all(argparse.Namespace(**wanted))) == {"clip broke"}
    assert sorted(done) == [("cloc", 0), ("cloc", 1)]
    alone = argparse.Namespace(**{**wanted, "variants": ["from_clip"]})
    with pytest.raises(DataError, match="'from_clip' goes on from 'clip' of the same seed; add 'clip'"):
        study.run_all(alone)


def test_an_interruption_starts_nothing_more(monkeypatch, tmp_path):
    done = []

    def run_variant(args, variant, seed):
        time.sleep(0.3)  # all are waiting by now
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        done.append(seed)

    monkeypatch.setattr(study, "run_variant", run_variant)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            study.run_all(argparse.Namespace(out=tmp_path, variants=["cloc"], seeds=[0, 1, 2], parallel=1))
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == [0]


def test_a_variant_changes_the_fields_that_the_recipe_and_its_preset_set(tmp_path):
    """What `from_clip` starts from is a plain CLIP, which brings no field of the Prompter."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("tiny", "nano") + "prompter_tokens: patches\n")
    arguments = argparse.Namespace(scenes=tmp_path, out=tmp_path, recipe=recipe, steps=5)
    expected = {
        "cloc": {"prompter_tokens": "patches"},
        "joint": {"prompter_tokens": "patches", "box_token": "joint"},
        "shared_prompter": {"prompter_tokens": "patches", "prompter_shared": True},
        "roi_align": {"prompter_tokens": "patches", "region_encoder": "roi_align"},
        "from_clip": {"prompter_tokens": "patches", "box_max_frequency": 8.0},
    }
    for variant, fields in expected.items():
        config, _ = build_configs(study.variant_values(arguments, variant, 0))
        assert config.model_fields == fields, variant


def test_fields_of_the_model_in_a_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    fields = {"prompter_readout": "prompt", "box_token": "joint", "box_min_frequency": 0.25, "box_head_width": 48}
    recipe.write_text("".join(f"{name}: {value}\n" for name, value in {**fields, "shards": "a", "output": "b"}.items()))
    config, _ = build_configs(read_recipe(recipe, RUN_FIELDS))
    assert config.model_fields == fields
    recipe.write_text("box_tokens: joint\n")
    with pytest.raises(DataError, match="field 'box_tokens' is not known; did you mean 'box_token'"):
        read_recipe(recipe, RUN_FIELDS)


def test_a_fresh_head_on_frozen_towers_learns_to_point(arguments, monkeypatch, tmp_path):
    import study_text_to_box as alone

    model = study.run_folder(arguments.out, "cloc", 0) / "training" / "model"
    monkeypatch.setitem(alone.SETTINGS, "mse", alone.Setting(once=True, rate=3e-3, steps=250))
    monkeypatch.setitem(alone.SETTINGS, "l1_giou", alone.Setting("l1_giou", once=True, rate=3e-3, steps=250, readout="mean"))
    shards, out = str(arguments.scenes / "shards" / "train"), tmp_path / "out"
    flags = ["--model", str(model), "--shards", shards, "--scenes", str(arguments.scenes), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["study_text_to_box.py", *flags, "--settings", "mse", "l1_giou"])
    alone.main()
    results = json.loads((out / "text_to_box.json").read_text())
    assert list(results) == ["the model's own head", "mse", "l1_giou"]
    own = result(arguments, "cloc")["scores"]["text_to_box/seen"]
    assert results["the model's own head"]["mean_iou"]["n"] == own["n"]
    own_iou = results["the model's own head"]["mean_iou"]["value"]
    for name in ("mse", "l1_giou"):  # in the scenes learned from
        assert results[name]["train_mean_iou"]["value"] > max(0.3, own_iou + 0.2)
    flags[1] = str(study.run_folder(arguments.out, "roi_align", 0) / "training" / "model")
    monkeypatch.setattr(sys, "argv", ["study_text_to_box.py", *flags])
    with pytest.raises(DataError, match="has no BoxHead"):
        alone.main()
