"""Every kind of vision tower, one or several of its layers, in an MLLM: held against stock Llava on the same weights."""

import pytest
import torch
from mllm_fixtures import recipe, write_clip, write_conversations
from PIL import Image
from test_open_clip import hub_folder, open_clip_state, stock_clip
from transformers import (
    AutoProcessor,
    CLIPModel,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
)

from encoder.errors import DataError
from encoder.model import ClocModel
from mllm import training
from mllm.checkpoint import load_mllm, save_mllm
from mllm.config import MllmConfig, load_config
from mllm.costs import meta_mllm, mllm_cost
from mllm.data import pixel_collator
from mllm.features import CachedTower, cache_features, feature_collator
from mllm.generation import GroundingModel
from mllm.model import build_mllm, freeze

SIGLIP = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_folder):
    """Folders of towers, without tokenizers, by kind; and the very towers as their stock classes."""
    folder = tmp_path_factory.mktemp("world")
    write_conversations(folder, 6, text_only=1)
    write_clip(folder / "clip")
    CLIPVisionModel.from_pretrained(folder / "clip").save_pretrained(folder / "clip_tower")
    open_clip = stock_clip("gelu")
    hub_folder(folder / "open_clip", open_clip_state(open_clip))
    torch.manual_seed(7)
    vision = {**SIGLIP, "image_size": 32, "patch_size": 8}
    siglip = SiglipModel(SiglipConfig(vision_config=vision, text_config={**SIGLIP, "vocab_size": 50}))
    siglip.save_pretrained(folder / "siglip")
    SiglipVisionModel.from_pretrained(folder / "siglip").save_pretrained(folder / "siglip_tower")
    stock = {
        "cloc": ClocModel.from_pretrained(tiny_folder).vision_model,
        "clip": CLIPModel.from_pretrained(folder / "clip").vision_model,
        "clip_tower": CLIPVisionModel.from_pretrained(folder / "clip_tower"),
        "open_clip": open_clip.vision_model,
        "siglip": siglip.vision_model,
        "siglip_tower": SiglipVisionModel.from_pretrained(folder / "siglip_tower"),
    }
    (folder / "cloc").symlink_to(tiny_folder)
    return folder, stock


