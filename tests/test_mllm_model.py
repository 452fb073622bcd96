import json
import shutil

import pytest
import torch
from mllm_fixtures import recipe, write_clip, write_conversations
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoProcessor,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from encoder.errors import DataError
from encoder.pretrained import load_vision_tower
from mllm.checkpoint import load_mllm, save_mllm
from mllm.config import MllmConfig
from mllm.generation import GroundingModel
from mllm.model import build_mllm, freeze, part_of, unread
from mllm.projector import fit_projector
from mllm.trainer import parameter_groups


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_conversations(folder, 6)
    write_clip(folder / "clip")
    return folder


@pytest.fixture
def mllm(world):
    return build_mllm(MllmConfig(**recipe(world)))


@pytest.fixture(scope="module")
def saved(world):
    mllm = build_mllm(MllmConfig(**recipe(world)))
    save_mllm(world / "saved", mllm.model, mllm.tokenizer, mllm.settings, torch.bfloat16, None, mllm.sentencepiece_model)
    return world / "saved"


def test_it_is_a_stock_llava_around_the_given_tower(world, mllm):
    assert type(mllm.model) is LlavaForConditionalGeneration
    tower = load_vision_tower(world / "clip")
    for name, value in mllm.model.model.vision_tower.state_dict().items():
        assert torch.equal(value, tower.state_dict()[name]), name
    config = mllm.model.config
    assert (config.image_seq_length, config.vision_feature_layer, config.vision_feature_select_strategy) == (25, -2, "default")
    assert config.image_token_id == mllm.tokenizer.convert_tokens_to_ids("<image>")
    assert not any(p.is_meta for p in mllm.model.parameters()) and not any(b.is_meta for b in mllm.model.buffers())
    assert mllm.model.get_input_embeddings().weight.std().item() == pytest.approx(0.5, rel=0.05)


def test_the_loss_is_llavas_written_out(world, mllm):
    """Embeddings with the projected patches in the marks' places, through the language model, by hand."""
    model, mark = mllm.model.eval(), mllm.model.config.image_token_id
    ids = torch.tensor([[1, *[mark] * 25, 7, 8, 9, 2]])
    labels = torch.full_like(ids, -100)
    labels[0, -3:] = ids[0, -3:]
    pixels = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        patches = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        projector = model.model.multi_modal_projector
        tokens = torch.nn.functional.gelu(patches @ projector.linear_1.weight.T + projector.linear_1.bias)
        tokens = tokens @ projector.linear_2.weight.T + projector.linear_2.bias
        embeds = model.get_input_embeddings()(ids)
        embeds[0, 1:26] = tokens[0]
        logits = model.lm_head(model.model.language_model(inputs_embeds=embeds).last_hidden_state)
        expected = torch.nn.functional.cross_entropy(logits[0, -4:-1], ids[0, -3:])
        got = model(input_ids=ids, pixel_values=pixels, labels=labels).loss
    torch.testing.assert_close(got, expected)


def test_any_causal_language_model_joins(world, mllm, tmp_path):
    torch.manual_seed(1)
    llm = LlamaForCausalLM(
        LlamaConfig(vocab_size=300, hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    )
    llm.save_pretrained(tmp_path)
    mllm.tokenizer.save_pretrained(tmp_path)
    built = build_mllm(MllmConfig(**recipe(world, llm_preset=None, llm=str(tmp_path))))
    assert built.model.get_input_embeddings().num_embeddings >= len(built.tokenizer)
    for name, value in llm.state_dict().items():
        ours = built.model.state_dict()[name if name.startswith("lm_head") else f"model.language_{name}"]
        assert torch.equal(ours[: len(value)], value), name
    with pytest.raises(DataError, match="has no config.json"):
        build_mllm(MllmConfig(**recipe(world, llm_preset=None, llm=str(tmp_path / "none"))))


def test_an_answer_ends_where_the_templates_answers_do(world, mllm, tmp_path):
    """A language model whose end of text is not its end of turn: stock code and ours stop at both."""
    mllm.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    fields = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(mllm.tokenizer), **fields)).save_pretrained(tmp_path)
    mllm.tokenizer.save_pretrained(tmp_path)
    built = build_mllm(MllmConfig(**recipe(world, llm_preset=None, llm=str(tmp_path), template="chatml")))
    ends = [built.tokenizer.eos_token_id, built.tokenizer.convert_tokens_to_ids("<|im_end|>")]
    save_mllm(tmp_path / "chatml", built.model, built.tokenizer, built.settings, torch.float32)
    assert GenerationConfig.from_pretrained(tmp_path / "chatml").eos_token_id == sorted(ends)
    with torch.no_grad():  # <|im_end|> whatever is asked
        built.model.lm_head.weight.zero_()
    built.model.lm_head.weight.data[ends[1]] = 1.0
    model = GroundingModel(built.model, built.tokenizer, built.settings)
    assert model.generate([Image.new("RGB", (40, 40))], ["Where?"], max_new_tokens=50, progress=False) == [""]


