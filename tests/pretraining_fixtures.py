"""Pretraining runs with the real script in processes of the test's own, and what they wrote."""

import contextlib
import json
import os
import runpy
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from encoder.data.reader import RegionDataset
from encoder.losses import LossConfig
from encoder.pretraining_config import PretrainConfig

SCRIPT = Path(__file__).parents[1] / "scripts" / "pretrain_encoder.py"
STEPS = 24
RUN = {
    "preset": "tiny",
    "vocab_size": 96,
    "batch_size": 4,  # two images a rank: some rank has no region in some step
    "steps": STEPS,
    "warmup_steps": 2,
    "learning_rate": 3e-4,
    "precision": "fp32",
    "save_every": 6,
    "log_every": 1,
}
# At the default, 0.9, the few texts here are soon all alike to the filter, and no pair is left to compare.
LOSS = {"similar_text_threshold": 0.999}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def do_runs(rank: int, world: int, port: int, root: str, runs: dict, afterwards=None) -> None:
    """In a process of its own: the script's own functions, one run after the other.

    runs: name, which is the folder of output -> fields of PretrainConfig, `loss`, those of LossConfig, and `goes_on`: the
        run of a (folder, step) is continued
    """
    torch.set_num_threads(1)
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if world > 1:  # as tasks of SLURM's srun
        environment = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_STEP_NUM_TASKS": world, "SLURM_JOB_ID": 1,
                       "SLURM_STEP_NODELIST": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
    os.environ |= {key: str(value) for key, value in environment.items()}
    os.chdir(root)
    script = runpy.run_path(str(SCRIPT))
    script["start_process_group"]()
    for name, fields in runs.items():
        loss_config = LossConfig(**{**LOSS, **fields.get("loss", {})})
        config = {key: value for key, value in fields.items() if key not in ("loss", "goes_on")}
        config = PretrainConfig(**{**RUN, "shards": "train", "output": name, **config})
        if rank == 0 and "goes_on" in fields:
            roll_back(name, *fields["goes_on"])
        torch.distributed.barrier()
        with open(f"{name}.{rank}.txt", "w") as said, contextlib.redirect_stdout(said):
            script["train"](RegionDataset(config.shards, progress=False), config, loss_config)
    if afterwards:
        afterwards(rank, world)
    torch.distributed.destroy_process_group()


def roll_back(name: str, folder: str, step: int) -> None:
    """`name` becomes a run as `folder` was when it was killed right after checkpoint `step`."""
    if folder != name:
        shutil.copytree(folder, name)
    checkpoints = Path(name, "checkpoints")
    for later in checkpoints.glob("step_*"):
        if int(later.name[5:]) > step:
            shutil.rmtree(later)
    (checkpoints / "latest").write_text(f"step_{step:08d}")
    for written in Path(name).glob("model*"):
        shutil.rmtree(written)


def log_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def weights_of(output: Path, folder: str = "model") -> dict[str, torch.Tensor]:
    return load_file(output / folder / "model.safetensors")


def assert_same_weights(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} parameters differ, {different[:3]}"


def assert_close_weights(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def assert_same_losses(run: Path, reference: Path, tolerance: float) -> None:
    ours, theirs = log_of(run), log_of(reference)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, len(theirs) + 1))
    for a, b in zip(ours, theirs, strict=True):
        for key in ("loss", "clip_loss", "region_loss", "grounding_loss", "logit_scale", "lr", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=tolerance, abs=tolerance), (a["step"], key)
