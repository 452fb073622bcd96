"""A training step: CLOC's against CLIP's, and our CLIP step against the same step written plainly on `transformers.CLIPModel`.

    python benchmarks/step.py
    python benchmarks/step.py --batch_size 64 --precision bf16 --zero_stage 1 --out step.json

Ours is `train_step` on a DeepSpeed engine as in pretraining: forward, losses, backward, clipping, AdamW. The plain one has the
same weights, batch, text lengths, precision and clipping, the full matrix of logits, `cross_entropy` and
`torch.optim.AdamW(model.parameters())`; bf16 is autocast there. Before the first update both must have the same loss.
Every region has a text of its own, padded to the longest of them, as captions are.
"""

import argparse
import logging
import math
import os
from pathlib import Path

import deepspeed
import torch
import transformers
from rounds import Bar, in_turn, report_of, show
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import CLIPConfig, CLIPModel

from encoder.config import PRESETS, ClocConfig
from encoder.distributed import choose_backend
from encoder.engine import make_engine
from encoder.errors import DataError, run_main
from encoder.launch import own_environment
from encoder.losses import LossConfig
from encoder.model import ADDED, ClocModel
from encoder.pretraining import train_step
from encoder.pretraining_config import PretrainConfig

BARS = [Bar("CLOC prompt", "CLIP", 1.25), Bar("CLOC mean", "CLIP", 1.6), Bar("CLIP", "plain CLIP", 1.0)]
REGION_KEYS = {"boxes", "image_index", "region_input_ids", "region_attention_mask", "region_text_index"}
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # of the first losses, relative


def random_texts(
    config: ClocConfig, count: int, shortest: int, longest: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(ids, mask), both (count, L): texts of `shortest` to `longest` tokens, the end token counted, one the longest."""
    text = config.text_config
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator)
    lengths[0] = longest
    places = torch.arange(longest)
    ids = torch.randint(3, text.vocab_size, (count, longest), generator=generator)
    ids = ids.where(places < lengths[:, None] - 1, text.eos_token_id).where(places < lengths[:, None], text.pad_token_id)
    return ids, (places < lengths[:, None]).long()


def add_batch_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that `make_batch` reads, and the preset."""
    parser.add_argument("--preset", choices=PRESETS, default="b16", help="the model (default b16, at 224 px)")
    parser.add_argument("--max_boxes", type=int, default=4, help="regions of each image (default 4)")
    parser.add_argument("--caption_tokens", type=int, default=64, help="longest caption, tokens (default 64)")
    parser.add_argument("--phrase_tokens", type=int, default=8, help="longest region text, tokens (default 8)")


def make_batch(config: ClocConfig, images: int, arguments: argparse.Namespace) -> dict[str, Tensor]:
    """A batch of `images` as `RegionBatches` gives it, `max_boxes` regions on every image."""
    generator = torch.Generator().manual_seed(0)
    regions, side = images * arguments.max_boxes, config.vision_config.image_size
    caption_ids, caption_mask = random_texts(config, images, arguments.caption_tokens // 2, arguments.caption_tokens, generator)
    region_ids, region_mask = random_texts(config, regions, 3, arguments.phrase_tokens, generator)
    return {
        "pixel_values": torch.randn(images, 3, side, side, generator=generator),
        "input_ids": caption_ids,
        "attention_mask": caption_mask,
        "boxes": torch.rand(regions, 2, 2, generator=generator).sort(dim=1).values.reshape(-1, 4),
        "image_index": torch.arange(images).repeat_interleave(arguments.max_boxes),
        "region_input_ids": region_ids,
        "region_attention_mask": region_mask,
        "region_text_index": torch.randperm(regions, generator=generator),
    }


class PlainStep:
    """The CLIP step as a textbook has it, from the weights of `model`."""

    def __init__(self, model: ClocModel, config: PretrainConfig, device: torch.device):
        towers = {key: getattr(model.config, key).to_dict() for key in ("text_config", "vision_config")}
        self.model = CLIPModel(CLIPConfig(**towers, projection_dim=model.config.projection_dim))
        weights = model.state_dict()
        self.model.load_state_dict({name: weights[name] for name in self.model.state_dict()})
        self.model.to(device).train()
        betas = config.beta1, config.beta2
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), config.learning_rate, betas, config.adam_eps, weight_decay=config.weight_decay
        )
        self.config, self.device = config, device

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """One update; returns the loss before it."""
        batch = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            logits = self.model(**batch).logits_per_image
        targets = torch.arange(len(logits), device=self.device)
        loss = (cross_entropy(logits.float(), targets) + cross_entropy(logits.float().T, targets)) / 2
        self.optimizer.zero_grad()
        loss.backward()
        if self.config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=math.log(100))
        return loss.detach()


