"""How good are the labels? Precision and recall of phrases and boxes on scenes, whose objects and names are known exactly.

    python benchmarks/label_quality.py weights/cloc --out label_quality.json

Scenes of the base pictures are drawn under a name that no training uses, each with its caption. `Phrases` reads the caption,
the detector looks for what it found, and every box is compared with the objects. n is what a share is taken of: phrases,
names, boxes, objects. Intervals are 95% bootstraps over scenes.

A phrase is right if, without its article, it is the name of an object of the scene, its plural, or a phrase that is true of
it. A box is right if its IoU with an object that no better box has taken is 0.5 or more; box and phrase are right if, for
boxes and objects that agree in that, the phrase is true of the object.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from encoder.boxes import box_iou
from encoder.data.pictures import load_library
from encoder.data.scenes import PictureLibrary, Scene, SceneConfig, draw_scene, plural
from encoder.errors import DataError, run_main
from encoder.pretrained import WHOLE
from encoder.vesl.cloc_detector import PROPOSALS, ClocDetector
from encoder.vesl.detections import Detection
from encoder.vesl.detector import Detector
from encoder.vesl.phrases import Phrases
from eval.metrics import Interval, mean_interval

MIN_IOU = 0.5
SPLIT = "labelling"  # scenes follow from seed and split: these are nobody's training scenes
ARTICLES = ("a ", "an ", "the ")
BATCH = 50
LISTING, NGRAMS = "listing, spaCy's tags", "n-grams"
RULES = {
    LISTING: Phrases(deduplicate=True),
    "spaCy's noun chunks": Phrases(rule="spacy", deduplicate=True),
    NGRAMS: Phrases(rule="ngrams", deduplicate=True),
}


def bare(phrase: str) -> str:
    """Without its article."""
    return next((phrase[len(article) :] for article in ARTICLES if phrase.startswith(article)), phrase)


def is_true_of(phrase: str, true_phrases: tuple[str, ...]) -> bool:
    """Whether a phrase, or what it is the plural of, is one of an object's."""
    return any(bare(phrase) in (known, plural(known)) for known in true_phrases)


def score_phrases(scenes: list[Scene], phrases: list[list[str]]) -> dict[str, Interval]:
    """Precision over phrases, recall over the distinct names of a scene."""
    right, found = [], []
    for index, (scene, of_scene) in enumerate(zip(scenes, phrases, strict=True)):
        known = tuple({phrase for item in scene.objects for phrase in item.phrases})
        right += [(index, is_true_of(phrase, known)) for phrase in of_scene]
        found += [
            (index, any(is_true_of(phrase, (name,)) for phrase in of_scene)) for name in {item.name for item in scene.objects}
        ]
    return {"phrase precision": share(right), "phrase recall": share(found)}


def match(detections: list[Detection], scene: Scene, names_count: bool) -> tuple[list[bool], list[bool]]:
    """Which boxes (best first) are right, and which objects were found; each object once.

    names_count: a box may only take an object of which its phrase is true
    """
    taken = [False] * len(scene.objects)
    right = [False] * len(detections)
    boxes = torch.tensor([detection.box for detection in detections]).reshape(-1, 4)
    overlaps = box_iou(boxes, torch.tensor([item.box for item in scene.objects]).float()).tolist()
    for index, detection in enumerate(detections):
        candidates = [
            (overlap, place)
            for place, overlap in enumerate(overlaps[index])
            if overlap >= MIN_IOU
            and not taken[place]
            and (not names_count or is_true_of(detection.phrase, scene.objects[place].phrases))
        ]
        if candidates:
            taken[max(candidates)[1]] = right[index] = True
    return right, taken


def score_boxes(scenes: list[Scene], found: list[list[Detection]], min_score: float) -> dict[str, Interval]:
    """Precision over boxes above `min_score` and recall over objects, by box alone and by box and phrase."""
    kept = [[detection for detection in of_scene if detection.score > min_score] for of_scene in found]
    scores = {}
    for title, names_count in (("box", False), ("box and phrase", True)):
        matched = [match(detections, scene, names_count) for detections, scene in zip(kept, scenes, strict=True)]
        scores[f"{title} precision"] = share([(i, hit) for i, (right, _) in enumerate(matched) for hit in right])
        scores[f"{title} recall"] = share([(i, hit) for i, (_, taken) in enumerate(matched) for hit in taken])
    return scores


