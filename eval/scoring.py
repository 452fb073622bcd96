"""Scores an evaluation folder from its targets and predictions: no model, no pictures.

Four tasks. `grounding`: a box was asked for; right when its IoU with the true box is at least 0.5, in pixels of the
original image. `naming`: a name was asked for; right when it is the true name, up to case and surrounding blanks. An
answer that could not be parsed is wrong, and counted. `retrieval` and `classification`: candidates were ranked; right
when a right one is among the first k, and with equal scores as often as a random order among them would have it.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from encoder.errors import DataError
from eval.metrics import (
    THRESHOLDS,
    Interval,
    accuracy_at,
    accuracy_interval,
    macro_interval,
    mean_interval,
    paired_iou,
    recall_at,
    shuffled_box_accuracy,
    size_bin,
    size_name,
)
from eval.predictions import Evaluation, find_evaluations, load_evaluation, write_whole

# How many of the first candidates a ranking's metrics look at.
CUTOFFS = {
    "retrieval": {"recall_1": 1, "recall_5": 5, "recall_10": 10},
    "classification": {"top_1": 1, "top_5": 5},
}
# The accuracies that tables and comparisons show, per task, first the one that the task is judged by.
HEADLINES = {
    "grounding": ("acc_50",),
    "naming": ("micro", "macro"),
    **{task: tuple(metrics) for task, metrics in CUTOFFS.items()},
}
TASKS = tuple(HEADLINES)


@dataclass(frozen=True)
class Scored:
    """What each of N questions scored.

    hits: (N,) 0 or 1, of a ranking between them where scores are equal; iou: (N,), grounding only
    places: (N, 3), rankings only, see `eval.predictions.Prediction`
    images, categories, kinds: (N,) names; sizes: (N,) bins of the true boxes
    chance: per metric, accuracy without looking: another question's box (grounding), one of the names in question
        (naming), a random order (rankings)
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

    def hits_of(self, metric: str) -> np.ndarray:
        """(N,) what each question counts for a metric of `HEADLINES`."""
        return self.hits if self.places is None else recall_at(CUTOFFS[self.task][metric], self.places)

    def accuracy(self, metric: str, seed: int = 0) -> Interval:
        """A metric of `HEADLINES` with its interval."""
        if metric == "macro":
            return macro_interval(self.hits, self.categories, self.images, seed)
        return accuracy_interval(self.hits_of(metric), self.images, seed)

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
    true_boxes = np.array([target.box for target in targets], np.float64).reshape(-1, 4)
    widths, heights = (np.array([getattr(target, side) for target in targets]) for side in ("width", "height"))
    iou = places = None
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
        hits = (iou >= THRESHOLDS[0]).astype(np.float64)
        chance = {"acc_50": shuffled_box_accuracy(true_boxes, widths, heights)}
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
    )


def plain_name(text: str) -> str:
    """A name as it is compared: lower case, no blanks around it."""
    return text.strip().lower()


def score_folder(folder: Path, seed: int = 0) -> dict[str, Any]:
    """Scores one evaluation folder and writes its scores.json; returns what it wrote."""
    evaluation = load_evaluation(folder)
    scored = score_questions(evaluation)
    scores: dict[str, Any] = {"benchmark": evaluation.name, "task": scored.task, "n": len(scored.ids)}
    scores["completeness"] = evaluation.protocol.get("completeness", "own data")
    first = HEADLINES[scored.task][0]
    scores |= {"variant": evaluation.run["model"].get("variant", ""), "chance": scored.chance[first]}
    scores |= {metric: asdict(scored.accuracy(metric, seed)) for metric in HEADLINES[scored.task]}
    if scored.iou is not None:
        scores |= {f"acc_{100 * t:.0f}": accuracy_at(scored.iou, t) for t in THRESHOLDS[1:]}
        scores["mean_iou"] = float(scored.iou.mean())
        reasons = Counter(p.reason for p in evaluation.predictions if p.box is None)
        scores["unparsed"] = sum(reasons.values())
        scores["unparsed_reasons"] = dict(reasons.most_common())
    elif scored.places is None:
        scores["classes_with_boxes"] = len(np.unique(scored.categories))
    else:
        scores["chances"] = scored.chance
    scores["by_size"] = groups(scored.hits, np.array([size_name(i) for i in scored.sizes]))
    if scored.kinds.any():
        scores["by_kind"] = groups(scored.hits, scored.kinds)
    write_whole(folder / "scores.json", json.dumps(scores, indent=1) + "\n")
    return scores


def groups(hits: np.ndarray, labels: np.ndarray) -> dict[str, dict[str, float]]:
    """Accuracy and number of questions per label, `{"0-10%": {"accuracy": 0.5, "n": 8}}`, labels sorted."""
    return {
        str(label): {"accuracy": float(hits[labels == label].mean()), "n": int((labels == label).sum())}
        for label in np.unique(labels)
    }


def score_line(scores: dict[str, Any]) -> str:
    """One line for the terminal: benchmark, accuracies in percent with their intervals, n, and what is missing."""
    parts = []
    for metric in HEADLINES[scores["task"]]:
        s = scores[metric]
        parts.append(f"{metric} {100 * s['value']:.1f} [{100 * s['low']:.1f}, {100 * s['high']:.1f}]")
    if scores["task"] == "grounding":
        parts.append(f"acc_75 {100 * scores['acc_75']:.1f}  mean IoU {100 * scores['mean_iou']:.1f}")
        parts.append(f"unparsed {scores['unparsed']}")
    parts.append(f"chance {100 * scores['chance']:.1f}")
    name = f"{scores['benchmark']} {scores['variant']}"
    return f"{name:<38} {'  '.join(parts)}  n {scores['n']}  ({scores['completeness']})"


def score_run(run_folder: Path) -> None:
    """Scores every evaluation below a run folder again and prints a line for each: `--score-only`."""
    for folder in find_evaluations(run_folder):
        print(score_line(score_folder(folder)))
    print(f"answers and scores: {run_folder}")
