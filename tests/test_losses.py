"""CLOC's losses against a float64 double loop written from the equations of arXiv 2410.02746."""

import math

import pytest
import torch

from encoder.config import tiny
from encoder.errors import DataError
from encoder.export import export_clip
from encoder.from_clip import from_clip
from encoder.losses import LossConfig, bounded_scale, cloc_losses, grounding_loss
from encoder.model import ClocModel, ClocOutput

B, R, E = 4, 7, 6
IMAGE_INDEX = torch.tensor([0, 0, 0, 2, 2, 3, 3])  # image 1 has no region


def cosine(u, v):
    dot, nu, nv = 0.0, 0.0, 0.0
    for x, y in zip(u, v, strict=True):
        dot, nu, nv = dot + x * y, nu + x * x, nv + y * y
    return dot / (nu.sqrt() * nv.sqrt())


def naive_contrastive(a, b, scale, threshold=None):
    """Eqs. 1 and 2 in float64, one pair at a time; with a threshold, Section 3.4's filter on the texts `b`."""
    count, total, masked = len(a), 0.0, 0
    for i in range(count):
        keep = [
            j for j in range(count) if i == j or threshold is None or float(cosine(b[i].detach(), b[j].detach())) <= threshold
        ]
        masked += count - len(keep)
        to_text = torch.stack([scale * cosine(a[i], b[j]) for j in keep])
        to_region = torch.stack([scale * cosine(b[i], a[j]) for j in keep])
        positive = scale * cosine(a[i], b[i])
        total = total + (to_text.exp().sum().log() - positive) / 2 + (to_region.exp().sum().log() - positive) / 2
    return total / count, masked


def make_output(seed: int = 0, own: bool = False, biases: bool = False):
    """float32 features with repeated and nearly repeated region texts, as (leaf tensors, ClocOutput, boxes)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    region_text = draw(R, E)
    region_text[3] = region_text[0]  # the same phrase in another image
    region_text[2] = region_text[1] * 2 + 0.05  # a near synonym in the same image
    leaves = {
        "image_feat": draw(B, E),
        "text_feat": draw(B, E),
        "region_feat": draw(R, E),
        "region_text_feat": region_text,
        "predicted_boxes": draw(R, 4),
        "logit_scale": torch.tensor(1.3),
    }
    if own:
        leaves["region_logit_scale"] = torch.tensor(0.4)
    if biases:
        leaves |= {"logit_bias": torch.tensor(-1.5), "region_logit_bias": torch.tensor(-2.5)}
    leaves = {key: value.requires_grad_() for key, value in leaves.items()}
    output = ClocOutput(**{"region_logit_scale": leaves["logit_scale"], **leaves})
    return leaves, output, torch.rand(R, 2, 2, generator=generator).sort(dim=1).values.reshape(R, 4)


def naive_sigmoid(a, b, scale, bias, threshold=None):
    """SigLIP's loss in float64, one pair at a time; with a threshold, filtered pairs have no question to answer."""
    count, total = len(a), 0.0
    for i in range(count):
        for j in range(count):
            if i != j and threshold is not None and float(cosine(b[i].detach(), b[j].detach())) > threshold:
                continue
            logit = scale * cosine(a[i], b[j]) + bias
            total = total + (1 + (-logit if i == j else logit).exp()).log()
    return total / count


