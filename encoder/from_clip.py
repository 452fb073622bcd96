"""Starts a CLOC from a CLIP or SigLIP of any origin, at any resolution: its towers and temperature, a fresh Prompter."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPConfig, SiglipConfig

from encoder.config import ClocConfig, ClocSiglipConfig
from encoder.errors import DataError
from encoder.from_open_clip import load_open_clip
from encoder.model import ClocModel
from encoder.pretrained import WHOLE, folder_kind, load_encoder
from encoder.siglip import ClocSiglipModel

POSITIONS = "vision_model.embeddings.position_embedding.weight"


def from_clip(
    source: str | Path,
    image_size: int | None = None,
    open_clip_config: str | Path | dict | None = None,
    quick_gelu: bool | None = None,
    **fields,
) -> ClocModel | ClocSiglipModel:
    """A CLOC with the towers, projections and temperature of `source`, and a Prompter drawn at random, in float32.

    source: folder of a CLIP (OpenAI, LAION, DFN, MetaCLIP, Apple's VeCap-DFN) or a SigLIP in Hugging Face's format; or
        `open_clip`'s: a folder with open_clip_config.json, or a weights file (.pt, .bin, .safetensors)
    image_size: side of the new input in pixels, a multiple of the patch; the position table is interpolated to it
    open_clip_config: model configuration of an `open_clip` weights file: a dictionary or a JSON file, `open_clip`'s own
        model_configs/*.json or an open_clip_config.json; None takes the open_clip_config.json beside the weights
    quick_gelu: activation of an `open_clip` model where its configuration does not say it: OpenAI's weights are
        `quick_gelu` under every configuration name
    fields: of `ClocConfig` or `ClocSiglipConfig`, for example `prompter_readout="prompt"`
    Raises DataError where the source cannot be read, or names parameters that are missing, unused or of another size.
    """
    kind = folder_kind(source)
    if kind.startswith("cloc"):
        raise DataError(f"{source} is not a CLIP folder; load a CLOC folder with ClocModel.from_pretrained")
    if kind == "open_clip":
        clip = load_open_clip(source, open_clip_config, quick_gelu)
    elif open_clip_config is not None or quick_gelu is not None:
        raise DataError(f"{source} is in Hugging Face's format, whose config.json says everything; drop the open_clip options")
    else:
        clip = load_encoder(source)
    config, state = cloc_config(clip.config, **fields), clip.state_dict()
    if image_size is not None and image_size != config.vision_config.image_size:
        patch = config.vision_config.patch_size
        if image_size % patch:
            raise DataError(f"image_size {image_size} is no multiple of {source}'s patch of {patch} px; choose one")
        state[POSITIONS] = resize_positions(state[POSITIONS], image_size // patch, config.num_class_tokens)
        config.vision_config.image_size = image_size
    model = WHOLE[config.model_type](config)
    missing, unused = model.load_state_dict(state, strict=False)
    missing = [key for key in missing if not key.startswith(model.added)]
    if missing or unused:
        raise DataError(f"{source}: parameters missing {missing[:5]}, unused {unused[:5]}; is it a stock CLIP?")
    with torch.no_grad():  # what the region loss has of its own starts where the image loss's is
        for name in ("logit_scale", "logit_bias"):
            own = getattr(model, f"region_{name}", None)
            if own is not None:
                own.copy_(getattr(model, name))
    return model


def cloc_config(stock: CLIPConfig | SiglipConfig, **fields) -> ClocConfig | ClocSiglipConfig:
    """The configuration of a CLOC on the towers of a stock model."""
    base = {key: value for key, value in stock.to_dict().items() if key not in ("model_type", "architectures")}
    return (ClocSiglipConfig if isinstance(stock, SiglipConfig) else ClocConfig)(**{**base, **fields})


def resize_positions(table_ND: Tensor, grid: int, num_class_tokens: int) -> Tensor:
    """A position table of G x G patches, row by row, interpolated to `grid` x `grid`; the class tokens' rows are kept.

    table_ND: (C + G*G, D). Bicubic with antialiasing, as `open_clip` and timm do; pixel centres at (i + 0.5) / G.
    """
    classes, patches = table_ND[:num_class_tokens], table_ND[num_class_tokens:]
    side = round(len(patches) ** 0.5)
    if side**2 != len(patches):
        raise DataError(f"the position table has {len(patches)} patches, no square; only square inputs can be resized")
    if side == grid:
        return table_ND
    maps_1DGG = patches.float().T.reshape(1, -1, side, side)
    resized = torch.nn.functional.interpolate(maps_1DGG, (grid, grid), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([classes, resized[0].flatten(1).T.to(table_ND.dtype)])
