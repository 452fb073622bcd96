"""Every MLLM recipe is read as the script reads it, and says the numbers that were published for it."""

import argparse
import json
import re
from pathlib import Path

import pytest
import torch
from mllm_fixtures import recipe, write_clip, write_conversations

from encoder.arguments import add_fields, read_recipe
from encoder.errors import DataError
from mllm.checkpoint import load_mllm
from mllm.config import MllmConfig, load_config
from mllm.mixture import sources_of
from mllm.model import build_mllm, freeze
from mllm.tiles import GRIDS, read_grids
from mllm.training import train

RECIPES = Path("scripts/recipes")
FIELDS = set(MllmConfig.__dataclass_fields__)
LLAVA = {"epochs": 1, "warmup": 0.03, "schedule": "cosine", "weight_decay": 0.0, "max_length": 2048, "precision": "bf16"}
ALIGN = LLAVA | {"train": ["projector"], "learning_rate": 1e-3, "global_batch": 256, "stage": 2, "template": "plain"}
FINETUNE = LLAVA | {"global_batch": 128, "stage": 3, "template": "vicuna_v1", "gradient_checkpointing": True}
WHOLE = FINETUNE | {"train": ["projector", "llm"], "learning_rate": 2e-5, "group_by_length": True}
LORA = FINETUNE | {
    "train": ["projector", "llm_lora"],
    "learning_rate": 2e-4,
    "projector_learning_rate": 2e-5,
    "lora_rank": 128,
    "lora_alpha": 256,
    "lora_dropout": 0.05,
    "lora_targets": [],
    "group_by_length": True,
}
NEXT = {"max_length": 4096, "stage": 2}
FLOATS = {"feature_layer": -2, "geometry": "pad", "projector_type": "mlp2x_gelu", "codec": "float2"}  # of mix665k's boxes
# LLaVA's scripts/v1_5 and Ferret's experiments/ferret_7b_train.sh, on 8 GPUs.
PUBLISHED = {
    "llava15_7b_align": ALIGN | FLOATS,
    "llava15_13b_align": ALIGN | FLOATS,
    "llava15_7b_finetune": WHOLE,
    "llava15_13b_finetune": WHOLE,
    "llava15_7b_finetune_lora": LORA,
    "llava15_13b_finetune_lora": LORA,
    "llava15_7b_finetune_qlora": LORA | {"llm_bits": 4, "stage": 2},
    "llava15_13b_finetune_qlora": LORA | {"llm_bits": 4, "stage": 2},
    "ferret_7b_align": ALIGN | {"geometry": "squash", "projector_type": "linear", "codec": "int1000"},
    "ferret_7b_finetune": FINETUNE | {"train": ["projector", "llm"], "learning_rate": 2e-5, "epochs": 3},
    # Open-LLaVA-NeXT's scripts/v1_6/train/7b, there on 32 GPUs.
    "open_llava_next_7b_align": ALIGN | NEXT | {"feature_layer": -2, "geometry": "anyres", "projector_type": "mlp2x_gelu"},
    "open_llava_next_7b_finetune": WHOLE
    | NEXT
    | {"train": ["projector", "llm", "tower"], "projector_learning_rate": 2e-5, "tower_learning_rate": 2e-6},
    "smollm2_135m": {"learning_rate": 5e-5, "projector_learning_rate": 5.12e-3},  # nanoVLM's rates
    **{name: {} for name in ("nano_align", "nano_balance", "nano_base", "nano_finetune")},  # ours
}


def test_the_table_names_every_recipe():
    of_encoder = {path.stem for path in RECIPES.glob("*.yaml") if path.stem.startswith("cloc") or path.stem.endswith("_encoder")}
    assert {path.stem for path in RECIPES.glob("*.yaml")} - of_encoder == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_says_the_published_numbers(name):
    path = RECIPES / f"{name}.yaml"
    flags = {"data": ["d"], "images": "i", "output": "o"}
    if name in ("nano_align", "smollm2_135m"):
        flags |= {"tower": "t"} | ({} if name == "nano_align" else {"llm": "l"})
    elif name.startswith("nano"):
        flags |= {"model": "m"}
    missing = {key: value for key, value in flags.items() if key not in read_recipe(path, FIELDS)}
    config = load_config(path, missing)
    for field, value in PUBLISHED[name].items():
        if field == "global_batch":
            assert 8 * config.batch_size * config.gradient_accumulation == value
        elif field == "stage":
            assert json.loads(Path(config.zero).read_text())["zero_optimization"]["stage"] == value
        else:
            assert getattr(config, field) == value, field


