"""`ClocModel`: a CLIP with promptable embeddings, held against stock transformers on the same weights."""

import math

import pytest
import torch
from transformers import AutoModel, CLIPConfig, CLIPModel

from encoder.config import ClocConfig, tiny
from encoder.model import ClocModel
from encoder.prompter import sinusoids

B, R = 3, 5
IMAGE_INDEX = torch.tensor([0, 0, 2, 2, 2])


def make(**fields) -> ClocModel:
    torch.manual_seed(0)
    return ClocModel(tiny(vocab_size=64, **fields)).eval()


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 60, (B, 6), generator=generator)
    ids[0, 4:], ids[1, 5], ids[2, 5] = torch.tensor([1, 0]), 1, 1
    return {
        "pixel_values": torch.randn(B, 3, 32, 32, generator=generator),
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "boxes": torch.rand(R, 2, 2, generator=generator).sort(dim=1).values.reshape(R, 4),
        "image_index": IMAGE_INDEX,
        "region_input_ids": ids[:2],
        "region_attention_mask": (ids[:2] != 0).long(),
        "region_text_index": torch.tensor([0, 1, 1, 0, 1]),
    }


def stock(model: ClocModel) -> CLIPModel:
    """transformers' CLIP with the model's CLIP weights, by name and strictly."""
    config = model.config
    clip = CLIPModel(
        CLIPConfig(
            text_config=config.text_config.to_dict(),
            vision_config=config.vision_config.to_dict(),
            projection_dim=config.projection_dim,
        )
    )
    ours = model.state_dict()
    clip.load_state_dict({name: ours[name] for name in clip.state_dict()}, strict=True)
    return clip.eval()


@torch.no_grad()
def test_the_clip_part_is_stock_clip_bit_for_bit():
    model, batch = make(), inputs()
    clip = stock(model)
    output = model(**batch)
    reference = clip(pixel_values=batch["pixel_values"], input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    unit = [feat / feat.norm(p=2, dim=-1, keepdim=True) for feat in (output.image_feat, output.text_feat)]
    torch.testing.assert_close(unit[0], reference.image_embeds, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(unit[1], reference.text_embeds, rtol=1e-6, atol=1e-7)
    vision = clip.vision_model(pixel_values=batch["pixel_values"])
    text = clip.text_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert torch.equal(output.image_feat, clip.visual_projection(vision.pooler_output))
    assert torch.equal(output.text_feat, clip.text_projection(text.pooler_output))
    tokens = model.encode_image(batch["pixel_values"]).tokens
    assert torch.equal(tokens, clip.vision_model.post_layernorm(vision.last_hidden_state))
    bare = make(prompter_layer_norm=False)
    assert torch.equal(bare.encode_image(batch["pixel_values"]).tokens, vision.last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"prompter_shared": True, "prompter_readout": "mean", "region_temperature": "own"}])
def test_forward_is_its_parts(fields):
    model, batch = make(**fields), inputs()
    output = model(**batch)
    image = model.encode_image(batch["pixel_values"])
    text = model.encode_text(batch["region_input_ids"], batch["region_attention_mask"])[batch["region_text_index"]]
    assert torch.equal(output.region_text_feat, text)
    assert torch.equal(output.region_feat, model.embed_boxes(image.tokens, batch["boxes"], IMAGE_INDEX))
    prompter = model.text_prompter or model.prompter
    grounded = prompter.read(prompter.text_prompts(text), image.tokens, IMAGE_INDEX)
    assert torch.equal(output.predicted_boxes, model.box_head(grounded))
    assert output.region_feat.shape == (R, 16) and output.predicted_boxes.shape == (R, 4)
    own = model.region_logit_scale
    assert (own is None) == (not fields) and float(output.region_logit_scale) == float(model.logit_scale if own is None else own)


@torch.no_grad()
def test_padding_of_texts_and_company_in_the_batch_do_not_matter():
    model, batch = make(), inputs()
    full = model.encode_text(batch["input_ids"], batch["attention_mask"])
    alone = model.encode_text(batch["input_ids"][:1, :5], batch["attention_mask"][:1, :5])
    torch.testing.assert_close(full[:1], alone, rtol=1e-5, atol=1e-6)
    wide = torch.nn.functional.pad(batch["input_ids"], (0, 9))
    torch.testing.assert_close(model.encode_text(wide, (wide != 0).long()), full, rtol=1e-5, atol=1e-6)
    output = model(**batch)
    image = model.encode_image(batch["pixel_values"][2:])
    single = model.embed_boxes(image.tokens, batch["boxes"][2:], torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(output.region_feat[2:], single, rtol=1e-5, atol=1e-6)


def test_no_texts_and_no_regions():
    model, batch = make(), inputs()
    assert model.encode_text(torch.zeros(0, 1, dtype=torch.long)).shape == (0, 16)
    empty = {"boxes": (0, 4), "image_index": (0,), "region_input_ids": (0, 1), "region_attention_mask": (0, 1)}
    batch |= {key: torch.zeros(shape, dtype=batch[key].dtype) for key, shape in {**empty, "region_text_index": (0,)}.items()}
    output = model(**batch)
    assert output.region_feat.shape == (0, 16) and output.predicted_boxes.shape == (0, 4)
    total = output.image_feat.sum() + output.region_feat.sum() + output.predicted_boxes.sum() + output.region_text_feat.sum()
    total.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {"logit_scale"}  # every layer takes part in backward, so that no rank waits for another


def test_without_boxes_only_the_clip_part_runs():
    model, batch = make(), inputs()
    output = model(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])
    assert output.region_feat is None and output.predicted_boxes is None
    assert torch.equal(output.image_feat, model(**batch).image_feat)


