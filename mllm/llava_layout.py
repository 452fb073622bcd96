"""The layout of checkpoints of the llava repository (LLaVA 1.5): its files, parameter names and configuration.

| here, a stock Llava | there |
|---|---|
| `model.language_model.X`, `lm_head.X` | `model.X`, `lm_head.X` |
| `model.multi_modal_projector.linear_1.X`, `linear_2.X` | `model.mm_projector.0.X`, `model.mm_projector.2.X` |
| the same of a linear projector, where `linear_2` is the identity | `model.mm_projector.X` |
| `model.vision_tower.X` | `model.vision_tower.vision_tower.vision_model.X` |

There are three kinds of folder: a whole model (`pytorch_model*.bin` or `model*.safetensors`), a projector alone
(`mm_projector.bin`), and LoRA (`adapter_config.json`, with the projector in `non_lora_trainables.bin`). All hold config.json.
"""

import json
import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from encoder.errors import DataError

PROJECTOR_FILE = "mm_projector.bin"
LORA_FILE = "adapter_config.json"
LORA_PROJECTOR_FILE = "non_lora_trainables.bin"
# By config.json's model_type there; the first of a class is the one written.
TEXT_CONFIGS = {
    "llava_llama": LlamaConfig,
    "llava": LlamaConfig,
    "llava_mistral": MistralConfig,
    "llava_qwen": Qwen2Config,
}
CLASSES = {"llava_llama": "LlavaLlama", "llava_mistral": "LlavaMistral", "llava_qwen": "LlavaQwen"}
# The last is a linear projector's. Longest first, as in `_NAMES`: every name there begins with `model.` or `lm_head.`.
PROJECTOR = (("linear_1.", "model.mm_projector.0."), ("linear_2.", "model.mm_projector.2."), ("linear_1.", "model.mm_projector."))
_NAMES = (
    ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
    *((f"model.multi_modal_projector.{ours}", theirs) for ours, theirs in PROJECTOR),
    ("model.language_model.", "model."),
    ("lm_head.", "lm_head."),
)
# Tables that transformers 4 saved and that every version computes for itself.
_COMPUTED = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")


def to_llava(state: dict[str, Tensor], linear: bool) -> dict[str, Tensor]:
    """A stock Llava's parameters under the llava repository's names; `linear`: its projector is one layer there."""
    renamed = {}
    for name, value in state.items():
        ours, theirs = next(pair for pair in _NAMES if name.startswith(pair[0]))
        renamed[theirs + name.removeprefix(ours)] = value.contiguous()
    if linear:
        first, second = ({key: renamed.pop(f"model.mm_projector.{n}.{key}").float() for key in ("weight", "bias")} for n in "02")
        kind = next(iter(renamed.values())).dtype
        renamed["model.mm_projector.weight"] = (second["weight"] @ first["weight"]).to(kind)
        renamed["model.mm_projector.bias"] = (second["weight"] @ first["bias"] + second["bias"]).to(kind)
    return renamed


def from_llava(name: str) -> str:
    """The other way; a name that is none of theirs stays as it is."""
    for ours, theirs in _NAMES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def read_config(folder: str | Path) -> dict:
    """The config.json of a folder in this layout, refused with the field that this package cannot follow."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise DataError(f"{path} does not exist; give a folder that the llava repository wrote")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg}); copy the folder again") from error
    if config.get("model_type") not in TEXT_CONFIGS or "mm_vision_tower" not in config:
        raise DataError(f"{path}: model_type is '{config.get('model_type')}'; it is of no LLaVA with mm_vision_tower")
    wanted = {
        "mm_projector_type": ("mlp2x_gelu", "linear"),
        "mm_vision_select_feature": ("patch", None),
        "mm_use_im_start_end": (False, None),
        "mm_use_im_patch_token": (False, None),
    }
    for key, allowed in wanted.items():
        if config.get(key) not in allowed:
            known = " or ".join(str(value) for value in allowed if value is not None)
            raise DataError(f"{path}: {key} is '{config.get(key)}', only {known} is read; take a LLaVA-1.5 checkpoint")
    if (ratio := config.get("image_aspect_ratio")) != "pad":
        seen = "tiles" if ratio == "anyres" else "the middle of each picture, which cuts boxes off"
        raise DataError(
            f"{path}: image_aspect_ratio is '{ratio}', so it was trained on {seen}; only pad is read: take a LLaVA-1.5 "
            "checkpoint, or its projector alone, by finetune_mllm.py --projector"
        )
    return config


def text_config(config: dict) -> PreTrainedConfig:
    """The language model's part of a config.json in this layout."""
    cls = TEXT_CONFIGS[config["model_type"]]
    known = (cls().to_dict().keys() | {"rope_theta", "rope_scaling"}) - {"model_type", "architectures", "transformers_version"}
    return cls(**{key: value for key, value in config.items() if key in known})


