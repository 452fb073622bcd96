"""What every benchmark for an MLLM shares: its flags, going through its splits, and the lines on the terminal.

    python eval/BENCHMARK.py --model M --data D --out RUN
    torchrun --nproc_per_node 4 eval/BENCHMARK.py ...     (or deepspeed --num_gpus 4 ...)

The same command again goes on where it was stopped; several processes give the answers of one.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from encoder.data.sources.labelled import plain_name
from encoder.distributed import rank
from encoder.errors import DataError
from eval.answering import DTYPES, answer_all, check_counts, load_answerer
from eval.coco_files import check_images
from eval.predictions import PredictionLog, Target
from eval.processes import add_launcher_flag, first_does, processes
from eval.scoring import score_folder, score_line, score_run


@dataclass(frozen=True)
class Part:
    """One split of a benchmark.

    completeness: `published`, `own data` or `PARTIAL: ...`, of all its targets; protocol: what else must be equal where two
    runs are compared
    """

    benchmark: str
    split: str
    task: str
    targets: list[Target]
    completeness: str
    protocol: dict[str, Any] = field(default_factory=dict)


def benchmark_parser(description: str, data: str) -> argparse.ArgumentParser:
    """The flags of all benchmarks; `data` says what --data holds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the model to evaluate")
    parser.add_argument("--data", type=Path, help=data)
    parser.add_argument("--images", type=Path, help="folder of the pictures; default: 'images' beside --data")
    parser.add_argument("--split", nargs="+", help="default: every split of the files but train")
    parser.add_argument("--limit", type=int, help="only the first questions of each split; marked PARTIAL")
    parser.add_argument("--batch-size", type=int, default=64, help="questions per batch (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s, batch-independent")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--out", type=Path, required=True, help="run folder; several benchmarks may share one")
    parser.add_argument("--score-only", action="store_true", help="score all answers in --out again, without a model")
    add_launcher_flag(parser)
    return parser


def run_benchmark(
    args: argparse.Namespace,
    read: Callable[[], list[Part]],
    load: Callable[[], Any] | None = None,
    ask: Callable[[Any, Part], Callable] | None = None,
    unit: str = "question",
    metrics: tuple[str, ...] | None = None,
    scored: bool = True,
) -> None:
    """Reads, asks, scores, and prints a line per split.

    read: the parts to evaluate, called where there is something to ask; load: the answerer, by default that of --model
    ask: (answerer, part) -> its method for these targets; default `ground`; metrics: those to print, default all
    scored: whether answers alone decide the score
    """
    if args.score_only:
        return score_run(args.out, metrics)
    if args.model is None or args.data is None:
        raise DataError("--model and --data are needed, unless --score-only is given")
    check_counts(args.limit, args.batch_size)
    with processes():
        parts = [limited(part, args.limit) for part in read()]
        images = image_folder(args)
        check_images({t.image: (t.width, t.height) for part in parts for t in part.targets}, images)
        answerer = load() if load else load_answerer(args.model, args.device, args.dtype)
        answers = [ask(answerer, part) if ask else answerer.ground for part in parts]
        for part, answer in zip(parts, answers, strict=True):
            benchmark = part.benchmark + getattr(answerer, "suffix", "")
            chance = {"chance": answerer.chance(part.targets)} if hasattr(answerer, "chance") else {}
            log = PredictionLog(
                args.out / benchmark / part.split / answerer.record.get("variant", ""),
                protocol={
                    "benchmark": benchmark,
                    "split": part.split,
                    "task": part.task,
                    "completeness": part.completeness,
                    **part.protocol,
                    **chance,
                    **answerer.protocol,
                },
                model=answerer.record,
                targets=part.targets,
                settings={"model": str(args.model), "images": str(images), "batch_size": args.batch_size},
            )
            answer_all(log, images, answer, args.batch_size, unit)
            if not scored:
                continue
            first_does(lambda folder=log.folder: print(score_line(score_folder(folder), metrics)))
        if rank() == 0:
            print(f"answers and scores: {args.out}")


def image_folder(args: argparse.Namespace) -> Path:
    return args.images or args.data.resolve().parent / "images"


def picture_size(images: Path, name: str, where: str) -> tuple[int, int]:
    """(width, height) of a picture whose annotations do not state it. `where` names the row that asks for it."""
    try:
        with Image.open(images / plain_name(name, where)) as image:
            return image.size
    except OSError as error:
        raise DataError(
            f"{where}: {images / name} is not there or broken ({error}); pass the folder that holds it as --images"
        ) from None


def needs_words(answerer: Any, model: Path) -> Any:
    """The answerer, if it is an MLLM. DataError for an encoder."""
    if not hasattr(answerer, "asks"):
        raise DataError(f"{model} is an encoder, which has no words; this benchmark needs the folder of an MLLM")
    return answerer


def limited(part: Part, limit: int | None) -> Part:
    """The first `limit` questions, marked PARTIAL where that leaves some out."""
    if limit is None or limit >= len(part.targets):
        return part
    whole = f"PARTIAL: {limit} of {len(part.targets)}"
    return Part(part.benchmark, part.split, part.task, part.targets[:limit], whole, part.protocol)
