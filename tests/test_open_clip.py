"""`open_clip` weights as a CLIPModel: against the names of a stock model turned the other way, and against the forward
pass of `open_clip`'s layout written out here on torch's own attention."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from encoder import ClocModel
from encoder.costs import meta_encoder
from encoder.errors import DataError, run_main
from encoder.from_clip import from_clip
from encoder.losses import LossConfig
from encoder.pretrained import folder_kind, load_encoder, load_processor, load_vision_tower, weights_hash
from encoder.pretraining_config import PretrainConfig

SCRIPT = Path(__file__).parents[1] / "scripts" / "convert_checkpoint.py"
# Head widths of 16 and 8: neither is open_clip's default of 64.
VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16, "mlp_ratio": 3.0}
TEXT = {"context_length": 20, "vocab_size": 90, "width": 24, "heads": 3, "layers": 3}
MODEL = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}


def stock_clip(act: str) -> CLIPModel:
    """A random CLIPModel of `MODEL`'s sizes, every parameter away from its initial value."""
    vision = dict(hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
    text = dict(hidden_size=24, intermediate_size=96, num_hidden_layers=3, num_attention_heads=3, vocab_size=90,
                max_position_embeddings=20, eos_token_id=89)  # fmt: skip
    torch.manual_seed(21)
    clip = CLIPModel(
        CLIPConfig(vision_config=vision | {"hidden_act": act}, text_config=text | {"hidden_act": act}, projection_dim=16)
    )
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return clip.eval()


def open_clip_state(clip: CLIPModel) -> dict[str, torch.Tensor]:
    """The same weights under open_clip's names: its `CLIP` module's attributes, written down by hand."""
    state = {"logit_scale": clip.logit_scale.data, "visual.proj": clip.visual_projection.weight.data.T.contiguous()}
    state["text_projection"] = clip.text_projection.weight.data.T.contiguous()
    vision, text = clip.vision_model, clip.text_model
    state["visual.class_embedding"] = vision.embeddings.class_embedding.data
    state["visual.conv1.weight"] = vision.embeddings.patch_embedding.weight.data
    state["visual.positional_embedding"] = vision.embeddings.position_embedding.weight.data
    state["token_embedding.weight"] = text.embeddings.token_embedding.weight.data
    state["positional_embedding"] = text.embeddings.position_embedding.weight.data
    pairs = {"visual.ln_pre": vision.pre_layrnorm, "visual.ln_post": vision.post_layernorm, "ln_final": text.final_layer_norm}
    for tower, prefix in ((vision, "visual.transformer.resblocks"), (text, "transformer.resblocks")):
        for i, layer in enumerate(tower.encoder.layers):
            block, attention = f"{prefix}.{i}", layer.self_attn
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            state[f"{block}.attn.in_proj_weight"] = torch.cat([projection.weight.data for projection in projections])
            state[f"{block}.attn.in_proj_bias"] = torch.cat([projection.bias.data for projection in projections])
            pairs |= {f"{block}.attn.out_proj": attention.out_proj, f"{block}.ln_1": layer.layer_norm1}
            pairs |= {
                f"{block}.ln_2": layer.layer_norm2,
                f"{block}.mlp.c_fc": layer.mlp.fc1,
                f"{block}.mlp.c_proj": layer.mlp.fc2,
            }
    for name, module in pairs.items():
        state |= {f"{name}.weight": module.weight.data, f"{name}.bias": module.bias.data}
    return state


def open_clip_forward(state: dict, pixels: torch.Tensor, ids: torch.Tensor, quick_gelu: bool):
    """open_clip's encode_image and encode_text, before normalisation."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def transformer(x_BND, prefix, layers, heads, mask):
        for block in (f"{prefix}.{i}" for i in range(layers)):
            attention = torch.nn.MultiheadAttention(x_BND.shape[-1], heads, batch_first=True)
            own = {
                name.removeprefix(f"{block}.attn."): value for name, value in state.items() if name.startswith(f"{block}.attn.")
            }
            attention.load_state_dict(own, strict=True)
            normed = norm(x_BND, f"{block}.ln_1")
            x_BND = x_BND + attention(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
            hidden = F.linear(norm(x_BND, f"{block}.ln_2"), state[f"{block}.mlp.c_fc.weight"], state[f"{block}.mlp.c_fc.bias"])
            hidden = hidden * torch.sigmoid(1.702 * hidden) if quick_gelu else F.gelu(hidden)
            x_BND = x_BND + F.linear(hidden, state[f"{block}.mlp.c_proj.weight"], state[f"{block}.mlp.c_proj.bias"])
        return x_BND

    patches = F.conv2d(pixels, state["visual.conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(len(pixels), 1, -1), patches], 1) + state["visual.positional_embedding"]
    x = transformer(norm(x, "visual.ln_pre"), "visual.transformer.resblocks", 2, 2, None)
    image = norm(x[:, 0], "visual.ln_post") @ state["visual.proj"]

    length = ids.shape[1]
    mask = torch.full((length, length), float("-inf")).triu(1)
    x = state["token_embedding.weight"][ids] + state["positional_embedding"][:length]
    x = norm(transformer(x, "transformer.resblocks", 3, 3, mask), "ln_final")
    return image, x[torch.arange(len(ids)), ids.argmax(-1)] @ state["text_projection"]


def inputs():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 80, (2, 20), generator=generator)
    ids[0, 7:], ids[1, 12:] = 0, 0
    ids[0, 7], ids[1, 12] = 89, 89  # the end token has the highest id, the padding is 0
    return torch.randn(2, 3, 32, 32, generator=generator), ids


@torch.no_grad()
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_value_equality_with_the_open_clip_forward_and_bit_equality_with_the_stock_model(quick_gelu, tmp_path):
    clip = stock_clip("quick_gelu" if quick_gelu else "gelu")
    state = open_clip_state(clip)
    torch.save(state, tmp_path / "weights.pt")
    model = ClocModel.from_clip(tmp_path / "weights.pt", open_clip_config={**MODEL, "quick_gelu": quick_gelu}).eval()
    pixels, ids = inputs()
    image, text = open_clip_forward(state, pixels, ids, quick_gelu)
    torch.testing.assert_close(model.encode_image(pixels).feat, image, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.encode_text(ids), text, rtol=1e-6, atol=1e-6)
    other = open_clip_forward(state, pixels, ids, not quick_gelu)[0]
    assert (other - image).abs().max() > 1e-3  # the activation shows
    assert torch.equal(model.encode_image(pixels).feat, clip.get_image_features(pixels).pooler_output)
    assert torch.equal(model.encode_text(ids), clip.get_text_features(ids).pooler_output)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in clip.state_dict().items())


def hub_folder(folder: Path, state: dict, **config) -> Path:
    """As open_clip's push_to_hf_hub writes it, with timm's config.json beside it."""
    folder.mkdir()
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bicubic", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {**MODEL, **config}, "preprocess_cfg": preprocess}))
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch8_clip_32"}))
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


def small_tokenizer(folder: Path, tiny_processor) -> Path:
    tiny_processor.tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def test_a_hub_folder_is_an_encoder_like_any_other(tiny_processor, tmp_path):
    clip = stock_clip("quick_gelu")
    folder = hub_folder(tmp_path / "hub", open_clip_state(clip), quick_gelu=True)
    assert folder_kind(folder) == folder_kind(folder / "open_clip_model.safetensors") == "open_clip"
    loaded = load_encoder(folder)
    assert type(loaded) is CLIPModel and weights_hash(loaded) == weights_hash(clip)
    reckoned = meta_encoder(PretrainConfig(shards="", output="", init=str(folder), objective="clip"), LossConfig())
    assert {name: reckoned.state_dict()[name].shape for name in clip.state_dict()} == {
        name: value.shape for name, value in clip.state_dict().items()
    }
    assert reckoned.config.vision_config.hidden_act == "quick_gelu"
    pixels, _ = inputs()
    tower = load_vision_tower(folder / "open_clip_model.safetensors")
    assert torch.equal(tower(pixel_values=pixels).last_hidden_state, clip.vision_model(pixel_values=pixels).last_hidden_state)
    assert from_clip(folder, image_size=48).config.vision_config.image_size == 48

    with pytest.raises(DataError, match="hub has no tokenizer; name the folder of the one it was trained with"):
        load_processor(folder)
    small_tokenizer(folder, tiny_processor)
    if len(tiny_processor.tokenizer) > 90:
        with pytest.raises(DataError, match="the text tower 90; name the tokenizer that the tower was trained with"):
            load_processor(folder)
    processor = load_processor(folder, open_clip_config={**MODEL, "text_cfg": {**TEXT, "vocab_size": 96}})
    assert processor.image_processor.size == 32 and processor.image_processor.geometry == "pad"
    assert processor.texts(["red " * 60])["input_ids"].shape == (1, 20)
    pictures = load_processor(folder / "open_clip_model.safetensors", small_tokenizer(tmp_path / "words", tiny_processor),
                              open_clip_config=processor_config(folder))  # fmt: skip
    assert (pictures.image_processor.image_mean, pictures.image_processor.image_std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


def processor_config(folder: Path) -> dict:
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["vocab_size"] = 96
    return config


@torch.no_grad()
def test_training_checkpoints_custom_text_towers_and_openai_scalars(tmp_path):
    clip = stock_clip("gelu")
    state = open_clip_state(clip)
    towers = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
    custom = {f"module.{'text.' if name.startswith(towers) else ''}{name}": value for name, value in state.items()}
    torch.save(
        {"epoch": 3, "name": "run", "state_dict": custom, "optimizer": {"state": {}, "param_groups": []}}, tmp_path / "a.pt"
    )
    openai = {**state, "input_resolution": torch.tensor(32), "context_length": torch.tensor(20), "vocab_size": torch.tensor(90)}
    torch.save({name: value.half() if value.is_floating_point() else value for name, value in openai.items()}, tmp_path / "b.bin")
    for file, reference in (("a.pt", state), ("b.bin", {name: value.half().float() for name, value in state.items()})):
        model = from_clip(tmp_path / file, open_clip_config={**MODEL, "custom_text": file == "a.pt"})
        assert model.dtype == torch.float32
        assert torch.equal(model.visual_projection.weight, reference["visual.proj"].T)
        thirds = reference["transformer.resblocks.2.attn.in_proj_weight"].chunk(3)
        assert torch.equal(model.text_model.encoder.layers[2].self_attn.k_proj.weight, thirds[1])


def test_quick_gelu_by_the_user_wins_over_the_configuration(tmp_path):
    """OpenAI's weights are QuickGELU, also under the configuration ViT-B-32, which does not say so."""
    torch.save(open_clip_state(stock_clip("gelu")), tmp_path / "weights.pt")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(MODEL))
    acts = [from_clip(tmp_path / "weights.pt", quick_gelu=choice).config.text_config.hidden_act for choice in (None, True, False)]
    assert acts == ["gelu", "quick_gelu", "gelu"]


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda state: state.update({"logit_bias": torch.zeros(())}), r"1 unused parameters \(logit_bias\)"),
        (lambda state: state.update({"visual.transformer.resblocks.0.ls_1.gamma": torch.zeros(32)}), r"unused .*ls_1.gamma"),
        (lambda state: state.pop("ln_final.bias"), r"1 missing parameters \(text_model.final_layer_norm.bias\)"),
        (
            lambda state: state.update({"visual.positional_embedding": torch.zeros(26, 32)}),
            r"1 parameters of another size \(vision_model.embeddings.position_embedding.weight \(26, 32\) not \(17, 32\)\)",
        ),
    ],
)
def test_unused_missing_and_unfitting_parameters_are_named(change, sentence, tmp_path):
    state = open_clip_state(stock_clip("gelu"))
    change(state)
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(DataError, match=sentence):
        from_clip(tmp_path / "weights.pt", open_clip_config=MODEL)


