"""LoRA and low bits: training, what is written, reloading and resuming, against peft's own loading and merging."""

import json
import shutil

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from mllm_fixtures import recipe, write_clip, write_conversations
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from encoder.errors import DataError
from mllm import training
from mllm.adapter_folder import merge_adapter
from mllm.checkpoint import load_mllm
from mllm.config import MllmConfig
from mllm.model import build_mllm, part_of
from mllm.training import train

RATES = {"learning_rate": 1e-2, "projector_learning_rate": 3e-3}
LORA = {"lora_rank": 4, "lora_alpha": 8.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_conversations(folder, 8, text_only=1)
    write_clip(folder / "clip")
    train(MllmConfig(**recipe(folder, output=str(folder / "base"), max_steps=2, save_every=0)))
    return folder


def run(world, name: str, **fields):
    values = recipe(world, model=str(world / "base"), output=str(world / name), **RATES)
    values |= LORA if any("lora" in part for part in fields["train"]) else {}
    return train(MllmConfig(**values | fields))


def logits_of(folder) -> torch.Tensor:
    model = folder if isinstance(folder, torch.nn.Module) else load_mllm(folder)[0]
    torch.manual_seed(0)
    ids = torch.tensor([[1, *[model.config.image_token_id] * 25, 7, 8, 9, 2]])
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=torch.randn(1, 3, 40, 40)).logits


@pytest.fixture(scope="module")
def merged_and_adapter(world):
    parts = {"train": ["projector", "llm_lora", "tower_lora"], "lora_dropout": 0.1}
    return run(world, "merged", **parts), run(world, "adapter", save_adapter=True, **parts)


