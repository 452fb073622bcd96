"""An MLLM on disk: a stock `llava` or `llava_next` folder, and `grounding.json` beside it with what stock code does not know.

Weights, configuration, tokenizer and image settings load in transformers without this package; with region tokens the folder
is of a class of ours, `llava_regions` or `llava_next_regions`.
"""

import json
import shutil
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from encoder.errors import DataError
from encoder.geometry import ANYRES
from encoder.pretrained import weights_hash
from mllm.image_input import ImageInput
from mllm.lora import bits_while_loading, choose_kernels, quantize
from mllm.opening import local_folder, read_mllm
from mllm.regions import COORDS
from mllm.settings import SETTINGS_FILE, MllmSettings
from mllm.templates import end_token_ids
from mllm.tokenizer import save_tokenizer

TOWER = "vision_tower."  # before its parameters' names


def load_mllm(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    device_map: str | dict | None = None,
    bits: int | None = None,
    template: str | None = None,
) -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerBase, MllmSettings]:
    """Model in evaluation mode, tokenizer and settings, of each kind of folder or name that `mllm.opening` knows.

    An adapter folder gives the model it was trained on with LoRA added to the weights; in low bits LoRA stays beside them. Of a
    folder of ours the tower's weights must be those that were saved.
    device_map: a device, `auto` or a dictionary of modules, as in accelerate; none is the CPU
    bits: 4 (NF4) or 8 keeps the language model's linear layers so; they are converted one by one as they are read
    template: of a stock folder, which of `mllm.templates` it was trained on, where its own does not tell
    """
    folder = local_folder(folder)
    tokenizer, settings = read_mllm(folder, template)
    if settings.base:
        from mllm.adapter_folder import load_adapter  # which loads its base by this function

        model, tokenizer, settings = load_adapter(folder, settings, dtype, attention)
        if bits and not settings.llm_bits:
            quantize(model.model.language_model, bits, getattr(torch, settings.dtype))
        return placed(model, device_map), tokenizer, settings
    how = {"dtype": dtype, "attn_implementation": attention}
    if bits:
        how |= {"quantization_config": bits_while_loading(bits, dtype), "device_map": device_map or "cpu"}
    elif device_map is not None:  # which ZeRO-3 does not take
        how["device_map"] = device_map
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **how
        )
    except (OSError, ValueError, SafetensorError) as error:  # no weights, or not whole
        reason = " ".join(str(error).split())
        raise DataError(f"{folder} cannot be read ({reason}); copy or train the folder again") from error
    wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if wrong:
        raise DataError(
            f"{folder}: {len(wrong)} parameters are missing or of another size ({', '.join(wrong[:3])}); "
            "config.json and weights are not of one model, copy or train the folder again"
        )
    if (found := model.config.model_type) != settings.model_type:
        raise DataError(
            f"{folder}: config.json is of a {found}, {SETTINGS_FILE} of a {settings.model_type}; they are not of one model, "
            "train the folder again"
        )
    if settings.tower_hash:
        check_tower(folder, saved_tower_hash(folder), settings)
    choose_kernels(model, fast=dtype == torch.bfloat16)
    model.config.image_seq_length = num_square_tokens(model.config)
    return model.eval(), tokenizer, settings


def placed(model: nn.Module, device_map: str | dict | None) -> nn.Module:
    """The model, which is on the CPU, where `device_map` says."""
    if device_map is None or (isinstance(device_map, str) and device_map != "auto"):
        return model.to(device_map or "cpu")
    from accelerate import dispatch_model, infer_auto_device_map

    if device_map == "auto":
        device_map = infer_auto_device_map(model, no_split_module_classes=list(model._no_split_modules or []))
    return dispatch_model(model, device_map)


