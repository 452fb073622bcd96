"""Who starts the processes of a run: a launcher that sets RANK (`deepspeed`, `torchrun`), SLURM's `srun`, or nobody."""

import re
import socket
from collections.abc import Mapping


def slurm_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that torch.distributed wants, for a task of `srun`; {} where a launcher set them, or outside a step.

    An `sbatch` script itself is no task: a python started there without srun is a process of its own.
    environment: os.environ; a MASTER_ADDR or MASTER_PORT in it is kept
    """
    if "RANK" in environment or "SLURM_STEP_NUM_TASKS" not in environment:
        return {}
    # Where each task is shown its own GPU only (`--gpus-per-task`, `--gpu-bind`), that is number 0.
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": "0" if visible and "," not in visible else environment["SLURM_LOCALID"],
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
        # The same on every task, and another for another job of the machine.
        "MASTER_PORT": environment.get("MASTER_PORT") or str(20_000 + int(environment["SLURM_JOB_ID"]) % 10_000),
    }


def own_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The same for the only process of a run, on a free port of this machine; {} where a launcher or SLURM set them."""
    if "RANK" in environment:
        return {}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def first_host(nodes: str) -> str:
    """The first of SLURM's list of machines: `gpu[007-009,12],big1` -> `gpu007`."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).split(",")[0]
