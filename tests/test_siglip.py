"""CLOC on SigLIP's towers, held against stock SiglipModel on the same weights, in and out; and what else must cope."""

import json

import pytest
import sentencepiece
import torch
from transformers import (
    AutoModel,
    AutoProcessor,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
    SiglipTokenizer,
    SiglipVisionModel,
)

from encoder import ClocModel, ClocProcessor, ClocSiglipConfig, ClocSiglipModel, RegionPredictor
from encoder.engine import reshape_scalars
from encoder.errors import DataError
from encoder.export import export_clip, export_vision
from encoder.from_clip import POSITIONS, from_clip, resize_positions
from encoder.losses import LossConfig, cloc_losses
from encoder.pretrained import folder_kind, load_encoder, load_processor, load_vision_tower, weights_hash

VOCAB, LENGTH = 64, 24


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory):
    """A stock random SigLIP with its own tokenizer and image processor, saved by transformers itself."""
    folder = tmp_path_factory.mktemp("siglip")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = SiglipConfig(
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        text_config={**sizes, "vocab_size": VOCAB, "max_position_embeddings": LENGTH},
    )
    torch.manual_seed(31)
    model = SiglipModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
        model.logit_scale.fill_(4.7), model.logit_bias.fill_(-12.9)
    model.save_pretrained(folder)
    (folder / "corpus.txt").write_text("a photo of two cats\na red bus left of the small blue bird\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "spiece"), vocab_size=40, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, hard_vocab_limit=False, num_threads=1, minloglevel=2,
    )  # fmt: skip
    SiglipTokenizer(str(folder / "spiece.model"), model_max_length=LENGTH).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture()
def pixels():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def texts_of(folder):
    return dict(load_processor(folder).texts(["a photo of two cats", "a red bus", "the small blue bird left of the bus"]))


def stock(folder) -> SiglipModel:
    model, info = SiglipModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