def naive_total(leaves, boxes, config: LossConfig):
    """Eq. 4 in float64 from the same leaves; gradients flow back into them."""
    x = {key: value.double() for key, value in leaves.items()}
    scale = torch.exp(x["logit_scale"]).clamp(max=config.max_logit_scale)
    region_scale = torch.exp(x.get("region_logit_scale", x["logit_scale"])).clamp(max=config.max_logit_scale)
    clip, _ = naive_contrastive(x["image_feat"], x["text_feat"], scale)
    region, masked = naive_contrastive(x["region_feat"], x["region_text_feat"], region_scale, config.similar_text_threshold)
    if config.contrastive == "sigmoid":
        clip = naive_sigmoid(x["image_feat"], x["text_feat"], scale, x["logit_bias"])
        texts, threshold = x["region_text_feat"], config.similar_text_threshold
        region = naive_sigmoid(x["region_feat"], texts, region_scale, x["region_logit_bias"], threshold)
    grounding = 0.0
    for predicted, box in zip(x["predicted_boxes"], boxes.double(), strict=True):
        squared = sum((predicted[k] - box[k]) ** 2 for k in range(4)) / 4
        by_norm = {"mse": squared, "l2": squared.sqrt() / 2, "l1_giou": naive_l1_giou(predicted, box)}
        grounding = grounding + by_norm[config.grounding_norm] / len(boxes)
    coverage = len(set(IMAGE_INDEX.tolist())) / B if config.label_coverage else 1.0
    weighted = config.region_loss_weight * region + config.grounding_loss_weight * grounding
    return clip + coverage * weighted, {"clip": clip, "region": region, "grounding": grounding, "masked": masked}


@pytest.mark.parametrize(
    "config, own",
    [
        (LossConfig(), False),
        (LossConfig(), True),
        (LossConfig(similar_text_threshold=None), False),
        (LossConfig(label_coverage=False, region_loss_weight=0.7, grounding_loss_weight=3.0), False),
        (LossConfig(grounding_norm="mse"), False),
        (LossConfig(grounding_norm="l2", similar_text_threshold=0.3), True),
        (LossConfig(block_size=2), False),
        (LossConfig(contrastive="sigmoid"), False),
        (LossConfig(contrastive="sigmoid", similar_text_threshold=None, block_size=3), True),
    ],
    ids=[
        "default",
        "own temperature",
        "no filter",
        "weights",
        "mse",
        "l2 and a strong filter",
        "blocks",
        "sigmoid",
        "sigmoid, no filter",
    ],
)
def test_equals_the_double_loop_in_value_and_gradient(config, own):
    leaves, output, boxes = make_output(own=own, biases=config.contrastive == "sigmoid")
    losses, report = cloc_losses(output, boxes, IMAGE_INDEX, config)
    total = sum(losses.values())
    reference, terms = naive_total(leaves, boxes, config)
    assert float(total) == pytest.approx(float(reference), rel=1e-5)
    for name in ("clip", "region", "grounding"):  # the report holds the unweighted terms
        assert float(report[f"{name}_loss"]) == pytest.approx(float(terms[name]), rel=1e-5)
    assert report["regions"] == R
    assert report["coverage"] == (3 / 4 if config.label_coverage else 1.0)
    assert float(report["masked_fraction"]) == pytest.approx(terms["masked"] / (R * (R - 1)))
    if config.similar_text_threshold == 0.9:
        assert terms["masked"] == 4  # the repeated pair and the near synonyms, in both directions

    got = torch.autograd.grad(total, list(leaves.values()))
    expected = torch.autograd.grad(reference, list(leaves.values()))
    for name, a, b in zip(leaves, got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def naive_l1_giou(predicted, box):
    """Mean L1 plus 1 - GIoU of one pair in float64, by lengths of intervals; corners of the prediction in any order."""
    lengths, around, sides_a, sides_b = [], [], [], []
    for axis in range(2):
        first, last = sorted((predicted[axis], predicted[axis + 2]), key=float)
        start, end = box[axis], box[axis + 2]
        overlap = min(last, end, key=float) - max(first, start, key=float)
        lengths.append(overlap if overlap > 0 else 0 * overlap)
        around.append(max(last, end, key=float) - min(first, start, key=float))
        sides_a.append(last - first), sides_b.append(end - start)
    intersection, hull = lengths[0] * lengths[1], around[0] * around[1]
    union = sides_a[0] * sides_a[1] + sides_b[0] * sides_b[1] - intersection
    giou = intersection / union - (hull - union) / hull
    return sum((predicted[k] - box[k]).abs() for k in range(4)) / 4 + 1 - giou


def test_l1_and_generalised_iou_equal_the_formula_in_value_and_gradient():
    boxes = torch.tensor([[0.2, 0.3, 0.6, 0.7]] * 5)
    predicted = torch.tensor(
        [
            [0.25, 0.2, 0.55, 0.9],  # crossing it
            [0.3, 0.4, 0.5, 0.6],  # inside
            [0.7, 0.8, 0.9, 1.1],  # beside it and out of the picture
            [0.5, 0.65, 0.1, 0.25],  # corners crossed
            [0.1, 0.1, 0.9, 0.95],  # around it
        ],
        requires_grad=True,
    )
    loss = grounding_loss(predicted, boxes, 7, "l1_giou")
    exact = predicted.detach().double().requires_grad_()
    reference = sum(naive_l1_giou(*pair) for pair in zip(exact, boxes.double(), strict=True)) / 7
    assert float(loss) == pytest.approx(float(reference), rel=1e-6)
    (got,), (expected,) = torch.autograd.grad(loss, [predicted]), torch.autograd.grad(reference, [exact])
    assert expected.abs().min() > 0  # beside the box too, where IoU has none
    torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-6)
    # The extremes: the same box, and a point in the far corner.
    assert float(grounding_loss(boxes[:1], boxes[:1], 1, "l1_giou")) == pytest.approx(0, abs=1e-6)
    far = grounding_loss(torch.zeros(1, 4), torch.tensor([[0.9, 0.9, 1.0, 1.0]]), 1, "l1_giou")
    assert float(far) == pytest.approx(0.95 + 1 + 0.99, rel=1e-5)


