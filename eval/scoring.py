"""Scores an evaluation folder from its targets and predictions: no model, no pictures.

`grounding`: a box was asked for; right when its IoU with the true box is at least 0.5, in pixels of the
original image. `naming`: a name was asked for; right when it is the true name, up to case and surrounding blanks. An
answer that could not be parsed is wrong, and counted. `retrieval` and `classification`: candidates were ranked; right
when a right one is among the first k, and with equal scores as often as a random order among them would have it. `phrases`: see
`eval.phrases`. `yes_no`, `choice`, `describing`: see `eval.words`. `judged`: a judge's mark over the mean of its marks for
the references.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from encoder.errors import DataError
from encoder.geometry import Geometry
from eval.judge import read_judged
from eval.metrics import (
    THRESHOLDS,
    Interval,
    SignTest,
    accuracy_at,
    accuracy_interval,
    macro_interval,
    mean_interval,
    paired_iou,
    recall_at,
    shuffled_box_accuracy,
    sign_test,
    size_bin,
    size_name,
)
from eval.phrases import RECALLS, by_type, phrase_hits, phrase_iou
from eval.predictions import Evaluation, find_evaluations, load_evaluation, read_run, write_whole
from eval.words import choice_hits, choice_report, cider, said_yes, tokens_of, yes_no_report
from mllm.box_text import CODECS, BoxCodec

# How many of the first candidates a ranking's metrics look at.
CUTOFFS = {
    "retrieval": {"recall_1": 1, "recall_5": 5, "recall_10": 10},
    "classification": {"top_1": 1, "top_5": 5},
}
# From which IoU on a box is right, of the accuracies with intervals.
IOU_LIMITS = {"acc_50": 0.5, "acc_75": 0.75}
# The accuracies that tables and comparisons show, per task, first the one that the task is judged by.
HEADLINES = {
    "grounding": tuple(IOU_LIMITS),
    "naming": ("micro", "macro"),
    **{task: tuple(metrics) for task, metrics in CUTOFFS.items()},
    "phrases": ("merged_box", "any_box"),
    "yes_no": ("yes_no",),
    "choice": ("two_choice", "ferret_rule"),
    "describing": ("cider", "same_words"),
    "judged": ("judged",),
}
TASKS = tuple(HEADLINES)
# COCO's three sizes, by the area of the true box in pixels.
AREAS, AREA_EDGES = ("small", "medium", "large"), (32**2, 96**2)


@dataclass(frozen=True)
class Scored:
    """What each of N questions scored.

    hits: (N,) 0 or 1, of a ranking between them where scores are equal; iou: (N,), grounding only
    places: (N, 3), rankings only, see `eval.predictions.Prediction`
    images, categories, kinds: (N,) names; sizes: (N,) bins of the true boxes
    chance: per metric, accuracy without looking: another question's box (grounding, phrases) or one of the candidates, one
        of the names in question (naming), a random order (rankings)
    by_metric: (N,) per metric, where the task has several that no other field gives
    """

    task: str
    ids: list[str]
    hits: np.ndarray
    iou: np.ndarray | None
    places: np.ndarray | None
    images: np.ndarray
    categories: np.ndarray
    kinds: np.ndarray
    sizes: np.ndarray
    chance: dict[str, float]
    by_metric: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those of `HEADLINES` that these answers have."""
        return tuple(self.by_metric) or HEADLINES[self.task]

    def hits_of(self, metric: str) -> np.ndarray:
        """(N,) what each question counts for a metric of `HEADLINES`."""
        if metric in self.by_metric:
            return self.by_metric[metric]
        if metric in IOU_LIMITS:
            return (self.iou >= IOU_LIMITS[metric]).astype(np.float64)
        return self.hits if self.places is None else recall_at(CUTOFFS[self.task][metric], self.places)

    def accuracy(self, metric: str, seed: int = 0) -> Interval:
        """A metric of `HEADLINES` with its interval."""
        if metric == "macro":
            return macro_interval(self.hits, self.categories, self.images, seed)
        if metric in ("cider", "judged"):  # no share of right answers
            return mean_interval(self.hits_of(metric), self.images, seed)
        return accuracy_interval(self.hits_of(metric), self.images, seed)

    def signs(self, other: "Scored", metric: str) -> SignTest:
        """The same question by a test that asks for less: on how many pictures is the one better than the other."""
        return sign_test(self.hits_of(metric) - other.hits_of(metric), self.images)

    def difference(self, other: "Scored", metric: str, seed: int = 0) -> Interval:
        """This metric here minus there, paired by question; both must have scored the same questions."""
        change = self.hits_of(metric) - other.hits_of(metric)
        if metric == "macro":
            return macro_interval(change, self.categories, self.images, seed)
        return mean_interval(change, self.images, seed)