@torch.no_grad()
def test_from_clip_gives_bit_equal_siglip_outputs(siglip_folder, pixels):
    siglip, batch = stock(siglip_folder), texts_of(siglip_folder)
    model = ClocModel.from_clip(siglip_folder, prompter_readout="mean").eval()
    assert type(model) is ClocSiglipModel and model.config.prompter_readout == "mean"
    vision = siglip.vision_model(pixel_values=pixels)
    image = model.encode_image(pixels)
    assert torch.equal(image.feat, vision.pooler_output) and torch.equal(image.tokens, vision.last_hidden_state)
    assert image.tokens.shape == (3, 16, 32)  # patches alone, after the tower's last norm
    assert torch.equal(model.encode_text(**batch), siglip.get_text_features(**batch).pooler_output)
    # A mask of ones is no mask: SigLIP reads its padding.
    bare = siglip.get_text_features(input_ids=batch["input_ids"]).pooler_output
    assert torch.equal(model.encode_text(**batch), bare)
    output = model(pixels, **batch)
    assert (float(output.logit_scale), float(output.logit_bias)) == (pytest.approx(4.7), pytest.approx(-12.9))
    assert output.logit_scale.shape == output.logit_bias.shape == ()
    logits = siglip(pixel_values=pixels, input_ids=batch["input_ids"]).logits_per_text
    unit = [F / F.norm(p=2, dim=-1, keepdim=True) for F in (output.text_feat, output.image_feat)]
    ours = unit[0] @ unit[1].T * output.logit_scale.exp() + output.logit_bias
    torch.testing.assert_close(ours, logits, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("tokens", ["all", "patches"])
@pytest.mark.parametrize("box_token", ["corners", "joint"])
def test_regions_learn_through_a_siglip_tower(siglip_folder, pixels, tokens, box_token):
    batch = texts_of(siglip_folder)
    fields = {"region_temperature": "own", "prompter_shared": True, "prompter_tokens": tokens, "box_token": box_token}
    model = from_clip(siglip_folder, **fields)
    assert float(model.region_logit_scale) == pytest.approx(4.7) and float(model.region_logit_bias) == pytest.approx(-12.9)
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.7], [0.2, 0.0, 1.0, 0.4]])
    image_index = torch.tensor([2, 0])
    regions = {"region_input_ids": batch["input_ids"][:2], "region_attention_mask": batch["attention_mask"][:2]}
    output = model(pixels, **batch, boxes=boxes, image_index=image_index, **regions)
    assert output.region_feat.shape == (2, 32) and output.predicted_boxes.shape == (2, 4)
    image = model.encode_image(pixels)
    assert torch.equal(output.region_feat, model.embed_boxes(image.tokens, boxes, image_index))
    losses, _ = cloc_losses(output, boxes, image_index, LossConfig(similar_text_threshold=None))
    sum(losses.values()).backward()
    still = {name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    # Keys' biases never matter to a softmax, and a softmax loss has no bias.
    assert {name for name in still if not name.endswith("k_proj.bias")} == {"logit_bias", "region_logit_bias"}


def test_prompter_sees_every_patch_of_a_tower_without_cls(siglip_folder, pixels):
    """`patches` must not drop the first token here, as it drops CLS of a CLIP."""
    torch.manual_seed(0)
    model = from_clip(siglip_folder).eval()
    tokens = model.encode_image(pixels).tokens.detach()
    box, index = torch.tensor([[0.1, 0.2, 0.8, 0.9]]), torch.tensor([1])
    features = {}
    for model.config.prompter_tokens in ("all", "patches"):
        features[model.config.prompter_tokens] = model.embed_boxes(tokens, box, index)
    assert torch.equal(features["all"], features["patches"])


def test_no_texts_and_no_regions(siglip_folder, pixels):
    model = from_clip(siglip_folder)
    empty = torch.zeros(0, 1, dtype=torch.long)
    assert model.encode_text(empty).shape == (0, 32)
    none = torch.zeros(0, dtype=torch.long)
    output = model(pixels, **texts_of(siglip_folder), boxes=torch.zeros(0, 4), image_index=none, region_input_ids=empty)
    (output.image_feat.sum() + output.region_feat.sum() + output.predicted_boxes.sum()).backward()
    assert model.prompter.projection.weight.grad is not None


@torch.no_grad()
def test_auto_classes_and_every_loader_round_trip(siglip_folder, pixels, tmp_path, painted):
    model = from_clip(siglip_folder, region_temperature="own", box_token="joint").eval()
    model.save_pretrained(tmp_path)
    load_processor(siglip_folder).save_pretrained(tmp_path)
    assert folder_kind(tmp_path) == "cloc_siglip" and folder_kind(siglip_folder) == "siglip"
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is ClocSiglipModel and type(loaded.config) is ClocSiglipConfig
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert weights_hash(loaded) == weights_hash(model) == weights_hash(load_encoder(tmp_path))
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is ClocProcessor and processor.text_padding == "max_length"
    assert processor.image_processor.image_mean == [0.5, 0.5, 0.5]
    assert torch.equal(
        processor.texts(["a red bus"])["input_ids"], load_processor(siglip_folder).texts(["A red BUS"])["input_ids"]
    )
    for folder in (tmp_path, siglip_folder):
        tower = load_vision_tower(folder)
        assert type(tower) is SiglipVisionModel and not tower.training
        assert torch.equal(tower(pixel_values=pixels).pooler_output, model.encode_image(pixels).feat)
    assert type(load_encoder(siglip_folder)) is SiglipModel

    predictor = RegionPredictor.from_pretrained(tmp_path)
    predictor.set_image(painted(0)[0])
    index, cosines = predictor.classify_boxes([[2, 3, 20, 30]], ["bus", "bird"])
    assert len(index) == 1 and torch.isfinite(torch.as_tensor(cosines)).all()
    boxes, _ = predictor.ground(["the red bus"])
    assert boxes.shape == (1, 4)


def test_texts_are_padded_to_the_tower_and_padding_is_read(siglip_folder):
    batch = texts_of(siglip_folder)
    assert batch["input_ids"].shape == (3, LENGTH) and batch["attention_mask"].bool().all()
    theirs = SiglipTokenizer.from_pretrained(siglip_folder)(["a photo of two cats"], padding="max_length", return_tensors="pt")
    assert torch.equal(batch["input_ids"][:1], theirs["input_ids"])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exports_are_stock_and_bit_equal(siglip_folder, pixels, tmp_path, dtype, painted):
    model, pixels, batch = from_clip(siglip_folder).eval().to(dtype), pixels.to(dtype), texts_of(siglip_folder)
    processor = load_processor(siglip_folder)
    export_clip(model, tmp_path / "whole", processor)
    export_vision(model, tmp_path / "tower", processor)
    whole = stock(tmp_path / "whole")
    assert whole.dtype == dtype and type(AutoModel.from_pretrained(tmp_path / "whole")) is SiglipModel
    assert torch.equal(whole.vision_model(pixel_values=pixels).pooler_output, model.encode_image(pixels).feat)
    assert torch.equal(whole.get_text_features(**batch).pooler_output, model.encode_text(**batch))
    if dtype == torch.float32:
        assert weights_hash(whole) == weights_hash(stock(siglip_folder))
    tower, info = SiglipVisionModel.from_pretrained(tmp_path / "tower", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    output = tower.eval()(pixel_values=pixels)
    assert torch.equal(output.last_hidden_state, model.encode_image(pixels).tokens)
    assert folder_kind(tmp_path / "tower") == "siglip_vision_model"
    assert torch.equal(load_vision_tower(tmp_path / "tower", dtype)(pixel_values=pixels).pooler_output, output.pooler_output)
    again = load_processor(tmp_path / "whole")
    assert again.text_padding == "max_length" and again.image_processor.geometry == "pad"
    assert torch.equal(again.texts(["a red bus"])["input_ids"], processor.texts(["a red bus"])["input_ids"])
    theirs = AutoProcessor.from_pretrained(tmp_path / "whole")
    assert type(theirs) is SiglipProcessor
    assert (
        theirs(images=painted(0)[0], text=["a red bus"], padding="max_length", return_tensors="pt")["pixel_values"].shape[-1]
        == 32
    )


@torch.no_grad()
@pytest.mark.parametrize("size", [24, 32, 64])
def test_another_resolution_has_no_class_token_to_keep(siglip_folder, size):
    table = stock(siglip_folder).state_dict()[POSITIONS]
    model = from_clip(siglip_folder, image_size=size).eval()
    resized = model.state_dict()[POSITIONS]
    assert len(resized) == (size // 8) ** 2 and torch.equal(resized, resize_positions(table, size // 8, 0))
    assert model.encode_image(torch.randn(1, 3, size, size)).tokens.shape == (1, (size // 8) ** 2, 32)
    if size == 32:
        assert torch.equal(resized, table)


@torch.no_grad()
def test_saved_after_training_the_scalars_have_siglips_shape(siglip_folder, tmp_path):
    """DeepSpeed trains every temperature as (1,); CLIP's go back to (), SigLIP's are (1,) in stock folders."""
    model = from_clip(siglip_folder)
    reshape_scalars(model, (1,))
    reshape_scalars(model, model.scalar_shape)
    model.save_pretrained(tmp_path / "cloc")
    export_clip(model, tmp_path / "siglip")
    assert weights_hash(load_encoder(tmp_path / "cloc")) == weights_hash(model)
    assert weights_hash(stock(tmp_path / "siglip")) == weights_hash(stock(siglip_folder))


def test_siglip_2_naflex_and_a_tower_alone_are_refused(siglip_folder, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip2"}))
    with pytest.raises(DataError, match="model_type is 'siglip2'; a folder of a CLOC, CLIP or SigLIP model"):
        from_clip(tmp_path)
    export_vision(load_encoder(siglip_folder), tmp_path / "tower")
    with pytest.raises(DataError, match="holds a vision tower alone"):
        from_clip(tmp_path / "tower")
