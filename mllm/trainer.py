"""transformers' Trainer for an MLLM: a rate per part, held-out accuracy, checkpoints of what is trained, readable logs."""

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import get_length_grouped_indices

from encoder.checkpoint import forget_after
from encoder.distributed import rank
from encoder.errors import DataError
from mllm.config import MllmConfig
from mllm.conversation import IGNORE
from mllm.model import Mllm, part_of

WEIGHTS = "model.safetensors"
LOGGED = ("loss", "eval_loss", "eval_accuracy", "learning_rate", "grad_norm")


class MllmTrainer(Trainer):
    """transformers' Trainer with a rate per part, the data's own lengths, and small checkpoints of what is trained."""

    def __init__(self, config: MllmConfig, mllm: Mllm, dataset, val_dataset, collators: dict, arguments: TrainingArguments):
        self.config, self.collators = config, collators
        super().__init__(
            model=mllm.model,
            args=arguments,
            train_dataset=dataset,
            eval_dataset=val_dataset,
            data_collator=collators["train"],
            callbacks=[LogLine()],
        )
        self.remove_callback(PrinterCallback)
        mllm.model.register_load_state_dict_post_hook(_frozen_may_be_missing)
        if config.report_to == "tensorboard" and rank() == 0:
            from torch.utils.tensorboard import SummaryWriter
            from transformers.integrations import TensorBoardCallback

            self.add_callback(TensorBoardCallback(SummaryWriter(Path(config.output) / "tensorboard")))

    def get_eval_dataloader(self, eval_dataset=None):
        self.data_collator = self.collators["val"]
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = self.collators["train"]

    def evaluation_loop(self, dataloader, *args, **kwargs):
        """The Trainer's loop, with the accuracy of the supervised tokens beside the loss."""
        self._counts_2 = torch.zeros(2, dtype=torch.long, device=self.args.device)  # right, supervised
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        right, supervised = self.accelerator.reduce(self._counts_2, "sum").tolist()
        output.metrics["eval_accuracy"] = right / supervised
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None) -> tuple[Tensor, None, None]:
        loss, right_B, labels_BL = super().prediction_step(model, inputs, prediction_loss_only=False)
        counts_B2 = torch.stack([right_B, (labels_BL[:, 1:] != IGNORE).sum(1)], dim=1)
        state = self.accelerator.gradient_state
        if state.end_of_dataloader and state.remainder > 0:  # rows that only fill up the last batch of some process
            counts_B2 = counts_B2[: max(0, state.remainder - self.args.process_index * self.args.eval_batch_size)]
        self._counts_2 += counts_B2.sum(0)
        return loss, None, None

    def _prepare_inputs(self, inputs):
        """Boxes of regions stay float32: in bf16, to which the Trainer takes floats under DeepSpeed, they would move."""
        exact = {name: inputs.pop(name).to(self.args.device) for name in ("region_boxes",) if name in inputs}
        return super()._prepare_inputs(inputs) | exact

    def _get_train_sampler(self, train_dataset=None):
        if not self.config.group_by_length:
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.config.seed
        return LengthSampler(batch, self.train_dataset.lengths.tolist(), lambda: seed + int(self.state.epoch or 0))

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = parameter_groups(self.model if model is None else model, self.config)
            cls, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = cls(groups, **arguments)
        return self.optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A checkpoint's weights, trained parts only, by the model's own names; DeepSpeed writes its own file of them."""
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            if not self.is_deepspeed_enabled:
                trained = {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}
                save_file(trained, Path(output_dir) / WEIGHTS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:  # transformers leaves frozen weights out for a PeftModel alone
            engine = self.model_wrapped
            engine.save_checkpoint = partial(type(engine).save_checkpoint, engine, exclude_frozen_parameters=True)
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if saved.keys() != trained.keys():
            raise DataError(
                f"{resume_from_checkpoint} holds {len(saved)} trained parameters, this run trains {len(trained)} others; "
                "choose another output, or pass --resume never to start over"
            )
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved[name])


def _frozen_may_be_missing(model: nn.Module, keys) -> None:
    """What a load finds missing, `keys`, is no error where it is frozen: checkpoints leave it out, and it is as it was loaded."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    keys.missing_keys[:] = [name for name in keys.missing_keys if name not in frozen]


class LengthSampler(Sampler):
    """Rows of like length side by side, the longest first: transformers' order, drawn anew in every epoch.

    batch: rows of a step, of all processes together; seed: called at the start of an epoch. The order is a function of the
    two, so it is the same in every process, after a resume, and in a dry run
    """

    def __init__(self, batch: int, lengths: list[int], seed: Callable[[], int]):
        self.batch, self.lengths, self.seed = batch, lengths, seed

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed())
        return iter(get_length_grouped_indices(self.lengths, self.batch, generator=generator))


def parameter_groups(model: nn.Module, config: MllmConfig) -> list[dict]:
    """AdamW's groups: the language model first, then projector and tower, each with its rate; only matrices decay."""
    rates = {"projector": config.projector_learning_rate}
    rates |= dict.fromkeys(("tower", "tower_lora"), config.tower_learning_rate)
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((part_of(name), parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": rates.get(part) or config.learning_rate,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (part, decays), parameters in sorted(groups.items())
    ]


class LogLine(TrainerCallback):
    """One line per interval: step, loss, rate, gradient norm, rows per second, time left; and in log.jsonl."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.start, self.first = time.monotonic(), state.global_step
        if state.is_world_process_zero:
            forget_after(Path(args.output_dir) / "log.jsonl", state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        if "eval_loss" in logs or "loss" in logs:
            numbers = {key: float(logs[key]) for key in LOGGED if key in logs}
            with (Path(args.output_dir) / "log.jsonl").open("a") as file:
                file.write(json.dumps({"step": state.global_step, **numbers}) + "\n")
        if "eval_loss" in logs:
            print(
                f"step {state.global_step}  held-out loss {float(logs['eval_loss']):.4f}  "
                f"accuracy of tokens {float(logs['eval_accuracy']):.4f}",
                flush=True,
            )
        elif "loss" in logs:
            seconds, steps = time.monotonic() - self.start, state.global_step - self.first
            batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            left = seconds / max(steps, 1) * (state.max_steps - state.global_step)
            print(
                f"step {state.global_step}/{state.max_steps}  loss {float(logs['loss']):.4f}  "
                f"lr {float(logs['learning_rate']):.2e}  grad norm {float(logs.get('grad_norm', 0)):.2f}  "
                f"{steps * batch / seconds:.1f} rows/s  {left:.0f} s left",
                flush=True,
            )
