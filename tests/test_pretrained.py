"""In from CLIP and out to CLIP, bit for bit, against stock transformers; a wrong folder is one sentence."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionModel,
)

from encoder import ClocModel, ClocProcessor
from encoder.config import tiny
from encoder.errors import DataError, run_main
from encoder.export import export_clip, export_vision
from encoder.from_clip import from_clip
from encoder.pretrained import folder_kind, load_encoder, load_processor, load_vision_tower, weights_hash

SCRIPT = Path(__file__).parents[1] / "scripts" / "convert_checkpoint.py"


@pytest.fixture()
def pixels():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture()
def texts(tiny_processor):
    return dict(tiny_processor.texts(["small red square", "a picture of an empty grey wall"]))


@pytest.fixture(scope="session")
def clip_folder(tiny_processor, tmp_path_factory):
    """A stock random CLIP, saved by transformers itself, with transformers' own image processor."""
    folder = tmp_path_factory.mktemp("stock_clip")
    config = tiny(vocab_size=len(tiny_processor.tokenizer))
    torch.manual_seed(11)
    clip = CLIPModel(
        CLIPConfig(
            text_config=config.text_config.to_dict(),
            vision_config={**config.vision_config.to_dict(), "hidden_act": "gelu"},
            projection_dim=16,
            logit_scale_init_value=1.5,
        )
    )
    clip.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    tiny_processor.tokenizer.save_pretrained(folder)
    return folder


def load_stock(cls, folder):
    """`from_pretrained` of stock transformers, with every parameter in the file used and every one of the model's found."""
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


def hidden_states(tower, pixels):
    output = tower(pixel_values=pixels, output_hidden_states=True)
    return [*output.hidden_states, output.last_hidden_state, output.pooler_output]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_clip_is_stock_and_bit_equal(tiny_model, tiny_processor, pixels, texts, tmp_path, dtype):
    model, pixels = tiny_model.to(dtype), pixels.to(dtype)
    export_clip(model, tmp_path, tiny_processor)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert not [name for name in names if name.startswith(("prompter", "box_head"))]
    assert "vision_model.embeddings.class_embedding" in names and "text_model.final_layer_norm.weight" in names
    for loaded in (load_stock(CLIPModel, tmp_path), load_encoder(tmp_path, dtype)):
        assert type(loaded) is CLIPModel and loaded.dtype == dtype
        assert torch.equal(model.encode_image(pixels).feat, loaded.visual_projection(loaded.vision_model(pixels).pooler_output))
        assert torch.equal(model.encode_text(**texts), loaded.text_projection(loaded.text_model(**texts).pooler_output))
        assert torch.equal(model.logit_scale, loaded.logit_scale)
        states = (hidden_states(clip.vision_model, pixels) for clip in (model, loaded))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*states, strict=True))
    assert type(AutoModel.from_pretrained(tmp_path)) is CLIPModel


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_vision_is_stock_bit_equal_and_has_the_classic_names(tiny_model, tiny_processor, pixels, tmp_path, dtype):
    model, pixels = tiny_model.to(dtype), pixels.to(dtype)
    export_vision(model, tmp_path, tiny_processor)
    assert all(name.startswith("vision_model.") for name in load_file(tmp_path / "model.safetensors"))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "clip_vision_model"
    assert AutoConfig.from_pretrained(tmp_path).model_type == "clip_vision_model"
    expected = hidden_states(model.vision_model, pixels)
    for tower in (load_stock(CLIPVisionModel, tmp_path), load_vision_tower(tmp_path, dtype)):
        assert type(tower) is CLIPVisionModel
        for ours, theirs in zip(expected, hidden_states(tower, pixels), strict=True):
            assert torch.equal(ours, theirs)


@torch.no_grad()
def test_load_vision_tower_takes_every_kind_of_folder(tiny_model, tiny_folder, clip_folder, pixels, tmp_path):
    cloc, clip = load_encoder(tiny_folder), load_encoder(clip_folder)
    export_vision(clip, tmp_path / "vision")
    for folder, reference in ((tiny_folder, cloc), (clip_folder, clip), (tmp_path / "vision", clip)):
        tower = load_vision_tower(folder)
        assert type(tower) is CLIPVisionModel and not tower.training
        for ours, theirs in zip(hidden_states(reference.vision_model, pixels), hidden_states(tower, pixels), strict=True):
            assert torch.equal(ours, theirs)


