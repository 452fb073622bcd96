"""Region tokens: a region that a question names is also one token of the language model, made from the picture itself.

Where the text says "What is [012, 345, 678, 999]<region_feature>?", the mark's embedding is replaced by a feature of that
region through a projector. Two features, both of the tower's last layer, whichever layer the picture's own tokens are of:

`prompter`  CLOC's region embedding (the starred rows of arXiv 2410.02746, Table 4); points and masks by their box
`pooling`   the mean of the patch tokens under the region, a mask's own shape included: for towers without a Prompter

Of a picture in tiles (`anyres`) the regions are read on the square of the whole picture.

B pictures, or squares of pictures, N tokens of one (patches P), R regions, F width of a region's feature, D tower width,
H language model's.
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
    PreTrainedModel,
)

from encoder.config import RegionConfig
from encoder.errors import DataError
from encoder.model import RegionEncoder
from encoder.pretrained import WHOLE, folder_kind, load_encoder
from encoder.prompter import Prompter

# Fields of a CLOC's configuration that its Prompter is built from, beside the tower's.
PROMPTER_FIELDS = ("projection_dim", "num_class_tokens", *RegionConfig.__dataclass_fields__)


@dataclass(kw_only=True)
class RegionFields:
    """What region tokens add to a stock configuration.

    region_tokens: `prompter` or `pooling`; region_token_id: of the mark
    prompter: `PROMPTER_FIELDS` of the CLOC, None for pooling
    region_layer_norm: whether the tower's final LayerNorm is applied to its last layer's tokens first
    num_class_tokens: tokens before the patches
    """

    region_tokens: str = "prompter"
    region_token_id: int = 0
    prompter: dict | None = None
    region_layer_norm: bool = True
    num_class_tokens: int = 1


class RegionLlavaConfig(RegionFields, LlavaConfig):
    """Of a Llava with region tokens."""

    model_type = "llava_regions"


class RegionLlavaNextConfig(RegionFields, LlavaNextConfig):
    """Of a LlavaNext with region tokens."""

    model_type = "llava_next_regions"


class RegionProjector(nn.Module):
    """Two-layer GELU MLP, (R, F) -> (R, H): what the picture's projector is."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.linear_1, self.act, self.linear_2 = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden)

    def forward(self, features_RF: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(features_RF)))


class RegionTokens(nn.Module):
    """Prompter, where there is one, and projector."""

    def __init__(self, config: RegionLlavaConfig | RegionLlavaNextConfig):
        super().__init__()
        self.prompter, self.num_class_tokens = None, config.num_class_tokens
        width = config.vision_config.hidden_size
        if config.region_tokens == "prompter":
            fields = SimpleNamespace(**config.prompter, vision_config=config.vision_config)
            self.prompter, width = Prompter(fields, texts=False), fields.projection_dim
        self.projector = RegionProjector(width, config.text_config.hidden_size)

    def features(
        self,
        tokens_BND: Tensor,
        region_image_index: Tensor,
        region_boxes: Tensor | None = None,
        region_weights: Tensor | None = None,
    ) -> Tensor:
        """Features (R, F) of regions, each in picture `region_image_index` (R,), scaled to a root mean square of 1.

        region_boxes: (R, 4) xyxy in [0, 1] of the square input, for `prompter`
        region_weights: (R, P) that sum to 1, for `pooling`
        """
        if self.prompter is not None:
            features_RF = self.prompter(tokens_BND, region_image_index, boxes_R4=region_boxes)
        else:
            patches_BPD = tokens_BND[:, self.num_class_tokens :]
            features_RF = torch.einsum("rp,rpd->rd", region_weights.to(patches_BPD.dtype), patches_BPD[region_image_index])
        return (normalize(features_RF.float(), dim=-1) * features_RF.shape[-1] ** 0.5).to(tokens_BND.dtype)

    def forward(self, features_RF: Tensor) -> Tensor:
        """(R, F) -> tokens (R, H)."""
        return self.projector(features_RF)


