"""`ClocConfig`: every open point of the paper is a field, contradictions are refused, folders round-trip through AutoConfig."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from encoder.arguments import read_recipe
from encoder.config import PRESETS, ClocConfig, ClocSiglipConfig, RegionConfig, b16, h14_336, l14_336, tiny
from encoder.errors import DataError
from encoder.pretraining_config import RUN_FIELDS, build_configs

# The field for each point, and its default: the plainest reading, or what docs/results.md speaks for.
OPEN_POINTS = {
    "region_encoder": "prompter",  # or the paper's ablation, RoIAlign
    "prompter_readout": "prompt",  # which tokens the "global average pooler" pools
    "region_temperature": "shared",
    "box_min_frequency": 0.5,
    "box_max_frequency": 32.0,
    "box_corner_embedding": True,
    "box_token": "corners",
    "prompter_tokens": "all",
    "prompter_layer_norm": True,
    "normalize_text_prompt": False,
    "prompter_shared": False,
    "prompter_mlp_ratio": 4.0,
    "box_head_width": None,
    "geometry": "pad",
}


def test_open_points_are_fields_with_the_prescribed_default():
    for config in (ClocConfig(), ClocSiglipConfig()):
        assert {name: getattr(config, name) for name in OPEN_POINTS} == OPEN_POINTS
    for name in OPEN_POINTS:
        assert name in (RegionConfig.__doc__ or ""), f"{name} is not explained"


def test_paper_presets_have_the_published_sizes():
    texts = {b16: (512, 2048, 12, 8), l14_336: (768, 3072, 12, 12), h14_336: (1024, 4096, 24, 16)}
    sizes = {"b16": (b16, 768, 12, 12, 224, 16, 512), "l14": (l14_336, 1024, 24, 16, 336, 14, 768)}
    sizes["h14"] = (h14_336, 1280, 32, 16, 336, 14, 1024)
    for preset, width, layers, heads, image, patch, joint in sizes.values():
        config = preset()
        vision = config.vision_config
        got = (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads, vision.image_size, vision.patch_size)
        assert got == (width, layers, heads, image, patch)
        assert vision.intermediate_size == 4 * width and vision.hidden_act == "quick_gelu"
        assert config.projection_dim == joint == config.text_config.projection_dim == vision.projection_dim
        text = config.text_config
        assert (text.vocab_size, text.pad_token_id, text.eos_token_id, text.max_position_embeddings) == (32100, 0, 1, 77)
        assert (text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.num_attention_heads) == texts[preset]
        assert text.attention_dropout == vision.attention_dropout == 0.0
        assert text.layer_norm_eps == vision.layer_norm_eps == 1e-5 and text.hidden_act == "quick_gelu"
        assert config.logit_scale_init_value == 2.6592 and config.geometry == "pad" and config.prompter_mlp_ratio == 4


@pytest.mark.parametrize("name", ["b16", "l14_336", "h14_336"])
def test_the_papers_recipes_are_table_a(name):
    """The training part of Table A, once more and by hand, against the recipe as the script reads it."""
    path = Path(__file__).parents[1] / "scripts" / "recipes" / f"cloc_{name}.yaml"
    train, loss = build_configs({**read_recipe(path, RUN_FIELDS), "shards": "a", "output": "b"})
    assert (train.preset, train.objective, train.vocab_size) == (name, "cloc", 32100)
    assert (train.batch_size, train.steps, train.warmup_steps) == (32768, 439087, 2000)
    assert (train.learning_rate, train.beta1, train.beta2, train.weight_decay) == (5e-4, 0.9, 0.98, 0.2)
    assert train.max_boxes == 4 and loss.similar_text_threshold == 0.9
    assert loss.region_loss_weight == loss.grounding_loss_weight == 1.0 and loss.label_coverage


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_presets_take_a_vocabulary_and_fields(preset):
    config = preset(vocab_size=321, prompter_readout="mean")
    assert config.text_config.vocab_size == 321 and config.prompter_readout == "mean"
    assert "vocab_size" not in config.to_diff_dict()


@pytest.mark.parametrize("cls", [ClocConfig, ClocSiglipConfig])
def test_a_saved_folder_states_every_field(cls, tmp_path):
    """So that another default, some day, leaves saved models as they are."""
    cls().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {name: saved[name] for name in OPEN_POINTS} == OPEN_POINTS


def test_round_trip_through_autoconfig(tmp_path):
    fields = {
        "prompter_readout": "mean",
        "prompter_tokens": "patches",
        "prompter_shared": True,
        "prompter_mlp_ratio": 2.0,
        "prompter_layer_norm": False,
        "box_corner_embedding": False,
        "box_token": "joint",
        "box_min_frequency": 0.25,
        "box_max_frequency": 9.5,
        "normalize_text_prompt": True,
        "region_temperature": "own",
        "box_head_width": 48,
        "position_init": "sincos",
        "geometry": "squash",
    }
    tiny(**fields).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "cloc"
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is ClocConfig
    assert {name: getattr(loaded, name) for name in fields} == fields
    assert loaded.vision_config.hidden_size == 32 and loaded.text_config.eos_token_id == 1

    del fields["position_init"], fields["prompter_layer_norm"]  # a CLIP tower's alone
    ClocSiglipConfig(**fields).save_pretrained(tmp_path / "siglip")
    loaded = AutoConfig.from_pretrained(tmp_path / "siglip")
    assert type(loaded) is ClocSiglipConfig and loaded.model_type == "cloc_siglip"
    assert {name: getattr(loaded, name) for name in fields} == fields and loaded.projection_dim == 768


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"prompter_readout": "max"}, "ClocConfig.prompter_readout is 'max'; choose one of mean, prompt"),
        ({"region_encoder": "crop"}, "region_encoder is 'crop'; choose one of prompter, roi_align"),
        (
            {"region_encoder": "roi_align", "box_token": "joint"},
            "box_token is 'joint' with region_encoder 'roi_align', which has no",
        ),
        ({"region_encoder": "roi_align", "normalize_text_prompt": True}, "no Prompter; leave it at False"),
        ({"prompter_tokens": "cls"}, "prompter_tokens is 'cls'; choose one of all, patches"),
        ({"box_token": "one"}, "box_token is 'one'; choose one of corners, joint"),
        ({"region_temperature": "none"}, "region_temperature is 'none'"),
        ({"position_init": "learned"}, "position_init is 'learned'"),
        ({"geometry": "center_crop"}, "geometry is 'center_crop'; choose one of pad, squash"),
        ({"box_min_frequency": 8.0, "box_max_frequency": 4.0}, "8.0 must lie between 0 and box_max_frequency 4.0"),
        ({"box_min_frequency": 0.0}, "box_min_frequency 0.0 must lie between"),
        ({"prompter_mlp_ratio": 0.0}, "prompter_mlp_ratio is 0.0; the MLP needs at least one hidden unit"),
        ({"box_head_width": 0}, "box_head_width is 0; give at least 1"),
        ({"vision_config": {"hidden_size": 30, "num_attention_heads": 2}}, "hidden_size is 30; box corners need a multiple of 4"),
    ],
)
def test_contradictions_are_refused_at_construction(fields, sentence):
    with pytest.raises(DataError, match=sentence):
        ClocConfig(**fields)


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"prompter_readout": "max"}, "ClocSiglipConfig.prompter_readout is 'max'; choose one of mean, prompt"),
        ({"prompter_layer_norm": False}, "prompter_layer_norm is False; SigLIP's tower ends in its norm"),
        ({"vision_config": {"vision_use_head": False}}, "the image feature comes from SigLIP's pooling head"),
        ({"text_config": {"projection_size": 512}}, "projection_size is 512; it must be the vision tower's 768"),
    ],
)
def test_what_siglip_cannot_be_is_refused(fields, sentence):
    with pytest.raises(DataError, match=sentence):
        ClocSiglipConfig(**fields)
