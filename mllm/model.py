"""The MLLM assembled: any CLIP or SigLIP tower, a two-layer projector, any causal language model, as a stock Llava.

With geometry `anyres` it is a stock LlavaNext: the same parts, and one learned vector more, which ends each row of patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from encoder.errors import DataError
from encoder.geometry import ANYRES
from encoder.pretrained import load_vision_tower, weights_hash
from mllm.box_text import BoxCodec
from mllm.checkpoint import load_mllm
from mllm.config import DEFAULT_FEATURE_LAYER, PROJECTORS, MllmConfig, layers_of
from mllm.image_input import ImageInput
from mllm.lora import add_lora, forget_scales, is_lora, lora_config, quantize
from mllm.mixture import sources_of
from mllm.packing import attends_to_all
from mllm.projector import load_projector, load_region_projector, make_identity
from mllm.records import texts_of
from mllm.region_tokens import RegionFields, RegionLlavaForConditionalGeneration, add_region_tokens, check_prompter_folder
from mllm.regions import COORDS
from mllm.settings import MllmSettings
from mllm.templates import choose_template
from mllm.tiles import Grid
from mllm.tokenizer import add_codec_tokens, add_image_token, add_region_token, fast_tokenizer, train_sentencepiece


@dataclass
class Mllm:
    """A model with all that goes with it.

    sentencepiece_model: the serialised model that the tokenizer is made from, where there is one
    from_scratch: whether projector and language model start from random weights
    lora: peft's LoraConfig of the layers that were added, else None
    new_regions: whether the projector of region tokens starts from random weights
    """

    model: LlavaForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    settings: MllmSettings
    sentencepiece_model: bytes | None = None
    from_scratch: bool = False
    lora: object | None = None
    new_regions: bool = False

    @property
    def num_image_tokens(self) -> int:
        return self.model.config.image_seq_length


def build_mllm(config: MllmConfig, dtype: torch.dtype = torch.float32) -> Mllm:
    """What the recipe names: an MLLM folder to go on from, or a tower and a language model joined by a new projector."""
    mllm = _from_folder(config, dtype) if config.model else _from_parts(config, dtype)
    check_rows(config, mllm.model.config.text_config)
    check_tiles(config, mllm.settings)
    if config.llm_bits:
        forget_scales(mllm.model)
    if config.uses_lora:
        torch.manual_seed(config.seed)
        mllm.lora = lora_config(mllm.model, config)
        add_lora(mllm.model, mllm.lora)
    return mllm


def check_rows(config: MllmConfig, text_config: PreTrainedConfig) -> None:
    """Refuses rows of several conversations in a language model whose tokens do not see all of a row."""
    if config.joins_rows and not attends_to_all(text_config, config.max_length):
        raise DataError(
            f"{config.joins_rows} is true, but tokens of the language model {config.model or config.llm} do not see all of a row "
            f"of {config.max_length} (sliding window or recurrent layers); leave {config.joins_rows} out, or lower max_length"
        )


def check_tiles(config: MllmConfig, settings: MllmSettings) -> None:
    """Refuses what does not go with a picture in tiles."""
    if config.cache_features and settings.image.mode == ANYRES:
        raise DataError("cache_features keeps one square a picture, but geometry anyres has tiles of it too; set it to false")


def first_layer(config: MllmConfig, tower_config: PreTrainedConfig) -> int | list[int]:
    """Which layers of its tower an MLLM that starts from parts projects; refused where the tower lacks one."""
    layer = DEFAULT_FEATURE_LAYER if config.feature_layer is None else config.feature_layer
    for number in layers_of(layer):
        if not -tower_config.num_hidden_layers - 1 <= number <= tower_config.num_hidden_layers:
            raise DataError(
                f"feature_layer is {number}, but the tower {config.tower} has {tower_config.num_hidden_layers} layers; "
                "choose one of them, -1 is the last"
            )
    return layer


def _from_parts(config: MllmConfig, dtype: torch.dtype) -> Mllm:
    tower = load_vision_tower(config.tower, dtype)
    tower.set_attn_implementation(config.attention)
    layer = first_layer(config, tower.config)
    torch.manual_seed(config.seed)  # after the tower: two towers of one size then meet the same initial weights
    tokenizer, proto = read_tokenizer(config)
    saved = getattr(torch, config.save_dtype)
    # What will be in low bits is rounded to the format of saving anyway, so it is never in memory in a longer one.
    kept = saved if config.llm_bits else dtype
    llm = _nano_llm(config, tokenizer) if config.llm_preset else _load_llm(config, tokenizer, kept)
    if config.llm_bits:
        quantize(llm.base_model, config.llm_bits, saved, dtype)
    settings = first_settings(config, tokenizer)
    model = join(tower, llm.to(dtype), tokenizer, layer, PROJECTORS[config.projector_type], settings.image.tile_grids)
    if config.projector:
        load_projector(model, config.projector)
    if config.new_regions:
        model = add_region_tokens(model, add_region_token(tokenizer), config.region_tokens, config.prompter or config.tower)
        kept_regions = config.projector is not None and load_region_projector(model, config.projector)
    from_scratch = bool(config.llm_preset) and not config.projector
    return Mllm(model, tokenizer, settings, proto, from_scratch, new_regions=config.new_regions and not kept_regions)


def _from_folder(config: MllmConfig, dtype: torch.dtype) -> Mllm:
    model, tokenizer, settings = load_mllm(config.model, dtype, config.attention)
    settings.base = {}  # of an adapter folder, whose weights are in the model now
    check_settings(config, settings, model.config.projector_hidden_act)
    if config.llm_bits:
        quantize(model.model.language_model, config.llm_bits, getattr(torch, config.save_dtype), dtype)
    turned_on = config.new_regions and settings.regions == COORDS
    if turned_on:
        model = _turn_on_regions(config, model, tokenizer, settings)
    if config.template != "auto":
        settings.template = choose_template(tokenizer, config.template)
    proto = Path(config.model) / "tokenizer.model"
    proto_bytes = proto.read_bytes() if proto.is_file() else None
    return Mllm(model, tokenizer, settings, proto_bytes, new_regions=turned_on)


def check_settings(config: MllmConfig, settings: MllmSettings, projector_act: str) -> None:
    """Refuses a recipe that contradicts the MLLM folder it goes on from, which has these settings."""
    if settings.llm_bits:
        raise DataError(
            f"the MLLM {config.model} is an adapter on a language model in {settings.llm_bits} bits, which cannot learn on; make "
            "a whole folder of it with scripts/convert_checkpoint.py --to mllm and name that"
        )
    pairs = {
        "feature_layer": settings.feature_layer,
        "geometry": settings.image.mode,
        "tile_grids": [f"{rows}x{columns}" for rows, columns in settings.image.tile_grids],
        "codec": settings.codec,
        "projector_type": next(k for k, act in PROJECTORS.items() if act == projector_act),
        "region_tokens": settings.regions,
    }
    for name, saved in pairs.items():
        asked, turned_on = getattr(config, name), name == "region_tokens" and saved == COORDS
        if asked not in (None, [], saved) and not turned_on:
            raise DataError(f"{name} is {asked}, but the MLLM {config.model} was trained with {saved}; drop {name}")


def _turn_on_regions(config: MllmConfig, model, tokenizer, settings: MllmSettings) -> RegionLlavaForConditionalGeneration:
    """The MLLM of a folder, which had none, with region tokens; the Prompter must be of that very tower, or learn with it."""
    if "projector" not in config.trains:
        raise DataError(f"region_tokens {config.region_tokens} has a projector that must be learned; add projector to train")
    if config.saves_adapter:
        raise DataError(
            f"region_tokens {config.region_tokens} is new to {config.model}, and an adapter folder would not keep it; pass "
            "--save_adapter false, or turn it on in a run before"
        )
    if settings.image.boxes:
        raise DataError(
            f"region_tokens {config.region_tokens} needs boxes of the square that the tower sees, those of {config.model} are "
            f"of {settings.image.boxes} and its pictures enter by {settings.image.mode}; leave region_tokens out"
        )
    source = config.prompter or settings.tower_path
    if config.region_tokens == "prompter":
        check_prompter_folder(source)
    if config.region_tokens == "prompter" and "tower" not in config.trains:
        tower = load_vision_tower(source, getattr(torch, settings.dtype))
        if weights_hash(tower) != settings.tower_hash:
            raise DataError(
                f"the Prompter of {source} was trained on another tower than that of {config.model}; name with prompter the CLOC "
                "folder that this tower came from, or add tower to train, so that both learn on together"
            )
    token_id = add_region_token(tokenizer)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    settings.regions = config.region_tokens
    return add_region_tokens(model, token_id, config.region_tokens, source)


def read_tokenizer(config: MllmConfig) -> tuple[PreTrainedTokenizerBase, bytes | None]:
    """The language model's tokenizer with what pictures and boxes need; a preset's is trained, its model returned beside it."""
    if config.llm_preset:
        sources = sources_of(config.tokenizer_data or config.data, config.images)
        texts = (text for source in sources for text in texts_of(source.read({})))
        proto = train_sentencepiece(texts, config.vocab_size)
        tokenizer = fast_tokenizer(proto, config.max_length)
    else:
        if not (Path(config.llm) / "config.json").is_file():
            raise DataError(f"language model {config.llm} has no config.json; give the folder of a causal language model")
        tokenizer, proto = _read(config.llm, AutoTokenizer), Path(config.llm) / "tokenizer.model"
        proto = proto.read_bytes() if proto.is_file() else None
        add_image_token(tokenizer)
    add_codec_tokens(tokenizer, BoxCodec(config.codec))
    if config.new_regions:
        add_region_token(tokenizer)
    return tokenizer, proto


def first_settings(config: MllmConfig, tokenizer: PreTrainedTokenizerBase) -> MllmSettings:
    """Of an MLLM that starts from parts; gives the tokenizer its chat template."""
    return MllmSettings(
        codec=config.codec,
        image=ImageInput.of_tower(config.tower, config.geometry, config.tile_grids),
        feature_layer=DEFAULT_FEATURE_LAYER if config.feature_layer is None else config.feature_layer,
        template=choose_template(tokenizer, config.template),
        tower_path=str(config.tower),
        regions=config.region_tokens or COORDS,
    )


def _nano_llm(config: MllmConfig, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A small Llama from scratch."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    llm = LlamaForCausalLM(nano_llm_config(config, len(tokenizer), **ids))
    nn.init.normal_(llm.get_input_embeddings().weight, std=config.embedding_std)
    return llm


def nano_llm_config(config: MllmConfig, vocab_size: int, **token_ids: int) -> LlamaConfig:
    """The preset's language model, before its tokenizer is there if need be."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=config.llm_width,
        intermediate_size=int(config.llm_width * config.llm_mlp_ratio),
        num_hidden_layers=config.llm_layers,
        num_attention_heads=config.llm_heads,
        num_key_value_heads=config.llm_heads,
        max_position_embeddings=config.max_length,
        tie_word_embeddings=False,
        # Llama's 0.02 suits its width of 4096. At this width it leaves attention a hundredth of the residual stream.
        initializer_range=config.llm_width**-0.5,
        attn_implementation=config.attention,
        **token_ids,
    )


