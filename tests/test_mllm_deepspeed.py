"""Two DeepSpeed processes against one plain process on the joined batch, text-only conversations among them."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from mllm_fixtures import recipe, write_clip, write_conversations

from mllm.checkpoint import load_mllm
from mllm.config import MllmConfig
from mllm.dry_run import outline
from mllm.model import Mllm
from mllm.trainer import MllmTrainer
from mllm.training import read_dataset, train, training_arguments

ROOT = Path(__file__).parents[1]
STEPS = 5
# bf16 weights resolve a half percent of themselves; a step moves them as little.
TOLERANCE = {"fp32": 2e-4, "bf16": 1e-2}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    # A third of the conversations has no picture: with two per process, some process often has none at all.
    write_conversations(folder, 8, text_only=4)
    write_clip(folder / "clip")
    return folder


def launch(folder: Path, name: str, command: list[str], **fields) -> tuple[list[float], list[float]]:
    """Runs the script and returns the loss and gradient norm of each step, as its log lines say them."""
    values = recipe(folder, output=str(folder / name), max_steps=STEPS, warmup=0.0, **{"save_every": 0} | fields)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [*command, "scripts/finetune_mllm.py", str(folder / f"{name}.yaml")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    lines = re.findall(r"^step \d+/\d+  loss (\S+)  lr \S+  grad norm (\S+)", done.stdout, re.MULTILINE)
    return [float(loss) for loss, _ in lines], [float(norm) for _, norm in lines]


def deepspeed_command() -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ["deepspeed", "--num_gpus", "2", "--master_port", str(port)]


@pytest.fixture(scope="module")
def one_process(world):
    return {kind: launch(world, kind, [sys.executable], batch_size=4, precision=kind) for kind in TOLERANCE}


@pytest.mark.parametrize(("stage", "precision"), [(2, "fp32"), (3, "fp32"), (3, "bf16")])
def test_two_processes_give_the_loss_curve_of_one(world, one_process, stage, precision):
    """Each loss is over all processes' supervised tokens: a mean of the processes' means would be off where text is short."""
    name, zero = f"zero{stage}_{precision}", f"scripts/deepspeed/zero{stage}.json"
    losses, norms = launch(world, name, deepspeed_command(), batch_size=2, zero=zero, precision=precision)
    assert len(losses) == STEPS
    tolerance = TOLERANCE[precision]
    torch.testing.assert_close(losses, one_process[precision][0], rtol=tolerance, atol=1e-4)  # a line says four decimals
    torch.testing.assert_close(norms, one_process[precision][1], rtol=5 * tolerance, atol=1e-2)
    one, two = (load_mllm(world / folder)[0].state_dict() for folder in (precision, name))
    for key, value in one.items():
        moved = 1e-3 * STEPS if precision == "bf16" else 1e-4  # the most that Adam moves a weight; a hundredth of it
        torch.testing.assert_close(two[key], value, rtol=0.01, atol=moved, msg=lambda text, key=key: f"{key}: {text}")


def test_plain_python_takes_a_zero_file(world, one_process):
    """As every published recipe names one, and a single GPU needs no launcher."""
    zero = {"zero": "scripts/deepspeed/zero2.json", "precision": "fp32"}
    losses, _ = launch(world, "plain", [sys.executable], batch_size=4, **zero)
    torch.testing.assert_close(losses, one_process["fp32"][0], rtol=2e-4, atol=1e-4)


def test_two_processes_without_zero_train_a_tower_with_recomputed_layers(world):
    """DDP, which stops at parameters that no gradient comes to: of the tower's last layers, say, at `feature_layer` -2."""
    fields = {"train": ["projector", "llm", "tower"], "gradient_checkpointing": True, "precision": "fp32"}
    one = launch(world, "ddp_one", [sys.executable], batch_size=4, **fields)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = launch(world, "ddp_two", torchrun, batch_size=2, **fields)
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("geometry", ["pad", "anyres"])
def test_ranks_without_regions_under_zero3_give_the_loss_curve_of_one_process(world, tiny_folder, geometry):
    """Region tokens with Prompter and tower learning, on squares and on tiles: every process runs them in every step, regions
    or not, a picture or none."""
    fields = {
        "tower": str(tiny_folder),
        "region_tokens": "prompter",
        "train": ["projector", "llm", "tower"],
        "geometry": geometry,
    }
    two_processes_equal_one(world, geometry, 3, fields)


