"""A codec in a recipe: its tokens in vocabulary and embeddings, kept by the folder, and used by who loads it."""

import json

import pytest
import torch
from mllm_fixtures import recipe, write_clip, write_conversations
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from encoder.errors import DataError
from mllm.checkpoint import load_mllm
from mllm.config import MllmConfig, check_identity
from mllm.costs import meta_mllm
from mllm.generation import GroundingModel
from mllm.model import build_mllm
from mllm.training import train

BOX = torch.tensor([0.0125, 0.3451, 0.6785, 0.9001])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_conversations(folder, 4)
    write_clip(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def trained(world):
    return train(MllmConfig(**recipe(world, codec="loc_tokens", max_steps=2, save_every=0)))


def test_a_box_is_four_learned_tokens_that_survive_saving(world, trained):
    model, tokenizer, settings = load_mllm(trained)
    assert settings.codec == "loc_tokens"
    grounding = GroundingModel.from_pretrained(trained)
    text = grounding.codec.encode(BOX)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<loc_12>", "<loc_345>", "<loc_678>", "<loc_900>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == model.lm_head.out_features
    before = build_mllm(MllmConfig(**recipe(world, codec="loc_tokens"))).model.get_input_embeddings().weight
    moved = (model.get_input_embeddings().weight - before.bfloat16()).abs().amax(1)
    assert (moved[tokenizer.convert_tokens_to_ids([f"<loc_{n}>" for n in range(1000)])] > 1e-4).any()
    # A question names a region with the folder's own codec.
    _, question = grounding._prompt_ids(Image.new("RGB", (40, 40)), "What is <region>?", [(10, 10, 30, 30)])
    assert "What is <loc_250><loc_250><loc_750><loc_750>?" in tokenizer.decode(question)
    assert grounding.decode_box("<loc_250><loc_250><loc_750><loc_750>", (40, 40))[0] == pytest.approx((10.02,) * 2 + (30.02,) * 2)


def test_going_on_from_a_folder_takes_its_codec(world, trained):
    more = build_mllm(MllmConfig(**recipe(world, model=str(trained))))
    assert more.settings.codec == "loc_tokens"
    with pytest.raises(DataError, match="codec is float3, but the MLLM .* was trained with loc_tokens; drop codec"):
        build_mllm(MllmConfig(**recipe(world, model=str(trained), codec="float3")))


def test_a_run_of_a_version_that_wrote_the_codec_down_goes_on(world, trained, tmp_path):
    config = MllmConfig(**recipe(world, model=str(trained)))
    (tmp_path / "run.json").write_text(json.dumps({**config.identity(), "codec": "loc_tokens"}))
    check_identity(tmp_path, config)


def test_a_language_model_of_a_folder_grows_by_the_tokens(world, trained, tmp_path):
    tokenizer = build_mllm(MllmConfig(**recipe(world))).tokenizer
    torch.manual_seed(1)
    llm = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    )
    llm.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = MllmConfig(**recipe(world, llm_preset=None, llm=str(tmp_path), codec="loc_tokens"))
    built = build_mllm(config)
    assert len(built.tokenizer) == len(tokenizer) + 1000 <= built.model.get_input_embeddings().num_embeddings
    assert torch.equal(built.model.get_input_embeddings().weight[: len(tokenizer)], llm.get_input_embeddings().weight)
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (meta_mllm(config), built.model)]
    assert shapes[0] == shapes[1]
    with pytest.raises(DataError, match="codec loc_tokens gives the language model new tokens, but train lacks llm"):
        MllmConfig(**recipe(world, llm_preset=None, llm=str(tmp_path), codec="loc_tokens", train=["projector"]))
