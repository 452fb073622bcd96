"""Checkpoints in the llava repository's layout, written here by hand under its own names, in and out."""

import json
import pickle
import runpy
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from mllm_fixtures import recipe, write_clip, write_conversations
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from encoder.errors import DataError, run_main
from mllm import training
from mllm.checkpoint import load_mllm, save_mllm
from mllm.config import MllmConfig
from mllm.convert import read_llava, write_llava
from mllm.model import build_mllm
from mllm.tokenizer import train_sentencepiece

SCRIPT = Path(__file__).parents[1] / "scripts" / "convert_checkpoint.py"
# config.json of liuhaotian/llava-v1.5-7b, with the sizes of a small one.
CONFIG = {
    "architectures": ["LlavaLlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "freeze_mm_mlp_adapter": False,
    "freeze_mm_vision_resampler": False, "hidden_act": "silu", "hidden_size": 24, "image_aspect_ratio": "pad",
    "initializer_range": 0.02, "intermediate_size": 40, "max_position_embeddings": 256, "mm_hidden_size": 32,
    "mm_projector_type": "mlp2x_gelu", "mm_resampler_type": None, "mm_use_im_patch_token": False, "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2, "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "model_type": "llava_llama", "num_attention_heads": 2, "num_hidden_layers": 2, "num_key_value_heads": 2,
    "pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 5000.0,
    "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.31.0", "tune_mm_mlp_adapter": False,
    "tune_mm_vision_resampler": False, "unfreeze_mm_vision_tower": False, "use_cache": True, "use_mm_proj": True,
}  # fmt: skip
TOWER = "model.vision_tower.vision_tower.vision_model."
PROJECTOR = {f"model.mm_projector.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Tower, language model and projector of a LLaVA: folders `clip` and `vicuna`, and the whole state by their names."""
    folder = tmp_path_factory.mktemp("llava")
    write_clip(folder / "clip")
    write_conversations(folder, 4)
    texts = ["a red bus left of the small blue bird, where is it?", "USER: ASSISTANT: [0.12, 0.34, 0.56, 0.78]"]
    (folder / "vicuna").mkdir()
    (folder / "vicuna" / "tokenizer.model").write_bytes(train_sentencepiece(texts, 380))
    words = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>", "add_bos_token": True}
    (folder / "vicuna" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **words}))
    torch.manual_seed(3)
    sizes = {key: value for key, value in CONFIG.items() if key in LlamaConfig().to_dict() and key != "architectures"}
    llm = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=380, rope_theta=5000.0)).half()
    llm.save_pretrained(folder / "vicuna")
    tower = CLIPVisionModel.from_pretrained(folder / "clip")
    tower.post_layernorm.bias.data += 0.5  # as after tuning: not the folder's
    state = dict(llm.state_dict())
    state |= {TOWER + name: value.half() for name, value in tower.state_dict().items()}
    for name, shape in zip(sorted(PROJECTOR), [(24,), (24, 32), (24,), (24, 24)], strict=True):
        state[name] = (0.3 * torch.randn(shape)).half()
    return folder, state


def write_whole(folder: Path, state: dict, vicuna: Path, **fields) -> Path:
    """Two shards, an index, buffers that older code saved, and the slow tokenizer: as LLaVA's trainer leaves them."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 380, **fields}))
    state = state | {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6),
        TOWER + "embeddings.position_ids": torch.arange(26)[None],
    }
    names, where = sorted(state), {}
    for number, part in enumerate((names[:20], names[20:]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: state[name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / name).write_bytes((vicuna / name).read_bytes())
    return folder


def forward(state: dict, llm: LlamaForCausalLM, tower: CLIPVisionModel, ids: list[int], pixels: torch.Tensor) -> torch.Tensor:
    """LLaVA's forward: the mark -200 is replaced by what the projector makes of the patches."""
    patches = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    weight = {name: value.float() for name, value in state.items() if "mm_projector" in name}
    prefix = "model.mm_projector"
    tokens = torch.nn.functional.linear(patches, weight[f"{prefix}.0.weight"], weight[f"{prefix}.0.bias"])
    tokens = torch.nn.functional.gelu(tokens)
    tokens = torch.nn.functional.linear(tokens, weight[f"{prefix}.2.weight"], weight[f"{prefix}.2.bias"])
    mark, embed = ids.index(-200), llm.get_input_embeddings()
    before, after = embed(torch.tensor([ids[:mark]])), embed(torch.tensor([ids[mark + 1 :]]))
    return llm(inputs_embeds=torch.cat([before, tokens, after], dim=1)).logits


