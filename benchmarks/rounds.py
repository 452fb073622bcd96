"""Variants of one piece of work timed in turn, round by round, and their ratios set against bars.

A ratio is taken within each round and the median over the rounds is what counts, so that other work on the machine takes no
side. Processor time stands beside wall time for machines that are busy.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Bar:
    """What `above` takes, divided by what `below` takes: at least `limit` if `at_least`, else at most."""

    above: str
    below: str
    limit: float
    at_least: bool = False

    def met(self, ratio: float) -> bool:
        return ratio >= self.limit if self.at_least else ratio <= self.limit


def timed(work: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Wall and processor seconds of one call; on a GPU also the bytes at its peak beyond those allocated before it."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start, start_cpu = time.perf_counter(), time.process_time()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    measured = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - start_cpu}
    return measured | ({"peak_bytes": torch.cuda.max_memory_allocated() - before} if on_gpu else {})


def in_turn(variants: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[dict]]:
    """The measurements of each variant, one per round. The caller has warmed them up."""
    runs: dict[str, list[dict]] = {name: [] for name in variants}
    for number in range(rounds):
        for name, work in variants.items():
            runs[name].append(timed(work, device))
            run = runs[name][-1]
            line = f"{name:24}{run['seconds']:9.3f} s, processor {run['cpu_seconds']:9.3f} s"
            print(f"round {number + 1}/{rounds}: {line}", flush=True)
    return runs


def report_of(runs: dict[str, list[dict]], bars: list[Bar], device: torch.device) -> dict:
    """Medians of each variant, and of the ratios of each bar with their extremes; the rounds themselves too."""
    report = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "variants": {
            name: {key: statistics.median(run[key] for run in measured) for key in measured[0]} for name, measured in runs.items()
        },
        "ratios": [],
        "rounds": runs,
    }
    for bar in bars:
        entry = {"above": bar.above, "below": bar.below, "limit": bar.limit, "at_least": bar.at_least}
        for key in ("seconds", "cpu_seconds"):
            ratios = [a[key] / b[key] for a, b in zip(runs[bar.above], runs[bar.below], strict=True)]
            entry[key] = {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
        report["ratios"].append(entry | {"met": bar.met(entry["seconds"]["median"])})
    return report


def show(report: dict, out: Path | None) -> None:
    """The tables, and the figures as JSON in `out`."""
    print(f"{report['device']}, {report['threads']} threads, torch {report['torch']}, medians of rounds")
    memory = "peak_bytes" in next(iter(report["variants"].values()))
    print(f"{'':26}{'time, s':>12}{'processor, s':>14}" + (f"{'peak, MB':>12}" if memory else ""))
    for name, medians in report["variants"].items():
        peak = f"{medians['peak_bytes'] / 1e6:12.0f}" if memory else ""
        print(f"{name:26}{medians['seconds']:12.3f}{medians['cpu_seconds']:14.3f}{peak}")
    print(f"{'':52}{'ratio':>8}{'rounds':>16}{'processor':>11}{'bar':>10}")
    for entry in report["ratios"]:
        wall, sign = entry["seconds"], ">=" if entry["at_least"] else "<="
        spread, bar = f"{wall['lowest']:.2f} to {wall['highest']:.2f}", f"{sign} {entry['limit']:g}"
        name, verdict = f"{entry['above']} / {entry['below']}", "met" if entry["met"] else "MISSED"
        print(f"{name:52}{wall['median']:8.2f}{spread:>16}{entry['cpu_seconds']['median']:11.2f}{bar:>10}  {verdict}")
    if out:
        out.write_text(json.dumps(report, indent=2) + "\n")
