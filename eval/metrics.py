"""Accuracies and their intervals, in numpy and float64. Nothing here reads files or runs a model.

An interval is the 95% percentile bootstrap that redraws **images**, not questions: the questions on one picture share
its difficulty, and an interval that forgets it is too narrow. The difference of two models is the same function on the
difference of their scores per question, which is what makes the comparison paired.

N questions, K classes, C images (clusters), S bootstrap samples, Q queries of a retrieval.
"""

from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist

import numpy as np

THRESHOLDS = (0.5, 0.75, 0.9)
# Lower edges of the bins by side: the square root of (area of the box / area of its image).
SIZE_EDGES = (0.0, 0.1, 0.2, 0.3, 0.5)
SAMPLES = 10_000
_BLOCK = 4_000_000  # numbers drawn at once


@dataclass(frozen=True)
class Interval:
    """A score with the 95% interval around it, both as fractions; `n` questions."""

    value: float
    low: float
    high: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def paired_iou(boxes_a: np.ndarray, boxes_b: np.ndarray) -> np.ndarray:
    """Intersection over union, (N, 4) x (N, 4) xyxy -> (N,). NaN boxes (unparsed answers) and empty ones give 0."""
    a, b = np.asarray(boxes_a, np.float64), np.asarray(boxes_b, np.float64)
    size = np.clip(np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]), 0, None)
    intersection = size[:, 0] * size[:, 1]
    union = _area(a) + _area(b) - intersection
    iou = np.zeros(len(a))
    return np.divide(intersection, union, out=iou, where=union > 0)


def _area(boxes: np.ndarray) -> np.ndarray:
    size = np.clip(boxes[:, 2:] - boxes[:, :2], 0, None)
    return size[:, 0] * size[:, 1]


def accuracy_at(iou_N: np.ndarray, threshold: float) -> float:
    """Share of `iou_N` (N,) at or above `threshold`: inclusive, as Ferret, InternVL and lmms-eval count."""
    return float(np.mean(np.asarray(iou_N) >= threshold))


def size_bin(boxes: np.ndarray, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """Index into `SIZE_EDGES` (N,) of boxes (N, 4) xyxy in images of `widths` x `heights` (N,), all in pixels."""
    side = np.sqrt(_area(np.asarray(boxes, np.float64)) / (np.asarray(widths) * np.asarray(heights)))
    return np.digitize(side, SIZE_EDGES) - 1


def size_name(index: int) -> str:
    """A bin in words: `10-20%` of the image's side."""
    edges = [*SIZE_EDGES, 1.0]
    return f"{100 * edges[index]:.0f}-{100 * edges[index + 1]:.0f}%"


def shuffled_box_accuracy(
    boxes: np.ndarray, widths: np.ndarray, heights: np.ndarray, threshold: float = 0.5, seed: int = 0, rounds: int = 50
) -> float:
    """What accuracy at an IoU is without looking: each question answered with the true box of another one, drawn at random.

    boxes: (N, 4) xyxy pixels, scaled to the picture of the question they answer; widths, heights: (N,) pixels
    """
    frames = np.stack([widths, heights, widths, heights], axis=1).astype(np.float64)
    rng = np.random.default_rng(seed)
    shift = rng.integers(1, max(2, len(boxes)), rounds)
    order = rng.permutation(len(boxes))
    boxes, frames = np.asarray(boxes, np.float64)[order], frames[order]
    guesses = (np.roll(boxes / frames, s, axis=0) * frames for s in shift)
    return float(np.mean([accuracy_at(paired_iou(guess, boxes), threshold) for guess in guesses]))


def macro_mean(values_N: np.ndarray, classes_N: np.ndarray) -> float:
    """Mean over classes of the mean within each class; (N,) values, (N,) class labels of any kind."""
    _, index = np.unique(classes_N, return_inverse=True)
    return float(np.mean(np.bincount(index, np.asarray(values_N, np.float64)) / np.bincount(index)))


def recall_at(k: int, places_Q3: np.ndarray) -> np.ndarray:
    """Probability (Q,) that a right candidate is among the first k, where candidates of equal score come in random order:
    so a model that finds everything alike scores chance.

    places_Q3: per query, how many wrong candidates score higher than the best right one, how many wrong ones score the
    same, and how many right ones do (see `eval.ranking`)
    With s of the first k left for w wrong and r right ones of equal score, all s are wrong in C(w, s) / C(w + r, s) cases.
    """
    higher, wrong, right = np.asarray(places_Q3, np.float64).reshape(-1, 3).T
    missed = np.ones(len(higher))
    for taken in range(k):
        left = np.maximum(wrong + right - taken, 1)
        missed *= np.where(higher + taken < k, np.maximum(wrong - taken, 0) / left, 1.0)
    return 1 - missed


def chance_at(k: int, num_candidates: int, num_right_Q: np.ndarray) -> float:
    """Recall at k of a random order, for queries with `num_right_Q` right ones among the candidates."""
    right = np.asarray(num_right_Q)
    return float(recall_at(k, np.stack([0 * right, num_candidates - right, right], axis=1)).mean())


def wilson_interval(hits: int, n: int) -> tuple[float, float]:
    """95% score interval (Wilson 1927) of `hits` out of `n` independent trials, as fractions."""
    z2 = NormalDist().inv_cdf(0.975) ** 2
    centre = (hits + z2 / 2) / (n + z2)
    half = np.sqrt(z2 * (hits * (n - hits) / n + z2 / 4)) / (n + z2)
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))


