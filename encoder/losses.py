"""CLOC's three losses as pure functions of features: CLIP, region-text, grounding (arXiv 2410.02746, Eqs. 1-4).

Every loss returns this rank's share: the shares of all ranks sum to the loss of the global batch. A trainer whose engine
averages gradients over ranks multiplies by the number of ranks.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from encoder.boxes import paired_giou
from encoder.contrastive import contrastive_loss
from encoder.distributed import gather_counts
from encoder.errors import DataError
from encoder.model import ClocOutput
from encoder.precision import upcast

GROUNDING_NORMS = ("mse", "l2", "l1_giou")


@dataclass
class LossConfig:
    """What the total loss is made of.

    contrastive: `softmax`, InfoNCE (the paper's), or `sigmoid`, every pair a question of its own (SigLIP); the latter needs
        a model with `logit_bias_init_value`
    region_loss_weight, grounding_loss_weight: of the two region losses, before the label-coverage factor (Table A: 1.0)
    label_coverage: multiply both by the fraction of the batch's images that have regions (the paper's lambda)
    similar_text_threshold: cosine above which another region's text is no negative (Section 3.4); None filters nothing
    grounding_norm: `l1_giou`, the mean absolute difference of the coordinates plus 1 - generalised IoU, which taught far more
        (docs/results.md); or the paper's: `mse`, the mean over the four coordinates, or `l2`, a quarter of the Euclidean norm
        (Eq. 3 reads both ways)
    max_logit_scale: the temperature's bound, as a scale (CLIP's 100)
    block_size: rows and columns of the blocks in which the matrix of logits is computed; changes memory and speed alone
    """

    contrastive: str = "softmax"
    region_loss_weight: float = 1.0
    grounding_loss_weight: float = 1.0
    label_coverage: bool = True
    similar_text_threshold: float | None = 0.9
    grounding_norm: str = "l1_giou"
    max_logit_scale: float = 100.0
    block_size: int = 2048

    def __post_init__(self):
        if self.contrastive not in ("softmax", "sigmoid"):
            raise DataError(f"LossConfig.contrastive is '{self.contrastive}'; choose softmax or sigmoid")
        if self.block_size < 1:
            raise DataError(f"LossConfig.block_size is {self.block_size}; a block has at least one row")
        if self.grounding_norm not in GROUNDING_NORMS:
            raise DataError(f"LossConfig.grounding_norm is '{self.grounding_norm}'; choose one of {', '.join(GROUNDING_NORMS)}")
        for name in ("region_loss_weight", "grounding_loss_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise DataError(f"LossConfig.{name} is {getattr(self, name)}; give 0 or more")
        if not 0 < self.max_logit_scale < math.inf:
            raise DataError(f"LossConfig.max_logit_scale is {self.max_logit_scale}; a scale above 0 is needed, CLIP's is 100")
        if self.similar_text_threshold is not None and not 0 < self.similar_text_threshold <= 1:
            raise DataError(f"LossConfig.similar_text_threshold is {self.similar_text_threshold}; a cosine in (0, 1] is needed")


def bounded_scale(logit_scale: Tensor, max_scale: float) -> Tensor:
    """exp(logit_scale) held at `max_scale` at most; the gradient goes through, so that a scale at the bound can come back."""
    excess = (logit_scale - math.log(max_scale)).clamp(min=0).detach()
    return (upcast(logit_scale) - excess).exp()


def grounding_loss(predicted_boxes: Tensor, boxes: Tensor, total: int, norm: str) -> Tensor:
    """This rank's share of Eq. 3 over `total` regions of all ranks: predicted and true (R, 4) xyxy in [0, 1]."""
    predicted_boxes, boxes = upcast(predicted_boxes), upcast(boxes)
    if norm == "l1_giou":
        corners_R22 = predicted_boxes.unflatten(-1, (2, 2))  # the head is linear and may cross them
        ordered_R4 = torch.cat([corners_R22.amin(-2), corners_R22.amax(-2)], dim=-1)
        distance = (predicted_boxes - boxes).abs().mean(-1) + 1 - paired_giou(ordered_R4, boxes)
        return distance.sum() / max(total, 1)
    squared = (predicted_boxes - boxes).square().sum(-1)
    distance = squared if norm == "mse" else (squared + 1e-12).sqrt()
    return distance.sum() / (4 * max(total, 1))


def cloc_losses(output: ClocOutput, boxes: Tensor | None, image_index: Tensor | None, config: LossConfig):
    """(losses, report) of a batch; the sum of `losses` is this rank's share of Eq. 4.

    output: of `ClocModel.forward`; without region features only the CLIP loss is there
    boxes: (R, 4) xyxy in [0, 1]; image_index: (R,) image of each region within this rank's batch; on the CPU nothing waits
        for the device
    report: unweighted terms, masked fraction, regions, lambda; for logs, shares like the losses where they are losses,
        of all ranks where they are not
    """
    biases = output.logit_bias, output.region_logit_bias
    if config.contrastive == "softmax":
        biases = None, None
    elif None in biases:
        raise DataError("LossConfig.contrastive is 'sigmoid' but the model has no bias; scripts/pretrain_encoder.py adds one")
    scale = bounded_scale(output.logit_scale, config.max_logit_scale)
    clip_share, clip_report = contrastive_loss(
        output.image_feat, output.text_feat, scale, logit_bias=biases[0], block_size=config.block_size
    )
    losses, report = {"clip_loss": clip_share}, {"clip_loss": clip_share.detach()}
    if output.region_feat is None:
        return losses, report

    region_scale = bounded_scale(output.region_logit_scale, config.max_logit_scale)
    region_share, region_report = contrastive_loss(
        output.region_feat,
        output.region_text_feat,
        region_scale,
        config.similar_text_threshold,
        biases[1],
        config.block_size,
    )
    total = region_report["count"]
    labelled = sum(gather_counts(len(torch.unique(image_index)), boxes.device))
    coverage = labelled / clip_report["count"] if config.label_coverage else 1.0
    losses["region_loss"] = coverage * config.region_loss_weight * region_share
    report["region_loss"] = region_share.detach()
    if output.predicted_boxes is not None:
        grounding_share = grounding_loss(output.predicted_boxes, boxes, total, config.grounding_norm)
        losses["grounding_loss"] = coverage * config.grounding_loss_weight * grounding_share
        report["grounding_loss"] = grounding_share.detach()
    elif config.grounding_loss_weight:
        raise DataError(
            f"LossConfig.grounding_loss_weight is {config.grounding_loss_weight:g} but the model has region_encoder 'roi_align', "
            "which predicts no box from a text; set it to 0"
        )
    report |= {"masked_fraction": region_report["masked_fraction"], "regions": total, "coverage": coverage}
    return losses, report
