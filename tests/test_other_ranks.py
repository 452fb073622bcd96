"""A run goes on with another number of processes: the optimizer's state is cut anew, and what is approximate is said."""

import types
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing
from conftest import write_shards
from pretraining_fixtures import assert_close_weights, assert_same_losses, do_runs, free_port, log_of, weights_of

from encoder import checkpoint

pytestmark = pytest.mark.timeout(1800)  # processes start slowly on a busy machine

HALF, ALL = 3, 6
RUNS = {
    "zero0": {"zero_stage": 0},
    "zero2": {"zero_stage": 2},
    "bf16": {"zero_stage": 1, "precision": "bf16"},
}
RUNS = {name: {**run, "steps": ALL, "save_every": HALF, "ema_decay": 0.5} for name, run in RUNS.items()}


def continued(number: str, of: str, **more) -> dict:
    return {f"{name}_on_{number}": {**run, **more, "goes_on": (f"{name}_{of}", HALF)} for name, run in RUNS.items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Each run whole on one process and on two, and its second half on the other number."""
    folder = tmp_path_factory.mktemp("ranks")
    write_shards(folder / "train", 24)
    one = {f"{name}_of_one": run for name, run in RUNS.items()}
    two = {f"{name}_of_two": run for name, run in RUNS.items()}
    for world, runs in ((1, one), (2, two | continued("two", "of_one")), (1, continued("one", "of_two", micro_batch_size=2))):
        multiprocessing.spawn(do_runs, (world, free_port(), str(folder), runs), nprocs=world)
    return folder


@pytest.mark.parametrize("number", ["one", "two"])
@pytest.mark.parametrize("name", ["zero0", "zero2"])
def test_a_run_goes_on_with_another_number_of_processes(root, name, number):
    """As the run that never changed: losses, gradient norms, weights and average; lost moments would show in the weights."""
    assert_same_losses(root / f"{name}_on_{number}", root / f"{name}_of_one", 1e-5)
    for folder in ("model", "model_ema"):
        assert_close_weights(weights_of(root / f"{name}_on_{number}", folder), weights_of(root / f"{name}_of_one", folder))


@pytest.mark.parametrize("number, other", [("one", "two"), ("two", "one")])
def test_the_float32_weights_behind_bf16_go_on_too(root, number, other):
    """In bf16 sums differ more: within the difference that the number of processes makes from the start."""
    run, reference = (log_of(root / f"bf16_{end}") for end in (f"on_{number}", f"of_{other}"))
    for ours, theirs in zip(run, reference, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2) and ours["lr"] == theirs["lr"]
    for folder in ("model", "model_ema"):
        ours, theirs = (weights_of(root / f"bf16_{end}", folder) for end in (f"on_{number}", f"of_{other}"))
        apart = torch.cat([(ours[name].float() - theirs[name].float()).abs().flatten() for name in theirs])
        assert float(apart.mean()) < 3e-5  # a step of AdamW is 3e-4 at its largest


def test_it_says_what_is_approximate(root):
    said = (root / "zero2_on_one.0.txt").read_text().splitlines()
    line = next(line for line in said if "approximate" in line)
    assert "step_00000003: processes 2 -> 1, micro_batch_size 0 -> 2. Records, their order, weights, moments" in line
    assert f"cloc: steps {HALF} to {ALL}" in "\n".join(said)
    assert "approximate" not in (root / "zero2_of_one.0.txt").read_text()


@pytest.mark.parametrize("before, after", [(1, 3), (3, 1), (2, 3), (4, 2)])
def test_parts_cut_anew_are_those_of_the_whole(tmp_path, monkeypatch, before, after):
    """Two groups, one of a single number: rows cut in equal parts with padding behind, as DeepSpeed saves them."""
    groups = [torch.arange(1.0, 24.0), torch.tensor([7.0])]
    sizes = [[-(-len(row) // (2 * world)) * 2 for row in groups] for world in (before, after)]

    def padded(row: torch.Tensor, size: int, world: int) -> torch.Tensor:
        return torch.nn.functional.pad(row, (0, size * world - len(row)))

    for rank in range(before):
        parts = [padded(row, size, before)[rank * size :][:size] for row, size in zip(groups, sizes[0], strict=True)]
        paddings = [min(size, max(0, (rank + 1) * size - len(row))) for row, size in zip(groups, sizes[0], strict=True)]
        state = {
            "single_partition_of_fp32_groups": [part[: len(part) - n] for part, n in zip(parts, paddings, strict=True)],
            "group_paddings": paddings,
            "base_optimizer_state": {
                "state": {n: {"step": torch.tensor(5.0), "ema": 10 * part} for n, part in enumerate(parts)},
                "param_groups": ["kept"],
            },
        }
        torch.save({"optimizer_state_dict": state}, tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    zero = types.SimpleNamespace(
        bit16_groups=[[row] for row in groups], single_partition_of_fp32_groups=[torch.empty(size) for size in sizes[1]]
    )
    monkeypatch.setattr(checkpoint, "world_size", lambda: after)
    for rank in range(after):
        monkeypatch.setattr(checkpoint, "rank", lambda rank=rank: rank)
        own = checkpoint.own_part(types.SimpleNamespace(optimizer=zero), tmp_path, before)
        for group, (row, size) in enumerate(zip(groups, sizes[1], strict=True)):
            expected = padded(row, size, after)[rank * size :][:size]
            state = own["base_optimizer_state"]["state"][group]
            assert torch.equal(own["single_partition_of_fp32_groups"][group], expected)
            assert torch.equal(state["ema"], 10 * expected) and float(state["step"]) == 5
        assert own["base_optimizer_state"]["param_groups"] == ["kept"]
