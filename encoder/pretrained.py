"""Loads any encoder's folder: CLOC, CLIP or SigLIP, whole or the vision tower alone, Hugging Face's format or `open_clip`'s.

Loading is strict: a parameter that is missing, unused or of another size is an error that names it.
"""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    PreTrainedTokenizerBase,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
)

from encoder.errors import DataError
from encoder.from_open_clip import CONFIG_FILE, load_open_clip, open_clip_as_stock, read_open_clip_config
from encoder.model import ClocModel
from encoder.processor import OPENAI_MEAN, OPENAI_STD, SIGLIP_MEAN, SIGLIP_STD, ClocImageProcessor, ClocProcessor
from encoder.siglip import ClocSiglipModel

# By the model_type of config.json.
WHOLE = {"cloc": ClocModel, "clip": CLIPModel, "cloc_siglip": ClocSiglipModel, "siglip": SiglipModel}
TOWERS = {"clip_vision_model": CLIPVisionModel, "siglip_vision_model": SiglipVisionModel}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "spiece.model", "tokenizer.model")


def folder_kind(source: str | Path) -> str:
    """What `source` holds: a key of `WHOLE` or `TOWERS`, by its config.json, or `open_clip` (a folder, or a weights file)."""
    source = Path(source)
    path = source / "config.json"
    if source.is_file():
        return "open_clip"
    if not path.is_file():
        if (source / CONFIG_FILE).is_file():
            return "open_clip"
        raise DataError(f"{path} does not exist; give the folder of a saved CLOC, CLIP or SigLIP model")
    try:
        kind = json.loads(path.read_text()).get("model_type")
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); copy or save the folder again") from error
    if kind is None and (source / CONFIG_FILE).is_file():  # timm's config.json, beside open_clip's
        return "open_clip"
    if kind not in (*WHOLE, *TOWERS):
        raise DataError(f"{path}: model_type is '{kind}'; a folder of a CLOC, CLIP or SigLIP model, or its tower, is needed")
    return kind


def model_kind(path: str | Path, otherwise: str) -> str:
    """The `model_type` of a folder, or of a name on the model hub, as transformers reads it.

    otherwise: the sentence of the DataError where there is none; `{reason}` is the first line of the library's own
    """
    try:
        return AutoConfig.from_pretrained(path).model_type
    except (OSError, ValueError, KeyError) as error:
        raise DataError(otherwise.replace("{reason}", str(error).splitlines()[0])) from error


def load_strict(cls, folder, may_miss: tuple[str, ...] = (), **kwargs):
    """`from_pretrained` that names parameters in place of drawing them at random or leaving them out.

    may_miss: names of parameters that a folder need not have
    """
    try:
        model, info = cls.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    except (OSError, SafetensorError) as error:  # no weights, or not whole
        raise DataError(f"{folder}: the weights cannot be read ({error}); copy or save the folder again") from error
    # A tower saved with its projection (CLIPVisionModelWithProjection) is whole without it.
    check_loaded(info, folder, {"visual_projection.weight"} if cls is CLIPVisionModel else set(may_miss))
    return model.eval()


def check_loaded(info: dict, folder: str | Path, allowed: Collection[str] = ()) -> None:
    """Names what `from_pretrained` found missing, unused or of another size, but for the `allowed` names."""
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = {str(key) for key in info[problem]} - set(allowed)
        if keys:
            names = ", ".join(sorted(keys)[:5])
            raise DataError(f"{folder}: {len(keys)} {problem.replace('_', ' ')} ({names}); is it the right folder?")


def load_encoder(source: str | Path, dtype: torch.dtype | str = torch.float32) -> ClocModel | CLIPModel | SiglipModel:
    """A whole encoder in evaluation mode: CLOC as `ClocModel` or `ClocSiglipModel`, any other as its stock class.

    dtype: `auto` keeps the saved precision; weights of `open_clip` then come as float32
    """
    kind = _whole_kind(source)
    if kind == "open_clip":
        return load_open_clip(source).to(torch.float32 if dtype == "auto" else dtype)
    return load_strict(WHOLE[kind], source, dtype=dtype)


def stock_config(source: str | Path) -> CLIPConfig | SiglipConfig:
    """The configuration of a whole encoder, read without its weights; of `open_clip` as a stock CLIP's."""
    kind = _whole_kind(source)
    return open_clip_as_stock(source) if kind == "open_clip" else WHOLE[kind].config_class.from_pretrained(source)


def _whole_kind(source: str | Path) -> str:
    """`folder_kind`, where that is more than a vision tower."""
    kind = folder_kind(source)
    if kind in TOWERS:
        raise DataError(
            f"{source} holds a vision tower alone; text prompts and classification need the whole CLIP or CLOC folder"
        )
    return kind


def load_vision_tower(source: str | Path, dtype: torch.dtype = torch.float32) -> CLIPVisionModel | SiglipVisionModel:
    """The vision tower of any encoder as its stock class, in evaluation mode."""
    kind = folder_kind(source)
    if kind in TOWERS:
        return load_strict(TOWERS[kind], source, dtype=dtype)
    encoder = load_encoder(source, dtype)
    cls = SiglipVisionModel if isinstance(encoder, SiglipModel) else CLIPVisionModel
    tower = cls(encoder.config.vision_config).to(encoder.dtype)
    tower.load_state_dict(encoder.vision_model.state_dict())
    return tower.eval()


