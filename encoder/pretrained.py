"""In from CLIP, out to CLIP: start a CLOC from a CLIP checkpoint, load any encoder folder, export stock folders.

Exports use the classic parameter names (`vision_model.` before every vision parameter): transformers 5 writes a
`CLIPVisionModel` without that prefix, which transformers 4 and the llava package load as random weights.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoTokenizer, CLIPModel, CLIPVisionModel

from encoder.config import ClocConfig
from encoder.errors import DataError
from encoder.model import ADDED_TO_CLIP, ClocModel
from encoder.processor import OPENAI_MEAN, OPENAI_STD, ClocImageProcessor, ClocProcessor

PREFIX = "vision_model."


def folder_kind(folder: str | Path) -> str:
    """`cloc`, `clip` or `clip_vision_model`: what the folder's config.json says it holds."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise DataError(f"{path} does not exist; give the folder of a saved CLOC or CLIP model")
    try:
        kind = json.loads(path.read_text()).get("model_type")
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); copy or save the folder again") from error
    if kind not in ("cloc", "clip", "clip_vision_model"):
        raise DataError(f"{path}: model_type is '{kind}'; a folder of a CLOC, CLIP or CLIP vision model is needed")
    return kind


def _load_strict(cls, folder, **kwargs):
    """`from_pretrained` that names missing or unfitting parameters in place of drawing them at random."""
    try:
        model, info = cls.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    except (OSError, SafetensorError) as error:  # no weights, or not whole
        raise DataError(f"{folder}: the weights cannot be read ({error}); copy or save the folder again") from error
    for problem in ("missing_keys", "mismatched_keys"):
        if info[problem]:
            names = ", ".join(sorted(str(key) for key in info[problem])[:5])
            raise DataError(f"{folder}: {len(info[problem])} {problem.replace('_', ' ')} ({names}); is it the right folder?")
    return model.eval()


def load_encoder(folder: str | Path, dtype: torch.dtype | str = torch.float32) -> ClocModel | CLIPModel:
    """A CLOC folder as `ClocModel`, a CLIP folder as stock `CLIPModel`, in evaluation mode."""
    kind = folder_kind(folder)
    if kind == "clip_vision_model":
        raise DataError(
            f"{folder} holds a vision tower alone; text prompts and classification need the whole CLIP or CLOC folder"
        )
    return _load_strict(ClocModel if kind == "cloc" else CLIPModel, folder, dtype=dtype)


def load_vision_tower(folder: str | Path, dtype: torch.dtype = torch.float32) -> CLIPVisionModel:
    """The vision tower of a CLOC, CLIP or CLIP vision folder as stock `CLIPVisionModel`, in evaluation mode."""
    if folder_kind(folder) == "clip_vision_model":
        return _load_strict(CLIPVisionModel, folder, dtype=dtype)
    encoder = load_encoder(folder, dtype)
    tower = CLIPVisionModel(encoder.config.vision_config).to(dtype)
    tower.load_state_dict(encoder.vision_model.state_dict())
    return tower.eval()


def load_processor(folder: str | Path) -> ClocProcessor:
    """The folder's processor. A stock CLIP folder gets CLOC's padding geometry, so that boxes mean the same in both."""
    folder = Path(folder)
    kind = folder_kind(folder)
    if (folder / "processor_config.json").is_file() and kind == "cloc":
        return ClocProcessor.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    vision = config.get("vision_config", config)
    settings = {"size": vision.get("image_size", 224), "image_mean": OPENAI_MEAN, "image_std": OPENAI_STD}
    lowercase = True
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            saved = json.loads((folder / name).read_text())
            lowercase = saved.get("lowercase", lowercase)
            saved = saved.get("image_processor", saved)
            settings |= {key: saved[key] for key in ("image_mean", "image_std", "geometry") if key in saved}
    tokenizer = AutoTokenizer.from_pretrained(folder) if kind == "clip" else None
    return ClocProcessor(ClocImageProcessor(**settings), tokenizer, lowercase=lowercase)


def from_clip(folder: str | Path, **fields) -> ClocModel:
    """A CLOC that starts from a CLIP checkpoint (HF format): its towers, projections and temperature, a fresh Prompter.

    fields: of `ClocConfig`, for example `prompter_readout="prompt"`
    """
    if folder_kind(folder) != "clip":
        raise DataError(f"{folder} is not a CLIP folder; load a CLOC folder with ClocModel.from_pretrained")
    clip = load_encoder(folder)
    base = {key: value for key, value in clip.config.to_dict().items() if key not in ("model_type", "architectures")}
    model = ClocModel(ClocConfig(**{**base, **fields}))
    missing, unexpected = model.load_state_dict(clip.state_dict(), strict=False)
    wrong = [key for key in missing if not key.startswith(ADDED_TO_CLIP)]
    if wrong or unexpected:
        raise DataError(f"{folder}: parameters missing {wrong[:5]}, unexpected {unexpected[:5]}; is it a stock CLIPModel?")
    return model


def weights_hash(model: torch.nn.Module) -> str:
    """sha256 of a model's parameters and buffers: names, types, shapes and bytes, in name order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def _write(folder: Path, config: dict, state: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _dtype_name(model: torch.nn.Module) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _vision_state(model) -> dict[str, torch.Tensor]:
    tower = model.vision_model if hasattr(model, "vision_model") else model
    return {PREFIX + key: value for key, value in tower.state_dict().items()}


def export_clip(model: ClocModel | CLIPModel, folder: str | Path, processor: ClocProcessor | None = None) -> None:
    """Writes a stock `CLIPModel` folder: same towers, no Prompter. Loads in transformers 4 and 5 without this package."""
    clip_config = {"model_type": "clip", "architectures": ["CLIPModel"], "dtype": _dtype_name(model)}
    for key in ("projection_dim", "logit_scale_init_value", "initializer_factor"):
        clip_config[key] = getattr(model.config, key)
    clip_config |= {key: getattr(model.config, key).to_dict() for key in ("text_config", "vision_config")}
    state = {
        key: value
        for key, value in model.state_dict().items()
        if key.startswith(("text_model.", "visual_projection.", "text_projection.", "logit_scale"))
    }
    _write(Path(folder), clip_config, {**state, **_vision_state(model)})
    if processor is not None:
        processor.tokenizer.save_pretrained(folder)
        # A tokenizer remembers the processor it was saved with, and AutoProcessor would look for ours.
        path = Path(folder) / "tokenizer_config.json"
        settings = {**json.loads(path.read_text()), "processor_class": "CLIPProcessor"}
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        _write_preprocessor(processor, Path(folder))


def export_vision(
    model: ClocModel | CLIPModel | CLIPVisionModel, folder: str | Path, processor: ClocProcessor | None = None
) -> None:
    """Writes a stock `CLIPVisionModel` folder: the tower alone, as LLaVA and vLLM take it."""
    vision = getattr(model.config, "vision_config", model.config)
    config = {**vision.to_dict(), "model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"]}
    _write(Path(folder), {**config, "dtype": _dtype_name(model)}, _vision_state(model))
    if processor is not None:
        _write_preprocessor(processor, Path(folder))


def _write_preprocessor(processor: ClocProcessor, folder: Path) -> None:
    """A stock CLIPImageProcessor's file. It centre-crops where ours pads; `geometry` and `lowercase` ride along for us."""
    ours = processor.image_processor
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": ours.size},
        "crop_size": {"height": ours.size, "width": ours.size},
        "image_mean": ours.image_mean,
        "image_std": ours.image_std,
        "geometry": ours.geometry,
        "lowercase": processor.lowercase,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
