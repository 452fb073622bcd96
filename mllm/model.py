"""The MLLM assembled: any CLIP or SigLIP tower, a two-layer projector, any causal language model, as a stock Llava.

(S sampled image tokens, D the tower's width, H the language model's width.)
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from encoder.errors import DataError
from encoder.pretrained import load_vision_tower
from mllm.box_text import BoxCodec
from mllm.checkpoint import MllmSettings, load_mllm
from mllm.config import DEFAULT_FEATURE_LAYER, PROJECTORS, MllmConfig, layers_of
from mllm.image_input import ImageInput
from mllm.llava_layout import read_projector
from mllm.lora import add_lora, is_lora, lora_config, quantize
from mllm.mixture import sources_of
from mllm.packing import attends_to_all
from mllm.records import texts_of
from mllm.templates import choose_template, end_token_ids
from mllm.tokenizer import add_codec_tokens, add_image_token, fast_tokenizer, train_sentencepiece


@dataclass
class Mllm:
    """A model with all that goes with it.

    sentencepiece_model: the serialised model that the tokenizer is made from, where there is one
    from_scratch: whether projector and language model start from random weights
    lora: peft's LoraConfig of the layers that were added, else None
    """

    model: LlavaForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    settings: MllmSettings
    sentencepiece_model: bytes | None = None
    from_scratch: bool = False
    lora: object | None = None

    @property
    def num_image_tokens(self) -> int:
        return self.model.config.image_seq_length


def build_mllm(config: MllmConfig, dtype: torch.dtype = torch.float32) -> Mllm:
    """What the recipe names: an MLLM folder to go on from, or a tower and a language model joined by a new projector."""
    mllm = _from_folder(config, dtype) if config.model else _from_parts(config, dtype)
    if config.joins_rows and not attends_to_all(mllm.model.config.text_config, config.max_length):
        raise DataError(
            f"{config.joins_rows} is true, but tokens of the language model {config.model or config.llm} do not see all of a row "
            f"of {config.max_length} (sliding window or recurrent layers); leave {config.joins_rows} out, or lower max_length"
        )
    if config.llm_bits:
        quantize(mllm.model.model.language_model, config.llm_bits, getattr(torch, config.save_dtype))
    if config.uses_lora:
        torch.manual_seed(config.seed)
        mllm.lora = lora_config(mllm.model, config)
        add_lora(mllm.model, mllm.lora)
    return mllm


def _from_parts(config: MllmConfig, dtype: torch.dtype) -> Mllm:
    tower = load_vision_tower(config.tower, dtype)
    tower.set_attn_implementation(config.attention)
    layer = DEFAULT_FEATURE_LAYER if config.feature_layer is None else config.feature_layer
    for number in layers_of(layer):
        if not -tower.config.num_hidden_layers - 1 <= number <= tower.config.num_hidden_layers:
            raise DataError(
                f"feature_layer is {number}, but the tower {config.tower} has {tower.config.num_hidden_layers} layers; "
                "choose one of them, -1 is the last"
            )
    torch.manual_seed(config.seed)  # after the tower: two towers of one size then meet the same initial weights
    if config.llm_preset:
        llm, tokenizer, proto = _nano_llm(config)
    else:
        llm, tokenizer, proto = _load_llm(config, dtype)
    model = join(tower, llm.to(dtype), tokenizer, layer, PROJECTORS[config.projector_type])
    if config.projector:
        load_projector(model, config.projector)
    template = choose_template(tokenizer, config.template)
    if len(ends := end_token_ids(tokenizer)) > 1:  # stock code stops where the template's answers do
        model.generation_config.eos_token_id = ends
    settings = MllmSettings(
        codec=config.codec,
        image=ImageInput.of_tower(config.tower, config.geometry),
        feature_layer=layer,
        template=template,
        tower_path=str(config.tower),
    )
    return Mllm(model, tokenizer, settings, proto, from_scratch=bool(config.llm_preset) and not config.projector)


def _from_folder(config: MllmConfig, dtype: torch.dtype) -> Mllm:
    model, tokenizer, settings = load_mllm(config.model, dtype, config.attention)
    pairs = {
        "feature_layer": settings.feature_layer,
        "geometry": settings.image.mode,
        "codec": settings.codec,
        "projector_type": next(k for k, act in PROJECTORS.items() if act == model.config.projector_hidden_act),
    }
    for name, saved in pairs.items():
        asked = getattr(config, name)
        if asked is not None and asked != saved:
            raise DataError(f"{name} is {asked}, but the MLLM {config.model} was trained with {saved}; drop {name}")
    if config.template != "auto":
        settings.template = choose_template(tokenizer, config.template)
    proto = Path(config.model) / "tokenizer.model"
    return Mllm(model, tokenizer, settings, proto.read_bytes() if proto.is_file() else None)


def _nano_llm(config: MllmConfig) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase, bytes]:
    """A small Llama from scratch and its own tokenizer."""
    sources = sources_of(config.tokenizer_data or config.data, config.images)
    texts = (text for source in sources for text in texts_of(source.read({})))
    proto = train_sentencepiece(texts, config.vocab_size)
    tokenizer = fast_tokenizer(proto, config.max_length)
    add_codec_tokens(tokenizer, BoxCodec(config.codec))
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    llm = LlamaForCausalLM(nano_llm_config(config, len(tokenizer), **ids))
    nn.init.normal_(llm.get_input_embeddings().weight, std=config.embedding_std)
    return llm, tokenizer, proto


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


def _load_llm(config: MllmConfig, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, bytes | None]:
    if not (Path(config.llm) / "config.json").is_file():
        raise DataError(f"language model {config.llm} has no config.json; give the folder of a causal language model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.llm)
        llm = AutoModelForCausalLM.from_pretrained(config.llm, dtype=dtype, attn_implementation=config.attention)
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"language model {config.llm} cannot be read ({reason}); copy or save the folder again") from error
    add_image_token(tokenizer)
    add_codec_tokens(tokenizer, BoxCodec(config.codec))
    if len(tokenizer) > llm.get_input_embeddings().num_embeddings:
        llm.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    proto = Path(config.llm) / "tokenizer.model"
    return llm, tokenizer, proto.read_bytes() if proto.is_file() else None


def llava_config(
    tower: PreTrainedModel,
    text_config: PreTrainedConfig,
    feature_layer: int | list[int],
    projector_act: str = "gelu",
    **token_ids: int,
) -> LlavaConfig:
    """The stock configuration of a Llava on this tower: its sizes, and whether its first token is no patch."""
    return LlavaConfig(
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
) -> LlavaForConditionalGeneration:
    """Tower and language model in a stock Llava with a new projector; their parameters are taken over, not copied."""
    ids = {"image_token_index": add_image_token(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    config = llava_config(tower, llm.config, feature_layer, projector_act, **ids)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = tower
    model.model.language_model = llm.base_model
    model.lm_head = llm.get_output_embeddings()
    model.model.multi_modal_projector = LlavaMultiModalProjector(config).to(next(llm.parameters()).dtype)
    if projector_act == "linear":
        _make_identity(model.model.multi_modal_projector.linear_2)
    model.generation_config = llm.generation_config
    return model.eval()


def _make_identity(layer: nn.Linear) -> None:
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)


def load_projector(model: LlavaForConditionalGeneration, folder: str | Path) -> None:
    """Copies the projector of another MLLM folder, or of LLaVA's `mm_projector.bin` or its folder."""
    found: dict[str, Tensor] = read_projector(folder)
    files = sorted(Path(folder).glob("*.safetensors"))
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                if "multi_modal_projector." in name:
                    found[name.split("multi_modal_projector.")[1]] = tensors.get_tensor(name)
    if not found:
        raise DataError(
            f"projector folder {folder} holds no Llava projector in {len(files)} safetensors files; name an MLLM folder"
        )
    sizes = Path(folder) / "config.json"
    act = json.loads(sizes.read_text()).get("projector_hidden_act", "gelu") if sizes.is_file() else "gelu"
    if act != model.config.projector_hidden_act:
        theirs = {act: name for name, act in PROJECTORS.items()}.get(act, act)
        raise DataError(f"the projector in {folder} is of projector_type {theirs}; pass that, or leave projector out")
    fill_projector(model, found, folder)