def make_steps(config: PretrainConfig, batch: dict[str, Tensor], device: torch.device) -> dict:
    """Each step by name, a function that makes one update and returns its loss; all start from the same towers."""
    torch.manual_seed(0)
    clip = ClocModel(PRESETS[config.preset]())
    for name, parameter in clip.named_parameters():  # as pretraining with `objective: clip` does
        parameter.requires_grad = not name.startswith(ADDED)
    cloc = ClocModel(PRESETS[config.preset]())
    cloc.load_state_dict(clip.state_dict())
    plain = PlainStep(clip, config, device)
    clip_engine, cloc_engine = make_engine(clip, config), make_engine(cloc, config)
    clip_batch = {key: value for key, value in batch.items() if key not in REGION_KEYS}
    loss_config = LossConfig()

    def cloc_step(readout: str) -> Tensor:
        cloc.prompter.config.prompter_readout = readout
        return train_step(cloc_engine, [batch], loss_config)["clip_loss"]

    return {
        "plain CLIP": lambda: plain(clip_batch),
        "CLIP": lambda: train_step(clip_engine, [clip_batch], loss_config)["clip_loss"],
        "CLOC prompt": lambda: cloc_step("prompt"),
        "CLOC mean": lambda: cloc_step("mean"),
    }


def start_process_group() -> None:
    """A group of this process alone, on a free port, and libraries that keep quiet."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    transformers.logging.set_verbosity_error()
    os.environ |= own_environment({})
    deepspeed.init_distributed(choose_backend(), verbose=False)


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_batch_arguments(parser)
    parser.add_argument("--batch_size", type=int, default=256 if on_gpu else 8, help="images (default 8, on a GPU 256)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16" if on_gpu else "fp32")
    parser.add_argument("--zero_stage", type=int, default=0, help="ZeRO stage, 0 to 3 (default 0: one process shards nothing)")
    parser.add_argument("--max_grad_norm", type=float, default=1.0, help="clipping, of both (default 1; 0 clips neither)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, in which the variants take turns (default 3)")
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON")
    arguments = parser.parse_args()
    start_process_group()
    device = torch.device("cuda" if on_gpu else "cpu")
    settings = {key: getattr(arguments, key) for key in ("preset", "batch_size", "precision", "zero_stage", "max_grad_norm")}
    config = PretrainConfig(shards="none", output="none", **settings)
    batch = make_batch(PRESETS[arguments.preset](), arguments.batch_size, arguments)
    batch = {key: value.pin_memory() for key, value in batch.items()} if on_gpu else batch  # as the loader does
    steps = make_steps(config, batch, device)

    first = {name: float(steps[name]()) for name in steps}  # the warm-up, too
    difference = abs(first["CLIP"] - first["plain CLIP"]) / first["plain CLIP"]
    if difference > TOLERANCE[arguments.precision]:
        raise DataError(f"our first CLIP loss is {first['CLIP']}, the plain one {first['plain CLIP']}; they differ")
    settings |= {key: getattr(arguments, key) for key in ("max_boxes", "caption_tokens", "phrase_tokens")}
    report = {
        **settings,
        "first_loss_difference": difference,
        **report_of(in_turn(steps, arguments.rounds, device), BARS, device),
    }
    print(", ".join(f"{key} {value}" for key, value in settings.items()) + f", first losses differ by {difference:.0e}")
    show(report, arguments.out)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