def two_processes_equal_one(folder: Path, name: str, stage: int, fields: dict) -> None:
    """Loss and gradient norm of every step, and the weights at the end."""
    names = f"{name}_one", f"{name}_zero{stage}"
    one = launch(folder, names[0], [sys.executable], batch_size=4, precision="fp32", **fields)
    zero = {"zero": f"scripts/deepspeed/zero{stage}.json", "precision": "fp32"}
    two = launch(folder, names[1], deepspeed_command(), batch_size=2, **zero, **fields)
    assert len(two[0]) == STEPS
    torch.testing.assert_close(two[0], one[0], rtol=2e-4, atol=1e-4)
    torch.testing.assert_close(two[1], one[1], rtol=1e-3, atol=1e-2)
    expected, weights = (load_mllm(folder / name)[0].state_dict() for name in names)
    for key, value in expected.items():
        torch.testing.assert_close(weights[key], value, rtol=0.01, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("by", ["prompter", "pooling"])
def test_a_rank_and_a_whole_step_without_regions_under_zero2(tmp_path, tiny_folder, by):
    """In some step one process has regions and the other none, and some step is text alone in both."""
    write_conversations(tmp_path, 4, text_only=8)
    fields = {"tower": str(tiny_folder), "region_tokens": by, "train": ["projector", "llm", "tower"]}
    config = MllmConfig(**recipe(tmp_path, output=str(tmp_path / "order"), batch_size=4, **fields))
    dataset = read_dataset(config, outline(config), config.data)
    wanted = {(True, False), (False, False)}
    fields["seed"] = next(seed for seed in range(100) if wanted <= who_has_regions(replace(config, seed=seed), dataset))
    two_processes_equal_one(tmp_path, by, 2, fields)


def who_has_regions(config: MllmConfig, dataset) -> set[tuple[bool, bool]]:
    """For the steps of the first epoch: has the first process regions, has the second?"""
    arguments = training_arguments(config, None, Path(config.output))
    trainer = MllmTrainer(config, Mllm(torch.nn.Linear(1, 1), None, None), dataset, None, {"train": list}, arguments)
    steps = [[len(row.images) > 0 for row in rows] for rows in trainer.get_train_dataloader()]  # each picture has regions
    return {(any(step[:2]), any(step[2:])) for step in steps}


def test_zero3_saves_and_loads_a_tuned_tower_and_lora_with_the_loss_in_blocks(world, tmp_path):
    """All at once against one plain process: sharded tower, projector and LoRA come out whole and load again."""
    write_conversations(world, 3, seed=1, text_only=2)  # held-out rows that do not divide by two processes
    base = Path(world) / "fp32"
    if not (base / "grounding.json").is_file():
        launch(world, "fp32", [sys.executable], batch_size=4, precision="fp32")
    fields = {
        "model": str(base),
        "train": ["projector", "llm_lora", "tower"],
        "tower_learning_rate": 1e-4,
        "lora_rank": 4,
        "lora_dropout": 0.0,
        "precision": "fp32",
        "save_dtype": "float32",
        "val_data": [str(Path(world) / "conversations_1.json")],
        "val_every": STEPS,
    }
    plain, _ = launch(world, "tuned1", [sys.executable], batch_size=4, **fields)
    zero = {"zero": "scripts/deepspeed/zero3.json", "loss_block": 16}
    losses, _ = launch(world, "tuned2", deepspeed_command(), batch_size=2, **fields, **zero)
    torch.testing.assert_close(losses, plain, rtol=2e-4, atol=1e-4)
    (one, two), before = (load_mllm(Path(world) / name)[0].state_dict() for name in ("tuned1", "tuned2")), load_mllm(base)[0]
    moved = set()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0.01, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
        if not torch.equal(value, before.state_dict()[key]):
            moved.add(key.split(".")[1])
    assert moved == {"vision_tower", "multi_modal_projector", "language_model"}
    logs = [(Path(world) / name / "log.jsonl").read_text().splitlines() for name in ("tuned1", "tuned2")]
    held_out = [json.loads(lines[-1])["eval_accuracy"] for lines in logs]
    assert held_out[0] == held_out[1]


@pytest.mark.parametrize(("stage", "more"), [(2, {"llm_bits": 4}), (3, {"save_adapter": True})], ids=["qlora", "lora"])
def test_resumed_equals_uninterrupted_bit_by_bit(world, tmp_path, stage, more):
    """Gone on with from its third step, by the launcher: as if the rest had never been."""
    base = train(MllmConfig(**recipe(world, output=str(tmp_path / "base"), max_steps=1, save_every=0)))
    fields = {"model": str(base), "train": ["projector", "llm_lora"], "lora_rank": 4, "lora_dropout": 0.2, "batch_size": 2}
    fields |= {"zero": f"scripts/deepspeed/zero{stage}.json", "precision": "bf16", "save_every": 3, **more}
    name, out = f"resumed{stage}", world / f"resumed{stage}"
    whole, _ = launch(world, name, deepspeed_command(), **fields)
    weights = {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
    for path in [*out.glob("*.safetensors"), out / "grounding.json"]:
        path.unlink()
    shutil.rmtree(out / "checkpoint-5")
    for file in out.glob("checkpoint-3/global_step*/*model_states.pt"):  # no frozen weight in them
        state = torch.load(file, weights_only=False)
        assert state["module"] and all("lora_" in key or "projector" in key for key in state["module"])
        assert not state["frozen_param_fragments"]
    assert launch(world, name, deepspeed_command(), **fields)[0] == whole[3:]
    assert len(weights) == 2 and weights == {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
