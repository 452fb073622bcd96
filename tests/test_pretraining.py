"""Pretraining with the real script: resume, several processes, learning, refusals.

Starting Python costs far more than these tiny runs, so runs share processes: one process does all single-process runs,
one spawn of two does ZeRO-2 and ZeRO-3, and only the kill and the launcher start the command itself.
"""

import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing
from pretraining_fixtures import (
    LOSS,
    RUN,
    SCRIPT,
    STEPS,
    assert_close_weights,
    assert_same_losses,
    assert_same_weights,
    do_runs,
    free_port,
    log_of,
    weights_of,
)
from transformers import CLIPModel

from encoder import ClocModel
from encoder.checkpoint import load_training_state
from encoder.config import tiny
from encoder.data.batches import RegionBatches
from encoder.data.reader import RegionDataset
from encoder.errors import DataError
from encoder.losses import LossConfig
from encoder.pretrained import load_encoder, load_processor
from encoder.pretraining import pretrain, run_identity
from encoder.pretraining_config import PretrainConfig
from encoder.start import make_model

# Minutes on a machine that is busy with other work, seconds on one that is not.
pytestmark = pytest.mark.timeout(1800)

KILL_AFTER = 12
# All that has a state or a draw of its own, for the exact resume.
BF16 = {"precision": "bf16", "steps": 12, "ema_decay": 0.9, "patch_dropout": 0.25, "gradient_checkpointing": True}
# The temperature starts at 14.3, above this ceiling. `mean` runs the part of the Prompter that `prompt` leaves out.
DROPPED = {
    "steps": 6,
    "patch_dropout": 0.25,
    "loss": {"max_logit_scale": 10.0},
    "model_fields": {"prompter_readout": "mean"},
}
SINGLE = {  # runs of one process, by name
    "cloc": {"ema_decay": 0.9},
    "clip": {"objective": "clip", "steps": 6},
    "bf16": BF16,
    "bf16_second_half": {**BF16, "goes_on": ("bf16", 6)},
    "bf16_at_its_end": {**BF16, "goes_on": ("bf16", 12)},
    "dropped": DROPPED,
    "overfit": {"shards": "few", "batch_size": 8, "steps": 120, "learning_rate": 3e-3, "weight_decay": 0.0, "log_every": 10},
    "from_clip": {"init": "clip/model", "steps": 3, "model_fields": {"prompter_readout": "mean"}},
    "from_cloc": {"init": "cloc/model", "steps": 3, "zero_stage": 0, "ema_decay": 0.5},
}
DOUBLE = {
    "zero2": {"zero_stage": 2, "ema_decay": 0.9},
    "zero3": {"zero_stage": 3, "ema_decay": 0.9},
    "zero2_dropped": {**DROPPED, "zero_stage": 2},
    "zero3_dropped": {**DROPPED, "zero_stage": 3, "gradient_checkpointing": True},
}
POISONED_STEP, POISONED_RANK = 3, 1


def train_on_a_poisoned_batch(rank: int, world: int) -> None:
    """A run in which one pixel of one rank is no number in one step; its error goes to poisoned/RANK.txt, and the records
    that a rank looked up to poisoned/RANK.names."""

    class Watched(RegionDataset):
        def where(self, index):
            with Path("poisoned", f"{rank}.names").open("a") as file:
                file.write(f"{super().where(index)}\n")
            return super().where(index)

    class Poisoned(RegionBatches):
        def part(self, step, number, count):
            batch = super().part(step, number, count)
            if step == POISONED_STEP and rank == POISONED_RANK:
                batch["pixel_values"][0, 0, 0, 0] = float("nan")
            return batch

    config = PretrainConfig(**{**RUN, "shards": "train", "output": "poisoned", "log_every": 10, "save_every": 2})
    dataset = Watched(config.shards, progress=False)
    model, processor = make_model(config, LossConfig(**LOSS), dataset)
    batches = Poisoned(dataset, processor, config.batch_size, rank=rank, world_size=world)
    try:
        pretrain(model, processor, batches, config, LossConfig(**LOSS))
    except DataError as error:
        Path("poisoned", f"{rank}.txt").write_text(str(error))


@pytest.fixture(scope="module")
def root(tmp_path_factory, region_shards) -> Path:
    """A folder with the shards, in which every run has a folder."""
    from conftest import write_shards

    folder = tmp_path_factory.mktemp("pretraining")
    shutil.copytree(region_shards, folder / "train")
    write_shards(folder / "few", 8)
    return folder


