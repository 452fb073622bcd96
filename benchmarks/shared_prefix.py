"""Several expressions about one picture: its pass through the tower and the prompt's prefix shared, against one by one.

    python benchmarks/shared_prefix.py
    python benchmarks/shared_prefix.py --sizes usual --batches-only --pictures 16 --rounds 3
    python benchmarks/shared_prefix.py --model runs/mllm_cloc --pictures 64 --expressions 3 --out shared_prefix.json

`shared` is what every evaluation does. `own pass` gives each expression a picture pass and a prefix of its own, in batches of
the same size; `one by one` asks a question at a time besides. Answers must be the same in all three. Pictures are drawn.

The gain in equal batches is what tower and prefix cost beside the answer's tokens, so it depends on the model's sizes.
`--sizes usual` builds one of a CLIP B/16 tower at 224 px and a language model of SmolLM2-135M's shape, with random weights:
it never ends an answer, which is cut at as many tokens as a box has.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from rounds import Bar, in_turn, report_of, show
from shapes import LLM, TOWER
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from encoder.data.prompts import GROUNDING_QUESTION
from encoder.errors import DataError, run_main
from eval.answering import DTYPES
from mllm.checkpoint import MllmSettings
from mllm.generation import GroundingModel
from mllm.model import join

SHIPPED = Path(__file__).parents[1] / "weights/mllm_cloc"
BOX_TOKENS = 17  # of "[012, 345, 678, 999]" in the shipped tokenizer
WORDS = ("red heart", "green apple", "small bus", "yellow star on the left", "the largest cat", "key at the top", "second dog")
BARS = [Bar("one by one", "shared", 2, at_least=True), Bar("own pass", "shared", 2, at_least=True)]


def usual_model(device: torch.device, dtype: torch.dtype) -> GroundingModel:
    """Random weights in sizes that are in use. The shipped tokenizer's words; what is no word of it is never said."""
    torch.manual_seed(0)
    tokenizer, settings = AutoTokenizer.from_pretrained(SHIPPED), MllmSettings.read(SHIPPED)
    # An output layer of its own, of the same cost: with the embeddings for one, such a model repeats its last token.
    llm = LlamaForCausalLM(LlamaConfig(**{**LLM, "tie_word_embeddings": False}, initializer_range=0.06))
    tower = CLIPVisionModel(CLIPVisionConfig(**TOWER)).eval()
    model = GroundingModel(join(tower, llm, tokenizer, -2), tokenizer, settings)
    with torch.no_grad():
        model.model.lm_head.weight[len(tokenizer) :] = 0
        model.model.lm_head.weight[[*model.end_ids, model.image_token_id]] = 0
    settings.image = replace(settings.image, size=TOWER["image_size"])
    model.model.to(device, dtype)
    return model


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
    model: GroundingModel,
    pictures: list[Image.Image],
    expressions: int,
    batch_size: int,
    longest: int,
    kept: dict[str, list[str]],
) -> dict[str, Callable[[], None]]:
    """What is timed, by name; each leaves its answers, of up to `longest` tokens, in `kept`."""
    options = {"batch_size": batch_size, "max_new_tokens": longest, "progress": False}
    images = [picture for picture in pictures for _ in range(expressions)]
    questions = [GROUNDING_QUESTION.format(WORDS[i % len(WORDS)]) for i in range(len(images))]

    def shared() -> None:
        kept["shared"] = model.generate(images, questions, **options)

    def own_pass() -> None:  # copies are different pictures to the model
        copies = [image.copy() for image in images]
        kept["own pass"] = model.generate(copies, questions, **options)

    def one_by_one() -> None:
        pairs = zip(images, questions, strict=True)
        kept["one by one"] = [model.generate([image], [text], **options)[0] for image, text in pairs]

    return {"shared": shared, "own pass": own_pass, "one by one": one_by_one}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHIPPED, help="MLLM folder; default: the shipped one")
    parser.add_argument("--sizes", choices=("model", "usual"), default="model", help="usual: random weights instead of --model")
    parser.add_argument("--pictures", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--expressions", type=int, default=3, help="per picture (default: %(default)s, as RefCOCO has)")
    parser.add_argument("--batch-size", type=int, default=48, help="questions per batch (default: %(default)s)")
    parser.add_argument("--batches-only", action="store_true", help="leave out `one by one`, which takes longest")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    usual, dtype = args.sizes == "usual", DTYPES[args.dtype]
    model = usual_model(device, dtype) if usual else GroundingModel.from_pretrained(args.model, device, dtype)
    answers: dict[str, list[str]] = {}
    longest = BOX_TOKENS if usual else 32
    variants = make_variants(model, draw_pictures(args.pictures), args.expressions, args.batch_size, longest, answers)
    bars = BARS
    if args.batches_only:
        del variants["one by one"]
        bars = BARS[1:]
    for work in variants.values():
        work()
    different = sum(len(set(row)) > 1 for row in zip(*answers.values(), strict=True))
    count = args.pictures * args.expressions
    if different:
        raise DataError(f"{different} of {count} answers differ between the ways; with --dtype float32 none should")
    report = report_of(in_turn(variants, args.rounds, device), bars, device)
    for medians in report["variants"].values():
        medians["expressions_per_second"] = count / medians["seconds"]
    show(report, args.out)
    rates = ", ".join(f"{name} {medians['expressions_per_second']:.1f}" for name, medians in report["variants"].items())
    print(f"expressions per second: {rates}; all {count} answers the same ({len(set(answers['shared']))} different ones)")


if __name__ == "__main__":
    run_main(main)
