"""Several expressions about one picture: its pass through the tower and the prompt's prefix shared, against one by one.

    python benchmarks/shared_prefix.py
    python benchmarks/shared_prefix.py --model runs/mllm_cloc --pictures 64 --expressions 3 --out shared_prefix.json

`shared` is what every evaluation does. `own pass` gives each expression a picture pass and a prefix of its own, in batches of
the same size; `one by one` asks a question at a time besides. Answers must be the same in all three. Pictures are drawn.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from rounds import Bar, in_turn, report_of, show

from encoder.data.prompts import GROUNDING_QUESTION
from encoder.errors import DataError, run_main
from eval.answering import DTYPES
from mllm.generation import GroundingModel

WORDS = ("red heart", "green apple", "small bus", "yellow star on the left", "the largest cat", "key at the top", "second dog")
# In equal batches the gain is what tower and prefix cost beside the answer's tokens: much in a real model, little in a tiny one.
BARS = [Bar("one by one", "shared", 2, at_least=True), Bar("own pass", "shared", 1, at_least=True)]


def draw_pictures(count: int) -> list[Image.Image]:
    """Pictures of 640x480 with eight coloured shapes each."""
    rng, pictures = np.random.default_rng(0), []
    for _ in range(count):
        picture = Image.new("RGB", (640, 480), tuple(rng.integers(150, 256, 3).tolist()))
        draw = ImageDraw.Draw(picture)
        for index in range(8):
            x, y = rng.integers(0, 540), rng.integers(0, 380)
            shape = draw.ellipse if index % 2 else draw.rectangle
            shape([x, y, x + rng.integers(30, 100), y + rng.integers(30, 100)], fill=tuple(rng.integers(0, 256, 3).tolist()))
        pictures.append(picture)
    return pictures


def make_variants(
    model: GroundingModel, pictures: list[Image.Image], expressions: int, batch_size: int, kept: dict[str, list[str]]
) -> dict[str, Callable[[], None]]:
    """What is timed, by name; each leaves its answers in `kept`."""
    images = [picture for picture in pictures for _ in range(expressions)]
    questions = [GROUNDING_QUESTION.format(WORDS[i % len(WORDS)]) for i in range(len(images))]

    def shared() -> None:
        kept["shared"] = model.generate(images, questions, batch_size=batch_size, progress=False)

    def own_pass() -> None:  # copies are different pictures to the model
        copies = [image.copy() for image in images]
        kept["own pass"] = model.generate(copies, questions, batch_size=batch_size, progress=False)

    def one_by_one() -> None:
        pairs = zip(images, questions, strict=True)
        kept["one by one"] = [model.generate([image], [text], progress=False)[0] for image, text in pairs]

    return {"shared": shared, "own pass": own_pass, "one by one": one_by_one}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parents[1] / "weights/mllm_cloc"
    parser.add_argument("--model", type=Path, default=default, help="MLLM folder; default: the shipped one")
    parser.add_argument("--pictures", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--expressions", type=int, default=3, help="per picture (default: %(default)s, as RefCOCO has)")
    parser.add_argument("--batch-size", type=int, default=48, help="questions per batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = GroundingModel.from_pretrained(args.model, device, DTYPES[args.dtype])
    answers: dict[str, list[str]] = {}
    variants = make_variants(model, draw_pictures(args.pictures), args.expressions, args.batch_size, answers)
    for work in variants.values():
        work()
    different = sum(len(set(row)) > 1 for row in zip(*answers.values(), strict=True))
    count = args.pictures * args.expressions
    if different:
        raise DataError(f"{different} of {count} answers differ between the ways; with --dtype float32 none should")
    report = report_of(in_turn(variants, args.rounds, device), BARS, device)
    for medians in report["variants"].values():
        medians["expressions_per_second"] = count / medians["seconds"]
    show(report, args.out)
    rates = ", ".join(f"{name} {medians['expressions_per_second']:.1f}" for name, medians in report["variants"].items())
    print(f"expressions per second: {rates}; all {count} answers the same")


if __name__ == "__main__":
    run_main(main)