def test_the_second_step_of_llava_does_not_stop_at_the_firsts_newline(world, tmp_path):
    """Captions of `plain` end with a newline; an answer of the step after may have several lines, also in stock code."""
    ends = []
    for name, start in (("plain", {}), ("vicuna_v1", {"model": str(tmp_path / "plain")})):
        mllm = build_mllm(MllmConfig(**recipe(world, template=name, **start)))
        save_mllm(tmp_path / name, mllm.model, mllm.tokenizer, mllm.settings, torch.float32)
        ends.append(GenerationConfig.from_pretrained(tmp_path / name).eos_token_id)
    newline = mllm.tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert set(ends[0]) == {mllm.tokenizer.eos_token_id, *newline} and ends[1] == mllm.tokenizer.eos_token_id


def test_fit_projector_centres_scales_and_whitens():
    """A direction a hundred times quieter in variance than the loudest counts as much; next to nothing stays little."""
    torch.manual_seed(0)

    class Config:
        vision_feature_layer, multimodal_projector_bias, projector_hidden_act = -2, True, "gelu"
        vision_config, text_config = type("V", (), {"hidden_size": 24}), type("T", (), {"hidden_size": 64})

    projector = LlavaMultiModalProjector(Config)
    variance = torch.cat([torch.full((2,), 10.0), torch.full((20,), 0.5), torch.full((2,), 1e-6)])
    axes = torch.linalg.qr(torch.randn(24, 24)).Q
    features = torch.randn(8000, 24) * variance.sqrt() @ axes.T + 30 * torch.randn(24)
    fit_projector(projector, features, 0.5)
    with torch.no_grad():
        out = projector(features)
        assert out.std().item() == pytest.approx(0.5, rel=0.02) and out.mean(0).abs().max() < 1e-3
        assert projector.linear_1(features).std().item() == pytest.approx(1.0, rel=0.05)
        # How far the hidden layer moves for one standard deviation along each direction.
        moved = (axes * variance.sqrt() @ torch.eye(24)).T @ projector.linear_1.weight.T
    loud, quiet, silent = (moved[part].norm(dim=1).mean() for part in (slice(0, 2), slice(2, 22), slice(22, 24)))
    assert loud < 1.5 * quiet and silent < 0.02 * quiet


def test_towers_of_one_size_meet_the_same_initial_weights(world):
    write_clip(world / "other_clip", seed=5)
    one, two = (build_mllm(MllmConfig(**recipe(world, tower=str(world / name)))) for name in ("clip", "other_clip"))
    for (name, a), (_, b) in zip(one.model.state_dict().items(), two.model.state_dict().items(), strict=True):
        assert torch.equal(a, b) == (part_of(name) != "tower") or a.std() == 0 or "norm" in name, name


