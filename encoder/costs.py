"""What a training step costs in arithmetic and memory, found by running the model's own code on tensors without data.

Nothing is computed on the `meta` device: shapes alone flow through the real modules, while the operations are counted
(torch.utils.flop_counter) and the tensors that the backward pass needs are added up. So the numbers follow the code.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from encoder.losses import LossConfig
from encoder.model import ADDED, ClocModel
from encoder.patch_dropout import kept_patches, only_patches
from encoder.pretrained import WHOLE
from encoder.pretraining_config import PretrainConfig
from encoder.siglip import ClocSiglipModel
from encoder.start import start_config

REGION_TEXT_TOKENS = 16  # what a region's text is taken to be long; captions are taken at the text tower's full length
LOSS_PRODUCTS = 6  # matrix products of a contrastive loss in blocks, forward and backward


class _FlashAttention(torch.autograd.Function):
    """Attention in the cost of a fused kernel: it keeps its inputs and its output, never the matrix of weights."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query @ key.transpose(-1, -2) @ value
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        query, key, value, _ = ctx.saved_tensors
        weights = query @ key.transpose(-1, -2)  # again
        grad_weights = grad @ value.transpose(-1, -2)
        return grad_weights @ key, grad_weights.transpose(-1, -2) @ query, weights.transpose(-1, -2) @ grad


def _flash_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **_) -> tuple[Tensor, None]:
    """As transformers calls it, (B, heads, tokens, width); heads that share keys and values get their copy."""
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, 1) if groups > 1 else tensor for tensor in (key, value))
    return _FlashAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register("counted_attention", _flash_attention)


@dataclass
class Cost:
    """Of one forward and backward pass over one sample.

    forward_flops, backward_flops: a multiply-add is two
    saved_bytes: kept from the forward pass for the backward pass
    layer_flops, layer_bytes: those of them within layers that can be recomputed
    layer_input_bytes: of the inputs of those layers
    largest_layer_bytes: of the one that keeps most
    """

    forward_flops: int
    backward_flops: int
    saved_bytes: int
    layer_flops: int = 0
    layer_bytes: int = 0
    layer_input_bytes: int = 0
    largest_layer_bytes: int = 0

    def flops(self, recompute: bool) -> int:
        """Of a training step on the sample."""
        return self.forward_flops + self.backward_flops + (self.layer_flops if recompute else 0)

    def activation_bytes(self, recompute: bool) -> int:
        """In memory at once, per sample."""
        if not recompute:
            return self.saved_bytes
        return self.saved_bytes - self.layer_bytes + self.layer_input_bytes + self.largest_layer_bytes


def measure_cost(model: PreTrainedModel, loss_of: Callable[[], Tensor]) -> Cost:
    """The cost of `loss_of()`, a pass of `model` over one sample, and of its backward pass; all on the meta device."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("counted_attention")
    saved: dict[int, Tensor] = {}  # by storage: a tensor that two operations need is kept once
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    total, layers, starts = 0, Cost(0, 0, 0), []

    def keep(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in saved:
            saved[storage._cdata] = tensor
            total += storage.nbytes()
        return tensor

    def enter(_, inputs: tuple) -> None:
        layers.layer_input_bytes += sum(value.untyped_storage().nbytes() for value in inputs if isinstance(value, Tensor))
        starts.append((total, counter.get_total_flops()))

    def leave(*_) -> None:
        start, flops = starts.pop()
        layers.layer_bytes += total - start
        layers.layer_flops += counter.get_total_flops() - flops
        layers.largest_layer_bytes = max(layers.largest_layer_bytes, total - start)

    found = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    hooks = [module.register_forward_pre_hook(enter) for module in found]
    hooks += [module.register_forward_hook(leave) for module in found]
    counter = FlopCounterMode(display=False)
    with counter:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = loss_of()
        forward = counter.get_total_flops()
        loss.backward()
        layers.forward_flops, layers.backward_flops = forward, counter.get_total_flops() - forward
    for hook in hooks:
        hook.remove()
    layers.saved_bytes = total
    return layers


def state_bytes(model: nn.Module, stage: int | None, processes: int, ema: bool = False) -> dict[str, float]:
    """What one process holds beside activations: `weights`, `gradients` and `optimizer` (AdamW), by the ZeRO stage.

    stage: 0 to 3 under DeepSpeed, whose ZeRO and bf16 keep a float32 copy of what learns; None without it
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trained)
    copied = bool(stage) or any(parameter.element_size() < 4 for parameter in trained)
    stage = stage or 0
    return {
        "weights": weights / (processes if stage == 3 else 1),
        "gradients": sum(p.numel() * p.element_size() for p in trained) / (processes if stage >= 2 else 1),
        "optimizer": count * 4 * (2 + copied + ema) / (processes if stage >= 1 else 1),
    }


def meta_encoder(config: PretrainConfig, loss_config: LossConfig) -> ClocModel | ClocSiglipModel:
    """The model to be trained, without data, in the precision of the run; what does not learn has no gradient."""
    start = start_config(config, loss_config)
    with torch.device("meta"):
        model = WHOLE[start.model_type](start).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = config.objective == "cloc" or not name.startswith(ADDED)
    return model.to(torch.bfloat16 if config.precision == "bf16" else torch.float32)


def encoder_cost(model: ClocModel | ClocSiglipModel, config: PretrainConfig) -> Cost:
    """Per image with `max_boxes` regions. `model` of `meta_encoder`."""
    vision, text = model.config.vision_config, model.config.text_config
    embeddings, side, length = model.vision_model.embeddings, vision.image_size, text.max_position_embeddings
    is_siglip = isinstance(model, ClocSiglipModel)  # its texts are padded to the full length
    region_length = length if is_siglip else min(REGION_TEXT_TOKENS, length)
    patches = kept_patches(range(1), 0, 0, embeddings.num_patches, config.patch_dropout) if config.patch_dropout else None

    def loss_of() -> Tensor:
        regions = {}
        if config.objective == "cloc":
            count = config.max_boxes
            regions = {
                "boxes": torch.zeros(count, 4),
                "image_index": torch.zeros(count, dtype=torch.long),
                "region_input_ids": torch.zeros(count, region_length, dtype=torch.long),
            }
        pixels, ids = torch.zeros(1, 3, side, side, dtype=model.dtype), torch.zeros(1, length, dtype=torch.long)
        with only_patches(embeddings, None if patches is None else patches.to("meta")):
            output = model(pixels, ids, **regions)
        return sum(value.float().sum() for value in vars(output).values() if value is not None and value.requires_grad)

    with torch.device("meta"):
        return measure_cost(model, loss_of)


def contrastive_flops(model: ClocModel | ClocSiglipModel, config: PretrainConfig, processes: int) -> int:
    """Of a step's contrastive losses on one process: its rows against the rows of all."""
    rows = config.batch_size**2 + ((config.batch_size * config.max_boxes) ** 2 if config.objective == "cloc" else 0)
    return LOSS_PRODUCTS * 2 * rows * model.config.projection_dim // processes


def loss_bytes(model: ClocModel | ClocSiglipModel, config: PretrainConfig, loss_config: LossConfig) -> int:
    """Of the features of all processes, images and texts, values and gradients, in float32, and of the blocks of logits."""
    rows = config.batch_size * (1 + (config.max_boxes if config.objective == "cloc" else 0))
    return rows * model.config.projection_dim * 2 * 2 * 4 + 16 * min(loss_config.block_size, rows) ** 2
