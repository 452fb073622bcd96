"""The MLLM's estimate against real models: parameters exactly, arithmetic against torch's count of a real pass."""

import json

import pytest
import torch
from mllm_fixtures import recipe, write_clip, write_conversations
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from encoder.errors import DataError
from mllm.checkpoint import save_mllm
from mllm.config import MllmConfig
from mllm.costs import meta_mllm, mllm_cost, zero_stage
from mllm.model import Mllm, build_mllm, freeze


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_conversations(folder, 6)
    write_clip(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def preset(world) -> Mllm:
    return build_mllm(MllmConfig(**recipe(world)))


def shapes(model) -> dict:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def real_flops(model, rows: int) -> tuple[int, int]:
    """(forward, backward) of one row of `rows` tokens with a picture, through the stock Llava on the CPU."""
    model.set_attn_implementation("eager")
    mark = model.config.image_token_id
    ids = torch.tensor([[1, *[mark] * 25, *[5] * (rows - 26)]])
    counter = FlopCounterMode(display=False)
    with counter:
        loss = model(input_ids=ids, pixel_values=torch.randn(1, 3, 40, 40), labels=ids).loss
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize("train", [["projector"], ["projector", "llm", "tower"]])
def test_a_preset_and_what_of_it_learns(world, preset, train):
    fields = recipe(world, train=["projector", "llm"], vocab_size=len(preset.tokenizer), max_length=32)
    config = MllmConfig(**fields)
    config.train = train  # a preset that does not learn is refused, and costs the same as a model that was loaded
    model = meta_mllm(config)
    assert shapes(model) == shapes(preset.model)
    freeze(preset.model, set(train), torch.float32)
    learned = [{name for name, parameter in m.named_parameters() if parameter.requires_grad} for m in (model, preset.model)]
    assert learned[0] == learned[1]
    cost = mllm_cost(model, config)
    forward, backward = real_flops(preset.model, 32)
    assert cost.forward_flops == pytest.approx(forward, rel=0.02)
    assert cost.backward_flops == pytest.approx(backward, rel=0.05)


def test_a_language_model_in_a_folder_and_an_mllm_in_one(world, preset):
    folder = world / "llm"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "tie_word_embeddings": True}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(preset.tokenizer) - 3, **sizes, **heads)).save_pretrained(folder)
    preset.tokenizer.save_pretrained(folder)
    config = MllmConfig(**recipe(world, llm=str(folder), llm_preset=None, max_length=64))
    real, model = build_mllm(config), meta_mllm(config)
    assert shapes(model) == shapes(real.model)  # the vocabulary grew
    assert mllm_cost(model, config).forward_flops == pytest.approx(real_flops(real.model, 64)[0], rel=0.02)
    save_mllm(world / "saved", real.model, real.tokenizer, real.settings, torch.float32, None, None)
    again = MllmConfig(**recipe(world, model=str(world / "saved"), max_length=64))
    assert shapes(meta_mllm(again)) == shapes(real.model)


@pytest.mark.parametrize("by", ["prompter", "pooling"])
def test_region_tokens_are_counted(world, tiny_folder, by):
    """One region a row; the Prompter's layer over 17 tokens is most of what is added."""
    fields = {"tower": str(tiny_folder), "region_tokens": by, "train": ["projector", "llm", "tower"]}
    real = build_mllm(MllmConfig(**recipe(world, **fields)))
    tokens = len(real.tokenizer) - 1  # the mark is added on top of a preset's pieces
    config = MllmConfig(**recipe(world, **fields, vocab_size=tokens, max_length=64))
    model = meta_mllm(config)
    assert shapes(model) == shapes(real.model)
    real.model.set_attn_implementation("eager")
    ids = torch.tensor([[1, *[real.model.config.image_token_id] * 16, real.model.config.region_token_id, *[5] * 46]])
    regions = {"region_boxes": torch.tensor([[0.1, 0.1, 0.5, 0.5]]), "region_weights": torch.full((1, 16), 1 / 16)}
    pixels, index = torch.randn(1, 3, 32, 32), torch.tensor([0])
    counter = FlopCounterMode(display=False)
    with counter:
        loss = real.model(input_ids=ids, pixel_values=pixels, labels=ids, region_image_index=index, **regions).loss
        forward = counter.get_total_flops()
        loss.backward()
    cost = mllm_cost(model, config)
    assert cost.forward_flops == pytest.approx(forward, rel=0.01)
    assert cost.backward_flops == pytest.approx(counter.get_total_flops() - forward, rel=0.05)
    plain = MllmConfig(**recipe(world, **fields | {"region_tokens": None}, vocab_size=tokens, max_length=64))
    assert cost.forward_flops > mllm_cost(meta_mllm(plain), plain).forward_flops


def test_cached_features_spare_the_tower(world):
    config, cached = (MllmConfig(**recipe(world, max_length=64, cache_features=value)) for value in (False, True))
    assert mllm_cost(meta_mllm(cached), cached).forward_flops < mllm_cost(meta_mllm(config), config).forward_flops


def test_stages_and_refusals(world, tmp_path):
    config = MllmConfig(**recipe(world))
    assert zero_stage(config, 1) is None and zero_stage(config, 8) == 2
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    assert zero_stage(MllmConfig(**recipe(world, zero=str(tmp_path / "zero.json"))), 1) == 3
    (tmp_path / "zero.json").write_text("{")
    with pytest.raises(DataError, match="zero.json, line 1: not JSON"):
        zero_stage(MllmConfig(**recipe(world, zero=str(tmp_path / "zero.json"))), 1)
    with pytest.raises(DataError, match="nowhere/config.json does not exist"):
        meta_mllm(MllmConfig(**recipe(world, llm="nowhere", llm_preset=None)))
    with pytest.raises(DataError, match="holds a model of type 'clip.*'; give the folder of a causal language model"):
        meta_mllm(MllmConfig(**recipe(world, llm=recipe(world)["tower"], llm_preset=None)))
    short = MllmConfig(**recipe(world, max_length=20))
    with pytest.raises(DataError, match="max_length 20 leaves no room beside 25 image tokens"):
        mllm_cost(meta_mllm(short), short)