IDS, PIXELS = [1, 7, 9, -200, 20, 30, 11], torch.randn(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def check_logits(model, state: dict, llm: LlamaForCausalLM, tower: CLIPVisionModel) -> None:
    marks = [model.config.image_token_id] * 25
    ids = torch.tensor([[i for token in IDS for i in (marks if token == -200 else [token])]])
    expected = forward(state, llm.float().eval(), tower.float().eval(), IDS, PIXELS)
    got = model.float()(input_ids=ids, pixel_values=PIXELS).logits
    torch.testing.assert_close(got[..., :380], expected, atol=1e-5, rtol=1e-4)


def language_model(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder / "vicuna", dtype=torch.float16)


@pytest.fixture(scope="module")
def read(parts, tmp_path_factory):
    """A whole LLaVA, read and saved as an MLLM folder."""
    folder, state = parts
    whole = write_whole(folder / "whole", state, folder / "vicuna")
    mllm = read_llava(whole, tower=folder / "clip")
    save_mllm(folder / "mllm", mllm.model, mllm.tokenizer, mllm.settings, torch.float16, None, mllm.sentencepiece_model)
    return folder / "mllm"


def test_a_whole_llava_gives_its_own_logits(parts, read):
    folder, state = parts
    model, tokenizer, settings = load_mllm(read)
    tower = CLIPVisionModel.from_pretrained(folder / "clip")
    tower.load_state_dict({name.removeprefix(TOWER): value for name, value in state.items() if name.startswith(TOWER)})
    check_logits(model, state, language_model(folder), tower)
    read_as = settings.codec, settings.template, settings.dtype, settings.image.mode
    assert read_as == ("float2", "vicuna_v1", "float16", "pad_first")
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "<image>\nwhere is it?"}], tokenize=False)
    assert prompt.endswith("questions. USER: <image>\nwhere is it? ASSISTANT:")
    assert build_mllm(MllmConfig(**recipe(folder, model=str(read), codec="float2"))).model.config.text_config.vocab_size >= 381