def fill_projector(model: LlavaForConditionalGeneration, found: dict[str, Tensor], folder: str | Path) -> None:
    """Copies a projector's parameters, refused where their sizes are not this tower's and language model's."""
    projector = model.model.multi_modal_projector
    if wrong := sorted(set(found) ^ set(projector.state_dict())):
        raise DataError(f"the projector in {folder} has or lacks {', '.join(wrong)}; Llava's are two layers with biases")
    (ours_out, ours_in), (theirs_out, theirs_in) = projector.linear_1.weight.shape, found["linear_1.weight"].shape
    if ours_in != theirs_in:
        raise DataError(
            f"the projector in {folder} takes features of width {theirs_in}, the tower's are {ours_in} wide; "
            "choose that projector's tower, or leave projector out and train a new one"
        )
    if ours_out != theirs_out:
        raise DataError(
            f"the projector in {folder} ends at width {theirs_out}, the language model is {ours_out} wide; "
            "choose that projector's language model, or leave projector out and train a new one"
        )
    projector.load_state_dict({name: value.to(projector.linear_1.weight.dtype) for name, value in found.items()})


WHITENING_RIDGE = 0.1  # of the mean variance per direction


@torch.no_grad()
def fit_projector(projector: LlavaMultiModalProjector, features_SD: Tensor, output_std: float) -> None:
    """Starts a projector so that these features come out centred and with standard deviation `output_std`.

    features_SD: image tokens of some pictures at the projected layer, as the tower gives them
    The features are whitened, and that is folded into `linear_1`. Raw, a few directions are a hundred times louder than
    the median: in a CLIP tower they hold the background's colour and position has a twentieth of the variance, in a CLOC
    tower position has four fifths and the names the rest. A small language model then sees either where or what.
    """
    features_SD = features_SD.float()
    mean_D = features_SD.mean(0)
    variance_D, axes_DD = torch.linalg.eigh(torch.cov(features_SD.T))
    # The ridge keeps directions that hold next to nothing from being blown up into noise.
    scale_D = (variance_D + WHITENING_RIDGE * variance_D.mean()).rsqrt()
    width = projector.linear_1.out_features
    first = torch.randn(width, len(mean_D)) / len(mean_D) ** 0.5 @ (axes_DD * scale_D) @ axes_DD.T
    first /= ((features_SD - mean_D) @ first.T).std()
    second = torch.randn(projector.linear_2.out_features, width) / width**0.5
    projector.linear_1.weight.copy_(first)
    projector.linear_1.bias.copy_(-first @ mean_D)
    out_SH = projector.act(features_SD @ first.T - first @ mean_D) @ second.T
    scale = output_std / (out_SH - out_SH.mean(0)).std()
    projector.linear_2.weight.copy_(second * scale)
    projector.linear_2.bias.copy_(-out_SH.mean(0) * scale)
    if isinstance(projector.act, nn.Identity):  # a linear projector: its first layer alone
        second, shift = projector.linear_2.weight, projector.linear_2.bias
        projector.linear_1.bias.copy_(second @ projector.linear_1.bias + shift)
        projector.linear_1.weight.copy_(second @ projector.linear_1.weight)
        _make_identity(projector.linear_2)


def part_of(name: str) -> str:
    """Which part a parameter belongs to: `tower`, `projector` or `llm`, and of LoRA layers `tower_lora` or `llm_lora`."""
    if "multi_modal_projector." in name:
        return "projector"
    return ("tower" if "vision_tower." in name else "llm") + ("_lora" if is_lora(name) else "")


def freeze(model: LlavaForConditionalGeneration, trained: set[str], save_dtype: torch.dtype) -> None:
    """Only the `trained` parts require gradients; the others are rounded to the format they will be saved in.

    What learns then learns against the very weights that an evaluation loads. A linear projector is Llava's first layer alone.
    """
    fixed = "multi_modal_projector.linear_2." if model.config.projector_hidden_act == "linear" else None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in trained and not (fixed and fixed in name))
        if not parameter.requires_grad and parameter.is_floating_point():  # else in low bits, where it was rounded before
            parameter.data = parameter.data.to(save_dtype).to(parameter.dtype)
