"""POPE: does the model see things that are not there? Yes-or-no questions on COCO's val2014, from the official files.

    python eval/pope.py --model runs/mllm_cloc --data pope/coco --images val2014 --out runs/eval_cloc

Accuracy, precision, recall and F1 of `yes`, and how often it says yes; an answer is read by POPE's own rule.
"""

import argparse
import re
from collections import Counter
from pathlib import Path

from encoder.errors import DataError, run_main
from eval.json_lines import json_lines
from eval.predictions import Target
from eval.runner import Part, benchmark_parser, image_folder, needs_words, picture_size, run_benchmark

# Questions per file; the first release of `random` has fewer.
PUBLISHED = {"random": (3000, 2910), "popular": (3000,), "adversarial": (3000,)}


def read_parts(args: argparse.Namespace) -> list[Part]:
    files = [args.data] if args.data.is_file() else sorted(path for path in args.data.glob("*pope*.json*"))
    if not files:
        raise DataError(f"{args.data} holds no file like coco_pope_random.json; give POPE's folder output/coco")
    parts = [read_part(path, image_folder(args), args.instruction) for path in files]
    if args.split:
        missing = set(args.split) - {part.split for part in parts}
        if missing:
            raise DataError(f"{args.data}: no file for split {sorted(missing)[0]}; there are {', '.join(p.split for p in parts)}")
        parts = [part for part in parts if part.split in args.split]
    return parts


def read_part(path: Path, images: Path, instruction: str) -> Part:
    """One file, a JSON object a line: question_id, image, text and label."""
    found = re.search("random|popular|adversarial", path.stem)
    split, targets, sizes = found[0] if found else path.stem, [], {}
    for row, where in json_lines(path):
        try:
            number, name, text, label = (row[key] for key in ("question_id", "image", "text", "label"))
        except KeyError as error:
            raise DataError(f"{where}: no key {error}; POPE's lines have question_id, image, text and label") from None
        if label not in ("yes", "no"):
            raise DataError(f"{where}: label is {label!r}, yes or no was expected; give POPE's own file, not answers to it")
        if name not in sizes:
            sizes[name] = picture_size(images, name, where)
        box = (0.0, 0.0, *map(float, sizes[name]))
        targets.append(Target(str(number), name, *sizes[name], text, box, "", label, answers=(label,)))
    doubled = [number for number, count in Counter(t.id for t in targets).items() if count > 1]
    if doubled:
        raise DataError(f"{path}: question_id {doubled[0]} occurs twice; answers are joined by it, download the file again")
    expected = PUBLISHED.get(split, (len(targets),))
    whole = "published" if split in PUBLISHED else "own data"
    if len(targets) not in expected:
        whole = f"PARTIAL: the file has {len(targets)} of {expected[0]} questions"
    return Part("pope", split, "yes_no", targets, whole, {"instruction": instruction})


def main() -> None:
    parser = benchmark_parser(__doc__, data="a coco_pope_*.json, or the folder of them")
    parser.add_argument("--instruction", default="", help="written behind each question, as LLaVA does; default: nothing")
    args = parser.parse_args()

    def ask(answerer, part: Part):
        return needs_words(answerer, args.model).asks(lambda target: (f"{target.text} {args.instruction}".strip(), []))

    run_benchmark(args, lambda: read_parts(args), ask=ask)


if __name__ == "__main__":
    run_main(main)