def test_out_again_every_name_and_bit_is_the_same(parts, read, tmp_path):
    folder, state = parts
    write_llava(read, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(written[name][: len(value)], value), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    ours = {"mm_vision_tower", "transformers_version", "torch_dtype", "vocab_size", "pad_token_id"}
    gone = {"freeze_mm_vision_resampler", "mm_resampler_type", "tune_mm_vision_resampler"}  # of a module that 1.5 never builds
    assert {key: config[key] for key in CONFIG.keys() - ours - gone} == {key: CONFIG[key] for key in CONFIG.keys() - ours - gone}
    assert config["torch_dtype"] == "float16" and Path(config["mm_vision_tower"]).is_dir()
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (folder / "vicuna" / "tokenizer.model").read_bytes()
    tower = load_file(Path(config["mm_vision_tower"]) / "model.safetensors")
    assert all(torch.equal(tower["vision_model." + name.removeprefix(TOWER)], state[name]) for name in state if TOWER in name)
    again = read_llava(tmp_path / "out")
    for (name, a), b in zip(load_mllm(read)[0].half().state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_projector_alone_in_both_directions(parts, read, tmp_path):
    folder, state = parts
    write_llava(read, tmp_path / "out", kind="projector")
    projector = torch.load(tmp_path / "out" / "mm_projector.bin", weights_only=True)
    assert projector.keys() == PROJECTOR and all(torch.equal(projector[name], state[name]) for name in PROJECTOR)
    # Training may start from it: a file or its folder.
    base = recipe(folder, llm_preset=None, llm=str(folder / "vicuna"), template="vicuna_v1")
    for given in (tmp_path / "out", tmp_path / "out" / "mm_projector.bin"):
        built = build_mllm(MllmConfig(**base, projector=str(given))).model
        assert torch.equal(built.model.multi_modal_projector.linear_2.weight.half(), state["model.mm_projector.2.weight"])
    mllm = read_llava(tmp_path / "out", tower=folder / "clip", llm=folder / "vicuna")
    check_logits(mllm.model, state, language_model(folder), CLIPVisionModel.from_pretrained(folder / "clip", dtype=torch.float16))
    with pytest.raises(DataError, match="projector or LoRA alone; name the folder of its language model"):
        read_llava(tmp_path / "out", tower=folder / "clip")


def test_a_linear_projector_is_one_layer_there(parts, tmp_path):
    folder, state = parts
    mlp = {name: value for name, value in state.items() if "mm_projector" not in name}
    linear = {"model.mm_projector.weight": torch.randn(24, 32).half(), "model.mm_projector.bias": torch.randn(24).half()}
    mllm = read_llava(write_whole(tmp_path / "in", mlp | linear, folder / "vicuna", mm_projector_type="linear"), folder / "clip")
    features = torch.randn(5, 32)
    expected = features @ linear["model.mm_projector.weight"].float().T + linear["model.mm_projector.bias"].float()
    torch.testing.assert_close(mllm.model.float().model.multi_modal_projector(features), expected)
    save_mllm(tmp_path / "mllm", mllm.model, mllm.tokenizer, mllm.settings, torch.float16, None, mllm.sentencepiece_model)
    write_llava(tmp_path / "mllm", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == (mlp | linear).keys() and all(torch.equal(written[name], linear[name]) for name in linear)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mm_projector_type"] == "linear"
    torch.save(linear, tmp_path / "mm_projector.bin")
    base = recipe(
        folder, llm_preset=None, llm=str(folder / "vicuna"), template="vicuna_v1", projector=str(tmp_path / "mm_projector.bin")
    )
    assert build_mllm(MllmConfig(**base, projector_type="linear")).model.config.projector_hidden_act == "linear"
    with pytest.raises(DataError, match="is of projector_type linear; pass that, or leave projector out"):
        build_mllm(MllmConfig(**base))


def test_lora_is_merged_and_its_names_are_checked(parts, tmp_path):
    folder, state = parts
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = get_peft_model(language_model(folder).float(), LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    torch.manual_seed(5)
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    adapter = tmp_path / "llava-v1.5-lora"
    lora.save_pretrained(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    tensors = {name: value.half() for name, value in get_peft_model_state_dict(lora).items()}
    torch.save(tensors, adapter / "adapter_model.bin")
    projector = {f"base_model.model.{name}": state[name] for name in PROJECTOR}
    torch.save(projector, adapter / "non_lora_trainables.bin")
    (adapter / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 380}))
    mllm = read_llava(adapter, tower=folder / "clip", llm=folder / "vicuna")
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_" in name:
                parameter.copy_(tensors[name.replace(".default", "")])
    marks = [mllm.model.config.image_token_id] * 25
    ids = torch.tensor([[i for token in IDS for i in (marks if token == -200 else [token])]])
    with torch.no_grad():
        expected = forward(state, lora.eval(), CLIPVisionModel.from_pretrained(folder / "clip"), IDS, PIXELS)
        got = mllm.model.float()(input_ids=ids, pixel_values=PIXELS).logits
        plain = forward(state, language_model(folder).float(), CLIPVisionModel.from_pretrained(folder / "clip"), IDS, PIXELS)
    torch.testing.assert_close(got[..., :380], expected, atol=5e-3, rtol=1e-2)  # merged in float16
    assert (expected - plain).abs().max() > 0.1
    torch.save(dict(list(tensors.items())[1:]), adapter / "adapter_model.bin")
    with pytest.raises(DataError, match="adapter_model.bin: 1 parameters are missing and 0 have no place in the language model"):
        read_llava(adapter, tower=folder / "clip", llm=folder / "vicuna")


def test_tied_embeddings_are_written_and_not_the_head(parts, tmp_path):
    """As in SmolLM2 or small Qwens: stock loaders of tied models read the embeddings and leave the head out."""
    folder, _ = parts
    llm = language_model(folder).config
    llm.tie_word_embeddings = True
    LlamaForCausalLM(llm).float().save_pretrained(tmp_path / "llm")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / "llm" / name).write_bytes((folder / "vicuna" / name).read_bytes())
    mllm = build_mllm(MllmConfig(**recipe(folder, llm_preset=None, llm=str(tmp_path / "llm"), template="vicuna_v1")))
    save_mllm(tmp_path / "mllm", mllm.model, mllm.tokenizer, mllm.settings, torch.float32, None, mllm.sentencepiece_model)
    write_llava(tmp_path / "mllm", tmp_path / "out")
    for saved, embeddings in (("mllm", "language_model.model.embed_tokens.weight"), ("out", "model.embed_tokens.weight")):
        names = load_file(tmp_path / saved / "model.safetensors").keys()
        assert embeddings in names and not any("lm_head" in name for name in names)
    for model in (load_mllm(tmp_path / "mllm")[0], read_llava(tmp_path / "out").model):
        assert model.lm_head.weight is model.get_input_embeddings().weight
        for (name, a), b in zip(mllm.model.state_dict().items(), model.state_dict().values(), strict=True):
            assert torch.equal(a, b), name


def test_a_tokenizer_of_our_own_survives_both_ways(parts, tmp_path):
    folder, _ = parts
    mllm = build_mllm(MllmConfig(**recipe(folder)))
    save_mllm(tmp_path / "own", mllm.model, mllm.tokenizer, mllm.settings, torch.float32, None, mllm.sentencepiece_model)
    write_llava(tmp_path / "own", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    # What LLaVA's code asks for: the slow tokenizer, which reads tokenizer.model as sentencepiece does.
    assert (config["tokenizer_class"], config["legacy"]) == ("LlamaTokenizer", True)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out" / "tokenizer.model"))
    again, text = read_llava(tmp_path / "out").tokenizer, "USER: Where is the red square? ASSISTANT: [012, 345, 678, 999]"
    assert again(text)["input_ids"] == mllm.tokenizer(text)["input_ids"] == pieces.encode(text)


def test_lora_of_an_adapter_folder_goes_out_and_comes_back(parts, tmp_path):
    folder, _ = parts
    base = {
        "llm_preset": None,
        "llm": str(folder / "vicuna"),
        "template": "vicuna_v1",
        "max_length": 800,
        "save_dtype": "float32",
    }
    lora = {"train": ["projector", "llm_lora"], "lora_rank": 4, "lora_alpha": 8.0, "save_adapter": True, "learning_rate": 0.05}
    adapter = training.train(MllmConfig(**recipe(folder, output=str(tmp_path / "adapter"), max_steps=2, **base, **lora)))
    write_llava(adapter, tmp_path / "out", kind="lora")
    assert {"adapter_config.json", "adapter_model.bin", "non_lora_trainables.bin"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    names = torch.load(tmp_path / "out" / "adapter_model.bin", weights_only=True)
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 380
    again = read_llava(tmp_path / "out", llm=folder / "vicuna").model.float()
    ours = load_mllm(adapter)[0]
    before = language_model(folder).model.layers[0].mlp.up_proj.weight.float()
    learned = ours.model.language_model.layers[0].mlp.up_proj.weight - before
    assert learned.abs().max() > 1e-3
    torch.testing.assert_close(again.model.language_model.layers[0].mlp.up_proj.weight - before, learned, atol=2e-4, rtol=0)
    ids = torch.tensor([[1, *[ours.config.image_token_id] * 25, 20, 30]])
    with torch.no_grad():
        expected = ours(input_ids=ids, pixel_values=PIXELS).logits
        torch.testing.assert_close(
            again(input_ids=ids, pixel_values=PIXELS).logits[..., :380], expected[..., :380], atol=0.02, rtol=0.02
        )


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda state: state.update({"model.image_newline": torch.ones(24)}), r"1 unexpected keys \(model.image_newline\)"),
        (lambda state: state.pop("model.layers.1.mlp.up_proj.weight"), r"1 missing keys \(model.layers.1.mlp.up_proj.weight\)"),
        (lambda state: state.pop(TOWER + "pre_layrnorm.bias"), r"1 missing keys \(pre_layrnorm.bias\)"),
        (lambda state: state.update({"lm_head.weight": torch.ones(379, 24)}), "1 mismatched keys .*lm_head.weight"),
        (lambda state: state.pop("model.mm_projector.2.bias"), "the projector in .* has or lacks linear_2.bias"),
        (lambda state: state.update({"model.mm_projector.0.weight": torch.ones(24, 48)}), "takes features of width 48"),
    ],
)
def test_unused_missing_and_unfitting_parameters_are_named(parts, tmp_path, change, sentence):
    folder, state = parts
    state = dict(state)
    change(state)
    with pytest.raises(DataError, match=sentence):
        read_llava(write_whole(tmp_path / "x", state, folder / "vicuna"), tower=folder / "clip")


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type is 'mlp3x_gelu', only mlp2x_gelu or linear is read"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch', only patch"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres', so it was trained on tiles; only pad"),
        ({"image_aspect_ratio": "square"}, "is 'square', so it was trained on the middle of each picture, which cuts boxes off"),
        ({"image_aspect_ratio": None}, "image_aspect_ratio is 'None', so it was trained on the middle"),
        ({"model_type": "llama"}, "model_type is 'llama'; it is of no LLaVA"),
    ],
)
def test_a_configuration_that_cannot_be_followed_is_refused_by_its_field(parts, tmp_path, fields, sentence):
    folder, state = parts
    with pytest.raises(DataError, match=sentence):
        read_llava(write_whole(tmp_path / "x", state, folder / "vicuna", **fields), tower=folder / "clip")


