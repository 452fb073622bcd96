"""Save and resume a training run: the engine's weights, optimizer and schedule, and the step, which is the data position.

The identity that is saved with it holds what the order of records follows from (`RegionBatches.identity`): on other data the
same step would be another position.
"""

import json
import shutil
from pathlib import Path

import deepspeed
import torch.distributed as dist

from encoder.distributed import rank, world_size
from encoder.errors import DataError

# What may differ between a run and its continuation without changing the result.
FREE_FIELDS = {
    "shards", "output", "workers", "log_every", "save_every", "max_broken", "shard_cache", "shard_cache_gb",
    "gradient_checkpointing", "loss.block_size",
}  # fmt: skip
KEEP = 2


def save_training_state(engine: deepspeed.DeepSpeedEngine, output: Path, step: int, identity: dict) -> None:
    """Writes checkpoint `step` under output/checkpoints; `latest` names it only once it is complete; keeps the last two."""
    folder = output / "checkpoints"
    engine.save_checkpoint(str(folder), tag=f"step_{step:08d}", client_state={"step": step}, save_latest=False)
    if rank() == 0:
        state = {"step": step, "world_size": world_size(), "identity": identity}
        (folder / f"step_{step:08d}" / "run.json").write_text(json.dumps(state, indent=1))
        (folder / "latest.tmp").write_text(f"step_{step:08d}")
        (folder / "latest.tmp").replace(folder / "latest")
        for old in sorted(folder.glob("step_*"))[:-KEEP]:
            shutil.rmtree(old)
    if world_size() > 1:
        dist.barrier()


def load_training_state(engine: deepspeed.DeepSpeedEngine, output: Path, identity: dict) -> int:
    """Loads the last complete checkpoint of the same run and returns its step; 0 where there is none.

    A checkpoint of another configuration, or of another number of processes, is refused with the field that differs.
    """
    folder = output / "checkpoints"
    if not (folder / "latest").is_file():
        return 0
    tag = (folder / "latest").read_text().strip()
    path = folder / tag / "run.json"
    if not path.is_file():
        raise DataError(f"{path} is missing, so checkpoint {tag} cannot be matched to this run; choose another output folder")
    state = json.loads(path.read_text())
    for key, value in identity.items():
        saved = state["identity"].get(key)
        if key not in FREE_FIELDS and saved != value:
            raise DataError(
                f"{path}: the checkpoint was made with {key} = {saved}, this run has {value}; "
                f"choose another output folder, or give the same {key}"
            )
    if state["world_size"] != world_size():
        raise DataError(
            f"{path}: the checkpoint was made by {state['world_size']} processes, this run has {world_size()}; "
            "start as many, or choose another output folder (the order of the data is the same on any number of processes, "
            "but the optimizer's state is stored in as many parts, and sums over ranks would differ in their last bits)"
        )
    loaded, _ = engine.load_checkpoint(str(folder), tag=tag)
    if loaded is None:
        raise DataError(f"{folder / tag} cannot be loaded by DeepSpeed; remove it to start over")
    return state["step"]


def forget_after(log: Path, step: int) -> None:
    """Drops the lines of a run that went on after its last checkpoint and was killed: those steps come again."""
    if log.is_file():
        lines = log.read_text().splitlines(keepends=True)
        log.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step))
