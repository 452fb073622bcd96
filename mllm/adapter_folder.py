"""An adapter on disk: LoRA in peft's files, the other trained parts beside it, and `grounding.json`, which names the base.

adapter_model.safetensors, adapter_config.json   LoRA as peft writes it: `PeftModel.from_pretrained(llava, folder)` reads it
trained.safetensors                              parts that were trained whole (projector, tower), by stock Llava's names
tokenizer files, grounding.json
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

from encoder.errors import DataError
from mllm.checkpoint import check_tower, load_mllm, tower_hash
from mllm.config import MllmConfig
from mllm.lora import add_lora, is_lora, merged, quantize, remove_lora
from mllm.settings import SETTINGS_FILE, MllmSettings
from mllm.tokenizer import save_tokenizer

ADAPTER, TRAINED = "adapter_model.safetensors", "trained.safetensors"
PEFT_PREFIX = "base_model.model."
# What the base is rebuilt from; of a base folder the first alone.
PATHS = ("model", "tower", "llm", "projector", "prompter")
BASE_FIELDS = (
    *PATHS, "feature_layer", "geometry", "codec", "template", "projector_type", "region_tokens", "tile_grids",
    "seed",
)  # fmt: skip


def save_adapter(
    folder: Path,
    model: LlavaForConditionalGeneration,
    lora,
    config: MllmConfig,
    tokenizer: PreTrainedTokenizerBase,
    settings: MllmSettings,
    dtype: torch.dtype,
    state: dict[str, Tensor],
    sentencepiece_model: bytes | None,
) -> None:
    """Writes the folder; `grounding.json` comes last and so marks a complete one.

    lora: peft's LoraConfig, None where no LoRA was trained; state: full weights by the model's own names
    dtype: the format that frozen parts were rounded to in training, and those trained whole are now
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS_FILE).unlink(missing_ok=True)
    state = {name: value.detach().cpu() for name, value in state.items()}
    if lora is not None:
        own = {name: value for name, value in state.items() if is_lora(name)}
        save_file({PEFT_PREFIX + name.replace(".default.", "."): v.contiguous() for name, v in own.items()}, folder / ADAPTER)
        lora.inference_mode = True
        lora.save_pretrained(folder)
    whole = {n for n, p in model.named_parameters() if p.requires_grad and not is_lora(n)}
    save_file({name: state[name].to(dtype).contiguous() for name in sorted(whole)}, folder / TRAINED)
    save_tokenizer(tokenizer, folder, sentencepiece_model)
    settings.base = {name: getattr(config, name) for name in BASE_FIELDS[: 1 if config.model else None]}
    for name in PATHS:
        if settings.base.get(name):
            settings.base[name] = str(Path(settings.base[name]).resolve())
    settings.tower_hash = _tower_hash(state, dtype, _scaling(lora))
    settings.dtype, settings.llm_bits = str(dtype).removeprefix("torch."), config.llm_bits
    settings.write(folder)


def load_adapter(
    folder: str | Path, settings: MllmSettings, dtype: torch.dtype, attention: str
) -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerBase, MllmSettings]:
    """`mllm.checkpoint.load_mllm` of an adapter folder."""
    from peft import PeftConfig
    from transformers import AutoTokenizer

    folder, saved = Path(folder), getattr(torch, settings.dtype)
    model = _base(settings, dtype, attention)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(saved).to(dtype)  # as they were frozen in training
    lora, values = None, {}
    try:
        if (folder / ADAPTER).is_file():
            lora = PeftConfig.from_pretrained(folder)
            own = load_file(folder / ADAPTER).items()
            values = {name.removeprefix(PEFT_PREFIX).replace(".weight", ".default.weight"): value for name, value in own}
        values |= load_file(folder / TRAINED)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{folder} cannot be read ({reason}); copy or train the folder again") from error
    if settings.llm_bits:
        quantize(model.model.language_model, settings.llm_bits, saved)
    if lora is not None:
        add_lora(model, lora)
    parameters = dict(model.named_parameters())
    wrong = {name for name, value in values.items() if name not in parameters or parameters[name].shape != value.shape}
    wrong |= {name for name in parameters if is_lora(name)} - values.keys()
    if wrong:
        raise DataError(
            f"{folder}: {len(wrong)} parameters do not fit the model it was trained on ({', '.join(sorted(wrong)[:3])}); "
            f"put back the base that {SETTINGS_FILE} names, or train the folder again"
        )
    for name, value in values.items():
        parameters[name].data = value.to(dtype)
    if lora is not None and not settings.llm_bits:
        model = remove_lora(model, _scaling(lora))
    check_tower(folder, _tower_hash(model.state_dict(), saved, _scaling(lora)), settings)
    return model.eval(), tokenizer, settings


def merge_adapter(folder: str | Path) -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerBase, MllmSettings]:
    """A stock Llava of an adapter folder, float32: LoRA is added to the whole base, also where it learned on low bits."""
    settings = MllmSettings.read(folder)
    if not settings.base:
        raise DataError(f"{folder} is no adapter folder: {SETTINGS_FILE} names no base; it is a whole MLLM already")
    settings.llm_bits = None
    model, tokenizer, settings = load_adapter(folder, settings, torch.float32, "sdpa")
    settings.base = {}
    return model, tokenizer, settings


def _base(settings: MllmSettings, dtype: torch.dtype, attention: str) -> LlavaForConditionalGeneration:
    """The model that the adapter was trained on."""
    from mllm.model import build_mllm  # which loads folders by `load_mllm`

    if "model" in settings.base and settings.base["model"]:
        return load_mllm(settings.base["model"], dtype, attention)[0]
    nothing = {"data": ["-"], "images": "-", "output": "-", "train": ["projector"], "attention": attention}
    return build_mllm(MllmConfig(**nothing, **settings.base), dtype).model


def _scaling(lora) -> float:
    return 0.0 if lora is None else lora.lora_alpha / lora.r


def _tower_hash(state: dict[str, Tensor], dtype: torch.dtype, scaling: float) -> str:
    tower = {name: value for name, value in state.items() if name.startswith("model.vision_tower.")}
    return tower_hash({name: value.to(dtype) for name, value in merged(tower, scaling).items()})
