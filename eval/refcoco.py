"""Grounding on RefCOCO, RefCOCO+ or RefCOCOg, or on own data in their format: expression in, box out.

    python eval/refcoco.py --model runs/mllm_cloc --data scenes/refcoco --images scenes/images --out runs/eval_cloc

The unit is the expression. One greedy decode each; right when the IoU with the true box is at least 0.5, in pixels of
the original image; an answer that cannot be parsed is wrong and counted. --model is the folder of an MLLM, or of a CLOC
encoder, whose BoxHead then answers.
"""

import argparse

from encoder.errors import run_main
from eval.refcoco_files import RefcocoFiles
from eval.runner import Part, benchmark_parser, run_benchmark


def refcoco_parser(description: str) -> argparse.ArgumentParser:
    """The flags of the benchmarks that read RefCOCO's files."""
    parser = benchmark_parser(description, data="folder with refs(...).p and instances.json")
    parser.add_argument("--split-by", help="unc, umd or google, where --data holds several refs files")
    return parser


def read_parts(args: argparse.Namespace, suffix: str, task: str) -> list[Part]:
    """The splits asked for. suffix: of the benchmark's name; task: `grounding` asks by expression, `naming` by box."""
    files = RefcocoFiles.read(args.data, args.split_by)
    parts = []
    for split in args.split or files.test_splits():
        targets = files.expressions(split) if task == "grounding" else files.objects(split)
        parts.append(Part(files.name + suffix, split, task, targets, files.completeness(split)))
    return parts


def main() -> None:
    args = refcoco_parser(__doc__).parse_args()
    run_benchmark(args, lambda: read_parts(args, "", "grounding"), unit="expression")


if __name__ == "__main__":
    run_main(main)