@pytest.mark.parametrize(
    "config, sentence",
    [
        (
            {"vision_cfg": {"timm_model_name": "vit_base_patch16_siglip_224"}},
            'vision_cfg.timm_model_name is "vit_base.*plain CLIP',
        ),
        ({"vision_cfg": {**VISION, "layers": [3, 4, 6, 3]}}, "a ResNet; CLOC needs the image tokens of a ViT"),
        ({"vision_cfg": {**VISION, "attentional_pool": True}}, "vision_cfg.attentional_pool is true"),
        ({"vision_cfg": {**VISION, "pool_type": "avg"}}, 'vision_cfg.pool_type is "avg"'),
        ({"text_cfg": {**TEXT, "hf_model_name": "roberta-base"}}, "text_cfg.hf_model_name"),
        ({"text_cfg": {**TEXT, "no_causal_mask": True}}, "text_cfg.no_causal_mask is true"),
        ({"multimodal_cfg": {"layers": 2}}, "multimodal_cfg is"),
        ({"text_cfg": None}, "text_cfg"),
    ],
)
def test_other_members_of_the_family_are_refused_by_the_field_that_says_so(config, sentence, tmp_path):
    torch.save({}, tmp_path / "weights.pt")
    model = {**MODEL, **config}
    if model["text_cfg"] is None:
        del model["text_cfg"]
    with pytest.raises(DataError, match=sentence):
        from_clip(tmp_path / "weights.pt", open_clip_config=model)