class WithRegionTokens:
    """A stock inner model whose region marks are replaced by region tokens: a mixin before it."""

    def __init__(self, config: RegionLlavaConfig | RegionLlavaNextConfig):
        super().__init__(config)
        self.region_tokens = RegionTokens(config)

    def last_tokens(self, last_hidden_state: Tensor) -> Tensor:
        """What the tower's last layer gave -> the tokens that region features are made of, (B, N, D)."""
        norm = self.config.region_layer_norm
        return self.vision_tower.post_layernorm(last_hidden_state) if norm else last_hidden_state

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        image_sizes: Tensor | None = None,
        region_image_index: Tensor | None = None,
        region_boxes: Tensor | None = None,
        region_weights: Tensor | None = None,
        region_features: Tensor | None = None,
        **kwargs,
    ):
        """As the stock one's. The regions come in the order of their marks, row by row.

        region_image_index, region_boxes, region_weights: as in `RegionTokens.features`; the square among those of
            `pixel_values`
        region_features: (R, F) where they are known already (kept on disk, or of an earlier pass), instead of the others
        """
        if input_ids is None:
            return super().forward(inputs_embeds=inputs_embeds, **kwargs)
        embeds_BLH = self.get_input_embeddings()(input_ids)
        image = (mm_encoder_outputs or {}).get("image")
        if image is None and pixel_values is not None:
            image = self.get_image_features(pixel_values, image_sizes=image_sizes, return_dict=True)
        if image is not None:
            picture_tokens = torch.cat(list(image.pooler_output))
            embeds_BLH = put_in(embeds_BLH, input_ids == self.config.image_token_id, picture_tokens, "picture")
        if region_features is None and region_image_index is not None:
            tokens_BND = self.last_tokens(image.last_hidden_state)
            region_features = self.region_tokens.features(tokens_BND, region_image_index, region_boxes, region_weights)
        if region_features is not None:
            region_tokens = self.region_tokens(region_features.to(embeds_BLH.dtype))
            embeds_BLH = put_in(embeds_BLH, input_ids == self.config.region_token_id, region_tokens, "region")
        return super().forward(inputs_embeds=embeds_BLH, **kwargs)


class RegionLlavaModel(WithRegionTokens, LlavaModel):
    """A stock Llava's inner model with region tokens."""


class RegionLlavaNextModel(WithRegionTokens, LlavaNextModel):
    """A stock LlavaNext's inner model with region tokens."""


def put_in(embeds_BLH: Tensor, places_BL: Tensor, tokens_TH: Tensor, what: str) -> Tensor:
    """The embeddings with these tokens in those places, row by row; without any the tokens still take part, as zero."""
    if (marks := int(places_BL.sum())) != len(tokens_TH):
        raise ValueError(f"{len(tokens_TH)} {what} tokens for {marks} marks in the text; they come from different batches")
    tokens_TH = tokens_TH.to(embeds_BLH.dtype)
    if not marks:
        return embeds_BLH + 0 * tokens_TH.sum()
    return embeds_BLH.masked_scatter(places_BL[..., None], tokens_TH)