def write_config(text: PreTrainedConfig, projector: tuple[str, int], tower: str, layer: int, tuned: bool, dtype: str) -> dict:
    """LLaVA-1.5's config.json.

    projector: LLaVA's name of its type, width of its input
    tower: what LLaVA's code loads the vision tower from; layer: its layer; tuned: whether it has learned too
    """
    kind = next((name for name, cls in TEXT_CONFIGS.items() if type(text) is cls), None)
    if kind is None:
        classes = ", ".join(sorted({cls.__name__ for cls in TEXT_CONFIGS.values()}))
        raise DataError(f"the language model is a {type(text).__name__}; the llava repository has classes for {classes}")
    values = text.to_dict()
    rope = values.pop("rope_parameters", None) or {}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    for key in ("dtype", "transformers_version", "_name_or_path"):
        values.pop(key, None)
    return {
        **values,
        "model_type": kind,
        "architectures": [f"{CLASSES[kind]}ForCausalLM"],
        "torch_dtype": dtype,
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": scaling if scaling.get("rope_type", "default") != "default" else None,
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": projector[1],
        "mm_projector_type": projector[0],
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": layer,
        "mm_vision_tower": tower,
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": tuned,
        "use_mm_proj": True,
    }


def read_state(folder: str | Path) -> dict[str, Tensor]:
    """All parameters of a whole model's folder under a stock Llava's names; computed tables are left out."""
    folder = Path(folder)
    indices = sorted(folder.glob("*.index.json"))
    if indices:
        names = sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
    else:
        names = [name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).is_file()][:1]
    missing = [name for name in names if not (folder / name).is_file()]
    if not names or missing:
        what = f"{len(missing)} files of its index ({', '.join(missing[:3])})" if missing else "weights"
        raise DataError(f"{folder} lacks {what}; copy the folder again")
    state: dict[str, Tensor] = {}
    for name in names:
        state |= read_tensors(folder / name)
    return {from_llava(name): value for name, value in state.items() if not _COMPUTED.search(name)}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, by name. A pickle is read as weights only: it runs no code."""
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"{path} holds no plain tensors by name ({reason}); copy the file again") from error
    if not isinstance(tensors, dict) or not all(torch.is_tensor(value) for value in tensors.values()):
        raise DataError(f"{path} holds no plain tensors by name; give the file that LLaVA's training wrote")
    return tensors


def read_projector(path: str | Path) -> dict[str, Tensor]:
    """A stock projector's parameters from `mm_projector.bin` or `non_lora_trainables.bin`, or a folder with one of them.

    `linear_1.weight`, ...; an empty dictionary where the path holds neither file.
    """
    path = Path(path)
    files = [path] if path.is_file() else [path / name for name in (PROJECTOR_FILE, LORA_PROJECTOR_FILE)]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return {}
    found = {}
    for name, value in read_tensors(file).items():
        name = name.removeprefix("base_model.model.")
        pair = next((pair for pair in PROJECTOR if name.startswith(pair[1])), None)
        if pair is None:
            raise DataError(f"{file}: {name} is no part of LLaVA-1.5's projector; nothing was read from it")
        found[pair[0] + name.removeprefix(pair[1])] = value
    return two_layers(found)


def two_layers(projector: dict[str, Tensor]) -> dict[str, Tensor]:
    """A linear projector's one layer with the identity behind it; another projector as it is."""
    if projector.keys() != {"linear_1.weight", "linear_1.bias"}:
        return projector
    bias = projector["linear_1.bias"]
    return {**projector, "linear_2.weight": torch.eye(len(bias), dtype=bias.dtype), "linear_2.bias": torch.zeros_like(bias)}


def is_linear(projector: dict[str, Tensor]) -> bool:
    """Whether a projector of two layers is one of `two_layers`."""
    second = projector.get("linear_2.weight")
    return second is not None and torch.equal(second, torch.eye(*second.shape, dtype=second.dtype))