def _load_llm(config: MllmConfig, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> PreTrainedModel:
    llm = _read(config.llm, AutoModelForCausalLM, dtype=dtype, attn_implementation=config.attention)
    if len(tokenizer) > llm.get_input_embeddings().num_embeddings:
        llm.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    return llm


def _read(folder: str, kind: type, **arguments):
    try:
        return kind.from_pretrained(folder, **arguments)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]  # a page, of a model of another kind
        raise DataError(f"language model {folder} cannot be read ({reason}); copy or save the folder again") from error


def llava_config(
    tower: PreTrainedModel,
    text_config: PreTrainedConfig,
    feature_layer: int | list[int],
    projector_act: str = "gelu",
    tile_grids: Sequence[Grid] = (),
    **token_ids: int,
) -> LlavaConfig | LlavaNextConfig:
    """The stock configuration of a Llava on this tower: its sizes, and whether its first token is no patch.

    tile_grids: of `anyres`, which makes it a LlavaNext's
    """
    side = tower.config.image_size
    tiles = {"image_grid_pinpoints": [[rows * side, columns * side] for rows, columns in tile_grids]} if tile_grids else {}
    return (LlavaNextConfig if tile_grids else LlavaConfig)(
        **tiles,
        vision_config=tower.config,
        text_config=text_config,
        image_seq_length=(tower.config.image_size // tower.config.patch_size) ** 2,
        vision_feature_layer=feature_layer,
        # "default" leaves out the first token, which is CLIP's CLS; SigLIP has none.
        vision_feature_select_strategy="default" if hasattr(tower.embeddings, "class_embedding") else "full",
        projector_hidden_act=projector_act,
        **token_ids,
    )


def join(
    tower: PreTrainedModel,
    llm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    feature_layer: int | list[int],
    projector_act: str = "gelu",
    tile_grids: Sequence[Grid] = (),
) -> LlavaForConditionalGeneration | LlavaNextForConditionalGeneration:
    """Tower and language model in a stock Llava with a new projector; their parameters are taken over, not copied."""
    ids = {"image_token_index": add_image_token(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    config = llava_config(tower, llm.config, feature_layer, projector_act, tile_grids, **ids)
    with torch.device("meta"):
        model = (LlavaNextForConditionalGeneration if tile_grids else LlavaForConditionalGeneration)(config)
    model.model.vision_tower = tower
    model.model.language_model = llm.base_model
    model.lm_head = llm.get_output_embeddings()
    model.model.multi_modal_projector = LlavaMultiModalProjector(config).to(next(llm.parameters()).dtype)
    if projector_act == "linear":
        make_identity(model.model.multi_modal_projector.linear_2)
    if tile_grids:
        width = llm.config.get_text_config().hidden_size
        model.model.image_newline = nn.Parameter((torch.randn(width) / width**0.5).to(llm.dtype))  # as LLaVA-NeXT begins
    model.generation_config = llm.generation_config
    return model.eval()


def part_of(name: str) -> str:
    """Which part a parameter belongs to: `tower`, `projector` or `llm`, and of LoRA layers `tower_lora` or `llm_lora`.

    A Prompter goes with its tower; the projector of region tokens and `image_newline` go with the picture's projector.
    """
    if any(part in name for part in ("multi_modal_projector.", "region_tokens.projector.", "image_newline")):
        return "projector"
    tower = "vision_tower." in name or "region_tokens.prompter." in name
    return ("tower" if tower else "llm") + ("_lora" if is_lora(name) else "")


def unread(model: LlavaForConditionalGeneration) -> tuple[str, ...]:
    """Modules that no answer depends on, by parts of their names: the tower's layers and norm above those that are projected
    (none where region tokens are made of its end), its pooling head, and the second layer of a linear projector."""
    config = model.config
    layers, regions = config.vision_config.num_hidden_layers, isinstance(config, RegionFields)
    depth = layers if regions else max(layer % (layers + 1) for layer in layers_of(config.vision_feature_layer))
    above = [f"encoder.layers.{layer}." for layer in range(depth, layers)]
    norm = [] if regions else ["post_layernorm."]
    linear = ["multi_modal_projector.linear_2."] if config.projector_hidden_act == "linear" else []
    return (*above, *norm, ".head.", *linear)


def freeze(model: LlavaForConditionalGeneration, trained: set[str], save_dtype: torch.dtype) -> None:
    """Only the `trained` parts require gradients; the others are rounded to the format they will be saved in.

    What learns then learns against the very weights that an evaluation loads. Nor do parameters that nothing depends on: weight
    decay would move them, and processes without ZeRO wait for their gradients.
    """
    fixed = unread(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in trained and not any(part in name for part in fixed))
        if not parameter.requires_grad and parameter.is_floating_point():  # else in low bits, where it was rounded before
            parameter.data.copy_(parameter.data.to(save_dtype))
