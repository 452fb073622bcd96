"""Grounding on RefCOCO, RefCOCO+ or RefCOCOg, or on own data in their format: expression in, box out.

    python eval/refcoco.py --model runs/mllm_cloc --data scenes/refcoco --images scenes/images --out runs/eval_cloc

The unit is the expression. One greedy decode each; right when the IoU with the true box is at least 0.5, in pixels of
the original image; an answer that cannot be parsed is wrong and counted. --model is the folder of an MLLM, or of a CLOC
encoder, whose BoxHead then answers.
"""

import argparse
from pathlib import Path

from encoder.errors import DataError, run_main
from eval.answering import DTYPES, answer_all, load_answerer
from eval.coco_files import check_images
from eval.predictions import PredictionLog, Target
from eval.refcoco_files import RefcocoFiles
from eval.scoring import score_folder, score_line, score_run


def parse_arguments(description: str) -> argparse.Namespace:
    """The flags of the benchmarks that read RefCOCO's files."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the model to evaluate")
    parser.add_argument("--data", type=Path, help="folder with refs(...).p and instances.json")
    parser.add_argument("--images", type=Path, help="folder of the pictures; default: 'images' beside --data")
    parser.add_argument("--split", nargs="+", help="default: every split of the files but train")
    parser.add_argument("--split-by", help="unc, umd or google, where --data holds several refs files")
    parser.add_argument("--limit", type=int, help="only the first questions of each split; marked PARTIAL")
    parser.add_argument("--batch-size", type=int, default=64, help="questions per batch (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s, batch-independent")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--out", type=Path, required=True, help="run folder; several benchmarks may share one")
    parser.add_argument("--score-only", action="store_true", help="score all answers in --out again, without a model")
    return parser.parse_args()


def evaluate(args: argparse.Namespace, suffix: str, task: str) -> None:
    """Runs one benchmark over its splits, and prints a line per split.

    suffix: of the benchmark's name after the data folder's; task: `grounding` asks by expression, `naming` by box
    """
    if args.score_only:
        return score_run(args.out)
    if args.model is None or args.data is None:
        raise DataError("--model and --data are needed, unless --score-only is given")
    files = RefcocoFiles.read(args.data, args.split_by)
    splits = args.split or files.test_splits()
    targets = {split: questions(files, split, task)[: args.limit] for split in splits}
    images = args.images or args.data.resolve().parent / "images"
    check_images({t.image: (t.width, t.height) for of_split in targets.values() for t in of_split}, images)
    answerer = load_answerer(args.model, args.device, args.dtype)
    if task == "naming" and not hasattr(answerer, "name"):
        raise DataError(f"{args.model} is an encoder, which has no words; use eval/region_classification.py for it")
    for split in splits:
        log = PredictionLog(
            args.out / f"{files.name}{suffix}" / split,
            protocol={
                "benchmark": files.name + suffix,
                "split": split,
                "task": task,
                "completeness": files.completeness(split, task, len(targets[split])),
                **answerer.protocol,
            },
            model=answerer.record,
            targets=targets[split],
            settings={"model": str(args.model), "images": str(images), "batch_size": args.batch_size},
        )
        answer = answerer.ground if task == "grounding" else answerer.name
        answer_all(log, images, answer, args.batch_size, unit="expression" if task == "grounding" else "box")
        print(score_line(score_folder(log.folder)))
    print(f"answers and scores: {args.out}")


def questions(files: RefcocoFiles, split: str, task: str) -> list[Target]:
    return files.expressions(split) if task == "grounding" else files.objects(split)


def main() -> None:
    evaluate(parse_arguments(__doc__), suffix="", task="grounding")


if __name__ == "__main__":
    run_main(main)
