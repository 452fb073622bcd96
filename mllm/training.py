"""Training an MLLM: transformers' Trainer, on DeepSpeed or plain, with a rate per part, resume, and a stock folder at the end."""

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from encoder.distributed import choose_backend, rank, world_size
from encoder.errors import DataError
from mllm.adapter_folder import save_adapter
from mllm.box_text import BoxCodec
from mllm.checkpoint import last_checkpoint, save_mllm
from mllm.config import PARTS, MllmConfig, check_identity
from mllm.data import ConversationDataset, pixel_collator
from mllm.features import CachedTower, cache_features, feature_collator, measure_features, sample_features
from mllm.lm_loss import choose_block, use_training_loss
from mllm.lora import merged
from mllm.model import Mllm, build_mllm, freeze, part_of
from mllm.projector import fit_projector
from mllm.region_features import cache_region_features, measure_region_features
from mllm.settings import SETTINGS_FILE
from mllm.trainer import MllmTrainer

RUN_FILE, PROCESSES = "run.json", "processes"
# What `deepspeed scripts/finetune_mllm.py` runs on when the recipe names no ZeRO file.
DEFAULT_ZERO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 2},
}


def train(config: MllmConfig, launched: bool = False) -> Path:
    """Runs a recipe and returns the finished folder. The same command again goes on from the last checkpoint.

    launched: with `deepspeed`; ZeRO-2 is then used where the recipe names no ZeRO file
    """
    if config.report_to == "wandb" and find_spec("wandb") is None:
        raise DataError("report_to is wandb, but the package wandb is not installed; pip install wandb, or choose tensorboard")
    _start_processes()
    output = Path(config.output)
    checkpoint = _prepare_output(config, output)
    if (output / SETTINGS_FILE).is_file():
        _say(f"{output} is finished; nothing to do")
        return output
    if checkpoint:
        _check_processes(output)
    zero = _zero_config(config, launched)
    mllm = build_mllm(config, torch.bfloat16 if zero and config.precision == "bf16" and not config.llm_preset else torch.float32)
    dataset, val_dataset = (read_dataset(config, mllm, data) for data in (config.data, config.val_data))
    freeze(mllm.model, config.trains, getattr(torch, config.save_dtype))
    collator, tower = _collator(config, mllm, dataset, val_dataset, output)
    use_training_loss(mllm.model, choose_block(config.loss_block, mllm.model.lm_head.out_features))
    trainer = MllmTrainer(config, mllm, dataset, val_dataset, collator, training_arguments(config, zero, output))
    if rank() == 0:
        _describe(config, mllm, dataset)
        output.mkdir(parents=True, exist_ok=True)
        (output / RUN_FILE).write_text(json.dumps(config.identity() | {PROCESSES: world_size()}, indent=2) + "\n")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    _finish(config, mllm, trainer, tower, output)
    return output


def _start_processes() -> None:
    """Joins the launcher's processes, on GPUs where there are any; nothing to do for a single process."""
    backend = choose_backend()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group(backend)


def _say(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)


def _prepare_output(config: MllmConfig, output: Path) -> Path | None:
    """The checkpoint to go on from, if any; refuses an output folder of another configuration."""
    if config.resume == "never":
        if rank() == 0:
            for old in [*output.glob("checkpoint-*"), output / RUN_FILE, output / SETTINGS_FILE]:
                shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        if world_size() > 1:
            torch.distributed.barrier()
        return None
    check_identity(output, config)
    checkpoint = last_checkpoint(output)
    if world_size() > 1:
        torch.distributed.barrier()
    return checkpoint


def _check_processes(output: Path) -> None:
    """Refuses another number of processes: steps would have other rows, and ZeRO cuts the optimizer in as many parts."""
    path = output / RUN_FILE
    before = json.loads(path.read_text()).get(PROCESSES) if path.is_file() else None  # runs of before do not say
    if before not in (None, world_size()):
        raise DataError(
            f"{path}: the checkpoints here are of processes = {before}, this run has {world_size()}; start as many, "
            "choose another output, or pass --resume never to start over"
        )


def _zero_config(config: MllmConfig, launched: bool) -> dict | None:
    if config.zero is None:
        return DEFAULT_ZERO if launched else None
    path = Path(config.zero)
    if not path.is_file():
        raise DataError(f"ZeRO file {path} does not exist; see scripts/deepspeed for those that do")
    try:
        zero = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise DataError(f"ZeRO file {path}, line {error.lineno}: not JSON ({error.msg}); correct it") from error
    if config.llm_bits and zero.get("zero_optimization", {}).get("stage") == 3:
        raise DataError(f"ZeRO file {path} is stage 3, which cannot shard weights of {config.llm_bits} bits; take zero2.json")
    return zero