def share(hits: list[tuple[int, bool]]) -> Interval:
    """The share of hits, each with the index of its scene."""
    if not hits:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    images, values = zip(*hits, strict=True)
    return mean_interval(np.array(values, float), np.array(images), samples=2000)


def load_detector(path: Path, nms_iou: float, proposals: str) -> ClocDetector | Detector:
    """A CLOC, or any detector of transformers at the field it has; every box, since thresholds come afterwards."""
    kind = json.loads((path / "config.json").read_text()) if (path / "config.json").is_file() else {}
    if kind.get("model_type") in WHOLE:
        return ClocDetector.from_pretrained(path, -1, nms_iou, proposals)
    size = kind.get("vision_config", {}).get("image_size", 448)
    return Detector.from_pretrained(path, image_size=size, min_score=0, nms_iou=nms_iou)


def shown(scores: dict[str, Interval]) -> str:
    """One cell a score, as Markdown."""
    return " | ".join(f"{100 * s.value:.1f} [{100 * s.low:.1f}, {100 * s.high:.1f}] (n {s.n:,})" for s in scores.values())


def table(rows: dict[str, dict[str, Interval]], first: str) -> None:
    """A Markdown table, a row for each entry."""
    print(f"\n| {first} | " + " | ".join(next(iter(rows.values()))) + " |\n|" + "---|" * (1 + len(next(iter(rows.values())))))
    for title, scores in rows.items():
        print(f"| {title} | {shown(scores)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("detector", type=Path, help="folder of a CLOC, or of a detector of transformers")
    parser.add_argument("--scenes", type=int, default=500, help="scenes to label (default %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the scenes; decides which names are the base's (default %(default)s)"
    )
    parser.add_argument("--unseen", action="store_true", help="scenes of the names that no base was trained with")
    parser.add_argument(
        "--min-score", type=float, nargs="+", default=[0.1, 0.3, 0.5, 0.7], help="thresholds to report (default %(default)s)"
    )
    parser.add_argument("--nms-iou", type=float, default=0.5, help="most overlap of two boxes (default %(default)s)")
    parser.add_argument("--proposals", choices=PROPOSALS, default="text", help="a CLOC's boxes (default %(default)s)")
    parser.add_argument("--ngrams", action="store_true", help="find the boxes of the n-grams too, many times as many phrases")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    if arguments.scenes < 2:
        raise DataError(f"--scenes is {arguments.scenes}; give at least 2")
    detector = load_detector(arguments.detector, arguments.nms_iou, arguments.proposals)
    library = PictureLibrary(load_library("base", arguments.seed)[arguments.unseen])
    draw = range(arguments.scenes)
    scenes = [draw_scene(SceneConfig(), library, arguments.seed, i, SPLIT) for i in tqdm(draw, desc="scenes", unit="scene")]

    phrases = {name: [rule.extract(scene.caption) for scene in scenes] for name, rule in RULES.items()}
    of_phrases = {name: score_phrases(scenes, found) for name, found in phrases.items()}
    table(of_phrases, "phrases of the caption")
    wanted = {name: phrases[name] for name in (LISTING, *([NGRAMS] if arguments.ngrams else []))}
    wanted["exact names"] = [list(dict.fromkeys(item.name for item in scene.objects)) for scene in scenes]
    of_boxes: dict[str, dict[str, Interval]] = {}
    for name, of_scenes in wanted.items():
        found: list[list[Detection]] = []
        for start in tqdm(range(0, len(scenes), BATCH), desc=name, unit="batch"):
            part = slice(start, start + BATCH)
            found += detector.detect([scene.image for scene in scenes[part]], of_scenes[part])
        rows = {f"{name}, score > {least:g}": score_boxes(scenes, found, least) for least in arguments.min_score}
        # What it is worth to look: the boxes of another scene.
        rows[f"{name}, boxes of the next scene"] = score_boxes(scenes, found[1:] + found[:1], min(arguments.min_score))
        table(rows, "boxes")
        of_boxes |= rows
    if arguments.out:
        figures = {title: {name: vars(score) for name, score in row.items()} for title, row in {**of_phrases, **of_boxes}.items()}
        settings = {
            "scenes": arguments.scenes,
            "seed": arguments.seed,
            "unseen": arguments.unseen,
            "detector": detector.describe(),
        }
        arguments.out.write_text(json.dumps({"settings": settings, "figures": figures}, indent=1) + "\n")
        print(f"the figures are in {arguments.out}")


if __name__ == "__main__":
    run_main(main)
