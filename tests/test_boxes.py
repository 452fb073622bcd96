"""Box arithmetic against counting unit cells, and against plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.boxes import box_area, box_iou, clip_boxes, paired_iou, valid_boxes, xywh_to_xyxy, xyxy_to_xywh

integer_box = st.tuples(*[st.integers(0, 12)] * 4).map(
    lambda v: [min(v[0], v[2]), min(v[1], v[3]), max(v[0], v[2]), max(v[1], v[3])]
)


def cells(box) -> set:
    return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}


@settings(max_examples=60, deadline=None)
@given(st.lists(integer_box, min_size=1, max_size=5), st.lists(integer_box, min_size=1, max_size=5))
def test_iou_and_area_are_counts_of_cells(boxes_a, boxes_b):
    a, b = torch.tensor(boxes_a).double(), torch.tensor(boxes_b).double()
    assert box_area(a).tolist() == [len(cells(box)) for box in boxes_a]
    got = box_iou(a, b)
    assert got.shape == (len(boxes_a), len(boxes_b))
    for i, box_a in enumerate(boxes_a):
        for j, box_b in enumerate(boxes_b):
            union = len(cells(box_a) | cells(box_b))
            expected = len(cells(box_a) & cells(box_b)) / union if union else 0.0
            assert float(got[i, j]) == pytest.approx(expected)
            assert float(paired_iou(a[i], b[j])) == pytest.approx(expected)


def test_swapped_corners_have_no_area():
    boxes = torch.tensor([[5.0, 5.0, 2.0, 9.0], [5.0, 5.0, 2.0, 1.0], [1.0, 1.0, 1.0, 4.0]])
    assert box_area(boxes).tolist() == [0, 0, 0]
    assert paired_iou(boxes, boxes).tolist() == [0, 0, 0]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=4))
def test_xywh_round_trip(box):
    box = torch.tensor([box], dtype=torch.float64)
    torch.testing.assert_close(xywh_to_xyxy(xyxy_to_xywh(box)), box)
    torch.testing.assert_close(xyxy_to_xywh(box)[:, 2:], box[:, 2:] - box[:, :2])


def test_clip_moves_corners_into_the_frame():
    boxes = torch.tensor([[-3.0, 2.0, 50.0, 61.0], [10.0, 10.0, 20.0, 20.0]])
    assert clip_boxes(boxes, 40, 60).tolist() == [[0, 2, 40, 60], [10, 10, 20, 20]]


def test_valid_boxes_names_each_defect():
    boxes = {
        "good": ([0, 0, 40, 60], True),
        "a pixel over the edge": ([-1, 0, 41, 61], True),
        "further over the edge": ([0, 0, 41.5, 60], False),
        "left of the image": ([-2, 0, 10, 10], False),
        "no width": ([5, 5, 5, 9], False),
        "swapped": ([9, 5, 5, 9], False),
        "not a number": ([0, 0, float("nan"), 9], False),
        "infinite": ([0, 0, float("inf"), 9], False),
    }
    got = valid_boxes(torch.tensor([box for box, _ in boxes.values()]).float(), 40, 60)
    assert dict(zip(boxes, got.tolist(), strict=True)) == {name: good for name, (_, good) in boxes.items()}
    assert valid_boxes(torch.zeros(0, 4), 40, 60).shape == (0,)