def test_open_llava_nexts_grids_are_llava_nexts():
    assert read_grids(read_recipe(RECIPES / "open_llava_next_7b_align.yaml", FIELDS)["tile_grids"]) == GRIDS


def test_boxes_of_llavas_data_are_read_in_the_frame_that_the_recipe_writes():
    """As the decimals of the padded square that they are, or imported where pictures enter by another geometry."""
    for name in ("llava15_7b", "llava15_13b", "open_llava_next_7b"):
        align = read_recipe(RECIPES / f"{name}_align.yaml", FIELDS)
        for path in RECIPES.glob(f"{name}_finetune*.yaml"):
            recipe = read_recipe(path, FIELDS)
            assert recipe["model"] == align["output"]
            (source,) = sources_of(recipe["data"], recipe["images"])
            as_they_are = (align["geometry"], align.get("codec")) == ("pad", "float2")
            assert source.importer == ("conversations" if as_they_are else "llava"), path


def test_ferrets_mix_has_its_repeats():
    weights = {
        Path(entry["path"]).stem: entry["weight"] for entry in read_recipe(RECIPES / "ferret_7b_finetune.yaml", FIELDS)["data"]
    }
    assert weights["git_instruction"] == 3 and weights["vg_relations"] == weights["vg_regions"] == 0.2 and len(weights) == 10


def test_the_commands_of_the_guides_are_runs():
    """No recipe contradicts the flags that are written behind it."""
    text = "\n".join(
        path.read_text() for path in (Path("README.md"), *Path("docs").glob("*.md"), Path("scripts/finetune_mllm.py"))
    )
    commands = re.findall(r"finetune_mllm\.py (scripts/recipes/\S+) ([^`\n]*)", text)
    parser = argparse.ArgumentParser()
    add_fields(parser, MllmConfig)
    for path, flags in commands:
        given = parser.parse_known_args(flags.split())[0]
        load_config(path, {"data": ["d"], "output": "o"} | vars(given))
    assert len(commands) > 6


@pytest.mark.parametrize(("name", "stage"), [("zero1", 1), ("zero2", 2), ("zero3", 3), ("zero3_offload", 3)])
def test_zero_files(name, stage):
    values = json.loads(Path(f"scripts/deepspeed/{name}.json").read_text())
    zero = values["zero_optimization"]
    assert zero["stage"] == stage and values["bf16"] == {"enabled": "auto"}
    # Without it ZeRO-3 has no whole weights to save: LLaVA's "size mismatch, torch.Size([0])".
    assert zero.get("stage3_gather_16bit_weights_on_model_save", False) == (stage == 3)
    assert ("offload_optimizer" in zero and "offload_param" in zero) == name.endswith("offload")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_conversations(folder, 4)
    write_clip(folder / "clip")
    return folder


def test_a_linear_projector_is_one_matrix_in_a_stock_folder(world):
    """Whatever its first layer learns, its second stays the identity: Ferret's single nn.Linear, and stock Llava reads it."""
    config = MllmConfig(**recipe(world, projector_type="linear", train=["projector", "llm"]))
    model = build_mllm(config).model
    freeze(model, config.trains, torch.float32)
    projector = model.model.multi_modal_projector
    assert [p.requires_grad for p in projector.linear_1.parameters()] == [True, True]
    assert [p.requires_grad for p in projector.linear_2.parameters()] == [False, False]
    features = torch.randn(5, 32)
    one = torch.nn.functional.linear(features, projector.linear_1.weight, projector.linear_1.bias)
    torch.testing.assert_close(projector(features), one)
    folder = train(MllmConfig(**recipe(world, projector_type="linear", max_steps=1, save_every=0, save_dtype="float32")))
    saved = load_mllm(folder)[0].model.multi_modal_projector
    assert torch.equal(saved.linear_2.weight, torch.eye(32)) and saved(features).std() > 0
    assert json.loads((folder / "config.json").read_text())["projector_hidden_act"] == "linear"
    with pytest.raises(DataError, match="projector_type is mlp2x_gelu, but the MLLM"):
        build_mllm(MllmConfig(**recipe(world, model=str(folder), projector_type="mlp2x_gelu")))
    with pytest.raises(DataError, match="is of projector_type linear; pass that"):
        build_mllm(MllmConfig(**recipe(world, projector=str(folder))))
