"""Tasks of SLURM find their place; under another launcher, or none, nothing is touched. The sbatch example is a valid script."""

import subprocess
from pathlib import Path

import pytest

from encoder.launch import first_host, own_environment, slurm_environment

TASK = {
    "SLURM_JOB_ID": "123456", "SLURM_PROCID": "11", "SLURM_LOCALID": "3", "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_NTASKS": "16",
}  # fmt: skip


def test_a_task_of_srun_finds_its_place():
    expected = {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "MASTER_ADDR": "gpu07", "MASTER_PORT": "23456"}
    assert slurm_environment(TASK) == expected
    given = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert slurm_environment({**TASK, **given}) == {**expected, **given}


def test_a_task_that_sees_its_own_gpu_alone_takes_number_0():
    for visible, number in (("3", "0"), ("GPU-1a-2b", "0"), ("0,1,2,3", "3"), ("", "3")):
        assert slurm_environment({**TASK, "CUDA_VISIBLE_DEVICES": visible})["LOCAL_RANK"] == number


def test_other_launchers_and_the_batch_script_itself_are_left_alone():
    assert slurm_environment({**TASK, "RANK": "0", "WORLD_SIZE": "2"}) == {}  # torchrun or deepspeed within a task
    assert slurm_environment({key: value for key, value in TASK.items() if "STEP" not in key}) == {}
    assert slurm_environment({}) == {}


def test_the_only_process_is_a_group_of_its_own():
    own = own_environment({"HOME": "/"})
    assert (own["RANK"], own["WORLD_SIZE"], own["MASTER_ADDR"]) == ("0", "1", "127.0.0.1") and int(own["MASTER_PORT"]) > 1023
    assert own_environment({"RANK": "3"}) == {}


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("gpu7", "gpu7"),
        ("gpu[007-009,12],big1", "gpu007"),
        ("a1,b2", "a1"),
        ("n[3,5-7]-ib", "n3-ib"),
        ("rack[0-1]node[02-03]", "rack0node02"),
    ],
)
def test_the_first_machine_of_a_list(nodes, first):
    assert first_host(nodes) == first


def test_the_sbatch_example_starts_the_script_with_its_arguments(tmp_path):
    """Run for real, with srun and scontrol replaced by programs that print."""
    script = Path(__file__).parents[1] / "scripts" / "slurm" / "pretrain.sbatch"
    assert script.read_text().startswith("#!/bin/bash\n") and "#SBATCH --requeue" in script.read_text()
    hosts = "for i in {7..999}; do printf 'gpu%02d\\n' $i; done"  # many, so that nothing may stop at the first
    for name, line in (("srun", 'echo "$MASTER_ADDR $MASTER_PORT $@"'), ("scontrol", hosts)):
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "gpu[07-999]"}
    environment["SLURM_CPUS_PER_TASK"] = "12"
    done = subprocess.run(
        ["bash", str(script), "r.yaml", "--shards", "a b/*.tar"], capture_output=True, text=True, env=environment, check=True
    )
    python = ".venv/bin/python scripts/pretrain_encoder.py r.yaml --shards a b/*.tar"
    assert done.stdout == f"gpu07 23456 --kill-on-bad-exit=1 --cpus-per-task=12 {python}\n"