class Rogue:
    """An object whose unpickling would call a function."""

    def __reduce__(self):
        return (print, ("unpickled",))


def test_only_plain_tensors_are_read(tmp_path, capsys):
    torch.save({"state_dict": Rogue()}, tmp_path / "rogue.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "jit.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    for name in ("rogue.pt", "jit.pt", "cut.safetensors"):
        with pytest.raises(DataError, match=f"{name}: no plain state dict can be read from it .*or take its Hugging Face folder"):
            from_clip(tmp_path / name, open_clip_config=MODEL)
    assert "unpickled" not in capsys.readouterr().out
    with pytest.raises(DataError, match="open_clip_config.json does not exist, and weights of open_clip alone do not say heads"):
        from_clip(tmp_path / "rogue.pt")


@torch.no_grad()
def test_convert_script_takes_open_clip_weights(tiny_processor, tmp_path, monkeypatch):
    clip = stock_clip("quick_gelu")
    state = open_clip_state(clip)
    state["token_embedding.weight"] = torch.cat([state["token_embedding.weight"], torch.zeros(10, 24)])
    torch.save(state, tmp_path / "weights.pt")
    (tmp_path / "model.json").write_text(json.dumps({**MODEL, "text_cfg": {**TEXT, "vocab_size": 100}}))
    small_tokenizer(tmp_path / "words", tiny_processor)
    arguments = ["--to", "cloc", tmp_path / "weights.pt", tmp_path / "cloc", "--open-clip-config", tmp_path / "model.json",
                 "--quick-gelu", "true", "--tokenizer", tmp_path / "words", "--image-size", "48"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        run_main(runpy.run_path(str(SCRIPT))["main"])
    assert stopped.value.code == 0
    model, processor = load_encoder(tmp_path / "cloc"), load_processor(tmp_path / "cloc")
    assert type(model) is ClocModel and model.config.vision_config.hidden_act == "quick_gelu"
    assert model.config.vision_config.image_size == processor.image_processor.size == 48
    assert torch.equal(model.visual_projection.weight, clip.visual_projection.weight)
    assert processor.texts(["red " * 60])["input_ids"].shape == (1, 20)
