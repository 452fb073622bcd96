"""Metrics against independent references: pycocotools' IoU, naive float64 loops, textbook values."""

import itertools
import math
import random

import numpy as np
import pytest

from eval import metrics
from eval.metrics import Interval


def test_paired_iou_equals_pycocotools_and_is_zero_for_unparsed():
    """1,000 pairs: apart, touching, inside one another, equal, of a pixel and less, on whole and on broken coordinates."""
    mask = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 100, (2000, 2, 2))
    corners[::3] = corners[::3].round()
    boxes = np.concatenate([corners.min(1), corners.max(1)], 1)
    a, b = boxes[:1000], boxes[1000:].copy()
    b[:50] = a[:50]
    b[50:100] = a[50:100] + np.array([10, 10, -10, -10]) * rng.uniform(-0.5, 0.5, (50, 1))
    b[100:150, 0], b[100:150, 2] = a[100:150, 2], a[100:150, 2] + 5  # share an edge
    b[150:200] = a[150:200, [0, 1, 0, 1]] + [0, 0, 0.3, 0.7]
    keep = (b[:, 2:] > b[:, :2]).all(1) & (a[:, 2:] > a[:, :2]).all(1)
    a, b = a[keep], b[keep]
    assert len(a) > 900
    a_xywh, b_xywh = (np.concatenate([x[:, :2], x[:, 2:] - x[:, :2]], 1) for x in (a, b))
    reference = [mask.iou(a_xywh[i : i + 1], b_xywh[i : i + 1], [0])[0, 0] for i in range(len(a))]
    np.testing.assert_allclose(metrics.paired_iou(a, b), reference, atol=1e-10)

    odd = np.array([[np.nan] * 4, [5, 5, 5, 9], [9, 9, 1, 1], [0, 0, 10, 5]])
    truth = np.tile([0.0, 0.0, 10.0, 10.0], (4, 1))
    np.testing.assert_array_equal(metrics.paired_iou(odd, truth), [0, 0, 0, 0.5])


def test_accuracy_counts_the_threshold_itself():
    iou = np.array([0.5, 0.4999, 0.75, 0.0])
    assert metrics.accuracy_at(iou, 0.5) == 0.5
    assert metrics.accuracy_at(iou, 0.75) == 0.25


def test_size_bins_cover_every_side():
    sides = np.array([0.05, 0.1, 0.15, 0.25, 0.4, 0.5, 1.0])
    width, height = np.full(7, 200.0), np.full(7, 100.0)
    half = sides[:, None] * np.array([200.0, 100.0])
    boxes = np.concatenate([np.zeros((7, 2)), half], 1)
    assert metrics.size_bin(boxes, width, height).tolist() == [0, 1, 1, 2, 3, 4, 4]
    assert [metrics.size_name(i) for i in range(5)] == ["0-10%", "10-20%", "20-30%", "30-50%", "50-100%"]


@pytest.mark.parametrize("threshold", [0.5, 0.75])
def test_shuffled_boxes_score_as_all_pairs_do_on_average(threshold):
    rng = np.random.default_rng(2)
    width, height = rng.integers(40, 90, (2, 40)).astype(float)
    left = rng.uniform(0, 0.5, (40, 2)) * np.stack([width, height], 1)
    boxes = np.concatenate([left, left + 0.5 * np.stack([width, height], 1)], 1)
    frame = np.stack([width, height, width, height], 1)
    pairs = [(i, j) for i in range(40) for j in range(40) if i != j]
    hits = [metrics.paired_iou((boxes[j] / frame[j] * frame[i])[None], boxes[i][None])[0] >= threshold for i, j in pairs]
    chance = metrics.shuffled_box_accuracy(boxes, width, height, threshold, rounds=300)
    assert 0 < np.mean(hits) < 1 and chance == pytest.approx(np.mean(hits), abs=0.02)
    assert metrics.shuffled_box_accuracy(boxes[:1], width[:1], height[:1], threshold) in (0.0, 1.0)


def test_macro_mean_is_the_mean_of_class_means():
    values = [1, 0, 0, 0, 1]
    classes = ["cat", "cat", "cat", "cat", "dog"]
    assert metrics.macro_mean(values, classes) == pytest.approx((0.25 + 1.0) / 2)


