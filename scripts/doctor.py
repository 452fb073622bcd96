"""Is this machine fit, and what will a run cost: versions, devices, what is missing, and an estimate for a recipe.

    python scripts/doctor.py
    python scripts/doctor.py scripts/recipes/cloc_b16.yaml --processes 8 --micro_batch_size 256
    python scripts/doctor.py scripts/recipes/llava15_7b_align.yaml --processes 8 --tflops 400 --memory 80

The recipe is one of `pretrain_encoder.py` or of `finetune_mllm.py`; their flags work here too. No data is read and no weights.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import time
import tomllib
from datetime import timedelta
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
EFFICIENCY = 0.5  # of a bare matrix product's speed, that a training step is taken to reach
MATRIX = {"cuda": 8192, "cpu": 1024}  # side of the product that is timed
GIB = 2**30
Row = tuple[str, str, str]


def packages() -> tuple[list[Row], bool]:
    """What pyproject.toml asks for and is not here, with the command that brings it; whether the core is whole."""
    from packaging.requirements import Requirement

    project = tomllib.loads(PROJECT.read_text())["project"]
    rows, whole = [], True
    for extra, needed in {"": project["dependencies"], **project["optional-dependencies"]}.items():
        wrong = []
        for requirement in map(Requirement, needed):
            try:
                version = importlib.metadata.version(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                wrong.append(f"{requirement.name} is missing")
                continue
            if not requirement.specifier.contains(version, prereleases=True):
                wrong.append(f"{requirement.name} is {version}, not {requirement.specifier}")
        what = f"extra '{extra}'" if extra else "core packages"
        target = f"'.[{extra}]'" if extra else "."
        rows.append((what, ", ".join(wrong) or "all there", f"pip install -e {target}" if wrong else ""))
        whole = whole and (bool(extra) or not wrong)
    return rows, whole


def machine() -> list[Row]:
    """Versions, devices, compilers, disk."""
    rows = [("python", sys.version.split()[0], sys.executable)]
    for name in ("torch", "transformers", "deepspeed"):
        try:
            rows.append((name, importlib.metadata.version(name), ""))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "missing", ""))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rows.append(("cpu", f"{os.cpu_count()} cores, {memory / GIB:.0f} GiB", ""))
    if importlib.util.find_spec("torch"):
        import torch

        if not torch.cuda.is_available():
            rows.append(("gpu", "none", f"torch was built for CUDA {torch.version.cuda or 'none'}; processes talk over gloo"))
        else:
            nccl = ".".join(map(str, torch.cuda.nccl.version()))
            rows.append(("cuda, nccl", f"{torch.version.cuda}, {nccl}", ""))
            for number in range(torch.cuda.device_count()):
                free, total = torch.cuda.mem_get_info(number)
                name = torch.cuda.get_device_name(number)
                rows.append((f"gpu {number}", f"{name}, {total / GIB:.0f} GiB", f"{free / GIB:.0f} GiB free"))
    for tool, need in (("c++", "torch.compile on a CPU, DeepSpeed's operators"), ("ninja", "DeepSpeed's operators")):
        rows.append((tool, shutil.which(tool) or "missing", f"for {need}"))
    built = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    for lock in sorted(built.rglob("lock")):  # whoever needs that operator waits for it, for ever and without a word
        rows.append(("build lock", str(lock), "of an operator that is being built; remove it where that was cut off"))
    disk = shutil.disk_usage(".")
    rows.append(("disk here", f"{disk.free / GIB:.0f} GiB free of {disk.total / GIB:.0f}", ""))
    return rows


def measured_tflops(precision: str) -> float:
    """Speed of one large matrix product on this process' device, the best of some."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    side, dtype = MATRIX[device], torch.bfloat16 if precision == "bf16" else torch.float32
    matrix, best = torch.ones(side, side, device=device, dtype=dtype), float("inf")
    for _ in range(5):
        start = time.perf_counter()
        matrix @ matrix
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best / 1e12


def estimate(recipe: str, flags: list[str], processes: int, tflops: float | None, memory: float | None) -> list[Row]:
    """Memory and time of a recipe on `processes` devices of `memory` GiB and `tflops` TFLOP/s each."""
    from dataclasses import fields

    from encoder.arguments import add_fields, build, read_recipe
    from encoder.errors import DataError
    from encoder.pretraining_config import RUN_FIELDS, add_pretraining_flags, build_configs
    from mllm.config import MllmConfig

    for flag, value in (("processes", processes), ("tflops", tflops), ("memory", memory)):
        if value is not None and not value > 0:
            raise DataError(f"--{flag} is {value}; give a positive number")
    of_mllm = {field.name for field in fields(MllmConfig)}
    is_mllm = bool(read_recipe(recipe, RUN_FIELDS | of_mllm).keys() - RUN_FIELDS)
    parser = argparse.ArgumentParser(prog=f"doctor.py {recipe}")
    if is_mllm:
        add_fields(parser, MllmConfig)
    else:
        add_pretraining_flags(parser)
    # Where data lies and results go makes no difference here.
    values = {"data": ["-"], "images": "-"} if is_mllm else {"shards": "-"}
    values |= {"output": "-", **read_recipe(recipe, of_mllm if is_mllm else RUN_FIELDS), **vars(parser.parse_args(flags))}
    if is_mllm:
        config = build(MllmConfig, values)
        rows, flops, steps = mllm_rows(config, processes, memory)
    else:
        config, loss_config = build_configs(values)
        rows, flops, steps = encoder_rows(config, loss_config, processes, memory)
    speed = tflops or measured_tflops(config.precision)
    source = "as stated" if tflops else f"a matrix product in {config.precision} here, measured"
    seconds = flops / (speed * 1e12 * EFFICIENCY)
    whole = f", {timedelta(seconds=round(seconds * steps))} for {steps:,} steps" if steps else ""
    rows += [
        ("arithmetic", f"{number(flops / 1e12)} TFLOP a step and process", ""),
        ("speed", f"{number(speed)} TFLOP/s", source),
        ("time", f"{number(seconds)} s a step{whole}", f"at {EFFICIENCY:.0%} of that speed, with data that is never waited for"),
    ]
    return rows


