"""Pretraining on a DeepSpeed engine: the configuration, one step, the loop.

The data position is the step number (see `encoder.data.batches`), so a checkpoint of the engine and a step is everything.
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from encoder.checkpoint import forget_after, load_training_state, save_training_state
from encoder.data.batches import RegionBatches, batch_loader
from encoder.distributed import rank, sum_over_ranks, world_size
from encoder.errors import DataError
from encoder.gradient_cache import cached_backward, micro_batches
from encoder.losses import LossConfig, bounded_scale, cloc_losses
from encoder.model import ClocModel, ClocOutput
from encoder.processor import ClocProcessor


@dataclass
class PretrainConfig:
    """How an encoder is pretrained. Defaults are Table A of arXiv 2410.02746 where it gives a number.

    shards: region shards: a folder, a glob or a tar file
    output: folder for checkpoints, logs and the final model
    objective: `cloc`, or `clip` for the baseline on the same images, order and steps
    preset: size of a model trained from scratch, see encoder.config
    init: folder of a CLIP or CLOC checkpoint to start from, in place of a preset
    vocab_size: pieces of the tokenizer that a model from scratch trains on its own captions
    prompter_readout: `mean` (the paper's) or `prompt`; None keeps the preset's
    batch_size: images of the global batch
    micro_batch_size: images that a process runs at a time; the loss and its gradient stay those of the whole batch, for one
        more forward pass (encoder.gradient_cache). 0 runs its part of the batch at once
    max_boxes: regions per image and step, at most
    steps: optimizer steps of the whole run
    learning_rate: peak, reached after the warm-up and followed by a cosine to zero
    warmup_steps: steps of linear warm-up
    weight_decay: of matrices; biases, norms and the temperature have none
    beta1: AdamW's first decay
    beta2: AdamW's second decay
    adam_eps: AdamW's epsilon
    max_grad_norm: clip the gradient's norm here; 0 does not clip
    precision: bf16 or fp32
    zero_stage: DeepSpeed ZeRO stage, 0 to 3
    seed: of initialisation, order and draws
    workers: processes per rank that load data
    log_every: steps between log lines
    save_every: steps between checkpoints
    """

    shards: str
    output: str
    objective: str = "cloc"
    preset: str = "nano"
    init: str | None = None
    vocab_size: int = 512
    prompter_readout: str | None = None
    batch_size: int = 32768
    micro_batch_size: int = 0
    max_boxes: int = 4
    steps: int = 439_087
    learning_rate: float = 5e-4
    warmup_steps: int = 2000
    weight_decay: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.98
    adam_eps: float = 1e-6
    max_grad_norm: float = 1.0
    precision: str = "bf16"
    zero_stage: int = 1
    seed: int = 0
    workers: int = 0
    log_every: int = 50
    save_every: int = 1000

    def __post_init__(self):
        for key, allowed in (("objective", ("clip", "cloc")), ("precision", ("bf16", "fp32")), ("zero_stage", (0, 1, 2, 3))):
            if getattr(self, key) not in allowed:
                raise DataError(f"{key} is '{getattr(self, key)}'; choose one of {', '.join(map(str, allowed))}")
        if self.warmup_steps >= self.steps:
            raise DataError(f"warmup_steps {self.warmup_steps} is not below steps {self.steps}; shorten the warm-up")


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """AdamW's groups: matrices decay; vectors and scalars (biases, norms, CLS, temperature) do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def reshape_scalars(model: ClocModel, shape: tuple[int, ...]) -> None:
    """Gives the temperatures the shape (1,) for training and () again for saving.

    DeepSpeed 0.19 broadcasts every parameter as bytes, and a tensor of no dimension cannot be viewed as bytes.
    """
    for name, parameter in list(model.named_parameters(recurse=False)):
        if parameter.numel() == 1:
            setattr(model, name, torch.nn.Parameter(parameter.detach().reshape(shape), parameter.requires_grad))


def make_engine(model: ClocModel, config: PretrainConfig) -> deepspeed.DeepSpeedEngine:
    """A DeepSpeed engine around `model` with AdamW, warm-up and cosine."""
    reshape_scalars(model, (1,))
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
    )

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    share = config.batch_size // world_size()
    micro_batch_size = config.micro_batch_size or share
    if share % micro_batch_size:
        raise DataError(f"micro_batch_size {micro_batch_size} does not divide the {share} images of a process; choose a divisor")
    settings = {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": share // micro_batch_size,
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": config.precision == "bf16"},
        # A ZeRO stage needs a partitioned optimizer; with fp32 on one process stage 0 is plain AdamW.
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
        config=settings,
    )
    return engine