def test_wilson_interval_has_the_textbook_values():
    assert metrics.wilson_interval(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert metrics.wilson_interval(7, 20) == pytest.approx((0.18119, 0.56715), abs=1e-5)
    low, high = metrics.wilson_interval(10, 10)
    assert (low, high) == pytest.approx((1 - 0.27753, 1.0), abs=1e-5)


def _naive_bootstrap(values, images, statistic, samples=4000):
    """Redraws images one by one and recomputes the statistic over the questions they bring."""
    generator = random.Random(5)
    members = {}
    for i, image in enumerate(images):
        members.setdefault(image, []).append(i)
    names = list(members)
    results = []
    for _ in range(samples):
        drawn = [i for _ in names for i in members[generator.choice(names)]]
        results.append(statistic([values[i] for i in drawn], drawn))
    results.sort()
    return results[int(0.025 * samples)], results[int(0.975 * samples) - 1]


@pytest.fixture(scope="module")
def questions():
    rng = np.random.default_rng(1)
    images = np.repeat(np.arange(40), rng.integers(1, 6, 40))
    difference = rng.choice([-1.0, 0.0, 1.0], len(images), p=[0.1, 0.6, 0.3]) + (images % 3 == 0) * 0.5
    classes = rng.integers(0, 4, len(images))
    return difference, images, classes


def test_paired_interval_equals_a_naive_bootstrap_over_images(questions):
    difference, images, _ = questions
    interval = metrics.mean_interval(difference, images, seed=3)
    low, high = _naive_bootstrap(difference, images.tolist(), lambda drawn, _: sum(drawn) / len(drawn))
    assert interval.value == pytest.approx(sum(difference) / len(difference), abs=1e-12)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.015)
    assert interval == metrics.mean_interval(difference, images, seed=3), "the same seed gives the same interval"
    assert interval != metrics.mean_interval(difference, images, seed=4)


def test_macro_interval_equals_a_naive_bootstrap_over_images(questions):
    difference, images, classes = questions

    def statistic(values, drawn):
        per_class = {}
        for value, i in zip(values, drawn, strict=True):
            per_class.setdefault(classes[i], []).append(value)
        return sum(sum(v) / len(v) for v in per_class.values()) / len(per_class)

    interval = metrics.macro_interval(difference, classes, images, samples=4000)
    low, high = _naive_bootstrap(difference, images.tolist(), statistic)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.02)
    assert interval.value == pytest.approx(statistic(difference, range(len(images))), abs=1e-12)


def test_blocks_do_not_change_the_draws(questions, monkeypatch):
    difference, images, _ = questions
    whole = metrics.mean_interval(difference, images)
    monkeypatch.setattr(metrics, "_BLOCK", 1000)
    assert metrics.mean_interval(difference, images) == whole


def test_redrawing_questions_instead_of_images_would_be_too_sure():
    images = np.repeat(np.arange(30), 10)
    hits = (images % 2).astype(float)  # every question of an image has the same fate
    clustered = metrics.mean_interval(hits, images)
    naive = metrics.mean_interval(hits, np.arange(300))
    assert clustered.high - clustered.low > 2.5 * (naive.high - naive.low)


def test_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        interval = metrics.mean_interval(rng.random(120) < 0.3, np.arange(120), seed=trial, samples=500)
        covered += interval.low <= 0.3 <= interval.high
    assert 180 <= covered <= 199


def test_accuracy_without_spread_still_has_an_interval():
    interval = metrics.accuracy_interval(np.ones(20), np.repeat(np.arange(10), 2))
    assert (interval.low, interval.high) == pytest.approx((1 - 0.27753, 1.0), abs=1e-5)
    assert interval.value == 1.0
    assert np.isnan(metrics.mean_interval([1, 0], [7, 7]).low)
    assert Interval(0.1, 0.01, 0.2, 5).excludes_zero and not Interval(0.1, -0.01, 0.2, 5).excludes_zero


def test_recall_equals_a_loop_over_every_order():
    """600 drawn rankings with equal scores: all orders of the candidates are gone through, one by one."""
    rng = np.random.default_rng(3)
    places, expected = [], {k: [] for k in (1, 2, 3, 5)}
    for _ in range(600):
        scores = rng.integers(0, 4, rng.integers(2, 6)).tolist()  # few values: many are equal
        right = set(rng.choice(len(scores), rng.integers(1, len(scores) + 1), replace=False).tolist())
        top = max(scores[i] for i in right)
        wrong = [score for i, score in enumerate(scores) if i not in right]
        places.append((sum(s > top for s in wrong), wrong.count(top), sum(scores[i] == top for i in right)))
        orders = [p for p in itertools.permutations(range(len(scores))) if [scores[i] for i in p] == sorted(scores, reverse=True)]
        for k, values in expected.items():
            values.append(sum(any(i in right for i in order[:k]) for order in orders) / len(orders))
    for k, values in expected.items():
        np.testing.assert_allclose(metrics.recall_at(k, np.array(places)), values, atol=1e-12)


def test_sign_test_has_the_values_of_the_binomial_distribution():
    """Exact tails by summing over all outcomes; 9 : 1 is the textbook's 0.0215."""
    for better, worse in ((9, 1), (5, 5), (0, 0), (0, 7), (30, 12)):
        difference = np.array([1.0] * better + [-1.0] * worse + [0.0] * 3 + [1.0, -1.0])
        images = [*range(better + worse + 3), "both", "both"]
        found = metrics.sign_test(difference, np.array(images, dtype=str))
        n = better + worse
        tail = sum(math.comb(n, k) for k in range(min(better, worse) + 1)) / 2**n
        assert (found.better, found.worse) == (better, worse) and found.p == pytest.approx(min(1.0, 2 * tail))
    assert metrics.sign_test(np.array([1.0] * 9 + [-1.0]), np.arange(10)).p == pytest.approx(0.0215, abs=5e-5)
    assert metrics.sign_test(np.tile([1.0, 1.0, -1.0], 3000), np.arange(9000)).p < 1e-100, (
        "exact, and quick, for a whole benchmark"
    )
