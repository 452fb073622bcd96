"""Names given boxes with an encoder alone: the most similar class name, as CLOC's Table 3 (arXiv 2410.02746) does.

    python eval/region_classification.py --model runs/cloc --annotations scenes/regions/unseen.json \
        --images scenes/images --out runs/eval_cloc
    python eval/region_classification.py --model runs/clip --feature roialign --layer -2 ... --out runs/eval_clip
    python eval/region_classification.py --model runs/cloc --annotations lvis_v1_val.json --images coco ...

Boxes are the true ones; crowds are left out and counted. Macro (the mean over classes, mAcc) and micro are both given.
COCO, LVIS, Objects365 and ADE20K are read as docs/evaluation.md says.
"""

import argparse
from collections import Counter
from itertools import groupby
from pathlib import Path

from tqdm import tqdm

from encoder.data.sources.published import PUBLISHED, completeness
from encoder.errors import DataError, run_main
from eval.coco_files import Annotation, Instances, check_images, read_instances
from eval.embedding import WHOLE_PICTURE, Embedder, add_run_flags, name_classifier, read_ahead, run_evaluation
from eval.predictions import Prediction, PredictionLog, Target
from eval.prompt_templates import templates_named
from eval.region_features import RegionFeatures, add_feature_flags, feature_variant
from eval.region_masks import Masks
from mllm.image_input import read_picture


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=Path, help="COCO-style instances or panoptic file with the true boxes")
    parser.add_argument("--images", type=Path, help="folder that the file names in --annotations are relative to")
    parser.add_argument("--masks", type=Path, help="folder of the PNGs of a panoptic file, for --feature maskpool")
    add_feature_flags(parser)
    parser.add_argument("--templates", default="name", help="'name', 'openai80', or a sentence such as \"a photo of a {}\"")
    parser.add_argument(
        "--max-unusable", type=int, default=0, help="boxes without area or outside their image to leave out, counted (default 0)"
    )
    add_run_flags(parser, "the first boxes", batch_size=32, geometries=WHOLE_PICTURE)
    return parser.parse_args()


def main() -> None:
    run_evaluation(parse_arguments(), ("annotations", "images"), evaluate)


def evaluate(args: argparse.Namespace) -> list[Path]:
    """The folder of the answers."""
    folder = args.out / "region_classification" / args.annotations.stem / feature_variant(args)
    classify(args, folder)
    return [folder]


def classify(args: argparse.Namespace, folder: Path) -> None:
    """Answers every box that has no answer in `folder` yet."""
    if args.masks is not None and args.feature != "maskpool":
        raise DataError(f"--masks is for --feature maskpool, {args.feature} does not read it; leave it out")
    templates = templates_named(args.templates)
    instances = read_instances(args.annotations)
    rows, left_out = usable_rows(instances, args.max_unusable)
    whole = len(rows)
    rows = rows[: args.limit]
    masks = Masks(instances, rows, args.masks) if args.feature == "maskpool" else None
    targets = as_targets(instances, rows)
    check_images({target.image: (target.width, target.height) for target in targets}, args.images)

    embedder = Embedder(args.model, args.device, args.geometry)
    features = RegionFeatures(embedder.model, embedder.processor, args.feature, args.layer, args.crop_scale)
    names = list(instances.categories.values())
    log = PredictionLog(
        folder,
        protocol={
            "benchmark": "region_classification",
            "split": args.annotations.stem,
            "task": "naming",
            "candidates": len(names),
            "templates": args.templates,
            **left_out,
            "completeness": published(instances) if len(targets) == whole else f"PARTIAL: {len(targets)} of {whole}",
        },
        model={
            **embedder.record(),
            "variant": feature_variant(args),
            **({"outlines_empty": masks.empty} if masks else {}),
        },
        targets=targets,
        settings={"model": str(args.model), "images": str(args.images), "batch_size": args.batch_size},
    )
    log.report_resumed()
    remaining = log.remaining()
    if not remaining:
        return
    classifier_KE = name_classifier(embedder.model, embedder.processor, [spoken(name) for name in names], templates)
    with tqdm(total=len(targets), initial=len(targets) - len(remaining), unit="box", desc=folder.parent.name) as bar:
        batches = image_batches(remaining, args.batch_size)
        for batch, images in read_ahead(batches, lambda group: read_picture(args.images / group[0].image)):
            answered = [target for group in batch for target in group]
            outlines = [masks.of(target.id) for target in answered] if masks else ()
            emb_RE = features.embed(images, [[target.box for target in group] for group in batch], outlines)
            best_R = (emb_RE @ classifier_KE.T).argmax(dim=1).tolist()
            log.append(
                [
                    Prediction(target.id, target.image, args.templates, names[best])
                    for target, best in zip(answered, best_R, strict=True)
                ]
            )
            bar.update(len(answered))


def usable_rows(instances: Instances, max_unusable: int) -> tuple[list[Annotation], dict[str, int]]:
    """The annotations to classify, image by image, and how many were left out and why."""
    names = list(instances.categories.values())
    if len(set(names)) < len(names):
        raise DataError(f"{instances.path}: a category name occurs twice; names are what is predicted, merge them")
    kept = [row for row in instances.annotations.values() if not row.crowd]
    bad = instances.unusable(kept)
    if len(bad) > max_unusable:
        raise DataError(f"{instances.fault(bad[0])}, or leave out all {len(bad)} such with --max-unusable {len(bad)}")
    left_out = {"crowds_left_out": len(instances.annotations) - len(kept)}
    if bad:
        left_out["unusable_left_out"] = len(bad)
        unusable = {row.id for row in bad}
        kept = [row for row in kept if row.id not in unusable]
    if not kept:
        raise DataError(f"{instances.path}: holds no box outside crowds; there is nothing to classify")
    return sorted(kept, key=lambda row: row.image_id), left_out


def as_targets(instances: Instances, rows: list[Annotation]) -> list[Target]:
    """One per annotation, id = its id; kind: the sort of its category, where the file tells any."""
    return [
        Target(
            str(row.id),
            *instances.images[row.image_id],
            "",
            box,
            instances.categories[row.category_id],
            instances.sorts[row.category_id],
        )
        for row, box in zip(rows, instances.boxes(rows), strict=True)
    ]


def spoken(name: str) -> str:
    """A category's name as it is put to the text tower: `alarm_clock` (LVIS) with a blank, of `door, door leaf` (ADE20K)
    the first."""
    return name.partition(",")[0].replace("_", " ").strip()


def published(instances: Instances) -> str:
    """Whether a file called like a published one has its counts; `own data` for any other name."""
    counts = Counter(images=len(instances.images), annotations=len(instances.annotations))
    for dataset in ("coco", "lvis", "objects365"):
        part = f"{dataset}/{instances.path.stem}"
        if part in PUBLISHED:
            return completeness(part, counts, 0)
    return "own data"


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
