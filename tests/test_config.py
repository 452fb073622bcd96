"""`ClocConfig`: every open point of the paper is a field, contradictions are refused, folders round-trip through AutoConfig."""

import json

import pytest
from transformers import AutoConfig

import encoder  # noqa: F401 - registers the Auto classes
from encoder.config import PRESETS, ClocConfig, b16, h14_336, l14_336, tiny
from encoder.errors import DataError

# Section 8 of the specification: the field for each point, and the default that it prescribes.
OPEN_POINTS = {
    "prompter_readout": "mean",  # which tokens the "global average pooler" pools
    "region_temperature": "shared",
    "box_min_frequency": 0.5,
    "box_max_frequency": 32.0,
    "box_corner_embedding": True,
    "prompter_tokens": "all",
    "prompter_layer_norm": True,
    "normalize_text_prompt": False,
    "prompter_shared": True,
    "prompter_mlp_ratio": 4.0,
    "box_head_width": None,
    "geometry": "pad",
}


def test_open_points_are_fields_with_the_prescribed_default():
    config = ClocConfig()
    assert {name: getattr(config, name) for name in OPEN_POINTS} == OPEN_POINTS
    for name in OPEN_POINTS:
        assert name in (ClocConfig.__doc__ or ""), f"{name} is not explained"


def test_paper_presets_have_the_published_sizes():
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
        assert config.logit_scale_init_value == 2.6592


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_presets_take_a_vocabulary_and_fields(preset):
    config = preset(vocab_size=321, prompter_readout="prompt")
    assert config.text_config.vocab_size == 321 and config.prompter_readout == "prompt"
    assert "vocab_size" not in config.to_diff_dict()


def test_round_trip_through_autoconfig(tmp_path):
    fields = {
        "prompter_readout": "prompt",
        "prompter_tokens": "patches",
        "prompter_shared": False,
        "prompter_mlp_ratio": 2.0,
        "prompter_layer_norm": False,
        "box_corner_embedding": False,
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


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"prompter_readout": "max"}, "ClocConfig.prompter_readout is 'max'; choose one of mean, prompt"),
        ({"prompter_tokens": "cls"}, "prompter_tokens is 'cls'; choose one of all, patches"),
        ({"region_temperature": "none"}, "region_temperature is 'none'"),
        ({"position_init": "learned"}, "position_init is 'learned'"),
        ({"geometry": "center_crop"}, "geometry is 'center_crop'; choose one of pad, squash"),
        ({"box_min_frequency": 8.0, "box_max_frequency": 4.0}, "8.0 must lie between 0 and box_max_frequency 4.0"),
        ({"box_min_frequency": 0.0}, "box_min_frequency 0.0 must lie between"),
        ({"vision_config": {"hidden_size": 30, "num_attention_heads": 2}}, "hidden_size is 30; box corners need a multiple of 4"),
    ],
)
def test_contradictions_are_refused_at_construction(fields, sentence):
    with pytest.raises(DataError, match=sentence):
        ClocConfig(**fields)
