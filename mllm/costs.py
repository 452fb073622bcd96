"""What a step of MLLM training costs, found on a model without data (see `encoder.costs`)."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlavaForConditionalGeneration,
)

from encoder.costs import Cost, measure_cost
from encoder.errors import DataError
from encoder.geometry import ANYRES
from encoder.pretrained import folder_kind, load_vision_tower
from mllm.box_text import BoxCodec
from mllm.config import PROJECTORS, MllmConfig
from mllm.features import tower_features
from mllm.lora import add_lora, lora_config
from mllm.model import first_layer, freeze, join, llava_config, nano_llm_config
from mllm.opening import read_mllm
from mllm.region_tokens import RegionFields, RegionLlavaForConditionalGeneration, add_region_tokens
from mllm.settings import SETTINGS_FILE, MllmSettings
from mllm.tiles import read_grids
from mllm.tokenizer import add_codec_tokens, add_image_token, add_region_token


def meta_mllm(config: MllmConfig) -> LlavaForConditionalGeneration:
    """The model that a recipe trains, without data; parts that do not learn have no gradient.

    A preset's tokenizer is not trained for this: it is taken to have `vocab_size` pieces, its most.
    """
    if config.model and (Path(config.model) / SETTINGS_FILE).is_file() and (base := MllmSettings.read(config.model).base):
        return meta_mllm(replace(config, **base))  # of an adapter folder, whose LoRA is added to the weights
    with torch.device("meta"):
        if config.model:
            _read_json(Path(config.model) / "config.json")
            saved = AutoConfig.from_pretrained(config.model)
            model = AutoModelForImageTextToText.from_config(saved)
            if config.new_regions and not isinstance(saved, RegionFields):
                tokens = model.get_input_embeddings().num_embeddings
                model.resize_token_embeddings(tokens + 1, pad_to_multiple_of=64, mean_resizing=False)
                source = config.prompter or read_mllm(config.model)[1].tower_path
                model = add_region_tokens(model, tokens, config.region_tokens, source)
        else:
            model = _joined(config)
            if config.new_regions:
                model = add_region_tokens(model, 0, config.region_tokens, config.prompter or config.tower)
        if config.uses_lora:
            add_lora(model, lora_config(model, config))
        freeze(model, config.trains, torch.bfloat16 if config.precision == "bf16" else torch.float32)
        return model.to(torch.bfloat16 if config.precision == "bf16" else torch.float32).train()


def _joined(config: MllmConfig) -> LlavaForConditionalGeneration:
    if folder_kind(config.tower) == "open_clip":
        with torch.device("cpu"):
            sizes = load_vision_tower(config.tower).config
    else:
        sizes = AutoConfig.from_pretrained(config.tower)
    tower = AutoModel.from_config(getattr(sizes, "vision_config", sizes))
    layer = first_layer(config, tower.config)
    codec = BoxCodec(config.codec)
    grids = read_grids(config.tile_grids) if config.geometry == ANYRES else ()
    if config.llm_preset:
        sizes = nano_llm_config(config, config.vocab_size + len(codec.tokens) + config.new_regions)
        return AutoModelForImageTextToText.from_config(
            llava_config(tower, sizes, layer, PROJECTORS[config.projector_type], grids), attn_implementation=config.attention
        )
    _read_json(Path(config.llm) / "config.json")
    sizes = AutoConfig.from_pretrained(config.llm)
    if type(sizes) not in AutoModelForCausalLM._model_mapping:
        raise DataError(f"{config.llm} holds a model of type '{sizes.model_type}'; give the folder of a causal language model")
    tokenizer = AutoTokenizer.from_pretrained(config.llm)
    add_image_token(tokenizer)
    add_codec_tokens(tokenizer, codec)
    if config.new_regions:
        add_region_token(tokenizer)
    llm = AutoModelForCausalLM.from_config(sizes, attn_implementation=config.attention)
    if len(tokenizer) > llm.get_input_embeddings().num_embeddings:
        llm.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    return join(tower, llm, tokenizer, layer, PROJECTORS[config.projector_type], grids)


def mllm_cost(model: LlavaForConditionalGeneration, config: MllmConfig) -> Cost:
    """Per row of `max_length` tokens with one picture and, with region tokens, one region. `model` of `meta_mllm`.

    With `anyres` the picture is in as many tiles as may be.
    """
    inner, sizes = model.model, model.config
    side, layer = sizes.vision_config.image_size, sizes.vision_feature_layer
    num_squares = 1 + max((height * width // side**2 for height, width in getattr(sizes, "image_grid_pinpoints", ())), default=0)

    def loss_of() -> Tensor:
        if config.cache_features:
            width = inner.multi_modal_projector.linear_1.in_features
            features = torch.zeros(1, sizes.image_seq_length, width, dtype=model.dtype)
        else:
            pixels = torch.zeros(num_squares, 3, side, side, dtype=model.dtype)
            features = tower_features(inner.vision_tower, layer, pixels)[:, -sizes.image_seq_length :]
        tokens = inner.multi_modal_projector(features).flatten(0, 1)[None]
        regions = _region_token(model, config) if isinstance(sizes, RegionFields) else tokens[:, :0]
        if config.max_length <= tokens.shape[1]:
            raise DataError(f"max_length {config.max_length} leaves no room beside {tokens.shape[1]} image tokens; raise it")
        rest = config.max_length - tokens.shape[1] - regions.shape[1]
        words = torch.zeros(1, rest, tokens.shape[2], dtype=tokens.dtype)
        hidden = inner.language_model(inputs_embeds=torch.cat([tokens, regions, words], dim=1), use_cache=False).last_hidden_state
        logits = model.lm_head(hidden).float()
        return torch.nn.functional.cross_entropy(logits[0], torch.zeros(config.max_length, dtype=torch.long))

    with torch.device("meta"):
        return measure_cost(model, loss_of)


def _region_token(model: RegionLlavaForConditionalGeneration, config: MllmConfig) -> Tensor:
    """(1, 1, H) of one region; with cached features by the projector alone."""
    region_tokens, vision = model.model.region_tokens, model.config.vision_config
    if config.cache_features:
        features = torch.zeros(1, region_tokens.projector.linear_1.in_features, dtype=model.dtype)
    else:
        num_patches = model.config.image_seq_length
        tokens = torch.zeros(1, num_patches + model.config.num_class_tokens, vision.hidden_size, dtype=model.dtype)
        index = torch.zeros(1, dtype=torch.long)
        features = region_tokens.features(tokens, index, torch.zeros(1, 4), torch.zeros(1, num_patches))
    return region_tokens(features)[None]


def low_bit_bytes(model: LlavaForConditionalGeneration, config: MllmConfig) -> float:
    """What `llm_bits` spares of `model`'s weights: they are counted in full precision everywhere else."""
    if not config.llm_bits:
        return 0.0
    layers = (module for module in model.model.language_model.modules() if isinstance(module, torch.nn.Linear))
    frozen = [layer.weight for layer in layers if not layer.weight.requires_grad]
    # Beside 4 bits NF4 keeps one byte of scale per 64 weights, and four per 256 scales; 8 bits one float per row.
    bits = 4 + 8 / 64 + 32 / (64 * 256) if config.llm_bits == 4 else 8
    return sum(weight.numel() * (weight.element_size() - bits / 8) for weight in frozen)


def zero_stage(config: MllmConfig, processes: int) -> int | None:
    """The ZeRO stage of a run: its file's, 2 under the deepspeed launcher without one, None on one plain process."""
    if not config.zero:
        return 2 if processes > 1 else None
    return _read_json(Path(config.zero)).get("zero_optimization", {}).get("stage", 0)


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise DataError(f"{path} does not exist; name a folder or file that does")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg}); correct it") from error