def read_dataset(config: MllmConfig, mllm: Mllm, data: list) -> ConversationDataset | None:
    """The files' conversations as rows; None without files."""
    if not data:
        return None
    dataset = ConversationDataset(
        data,
        config.images,
        mllm.tokenizer,
        mllm.settings.image,
        BoxCodec(mllm.settings.codec),
        mllm.num_image_tokens,
        config.max_length,
        config.share_pictures,
        config.pack,
        config.seed,
        progress=rank() == 0,
        region_tokens=mllm.settings.regions,
    )
    if config.cache_features and not dataset.image_files:
        which = "val_data" if data is config.val_data else "data"
        raise DataError(f"cache_features keeps features of pictures, but no conversation of {which} has one; set it to false")
    for line in dataset.sources:
        _say(line)
    if config.joins_rows and len(dataset) == dataset.num_records > 1:
        why = "no two fit into max_length" if config.pack else "no two have a picture in common, or answers follow it at once"
        _say(f"{config.joins_rows} joined no conversations: {why}")
    if dataset.num_cut:
        _say(f"{dataset.num_cut} of {dataset.num_records} conversations were cut at {config.max_length} tokens")
    return dataset


def _collator(config: MllmConfig, mllm: Mllm, dataset, val_dataset, output: Path) -> tuple[dict, nn.Module | None]:
    """Collators by data set, the projector's start, and the real tower where a `CachedTower` now stands in for it."""
    ids = mllm.model.config.image_token_id, mllm.tokenizer.pad_token_id
    sets = {"train": dataset, "val": val_dataset}
    sets = {name: part for name, part in sets.items() if part is not None}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tower = mllm.model.model.vision_tower
    if config.cache_features:
        tower.to(device)
        folder = config.cache_folder or output / "features"
        cached = {name: cache_features(mllm.model, part, folder, progress=rank() == 0) for name, part in sets.items()}
        regions = dict.fromkeys(sets)
        if dataset.regions is not None:
            mllm.model.model.region_tokens.to(device)
            regions = {name: cache_region_features(mllm.model, part, folder, progress=rank() == 0) for name, part in sets.items()}
            mllm.model.model.region_tokens.to("cpu")
        tower.to("cpu")
    if mllm.from_scratch and dataset.image_files:
        sample = (
            sample_features(cached["train"], dataset.num_image_tokens)
            if config.cache_features
            else measure_features(mllm.model, dataset)
        )
        torch.manual_seed(config.seed)
        fit_projector(mllm.model.model.multi_modal_projector, sample, config.embedding_std)
    if mllm.new_regions and len(dataset.regions) > 1:
        sample = regions["train"][:10_000] if config.cache_features else measure_region_features(mllm.model, dataset)
        torch.manual_seed(config.seed)
        std = mllm.model.get_input_embeddings().weight.std().item()
        fit_projector(mllm.model.model.region_tokens.projector, sample, std)
    if not config.cache_features:
        return {name: pixel_collator(part, *ids) for name, part in sets.items()}, None
    mllm.model.model.vision_tower = CachedTower(mllm.model.config.vision_feature_layer)
    return {name: feature_collator(part, cached[name], *ids, regions[name]) for name, part in sets.items()}, tower


def training_arguments(config: MllmConfig, zero: dict | None, output: Path) -> TrainingArguments:
    """The recipe in the Trainer's words; zero: DeepSpeed's configuration."""
    checkpointing = "activation_checkpointing"
    if checkpointing not in TrainingArguments.__dataclass_fields__:
        checkpointing = "gradient_checkpointing"
    return TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant_with_warmup" if config.schedule == "constant" else config.schedule,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        adam_beta2=config.beta2,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        data_seed=config.seed,
        bf16=config.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        dataloader_num_workers=config.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or 500,
        save_total_limit=config.keep_checkpoints,
        eval_strategy="steps" if config.val_data else "no",
        eval_steps=config.val_every,
        prediction_loss_only=True,
        remove_unused_columns=False,
        report_to=["wandb"] if config.report_to == "wandb" else [],
        disable_tqdm=True,
        deepspeed=zero,
        **{checkpointing: config.gradient_checkpointing},
    )


def _describe(config: MllmConfig, mllm: Mllm, dataset: ConversationDataset) -> None:
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in mllm.model.named_parameters():
        counts[part_of(name)] += parameter.numel() * parameter.requires_grad
    trained = ", ".join(f"{part} {count / 1e6:.2f} M" for part, count in counts.items() if count)
    print(
        f"{dataset.num_records} conversations on {len(dataset.image_files)} pictures in {len(dataset)} rows, "
        f"{dataset.lengths.mean():.0f} tokens each on average; training {trained}",
        flush=True,
    )


def _finish(config: MllmConfig, mllm: Mllm, trainer: MllmTrainer, tower: nn.Module | None, output: Path) -> None:
    """Writes the stock folder from the first process, with the real tower back in its place."""
    state: dict[str, Tensor]
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # a collective under ZeRO-3
    if rank() == 0:
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        if tower is not None:
            model.model.vision_tower = tower
            state |= {f"model.vision_tower.{name}": value for name, value in tower.state_dict().items()}
        if config.uses_lora and not config.saves_adapter:
            state = merged(state, config.lora_alpha / config.lora_rank)
        mllm.settings.trained.append(sorted(config.trains))
        dtype = getattr(torch, config.save_dtype)
        arguments = (mllm.tokenizer, mllm.settings, dtype, state, mllm.sentencepiece_model)
        if config.saves_adapter:
            save_adapter(output, model, mllm.lora, config, *arguments)
        else:
            save_mllm(output, model, *arguments)
        print(f"saved {output}", flush=True)
    if world_size() > 1:
        torch.distributed.barrier()