@torch.no_grad()
def test_a_tower_saved_by_transformers_5_without_the_prefix_is_read_too(tiny_folder, pixels, tmp_path):
    tower = load_vision_tower(tiny_folder)
    tower.save_pretrained(tmp_path)
    for ours, theirs in zip(hidden_states(tower, pixels), hidden_states(load_vision_tower(tmp_path), pixels), strict=True):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_from_clip_gives_bit_equal_clip_outputs(clip_folder, pixels, texts):
    clip = CLIPModel.from_pretrained(clip_folder).eval()
    for model in (from_clip(clip_folder), ClocModel.from_clip(clip_folder, prompter_readout="mean", position_init="sincos")):
        assert type(model) is ClocModel
        model.eval()
        assert model.config.vision_config.hidden_act == "gelu" and model.config.projection_dim == 16
        assert torch.equal(model.encode_image(pixels).feat, clip.visual_projection(clip.vision_model(pixels).pooler_output))
        assert torch.equal(model.encode_text(**texts), clip.text_projection(clip.text_model(**texts).pooler_output))
        assert torch.equal(model.logit_scale, clip.logit_scale) and float(model.logit_scale) == 1.5
        output = model(pixels, **texts, boxes=torch.tensor([[0.1, 0.1, 0.5, 0.7]]), image_index=torch.tensor([1]),
                       region_input_ids=texts["input_ids"][:1])  # fmt: skip
        assert torch.isfinite(output.region_feat).all() and torch.isfinite(output.predicted_boxes).all()
    assert model.config.prompter_readout == "mean"
    own = from_clip(clip_folder, region_temperature="own")
    assert float(own.region_logit_scale) == pytest.approx(1.5)


@torch.no_grad()
def test_clip_to_cloc_to_clip_is_the_same_file(clip_folder, tmp_path):
    export_clip(from_clip(clip_folder), tmp_path)
    before, after = CLIPModel.from_pretrained(clip_folder), CLIPModel.from_pretrained(tmp_path)
    assert weights_hash(before) == weights_hash(after)


def test_weights_hash_sees_values_names_and_types(tiny_model):
    first = weights_hash(tiny_model)
    assert first == weights_hash(tiny_model) and len(first) == 64
    with torch.no_grad():
        tiny_model.box_head.fc2.bias[0] += 1e-6
    second = weights_hash(tiny_model)
    assert len({first, second, weights_hash(tiny_model.to(torch.bfloat16))}) == 3


def test_processors_of_every_kind_of_folder(tiny_model, tiny_processor, tiny_folder, clip_folder, painted, tmp_path):
    export_clip(tiny_model, tmp_path / "clip", tiny_processor)
    export_vision(tiny_model, tmp_path / "vision", tiny_processor)
    image = painted(3)[0]
    expected = tiny_processor.images([image])[0]["pixel_values"]
    for folder in (tiny_folder, clip_folder, tmp_path / "clip", tmp_path / "vision"):
        processor = load_processor(folder)
        assert type(processor) is ClocProcessor
        pixels, (geometry,) = processor.images([image])
        assert geometry.mode == "pad" and torch.equal(pixels["pixel_values"], expected)
    ids = load_processor(tmp_path / "clip").texts(["Small RED square"])["input_ids"]
    assert torch.equal(ids, tiny_processor.texts(["small red square"])["input_ids"])
    with pytest.raises(DataError, match="has no tokenizer, it is of a vision tower alone"):
        load_processor(tmp_path / "vision").texts(["red"])
    stock = AutoProcessor.from_pretrained(tmp_path / "clip")
    assert type(stock) is CLIPProcessor
    both = stock(images=image, text=["small red square"], return_tensors="pt")
    assert both["pixel_values"].shape == (1, 3, 32, 32) and torch.equal(both["input_ids"], ids)