@pytest.mark.parametrize("fields", [{}, {"prompter_shared": True, "prompter_readout": "mean"}, {"box_token": "joint"}])
def test_every_parameter_learns(fields):
    model, batch = make(**fields), inputs()
    output = model(**batch)
    parts = (output.image_feat, output.text_feat, output.region_feat, output.region_text_feat, output.predicted_boxes)
    (sum(part.square().sum() for part in parts) + output.logit_scale).backward()
    still = {name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    # A softmax does not change when all its logits move together: key biases have no gradient, in stock CLIP too.
    assert all(name.endswith("k_proj.bias") for name in still)


@torch.no_grad()
def test_initialisation_of_the_new_parts_keeps_their_scale():
    """Every new matrix starts near 1/sqrt(fan in), not at PyTorch's or transformers' default for unknown modules."""
    torch.manual_seed(0)
    model = ClocModel(tiny(vocab_size=64))
    box_input = ClocModel(tiny(vocab_size=64, box_token="joint")).prompter.box_input
    for linear, fan_in in ((box_input.fc1, 64), (box_input.fc2, 32)):
        assert float(linear.weight.std()) == pytest.approx(fan_in**-0.5, rel=0.2) and not linear.bias.any()
    for name, parameter in model.named_parameters():
        if name.startswith(("prompter.", "text_prompter.")) and name.endswith(".weight") and parameter.ndim == 2:
            expected = (2 * parameter.shape[1]) ** -0.5 if ".fc1." in name else parameter.shape[1] ** -0.5
            assert 0.8 * expected < float(parameter.std()) < 1.2 * expected, name
        elif name.startswith(("prompter.", "text_prompter.", "box_head.")) and name.endswith(".bias"):
            assert float(parameter.abs().max()) == (0.5 if name == "box_head.fc2.bias" else 0.0), name
        elif "layer_norm" in name and name.endswith(".weight"):
            assert (parameter == 1).all(), name
    assert model.logit_scale.shape == () and float(model.logit_scale) == pytest.approx(math.log(1 / 0.07), abs=1e-3)
    assert float(model.prompter.corner_embedding.std()) == pytest.approx(0.02, rel=0.3)
    boxes = model(**inputs()).predicted_boxes
    assert (boxes - 0.5).abs().max() < 0.5  # an untrained head guesses around the middle


@torch.no_grad()
def test_sincos_positions_are_the_corner_sinusoids_of_patch_centres():
    model = make(position_init="sincos")
    table = model.vision_model.embeddings.position_embedding.weight
    assert not table[0].any()
    for patch, (column, row) in {1: (0, 0), 4: (3, 0), 5: (0, 1), 16: (3, 3)}.items():
        centre = torch.tensor([(column + 0.5) / 4, (row + 0.5) / 4])
        expected = sinusoids(centre, 32, model.config.box_min_frequency, model.config.box_max_frequency)
        cosine = torch.nn.functional.cosine_similarity(table[patch], expected, dim=0)
        assert float(cosine) == pytest.approx(1.0, abs=1e-5)
    assert torch.isfinite(model(**inputs()).region_feat).all()


def test_the_same_seed_gives_the_same_towers_with_any_prompter():
    plain, other = make().state_dict(), make(prompter_readout="mean").state_dict()
    assert all(torch.equal(plain[name], other[name]) for name in plain)


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"prompter_shared": True, "region_temperature": "own", "box_token": "joint"}])
def test_automodel_round_trip_is_bit_equal(fields, tmp_path):
    model = make(**fields)
    model.save_pretrained(tmp_path)
    for cls in (AutoModel, ClocModel):
        loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is ClocModel and type(loaded.config) is ClocConfig
        assert not info["missing_keys"] and not info["unexpected_keys"]
        state = loaded.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(loaded.eval()(**inputs()).predicted_boxes, model(**inputs()).predicted_boxes)
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_bfloat16_is_close_to_float32():
    model, batch = make(), inputs()
    exact = model(**batch)
    rough = make().to(torch.bfloat16)(**{**batch, "pixel_values": batch["pixel_values"].bfloat16()})
    for name in ("image_feat", "region_feat", "region_text_feat"):
        cosine = torch.nn.functional.cosine_similarity(getattr(exact, name), getattr(rough, name).float(), dim=-1)
        assert cosine.min() > 0.99, name
    assert (exact.predicted_boxes - rough.predicted_boxes.float()).abs().max() < 0.03