def encoder_rows(config, loss_config, processes: int, memory: float | None) -> tuple[list[Row], float, int]:
    """Rows, arithmetic of a step on one process, and the number of steps."""
    from encoder import costs
    from encoder.errors import DataError

    share = config.batch_size // processes
    micro = config.micro_batch_size or share
    if config.batch_size % processes or share % micro:
        raise DataError(
            f"batch_size {config.batch_size} on {processes} processes in micro batches of {micro} does not come out even; "
            "choose numbers that divide"
        )
    model = costs.meta_encoder(config, loss_config)
    cost = costs.encoder_cost(model, config)
    if config.zero_stage == 0:  # bf16 is autocast then, on float32 weights
        model.float()
    states = costs.state_bytes(model, config.zero_stage, processes, config.ema_decay > 0)
    fixed = {**states, "loss": costs.loss_bytes(model, config, loss_config)}
    each = cost.activation_bytes(config.gradient_checkpointing)
    what = "images" if config.objective == "clip" else f"images with {config.max_boxes} regions"
    rows = memory_rows(model, fixed, each, micro, what, memory, config.ema_decay > 0)
    kept = costs.state_bytes(model, config.zero_stage, 1, config.ema_decay > 0)
    size = (kept["weights"] + kept["optimizer"]) / GIB
    rows.append(("checkpoint", f"{size:,.3f} GiB", "two are kept, and a third while it is written"))
    flops = share * (cost.flops(config.gradient_checkpointing) + (cost.forward_flops if micro < share else 0))
    return rows, flops + costs.contrastive_flops(model, config, processes), config.steps


def mllm_rows(config, processes: int, memory: float | None) -> tuple[list[Row], float, int]:
    """The same of an MLLM recipe; 0 steps where the data decides."""
    from encoder.costs import state_bytes
    from mllm import costs

    stage = costs.zero_stage(config, processes)
    model = costs.meta_mllm(config)
    cost = costs.mllm_cost(model, config)
    if stage is None:  # bf16 is autocast then, on float32 weights
        model.float()
    fixed = state_bytes(model, stage, processes)
    fixed["weights"] -= costs.low_bit_bytes(model, config)
    what = f"rows of {config.max_length} tokens"
    rows = memory_rows(model, fixed, cost.activation_bytes(config.gradient_checkpointing), config.batch_size, what, memory)
    flops = config.batch_size * config.gradient_accumulation * cost.flops(config.gradient_checkpointing)
    return rows, flops, config.max_steps


def memory_rows(model, fixed: dict, each: int, micro: int, what: str, memory: float | None, ema: bool = False) -> list[Row]:
    """What a device must hold: `fixed` bytes by name, and the activations of `micro` samples of `each` bytes."""
    import torch

    count = sum(parameter.numel() for parameter in model.parameters())
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    kind = next(model.parameters()).dtype
    rows = [("model", f"{count / 1e6:,.2f} M parameters", f"{sum(trained) / 1e6:,.2f} M learn, {str(kind).split('.')[1]}")]
    notes = {"optimizer": "AdamW's moments, a float32 copy under ZeRO and bf16" + (", the running average" if ema else "")}
    notes["loss"] = "the features of all processes, and blocks of logits"
    rows += [(name, f"{size / GIB:,.3f} GiB", notes.get(name, "")) for name, size in fixed.items()]
    rows.append(("activations", f"{micro * each / GIB:,.3f} GiB", f"{micro} {what} at a time, {each / 2**20:.3g} MiB each"))
    if memory is None and torch.cuda.is_available():
        memory = torch.cuda.mem_get_info()[1] / GIB
    elif memory is None:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    needed, room = (sum(fixed.values()) + micro * each) / GIB, memory * GIB - sum(fixed.values())
    verdict = "fits, with a tenth to spare" if needed < 0.9 * memory else "tight" if needed < memory else "does not fit"
    if needed >= 0.9 * memory:
        verdict += f": {max(0, int(0.9 * room // each))} at a time would; else recompute, or raise the ZeRO stage"
    return [*rows, ("together", f"{needed:,.2f} of {memory:,.0f} GiB", verdict)]


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def print_table(rows: list[Row]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, value, remark in rows:
        print(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {remark}".rstrip(), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", help="YAML file; further flags are its fields")
    parser.add_argument("--processes", type=int, default=1, help="devices of the run, of all machines")
    parser.add_argument("--tflops", type=float, help="speed of a device in TFLOP/s; measured here if not given")
    parser.add_argument("--memory", type=float, help="memory of a device in GiB; this machine's if not given")
    arguments, flags = parser.parse_known_args()
    if flags and not arguments.recipe:
        parser.error(f"{flags[0]} is a field of a recipe; name the recipe first")
    found, whole = packages()
    rows = machine() + found
    if arguments.recipe and whole:
        given = (arguments.recipe, flags, arguments.processes, arguments.tflops, arguments.memory)
        rows += estimate(*given)
    print_table(rows)
    return 0 if whole else 1


if __name__ == "__main__":
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        from encoder.errors import run_main

        run_main(main)
    sys.exit(main())
