"""Grounding by ranking: of a picture's candidate boxes the one most similar to the expression, by any CLIP or CLOC.

Candidates are all annotated boxes of the picture, or a detector's. The answer is scored like any other box. With
`--rank crop` this is the plainest baseline there is: every candidate cut out and put through a stock CLIP.
"""

import argparse
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from encoder.data.sources.labelled import numbers
from encoder.errors import DataError
from eval.coco_files import read_instances
from eval.embedding import Embedder, embed_texts
from eval.metrics import THRESHOLDS, paired_iou
from eval.predictions import Box, Prediction, Target
from eval.region_features import RegionFeatures, feature_variant

WAYS = ("prompter", "roialign", "crop")
KEPT = 10  # of the ranking, for recall at 5 and 10


def add_ranking_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rank", "--baseline", dest="rank", choices=WAYS,
        help="rank candidate boxes instead of asking: by the Prompter of a CLOC, or by RoIAlign or crops of any CLIP",
    )  # fmt: skip
    parser.add_argument(
        "--proposals", type=Path, help="candidates: a COCO-style instances file, or detections [{image_id, bbox, score}]; "
        "default: the annotated boxes beside --data",
    )  # fmt: skip
    parser.add_argument("--geometry", choices=("pad", "squash"), help="with --rank, instead of the model's own")
    parser.add_argument("--layer", type=int, choices=(-1, -2), default=-1, help="with --rank roialign (default: %(default)s)")
    parser.add_argument("--crop-scale", type=float, default=1.0, help="with --rank crop, times the box (default: %(default)s)")


def refuse_without_rank(args: argparse.Namespace) -> None:
    """DataError where a flag of the ranking stands alone: without --rank the model would be asked, and the flag do nothing."""
    for flag, unset in (("proposals", None), ("geometry", None), ("layer", -1), ("crop_scale", 1.0)):
        if getattr(args, flag) != unset and not args.rank:
            name = flag.replace("_", "-")
            raise DataError(f"--{name} is for ranking candidate boxes; add --rank {'|'.join(WAYS)}, or leave it out")


class Candidates:
    """Candidate boxes, xyxy pixels, by a picture's file name or by the number in it, which is COCO's id.

    description: what they are, part of the protocol
    """

    def __init__(self, path: Path):
        self.path = path
        self.by_name: dict[str, list[Box]] = {}
        self.by_id: dict[int, list[Box]] = {}
        content = _detections(path)
        if content is None:
            instances = read_instances(path)
            rows = [row for row in instances.annotations.values() if not row.crowd]
            unusable = {row.id for row in instances.unusable(rows)}
            rows = [row for row in rows if row.id not in unusable]
            for row, box in zip(rows, instances.boxes(rows), strict=True):
                self.by_name.setdefault(instances.images[row.image_id][0], []).append(box)
            self.description = "annotated boxes"
        else:
            for number, row in enumerate(content):
                where = f"{path}, item {number}"
                if not isinstance(row, dict) or not isinstance(row.get("image_id"), int):
                    raise DataError(f"{where}: not a detection, which is {{image_id, bbox, score}}; give COCO's results format")
                left, top, width, height = numbers(row.get("bbox"), 4, f"{where}: bbox")
                if width > 0 and height > 0:
                    self.by_id.setdefault(row["image_id"], []).append((left, top, left + width, top + height))
            self.description = f"detections {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"

    def of(self, target: Target) -> list[Box]:
        """Of the target's picture. DataError where there are none."""
        number = re.search(r"(\d+)\.\w+$", target.image)
        found = self.by_name.get(target.image) or self.by_id.get(int(number[1]) if number else -1)
        if not found:
            raise DataError(f"{self.path}: no candidate box for {target.image}, id {target.id}; give proposals for every picture")
        return found


def _detections(path: Path) -> list | None:
    """A list of detections; None where the file is an object, as instances are."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path} is not there; --rank takes its candidates from it, give another file as --proposals") from None
    except ValueError as error:
        raise DataError(f"{path}: not whole JSON ({error}); write it again") from None
    return content if isinstance(content, list) else None


class RankingAnswerer:
    """Answers with the best candidate, and keeps the first ten.

    suffix: of the benchmark's name, since pointing freely is another task
    """

    suffix = "_ranking"

    def __init__(self, args: argparse.Namespace, candidates: Candidates):
        if args.dtype != "float32":
            raise DataError(f"--dtype {args.dtype} is for models that are asked; --rank computes in float32, leave it out")
        self.embedder = Embedder(args.model, args.device, args.geometry)
        model, processor = self.embedder.model, self.embedder.processor
        self.features = RegionFeatures(model, processor, args.rank, args.layer, args.crop_scale)
        self.candidates = candidates
        self.protocol = {"codec": "ranking", "candidates": candidates.description, "decoding": "ranking"}
        way = argparse.Namespace(feature=args.rank, layer=args.layer, crop_scale=args.crop_scale)
        self.record = {**self.embedder.record(), "variant": feature_variant(way)}

    def chance(self, targets: list[Target]) -> dict[str, float]:
        """Per metric, how often a candidate drawn at random is right."""
        shares: dict[str, list[float]] = {"merged_box": [], "any_box": []}
        for target in targets:
            boxes = np.array(self.candidates.of(target), np.float64)
            for name, truths in (("merged_box", [target.box]), ("any_box", target.boxes or [target.box])):
                iou = [paired_iou(boxes, np.tile(np.array(truth, np.float64), (len(boxes), 1))) for truth in truths]
                shares[name].append(float((np.max(iou, axis=0) >= THRESHOLDS[0]).mean()))
        means = {name: sum(values) / len(values) for name, values in shares.items()}
        return {**means, "acc_50": means["merged_box"]}

    def ground(self, targets: list[Target], images: list[Image.Image], batch_size: int) -> list[Prediction]:
        """One picture per target; the candidates of each picture are embedded once."""
        pictures = {id(image): (image, target) for image, target in zip(images, targets, strict=True)}
        boxes = {key: self.candidates.of(target) for key, (_, target) in pictures.items()}
        emb: dict[int, torch.Tensor] = {}
        keys = list(pictures)
        for start in range(0, len(keys), batch_size):
            part = keys[start : start + batch_size]
            emb_RE = self.features.embed([pictures[key][0] for key in part], [boxes[key] for key in part])
            emb |= dict(zip(part, emb_RE.split([len(boxes[key]) for key in part]), strict=True))
        texts_TE = embed_texts(self.embedder.model, self.embedder.processor, [target.text for target in targets])
        predictions = []
        for target, image, text_E in zip(targets, images, texts_TE, strict=True):
            similarity_C = emb[id(image)] @ text_E
            order = similarity_C.argsort(descending=True, stable=True).tolist()
            ranked = tuple(tuple(map(float, boxes[id(image)][index])) for index in order[:KEPT])
            raw = f"candidate {order[0]} of {len(order)}, similarity {similarity_C[order[0]]:.4f}"
            predictions.append(Prediction(target.id, target.image, target.text, raw, ranked[0], boxes=ranked))
        return predictions
