"""Grounding on RefCOCO, RefCOCO+, RefCOCOg or Ref-L4, or on own data in their format: expression in, box out.

    python eval/refcoco.py --model runs/mllm_cloc --data scenes/refcoco --images scenes/images --out runs/eval_cloc
    python eval/refcoco.py --model runs/cloc --data refcoco --split-by unc --images train2014 --out runs/eval_cloc
    python eval/refcoco.py --model clip --baseline crop --data refcoco --images train2014 --out runs/eval_crop

The unit is the expression. One greedy decode each; right when the IoU with the true box is at least 0.5, in pixels of
the original image; an answer that cannot be parsed is wrong and counted. --model is the folder of an MLLM, or of a CLOC
encoder, whose BoxHead then answers; with --rank, of any CLIP or CLOC that chooses among candidate boxes.
"""

import argparse
from pathlib import Path

from encoder.errors import DataError, run_main
from eval.ranked_boxes import Candidates, RankingAnswerer, add_ranking_flags, refuse_without_rank
from eval.refcoco_files import RefcocoFiles
from eval.refcoco_mirrors import SETS, read_mirror
from eval.runner import Part, benchmark_parser, image_folder, run_benchmark


def refcoco_parser(description: str) -> argparse.ArgumentParser:
    """The flags of the benchmarks that read RefCOCO's files."""
    parser = benchmark_parser(description, data="folder with refs(...).p and instances.json, or a mirror's file or folder")
    parser.add_argument("--split-by", help="unc, umd or google, where --data holds several refs files")
    parser.add_argument("--dataset", choices=SETS, help="which set, where the files of a mirror do not tell")
    return parser


def read_files(args: argparse.Namespace) -> RefcocoFiles:
    """The set in --data, in whichever form it is."""
    data = args.data
    if not data.exists():
        raise DataError(f"{data} is not a folder or file; --data is a folder with refs(...).p and instances.json, or a mirror's")
    if data.is_dir() and (any(data.glob("refs(*).p")) or (data / "instances.json").exists()):
        return RefcocoFiles.read(data, args.split_by)
    return read_mirror(data, image_folder(args), args.dataset, args.split_by)


def read_parts(args: argparse.Namespace, suffix: str, task: str, region: str = "box") -> list[Part]:
    """The splits asked for.

    suffix: of the benchmark's name; task: `grounding` asks by expression, `naming` by `region`, see `RefcocoFiles.objects`
    """
    files = read_files(args)
    parts = []
    for split in args.split or files.test_splits():
        targets = files.expressions(split) if task == "grounding" else files.objects(split, region)
        if task == "naming" and not all(target.category for target in targets):
            raise DataError(
                f"{args.data}: this form of {files.name} has no names of objects; use its refs(...).p and instances.json"
            )
        parts.append(Part(files.name + suffix, split, task, targets, files.completeness(split)))
    return parts


def main() -> None:
    parser = refcoco_parser(__doc__)
    add_ranking_flags(parser)
    args = parser.parse_args()
    refuse_without_rank(args)

    def ranker() -> RankingAnswerer:
        return RankingAnswerer(args, Candidates(args.proposals or Path(args.data) / "instances.json"))

    run_benchmark(args, lambda: read_parts(args, "", "grounding"), load=ranker if args.rank else None, unit="expression")


if __name__ == "__main__":
    run_main(main)
