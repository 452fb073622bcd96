"""`PretrainConfig`: how an encoder is pretrained; the fields of `scripts/pretrain_encoder.py` and of its recipes."""

import argparse
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import CLIPConfig

from encoder.arguments import add_fields, build, typed_values
from encoder.config import ClocConfig
from encoder.errors import DataError
from encoder.losses import LossConfig

LEAST = {
    **dict.fromkeys(("batch_size", "max_boxes", "steps", "lanes", "shuffle_window", "log_every", "save_every"), 1),
    **dict.fromkeys(("micro_batch_size", "warmup_steps", "max_broken", "workers", "seed"), 0),
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_eps", "max_grad_norm"), 0),
}


@dataclass
class PretrainConfig:
    """How an encoder is pretrained. Defaults are Table A of arXiv 2410.02746 where it gives a number.

    shards: region shards: a folder, a pattern, a tar file, a URL of these, a .json list of shards and their sizes, or a
        .yaml file of several sources with weights; see docs/data.md
    output: folder for checkpoints, logs and the final model
    objective: `cloc`, or `clip` for the baseline on the same images, order and steps
    preset: size of a model trained from scratch, see encoder.config
    init: folder of a CLIP or CLOC checkpoint to start from, in place of a preset
    vocab_size: pieces of the tokenizer that a model from scratch trains on its own captions
    tokenizer: folder of the tokenizer instead, T5's in the paper; with `init`, where that folder has none (VeCap-DFN: T5's)
    model_fields: fields of `ClocConfig` that the run sets, each a flag by its own name; the preset or `init` has the rest
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
    ema_decay: keep a running average of the weights with this decay, written to OUTPUT/model_ema; 0 keeps none. It reaches
        over about 1 / (1 - ema_decay) steps
    patch_dropout: share of the patches that the image tower does not see, drawn anew for every image and step; the CLS and
        all positions stay (FLIP, arXiv 2212.00794). Finish with a short run without it, from this one's model
    gradient_checkpointing: recompute each layer in the backward pass: far less memory for one more forward pass
    compile: run each layer through torch.compile; goes on without where no compiler works. Not with zero_stage 3
    precision: bf16 or fp32; bf16 with zero_stage 0 is autocast on float32 weights
    zero_stage: DeepSpeed ZeRO stage, 0 to 3
    recaption_ratio: how often an image that has both is shown with one of its captions and not with its alt-text
    shuffle_window: records that are shuffled together; the shards they lie in are read at the same time
    lanes: parts of the data that are read side by side; with remote shards, as many as machines
    max_broken: records that may be left out, each named in OUTPUT/broken, before the run stops
    shard_cache: folder for remote shards on this machine's own disk; None is ~/.cache/cloc_shards
    shard_cache_gb: what the shards in it may take, gigabytes; two windows for each lane read here
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
    tokenizer: str | None = None
    model_fields: dict[str, Any] = field(default_factory=dict)
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
    ema_decay: float = 0.0
    patch_dropout: float = 0.0
    gradient_checkpointing: bool = False
    compile: bool = False
    precision: str = "bf16"
    zero_stage: int = 1
    recaption_ratio: float = 0.5
    shuffle_window: int = 131_072
    lanes: int = 1
    max_broken: int = 0
    shard_cache: str | None = None
    shard_cache_gb: float = 100.0
    seed: int = 0
    workers: int = 0
    log_every: int = 50
    save_every: int = 1000

    def __post_init__(self):
        for key, allowed in (("objective", ("clip", "cloc")), ("precision", ("bf16", "fp32")), ("zero_stage", (0, 1, 2, 3))):
            if getattr(self, key) not in allowed:
                raise DataError(f"{key} is '{getattr(self, key)}'; choose one of {', '.join(map(str, allowed))}")
        for key, least in LEAST.items():
            if not getattr(self, key) >= least:
                raise DataError(f"{key} is {getattr(self, key)}; give at least {least}")
        if not 0 <= self.recaption_ratio <= 1:
            raise DataError(f"recaption_ratio is {self.recaption_ratio}; give a share from 0 to 1")
        if self.warmup_steps >= self.steps:
            raise DataError(f"warmup_steps {self.warmup_steps} is not below steps {self.steps}; shorten the warm-up")
        for key in ("ema_decay", "patch_dropout", "beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise DataError(f"{key} is {getattr(self, key)}; give 0 (off) or a share below 1")
        if self.compile and self.zero_stage == 3:
            raise DataError("compile is true with zero_stage 3, whose weights come and go within a layer; choose 0, 1 or 2")


MODEL_FIELDS = {field.name for field in fields(ClocConfig)} - {field.name for field in fields(CLIPConfig)}
OWN_FIELDS = {field.name for cls in (PretrainConfig, LossConfig) for field in fields(cls)} - {"model_fields"}
RUN_FIELDS = OWN_FIELDS | MODEL_FIELDS  # of a recipe


def add_pretraining_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each of `RUN_FIELDS`."""
    add_fields(parser, PretrainConfig, names=OWN_FIELDS)
    add_fields(parser, LossConfig)
    add_fields(parser, ClocConfig, "ClocConfig: the model", MODEL_FIELDS, ", unless preset or init has another")


def build_configs(values: dict[str, Any]) -> tuple[PretrainConfig, LossConfig]:
    """The run that `values`, by names of `RUN_FIELDS`, describe; others are left alone."""
    of_model = typed_values(ClocConfig, {name: value for name, value in values.items() if name in MODEL_FIELDS})
    return build(PretrainConfig, {**values, "model_fields": of_model}), build(LossConfig, values)