def test_the_tower_must_be_at_hand_and_no_pickle_runs(parts, tmp_path):
    folder, state = parts
    whole = write_whole(tmp_path / "x", state, folder / "vicuna")
    with pytest.raises(DataError, match="openai/clip-vit-large-patch14-336 of .* is no folder on this machine; name"):
        read_llava(whole)

    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (whole / "pytorch_model-00001-of-00002.bin").write_bytes(pickle.dumps({"model.norm.weight": Code()}))
    with pytest.raises(DataError, match="00001-of-00002.bin holds no plain tensors by name"):
        read_llava(whole, tower=folder / "clip")
    assert not (tmp_path / "ran").exists()
    (whole / "pytorch_model-00001-of-00002.bin").unlink()
    with pytest.raises(DataError, match="lacks 1 files of its index"):
        read_llava(whole, tower=folder / "clip")


def test_what_llavas_layout_has_no_place_for_is_refused(parts, tmp_path):
    folder, _ = parts
    mllm = build_mllm(MllmConfig(**recipe(folder, feature_layer=[-1, -2])))
    save_mllm(tmp_path / "two", mllm.model, mllm.tokenizer, mllm.settings, torch.float32)
    with pytest.raises(DataError, match=r"no form in LLaVA-1.5's layout: it projects the layers \[-1, -2\]"):
        write_llava(tmp_path / "two", tmp_path / "out")