@dataclass(frozen=True)
class SignTest:
    """On how many pictures the first is better and worse, and the two-sided probability of so uneven a split by chance."""

    better: int
    worse: int
    p: float


def sign_test(difference_N: np.ndarray, images_N: np.ndarray) -> SignTest:
    """Of the sum of `difference_N` (N,) per picture that `images_N` (N,) names; pictures without a difference are left out."""
    _, cluster = np.unique(images_N, return_inverse=True)
    total = np.bincount(cluster, np.asarray(difference_N, np.float64)).round(9)
    better, worse = int((total > 0).sum()), int((total < 0).sum())
    n, tail = better + worse, min(better, worse)
    term = cases = 1  # whole numbers: exact for any n
    for k in range(1, tail + 1):
        term = term * (n - k + 1) // k
        cases += term
    return SignTest(better, worse, min(1.0, float(Fraction(2 * cases, 2**n))))


def mean_interval(values_N: np.ndarray, images_N: np.ndarray, seed: int = 0, samples: int = SAMPLES) -> Interval:
    """Mean of `values_N` (N,) with its interval, redrawing the images that `images_N` (N,) names.

    Values may be hits, or the difference of two models' hits. NaN limits where there is one image only.
    """
    values = np.asarray(values_N, np.float64)
    _, cluster = np.unique(images_N, return_inverse=True)
    total, count = np.bincount(cluster, values), np.bincount(cluster).astype(np.float64)
    if len(total) < 2:
        return Interval(float(values.mean()), float("nan"), float("nan"), len(values))
    means = np.concatenate([w @ total / (w @ count) for w in _redraws(len(total), seed, samples)])
    return _interval(float(values.mean()), means, len(values))


def macro_interval(
    values_N: np.ndarray, classes_N: np.ndarray, images_N: np.ndarray, seed: int = 0, samples: int = 2000
) -> Interval:
    """`macro_mean` with its interval. A class that a sample of images lacks is left out of that sample's mean."""
    values = np.asarray(values_N, np.float64)
    names, index = np.unique(classes_N, return_inverse=True)
    images, cluster = np.unique(images_N, return_inverse=True)
    value = macro_mean(values, classes_N)
    if len(images) < 2:
        return Interval(value, float("nan"), float("nan"), len(values))
    total_CK = np.zeros((len(images), len(names)))
    count_CK = np.zeros_like(total_CK)
    np.add.at(total_CK, (cluster, index), values)
    np.add.at(count_CK, (cluster, index), 1)
    means = []
    for weights in _redraws(len(images), seed, samples):
        count = weights @ count_CK
        per_class = np.divide(weights @ total_CK, count, out=np.zeros_like(count), where=count > 0)
        means.append(per_class.sum(1) / (count > 0).sum(1))
    return _interval(value, np.concatenate(means), len(values))


def accuracy_interval(hits_N: np.ndarray, images_N: np.ndarray, seed: int = 0) -> Interval:
    """Accuracy of 0/1 `hits_N` (N,) with its interval. Where all answers agree, redrawing them shows no spread, so
    Wilson's interval over the number of images stands in."""
    interval = mean_interval(hits_N, images_N, seed)
    if interval.low == interval.high or np.isnan(interval.low):
        num_images = len(np.unique(images_N))
        low, high = wilson_interval(round(interval.value * num_images), num_images)
        return Interval(interval.value, low, high, interval.n)
    return interval


def _redraws(num_clusters: int, seed: int, samples: int):
    """Yields (s, C) counts: how often each of the C images was drawn, with replacement, in each bootstrap sample."""
    rng = np.random.default_rng(seed)
    block = max(1, min(samples, _BLOCK // num_clusters))
    for start in range(0, samples, block):
        size = min(block, samples - start)
        drawn = rng.integers(0, num_clusters, (size, num_clusters)) + num_clusters * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * num_clusters).reshape(size, num_clusters).astype(np.float64)


def _interval(value: float, samples: np.ndarray, n: int) -> Interval:
    low, high = np.percentile(samples, [2.5, 97.5])
    return Interval(value, float(low), float(high), n)