def test_no_gradient_goes_through_the_filter():
    """Raising the similarity of two texts across the threshold changes the loss, but no gradient asks for it."""
    leaves, output, boxes = make_output()
    losses, _ = cloc_losses(output, boxes, IMAGE_INDEX, LossConfig(similar_text_threshold=0.0001))
    (with_filter,) = torch.autograd.grad(losses["region_loss"], [leaves["region_text_feat"]])
    assert torch.isfinite(with_filter).all()
    text = leaves["region_text_feat"].detach()
    alone = torch.zeros(R, E)  # rows whose every negative is filtered contribute nothing
    cosines = torch.nn.functional.cosine_similarity(text[:, None], text[None], dim=-1)
    lonely = (cosines > 0.0001).all(1)
    torch.testing.assert_close(with_filter[lonely], alone[lonely])


def test_everything_filtered_is_zero_not_nan():
    """At random initialisation all texts can look alike: the region loss is then zero, its gradient too."""
    leaves, output, boxes = make_output()
    output.region_text_feat = torch.ones(R, E).requires_grad_()
    losses, report = cloc_losses(output, boxes, IMAGE_INDEX, LossConfig())
    assert float(losses["region_loss"]) == pytest.approx(0.0, abs=1e-7)
    assert report["masked_fraction"] == 1.0
    (grad,) = torch.autograd.grad(losses["region_loss"], [leaves["region_feat"]])
    assert torch.isfinite(grad).all() and grad.abs().max() < 1e-6


@pytest.mark.parametrize("norm", ["mse", "l2", "l1_giou"])
def test_a_batch_without_regions_is_zero_and_takes_part_in_backward(norm):
    leaves, output, _ = make_output()
    empty = {"region_feat": torch.zeros(0, E), "region_text_feat": torch.zeros(0, E), "predicted_boxes": torch.zeros(0, 4)}
    empty = {key: value.requires_grad_() for key, value in empty.items()}
    for key, value in empty.items():
        setattr(output, key, value)
    losses, report = cloc_losses(output, torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), LossConfig(grounding_norm=norm))
    assert float(losses["region_loss"]) == 0 and float(losses["grounding_loss"]) == 0
    assert report["regions"] == 0 and report["coverage"] == 0 and report["masked_fraction"] == 0
    grads = torch.autograd.grad(sum(losses.values()), [*empty.values(), leaves["image_feat"]])
    assert [len(grad) for grad in grads] == [0, 0, 0, B] and torch.isfinite(grads[-1]).all()