def load_processor(
    source: str | Path,
    tokenizer: str | Path | None = None,
    image_size: int | None = None,
    open_clip_config: str | Path | dict | None = None,
) -> ClocProcessor:
    """An encoder's processor. A stock folder gets CLOC's padding geometry, so that boxes mean the same in both.

    tokenizer: folder of the tokenizer, for an encoder that comes without one (VeCap-DFN: T5's)
    image_size: side of the input in pixels, where the encoder was given another one by `from_clip`
    open_clip_config: as in `encoder.from_clip.from_clip`
    """
    source = Path(source)
    kind = folder_kind(source)
    if kind in ("cloc", "cloc_siglip") and (source / "processor_config.json").is_file() and tokenizer is None:
        processor = ClocProcessor.from_pretrained(source)
    else:
        processor = _make_processor(source, kind, tokenizer, open_clip_config)
    if image_size is not None:
        processor.image_processor.size = image_size
    return processor


def load_image_processor(source: str | Path) -> ClocImageProcessor:
    """How an encoder's pictures are prepared; its folder needs no tokenizer for that."""
    source = Path(source)
    kind = folder_kind(source)
    if kind in ("cloc", "cloc_siglip") and (source / "processor_config.json").is_file():
        return ClocProcessor.from_pretrained(source).image_processor
    return ClocImageProcessor(**_read_settings(source, kind, None)[0])


def _make_processor(source: Path, kind: str, tokenizer: str | Path | None, open_clip_config) -> ClocProcessor:
    settings, limits, lowercase = _read_settings(source, kind, open_clip_config)
    folder = source.parent if source.is_file() else source
    return ClocProcessor(
        ClocImageProcessor(**settings),
        load_tokenizer(Path(tokenizer or folder), limits) if limits else None,
        lowercase=lowercase,
        text_padding="max_length" if "siglip" in kind else "longest",
    )


def _read_settings(source: Path, kind: str, open_clip_config) -> tuple[dict, dict, bool]:
    """(fields of a `ClocImageProcessor`, configuration of the text tower or nothing, whether texts are lower-cased)."""
    is_siglip = "siglip" in kind
    settings = {"image_mean": SIGLIP_MEAN, "image_std": SIGLIP_STD} if is_siglip else {}
    lowercase, folder = True, source.parent if source.is_file() else source
    if kind == "open_clip":
        model, preprocess = read_open_clip_config(source, open_clip_config)
        vision, text = model["vision_cfg"], model["text_cfg"]
        limits = {"vocab_size": text.get("vocab_size", 49408), "max_position_embeddings": text.get("context_length", 77)}
        settings |= {f"image_{key}": preprocess[key] for key in ("mean", "std") if key in preprocess}
    else:
        # Through the class, since a config.json may leave every default out.
        config = {**WHOLE, **TOWERS}[kind].config_class.from_pretrained(source)
        vision = getattr(config, "vision_config", config).to_dict()
        limits = config.text_config.to_dict() if kind in WHOLE else {}
        for name in ("preprocessor_config.json", "processor_config.json"):
            if (folder / name).is_file():
                saved = json.loads((folder / name).read_text())
                lowercase = saved.get("lowercase", lowercase)
                saved = saved.get("image_processor", saved)
                settings |= {key: saved[key] for key in ("image_mean", "image_std", "geometry") if key in saved}
    settings = {"image_mean": OPENAI_MEAN, "image_std": OPENAI_STD, "size": vision.get("image_size", 224), **settings}
    return settings, limits, lowercase


def load_tokenizer(folder: Path, limits: dict) -> PreTrainedTokenizerBase:
    """The tokenizer of a text tower with these `limits` (fields of its configuration), cut to its longest text."""
    # Without files transformers would make an empty tokenizer of the folder's kind.
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise DataError(f"{folder} has no tokenizer; name the folder of the one it was trained with (VeCap-DFN: T5's)")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if len(tokenizer) > limits["vocab_size"]:
        raise DataError(
            f"the tokenizer in {folder} has {len(tokenizer)} ids, the text tower {limits['vocab_size']}; "
            "name the tokenizer that the tower was trained with, or for one from scratch give a vocab_size as large"
        )
    # CLIP reads a text's feature at its end token (2: at the highest id, an older rule); another end reads it anywhere.
    end = limits.get("eos_token_id", 2)
    if limits.get("model_type") == "clip_text_model" and end not in (2, tokenizer.eos_token_id):
        raise DataError(
            f"the tokenizer in {folder} ends a text with id {tokenizer.eos_token_id}, the text tower reads its feature at {end}; "
            "name the tokenizer that the tower was trained with"
        )
    tokenizer.padding_side = "right"  # a causal tower does not see what follows the end token, but all before it
    # T5's own limit is 512, far beyond the position table of a CLIP.
    tokenizer.model_max_length = min(tokenizer.model_max_length, limits["max_position_embeddings"])
    return tokenizer


def weights_hash(model: torch.nn.Module) -> str:
    """sha256 of a model's parameters and buffers: names, types, shapes and bytes, in name order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
