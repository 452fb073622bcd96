"""Pretrains an encoder on region shards: `cloc`, or `clip` for the baseline on the same images, order and steps.

    python scripts/pretrain_encoder.py scripts/recipes/nano_encoder.yaml --shards DIR --output DIR
    deepspeed --num_gpus 8 scripts/pretrain_encoder.py RECIPE --shards DIR --output DIR
    sbatch scripts/slurm/pretrain.sbatch RECIPE --shards DIR --output DIR

Any field of the recipe is also a flag. The same command again goes on from the last checkpoint.
"""

import argparse
import json
import logging
import os
from dataclasses import asdict
from pathlib import Path

import deepspeed
import torch
import transformers

from encoder.arguments import read_recipe
from encoder.data.batches import RegionBatches
from encoder.data.cache import ShardCache
from encoder.data.reader import BrokenRecords, RegionDataset
from encoder.distributed import choose_backend, rank, world_size
from encoder.engine import reshape_scalars
from encoder.errors import run_main
from encoder.export import export_clip
from encoder.launch import own_environment, slurm_environment
from encoder.losses import LossConfig
from encoder.model import ADDED, ClocModel
from encoder.optimizer import averaged_weights
from encoder.pretraining import pretrain
from encoder.pretraining_config import RUN_FIELDS, PretrainConfig, add_pretraining_flags, build_configs
from encoder.processor import ClocProcessor
from encoder.start import make_model


def parse_arguments() -> tuple[PretrainConfig, LossConfig]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", help="YAML file with values of the fields below; flags win over it")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    add_pretraining_flags(parser)
    flags = vars(parser.parse_args())
    values = read_recipe(flags["recipe"], RUN_FIELDS) if flags["recipe"] else {}
    return build_configs({**values, **flags})


def start_process_group() -> None:
    """Joins the group of the launcher or of SLURM; under plain `python`, makes one of its own on a free port of this machine."""
    os.environ |= slurm_environment(os.environ)
    os.environ |= own_environment(os.environ)
    deepspeed.init_distributed(choose_backend(), verbose=False)


def open_dataset(config: PretrainConfig) -> RegionDataset:
    """The records that `config.shards` names."""
    log = Path(config.output) / "broken" / f"rank_{rank():05d}.txt"
    cache = ShardCache(config.shard_cache, config.shard_cache_gb)
    return RegionDataset(config.shards, cache=cache, broken=BrokenRecords(config.max_broken, log))


def save_final(engine: deepspeed.DeepSpeedEngine, processor: ClocProcessor, config: PretrainConfig, loss_config: LossConfig):
    """The trained model as a CLOC folder, or for the CLIP objective as a stock CLIP folder; its average beside it."""
    model, output = engine.module, Path(config.output)
    averages = averaged_weights(engine) if config.ema_decay else {}
    record = {**asdict(config), "loss": asdict(loss_config), "world_size": world_size()}

    def save(folder: Path) -> None:
        if config.objective == "cloc":
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
        else:
            export_clip(model, folder, processor)
        (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")

    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=config.zero_stage == 3):
        if rank() == 0:
            reshape_scalars(model, model.scalar_shape)
            save(output / "model")
            if averages:
                for name, parameter in model.named_parameters():
                    if name in averages:
                        parameter.data.copy_(averages[name].reshape(parameter.shape))
                save(output / "model_ema")
            print(f"done: {config.steps} steps, the {config.objective} encoder is in {output / 'model'}", flush=True)


def prepare(
    dataset: RegionDataset, config: PretrainConfig, loss_config: LossConfig
) -> tuple[ClocModel, ClocProcessor, RegionBatches]:
    """All that `encoder.pretraining.pretrain` takes: the model at its start, its processor, and the batches."""
    model, processor = make_model(config, loss_config, dataset)
    if config.objective == "clip":
        # Same initial towers as the method's; the Prompter takes no part and is not saved.
        for name, parameter in model.named_parameters():
            parameter.requires_grad = not name.startswith(ADDED)
    batches = RegionBatches(
        dataset,
        processor,
        config.batch_size,
        config.max_boxes,
        config.seed,
        rank(),
        world_size(),
        with_regions=config.objective == "cloc",
        recaption_ratio=config.recaption_ratio,
        lanes=config.lanes,
        window=config.shuffle_window,
    )
    return model, processor, batches


def train(dataset: RegionDataset, config: PretrainConfig, loss_config: LossConfig) -> None:
    """One run, from the records to the saved model, in the process group that is there."""
    model, processor, batches = prepare(dataset, config, loss_config)
    save_final(pretrain(model, processor, batches, config, loss_config), processor, config, loss_config)


def main() -> None:
    config, loss_config = parse_arguments()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    transformers.logging.set_verbosity_error()
    start_process_group()
    train(open_dataset(config), config, loss_config)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
