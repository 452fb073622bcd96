"""LoRA layers and low-bit weights inside a stock Llava: peft's adapters, bitsandbytes' linear layers under them.

The model stays a `LlavaForConditionalGeneration`; only some of its linear layers change their class. peft and bitsandbytes
are imported where they are used: they take seconds, and most runs need neither.
"""

import logging
import re
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from encoder.errors import DataError
from mllm.config import MllmConfig

FEW_TOKENS = 64  # up to which the fast kernel is the faster one
MODULES = {"llm_lora": "language_model", "tower_lora": "vision_tower"}


def lora_config(model: LlavaForConditionalGeneration, config: MllmConfig):
    """peft's configuration of the LoRA layers (arXiv 2106.09685) that a recipe names.

    They stand in the numbered layers of language model or tower: the output layer is left alone, as in LLaVA.
    """
    from peft import LoraConfig

    modules = "|".join(module for part, module in MODULES.items() if part in config.trains)
    inside = re.compile(rf"model\.({modules})\..*\.\d+\..+")
    linear = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear) and inside.fullmatch(n)}
    if wrong := sorted(set(config.lora_targets) - linear):
        raise DataError(
            f"lora_targets names '{wrong[0]}', which is no linear layer there; choose from {', '.join(sorted(linear))}"
        )
    names = "|".join(sorted(config.lora_targets or linear))
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=rf"model\.({modules})\..*\.\d+\.(.*\.)?({names})",
        base_model_name_or_path=config.model,
        inference_mode=False,
    )


def add_lora(model: LlavaForConditionalGeneration, lora) -> None:
    """Puts the layers of a peft LoraConfig beside the linear layers that it names."""
    from peft import inject_adapter_in_model

    with _told_to_peft(model):
        inject_adapter_in_model(lora, model)


@contextmanager
def _told_to_peft(model: nn.Module):
    """peft reads these attributes to choose its layers; other libraries would take them for more than that."""
    kinds = {type(module).__name__ for module in model.modules()}
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = "Linear4bit" in kinds, "Linear8bitLt" in kinds
    try:
        yield
    finally:
        del model.is_loaded_in_4bit, model.is_loaded_in_8bit


def quantize(llm: nn.Module, bits: int, saved: torch.dtype, computed: torch.dtype | None = None) -> None:
    """Linear layers of a language model in 4 bits (NF4, scales quantised too: arXiv 2305.14314) or 8 (arXiv 2208.07339).

    saved: weights are rounded to this format first, so that training and whoever reloads quantise the same numbers
    computed: what layers in 4 bits multiply in; none takes the format that the weights have now
    The head and the embeddings are not among `llm`'s linear layers and keep their format.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in [name for name, module in llm.named_modules() if isinstance(module, nn.Linear)]:
        parent, _, leaf = name.rpartition(".")
        parent = llm.get_submodule(parent)
        setattr(parent, leaf, _low_bit(getattr(parent, leaf), bits, saved, computed).to(device))


def bits_while_loading(bits: int, dtype: torch.dtype):
    """`quantize` as an argument of `from_pretrained`, which then holds no layer in full but the one it reads.

    dtype: of what stays as it is, and of the arithmetic; weights are quantised as they are in it
    """
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a kernel that is not used
    others = ["model.vision_tower", "model.multi_modal_projector", "model.region_tokens", "lm_head"]
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0, llm_int8_skip_modules=others)
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    return BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=others, **nf4)


def _low_bit(layer: nn.Linear, bits: int, saved: torch.dtype, computed: torch.dtype | None) -> nn.Linear:
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    sizes = {"input_features": layer.in_features, "output_features": layer.out_features, "bias": layer.bias is not None}
    weight = layer.weight.data.to(saved).float()
    if bits == 4:
        low = Linear4bit(
            **sizes, compute_dtype=computed or layer.weight.dtype, compress_statistics=True, quant_type="nf4", device="meta"
        )
        low.weight = Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=low)
        choose_kernels(low, fast=False)
    else:
        low = Linear8bitLt(**sizes, has_fp16_weights=False, threshold=6.0, device="meta")
        low.weight = Int8Params(weight.to(torch.float16), requires_grad=False, has_fp16_weights=False)
    if layer.bias is not None:
        low.bias = layer.bias
    return low.train(layer.training)


def forget_scales(model: nn.Module) -> None:
    """From now on a state of the model has its 4-bit weights without their scales, which no load takes back.

    A strict one, as DeepSpeed's on resuming, stops at them; the layers have them from their base.
    """

    def take_out(layer: nn.Module, state: dict[str, Tensor], prefix: str, _) -> None:
        for name in [name for name in state if name.startswith(f"{prefix}weight.")]:
            del state[name]

    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.register_state_dict_post_hook(take_out)


def choose_kernels(model: nn.Module, fast: bool) -> None:
    """Whether 4-bit layers may use bitsandbytes' bf16 kernel, on processors that have its instructions.

    It repacks the weights for good and rounds their scales to bf16. A layer of 4096 x 4096 then takes 2 ms a token in place of
    27, but 380 in place of 90 for a picture's 640: it comes with the first short input. Training and float32 keep the plain one,
    and so do layers that the repacking has no form for.
    """
    for layer in model.modules():
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.support_avx512bf16_for_cpu = False
            if fast and layer.in_features % 64 == 0 and layer.out_features % 32 == 0:
                layer.register_forward_pre_hook(_use_fast_kernel)


def _use_fast_kernel(layer: nn.Module, inputs: tuple[Tensor]) -> None:
    layer.support_avx512bf16_for_cpu |= inputs[0].numel() < FEW_TOKENS * layer.in_features


def is_lora(name: str) -> bool:
    """Whether a parameter of that name belongs to a LoRA layer."""
    return ".lora_" in name


def added(state: dict[str, Tensor], stem: str, scaling: float) -> Tensor:
    """What the LoRA layer at `stem` adds to its base's weight, float32: scaling B A, with scaling = alpha / rank."""
    down, up = (state[f"{stem}.lora_{letter}.default.weight"].float() for letter in "AB")
    return scaling * (up @ down)


def merged(state: dict[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """A state with LoRA layers -> one of a stock Llava, summed in float32; the base must be in full precision."""
    stock = {}
    for name, value in state.items():
        if name.endswith(".base_layer.weight"):
            value = value.float() + added(state, name.removesuffix(".base_layer.weight"), scaling)
        if not is_lora(name):
            stock[name.replace(".base_layer.", ".")] = value
    return stock


def remove_lora(model: LlavaForConditionalGeneration, scaling: float) -> LlavaForConditionalGeneration:
    """The model with its LoRA layers added to the weights and taken out; the base must be in full precision."""
    for name in [name for name, module in model.named_modules() if hasattr(module, "lora_A")]:
        layer, (parent, _, leaf) = model.get_submodule(name), name.rpartition(".")
        weight = layer.base_layer.weight  # in place: the model is never there twice
        weight.data.copy_(weight.data.float() + added(layer.state_dict(prefix=f"{name}."), name, scaling))
        setattr(model.get_submodule(parent), leaf, layer.base_layer)
    return model
