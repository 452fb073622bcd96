"""bf16 at ZeRO stage 0: the step is a plain one, `transformers.CLIPModel` under autocast with torch's own AdamW.

The two differ in QuickGELU's derivative alone, less rounded in ours (tests/test_activation.py); here both take it.
"""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from pretraining_fixtures import assert_same_weights, do_runs, free_port, log_of, weights_of
from torch.nn.functional import cross_entropy, normalize
from transformers import CLIPConfig, CLIPModel

from encoder.activation import fuse_quick_gelu
from encoder.config import tiny
from encoder.engine import make_engine
from encoder.losses import LossConfig
from encoder.model import ADDED, ClocModel
from encoder.pretraining import train_step
from encoder.pretraining_config import PretrainConfig

pytestmark = pytest.mark.timeout(1800)  # processes start slowly on a busy machine

STEPS = 5
CONFIG = PretrainConfig(
    shards="none", output="none", objective="clip", precision="bf16", zero_stage=0, batch_size=4, steps=STEPS, warmup_steps=1,
    learning_rate=1e-3, max_grad_norm=0.5,
)  # fmt: skip


def plain_step(model: CLIPModel, optimizer: torch.optim.Optimizer, batch: dict) -> tuple[float, float]:
    """(loss, gradient norm) of one textbook step; features in bf16, the rest in float32."""
    with torch.autocast("cpu", torch.bfloat16):
        output = model.vision_model(batch["pixel_values"]), model.text_model(batch["input_ids"])
        image, text = model.visual_projection(output[0].pooler_output), model.text_projection(output[1].pooler_output)
    assert image.dtype == torch.bfloat16 and all(p.dtype == torch.float32 for p in model.parameters())
    logits = model.logit_scale.exp() * normalize(image.float(), dim=-1) @ normalize(text.float(), dim=-1).T
    targets = torch.arange(len(logits))
    loss = (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)) / 2
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CONFIG.max_grad_norm)
    optimizer.step()
    return float(loss), float(norm)


def compare_steps(rank: int, port: int, folder: str) -> None:
    """In a process of its own: (loss, norm) of each step, ours and plain, and the weights after them."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    ours = ClocModel(tiny(vocab_size=64))
    towers = {key: getattr(ours.config, key).to_dict() for key in ("text_config", "vision_config")}
    plain = CLIPModel(CLIPConfig(**towers, projection_dim=ours.config.projection_dim)).train()
    fuse_quick_gelu(plain)
    plain.load_state_dict({name: ours.state_dict()[name] for name in plain.state_dict()})
    for name, parameter in ours.named_parameters():
        parameter.requires_grad = not name.startswith(ADDED)
    decayed = [p for p in plain.parameters() if p.ndim >= 2]
    others = [p for p in plain.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": CONFIG.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, CONFIG.learning_rate, (CONFIG.beta1, CONFIG.beta2), CONFIG.adam_eps)
    engine = make_engine(ours, CONFIG)
    results = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(3, 64, (4, 6), generator=generator)
        ids[:, -1] = ours.config.text_config.eos_token_id
        batch = {"pixel_values": torch.randn(4, 3, 32, 32, generator=generator), "input_ids": ids}
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = engine.get_lr()[0]
        report = train_step(engine, [batch], LossConfig())
        results.append((float(report["loss"]), float(report["grad_norm"]), *plain_step(plain, optimizer, batch)))
    weights = {name: (engine.module.state_dict()[name], value) for name, value in plain.state_dict().items()}
    torch.save({"results": results, "weights": weights}, folder + "/compared.pt")
    dist.destroy_process_group()


def test_the_step_is_a_plain_one_under_autocast(tmp_path):
    multiprocessing.spawn(compare_steps, (free_port(), str(tmp_path)), nprocs=1)
    compared = torch.load(tmp_path / "compared.pt", weights_only=True)
    losses = [ours for ours, *_ in compared["results"]]
    assert len(set(losses)) == STEPS
    for loss, norm, plain_loss, plain_norm in compared["results"]:
        assert loss == pytest.approx(plain_loss, rel=1e-4) and norm == pytest.approx(plain_norm, rel=1e-3)
    for name, (ours, plain) in compared["weights"].items():
        assert ours.dtype == torch.float32
        torch.testing.assert_close(
            ours.reshape(plain.shape), plain, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


# All that has a state or a draw of its own, for the exact resume.
WHOLE = {
    "precision": "bf16", "zero_stage": 0, "steps": 12, "ema_decay": 0.9, "patch_dropout": 0.25, "gradient_checkpointing": True,
    "micro_batch_size": 2,
}  # fmt: skip
RUNS = {"whole": WHOLE, "second_half": {**WHOLE, "goes_on": ("whole", 6)}, "exact": {**WHOLE, "precision": "fp32"}}


def test_a_whole_run_resumes_bit_equal_and_is_near_float32(tmp_path, region_shards):
    (tmp_path / "train").symlink_to(region_shards)
    multiprocessing.spawn(do_runs, (1, free_port(), str(tmp_path), RUNS), nprocs=1)
    for folder in ("model", "model_ema"):
        weights = weights_of(tmp_path / "whole", folder)
        assert_same_weights(weights_of(tmp_path / "second_half", folder), weights)
        assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    ours, exact = (log_of(tmp_path / name) for name in ("whole", "exact"))
    assert [line["loss"] for line in ours] != [line["loss"] for line in exact]
    for a, b in zip(ours, exact, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)
