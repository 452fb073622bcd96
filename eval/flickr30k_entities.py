"""Phrase grounding on Flickr30k Entities, from its own sentence and XML files: a caption's phrase in, its boxes out.

    python eval/flickr30k_entities.py --model runs/mllm_cloc --data annotations --images flickr30k-images --out runs/eval_cloc

The unit is the phrase that has a box. `merged_box`: the truth is the box around all of the phrase's boxes, and so is the
answer where it says several (Ferret, Shikra; the protocol of CLOC's Table 5). `any_box`: the first box said must meet one of
them (MDETR, Kosmos-2). Right at IoU >= 0.5. --model is an MLLM or a CLOC encoder; with --rank, of any CLIP or CLOC.
"""

import argparse
from collections import Counter

from encoder.data.sources.flickr30k import box_around, read_boxes, read_sentences, split_ids
from encoder.data.sources.published import completeness
from encoder.errors import DataError, run_main
from eval.predictions import Target
from eval.ranked_boxes import Candidates, RankingAnswerer, add_ranking_flags, refuse_without_rank
from eval.runner import Part, benchmark_parser, run_benchmark


def read_part(args: argparse.Namespace, split: str) -> Part:
    """The phrases of a split that have boxes; those without are counted into the protocol."""
    _, names = split_ids(args.data, split, "--data")
    targets, counts = [], Counter(images=len(names))
    for name in names:
        boxes, (width, height), found = read_boxes(args.data, name)
        captions, phrases, more = read_sentences(args.data, name)
        counts += Counter(boxes=found["boxes"], captions=more["captions"])
        for number, phrase in enumerate(phrases):
            usable = [tuple(box) for box in boxes.get(phrase.chain, ()) if box[0] < box[2] and box[1] < box[3]]
            if not usable:
                counts["without_box"] += 1
                continue
            kinds, place = "/".join(phrase.kinds), f"{name}-{phrase.sentence}-{number}"
            around = box_around(usable)
            targets.append(Target(place, f"{name}.jpg", width, height, phrase.text, around, "", kinds, tuple(usable)))
    if not targets:
        raise DataError(f"{args.data}: no phrase of split {split} has a box; is it the folder of Sentences and Annotations?")
    whole = completeness(f"flickr30k/{split}", counts, 0)
    return Part("flickr30k_entities", split, "phrases", targets, whole, {"phrases_without_box": counts["without_box"]})


def main() -> None:
    parser = benchmark_parser(__doc__, data="folder with Sentences, Annotations, val.txt and test.txt")
    add_ranking_flags(parser)
    args = parser.parse_args()
    refuse_without_rank(args)

    def ranker() -> RankingAnswerer:
        if args.proposals is None:
            raise DataError("--rank needs --proposals here, a detector's boxes; the annotated ones of a picture are its answers")
        return RankingAnswerer(args, Candidates(args.proposals))

    def parts() -> list[Part]:
        return [read_part(args, split) for split in args.split or ("val", "test")]

    run_benchmark(args, parts, load=ranker if args.rank else None, unit="phrase")


if __name__ == "__main__":
    run_main(main)