@torch.no_grad()
def test_convert_checkpoint_script(tiny_folder, pixels, tmp_path, monkeypatch, capsys):
    """CLOC -> CLIP -> CLOC and CLOC -> vision through the script's `main`; refusals are one line and exit 2."""
    main = runpy.run_path(str(SCRIPT))["main"]

    def convert(*arguments) -> None:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        run_main(main)

    steps = (("clip", tiny_folder, "clip"), ("cloc", tmp_path / "clip", "cloc"), ("vision", tiny_folder, "vision"))
    for kind, source, target in (*steps, ("vision", tmp_path / "vision", "again")):
        with pytest.raises(SystemExit) as stopped:
            convert("--to", kind, source, tmp_path / target)
        assert stopped.value.code == 0
    assert load_file(tmp_path / "vision/model.safetensors").keys() == load_file(tmp_path / "again/model.safetensors").keys()
    cloc = load_encoder(tiny_folder)
    expected = cloc.encode_image(pixels)
    assert torch.equal(load_encoder(tmp_path / "cloc").encode_image(pixels).feat, expected.feat)
    assert load_processor(tmp_path / "cloc").image_processor.geometry == "pad"
    tower = load_stock(CLIPVisionModel, tmp_path / "vision")
    assert torch.equal(cloc.vision_model.post_layernorm(tower(pixels).last_hidden_state), expected.tokens)
    for arguments, sentence in (
        (("--to", "clip", tmp_path / "vision", tmp_path / "new"), "holds a vision tower alone"),
        (("--to", "clip", tiny_folder, tmp_path / "clip"), "is not an empty folder"),
        (("--to", "clip", "--seed", "0", tiny_folder, tmp_path / "new"), "--seed is given, but --to clip does not read it"),
        (("--to", "vision", "--template", "plain", tiny_folder, tmp_path / "new"), "--template is given, but --to vision"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            convert(*arguments)
        shown = capsys.readouterr().err
        assert stopped.value.code == 2 and shown.startswith("error: ") and sentence in shown and shown.count("\n") == 1


def edit_weights(source: Path, target: Path, edit) -> None:
    """A copy of a model folder whose parameters went through `edit`."""
    target.mkdir()
    (target / "config.json").write_text((source / "config.json").read_text())
    state = load_file(source / "model.safetensors")
    edit(state)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})


def test_a_folder_that_is_none_is_one_sentence(tiny_folder, clip_folder, tmp_path):
    for use in (load_encoder, load_vision_tower, load_processor, folder_kind, from_clip):
        with pytest.raises(DataError, match="config.json does not exist; give the folder of a saved CLOC, CLIP or SigLIP model"):
            use(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(DataError, match="model_type is 'llama'; a folder of a CLOC, CLIP or SigLIP model, or its tower"):
        load_encoder(tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text('{"model_type": "cl')
    with pytest.raises(DataError, match="config.json is not valid JSON"):
        load_encoder(tmp_path / "other")
    with pytest.raises(DataError, match="is not a CLIP folder"):
        from_clip(tiny_folder)


def test_missing_and_unfitting_weights_are_refused(tiny_folder, clip_folder, tmp_path):
    """transformers would draw them at random and warn."""
    edit_weights(tiny_folder, tmp_path / "missing", lambda state: state.pop("prompter.layer.q_proj.weight"))
    with pytest.raises(DataError, match=r"1 missing keys \(prompter.layer.q_proj.weight\)"):
        load_encoder(tmp_path / "missing")

    def shrink(state):
        state["visual_projection.weight"] = state["visual_projection.weight"][:8].clone()

    edit_weights(clip_folder, tmp_path / "unfitting", shrink)
    for load in (load_encoder, load_vision_tower, from_clip):
        with pytest.raises(DataError, match="visual_projection.weight"):
            load(tmp_path / "unfitting")

    def cut(state):
        for name in [name for name in state if "vision_model.encoder.layers.1." in name]:
            del state[name]

    edit_weights(tiny_folder, tmp_path / "shallow", cut)
    with pytest.raises(DataError, match="missing keys"):
        load_vision_tower(tmp_path / "shallow")
    (tmp_path / "weightless").mkdir()
    (tmp_path / "weightless" / "config.json").write_text((tiny_folder / "config.json").read_text())
    with pytest.raises(DataError, match="weightless: the weights cannot be read .*model.safetensors"):
        load_encoder(tmp_path / "weightless")
    (tmp_path / "weightless" / "model.safetensors").write_bytes((tiny_folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(DataError, match="weightless: the weights cannot be read"):
        load_encoder(tmp_path / "weightless")


def test_a_contradicting_configuration_in_a_folder_is_refused(tiny_folder, tmp_path):
    config = json.loads((tiny_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "prompter_readout": "max"}))
    with pytest.raises(DataError, match="prompter_readout is 'max'; choose one of mean, prompt"):
        load_encoder(tmp_path)
