"""RoIAlign against a naive loop, and a model whose regions are read by it in place of the Prompter."""

import numpy as np
import pytest
import torch
from transformers import AutoModel

from encoder.config import tiny
from encoder.errors import DataError
from encoder.losses import LossConfig, cloc_losses
from encoder.model import ClocModel
from encoder.roi_align import roi_align

IMAGE_INDEX = torch.tensor([0, 0, 2, 2, 2])


def test_roi_align_of_a_coordinate_ramp_is_the_box_centre():
    grid = 8
    centres = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    ramp = torch.stack([torch.stack([x, y]), torch.stack([x, y]) + 10])
    boxes = torch.tensor([[0.2, 0.3, 0.5, 0.9], [0.1, 0.1, 0.12, 0.9], [0.4, 0.2, 0.6, 0.3]], dtype=torch.float64)
    pooled = roi_align(ramp, boxes, torch.tensor([0, 1, 0]), num_samples=4)
    expected = torch.stack([(boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2], 1)
    expected[1] += 10
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-12)


def _naive_roi_align(feature_CGG, box, num_samples):
    """Loops in float64 over the definition: bilinear reads between pixel centres, held constant beyond the border."""
    channels, grid, _ = feature_CGG.shape
    total = np.zeros(channels)
    for i in range(num_samples):
        for j in range(num_samples):
            x = (box[0] + (j + 0.5) / num_samples * (box[2] - box[0])) * grid - 0.5
            y = (box[1] + (i + 0.5) / num_samples * (box[3] - box[1])) * grid - 0.5
            x, y = min(max(x, 0), grid - 1), min(max(y, 0), grid - 1)
            left, top = int(x), int(y)
            right, bottom = min(left + 1, grid - 1), min(top + 1, grid - 1)
            u, v = x - left, y - top
            total += (1 - v) * ((1 - u) * feature_CGG[:, top, left] + u * feature_CGG[:, top, right])
            total += v * ((1 - u) * feature_CGG[:, bottom, left] + u * feature_CGG[:, bottom, right])
    return total / num_samples**2


def test_roi_align_equals_a_naive_loop_also_at_the_border():
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(2, 3, 5, 5))
    corners = rng.uniform(0, 1, (12, 2, 2))
    boxes = np.concatenate([corners.min(1), corners.max(1)], 1)
    boxes[:2] = [[0, 0, 1, 1], [0, 0, 0.05, 0.05]]
    index = rng.integers(0, 2, 12)
    ours = roi_align(torch.tensor(maps), torch.tensor(boxes), torch.tensor(index), 3)
    reference = [_naive_roi_align(maps[i], box, 3) for i, box in zip(index, boxes, strict=True)]
    np.testing.assert_allclose(ours, reference, atol=1e-12)


def make() -> tuple[ClocModel, dict[str, torch.Tensor]]:
    """A model of 4 x 4 patches and a batch of three images, one without regions."""
    torch.manual_seed(0)
    model = ClocModel(tiny(vocab_size=64, region_encoder="roi_align"))
    ids = torch.randint(2, 60, (3, 6))
    ids[:, -1] = 1
    batch = {
        "pixel_values": torch.randn(3, 3, 32, 32),
        "input_ids": ids,
        "boxes": torch.rand(5, 2, 2).sort(dim=1).values.reshape(5, 4),
        "image_index": IMAGE_INDEX,
        "region_input_ids": ids[:2],
        "region_text_index": torch.tensor([0, 1, 1, 0, 1]),
    }
    return model, batch


def test_a_region_is_its_patches_pooled_and_projected_and_every_parameter_learns():
    model, batch = make()
    output = model(**batch)
    patches = model.encode_image(batch["pixel_values"]).tokens[:, 1:].detach().numpy().astype(np.float64)
    weight = model.roi_pooler.projection.weight.detach().numpy().astype(np.float64)
    for region, (box, image) in enumerate(zip(batch["boxes"].tolist(), IMAGE_INDEX, strict=True)):
        maps_CGG = patches[image].reshape(4, 4, 32).transpose(2, 0, 1)
        expected = weight @ _naive_roi_align(maps_CGG, box, 4)
        np.testing.assert_allclose(output.region_feat[region].detach(), expected, rtol=1e-4, atol=1e-5)
    assert float(model.roi_pooler.projection.weight.std()) == pytest.approx(32**-0.5, rel=0.15)
    losses, report = cloc_losses(output, batch["boxes"], IMAGE_INDEX, LossConfig(grounding_loss_weight=0.0))
    assert losses.keys() == {"clip_loss", "region_loss"} and "grounding_loss" not in report
    sum(losses.values()).backward()
    still = {name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    assert all(name.endswith("k_proj.bias") for name in still)  # no gradient in stock CLIP either


@torch.no_grad()
def test_half_precision_places_the_points_as_float32_does():
    model, batch = make()
    exact = model(**batch).region_feat
    rough = model.to(torch.bfloat16)(**{**batch, "pixel_values": batch["pixel_values"].bfloat16()}).region_feat
    assert torch.nn.functional.cosine_similarity(exact, rough.float(), dim=-1).min() > 0.999


def test_there_is_no_text_prompt_and_what_needs_one_says_so():
    model, batch = make()
    assert model.prompter is None and model.box_head is None and model(**batch).predicted_boxes is None
    tokens = torch.zeros(3, 17, 32)
    with pytest.raises(DataError, match="'roi_align', which takes no text prompt and gives no box"):
        model.embed_texts(tokens, torch.zeros(5, 16), IMAGE_INDEX)
    with pytest.raises(DataError, match="grounding_loss_weight is 1 but .* predicts no box from a text; set it to 0"):
        cloc_losses(model(**batch), batch["boxes"], IMAGE_INDEX, LossConfig())
    for kept in (12, 4):  # a quarter of the patches is a square number, and no picture
        with pytest.raises(DataError, match=f"was given {kept} patches of 16; .* patch_dropout 0"):
            model.embed_boxes(tokens[:, : kept + 1], batch["boxes"], IMAGE_INDEX)


@torch.no_grad()
def test_a_saved_model_comes_back_bit_equal(tmp_path):
    model, batch = make()
    model.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and loaded.config.region_encoder == "roi_align"
    assert torch.equal(loaded(**batch).region_feat, model.eval()(**batch).region_feat)
