"""The estimate against real models: parameters exactly, arithmetic against torch's count of a real pass and against a formula."""

import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from encoder.config import PRESETS
from encoder.costs import encoder_cost, meta_encoder, state_bytes
from encoder.losses import LossConfig
from encoder.model import ADDED, ClocModel
from encoder.pretraining_config import PretrainConfig

SCRIPT = Path(__file__).parents[1] / "scripts" / "doctor.py"
RUN = {"shards": "x", "output": "y", "preset": "tiny", "vocab_size": 96, "precision": "fp32"}


def real_pass(model: ClocModel, max_boxes: int, length: int):
    """(FLOPs forward, backward, bytes kept between them) of one image on the CPU, with attention as plain products."""
    model.set_attn_implementation("eager")
    saved, own = {}, {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = tensor
        return tensor

    counter = FlopCounterMode(display=False)
    texts = torch.full((1, length), 2), torch.full((max_boxes, 16), 2)
    with counter, saved_tensors_hooks(keep, lambda tensor: tensor):
        boxes, index = torch.rand(max_boxes, 4), torch.zeros(max_boxes, dtype=torch.long)
        output = model(torch.randn(1, 3, 32, 32), texts[0], boxes=boxes, image_index=index, region_input_ids=texts[1])
        forward = counter.get_total_flops()
        sum(value.sum() for value in vars(output).values() if value is not None).backward()
    size = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    return forward, counter.get_total_flops() - forward, size


@pytest.mark.parametrize("readout", ["mean", "prompt"])
def test_parameters_and_arithmetic_are_those_of_the_real_model(readout):
    config = PretrainConfig(**RUN, model_fields={"prompter_readout": readout})
    model = meta_encoder(config, LossConfig())
    real = ClocModel(PRESETS["tiny"](vocab_size=96, prompter_readout=readout)).train()
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    cost = encoder_cost(model, config)
    forward, backward, size = real_pass(real, config.max_boxes, 32)
    assert cost.forward_flops == pytest.approx(forward, rel=0.02)
    assert cost.backward_flops == pytest.approx(backward, rel=0.05)  # a fused kernel computes its weights again
    assert 0.6 * size < cost.saved_bytes < size  # and so does not keep them


def test_arithmetic_of_b16_is_six_per_weight_and_token():
    """The rule of thumb for transformers, with attention's own term; within a few percent of the count."""
    config = PretrainConfig(**{**RUN, "preset": "b16", "objective": "clip", "precision": "bf16"})
    cost = encoder_cost(meta_encoder(config, LossConfig()), config)
    image, text = (197, 768, 12), (77, 512, 12)
    forward = 2 * 196 * 768 * 3 * 16 * 16
    forward += sum(layers * (24 * tokens * width**2 + 4 * tokens**2 * width) for tokens, width, layers in (image, text))
    assert cost.forward_flops == pytest.approx(forward, rel=0.02)
    assert cost.flops(recompute=False) == pytest.approx(3 * forward, rel=0.03)
    assert cost.flops(recompute=True) == pytest.approx(4 * forward, rel=0.03)
    assert cost.activation_bytes(recompute=True) < 0.2 * cost.activation_bytes(recompute=False)


def test_dropped_patches_cost_less_and_the_baseline_has_no_regions():
    mean = {"model_fields": {"prompter_readout": "mean"}}  # so that patches weigh enough beside the texts
    whole, half, clip = (PretrainConfig(**RUN, **mean, **more) for more in ({}, {"patch_dropout": 0.5}, {"objective": "clip"}))
    models = [meta_encoder(config, LossConfig()) for config in (whole, half, clip)]
    costs = [encoder_cost(model, config) for model, config in zip(models, (whole, half, clip), strict=True)]
    assert costs[1].forward_flops < 0.85 * costs[0].forward_flops and costs[2].forward_flops < costs[0].forward_flops
    learned = {name for name, parameter in models[2].named_parameters() if parameter.requires_grad}
    assert learned and not [name for name in learned if name.startswith(ADDED)]


def test_what_a_process_holds_by_zero_stage():
    """ZeRO's own table (arXiv 1910.02054, Figure 1): 2 + 2 + 12 bytes a parameter in bf16, over 4 processes."""
    model = torch.nn.Linear(100, 100, bias=False).bfloat16()
    for stage, (weights, gradients, optimizer) in {0: (2, 2, 12), 1: (2, 2, 3), 2: (2, 0.5, 3), 3: (0.5, 0.5, 3)}.items():
        expected = {"weights": weights * 1e4, "gradients": gradients * 1e4, "optimizer": optimizer * 1e4}
        assert state_bytes(model, stage, 4) == expected
    assert state_bytes(model, 1, 4, ema=True)["optimizer"] == 4e4
    assert state_bytes(model.float(), None, 1) == {"weights": 4e4, "gradients": 4e4, "optimizer": 8e4}


def run_doctor(monkeypatch, capsys, *arguments: str) -> tuple[int, dict[str, str], str]:
    """(exit status, table by its first column, standard error) of the script."""
    monkeypatch.setattr(sys, "argv", ["doctor.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    shown = capsys.readouterr()
    rows = (line.split("  ", 1) for line in shown.out.splitlines())
    return stopped.value.code, {row[0].strip(): row[-1].strip() for row in rows}, shown.err


def test_the_doctor_on_a_recipe(tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text("preset: tiny\nbatch_size: 64\nsteps: 1000\nwarmup_steps: 10\nvocab_size: 96\n")
    flags = ("--processes", "4", "--micro_batch_size", "8", "--tflops", "0.001", "--memory", "0.001")
    lock = tmp_path / "built" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    code, table, _ = run_doctor(monkeypatch, capsys, str(recipe), *flags)
    assert code == 0 and table["python"].startswith(sys.version.split()[0]) and table["torch"].startswith(torch.__version__)
    assert {"c++", "ninja", "transformers", "deepspeed", "core packages", "extra 'eval'"} <= table.keys()
    assert table["build lock"].startswith(str(lock))
    assert "cores" in table["cpu"] and "free of" in table["disk here"]
    count = sum(parameter.numel() for parameter in ClocModel(PRESETS["tiny"](vocab_size=96)).parameters())
    assert table["model"].startswith(f"{count / 1e6:,.2f} M parameters")
    assert "8 images with 4 regions at a time" in table["activations"] and "does not fit: 0 at a time would" in table["together"]
    flops, seconds = float(table["arithmetic"].split()[0]), float(table["time"].split()[0])
    assert seconds == pytest.approx(flops * 1e12 / (0.001e12 * 0.5), rel=0.02)  # both are rounded
    assert "for 1,000 steps" in table["time"] and table["speed"].endswith("as stated")


@pytest.mark.parametrize(
    "content, flags, sentence",
    [
        ("preset: tiny\nbatch_size: 10\nsteps: 9\nwarmup_steps: 1\n", ["--processes", "4"], "batch_size 10 on 4 processes in"),
        ("preset: tiny\n", ["--processes", "0"], "--processes is 0; give a positive number"),
        ("preset: huge\n", [], "preset 'huge' is not known; choose one of nano, tiny"),
        ("preset: tiny\ninit: nowhere\n", [], "nowhere/config.json does not exist"),
        ("presett: tiny\n", [], "field 'presett' is not known; did you mean 'preset'?"),
        ("tower: nowhere\nllm_preset: nano\n", [], "nowhere/config.json does not exist"),
    ],
)
def test_the_doctor_refuses_in_one_sentence(tmp_path, monkeypatch, capsys, content, flags, sentence):
    (tmp_path / "r.yaml").write_text(content)
    code, _, error = run_doctor(monkeypatch, capsys, str(tmp_path / "r.yaml"), "--tflops", "1", *flags)
    assert code == 2 and error.startswith("error: ") and sentence in error and error.count("\n") == 1


def test_a_measured_speed_is_a_number():
    speed = runpy.run_path(str(SCRIPT))["measured_tflops"]("fp32")
    assert math.isfinite(speed) and speed > 0
