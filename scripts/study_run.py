"""One run of study.py: trains an encoder, evaluates it on the scenes' evaluation sets, writes result.json."""

import argparse
import json
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch

from encoder.losses import LossConfig
from encoder.model import RegionEncoder
from encoder.pretrained import load_encoder
from encoder.pretraining import pretrain
from encoder.pretraining_config import PretrainConfig, build_configs
from eval.answering import EncoderAnswerer, answer_all, best_device
from eval.coco_files import Instances, read_instances
from eval.embedding import Embedder
from eval.predictions import PredictionLog, Target, write_whole
from eval.region_classification import as_targets, classify, usable_rows
from eval.region_features import RegionFeatures, feature_variant
from eval.retrieval import Directions, Picture, evaluate_retrieval
from eval.scoring import score_folder
from mllm.image_input import read_picture
from pretrain_encoder import open_dataset, prepare, save_final, start_process_group
from stages import commit

BATCH_SIZE = 32  # pictures
# How boxes are read: a CLIP in all its ways, of which the best one counts; a CLOC as it was trained, and the recipe's also
# without its Prompter.
CLIP_READINGS = (("roialign", -1), ("roialign", -2), ("crop", -1))
OWN_READING, WITHOUT_PROMPTER = ("prompter", -1), ("roialign", -1)


def train_and_evaluate(values: dict, scenes: Path, folder: Path, changed: dict) -> None:
    """values: of the run's fields; changed: those that make the variant. Goes on where it stopped."""
    config, loss_config = build_configs(values)
    timing = Path(config.output) / "timing.json"  # written last: the encoder is whole
    if not timing.is_file():
        write_whole(timing, json.dumps(train(config, loss_config)) + "\n")
    model = Path(config.output) / "model"
    readings = CLIP_READINGS if config.objective == "clip" else (OWN_READING,) if changed else (OWN_READING, WITHOUT_PROMPTER)
    scores = evaluate(model, readings, scenes, folder / "eval")
    result = {"changed": changed, "seed": config.seed, "steps": config.steps, "commit": commit()}
    result |= json.loads(timing.read_text()) | {"scores": scores}
    write_whole(folder / "result.json", json.dumps(result, indent=1) + "\n")


def train(config: PretrainConfig, loss_config: LossConfig) -> dict:
    """Trains to the saved model; images per second of processor time, which other work on the machine slows less than the
    clock's, of the part of the run that this process did."""
    start_process_group()
    model, processor, batches = prepare(open_dataset(config), config, loss_config)
    latest = Path(config.output) / "checkpoints" / "latest"
    first = int(latest.read_text().strip().removeprefix("step_")) if latest.is_file() else 0
    start = time.process_time()
    engine = pretrain(model, processor, batches, config, loss_config)
    seconds = time.process_time() - start
    save_final(engine, processor, config, loss_config)
    speed = (config.steps - first) * config.batch_size / seconds if config.steps > first else None
    return {"images_per_cpu_second": speed, "threads": torch.get_num_threads(), "resumed_at": first}


def evaluate(model: Path, readings: tuple, scenes: Path, out: Path) -> dict[str, dict]:
    """All scores of an encoder by their folder below `out`; what is there already is not computed again."""
    folders = []
    for feature, layer in readings:
        reading = argparse.Namespace(feature=feature, layer=layer, crop_scale=1.0)
        for split in ("seen", "unseen"):
            folders.append(out / "region_classification" / split / feature_variant(reading))
            files = {"model": model, "annotations": scenes / "regions" / f"{split}.json", "images": scenes / "images"}
            settings = {"masks": None, "geometry": None, "templates": "name", "limit": None, "max_unusable": 0}
            classify(argparse.Namespace(**vars(reading), **files, **settings, batch_size=BATCH_SIZE, device=None), folders[-1])
        folders += retrieve(model, reading, scenes, out)
    encoder = load_encoder(model)
    if isinstance(encoder, RegionEncoder) and encoder.prompter is not None:
        folders.append(point(model, scenes, out))
    return {str(folder.relative_to(out)): score_folder(folder) for folder in folders}


def retrieve(model: Path, reading: argparse.Namespace, scenes: Path, out: Path) -> list[Path]:
    """Boxes of seen names by their names and names by their boxes, each caption for itself, as the paper does on GRIT."""
    names = ("text_to_region", "region_to_text")
    instances, targets = seen_targets(scenes)
    by_image: dict[str, list[Target]] = {}
    for target in targets:
        by_image.setdefault(target.image, []).append(target)
    pictures = [
        Picture(
            image,
            of_image[0].width,
            of_image[0].height,
            partial(read_picture, scenes / "images" / image),
            tuple(target.box for target in of_image),
            tuple((target.category,) for target in of_image),
        )
        for image, of_image in by_image.items()
    ]
    embedder = Embedder(model)
    features = RegionFeatures(embedder.model, embedder.processor, reading.feature, reading.layer)
    directions = Directions(out, names, instances.path.stem, feature_variant(reading))
    settings = {"model": str(model), "images": str(scenes / "images")}
    evaluate_retrieval(pictures, "each", directions, embedder, features.embed, BATCH_SIZE, {}, settings)
    return [out / name / directions.split / directions.variant for name in names]


def point(model: Path, scenes: Path, out: Path) -> Path:
    """The BoxHead's box for each name that its picture shows once."""
    instances, targets = seen_targets(scenes)
    counts = Counter((target.image, target.category) for target in targets)
    once = [
        Target(t.id, t.image, t.width, t.height, t.category, t.box, t.category)
        for t in targets
        if counts[t.image, t.category] == 1
    ]
    answerer = EncoderAnswerer(model, best_device(), torch.float32)
    log = PredictionLog(
        out / "text_to_box" / instances.path.stem,
        protocol={"benchmark": "text_to_box", "split": instances.path.stem, "task": "grounding", **answerer.protocol},
        model=answerer.record,
        targets=once,
        settings={"model": str(model), "images": str(scenes / "images")},
    )
    answer_all(log, scenes / "images", answerer.ground, BATCH_SIZE, "name")
    return log.folder


def seen_targets(scenes: Path) -> tuple[Instances, list[Target]]:
    """Boxes of the names that the training scenes show, in scenes that no training sees."""
    instances = read_instances(scenes / "regions" / "seen.json")
    rows, _ = usable_rows(instances, 0)
    return instances, as_targets(instances, rows)