@pytest.fixture(scope="module")
def single(root) -> Path:
    multiprocessing.spawn(do_runs, (1, free_port(), str(root), SINGLE), nprocs=1)
    return root


@pytest.fixture(scope="module")
def double(root) -> Path:
    multiprocessing.spawn(do_runs, (2, free_port(), str(root), DOUBLE, train_on_a_poisoned_batch), nprocs=2)
    return root


def command(output: Path, shards: Path, **fields) -> list[str]:
    values = {**RUN, **LOSS, "shards": shards, "output": output, **fields}
    return [str(SCRIPT), *(part for key, value in values.items() for part in (f"--{key}", str(value)))]


def environment() -> dict:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def test_killed_and_started_again_equals_the_uninterrupted_run(single, root):
    output = root / "killed"
    process = subprocess.Popen(
        [sys.executable, *command(output, root / "train")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
    )
    latest, deadline = output / "checkpoints" / "latest", time.monotonic() + 900
    while not latest.is_file() or latest.read_text() < f"step_{KILL_AFTER:08d}":
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "model").exists() and latest.read_text() < f"step_{STEPS:08d}"

    again = subprocess.run([sys.executable, *command(output, root / "train")], capture_output=True, text=True, env=environment())
    assert again.returncode == 0, again.stderr
    assert "cloc: steps 0 to" not in again.stdout and f"done: {STEPS} steps" in again.stdout
    assert_same_weights(weights_of(output), weights_of(root / "cloc"))
    assert_same_losses(output, root / "cloc", 0.0)  # every step once in the log, with the same numbers
    assert len(list((output / "checkpoints").glob("step_*"))) == 2


@pytest.mark.parametrize("folder", ["model", "model_ema"])
def test_bf16_with_an_average_and_dropped_patches_resumes_bit_equal_too(single, root, folder):
    for run in ("bf16_second_half", "bf16_at_its_end"):
        assert_same_weights(weights_of(root / run, folder), weights_of(root / "bf16", folder))
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights_of(root / "bf16", folder).values())


