"""Region descriptions of Visual Genome, both ways: a box in and its description out, or a description in and its box out.

    python eval/visual_genome.py --model runs/mllm_cloc --data vg --images vg --out runs/eval_cloc
    python eval/visual_genome.py --task grounding ...

`describing`: CIDEr-D against the region's own description, and how often the words are the same. `grounding`: as in
refcoco.py. Regions of a random sample of pictures, or of those listed in --ids: keep out what the model was trained on.
"""

import argparse
from collections import Counter
from pathlib import Path

from encoder.data.prompts import REFERRING_QUESTION
from encoder.data.sources.visual_genome import read_visual_genome
from encoder.errors import DataError, run_main
from eval.predictions import Target
from eval.region_retrieval import draw
from eval.runner import Part, benchmark_parser, image_folder, needs_words, run_benchmark


def read_parts(args: argparse.Namespace) -> list[Part]:
    """One part: all usable regions of the chosen pictures; what is left out is counted into the protocol."""
    files = [args.data / name for name in ("image_data.json", "region_descriptions.json")]
    source = read_visual_genome(files, image_folder(args))
    if args.ids:
        wanted = set(args.ids.read_text().split())
        pictures = [image for image in source.images if image.name.rpartition("/")[2].partition(".")[0] in wanted]
        if len(pictures) != len(wanted):
            raise DataError(
                f"{args.ids}: {len(wanted)} numbers, only {len(pictures)} of them in {files[0]}; give ids of that file"
            )
    else:
        pictures = draw((image for image in source.images if image.labels), args.sample, args.seed)
    targets, left_out = [], Counter()
    for image in sorted(pictures, key=lambda image: image.name):
        width, height = image.size
        for number, label in enumerate(image.labels):
            x1, y1, x2, y2 = label.box
            box = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
            if not label.phrases or not (box[0] < box[2] and box[1] < box[3]):
                left_out["without words" if not label.phrases else "without area"] += 1
                continue
            place = f"{image.name}-{number}"
            targets.append(Target(place, image.name, width, height, label.phrases[0], box, "", answers=(label.phrases[0],)))
    if not targets:
        raise DataError(f"{args.data}: none of the chosen pictures has a described region; is it Visual Genome's folder?")
    chosen = {"ids": len(pictures)} if args.ids else {"sample": args.sample or "all", "seed": args.seed}
    return [
        Part(
            f"visual_genome_{args.task}",
            "regions",
            args.task,
            targets,
            "not checked: a choice of regions",
            {**chosen, "left_out": dict(left_out)},
        )
    ]


def main() -> None:
    parser = benchmark_parser(__doc__, data="folder with image_data.json and region_descriptions.json")
    parser.add_argument("--task", choices=("describing", "grounding"), default="describing", help="default: %(default)s")
    parser.add_argument("--ids", type=Path, help="file of picture numbers to take, instead of a sample")
    parser.add_argument("--sample", type=int, default=500, help="pictures drawn at random; 0: all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of that draw (default: %(default)s)")
    args = parser.parse_args()

    def ask(answerer, part: Part):
        if part.task == "grounding":
            return answerer.ground
        describe = needs_words(answerer, args.model).asks
        return describe(lambda target: (REFERRING_QUESTION.format("<region:0>"), [target.box]), max_new_tokens=64)

    run_benchmark(args, lambda: read_parts(args), ask=ask, unit="region")


if __name__ == "__main__":
    run_main(main)
