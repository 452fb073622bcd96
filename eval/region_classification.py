"""Names given boxes with an encoder alone: the most similar class name, as CLOC's Table 3 (arXiv 2410.02746) does.

    python eval/region_classification.py --model runs/cloc --annotations scenes/regions/unseen.json \
        --images scenes/images --out runs/eval_cloc
    python eval/region_classification.py --model runs/clip --feature roialign --layer -2 ... --out runs/eval_clip

Boxes are the true ones; crowds are left out and counted. Macro (the mean over classes, mAcc) and micro are both given.
"""

import argparse
from itertools import groupby
from pathlib import Path

from tqdm import tqdm

from encoder.errors import DataError, run_main
from encoder.pretrained import load_encoder, load_processor, weights_hash
from eval.answering import best_device
from eval.coco_files import check_images, read_instances
from eval.predictions import Prediction, PredictionLog, Target
from eval.region_features import FEATURES, RegionFeatures, name_classifier, templates_named
from eval.scoring import score_folder, score_line, score_run
from mllm.image_input import read_picture


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a CLOC or of any transformers CLIP")
    parser.add_argument("--annotations", type=Path, help="COCO-style instances file with the true boxes")
    parser.add_argument("--images", type=Path, help="folder that the file names in --annotations are relative to")
    parser.add_argument(
        "--feature", choices=FEATURES, default="prompter", help="how a box becomes a feature (default: %(default)s)"
    )
    parser.add_argument(
        "--layer", type=int, choices=(-1, -2), default=-1, help="roialign reads the last block or the one before it"
    )
    parser.add_argument(
        "--crop-scale", type=float, default=1.0, help="crop this many times the box (1.5 adds context); default 1.0"
    )
    parser.add_argument("--templates", default="name", help="'name', 'openai80', or a sentence such as \"a photo of a {}\"")
    parser.add_argument("--geometry", choices=("pad", "squash"), help="instead of the model's own, for a stock CLIP")
    parser.add_argument("--limit", type=int, help="only the first boxes; the result is marked PARTIAL")
    parser.add_argument("--batch-size", type=int, default=32, help="images per batch (default: %(default)s)")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--out", type=Path, required=True, help="run folder; several benchmarks may share one")
    parser.add_argument("--score-only", action="store_true", help="score all answers in --out again, without a model")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.score_only:
        return score_run(args.out)
    if args.model is None or args.annotations is None or args.images is None:
        raise DataError("--model, --annotations and --images are needed, unless --score-only is given")
    folder = args.out / "region_classification" / args.annotations.stem / variant_name(args)
    classify(args, folder)
    print(score_line(score_folder(folder)))
    print(f"answers and scores: {folder}")


def variant_name(args: argparse.Namespace) -> str:
    """Folder of this way of reading a box: `prompter`, `roialign-2`, `crop1.5`."""
    suffix = {"prompter": "", "roialign": str(args.layer), "crop": "" if args.crop_scale == 1 else f"{args.crop_scale:g}"}
    return args.feature + suffix[args.feature]


def classify(args: argparse.Namespace, folder: Path) -> None:
    """Answers every box that has no answer in `folder` yet."""
    templates = templates_named(args.templates)
    targets, names, crowds = read_boxes(args.annotations)
    whole = len(targets)
    targets = targets[: args.limit]
    check_images({target.image: (target.width, target.height) for target in targets}, args.images)

    model, processor = load_encoder(args.model), load_processor(args.model)
    model.to(args.device or best_device())
    if args.geometry:
        processor.image_processor.geometry = args.geometry
    features = RegionFeatures(model, processor, args.feature, args.layer, args.crop_scale)
    log = PredictionLog(
        folder,
        protocol={
            "benchmark": "region_classification",
            "split": args.annotations.stem,
            "task": "naming",
            "candidates": len(names),
            "templates": args.templates,
            "crowds_left_out": crowds,
            "completeness": "own data" if len(targets) == whole else f"PARTIAL: {len(targets)} of {whole}",
        },
        model={
            "kind": model.config.model_type,
            "variant": variant_name(args),
            "weights_sha256": weights_hash(model),
            "geometry": processor.image_processor.geometry,
            "image_size": processor.image_processor.size,
        },
        targets=targets,
        settings={"model": str(args.model), "images": str(args.images), "batch_size": args.batch_size},
    )
    log.report_resumed()
    classifier_KE = name_classifier(model, processor, names, templates)
    remaining = log.remaining()
    with tqdm(total=len(targets), initial=len(targets) - len(remaining), unit="box", desc=folder.parent.name) as bar:
        for batch in image_batches(remaining, args.batch_size):
            images = [read_picture(args.images / group[0].image) for group in batch]
            emb_RE = features.embed(images, [[target.box for target in group] for group in batch])
            best_R = (emb_RE @ classifier_KE.float().T).argmax(dim=1).tolist()
            answered = [target for group in batch for target in group]
            log.append(
                [
                    Prediction(target.id, target.image, args.templates, names[best])
                    for target, best in zip(answered, best_R, strict=True)
                ]
            )
            bar.update(len(answered))


def read_boxes(annotations: Path) -> tuple[list[Target], list[str], int]:
    """Targets (id = annotation id, image by image), the candidate names in file order, and the number of crowds left out."""
    instances = read_instances(annotations)
    names = list(instances.categories.values())
    if len(set(names)) < len(names):
        raise DataError(f"{annotations}: a category name occurs twice; names are what is predicted, merge them")
    kept = [row for row in instances.annotations.values() if not row.crowd]
    kept.sort(key=lambda row: row.image_id)
    targets = [
        Target(str(row.id), *instances.images[row.image_id], "", box, instances.categories[row.category_id])
        for row, box in zip(kept, instances.boxes(kept), strict=True)
    ]
    if not targets:
        raise DataError(f"{annotations}: holds no box outside crowds; there is nothing to classify")
    return targets, names, len(instances.annotations) - len(kept)


def image_batches(targets: list[Target], batch_size: int):
    """Yields lists of up to `batch_size` groups, each the targets of one image; `targets` is ordered by image."""
    batch = []
    for _, group in groupby(targets, key=lambda target: target.image):
        batch.append(list(group))
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


if __name__ == "__main__":
    run_main(main)