class RegionGeneration:
    """A stock model for generation with `inner` inside, whose arguments it also takes: a mixin before it."""

    inner: type

    def __init__(self, config: RegionLlavaConfig | RegionLlavaNextConfig):
        PreTrainedModel.__init__(self, config)  # the stock one's own would build a stock model inside
        self.model = self.inner(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def prepare_inputs_for_generation(self, *args, region_features=None, is_first_iteration=False, **kwargs):
        """As the stock one's; the regions of a prompt belong to its first pass alone."""
        inputs = super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
        return inputs | {"region_features": region_features} if is_first_iteration else inputs


class RegionLlavaForConditionalGeneration(RegionGeneration, LlavaForConditionalGeneration):
    """`LlavaForConditionalGeneration` with region tokens."""

    config_class, inner = RegionLlavaConfig, RegionLlavaModel


class RegionLlavaNextForConditionalGeneration(RegionGeneration, LlavaNextForConditionalGeneration):
    """`LlavaNextForConditionalGeneration` with region tokens."""

    config_class, inner = RegionLlavaNextConfig, RegionLlavaNextModel


def check_prompter_folder(source: str | Path) -> None:
    """Refuses a folder that is not there: an MLLM may lie elsewhere than its tower."""
    if not Path(source).is_dir():
        raise DataError(f"region_tokens prompter needs a CLOC, but its folder {source} is not there; name it with prompter")


def region_settings(by: str, source: str | Path, vision_config) -> dict:
    """`RegionFields`, but for the mark's id.

    source: the folder that a Prompter comes from; vision_config: the MLLM's tower's
    Raises DataError where there is no Prompter, or one of another tower.
    """
    siglip = "siglip" in vision_config.model_type  # its last hidden state is normalised already, and all patches
    settings = {"region_tokens": by, "region_layer_norm": not siglip, "num_class_tokens": 0 if siglip else 1}
    if by == "pooling":
        return settings
    check_prompter_folder(source)
    kind = folder_kind(source)
    cls = WHOLE.get(kind)
    if cls is None or not issubclass(cls, RegionEncoder):
        raise DataError(
            f"region_tokens prompter needs the folder of a CLOC, but {source} holds a {kind}, which has no Prompter; name a CLOC "
            "with prompter, or take region_tokens pooling"
        )
    config = AutoConfig.from_pretrained(source)
    if config.region_encoder != "prompter":
        raise DataError(
            f"region_tokens prompter needs a Prompter, but the CLOC {source} has region_encoder {config.region_encoder}; name "
            "another with prompter, or take region_tokens pooling"
        )
    for name in ("hidden_size", "num_hidden_layers", "image_size", "patch_size"):
        ours, theirs = getattr(vision_config, name), getattr(config.vision_config, name)
        if ours != theirs:
            raise DataError(
                f"the Prompter of {source} reads a tower of {name} {theirs}, the MLLM's tower has {ours}; name the CLOC folder "
                "that the MLLM's tower came from"
            )
    settings["region_layer_norm"] &= config.prompter_layer_norm
    return settings | {"prompter": {name: getattr(config, name) for name in PROMPTER_FIELDS}}


def add_region_tokens(
    model: LlavaForConditionalGeneration | LlavaNextForConditionalGeneration, token_id: int, by: str, source: str | Path
) -> RegionLlavaForConditionalGeneration | RegionLlavaNextForConditionalGeneration:
    """A stock Llava or LlavaNext with region tokens: its parts are taken over, not copied; the projector is new.

    token_id: of the mark, which has an embedding; by: `prompter` or `pooling`
    source: the CLOC folder that the Prompter comes from
    """
    stock = model.config
    settings = region_settings(by, source, stock.vision_config)
    kept = (
        "vision_config", "text_config", "image_token_index", "image_seq_length", "projector_hidden_act", "vision_feature_layer",
        "vision_feature_select_strategy", "multimodal_projector_bias", "tie_word_embeddings", "pad_token_id",
        "image_grid_pinpoints",
    )  # fmt: skip
    fields = {name: getattr(stock, name) for name in kept if hasattr(stock, name)}
    tiles = isinstance(stock, LlavaNextConfig)
    cls = RegionLlavaNextForConditionalGeneration if tiles else RegionLlavaForConditionalGeneration
    config = cls.config_class(**fields, region_token_id=token_id, **settings)
    with torch.device("meta"):
        joined = cls(config)
    for part in ("vision_tower", "multi_modal_projector", "language_model", *["image_newline"] * tiles):
        setattr(joined.model, part, getattr(model.model, part))
    joined.lm_head, joined.generation_config = model.lm_head, model.generation_config
    region_tokens = RegionTokens(config)
    if region_tokens.prompter is not None and model.device.type != "meta":
        state = load_encoder(source).prompter.state_dict()
        region_tokens.prompter.load_state_dict({name: state[name] for name in region_tokens.prompter.state_dict()})
    joined.model.region_tokens = region_tokens.to(model.dtype)
    return joined.eval()


for _cls in (RegionLlavaForConditionalGeneration, RegionLlavaNextForConditionalGeneration):
    AutoConfig.register(_cls.config_class.model_type, _cls.config_class)
    AutoModelForImageTextToText.register(_cls.config_class, _cls)