def train_step(engine: deepspeed.DeepSpeedEngine, batch: dict, loss_config: LossConfig) -> dict:
    """Forward, backward and update on this rank's part of a batch; returns the report of `cloc_losses`."""

    def forward(part: dict) -> ClocOutput:
        dtypes = {"pixel_values": engine.module.dtype}
        return engine(**{key: value.to(engine.device, dtypes.get(key)) for key, value in part.items()})

    def loss_of(output: ClocOutput, boxes: Tensor | None, image_index: Tensor | None) -> tuple[Tensor, dict]:
        if boxes is not None:
            boxes, image_index = boxes.to(engine.device), image_index.to(engine.device)
        losses, report = cloc_losses(output, boxes, image_index, loss_config)
        # Of this step's forward pass: after the update it could be the next one's.
        report["logit_scale"] = bounded_scale(output.logit_scale.detach(), loss_config.max_logit_scale)
        report["loss"] = sum(loss.detach() for loss in losses.values())
        # Shares sum to the loss; the engine averages gradients over ranks.
        return sum(losses.values()) * world_size(), report

    def backward(loss: Tensor) -> None:
        engine.backward(loss, scale_wrt_gas=False)
        engine.step()  # updates after the last micro batch

    if engine.gradient_accumulation_steps() > 1:
        parts = micro_batches(batch, engine.train_micro_batch_size_per_gpu())
        return cached_backward(parts, forward, loss_of, backward)
    loss, report = loss_of(forward(batch), batch.get("boxes"), batch.get("image_index"))
    backward(loss)
    return report


def pretrain(
    model: ClocModel, processor: ClocProcessor, batches: RegionBatches, config: PretrainConfig, loss_config: LossConfig
) -> deepspeed.DeepSpeedEngine:
    """Trains to `config.steps`, from the last checkpoint in `config.output` if there is one; returns the engine."""
    output = Path(config.output)
    engine = make_engine(model, config)
    identity = {**asdict(config), **{f"loss.{key}": value for key, value in asdict(loss_config).items()}}
    first_step = load_training_state(engine, output, identity)
    is_main = rank() == 0
    writer = SummaryWriter(output / "tensorboard", purge_step=first_step or None) if is_main else None
    if is_main:
        forget_after(output / "log.jsonl", first_step)
        print(f"{config.objective}: steps {first_step} to {config.steps}, {config.batch_size} images a step", flush=True)

    window, window_start, window_step = [], time.monotonic(), first_step
    for step, batch in enumerate(batch_loader(batches, first_step, config.steps, config.workers), first_step):
        window.append(train_step(engine, batch, loss_config))
        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            means = _window_means(window)
            if not math.isfinite(means["loss"]):
                raise DataError(
                    f"the loss is {means['loss']} between steps {window_step} and {done} on rank {rank()}; lower "
                    f"learning_rate, or go on from the last checkpoint in {output} with other data"
                )
            if is_main:
                speed = (done - window_step) * config.batch_size / (time.monotonic() - window_start)
                _log(writer, output, done, config, means, engine.get_lr()[0], speed)
            window, window_start, window_step = [], time.monotonic(), done
        if done % config.save_every == 0 and done < config.steps:
            save_training_state(engine, output, done, identity)
    save_training_state(engine, output, config.steps, identity)
    if writer:
        writer.close()
    return engine


def _window_means(window: list[dict]) -> dict[str, float]:
    """Means over the steps of a window; loss shares are summed over ranks first."""
    means = {}
    for key in window[0]:
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
