"""The contrastive loss in blocks against the full matrix: peak extra memory, time, loss and gradients.

    python benchmarks/contrastive.py
    python benchmarks/contrastive.py --regions 4096 --block_size 1024 --repeats 1 --out contrastive.json

Every measurement is one forward and backward pass in a fresh process of its own, the two variants in turn. Extra memory is
the process' highest resident size less that before the loss (on a GPU: what the allocator gave out); times are medians.
Processor time is there for machines that are busy with other work.
The full matrix is the plain way: one product for the logits of both directions, one for the filter, `cross_entropy`.

N regions, E joint space.
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
from torch.nn.functional import cross_entropy, normalize

from encoder.contrastive import contrastive_loss

THRESHOLD = 0.9
BARS = {"memory": 1 / 10, "time": 1.5, "difference": 1e-5}


def full_matrix(a_NE: Tensor, b_NE: Tensor, scale: Tensor) -> Tensor:
    """The loss written with the N x N matrix."""
    a_NE, b_NE = normalize(a_NE, dim=-1), normalize(b_NE, dim=-1)
    with torch.no_grad():
        similar = b_NE @ b_NE.T > THRESHOLD
        similar.fill_diagonal_(False)
    logits = (scale * a_NE @ b_NE.T).masked_fill(similar, -torch.inf)
    targets = torch.arange(len(a_NE), device=a_NE.device)
    return (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)) / 2


def block_bytes(regions: int, width: int, ranks: int, block_size: int) -> int:
    """Computed peak extra memory of a rank: what grows with N, and the blocks; float32."""
    own, block = regions // ranks, min(block_size, regions)
    # Own rows: a and b normalised, their gradients before and after normalisation. All rows: b, its gradient, the gather's
    # buffers (with several ranks b is normalised before it is gathered). Blocks: logits, cosines of texts or their mask,
    # probabilities and a temporary.
    gathered = 2 if ranks > 1 else 1
    return 4 * (width * (7 * own + gathered * regions) + 4 * block**2)


def make_inputs(regions: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Features of pairs that are somewhat alike, a quarter of the texts being repetitions, so that the filter has work."""
    generator = torch.Generator().manual_seed(0)
    b_NE = torch.randn(regions, width, generator=generator)
    b_NE[: regions // 4] = b_NE[regions // 2 : regions // 2 + regions // 4]
    a_NE = b_NE + 2 * torch.randn(regions, width, generator=generator)
    scale = torch.tensor(1 / 0.07)
    return tuple(tensor.to(device).requires_grad_() for tensor in (a_NE, b_NE, scale))


def measure(variant: str, regions: int, width: int, block_size: int, device: torch.device, results: Path) -> None:
    """In a process of its own: one pass; writes bytes, seconds, loss and gradients."""

    def loss_of(a_NE, b_NE, scale):
        if variant == "full":
            return full_matrix(a_NE, b_NE, scale)
        return contrastive_loss(a_NE, b_NE, scale, THRESHOLD, block_size=block_size)[0]

    loss_of(*make_inputs(64, width, device)).backward()  # libraries are loaded, threads and handles made
    leaves = make_inputs(regions, width, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        # Pages in use now against the highest ever: never less than what the pass added.
        before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    start, start_cpu = time.perf_counter(), time.process_time()
    loss = loss_of(*leaves)
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    peak = (
        torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    outcome = {"loss": loss.detach().cpu(), **{name: leaf.grad.cpu() for name, leaf in zip("abs", leaves, strict=True)}}
    torch.save({"bytes": peak - before, "seconds": seconds, "cpu_seconds": cpu_seconds, **outcome}, results)


def run_in_turn(arguments: argparse.Namespace, variants: tuple[str, ...]) -> dict[str, list[dict]]:
    """What `measure` wrote for each variant, `arguments.repeats` times."""
    runs = {variant: [] for variant in variants}
    flags = [f"--{key}={getattr(arguments, key)}" for key in ("regions", "width", "block_size", "device")]
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.repeats):
            for variant in runs:
                results = Path(folder) / f"{variant}.pt"
                child = [sys.executable, __file__, *flags, f"--child={variant}", f"--out={results}"]
                subprocess.run(child, check=True)
                runs[variant].append(torch.load(results))
    return runs


def show_blocks(arguments: argparse.Namespace) -> None:
    """Memory and time of the blocks, without the matrix beside them."""
    passes = run_in_turn(arguments, ("blocks",))["blocks"]
    size, seconds = (statistics.median(run[key] for run in passes) for key in ("bytes", "seconds"))
    computed = block_bytes(arguments.regions, arguments.width, 1, arguments.block_size)
    print(f"{arguments.regions} regions, E = {arguments.width}, float32, blocks of {arguments.block_size}, {arguments.device}")
    print(f"peak extra memory {size / 1e6:,.0f} MB (computed {computed / 1e6:,.0f}), loss and backward {seconds:.2f} s")


def compare(arguments: argparse.Namespace) -> dict:
    """Runs both variants in turn and sets them side by side."""
    runs = run_in_turn(arguments, ("full", "blocks"))
    full, blocks = runs["full"][0], runs["blocks"][0]
    differences = {
        name: float((blocks[name] - full[name]).abs().max() / full[name].abs().max()) for name in ("loss", "a", "b", "s")
    }
    report = {key: getattr(arguments, key) for key in ("regions", "width", "block_size", "repeats", "device")}
    for variant, passes in runs.items():
        for key in ("bytes", "seconds", "cpu_seconds"):
            report[f"{variant}_{key}"] = statistics.median(run[key] for run in passes)
    for key in ("bytes", "seconds", "cpu_seconds"):
        report[f"{key}_ratio"] = report[f"blocks_{key}"] / report[f"full_{key}"]
    report["largest_difference"] = max(differences.values())
    report["differences"] = differences
    report["threads"], report["torch"] = torch.get_num_threads(), torch.__version__
    return report


def show(report: dict) -> None:
    """The table."""
    print(f"{report['regions']} regions, E = {report['width']}, float32, blocks of {report['block_size']}, {report['device']}")
    print(f"{'':22}{'full matrix':>14}{'blocks':>14}{'ratio':>10}{'bar':>10}")
    for name, key, unit, bar in (
        ("peak extra memory, MB", "bytes", 1e6, BARS["memory"]),
        ("time, s", "seconds", 1, BARS["time"]),
        ("processor time, s", "cpu_seconds", 1, BARS["time"]),
    ):
        full, blocks = report[f"full_{key}"] / unit, report[f"blocks_{key}"] / unit
        verdict = "met" if blocks / full <= bar else "MISSED"
        print(f"{name:22}{full:14.2f}{blocks:14.2f}{blocks / full:10.3f}{bar:10.2f}  {verdict}")
    verdict = "met" if report["largest_difference"] <= BARS["difference"] else "MISSED"
    print(f"{'largest difference':46}{report['largest_difference']:14.1e}{BARS['difference']:10.0e}  {verdict}")
    print("(of the loss and of the gradients of both features and the scale, relative to the largest entry of each)")
    print("computed extra memory of blocks, MB:")
    for regions, ranks in ((report["regions"], 1), (131_072, 1), (131_072, 8), (131_072, 256)):
        size = block_bytes(regions, report["width"], ranks, report["block_size"]) / 1e6
        print(f"  {regions:>8} regions on {ranks:>3} process{'es' if ranks > 1 else ''}: {size:,.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regions", type=int, default=16_384)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--block_size", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON")
    parser.add_argument("--blocks_only", action="store_true", help="where the full matrix has no room: the blocks' figures alone")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        sizes = arguments.regions, arguments.width, arguments.block_size
        return measure(arguments.child, *sizes, torch.device(arguments.device), arguments.out)
    if arguments.blocks_only:
        return show_blocks(arguments)
    report = compare(arguments)
    show(report)
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