def test_the_script_goes_both_ways(parts, read, tmp_path, monkeypatch, capsys):
    folder, _ = parts

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, arguments)])
        run_main(runpy.run_path(str(SCRIPT))["main"])

    for words, holds in ((["--to", "llava"], "model.safetensors"), (["--to", "llava_projector"], "mm_projector.bin")):
        with pytest.raises(SystemExit, match="0"):
            run(*words, read, tmp_path / holds)
        assert (tmp_path / holds / holds).is_file()
    with pytest.raises(SystemExit, match="0"):
        run("--to", "mllm", "--tower", folder / "clip", tmp_path / "model.safetensors", tmp_path / "again")
    assert load_mllm(tmp_path / "again")[2].codec == "float2"
    assert "done: " in capsys.readouterr().out
    for words, source, sentence in (
        (["--to", "llava", "--llm", "x"], read, "--llm is given, but --to llava does not read it, --to mllm does"),
        (
            ["--to", "mllm", "--image-size", "448"],
            tmp_path / "model.safetensors",
            "--image-size is given, but --to mllm",
        ),
        (["--to", "mllm", "--tower", "x"], read, "--tower is given, but an adapter folder says that itself"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run(*words, source, tmp_path / "none")
        assert sentence in capsys.readouterr().err and not (tmp_path / "none").exists()