def score_questions(evaluation: Evaluation) -> Scored:
    """What every question scored. DataError when run.json states a task that is not known, or a place is missing."""
    task = evaluation.protocol.get("task")
    if task not in TASKS:
        raise DataError(f"{evaluation.folder}/run.json: protocol.task is '{task}'; expected one of {', '.join(TASKS)}")
    targets, predictions = evaluation.targets, evaluation.predictions
    if task in ("grounding", "phrases"):
        refuse_other_codec(evaluation)
    true_boxes = np.array([target.box for target in targets], np.float64).reshape(-1, 4)
    widths, heights = (np.array([getattr(target, side) for target in targets]) for side in ("width", "height"))
    iou = places = None
    by_metric: dict[str, np.ndarray] = {}
    if task in CUTOFFS:
        unplaced = next((p.id for p in predictions if p.place is None), None)
        if unplaced is not None:
            raise DataError(
                f"{evaluation.folder}/predictions.jsonl: id {unplaced} has no place; remove the folder and evaluate again"
            )
        places = np.array([p.place for p in predictions])
        hits = recall_at(1, places)
        chance = evaluation.protocol["chance"]
    elif task == "grounding":
        nothing = (np.nan,) * 4
        iou = paired_iou(np.array([p.box or nothing for p in predictions], np.float64).reshape(-1, 4), true_boxes)
        hits = (iou >= IOU_LIMITS["acc_50"]).astype(np.float64)
        if "chance" in evaluation.protocol:  # of candidates; known at the first threshold alone
            chance = {metric: evaluation.protocol["chance"].get(metric, np.nan) for metric in IOU_LIMITS}
        else:
            limits = IOU_LIMITS.items()
            chance = {metric: shuffled_box_accuracy(true_boxes, widths, heights, limit) for metric, limit in limits}
    elif task != "naming":
        by_metric = metrics_of(evaluation)
        if task == "phrases":
            ranked = evaluation.protocol.get("codec") == "ranking"
            pairs = zip(targets, predictions, strict=True)
            iou = np.array([phrase_iou(target, prediction, ranked)["merged_box"] for target, prediction in pairs])
        hits = next(iter(by_metric.values()))
        guess = {"phrases": shuffled_box_accuracy(true_boxes, widths, heights), "yes_no": 0.5, "choice": 0.5}.get(task, 0.0)
        chance = evaluation.protocol.get("chance") or dict.fromkeys(by_metric, guess)
    else:
        pairs = zip(targets, predictions, strict=True)
        hits = np.array([plain_name(t.category) == plain_name(p.raw) for t, p in pairs], np.float64)
        guess = 1 / evaluation.protocol.get("candidates", len({target.category for target in targets}))
        chance = {metric: guess for metric in HEADLINES[task]}
    return Scored(
        task,
        [target.id for target in targets],
        hits,
        iou,
        places,
        np.array([target.image for target in targets]),
        np.array([target.category for target in targets]),
        np.array([target.kind for target in targets]),
        size_bin(true_boxes, widths, heights),
        chance,
        by_metric,
    )


