"""Pretraining on a DeepSpeed engine: one step, and the loop.

The data position is the step number (see `encoder.data.batches`), so a checkpoint of the engine and a step is everything.
"""

import itertools
import json
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from encoder.checkpoint import TOKENIZER, forget_after, load_training_state, save_training_state
from encoder.config import RegionConfig
from encoder.data.batches import RegionBatches, batch_loader
from encoder.distributed import rank, sum_over_ranks, world_size
from encoder.engine import make_engine
from encoder.finite import bad_features, check_finite
from encoder.gradient_cache import cached_backward
from encoder.losses import LossConfig, bounded_scale, cloc_losses
from encoder.model import ClocModel, ClocOutput
from encoder.patch_dropout import kept_patches, only_patches
from encoder.pretraining_config import MODEL_FIELDS, PretrainConfig
from encoder.processor import ClocProcessor


def train_step(engine: deepspeed.DeepSpeedEngine, parts: list[dict], loss_config: LossConfig) -> dict:
    """Forward, backward and update on this rank's share of a batch; returns the report of `cloc_losses`, and more.

    parts: the share's micro batches, as `RegionBatches` gives them, and in each `kept_patches` (B, K) where the tower sees
        those patches alone
    report: also the temperature, the gradient's norm and `bad_features`
    """
    embeddings = engine.module.vision_model.embeddings

    def to_device(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        # Of a tensor in pinned memory nobody waits for the copy, and it is the device that changes its type.
        return tensor.to(engine.device, dtype, non_blocking=True)

    def forward(part: dict) -> ClocOutput:
        dtypes = {"pixel_values": engine.module.dtype}
        arguments = {key: to_device(value, dtypes.get(key)) for key, value in part.items()}
        with only_patches(embeddings, arguments.pop("kept_patches", None)):
            return engine(**arguments)

    def loss_of(output: ClocOutput, boxes: Tensor | None, image_index: Tensor | None) -> tuple[Tensor, dict]:
        boxes = None if boxes is None else to_device(boxes)
        losses, report = cloc_losses(output, boxes, image_index, loss_config)
        # Of this step's forward pass: after the update it could be the next one's.
        report["logit_scale"] = bounded_scale(output.logit_scale.detach(), loss_config.max_logit_scale)
        report["loss"] = sum(loss.detach() for loss in losses.values())
        report["bad_features"] = bad_features(output)
        # Shares sum to the loss; the engine averages gradients over ranks.
        return sum(losses.values()) * world_size(), report

    def backward(loss: Tensor) -> None:
        engine.backward(loss, scale_wrt_gas=False)
        engine.step()  # updates after the last micro batch

    if len(parts) > 1:
        report = cached_backward(parts, forward, loss_of, backward)
    else:
        loss, report = loss_of(forward(parts[0]), parts[0].get("boxes"), parts[0].get("image_index"))
        backward(loss)
    report["grad_norm"] = torch.as_tensor(engine.get_global_grad_norm(), device=engine.device)
    return report


def run_identity(config: PretrainConfig, loss_config: LossConfig, model_config: RegionConfig) -> dict:
    """What a run is, beside its records: a checkpoint is of this run where these are equal.

    Fields of the model are as it has them, the preset's and the defaults among them: those may be others when a run goes on.
    """
    fields = {key: value for key, value in asdict(config).items() if key != "model_fields"}
    of_loss = {f"loss.{key}": value for key, value in asdict(loss_config).items()}
    of_model = {f"model.{key}": getattr(model_config, key) for key in MODEL_FIELDS if hasattr(model_config, key)}
    return {**fields, **of_loss, **of_model}


def pretrain(
    model: ClocModel, processor: ClocProcessor, batches: RegionBatches, config: PretrainConfig, loss_config: LossConfig
) -> deepspeed.DeepSpeedEngine:
    """Trains to `config.steps`, from the last checkpoint in `config.output` if there is one; returns the engine."""
    output = Path(config.output)
    engine = make_engine(model, config, loss_config.max_logit_scale)
    identity = {**run_identity(config, loss_config, model.config), **batches.identity()}
    first_step = load_training_state(engine, output, identity)
    is_main = rank() == 0
    writer = SummaryWriter(output / "tensorboard", purge_step=first_step or None) if is_main else None
    if is_main:
        forget_after(output / "log.jsonl", first_step)
        batches.processor.tokenizer.save_pretrained(output / TOKENIZER)
        print(f"{config.objective}: steps {first_step} to {config.steps}, {config.batch_size} images a step", flush=True)

    count, size = engine.gradient_accumulation_steps(), engine.train_micro_batch_size_per_gpu()
    first_image = rank() * count * size  # of this rank, in the global batch
    num_patches = engine.module.vision_model.embeddings.num_patches
    loader = batch_loader(batches, first_step, config.steps, config.workers, count)
    window, window_start, window_step = [], time.monotonic(), first_step
    for step in range(first_step, config.steps):
        parts = list(itertools.islice(loader, count))
        for first, part in zip(itertools.count(first_image, size), parts, strict=False):
            if config.patch_dropout:
                images = range(first, first + size)
                part["kept_patches"] = kept_patches(images, step, config.seed, num_patches, config.patch_dropout)
        window.append(train_step(engine, parts, loss_config))
        done = step + 1
        logs, saves = done % config.log_every == 0 or done == config.steps, done % config.save_every == 0 and done < config.steps
        if logs or saves:  # before it is saved: what is saved is finite
            check_finite(window, window_step, batches, output)
        if logs:
            means = _window_means(window)
            if is_main:
                speed = (done - window_step) * config.batch_size / (time.monotonic() - window_start)
                _log(writer, output, done, config, means, engine.get_lr()[0], speed)
            window, window_start, window_step = [], time.monotonic(), done
        if saves:
            save_training_state(engine, output, done, identity)
    save_training_state(engine, output, config.steps, identity)
    if writer:
        writer.close()
    return engine


def _window_means(window: list[dict]) -> dict[str, float]:
    """Means over the steps of a window; loss shares are summed over ranks first."""
    means = {}
    for key in window[0]:
        if key == "bad_features":  # of `check_finite`
            continue
        values = torch.stack([torch.as_tensor(report[key], dtype=torch.float32) for report in window])
        means[key] = float((sum_over_ranks(values) if "loss" in key else values).mean())
    return means


def _log(writer, output: Path, done: int, config: PretrainConfig, means: dict, rate: float, speed: float) -> None:
    """One line on the terminal, one in log.jsonl, the same numbers in TensorBoard."""
    terms = " ".join(f"{key.removesuffix('_loss')} {value:.4f}" for key, value in means.items() if "loss" in key)
    masked = f" | masked {means['masked_fraction']:.1%}" if "masked_fraction" in means else ""
    left = timedelta(seconds=round((config.steps - done) * config.batch_size / speed))
    print(
        f"step {done}/{config.steps} | {terms}{masked} | scale {means['logit_scale']:.1f} | lr {rate:.2e} | "
        f"{speed:.0f} images/s | ETA {left}",
        flush=True,
    )
    with (output / "log.jsonl").open("a") as file:
        file.write(json.dumps({"step": done, "lr": rate, "images_per_second": round(speed, 1), **means}) + "\n")
    for key, value in {**means, "lr": rate, "images_per_second": speed}.items():
        writer.add_scalar(f"train/{key}", value, done)