def test_the_deepspeed_launcher_on_two_processes_equals_one(single, root):
    output = root / "launched"
    deepspeed = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    done = subprocess.run([*deepspeed, *command(output, root / "train")], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_losses(output, root / "cloc", 1e-5)
    assert json.loads((output / "model" / "training.json").read_text())["world_size"] == 2


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_two_processes_with_zero_equal_one(single, double, root, stage):
    assert_same_losses(root / stage, root / "cloc", 1e-5)
    assert_close_weights(weights_of(root / stage), weights_of(root / "cloc"))
    assert_close_weights(weights_of(root / stage, "model_ema"), weights_of(root / "cloc", "model_ema"))


def test_the_average_lies_behind_the_weights(single, root):
    """As a model of its own that loads, near the weights and not the same."""
    weights, average = weights_of(root / "cloc"), weights_of(root / "cloc", "model_ema")
    assert type(load_encoder(root / "cloc" / "model_ema")) is ClocModel and weights.keys() == average.keys()
    moved = [name for name in weights if not torch.equal(weights[name], average[name])]
    assert len(moved) > 0.9 * len(weights)
    assert max(float((weights[name] - average[name]).abs().max()) for name in weights) < 0.02
    assert not (root / "clip" / "model_ema").exists()
    plain, behind, start = weights_of(root / "from_cloc"), weights_of(root / "from_cloc", "model_ema"), weights
    name = "prompter.layer.q_proj.weight"  # without ZeRO: three steps from a CLOC, the average on its way
    assert 0 < float((behind[name] - start[name]).norm()) < float((plain[name] - start[name]).norm())


@pytest.mark.parametrize("run", ["zero2_dropped", "zero3_dropped"])
def test_dropped_patches_recomputed_layers_and_the_ceiling_on_two_processes(single, double, root, run):
    """The same patches are dropped on any number of ranks, and the temperature is held, where it is sharded too."""
    assert_same_losses(root / run, root / "dropped", 1e-5)
    assert_close_weights(weights_of(root / run), weights_of(root / "dropped"))
    ceiling = math.log(DROPPED["loss"]["max_logit_scale"])
    scale = float(weights_of(root / run)["logit_scale"])
    assert ceiling - 6 * RUN["learning_rate"] <= scale <= ceiling + 1e-6
    assert log_of(root / "dropped")[0]["loss"] != log_of(root / "cloc")[0]["loss"]


def test_a_number_that_is_none_names_step_rank_and_records(double, root, tiny_processor):
    sentences = {(root / "poisoned" / f"{rank}.txt").read_text() for rank in range(2)}
    assert len(sentences) == 1
    sentence = sentences.pop()
    dataset = RegionDataset(root / "train", progress=False)
    records = RegionBatches(dataset, tiny_processor, RUN["batch_size"]).indices(POISONED_STEP)[2:]
    names = [f"rank 1: train/{Path(dataset.where(index)).name}" for index in records]
    assert f"step 3: a feature of rank 1 is nan or infinite; the batch was 2 records ({'; '.join(names)})" in sentence
    assert (root / "poisoned" / "not_finite.txt").read_text().splitlines() == ["step 3", *names]
    # The other rank does not look for what it has not read.
    assert not (root / "poisoned" / "0.names").exists() and (root / "poisoned" / "1.names").read_text().count("\n") == 2
    # Found before step 4 was saved, and long before the next log line.
    assert (root / "poisoned" / "checkpoints" / "latest").read_text() == "step_00000002"


def test_those_runs_had_regions_unevenly_spread(root, tiny_processor):
    dataset = RegionDataset(root / "train", progress=False)
    halves = [RegionBatches(dataset, tiny_processor, RUN["batch_size"], rank=rank, world_size=2) for rank in range(2)]
    counts = [tuple(len(half[step]["boxes"]) for half in halves) for step in range(STEPS)]
    assert any(0 in pair and sum(pair) for pair in counts) and any(a != b for a, b in counts)


def test_clip_starts_where_cloc_starts_on_the_same_data(single, root):
    """Same towers, same first batch: the image-text loss of the first step is the same number."""
    clip, cloc = log_of(root / "clip"), log_of(root / "cloc")
    assert clip[0]["clip_loss"] == cloc[0]["clip_loss"] == clip[0]["loss"]
    assert not {"region_loss", "grounding_loss"} & set(clip[0])
    model, info = CLIPModel.from_pretrained(root / "clip" / "model", output_loading_info=True)
    assert type(load_encoder(root / "clip" / "model")) is CLIPModel
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert load_processor(root / "clip" / "model").image_processor.geometry == "pad"


def test_it_learns(single, root):
    """Eight records by heart: the total loss falls below half, each of its terms falls, and the temperature moves."""
    log = log_of(root / "overfit")
    first, last = log[0], log[-1]
    assert last["loss"] < 0.5 * first["loss"]
    for key in ("clip_loss", "region_loss", "grounding_loss"):
        assert last[key] < 0.7 * first[key], key
    assert last["logit_scale"] != first["logit_scale"] and last["lr"] < 1e-3 * max(line["lr"] for line in log)


def test_what_is_written(single, root):
    output = root / "cloc"
    model = load_encoder(output / "model")
    assert type(model) is ClocModel and model.logit_scale.shape == ()
    record = json.loads((output / "model" / "training.json").read_text())
    assert record["seed"] == 0 and record["steps"] == STEPS and record["loss"]["similar_text_threshold"] == 0.999
    assert list((output / "tensorboard").glob("events.*"))
    line = log_of(output)[-1]
    assert {"step", "lr", "loss", "masked_fraction", "images_per_second", "regions", "coverage"} <= set(line)
    assert load_processor(output / "model").texts(["red square"])["input_ids"][0, -1] == 1


def test_starts_from_clip_and_from_cloc(single, root):
    clip, started = load_encoder(root / "clip" / "model"), load_encoder(root / "from_clip" / "model")
    assert type(started) is ClocModel and started.config.prompter_readout == "mean"
    weight = "vision_model.embeddings.patch_embedding.weight"
    moved = (started.state_dict()[weight] - clip.state_dict()[weight]).abs().max()
    assert 0 < float(moved) < 0.02  # three small steps away, not another draw
    cloc, continued = (load_encoder(root / name / "model").state_dict() for name in ("cloc", "from_cloc"))
    name = "prompter.layer.q_proj.weight"
    assert 0 < float((cloc[name] - continued[name]).abs().max()) < 0.02


def test_a_checkpoint_of_another_configuration_is_refused(single, root):
    """Before any weight is loaded: no engine is needed to find out."""
    config = PretrainConfig(**{**RUN, "shards": "elsewhere", "output": str(root / "cloc"), "ema_decay": 0.9})
    identity = run_identity(config, LossConfig(**LOSS), tiny())
    for change, sentence in (
        ({"learning_rate": 2e-3}, r"made with learning_rate = 0.0003, this run has 0.002; choose another output folder"),
        ({"objective": "clip"}, "made with objective = cloc, this run has clip"),
        ({"loss.similar_text_threshold": None}, "made with loss.similar_text_threshold = 0.999, this run has None"),
        ({"model.prompter_readout": "mean"}, "made with model.prompter_readout = prompt, this run has mean"),
        ({"model.new": 3}, "made before model.new was kept in it, this run has 3"),
    ):
        with pytest.raises(DataError, match=sentence):
            load_training_state(None, root / "cloc", {**identity, **change})
    copy = root / "copied"
    shutil.copytree(root / "cloc", copy)
    tag = (copy / "checkpoints" / "latest").read_text()
    state = json.loads((copy / "checkpoints" / tag / "run.json").read_text())
    with pytest.raises(DataError, match="made by 4 processes with ZeRO-3, .* this run has 1; start as many"):
        (copy / "checkpoints" / tag / "run.json").write_text(
            json.dumps({**state, "world_size": 4, "identity": {**state["identity"], "zero_stage": 3}})
        )
        load_training_state(None, copy, {**identity, "zero_stage": 3})
    (copy / "checkpoints" / tag / "run.json").unlink()
    with pytest.raises(DataError, match="run.json is missing"):
        load_training_state(None, copy, identity)
    assert load_training_state(None, root / "nowhere", identity) == 0


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--shards", "nowhere"], "error: nowhere matches no file; give .tar shards"),
        (["--shards", "train", "--preset", "huge"], "error: preset 'huge' is not known; choose one of nano, tiny"),
        (["--shards", "train", "--objective", "siglip"], "error: objective is 'siglip'; choose one of clip, cloc"),
        (["--shards", "train", "--batch_size", "64"], "error: the shards hold 24 records, fewer than one batch of 64"),
        (["--shards", "train", "--warmup_steps", "50"], "error: warmup_steps 50 is not below steps 40"),
        (["--shards", "train", "--init", "nowhere"], "error: nowhere/config.json does not exist"),
        (["--shards", "train", "--similar_text_threshold", "2"], "error: LossConfig.similar_text_threshold is 2.0"),
        (["recipe.yaml", "--shards", "train"], "error: recipe recipe.yaml: field 'learning_rat' is not known; did you mean"),
        (["--shards", "train", "--ema_decay", "1"], "error: ema_decay is 1.0; give 0 (off) or a share below 1"),
        (["--shards", "train", "--compile", "true", "--zero_stage", "3"], "error: compile is true with zero_stage 3, whose"),
        (["--shards", "train", "--max_boxes", "-1"], "error: max_boxes is -1; give at least 1"),
        (["--shards", "train", "--save_every", "0"], "error: save_every is 0; give at least 1"),
        (["--shards", "train", "--seed", "-1"], "error: seed is -1; give at least 0"),
        (["--shards", "train", "--learning_rate", "nan"], "error: learning_rate is nan; give at least 0"),
        (["--shards", "train", "--beta2", "98"], "error: beta2 is 98.0; give 0 (off) or a share below 1"),
        (["--output", "x"], "error: 'shards' is not given; set it in the recipe or with --shards"),
    ],
)
def test_bad_input_is_one_sentence_before_any_training(root, flags, sentence, monkeypatch, capsys):
    monkeypatch.chdir(root)
    Path("recipe.yaml").write_text("learning_rat: 1e-3\n")
    recipe = [flag for flag in flags if flag.endswith(".yaml")]
    values = {"preset": "tiny", "batch_size": 4, "steps": 40, "warmup_steps": 2, "output": "refused"}
    given = [part for key, value in values.items() if f"--{key}" not in flags for part in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *recipe, *given, *(flag for flag in flags if flag not in recipe)])
    script = runpy.run_path(str(SCRIPT))
    main = script["main"]
    main.__globals__["start_process_group"] = lambda: None
    with pytest.raises(SystemExit) as stopped:
        script["run_main"](main)
    *progress, shown = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and shown.startswith(sentence) and all(not line or "shards:" in line for line in progress)
    assert not (root / "refused").exists()
