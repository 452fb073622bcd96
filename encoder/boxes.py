"""The box convention: xyxy corners, continuous coordinates, last dimension 4.

On disk a box is in pixels of the original image; in the model it is in [0, 1] of the model's square input, and only
`encoder.geometry.Geometry` goes from one to the other. Nothing here knows a frame. (R regions, N and M two sets of boxes.)
"""

import torch
from torch import Tensor


def xywh_to_xyxy(boxes_xywh: Tensor) -> Tensor:
    """(..., 4) left, top, width, height (COCO's order) -> (..., 4) corners, same unit."""
    left_top, size = boxes_xywh[..., :2], boxes_xywh[..., 2:]
    return torch.cat([left_top, left_top + size], dim=-1)


def xyxy_to_xywh(boxes: Tensor) -> Tensor:
    """(..., 4) corners -> (..., 4) left, top, width, height, same unit."""
    return torch.cat([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], dim=-1)


def box_area(boxes: Tensor) -> Tensor:
    """(..., 4) -> (...) area in squared units; a box whose corners are swapped has area 0."""
    size = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0)
    return size[..., 0] * size[..., 1]


def paired_iou(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """Intersection over union of boxes at the same index, (..., 4) x (..., 4) -> (...), broadcasting. Empty with empty is 0."""
    left_top = torch.maximum(boxes_a[..., :2], boxes_b[..., :2])
    right_bottom = torch.minimum(boxes_a[..., 2:], boxes_b[..., 2:])
    intersection = box_area(torch.cat([left_top, right_bottom], dim=-1))
    union = box_area(boxes_a) + box_area(boxes_b) - intersection
    return torch.where(union > 0, intersection / union.clamp(min=torch.finfo(union.dtype).tiny), torch.zeros_like(union))


def box_iou(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """Intersection over union of every pair, (N, 4) x (M, 4) -> (N, M)."""
    return paired_iou(boxes_a[:, None], boxes_b[None])


def paired_giou(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """Generalised IoU of boxes at the same index, (..., 4) x (..., 4) -> (...) in [-1, 1]: IoU less the share of the smallest
    box around both that neither covers (arXiv 1902.09630, Eq. 3)."""
    left_top = torch.maximum(boxes_a[..., :2], boxes_b[..., :2])
    right_bottom = torch.minimum(boxes_a[..., 2:], boxes_b[..., 2:])
    intersection = box_area(torch.cat([left_top, right_bottom], dim=-1))
    union = box_area(boxes_a) + box_area(boxes_b) - intersection
    corners = torch.minimum(boxes_a[..., :2], boxes_b[..., :2]), torch.maximum(boxes_a[..., 2:], boxes_b[..., 2:])
    around = box_area(torch.cat(corners, dim=-1))
    tiny = torch.finfo(union.dtype).eps
    return intersection / union.clamp(min=tiny) - (around - union) / around.clamp(min=tiny)


def clip_boxes(boxes: Tensor, width: float, height: float) -> Tensor:
    """(..., 4) -> (..., 4) with every corner moved into [0, width] x [0, height]."""
    limit = boxes.new_tensor([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), limit)


def valid_boxes(boxes: Tensor, width: float, height: float, tolerance: float = 1.0) -> Tensor:
    """(R, 4) -> (R,) bool: finite, positive area, inside the frame up to `tolerance` units (annotators round outwards)."""
    limit = boxes.new_tensor([width, height, width, height]) + tolerance
    inside = (boxes >= -tolerance).all(-1) & (boxes <= limit).all(-1)
    return torch.isfinite(boxes).all(-1) & (box_area(boxes) > 0) & inside