def num_square_tokens(config: PreTrainedConfig) -> int:
    """Tokens that one square of a Llava becomes: its patches, and CLIP's class token where that is not left out."""
    vision = config.vision_config
    has_class = vision.model_type == "clip_vision_model"
    return (vision.image_size // vision.patch_size) ** 2 + has_class - (config.vision_feature_select_strategy == "default")


def check_tower(folder: str | Path, found: str, settings: MllmSettings) -> None:
    """Refuses a tower whose weights are not those that were saved."""
    if found != settings.tower_hash:
        raise DataError(
            f"{folder}: the tower's weights (sha256 {found[:12]}) are not those that {SETTINGS_FILE} names "
            f"({settings.tower_hash[:12]}); the folder was changed after training, train it again"
        )


def save_mllm(
    folder: str | Path,
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    settings: MllmSettings,
    dtype: torch.dtype,
    state: dict[str, Tensor] | None = None,
    sentencepiece_model: bytes | None = None,
) -> None:
    """Writes the folder; `grounding.json` comes last and so marks a complete one.

    state: full weights by the model's own names, where they are not in the model (ZeRO-3); rounded to `dtype`
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS_FILE).unlink(missing_ok=True)
    state = without_tied_head(model, model.state_dict() if state is None else state)
    state = {name: value.detach().to("cpu", dtype).contiguous() for name, value in state.items()}
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    if settings.regions == COORDS:
        save_torch_state_dict({_classic_name(name): value for name, value in state.items()}, folder)
    else:
        save_torch_state_dict(state, folder)
    ends = end_token_ids(tokenizer)  # stock code stops where the template's answers do, which may be another than the base's
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    _write_config(folder, model, dtype)
    save_tokenizer(tokenizer, folder, sentencepiece_model)
    _write_image_settings(folder, model, settings.image)
    settings.tower_hash = tower_hash(state)
    settings.dtype = str(dtype).removeprefix("torch.")
    settings.write(folder)


def without_tied_head(model: LlavaForConditionalGeneration, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state without the output layer where that is the embeddings: there loaders read the embeddings alone."""
    tied = model.config.text_config.tie_word_embeddings
    return {name: value for name, value in state.items() if not (tied and name == "lm_head.weight")}


def _classic_name(name: str) -> str:
    """The name that transformers 4 wrote and both generations read.

    transformers 5 leaves `vision_model.` out of the tower's names, and transformers 4 then draws the tower at random.
    """
    name = name.removeprefix("model.")
    for ours, classic in (("vision_tower.", "vision_tower.vision_model."), ("language_model.", "language_model.model.")):
        if name.startswith(ours):
            return classic + name.removeprefix(ours)
    return f"language_model.{name}" if name.startswith("lm_head.") else name


def _write_config(folder: Path, model: LlavaForConditionalGeneration, dtype: torch.dtype) -> None:
    config = model.config.to_dict()
    config.pop("use_cache", None)  # the Trainer turns it off for itself
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = str(dtype).removeprefix("torch.")
    config["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    model.generation_config.save_pretrained(folder)


def tower_hash(state: dict[str, Tensor]) -> str:
    """sha256 of the tower's weights in a stock Llava's state."""
    prefix, holder = "model." + TOWER, nn.Module()
    holder.state_dict = lambda: {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return weights_hash(holder)


def saved_tower_hash(folder: str | Path) -> str:
    """sha256 of the tower's weights in a whole folder's files, whatever the number format they are loaded in."""
    tower = {}
    for path in sorted(Path(folder).glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                if TOWER in name:
                    tower["model." + TOWER + name.partition(TOWER)[2].removeprefix("vision_model.")] = file.get_tensor(name)
    return tower_hash(tower)


def _write_image_settings(folder: Path, model: LlavaForConditionalGeneration, image: ImageInput) -> None:
    """Stock processor files, the nearest that transformers has: `pad` becomes its own, which is `pad_first`."""
    size = {"height": image.size, "width": image.size}
    tiles = image.mode == ANYRES
    pad = image.mode in ("pad", "pad_first") or tiles  # of LlavaNext's processor it is the number of tiles that is padded
    kind = "LlavaNext" if tiles else "Llava" if pad else "CLIP"
    preprocessor = {
        "image_processor_type": f"{kind}ImageProcessor",
        "do_pad": pad,
        "do_resize": True,
        "size": {"shortest_edge": image.size} if pad else size,
        "do_center_crop": pad,
        "crop_size": size,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }
    processor = {
        "processor_class": "LlavaNextProcessor" if tiles else "LlavaProcessor",
        "patch_size": model.config.vision_config.patch_size,
        "vision_feature_select_strategy": model.config.vision_feature_select_strategy,
        "num_additional_image_tokens": int(model.config.vision_feature_select_strategy == "default"),
    }
    if tiles:
        preprocessor["image_grid_pinpoints"] = model.config.image_grid_pinpoints
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def is_complete(checkpoint: Path) -> bool:
    """Whether a Trainer's checkpoint was written to its end: its state is written last."""
    return (checkpoint / "trainer_state.json").is_file()


def last_checkpoint(output: Path) -> Path | None:
    """The latest complete `checkpoint-N` of `output`; an incomplete one, of a run killed while saving, is removed."""
    found = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in reversed(found):
        if is_complete(path):
            return path
        shutil.rmtree(path, ignore_errors=True)
    return None
