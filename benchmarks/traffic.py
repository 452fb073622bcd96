"""What the steps of step.py compute and move through memory, counted operation by operation; nothing is timed.

    python benchmarks/traffic.py

A large batch on a GPU is bound by arithmetic and by memory, and both can be counted on any machine: a step that has the same
matrix products as another and moves fewer bytes between them has no reason to be slower. An operation reads each tensor that
it is given once and writes each that it returns or may change once; views and empty tensors cost nothing. Every step is
counted with two batch sizes, which gives the cost of an image and that of the step itself, mostly the update.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from step import add_batch_arguments, make_batch, make_steps, start_process_group
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from encoder.config import PRESETS
from encoder.errors import run_main
from encoder.pretraining_config import PretrainConfig

SIZES = 4, 8  # images
# What attention runs as on a CPU, which torch does not count.
aten = torch.ops.aten
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v),
}
PAIRS = [("CLIP", "plain CLIP"), ("CLOC prompt", "CLIP"), ("CLOC mean", "CLIP")]


@dataclass
class Counts:
    """operations: kernels, roughly; flops: of matrix products and attention, a multiply-add is two; bytes: read and written"""

    operations: float = 0
    flops: float = 0
    bytes: float = 0


def storages(tensors: list) -> dict[int, int]:
    """The bytes of each distinct piece of memory; of an expanded tensor those that it has, of a slice those that it shows."""
    found = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    return {t.data_ptr(): min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in found}


class TrafficMode(TorchDispatchMode):
    """Counts the operations within it that touch memory, and the bytes that they read and write."""

    def __init__(self):
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        arguments = [(it, args[i] if i < len(args) else kwargs.get(it.name)) for i, it in enumerate(operation._schema.arguments)]
        in_place = [value for it, value in arguments if it.alias_info is not None and it.alias_info.is_write]
        read, written = storages(tree_leaves((args, kwargs))), storages(tree_leaves((result, in_place)))
        says_so = any(it.alias_info is not None and not it.alias_info.is_write for it in operation._schema.returns)
        is_view = says_so or not in_place and written.keys() <= read.keys()  # `_unsafe_view` does not say so
        if not is_view and "empty" not in operation.overloadpacket.__name__:
            self.counts.operations += 1
            self.counts.bytes += sum(read.values()) + sum(written.values())
        return result


def counted(step, warm_up: int = 2) -> Counts:
    """One call of `step`, after `warm_up` others in which the optimizer makes its state."""
    for _ in range(warm_up):
        step()
    traffic, flops = TrafficMode(), FlopCounterMode(display=False, custom_mapping=ATTENTION)
    with flops, traffic:
        step()
    traffic.counts.flops = flops.get_total_flops()
    return traffic.counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_batch_arguments(parser)
    parser.add_argument("--batch_size", type=int, default=256, help="images, for which the ratios are (default 256)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--out", type=Path, help="also write the counts here, as JSON")
    arguments = parser.parse_args()
    start_process_group()
    config = {"shards": "none", "output": "none", "preset": arguments.preset, "precision": arguments.precision, "zero_stage": 0}
    sizes: list[dict[str, dict[str, float]]] = []
    for size in SIZES:
        batch = make_batch(PRESETS[arguments.preset](), size, arguments)
        steps = make_steps(PretrainConfig(**config, batch_size=size), batch, torch.device("cpu"))
        sizes.append({name: asdict(counted(step)) for name, step in steps.items()})
    torch.distributed.destroy_process_group()

    rows = {}
    for name, small in sizes[0].items():
        large = sizes[1][name]
        image = {key: (large[key] - small[key]) / (SIZES[1] - SIZES[0]) for key in small}
        fixed = {key: large[key] - SIZES[1] * image[key] for key in small}
        whole = {key: fixed[key] + arguments.batch_size * image[key] for key in image}
        rows[name] = {"image": image, "fixed": fixed, "batch": whole}
    print(f"{arguments.preset}, {arguments.precision}, torch {torch.__version__}, counted with {SIZES[0]} and {SIZES[1]} images")
    print(f"{'':14}{'operations':>12}{'GFLOP an image':>16}{'MB an image':>13}{'MB a step beside':>18}{'GB':>8}")
    for name, row in rows.items():
        image, fixed, whole = row["image"], row["fixed"], row["batch"]
        memory = f"{image['bytes'] / 1e6:13.0f}{fixed['bytes'] / 1e6:18.0f}{whole['bytes'] / 1e9:8.1f}"
        print(f"{name:14}{whole['operations']:12.0f}{image['flops'] / 1e9:16.1f}{memory}")
    for above, below in PAIRS:
        ratios = [rows[above]["batch"][key] / rows[below]["batch"][key] for key in ("flops", "bytes")]
        print(f"{above} / {below}, {arguments.batch_size} images: arithmetic {ratios[0]:.3f}, memory {ratios[1]:.3f}")
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
