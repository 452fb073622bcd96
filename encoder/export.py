"""Writes stock folders: the whole CLIP or SigLIP, or its vision tower, without the Prompter.

Under the classic parameter names (`vision_model.` before every vision parameter): transformers 5 writes a tower without
that prefix, which transformers 4 and the llava package load as random weights.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPModel, CLIPVisionModel, SiglipModel, SiglipVisionModel

from encoder.model import RegionEncoder
from encoder.processor import ClocProcessor

PREFIX = "vision_model."
OWN_FIELDS = {"clip": ("projection_dim", "logit_scale_init_value", "initializer_factor"), "siglip": ("initializer_factor",)}


def _family(model: torch.nn.Module) -> tuple[str, str]:
    """(model_type, start of the class names) of the stock family."""
    return ("siglip", "Siglip") if isinstance(model, SiglipModel | SiglipVisionModel) else ("clip", "CLIP")


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


def export_clip(
    model: RegionEncoder | CLIPModel | SiglipModel, folder: str | Path, processor: ClocProcessor | None = None
) -> None:
    """Writes a stock `CLIPModel` or `SiglipModel` folder: same towers, no Prompter.

    It loads in transformers 4 and 5 without this package.
    """
    kind, name = _family(model)
    config = {"model_type": kind, "architectures": [f"{name}Model"], "dtype": _dtype_name(model)}
    config |= {key: getattr(model.config, key) for key in OWN_FIELDS[kind]}
    config |= {key: getattr(model.config, key).to_dict() for key in ("text_config", "vision_config")}
    left_out = (*getattr(model, "added", ()), PREFIX)
    kept = (item for item in model.state_dict().items() if not item[0].startswith(left_out))
    _write(Path(folder), config, {**dict(kept), **_vision_state(model)})
    if processor is not None:
        processor.tokenizer.save_pretrained(folder)
        # A tokenizer remembers the processor it was saved with, and AutoProcessor would look for ours.
        path = Path(folder) / "tokenizer_config.json"
        settings = {**json.loads(path.read_text()), "processor_class": f"{name}Processor"}
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        _write_preprocessor(processor, name, Path(folder))


def export_vision(
    model: RegionEncoder | CLIPModel | CLIPVisionModel | SiglipModel | SiglipVisionModel,
    folder: str | Path,
    processor: ClocProcessor | None = None,
) -> None:
    """Writes a stock `CLIPVisionModel` or `SiglipVisionModel` folder: the tower alone, as LLaVA and vLLM take it."""
    kind, name = _family(model)
    vision = getattr(model.config, "vision_config", model.config)
    config = {**vision.to_dict(), "model_type": f"{kind}_vision_model", "architectures": [f"{name}VisionModel"]}
    _write(Path(folder), {**config, "dtype": _dtype_name(model)}, _vision_state(model))
    if processor is not None:
        _write_preprocessor(processor, name, Path(folder))


def _write_preprocessor(processor: ClocProcessor, name: str, folder: Path) -> None:
    """A stock image processor's file. CLIP's centre-crops, SigLIP's squashes; `geometry` and `lowercase` ride along for us."""
    ours = processor.image_processor
    square = {"height": ours.size, "width": ours.size}
    settings = {
        "image_processor_type": f"{name}ImageProcessor",
        **({"size": square} if name == "Siglip" else {"size": {"shortest_edge": ours.size}, "crop_size": square}),
        "image_mean": ours.image_mean,
        "image_std": ours.image_std,
        "geometry": ours.geometry,
        "lowercase": processor.lowercase,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
