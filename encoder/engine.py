"""A DeepSpeed engine around a CLOC: optimizer, schedule, ZeRO, recomputed layers, compiled layers."""

import ctypes
import math

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from encoder.distributed import rank, world_size
from encoder.errors import DataError
from encoder.model import ClocModel
from encoder.optimizer import PretrainAdamW, parameter_groups
from encoder.pretraining_config import PretrainConfig

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # settings of glibc's mallopt(3)


def reshape_scalars(model: ClocModel, shape: tuple[int, ...]) -> None:
    """Gives the temperatures the shape (1,) for training and () again for saving.

    DeepSpeed 0.19 broadcasts every parameter as bytes, and a tensor of no dimension cannot be viewed as bytes.
    """
    for name, parameter in list(model.named_parameters(recurse=False)):
        if parameter.numel() == 1:
            setattr(model, name, torch.nn.Parameter(parameter.detach().reshape(shape), parameter.requires_grad))


def make_engine(model: ClocModel, config: PretrainConfig, max_logit_scale: float = 100.0) -> deepspeed.DeepSpeedEngine:
    """A DeepSpeed engine around `model` with AdamW, warm-up and cosine.

    At ZeRO stage 0 bf16 is autocast on float32 weights: nothing is copied to another precision and back, so it is the fastest
    way on one device that has room for it. At stages 1 to 3 DeepSpeed keeps bf16 weights and a float32 copy, sharded.

    max_logit_scale: ceiling of the temperatures, as a scale
    """
    model.train()
    if config.gradient_checkpointing:
        recompute_layers(model)
    reshape_scalars(model, (1,))
    plain = config.zero_stage == 0  # DeepSpeed has no optimizer of its own around ours then
    if plain and config.precision == "bf16":
        model.forward = torch.autocast(get_accelerator().device_name(), torch.bfloat16)(model.forward)
    optimizer = PretrainAdamW(
        parameter_groups(model, config.weight_decay, max_logit_scale),
        ema_decay=config.ema_decay,
        max_grad_norm=config.max_grad_norm if plain else None,
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
        "gradient_clipping": 0.0 if plain else config.max_grad_norm,
        "bf16": {"enabled": config.precision == "bf16" and not plain},
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a step
    }
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
        config=settings,
    )
    if plain and world_size() == 1:
        engine.enable_backward_allreduce = False  # nothing to add up, but each gradient would be copied there and back
    if config.compile:
        compile_layers(model, engine.device)
    if engine.device.type == "cpu":
        reuse_large_blocks()
    return engine


def reuse_large_blocks() -> None:
    """Lets glibc keep the memory of large tensors of this process for the next ones, as it does with small ones.

    Else every tensor over 32 MB is new to the process, and the system zeroes it page by page: with the `mean` readout at B/16
    a tenth of a step's time and more.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)  # M_MMAP_THRESHOLD would do, but older versions refuse more than 32 MB
        mallopt(M_TRIM_THRESHOLD, -1)


def recompute_layers(model: ClocModel) -> None:
    """Keeps the inputs of each layer of the towers and the Prompter alone, and runs it again in the backward pass."""
    # transformers renamed it; the old name goes in its version 6.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def compile_layers(model: nn.Module, device: torch.device, backend: str = "inductor") -> bool:
    """Compiles the layers of the towers and the Prompter, each by itself; whether it did.

    Where nothing can be compiled, tried on a sum, it says why and leaves them. Layer by layer, equal layers are compiled
    once, and the loss and its gathers over ranks stay as they are.
    """
    try:
        torch.compile(lambda x: x + 1, backend=backend)(torch.zeros(8, device=device))
    except (RuntimeError, OSError, ImportError) as error:
        if rank() == 0:
            print(f"compile: torch.compile does not work here ({reason(error)}); training goes on without it", flush=True)
        return False
    # All kinds of layers share one wrapper's code, and each is compiled for no, one and any number of regions, with and
    # without gradient: past the default limit of 8 the rest would quietly stay as it is.
    torch._dynamo.config.recompile_limit = 64
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(backend=backend)
    return True


def reason(error: Exception) -> str:
    """The first line of a message that may be a page."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