def test_the_saved_folder_is_stock_llava_with_classic_names(saved):
    names = set(load_file(saved / "model.safetensors"))
    assert "vision_tower.vision_model.embeddings.class_embedding" in names
    assert {"language_model.lm_head.weight", "language_model.model.embed_tokens.weight"} <= names
    assert "multi_modal_projector.linear_1.weight" in names
    assert {name.split(".")[0] for name in names} == {"vision_tower", "language_model", "multi_modal_projector"}
    ours, _, settings = load_mllm(saved)
    stock, info = LlavaForConditionalGeneration.from_pretrained(saved, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for (name, a), b in zip(ours.state_dict().items(), stock.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert settings.dtype == "bfloat16" and settings.image.size == 40 and settings.codec == "int1000"
    assert json.loads((saved / "config.json").read_text())["dtype"] == "bfloat16"


def test_transformers_processor_reads_the_folder(saved):
    processor = AutoProcessor.from_pretrained(saved)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == "<s>USER: <image>\nWhere? ASSISTANT:"
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == processor.image_token_id


def test_a_changed_tower_is_noticed(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "changed")
    model, tokenizer, settings = load_mllm(saved)
    model.model.vision_tower.post_layernorm.bias.data += 1
    save_mllm(folder, model, tokenizer, settings, torch.bfloat16)
    shutil.copy(saved / "grounding.json", folder / "grounding.json")
    with pytest.raises(DataError, match="are not those that grounding.json names"):
        load_mllm(folder)


def test_missing_pieces_of_a_folder_are_named(saved, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        load_mllm(tmp_path / "nowhere")
    with pytest.raises(DataError, match="grounding.json does not exist"):
        load_mllm(tmp_path)
    cut = shutil.copytree(saved, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(DataError, match="cut cannot be read"):
        load_mllm(cut)
    other = shutil.copytree(saved, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["vision_config"]["hidden_size"] = 48
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="parameters are missing or of another size"):
        load_mllm(other)
    (other / "grounding.json").write_text('{"codec": "int1000"}')
    with pytest.raises(DataError, match="is not the settings of an MLLM"):
        load_mllm(other)


def test_only_the_named_parts_learn_and_the_rest_is_rounded_as_it_will_be_saved(mllm):
    freeze(mllm.model, {"projector"}, torch.bfloat16)
    for name, parameter in mllm.model.named_parameters():
        assert parameter.requires_grad == (part_of(name) == "projector")
        if not parameter.requires_grad:
            assert torch.equal(parameter, parameter.to(torch.bfloat16).float())


def test_parameter_groups_give_each_part_its_rate(world, mllm):
    config = MllmConfig(
        **recipe(world, train=["projector", "llm", "tower"], tower_learning_rate=2e-6, learning_rate=2e-5, weight_decay=0.1)
    )
    freeze(mllm.model, config.trains, torch.float32)
    groups = parameter_groups(mllm.model, config)
    by_name = {id(p): n for n, p in mllm.model.named_parameters()}
    read = [name for name in by_name.values() if not any(part in name for part in unread(mllm.model))]
    assert sum(len(group["params"]) for group in groups) == len(read) < len(by_name)
    for group in groups:
        parts = {part_of(by_name[id(p)]) for p in group["params"]}
        assert group["lr"] == (2e-6 if parts == {"tower"} else 2e-5) and len(parts) == 1
        assert group["weight_decay"] == (0.1 if group["params"][0].ndim > 1 else 0.0)


def test_a_projector_of_another_size_is_refused(world, saved):
    write_clip(world / "wide_clip", width=48)
    with pytest.raises(DataError, match="takes features of width 32, the tower's are 48 wide"):
        build_mllm(MllmConfig(**recipe(world, tower=str(world / "wide_clip"), projector=str(saved))))
    with pytest.raises(DataError, match="ends at width 32, the language model is 64 wide"):
        build_mllm(MllmConfig(**recipe(world, llm_width=64, projector=str(saved))))
    built = build_mllm(MllmConfig(**recipe(world, projector=str(saved))))
    stock, _, _ = load_mllm(saved)
    for a, b in zip(
        built.model.model.multi_modal_projector.parameters(), stock.model.multi_modal_projector.parameters(), strict=True
    ):
        assert torch.equal(a, b)
    with pytest.raises(DataError, match="holds no Llava projector"):
        build_mllm(MllmConfig(**recipe(world, projector=str(world / "clip"))))


def test_an_mllm_keeps_what_it_was_trained_with(world, saved):
    for field, value in (("feature_layer", -1), ("geometry", "squash")):
        with pytest.raises(DataError, match=f"{field} is {value}, but the MLLM"):
            build_mllm(MllmConfig(**recipe(world, model=str(saved), **{field: value})))
    again = build_mllm(MllmConfig(**recipe(world, model=str(saved))))
    assert not again.from_scratch and again.sentencepiece_model == (saved / "tokenizer.model").read_bytes()


def test_feature_layer_out_of_range(world):
    with pytest.raises(DataError, match="feature_layer is -9, but the tower"):
        build_mllm(MllmConfig(**recipe(world, feature_layer=-9)))


def test_a_bare_vision_tower_is_a_tower_too(world, tmp_path):
    CLIPVisionModel.from_pretrained(world / "clip").save_pretrained(tmp_path)
    built = build_mllm(MllmConfig(**recipe(world, tower=str(tmp_path))))
    assert built.settings.image.size == 40
