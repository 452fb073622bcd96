"""The language model's loss in blocks against the whole matrix of logits: peak extra memory, time, loss and gradients.

    python benchmarks/lm_loss.py
    python benchmarks/lm_loss.py --tokens 1024 --vocabulary 49152 --repeats 1 --out lm_loss.json

Qwen2.5-0.5B's sizes by default. Every measurement is one forward and backward pass in a fresh process of its own, the two
variants in turn. Extra memory is the process' highest resident size less that before the loss (on a GPU: what the allocator
gave out); times are medians. All tokens are supervised: what blocks save by leaving the others out is not in the figures.
The plain way is stock transformers': all logits, in float32, `cross_entropy`.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mllm.lm_loss import LossHead, choose_block

BARS = {"bytes": 1 / 4, "difference": 1e-5}


def loss_of(variant: str, hidden_TD: Tensor, head: LossHead, labels_T: Tensor, block: int) -> Tensor:
    if variant == "plain":
        return cross_entropy(head(hidden_TD).float(), labels_T, reduction="sum") / len(labels_T)
    return head(hidden_TD, labels_T, block)[0] / len(labels_T)


def measure(variant: str, arguments: argparse.Namespace, results: Path) -> None:
    """In a process of its own: one pass; writes bytes, seconds, loss and gradients."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    head = LossHead(arguments.width, arguments.vocabulary, bias=False, device=device, dtype=dtype)
    hidden_TD = torch.randn(arguments.tokens, arguments.width, device=device, dtype=dtype).requires_grad_()
    labels_T = torch.randint(0, arguments.vocabulary, (arguments.tokens,), device=device)
    block = arguments.block or choose_block(None, arguments.vocabulary)
    small = LossHead(arguments.width, 64, bias=False, device=device, dtype=dtype)  # libraries are loaded, threads made
    loss_of(variant, hidden_TD[:64], small, labels_T[:64] % 64, 16).backward()
    hidden_TD.grad = None
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    start, start_cpu = time.perf_counter(), time.process_time()
    loss = loss_of(variant, hidden_TD, head, labels_T, block)
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    outcome = {"loss": loss.detach().cpu(), "hidden": hidden_TD.grad.cpu(), "weight": head.weight.grad.cpu()}
    torch.save({"bytes": peak - before, "seconds": seconds, "cpu_seconds": cpu_seconds, "block": block, **outcome}, results)


def compare(arguments: argparse.Namespace) -> dict:
    """Runs both variants in turn and sets them side by side."""
    sizes = {key: getattr(arguments, key) for key in ("tokens", "width", "vocabulary", "block", "dtype", "device")}
    runs, kept = {"plain": [], "blocks": []}, {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.repeats):
            for variant in runs:
                results = Path(folder) / f"{variant}.pt"
                flags = [f"--{key}={value}" for key, value in sizes.items()]
                subprocess.run([sys.executable, __file__, *flags, f"--child={variant}", f"--out={results}"], check=True)
                outcome = torch.load(results)
                kept[variant] = {key: outcome.pop(key) for key in ("loss", "hidden", "weight")}
                runs[variant].append(outcome)
    differences = {
        key: float((kept["blocks"][key] - value).abs().max() / value.abs().max()) for key, value in kept["plain"].items()
    }
    report = {**sizes, "block": runs["blocks"][0]["block"], "repeats": arguments.repeats, "differences": differences}
    for key in ("bytes", "seconds", "cpu_seconds"):
        for variant, passes in runs.items():
            report[f"{variant}_{key}"] = statistics.median(run[key] for run in passes)
        report[f"{key}_ratio"] = report[f"blocks_{key}"] / report[f"plain_{key}"]
    return report | {"threads": torch.get_num_threads(), "torch": torch.__version__}


def show(report: dict) -> None:
    """The table."""
    print(
        f"{report['tokens']} tokens, D = {report['width']}, vocabulary {report['vocabulary']}, {report['dtype']}, "
        f"blocks of {report['block']}, {report['device']}, {report['threads']} threads, torch {report['torch']}"
    )
    print(f"{'':22}{'plain':>14}{'blocks':>14}{'ratio':>10}{'bar':>10}")
    rows = (("peak extra memory, MB", "bytes", 1e6), ("time, s", "seconds", 1), ("processor time, s", "cpu_seconds", 1))
    for name, key, unit in rows:
        plain, blocks, bar = report[f"plain_{key}"] / unit, report[f"blocks_{key}"] / unit, BARS.get(key)
        verdict = "" if bar is None else f"{bar:10.2f}  {'met' if blocks / plain <= bar else 'MISSED'}"
        print(f"{name:22}{plain:14.2f}{blocks:14.2f}{blocks / plain:10.3f}{verdict}")
    largest = max(report["differences"].values())
    verdict = "met" if largest <= BARS["difference"] else "MISSED"
    print(f"{'largest difference':46}{largest:14.1e}{BARS['difference']:10.0e}  {verdict}")
    print("(of the loss and of the gradients of hidden states and head, relative to the largest entry of each)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--block", type=int, default=0, help="tokens of a block; 0: as in training")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return measure(arguments.child, arguments, arguments.out)
    report = compare(arguments)
    show(report)
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
