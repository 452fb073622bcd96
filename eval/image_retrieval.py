"""Finds pictures by their captions and captions by their pictures: COCO and Flickr30k in Karpathy's splits.

    python eval/image_retrieval.py --model runs/cloc --annotations dataset_coco.json --images coco --out runs/eval_cloc
    python eval/image_retrieval.py --model runs/cloc --annotations dataset_flickr30k.json --images flickr30k-images ...

The test split, the first five captions of each picture, all pictures against all captions: R@1, R@5 and R@10.
"""

import argparse
import json
from functools import partial
from pathlib import Path

from encoder.errors import DataError, run_main
from eval.embedding import Embedder, add_run_flags, run_evaluation
from eval.retrieval import TEXTS, Directions, Picture, evaluate_retrieval
from eval.zero_shot import picture_size
from mllm.image_input import read_picture

CAPTIONS_PER_PICTURE = 5  # a few of COCO's have six or seven; five is what is published on
# Pictures of each split (Karpathy and Fei-Fei, arXiv 1412.2306).
PUBLISHED = {
    "dataset_coco": {"val": 5000, "test": 5000},
    "dataset_flickr30k": {"val": 1014, "test": 1000},
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=Path, help="dataset_coco.json or dataset_flickr30k.json")
    parser.add_argument("--images", type=Path, help="folder of the pictures; COCO's holds val2014 and train2014")
    parser.add_argument("--split", default="test", help="default: %(default)s")
    parser.add_argument("--texts", choices=TEXTS, default="each", help="whether equal captions are one (default: %(default)s)")
    add_run_flags(parser, "the first pictures")
    return parser.parse_args()


def main() -> None:
    run_evaluation(parse_arguments(), ("annotations", "images"), evaluate)


def evaluate(args: argparse.Namespace) -> list[Path]:
    """The folders of the answers in both directions."""
    rows = read_karpathy(args.annotations, args.split)
    pictures = [open_picture(args.images, name, captions) for name, captions in rows[: args.limit]]
    embedder = Embedder(args.model, args.device, args.geometry)
    name = f"{args.annotations.stem.removeprefix('dataset_')}-{args.split}"
    return evaluate_retrieval(
        pictures,
        args.texts,
        Directions(args.out, ("text_to_image", "image_to_text"), name),
        embedder,
        lambda images, boxes: embedder.embed_images(images),
        args.batch_size,
        protocol={
            "captions_per_picture": CAPTIONS_PER_PICTURE,
            "completeness": completeness(args.annotations, args.split, len(rows), len(pictures)),
        },
        settings={"model": str(args.model), "images": str(args.images)},
    )


def read_karpathy(path: Path, split: str) -> list[tuple[str, tuple[str, ...]]]:
    """(file below the folder of images, captions) of each picture of a split. DataError naming the item and the key."""
    path = Path(path)
    try:
        images = json.loads(path.read_text(encoding="utf-8"))["images"]
    except FileNotFoundError:
        raise DataError(f"{path} is not there; give dataset_coco.json or dataset_flickr30k.json as --annotations") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a file of Karpathy's splits ({error!r}); download it again") from None
    rows, splits = [], set()
    for index, image in enumerate(images):
        try:
            splits.add(image["split"])
            if image["split"] != split:
                continue
            captions = tuple(sentence["raw"].strip() for sentence in image["sentences"][:CAPTIONS_PER_PICTURE])
            rows.append(("/".join(filter(None, (image.get("filepath"), image["filename"]))), captions))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: images[{index}] is not as in Karpathy's splits ({error!r}); download it again") from None
        if not captions:
            raise DataError(f"{path}: images[{index}] has no sentence; a caption is needed for every picture")
    if not rows:
        raise DataError(
            f"{path}: no picture has split '{split}'; there are {', '.join(sorted(map(str, splits))) or 'none at all'}"
        )
    return rows


def open_picture(folder: Path, name: str, captions: tuple[str, ...]) -> Picture:
    """One whole picture. DataError where it is missing or no picture."""
    width, height = picture_size(folder / name)
    frame = (0.0, 0.0, float(width), float(height))
    return Picture(name, width, height, partial(read_picture, folder / name), (frame,), (captions,))


def completeness(path: Path, split: str, found: int, used: int) -> str:
    """How the pictures evaluated stand to the published split: `published`, `own data`, or `PARTIAL: ...`."""
    expected = PUBLISHED.get(path.stem, {}).get(split)
    if expected not in (None, found):
        return f"PARTIAL: the file has {found} of {expected} pictures"
    if used < found:
        return f"PARTIAL: {used} of {found} pictures"
    return "own data" if expected is None else "published"


if __name__ == "__main__":
    run_main(main)