def test_without_region_features_only_the_clip_loss_is_there():
    _, output, _ = make_output()
    output.region_feat = None
    losses, report = cloc_losses(output, None, None, LossConfig())
    assert set(losses) == set(report) == {"clip_loss"}


@pytest.mark.parametrize("norm", ["mse", "l2"])
def test_grounding_of_a_perfect_box_is_zero_with_a_finite_gradient(norm):
    boxes = torch.rand(3, 4)
    predicted = boxes.clone().requires_grad_()
    loss = grounding_loss(predicted, boxes, 3, norm)
    loss.backward()
    assert float(loss.detach()) < 1e-6 and torch.isfinite(predicted.grad).all()


def test_scale_is_bounded_and_can_come_back():
    for start, expected in ((2.6592, 1 / 0.07), (math.log(100), 100.0), (9.0, 100.0)):
        parameter = torch.tensor(start, requires_grad=True)
        scale = bounded_scale(parameter, 100.0)
        scale.backward()
        assert float(scale.detach()) == pytest.approx(expected, rel=1e-4)
        assert float(parameter.grad) == pytest.approx(expected, rel=1e-4)


def test_contradictions_are_refused():
    with pytest.raises(DataError, match="grounding_norm is 'l1'; choose one of mse, l2, l1_giou"):
        LossConfig(grounding_norm="l1")
    with pytest.raises(DataError, match="contrastive is 'hinge'; choose softmax or sigmoid"):
        LossConfig(contrastive="hinge")
    with pytest.raises(DataError, match="block_size is 0; a block has at least one row"):
        LossConfig(block_size=0)
    for threshold in (0.0, 1.5, -1):
        with pytest.raises(DataError, match="similar_text_threshold is"):
            LossConfig(similar_text_threshold=threshold)
    for name, value in (("max_logit_scale", 0.0), ("region_loss_weight", -1.0), ("grounding_loss_weight", math.inf)):
        with pytest.raises(DataError, match=f"{name} is {value}"):
            LossConfig(**{name: value})


def test_sigmoid_needs_a_model_with_biases_and_softmax_leaves_them_alone():
    _, output, boxes = make_output()
    with pytest.raises(DataError, match="contrastive is 'sigmoid' but the model has no bias"):
        cloc_losses(output, boxes, IMAGE_INDEX, LossConfig(contrastive="sigmoid"))
    _, with_biases, _ = make_output(biases=True)
    one, two = (sum(cloc_losses(out, boxes, IMAGE_INDEX, LossConfig())[0].values()) for out in (output, with_biases))
    assert torch.equal(one, two)


def test_the_biases_are_parameters_that_are_saved_loaded_and_not_exported(tmp_path):
    kept = ClocModel(tiny(vocab_size=64, logit_bias_init_value=-10))
    assert kept.logit_bias == kept.region_logit_bias == -10 and ClocModel(tiny(vocab_size=64)).logit_bias is None
    kept.logit_bias.data.fill_(-7.0)
    kept.save_pretrained(tmp_path / "cloc")
    assert float(ClocModel.from_pretrained(tmp_path / "cloc").logit_bias) == -7
    ClocModel(tiny(vocab_size=64)).save_pretrained(tmp_path / "softmax")
    continued = ClocModel.from_pretrained(tmp_path / "softmax", logit_bias_init_value=-10.0)
    assert continued.logit_bias == continued.region_logit_bias == -10
    export_clip(kept, tmp_path / "clip")
    assert from_clip(tmp_path / "clip", logit_bias_init_value=-10.0).logit_bias == -10
    assert from_clip(tmp_path / "clip").logit_bias is None
