"""Compiled and recomputed layers give the loss and the gradient of plain ones."""

import copy
import platform
import subprocess
import sys

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from encoder import ClocModel, ClocSiglipConfig, ClocSiglipModel
from encoder.engine import compile_layers, recompute_layers
from encoder.losses import LossConfig, cloc_losses
from encoder.pretraining import train_step

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
LAYERS = 2 + 2 + 2  # vision, text, the two Prompters


@pytest.fixture()
def batch() -> dict:
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.randn(2, 3, 32, 32, generator=generator),
        "input_ids": torch.tensor([[5, 6, 1], [7, 8, 1]]),
        "boxes": torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.2, 0.3, 0.9, 0.8], [0.0, 0.0, 1.0, 0.4]]),
        "image_index": torch.tensor([0, 0, 1]),
        "region_input_ids": torch.tensor([[9, 1], [10, 1], [11, 1]]),
    }


def loss_and_gradients(model, batch):
    losses, _ = cloc_losses(model(**batch), batch["boxes"], batch["image_index"], LossConfig(similar_text_threshold=None))
    loss = sum(losses.values())
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(ours, theirs, tolerance):
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=tolerance)
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(
            ours[1][name], gradient, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_recomputed_layers_keep_less_and_give_the_same(tiny_model, batch):
    recomputed = copy.deepcopy(tiny_model).train()
    recompute_layers(recomputed)
    layers = [module for module in recomputed.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert len(layers) == LAYERS and all(layer.gradient_checkpointing for layer in layers)
    runs = {}
    for name, model in (("plain", tiny_model.train()), ("recomputed", recomputed)):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.nbytes) or t, lambda t: t):
            runs[name] = loss_and_gradients(model, batch), sum(kept)
    assert_same(runs["recomputed"][0], runs["plain"][0], 1e-6)
    assert runs["recomputed"][1] < 0.3 * runs["plain"][1]


SIGLIP = ClocSiglipConfig(
    text_config=SIZES | {"vocab_size": 32, "max_position_embeddings": 3},
    vision_config=SIZES | {"image_size": 32, "patch_size": 8},
)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    "fields, losses",
    [
        ({"prompter_readout": "mean", "box_token": "joint"}, {}),
        ({"prompter_shared": True, "region_temperature": "own"}, {"similar_text_threshold": None, "grounding_norm": "mse"}),
        ({"logit_bias_init_value": -10.0}, {"contrastive": "sigmoid"}),
        ({"region_encoder": "roi_align"}, {"grounding_loss_weight": 0.0}),
        (None, {"contrastive": "sigmoid"}),
    ],
)
def test_no_operation_of_a_step_asks_for_a_value(tiny_model, batch, fields, losses, parts):
    """Or has a shape that follows from one: the meta device has no values and raises. On a GPU the process would wait."""
    config = copy.deepcopy(tiny_model.config if fields is not None else SIGLIP)
    for name, value in (fields or {}).items():
        setattr(config, name, value)
    with torch.device("meta"):
        model = (ClocModel if fields is not None else ClocSiglipModel)(config).train()

    class Engine:  # what `train_step` asks of DeepSpeed's, without its own update
        module, device = model, torch.device("meta")
        backward = staticmethod(lambda loss, **_: loss.backward())
        step = staticmethod(lambda: None)
        get_global_grad_norm = staticmethod(lambda: 0.0)
        __call__ = staticmethod(model)

    batch |= {"attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    report = train_step(Engine(), [batch] * parts, LossConfig(**losses))
    assert report["coverage"] == 1 and report["loss"].is_meta and report["bad_features"].is_meta
    assert all(parameter.grad.is_meta for parameter in model.parameters())
    with pytest.raises((NotImplementedError, RuntimeError)):  # as it would
        torch.unique(batch["image_index"].to("meta"))


@pytest.mark.parametrize(
    "backend, device",
    [
        ("aot_eager", "cpu"),  # traced, with a backward pass of its own, but no kernels: those take minutes on a CPU
        pytest.param("inductor", "cuda", marks=pytest.mark.gpu),
    ],
)
def test_compiled_layers_give_the_same(tiny_model, batch, backend, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device to compile for")
    plain = tiny_model.train().to(device)
    compiled = copy.deepcopy(plain)
    if not compile_layers(compiled, torch.device(device), backend):
        pytest.skip("torch.compile finds no working compiler here")
    layers = [module for module in compiled.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert len(layers) == LAYERS and all(layer._compiled_call_impl is not None for layer in layers)
    batch = {key: value.to(device) for key, value in batch.items()}
    assert_same(loss_and_gradients(compiled, batch), loss_and_gradients(plain, batch), 1e-4)


def test_without_a_compiler_it_says_so_and_goes_on(tiny_model, batch, monkeypatch, capsys):
    torch._dynamo.reset()
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/nowhere/c++",))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    assert not compile_layers(tiny_model, torch.device("cpu"))
    line = capsys.readouterr().out
    assert line.startswith("compile: torch.compile does not work here (") and line.count("\n") == 1
    assert "goes on without it" in line and torch.isfinite(loss_and_gradients(tiny_model, batch)[0])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is one of glibc")
def test_a_large_tensor_takes_the_memory_of_the_one_before_it():
    """64 MB are 16,384 pages of 4 KB, each a fault where they are new; in a process of its own, whose malloc it sets."""
    code = """
import resource, torch
from encoder.engine import reuse_large_blocks
reuse_large_blocks()
for _ in range(3):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(output.split()[-1]) < 1000
