"""Save and resume a training run: the engine's weights, optimizer and schedule, and the step, which is the data position.

The identity that is saved with it holds what the order of records follows from (`RegionBatches.identity`): on other data the
same step would be another position.
"""

import json
import shutil
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from encoder.distributed import rank, world_size
from encoder.errors import DataError

# What may differ between a run and its continuation without changing the result; and what changes the rounding of sums alone.
FREE_FIELDS = {
    "shards", "output", "workers", "log_every", "save_every", "max_broken", "shard_cache", "shard_cache_gb",
    "gradient_checkpointing", "loss.block_size",
}  # fmt: skip
ROUNDING_FIELDS = {"micro_batch_size"}
KEEP = 2
LATEST = Path("checkpoints", "latest")  # names the last complete checkpoint
TOKENIZER = "tokenizer"  # folder of the one that the run began with


def save_training_state(engine: deepspeed.DeepSpeedEngine, output: Path, step: int, identity: dict) -> None:
    """Writes checkpoint `step` under output/checkpoints; `latest` names it only once it is complete; keeps the last two."""
    folder = output / "checkpoints"
    engine.save_checkpoint(str(folder), tag=f"step_{step:08d}", client_state={"step": step}, save_latest=False)
    if rank() == 0:
        state = {"step": step, "world_size": world_size(), "identity": identity}
        (folder / f"step_{step:08d}" / "run.json").write_text(json.dumps(state, indent=1))
        (folder / "latest.tmp").write_text(f"step_{step:08d}")
        (folder / "latest.tmp").replace(output / LATEST)
        for old in sorted(folder.glob("step_*"))[:-KEEP]:
            shutil.rmtree(old)
    if world_size() > 1:
        dist.barrier()


def load_training_state(engine: deepspeed.DeepSpeedEngine, output: Path, identity: dict) -> int:
    """Loads the last complete checkpoint of the same run and returns its step; 0 where there is none.

    A checkpoint of another configuration is refused with the field that differs. One of another number of processes goes
    on, and a line says what is no longer exact; under ZeRO-3 it is refused.
    """
    folder = output / "checkpoints"
    if not (output / LATEST).is_file():
        return 0
    tag = (output / LATEST).read_text().strip()
    path = folder / tag / "run.json"
    if not path.is_file():
        raise DataError(f"{path} is missing, so checkpoint {tag} cannot be matched to this run; choose another output folder")
    state = json.loads(path.read_text())
    changed = {"processes": (state["world_size"], world_size())} if state["world_size"] != world_size() else {}
    for key, value in identity.items():
        saved = state["identity"].get(key)
        if key in FREE_FIELDS or saved == value:
            continue
        if key not in ROUNDING_FIELDS:
            made = f"with {key} = {saved}" if key in state["identity"] else f"before {key} was kept in it"
            raise DataError(
                f"{path}: the checkpoint was made {made}, this run has {value}; "
                f"choose another output folder, or give the same {key}"
            )
        changed[key] = (saved, value)
    if "processes" in changed and identity["zero_stage"] == 3:
        raise DataError(
            f"{path}: the checkpoint was made by {state['world_size']} processes with ZeRO-3, which stores each parameter in as "
            f"many parts, this run has {world_size()}; start as many, or start anew from the weights with another output folder"
        )
    if changed and rank() == 0:
        what = ", ".join(f"{key} {saved} -> {value}" for key, (saved, value) in changed.items())
        print(
            f"{path.parent}: {what}. Records, their order, weights, moments and learning rate go on exactly; approximate from "
            "here on are the last digits of sums over processes and micro batches, and dropout draws others if the model has any",
            flush=True,
        )
    divided = "processes" in changed and identity["zero_stage"] > 0  # the optimizer's state, over the processes
    loaded, _ = engine.load_checkpoint(str(folder), tag=tag, load_optimizer_states=not divided)
    if loaded is None:
        raise DataError(f"{folder / tag} cannot be loaded by DeepSpeed; remove it to start over")
    if divided:
        parts = [None] * world_size()
        parts[rank()] = own_part(engine, folder / tag, state["world_size"])
        engine.optimizer.load_state_dict(parts, load_from_fp32_weights=True)
    return state["step"]


def own_part(engine: deepspeed.DeepSpeedEngine, folder: Path, saved_parts: int) -> dict:
    """This rank's part of the state of ZeRO-1 or 2, cut from a checkpoint of another number of parts.

    Each group of parameters is one long row of numbers, cut in equal parts with padding at the end, and so are its float32
    weights, its moments and its average.
    """
    names = [f"zero_pp_rank_{number}_mp_rank_00_optim_states.pt" for number in range(saved_parts)]
    prefix = "bf16_" if (folder / f"bf16_{names[0]}").is_file() else ""
    # Memory-mapped: a rank reads what it needs of them. As trusted as what DeepSpeed itself loads beside them.
    saved = [
        torch.load(folder / f"{prefix}{name}", map_location="cpu", mmap=True, weights_only=False)["optimizer_state_dict"]
        for name in names
    ]
    zero, own = engine.optimizer, dict(saved[0])
    own["single_partition_of_fp32_groups"], states = [], {}
    for group, parameters in enumerate(zero.bit16_groups):
        size, total = zero.single_partition_of_fp32_groups[group].numel(), sum(p.numel() for p in parameters)
        padded = saved[0]["single_partition_of_fp32_groups"][group].numel() + saved[0]["group_paddings"][group]

        first, last = rank() * size, min((rank() + 1) * size, total)

        def cut(rows: list[torch.Tensor], first=first, last=last, size=size, padded=padded) -> torch.Tensor:
            starts = range(0, len(rows) * padded, padded)
            mine = [row[max(first - start, 0) : max(last - start, 0)] for start, row in zip(starts, rows, strict=True)]
            return torch.nn.functional.pad(torch.cat(mine), (0, size - max(last - first, 0)))

        own["single_partition_of_fp32_groups"].append(cut([part["single_partition_of_fp32_groups"][group] for part in saved]))
        rows = [part["base_optimizer_state"]["state"][group] for part in saved]
        states[group] = {
            key: cut([row[key] for row in rows]) if torch.is_tensor(value) and value.shape == (padded,) else value
            for key, value in rows[0].items()
        }
    own["base_optimizer_state"] = {**saved[0]["base_optimizer_state"], "state": states}
    return own


def forget_after(log: Path, step: int) -> None:
    """Drops the lines of a run that went on after its last checkpoint and was killed: those steps come again."""
    if log.is_file():
        lines = log.read_text().splitlines(keepends=True)
        log.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step))
