"""Classifies whole pictures by the most similar class name, without training on the classes: ImageNet and its like.

    python eval/zero_shot.py --model runs/cloc --images imagenet/val --names imagenet_class_index.json --out runs/eval_cloc

A folder of pictures per class. Each class's text is the unit mean over 80 templates of unit embeddings (OpenAI's way).
The result is top-1 and top-5 accuracy over pictures.
"""

import argparse
import random
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from encoder.data.reader import IMAGE_ERRORS
from encoder.errors import DataError, run_main
from eval.class_folders import ClassFolders, read_class_folders
from eval.embedding import Embedder, add_run_flags, name_classifier, read_ahead, run_evaluation
from eval.metrics import chance_at
from eval.predictions import Prediction, PredictionLog, Target
from eval.prompt_templates import templates_named
from eval.ranking import rank
from eval.scoring import CUTOFFS
from mllm.image_input import read_picture


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder that holds a folder of pictures per class")
    parser.add_argument("--names", type=Path, help="names of the classes; default: the folders' own names")
    parser.add_argument("--split", help="what to call this set; default: the name of --images")
    parser.add_argument(
        "--templates", default="openai80", help="'openai80' (default), 'name', or a sentence such as \"a photo of a {}\""
    )
    add_run_flags(parser, "this many pictures, drawn at random")
    return parser.parse_args()


def main() -> None:
    run_evaluation(parse_arguments(), ("images",), evaluate)


def evaluate(args: argparse.Namespace) -> list[Path]:
    """The folder of the answers."""
    folder = args.out / "zero_shot" / (args.split or args.images.resolve().name)
    classify(args, folder)
    return [folder]


def classify(args: argparse.Namespace, folder: Path) -> None:
    """Answers every picture that has no answer in `folder` yet."""
    templates = templates_named(args.templates)
    classes = read_class_folders(args.images, args.names)
    targets, whole = as_targets(classes, args.limit), len(classes.images)
    embedder = Embedder(args.model, args.device, args.geometry)
    num_classes = len(classes.names)
    chance = {metric: chance_at(k, num_classes, [1]) for metric, k in CUTOFFS["classification"].items()}
    log = PredictionLog(
        folder,
        protocol={
            "benchmark": "zero_shot",
            "split": folder.name,
            "task": "classification",
            "candidates": num_classes,
            "chance": chance,
            "templates": args.templates,
            "completeness": "own data" if len(targets) == whole else f"PARTIAL: {len(targets)} of {whole}",
        },
        model=embedder.record(),
        targets=targets,
        settings={"model": str(args.model), "images": str(args.images), "batch_size": args.batch_size},
    )
    log.report_resumed()
    remaining = log.remaining()
    if not remaining:
        return
    # Classes of one name are one candidate with copies, so that they score exactly the same.
    unique = list(dict.fromkeys(classes.names))
    classifier_KE = name_classifier(embedder.model, embedder.processor, unique, templates)
    batches = (remaining[start : start + args.batch_size] for start in range(0, len(remaining), args.batch_size))
    with tqdm(total=len(targets), initial=len(targets) - len(remaining), unit="picture", desc=folder.name) as bar:
        for batch, images in read_ahead(batches, lambda target: read_picture(args.images / target.image)):
            log.append(answers(batch, embedder.embed_images(images), classifier_KE, unique, classes, args.templates))
            bar.update(len(batch))


def as_targets(classes: ClassFolders, limit: int | None) -> list[Target]:
    """One per picture, id = its path; category: its folder, since two classes may have one name. Looks at every header."""
    images = classes.images
    if limit is not None and limit < len(images):
        images = sorted(random.Random(0).sample(images, limit))
    targets = []
    for path, index in tqdm(images, unit="picture", desc="headers", disable=len(images) < 2000):
        width, height = picture_size(classes.root / path)
        frame = (0.0, 0.0, float(width), float(height))
        targets.append(Target(path, path, width, height, "", frame, classes.folders[index]))
    return targets


def answers(
    targets: list[Target], image_emb_BE: Tensor, classifier_KE: Tensor, unique: list[str], classes: ClassFolders, prompt: str
) -> list[Prediction]:
    """A prediction per picture: the best name, and the place of the true class among all.

    unique: the distinct names, of which classifier_KE has the embeddings
    """
    name_of = dict(zip(classes.folders, classes.names, strict=True))
    right = torch.tensor([(row, unique.index(name_of[target.category])) for row, target in enumerate(targets)])
    copies = torch.tensor([classes.names.count(name) for name in unique])
    places, best = rank(image_emb_BE, classifier_KE, right, copies)
    return [
        Prediction(target.id, target.image, prompt, unique[index], place=tuple(place))
        for target, index, place in zip(targets, best.tolist(), places.tolist(), strict=True)
    ]


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, from the header. DataError for what is no picture."""
    try:
        with Image.open(path) as image:
            return image.size
    except IMAGE_ERRORS as error:
        raise DataError(f"{path} cannot be read as an image ({error}); download it again, or remove it") from None


if __name__ == "__main__":
    run_main(main)