def refuse_other_codec(evaluation: Evaluation) -> None:
    """DataError where an answer's box is not what its words say, in the codec and the geometry that run.json states."""
    name = evaluation.protocol.get("codec")
    if name not in CODECS:  # a BoxHead's or a ranking's boxes are no words
        return
    codec, path = BoxCodec(name), evaluation.folder / "predictions.jsonl"
    mode, size = evaluation.protocol.get("geometry"), evaluation.run["model"].get("image_size")
    for target, prediction in zip(evaluation.targets, evaluation.predictions, strict=True):
        said, box = codec.decode(prediction.raw)[0], prediction.box
        if box is not None and said is None:
            raise DataError(
                f"{path}: id {prediction.id} has a box, but its words {prediction.raw[:50]!r} "
                f"hold none in codec '{name}'; these are predictions in another codec"
            )
        if said is None or mode is None or size is None:
            continue
        expected = Geometry(mode, target.width, target.height, size).boxes_to_image(said).tolist()
        if not (expected[0] < expected[2] and expected[1] < expected[3]):
            expected = None  # in the padding
        if (box is None) != (expected is None) or box is not None and not np.allclose(box, expected, atol=0.01):
            raise DataError(
                f"{path}: id {prediction.id} has the box {box}, its words {prediction.raw[:50]!r} are {expected} in pixels of "
                "the picture; boxes are in another frame or codec, evaluate again"
            )


def metrics_of(evaluation: Evaluation) -> dict[str, np.ndarray]:
    """(N,) per metric, of the tasks that are judged by several or by a rule of their own."""
    targets, predictions = evaluation.targets, evaluation.predictions
    task = evaluation.protocol["task"]
    if task == "phrases":
        return phrase_hits(targets, predictions, evaluation.protocol.get("codec") == "ranking")
    if task == "choice":
        return choice_hits(targets, predictions)
    pairs = list(zip(targets, predictions, strict=True))
    if task == "yes_no":
        return {"yes_no": np.array([said_yes(p.raw) == (t.answers[0] == "yes") for t, p in pairs], np.float64)}
    if task == "judged":
        judged = read_judged(evaluation.folder)
        if judged is None:
            raise DataError(f"{evaluation.folder}: the answers have not been judged; run eval/ferret_bench.py with --judge")
        marks = {mark["id"]: mark["ours"] / judged["mean_marks"]["reference"] for mark in judged["marks"]}
        mean = sum(marks.values()) / len(marks)
        return {"judged": np.array([marks.get(target.id, mean) for target in targets])}  # one without a mark moves nothing
    scores = cider([p.raw for p in predictions], [list(t.answers) for t in targets])
    same = [float(any(tokens_of(p.raw) == tokens_of(text) for text in t.answers)) for t, p in pairs]
    return {"cider": scores, "same_words": np.array(same)}


def details_of(evaluation: Evaluation, scored: Scored) -> dict[str, Any]:
    """What scores.json says beside the metrics of such a task."""
    targets, predictions = evaluation.targets, evaluation.predictions
    if scored.task == "yes_no":
        return yes_no_report(targets, predictions)
    if scored.task == "choice":
        return choice_report(targets, predictions, scored.hits)
    if scored.task == "describing":
        return {}
    if scored.task == "judged":
        judged = read_judged(evaluation.folder)
        return {key: judged[key] for key in ("judge", "rule_sha256", "mean_marks", "without_marks")}
    details: dict[str, Any] = {f"{name}_by_type": by_type(hits, targets) for name, hits in scored.by_metric.items()}
    if evaluation.protocol.get("codec") == "ranking":
        for k in RECALLS[1:]:
            details |= {f"{name}_recall_{k}": float(h.mean()) for name, h in phrase_hits(targets, predictions, True, k).items()}
    return details


def plain_name(text: str) -> str:
    """A name as it is compared: lower case, no blanks around it."""
    return text.strip().lower()


