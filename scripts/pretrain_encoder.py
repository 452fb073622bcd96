"""Pretrains an encoder on region shards: `cloc`, or `clip` for the baseline on the same images, order and steps.

    python scripts/pretrain_encoder.py scripts/recipes/nano_encoder.yaml --shards DIR --output DIR
    deepspeed --num_gpus 8 scripts/pretrain_encoder.py RECIPE --shards DIR --output DIR
    sbatch scripts/slurm/pretrain.sbatch RECIPE --shards DIR --output DIR

Any field of the recipe is also a flag. The same command again goes on from the last checkpoint.
"""

import argparse
import dataclasses
import json
import logging
import math
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import deepspeed
import torch
import transformers

from encoder.arguments import add_fields, build, read_recipe
from encoder.config import PRESETS, ClocConfig
from encoder.data.batches import RegionBatches
from encoder.data.cache import ShardCache
from encoder.data.reader import BrokenRecords, RegionDataset
from encoder.distributed import choose_backend, rank, world_size
from encoder.engine import reshape_scalars
from encoder.errors import DataError, run_main
from encoder.export import export_clip
from encoder.from_clip import from_clip
from encoder.launch import slurm_environment
from encoder.losses import LossConfig
from encoder.model import ADDED, ClocModel
from encoder.optimizer import averaged_weights
from encoder.pretrained import WHOLE, folder_kind, load_processor, load_strict
from encoder.pretraining import pretrain
from encoder.pretraining_config import PretrainConfig
from encoder.processor import ClocImageProcessor, ClocProcessor
from encoder.tokenizer import train_text_tokenizer

# Where SigLIP's biases and 1/temperature start (arXiv 2303.15343, Section 3.2): nearly every pair of a batch is a negative.
SIGMOID_BIAS, SIGMOID_SCALE = -10.0, 10.0
BIASES = ("logit_bias", "region_logit_bias")
TOKENIZER_RECORDS = 200_000  # a small vocabulary learns no more from more


def parse_arguments() -> tuple[PretrainConfig, LossConfig]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", help="YAML file with values of the fields below; flags win over it")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    add_fields(parser, PretrainConfig)
    add_fields(parser, LossConfig)
    flags = vars(parser.parse_args())
    known = {field.name for cls in (PretrainConfig, LossConfig) for field in dataclasses.fields(cls)}
    values = read_recipe(flags["recipe"], known) if flags["recipe"] else {}
    values |= {key: value for key, value in flags.items() if key in known}
    return build(PretrainConfig, values), build(LossConfig, values)


def start_process_group() -> None:
    """Joins the group of the launcher or of SLURM; under plain `python`, makes one of its own on a free port of this machine."""
    os.environ |= slurm_environment(os.environ)
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {
            "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    deepspeed.init_distributed(choose_backend(), verbose=False)


def open_dataset(config: PretrainConfig) -> RegionDataset:
    """The records that `config.shards` names."""
    log = Path(config.output) / "broken" / f"rank_{rank():05d}.txt"
    cache = ShardCache(config.shard_cache, config.shard_cache_gb)
    return RegionDataset(config.shards, cache=cache, broken=BrokenRecords(config.max_broken, log))


def texts_of(dataset: RegionDataset) -> Iterator[str]:
    """The texts of the first `TOKENIZER_RECORDS` records, the same on every rank."""
    for index in range(min(len(dataset), TOKENIZER_RECORDS)):
        try:
            record = dataset.record(index)
        except DataError as error:
            dataset.broken.add(error)
            continue
        yield from record.captions
        if record.alt_text:
            yield record.alt_text
        yield from (phrase for region in record.regions for phrase in region.phrases)


def make_model(config: PretrainConfig, loss_config: LossConfig, dataset: RegionDataset) -> tuple[ClocModel, ClocProcessor]:
    """The model to train, the same on every rank, and its processor."""
    fields = config.region_fields()
    kind = folder_kind(config.init) if config.init else None
    adds_biases = loss_config.contrastive == "sigmoid" and not has_biases(config.init, kind)
    if adds_biases:
        fields["logit_bias_init_value"] = SIGMOID_BIAS
    torch.manual_seed(config.seed)
    if config.init:
        if kind.startswith("cloc"):
            model = load_strict(WHOLE[kind], config.init, BIASES if adds_biases else (), dtype=torch.float32, **fields)
        else:
            model = from_clip(config.init, **fields)
        processor = load_processor(config.init)
    else:
        if config.preset not in PRESETS:
            raise DataError(f"preset '{config.preset}' is not known; choose one of {', '.join(PRESETS)}")
        limit = PRESETS[config.preset](**fields).text_config.max_position_embeddings
        tokenizer = train_text_tokenizer(texts_of(dataset), config.vocab_size, limit)
        model = ClocModel(PRESETS[config.preset](vocab_size=len(tokenizer), **fields))
        image_processor = ClocImageProcessor(size=model.config.vision_config.image_size, geometry=model.config.geometry)
        processor = ClocProcessor(image_processor, tokenizer)
    scales = [scale for scale in (model.logit_scale, model.region_logit_scale) if scale is not None]
    for scale in scales if adds_biases else ():
        scale.data.fill_(math.log(SIGMOID_SCALE))
    highest = max(float(scale.detach().exp()) for scale in scales)
    if config.init and highest > 1.001 * loss_config.max_logit_scale:
        raise DataError(
            f"{config.init}: 1/temperature is {highest:.1f}, above max_logit_scale {loss_config.max_logit_scale:g}, to which the "
            f"first step would cut it; pass --max_logit_scale {math.ceil(1.2 * highest)}"
        )
    return model, processor


def has_biases(init: str | None, kind: str | None) -> bool:
    """Whether the model to start from has the sigmoid loss's biases: any SigLIP, and a CLOC trained with them."""
    if kind == "cloc":
        return ClocConfig.from_pretrained(init).logit_bias_init_value is not None
    return kind is not None and "siglip" in kind


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