def test_merged_is_stock_llava_and_only_the_linear_layers_moved(world, merged_and_adapter):
    before, after = (load_file(world / name / "model.safetensors") for name in ("base", "merged"))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    llm = {n for n in moved if "language_model" in n}
    assert {n.split(".")[-2] for n in llm} == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {n.split(".")[-2] for n in moved if "vision_tower" in n} <= {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    assert any("vision_tower" in name for name in moved) and any("projector" in name for name in moved)
    _, info = LlavaForConditionalGeneration.from_pretrained(world / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert load_mllm(world / "merged")[2].trained[-1] == ["llm_lora", "projector", "tower_lora"]


def test_an_adapter_folder_gives_the_merged_model_and_peft_reads_it(world, merged_and_adapter):
    merged, adapter = merged_and_adapter
    assert not (adapter / "model.safetensors").exists()
    mine = logits_of(adapter)
    torch.testing.assert_close(mine, logits_of(merged), atol=0.05, rtol=0.05)  # its weights are rounded to bf16
    base = load_mllm(world / "base")[0]
    assert (mine - logits_of(base)).abs().max() > 0.2
    assert torch.equal(logits_of(merge_adapter(adapter)[0].eval()), mine)  # what convert_checkpoint.py --to mllm writes
    trained = load_file(adapter / "trained.safetensors")
    assert {part_of(name) for name in trained} == {"projector"}
    base.load_state_dict(trained, strict=False)
    torch.testing.assert_close(mine, logits_of(PeftModel.from_pretrained(base, adapter).merge_and_unload()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        {"train": ["projector"]},
        {"train": ["projector", "llm_lora"], "lora_dropout": 0.2, "gradient_checkpointing": True},
        {"train": ["projector", "llm_lora"], "lora_dropout": 0.2, "llm_bits": 4},
        {"train": ["projector", "llm", "tower"], "tower_learning_rate": 1e-3},
    ],
    ids=["projector", "lora", "qlora", "tower"],
)
def test_resumed_equals_uninterrupted_bit_by_bit(world, fields, tmp_path, monkeypatch):
    whole = run(world, "unused", output=str(tmp_path / "whole"), **fields)
    real = training.MllmTrainer.training_step

    def killed_in_step_four(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(training.MllmTrainer, "training_step", killed_in_step_four)
    with pytest.raises(KeyboardInterrupt):
        run(world, "unused", output=str(tmp_path / "cut"), **fields)
    monkeypatch.undo()
    cut = run(world, "unused", output=str(tmp_path / "cut"), **fields)
    assert [json.loads(line) for line in (cut / "log.jsonl").open()] == [
        json.loads(line) for line in (whole / "log.jsonl").open()
    ]
    files = sorted(path.name for path in whole.glob("*.safetensors"))
    assert files == sorted(path.name for path in cut.glob("*.safetensors")) and files
    for file in files:
        one, two = load_file(whole / file), load_file(cut / file)
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one), file
    if "tower" in fields["train"]:  # it moved, is reloaded, and its hash is that of the moved one
        settings = (json.loads((folder / "grounding.json").read_text()) for folder in (world / "base", whole))
        assert len({values["tower_hash"] for values in settings}) == 2
        assert not torch.equal(logits_of(whole), logits_of(world / "base"))


@pytest.mark.parametrize("bits", [4, 8])
def test_low_bits_are_near_full_precision_and_reload(world, bits, tmp_path):
    """What an evaluation loads gives the logits that training ended with; the quantised base is near the full one."""
    fields = recipe(world, model=str(world / "base"), **RATES, **LORA)
    low = build_mllm(MllmConfig(**fields | {"train": ["projector", "llm_lora"], "llm_bits": bits})).model
    kinds = {str(p.dtype) for n, p in low.named_parameters() if n.endswith("base_layer.weight")}
    assert kinds == {"torch.uint8" if bits == 4 else "torch.int8"} and low.lm_head.weight.dtype == torch.float32
    full = dict(load_mllm(world / "base")[0].named_modules())
    for name, module in low.named_modules():
        if hasattr(module, "base_layer"):
            x, weight = torch.randn(64, module.in_features), full[name].weight.detach()
            if bits == 4:  # NF4 in blocks of 64 with scales quantised again, exactly
                weight = dequantize_4bit(*quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4"))
            error = ((module.base_layer(x) - x @ weight.T).norm() / (x @ weight.T).norm()).item()
            assert error < (1e-5 if bits == 4 else 0.03), name  # in 8 bits the inputs are quantised too
    kept = {}
    real = training.save_adapter

    def keep(folder, model, *rest):
        kept["logits"] = model.eval()(
            input_ids=torch.tensor([[1, *[model.config.image_token_id] * 25, 7, 8, 9, 2]]),
            pixel_values=torch.randn(1, 3, 40, 40, generator=torch.manual_seed(0)),
            labels=torch.tensor([[-100] * 27 + [8, 9, 2]]),
        ).loss
        real(folder, model, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "save_adapter", keep)
        folder = run(world, "unused", output=str(tmp_path), train=["projector", "llm_lora"], llm_bits=bits, save_dtype="float32")
    logits = logits_of(folder)[0, 26:-1]
    torch.testing.assert_close(
        torch.nn.functional.cross_entropy(logits, torch.tensor([8, 9, 2])), kept["logits"].detach(), rtol=1e-4, atol=1e-4
    )


def test_training_goes_on_from_an_adapter(world, merged_and_adapter, tmp_path):
    """To a whole folder, which needs no base; from low bits it does not, since what learns there is not what was trained."""
    start = logits_of(merged_and_adapter[1])
    fields = {"max_steps": 1, "save_every": 0, "train": ["projector"], "projector_learning_rate": 1e-9, "save_dtype": "float32"}
    whole = run(world, "unused", model=str(merged_and_adapter[1]), output=str(tmp_path / "whole"), **fields)
    torch.testing.assert_close(logits_of(whole), start, atol=1e-4, rtol=1e-4)
    low = run(world, "unused", output=str(tmp_path / "low"), **fields | {"train": ["projector", "llm_lora"], "llm_bits": 4})
    with pytest.raises(DataError, match="adapter on a language model in 4 bits, which cannot learn on"):
        run(world, "unused", model=str(low), output=str(tmp_path / "on"), **fields)


def test_a_frozen_projector_that_was_given_is_part_of_an_adapters_base(world, tmp_path):
    model, tokenizer, _ = load_mllm(world / "base")
    LlamaForCausalLM(model.config.text_config).save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    parts = {"tower": str(world / "clip"), "llm": str(tmp_path / "llm"), "projector": str(world / "base"), "train": ["llm_lora"]}
    shared = {name: recipe(world, model="")[name] for name in ("data", "images", "precision", "report_to", "max_length")}
    fields = {"output": str(tmp_path / "adapter"), "max_steps": 1, "save_every": 0, "lora_rank": 4, "save_adapter": True}
    folder = train(MllmConfig(**shared, **fields, **parts))
    mine, theirs = (m.model.multi_modal_projector.state_dict() for m in (load_mllm(folder)[0], model))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_an_adapter_whose_base_changed_is_refused(world, merged_and_adapter, tmp_path):
    folder = shutil.copytree(merged_and_adapter[1], tmp_path / "adapter")
    values = json.loads((folder / "grounding.json").read_text())
    assert values["base"] == {"model": str(world / "base")}
    (folder / "grounding.json").write_text(json.dumps(values | {"base": {"model": str(tmp_path / "gone")}}))
    with pytest.raises(DataError, match="gone does not exist"):
        load_mllm(folder)
    (folder / "grounding.json").write_text(json.dumps(values | {"tower_hash": "0" * 64}))
    with pytest.raises(DataError, match="the tower's weights"):
        load_mllm(folder)
    train(MllmConfig(**recipe(world, output=str(tmp_path / "wide"), llm_width=64, max_steps=1, save_every=0)))
    (folder / "grounding.json").write_text(json.dumps(values | {"base": {"model": str(tmp_path / "wide")}}))
    with pytest.raises(DataError, match="do not fit the model it was trained on"):
        load_mllm(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": ["llm", "llm_lora"]}, "names llm and llm_lora"),
        ({"train": ["llm"], "llm_bits": 4}, "name llm_lora instead"),
        ({"train": ["llm_lora"], "llm_bits": 3}, "llm_bits is 3"),
        ({"train": ["llm_lora"], "lora_rank": 0}, "lora_rank 0"),
        ({"train": ["projector"], "save_adapter": True}, "no adapter to save"),
        ({"train": ["tower_lora"], "cache_features": True}, "train names tower_lora"),
        (
            {"train": ["llm", "tower_lora"], "save_adapter": True, "model": None, "tower": "t", "llm_preset": "nano"},
            "random weights that llm_preset starts from",
        ),
    ],
)
def test_contradictions_are_refused(world, fields, message):
    with pytest.raises(DataError, match=message):
        MllmConfig(**recipe(world, model="m") | fields)


def test_low_bits_under_zero3_are_refused(world):
    with pytest.raises(DataError, match="zero3.json is stage 3, which cannot shard weights of 4 bits"):
        run(world, "sharded", train=["projector", "llm_lora"], llm_bits=4, zero="scripts/deepspeed/zero3.json")


def test_targets_that_are_not_there(world):
    fields = {"train": ["llm_lora"], "lora_targets": ["q_proj", "c_attn"]}
    with pytest.raises(DataError, match="'c_attn', which is no linear layer there; choose from down_proj"):
        build_mllm(MllmConfig(**recipe(world, model=str(world / "base"), **fields)))
    fields["lora_targets"] = ["v_proj"]
    model = build_mllm(MllmConfig(**recipe(world, model=str(world / "base"), **fields))).model
    found = {n.split(".lora_")[0].rpartition(".")[2] for n, _ in model.named_parameters() if ".lora_" in n}
    assert found == {"v_proj"} and not any("vision_tower" in n for n, _ in model.named_parameters() if ".lora_" in n)