def score_folder(folder: Path, seed: int = 0) -> dict[str, Any]:
    """Scores one evaluation folder and writes its scores.json; returns what it wrote."""
    evaluation = load_evaluation(folder)
    scored = score_questions(evaluation)
    scores: dict[str, Any] = {"benchmark": evaluation.name, "task": scored.task, "n": len(scored.ids)}
    scores["completeness"] = evaluation.protocol.get("completeness", "own data")
    first = scored.metrics[0]
    scores |= {"variant": evaluation.run["model"].get("variant", ""), "chance": scored.chance[first]}
    scores |= {metric: asdict(scored.accuracy(metric, seed)) for metric in scored.metrics}
    scores |= details_of(evaluation, scored) if scored.by_metric else {}
    if scored.task in ("grounding", "phrases"):
        reasons = Counter(p.reason for p in evaluation.predictions if p.box is None)
        scores["unparsed"] = sum(reasons.values())
        scores["unparsed_reasons"] = dict(reasons.most_common())
    if scored.iou is not None:
        shares = {f"acc_{100 * t:.0f}": accuracy_at(scored.iou, t) for t in THRESHOLDS[1:]}
        scores |= {name: share for name, share in shares.items() if name not in scores}
        scores["mean_iou"] = float(scored.iou.mean())
        areas = np.array([(t.box[2] - t.box[0]) * (t.box[3] - t.box[1]) for t in evaluation.targets])
        scores["by_area"] = groups(scored.hits, np.array(AREAS)[np.digitize(areas, AREA_EDGES)])
    elif scored.task == "naming":
        scores["classes_with_boxes"] = len(np.unique(scored.categories))
    elif scored.places is not None:
        scores["chances"] = scored.chance
    scores["by_size"] = groups(scored.hits, np.array([size_name(i) for i in scored.sizes]))
    if scored.kinds.any():
        scores["by_kind"] = groups(scored.hits, scored.kinds)
    # Of one picture there is no interval: null in the file, since NaN is no JSON.
    plain = json.loads(json.dumps(scores), parse_constant=lambda _: None)
    write_whole(folder / "scores.json", json.dumps(plain, indent=1) + "\n")
    return scores


def groups(hits: np.ndarray, labels: np.ndarray) -> dict[str, dict[str, float]]:
    """Accuracy and number of questions per label, `{"0-10%": {"accuracy": 0.5, "n": 8}}`, labels sorted."""
    return {
        str(label): {"accuracy": float(hits[labels == label].mean()), "n": int((labels == label).sum())}
        for label in np.unique(labels)
    }


def score_line(scores: dict[str, Any], metrics: tuple[str, ...] | None = None) -> str:
    """One line for the terminal: benchmark, accuracies in percent with their intervals, n, and what is missing.

    metrics: to show of those that there are; where it has none of them, as without, all
    """
    parts, there = [], [metric for metric in HEADLINES[scores["task"]] if metric in scores]
    for metric in [metric for metric in there if metric in (metrics or ())] or there:
        s = scores[metric]
        parts.append(f"{metric} {100 * s['value']:.1f} [{100 * s['low']:.1f}, {100 * s['high']:.1f}]")
    if scores["task"] == "grounding":
        parts.append(f"mean IoU {100 * scores['mean_iou']:.1f}")
    if "unparsed" in scores:
        parts.append(f"unparsed {scores['unparsed']}")
    if scores["task"] == "yes_no":
        parts.append("  ".join(f"{key} {100 * scores[key]:.1f}" for key in ("precision", "recall", "f1", "yes_ratio")))
    parts.append(f"chance {100 * scores['chance']:.1f}")
    name = f"{scores['benchmark']} {scores['variant']}"
    return f"{name:<38} {'  '.join(parts)}  n {scores['n']}  ({scores['completeness']})"


def score_run(run_folder: Path, metrics: tuple[str, ...] | None = None) -> None:
    """Scores every evaluation below a run folder again and prints a line for each: `--score-only`."""
    for folder in find_evaluations(run_folder):
        if read_run(folder)["protocol"].get("task") == "judged" and read_judged(folder) is None:
            print(f"{folder}: answered, not judged")
            continue
        print(score_line(score_folder(folder), metrics))
    print(f"answers and scores: {run_folder}")
