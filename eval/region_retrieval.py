"""Finds boxes by their captions and captions by their boxes, among all of a set, with an encoder alone.

    python eval/region_retrieval.py --model runs/cloc --data grit --images grit/ --out runs/eval_cloc
    python eval/region_retrieval.py --model runs/clip --feature roialign --data visual_genome \
        --annotations image_data.json region_descriptions.json --images vg --out runs/eval_clip
    python eval/region_retrieval.py ... --data refcoco --annotations refcoco --split val --images train2014

R@10 on 2,000 pictures of GRIT is the paper's measure (arXiv 2410.02746, Table 3). Files are read as docs/data.md says.
"""

import argparse
import io
import random
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from encoder.data.reader import IMAGE_ERRORS
from encoder.data.sources.grit import read_grit
from encoder.data.sources.labelled import Source, SourceImage
from encoder.data.sources.published import completeness
from encoder.data.sources.refcoco import read_refcoco
from encoder.data.sources.visual_genome import read_visual_genome
from encoder.errors import DataError, run_main
from eval.embedding import WHOLE_PICTURE, Embedder, add_run_flags, run_evaluation
from eval.region_features import FEATURES, RegionFeatures, add_feature_flags, feature_variant
from eval.retrieval import TEXTS, Directions, Picture, evaluate_retrieval

SAMPLE = 2000  # pictures, of the two sets that are too large to be compared whole; the paper's number for GRIT


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("grit", "visual_genome", "refcoco"), help="whose files they are")
    parser.add_argument("--annotations", type=Path, nargs="+", default=[], help="the set's files, or the folder of them")
    parser.add_argument("--images", type=Path, help="folder of its pictures (GRIT: img2dataset's output)")
    parser.add_argument("--split", default="val", help="of RefCOCO: val (default), testA, ...")
    parser.add_argument("--split-by", help="unc, umd or google, where the folder holds several refs files")
    parser.add_argument(
        "--sample", type=int, help=f"pictures drawn at random; 0: all. Default: all of RefCOCO, {SAMPLE} of the others"
    )
    parser.add_argument("--seed", type=int, default=0, help="of that draw (default: %(default)s)")
    parser.add_argument("--texts", choices=TEXTS, default="each", help="whether equal captions are one (default: %(default)s)")
    add_feature_flags(parser, FEATURES[:3])
    add_run_flags(parser, "the first pictures of the sample", batch_size=32, geometries=WHOLE_PICTURE)
    return parser.parse_args()


def main() -> None:
    run_evaluation(parse_arguments(), ("data", "images"), evaluate)


def evaluate(args: argparse.Namespace) -> list[Path]:
    """The folders of the answers in both directions."""
    size = args.sample if args.sample is not None else 0 if args.data == "refcoco" else SAMPLE
    if size < 0:
        raise DataError(f"--sample is {size}; give a number of pictures, or 0 for all")
    source = open_source(args)
    counts: Counter = Counter()
    sample = draw(counted(source.images, counts), size, args.seed)
    pictures = [picture_of(image, args.data, counts) for image in sample[: args.limit]]
    pictures = [picture for picture in pictures if picture.boxes]
    if not pictures:
        raise DataError(f"{source.part}: no picture has a box with a caption; is it the right set?")
    whole = completeness(source.part, counts, 0)
    if args.limit is not None and len(sample) > args.limit:
        whole = f"PARTIAL: {args.limit} of {len(sample)} pictures"

    embedder = Embedder(args.model, args.device, args.geometry)
    features = RegionFeatures(embedder.model, embedder.processor, args.feature, args.layer, args.crop_scale)
    return evaluate_retrieval(
        pictures,
        args.texts,
        Directions(args.out, ("text_to_region", "region_to_text"), source.part.replace("/", "-"), feature_variant(args)),
        embedder,
        features.embed,
        args.batch_size,
        protocol={
            "sample": size or "all",
            "seed": args.seed,
            "left_out": {name: counts[name] for name in ("boxes without area", "boxes without caption")},
            "completeness": whole,
        },
        settings={"model": str(args.model), "images": str(args.images)},
    )


def open_source(args: argparse.Namespace) -> Source:
    """The set's reader on the given files."""
    if args.data == "grit":
        return read_grit(args.annotations, args.images)
    if args.data == "visual_genome":
        return read_visual_genome(args.annotations, args.images)
    if len(args.annotations) != 1:
        raise DataError(f"--data refcoco takes one --annotations, the folder of refs(...).p; {len(args.annotations)} were given")
    return read_refcoco(args.annotations[0], args.images, args.split, args.split_by)


def counted(images: Iterable[SourceImage], counts: Counter) -> Iterable[SourceImage]:
    """The images that have a label; adds up what the files hold for all of them."""
    for image in images:
        counts.update(image.counts)
        if image.labels:
            yield image


def draw(images: Iterable[SourceImage], size: int, seed: int) -> list[SourceImage]:
    """`size` images drawn evenly, without keeping the others (reservoir sampling); all of them for 0."""
    rng, chosen = random.Random(seed), []
    for number, image in enumerate(images):
        if not size or number < size:
            chosen.append(image)
        elif (place := rng.randrange(number + 1)) < size:
            chosen[place] = image
    return chosen


def picture_of(image: SourceImage, dataset: str, counts: Counter) -> Picture:
    """The image's boxes in pixels, cut at its border, with their captions; what has neither is counted and left out.

    Captions: of GRIT the referring expression (the longest text that the release has for a box), else all there are.
    Labels with the same box are one. Raises DataError for an image that is missing, broken, or of another size than stated.
    """
    found = width, height = with_opened(image, lambda picture: picture.size)
    if image.size not in (None, found):
        raise DataError(
            f"{image.name} is {width}x{height} px, its annotations say {image.size[0]}x{image.size[1]}; use the original images"
        )
    captions: dict[tuple, list[str]] = {}
    for label in image.labels:
        scale = (width, height) if image.size is None else (1, 1)
        box = [value * scale[axis % 2] for axis, value in enumerate(label.box)]
        x1, y1, x2, y2 = (min(max(value, 0.0), float(found[axis % 2])) for axis, value in enumerate(box))
        phrases = sorted(label.phrases, key=len)[-1:] if dataset == "grit" else label.phrases
        if not (x1 < x2 and y1 < y2):
            counts["boxes without area"] += 1
        elif not phrases:
            counts["boxes without caption"] += 1
        else:
            captions.setdefault((x1, y1, x2, y2), []).extend(phrases)
    load = partial(with_opened, image, lambda found: found.convert("RGB"))
    return Picture(image.name, width, height, load, tuple(captions), tuple(map(tuple, captions.values())))


def with_opened(image: SourceImage, use: Callable[[Image.Image], Any]) -> Any:
    """What `use` makes of the opened picture. DataError where there is none, or it is broken."""
    try:
        with Image.open(io.BytesIO(image.read())) as found:
            return use(found)
    except FileNotFoundError as error:
        raise DataError(
            f"{image.name} is not there ({error.filename or error}); give the folder that holds it as --images"
        ) from None
    except IMAGE_ERRORS as error:
        raise DataError(f"{image.name} cannot be read as an image ({type(error).__name__}); fetch it again") from None


if __name__ == "__main__":
    run_main(main)