@pytest.mark.parametrize("layer", [-2, [-1, 1, 0]], ids=["one", "several"])
@pytest.mark.parametrize("kind", ["cloc", "clip", "clip_tower", "open_clip", "siglip", "siglip_tower"])
def test_logits_are_stock_llavas(world, kind, layer, tmp_path):
    """The features of the tower as it was before, put together by hand; stock Llava on the saved folder; and ours."""
    folder, towers = world
    built = build_mllm(MllmConfig(**recipe(folder, tower=str(folder / kind), feature_layer=layer)))
    save_mllm(tmp_path, built.model, built.tokenizer, built.settings, torch.float32, None, built.sentencepiece_model)
    stock, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tower = towers[kind].eval()
    side, patch = tower.config.image_size, tower.config.patch_size
    marks = (side // patch) ** 2
    ids = torch.tensor([[1, 5, *[built.model.config.image_token_id] * marks, 9, 8]])
    pixels = torch.randn(1, 3, side, side)
    with torch.no_grad():
        hidden = tower(pixels, output_hidden_states=True).hidden_states
        has_cls = "siglip" not in kind
        patches = torch.cat([hidden[number][:, has_cls:] for number in ([layer] if layer == -2 else layer)], dim=-1)
        embeds = stock.get_input_embeddings()(ids)
        embeds[:, 2 : 2 + marks] = stock.model.multi_modal_projector(patches)
        by_hand = stock.lm_head(stock.model.language_model(inputs_embeds=embeds).last_hidden_state)
        ours, _, settings = load_mllm(tmp_path)
        for model in (stock.eval(), built.model, ours):
            torch.testing.assert_close(model(input_ids=ids, pixel_values=pixels).logits, by_hand, atol=1e-5, rtol=1e-5)
    assert settings.feature_layer == layer
    # A stock processor widens the picture's mark to as many tokens, and the picture to as many pixels.
    text = AutoProcessor.from_pretrained(tmp_path)(images=Image.new("RGB", (50, 40)), text="<image>\nWhere?", return_tensors="pt")
    assert (text["input_ids"] == built.model.config.image_token_id).sum() == marks
    assert text["pixel_values"].shape == pixels.shape
    answer = GroundingModel(ours, built.tokenizer, settings).generate([Image.new("RGB", (50, 40))], ["Where?"], progress=False)
    assert len(answer) == 1


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_cache_of_several_layers_trains_as_the_tower_does(world, kind, tmp_path):
    folder, _ = world
    config = MllmConfig(**recipe(folder, tower=str(folder / kind), feature_layer=[-1, -2]))
    mllm = build_mllm(config)
    dataset = training.read_dataset(config, mllm, config.data)
    ids = mllm.model.config.image_token_id, mllm.tokenizer.pad_token_id
    features = cache_features(mllm.model, dataset, tmp_path, progress=False)
    rows = [dataset[index] for index in (0, 6, 3)]
    expected = mllm.model(**pixel_collator(dataset, *ids)(rows)).loss
    mllm.model.model.vision_tower = CachedTower([-1, -2])
    torch.testing.assert_close(mllm.model(**feature_collator(dataset, features, *ids)(rows)).loss, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fields", [{"feature_layer": layer} for layer in (-1, -2, [-3, 1])] + [{"region_tokens": "pooling"}])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_what_learns_is_what_the_loss_depends_on(world, kind, fields):
    """By autograd's word. Weight decay would move the rest, and without ZeRO processes would wait for their gradients."""
    folder, _ = world
    config = MllmConfig(**recipe(folder, tower=str(folder / kind), train=["projector", "llm", "tower"], **fields))
    mllm = build_mllm(config)
    freeze(mllm.model, config.trains, torch.float32)
    dataset = training.read_dataset(config, mllm, config.data)
    ids = mllm.model.config.image_token_id, mllm.tokenizer.pad_token_id
    batch = pixel_collator(dataset, *ids)([dataset[index] for index in range(len(dataset))])
    learning = {name for name, parameter in mllm.model.named_parameters() if parameter.requires_grad}
    mllm.model.requires_grad_(True)
    mllm.model(**batch).loss.backward()
    assert learning == {name for name, parameter in mllm.model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("kind", ["open_clip", "siglip"])
def test_several_layers_of_any_tower_train_and_can_be_asked_what_they_cost(world, kind, tmp_path):
    folder, _ = world
    config = MllmConfig(
        **recipe(folder, tower=str(folder / kind), feature_layer=[-1, -2], max_steps=2, output=str(tmp_path / "out"))
    )
    training.train(config)
    model, _, settings = load_mllm(tmp_path / "out")
    planned = meta_mllm(config)
    mllm_cost(planned, config)
    shapes = {name: p.shape for name, p in model.model.named_parameters() if "language_model" not in name}  # of its vocabulary
    assert shapes == {name: p.shape for name, p in planned.model.named_parameters() if "language_model" not in name}
    assert settings.feature_layer == [-1, -2] == model.config.vision_feature_layer
    assert model.model.multi_modal_projector.linear_1.in_features == 64


def test_layers_are_one_or_several_numbers(world):
    folder, _ = world
    for given, kept in (([-2], -2), ([-2, -1], [-2, -1]), (-1, -1), (None, None)):
        assert load_config(None, recipe(folder, feature_layer=given)).feature_layer == kept
    with pytest.raises(DataError, match="'feature_layer' is 'last'; a whole number is needed"):
        load_config(None, recipe(folder, feature_layer=[-1, "last"]))
    with pytest.raises(DataError, match="feature_layer is -7, but the tower"):
        build_mllm(MllmConfig(**recipe(folder, feature_layer=[-1, -7])))
