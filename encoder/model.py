"""CLOC: a CLIP's two towers, the Prompter and the BoxHead (arXiv 2410.02746, Figure 2). No loss, no collectives.

`RegionEncoder` is what CLOC adds; `ClocModel` adds it to `transformers.CLIPModel`, and `encoder.siglip` to `SiglipModel`.
The towers keep the names of their parameters, so any checkpoint of theirs starts a CLOC. `feat` is projected and
unnormalised, `emb` would be L2-normalised.

B images, N image tokens (CLS first), R regions, T texts, L text tokens, S side of the input, D width, E joint space.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, CLIPModel
from transformers import initialization as init
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

from encoder.activation import fuse_quick_gelu
from encoder.config import ClocConfig, RegionConfig
from encoder.errors import DataError
from encoder.prompter import BoxHead, BoxInput, Prompter, PromptLayer, sinusoids
from encoder.roi_align import RoiPooler

# Parameters that CLOC adds to its towers' model, by the start of their names.
ADDED = ("prompter.", "text_prompter.", "roi_pooler.", "box_head.", "region_logit_scale", "region_logit_bias")


@dataclass
class ImageEncoding:
    """tokens: (B, N, D), what the Prompter reads; feat: (B, E), the pooled image feature."""

    tokens: Tensor
    feat: Tensor


@dataclass
class ClocOutput:
    """Unnormalised features of one batch, and the boxes read from the texts.

    image_feat, text_feat: (B, E) of the images and their captions
    region_feat, region_text_feat: (R, E) of the box prompts and of the regions' own texts
    predicted_boxes: (R, 4) xyxy in [0, 1], from the text prompts; None where the model has no Prompter
    logit_scale, region_logit_scale: (), log of 1/temperature of the image-text and the region-text loss
    logit_bias, region_logit_bias: (), of the sigmoid loss; None where the model has none
    """

    image_feat: Tensor
    text_feat: Tensor
    region_feat: Tensor | None
    region_text_feat: Tensor | None
    predicted_boxes: Tensor | None
    logit_scale: Tensor
    region_logit_scale: Tensor
    logit_bias: Tensor | None = None
    region_logit_bias: Tensor | None = None


class RegionEncoder:
    """Promptable embeddings for a transformers model with `text_model`, `vision_model` and `logit_scale`: a mixin before it.

    The class that joins the two gives `encode_image`, `encode_text` and a configuration with `RegionConfig`'s fields.
    `from_pretrained`, `save_pretrained` and the Auto classes work as for any model.
    """

    added = ADDED

    def __init__(self, config: RegionConfig):
        super().__init__(config)
        prompts = config.region_encoder == "prompter"
        self.prompter = Prompter(config, texts=config.prompter_shared) if prompts else None
        self.text_prompter = Prompter(config, boxes=False) if prompts and not config.prompter_shared else None
        self.roi_pooler = None if prompts else RoiPooler(config)
        own = config.region_temperature == "own"
        if not hasattr(self, "logit_bias"):  # a stock SigLIP has one
            bias = config.logit_bias_init_value
            self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))
        # The region loss has its own bias wherever there is one: how many negatives a pair has differs between the two.
        for name, needed in (("logit_scale", own), ("logit_bias", True)):
            shared = getattr(self, name)
            copy = nn.Parameter(shared.detach().clone()) if needed and shared is not None else None
            self.register_parameter(f"region_{name}", copy)
        self.box_head = BoxHead(config) if prompts else None
        fuse_quick_gelu(self)
        self.post_init()

    @classmethod
    def from_clip(cls, source: str | Path, **options) -> "RegionEncoder":
        """A CLOC that starts from a CLIP or SigLIP; see `encoder.from_clip`. A SigLIP gives a `ClocSiglipModel`."""
        from encoder.from_clip import from_clip

        return from_clip(source, **options)

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: `_init_weights` below draws through `transformers.initialization`, which spares loaded weights itself.

        For custom code transformers would skip every module without parameters of its own, and leave the Prompter's
        and BoxHead's layers at a standard deviation of 1.
        """
        return False

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, PromptLayer):
            width = module.q_proj.in_features
            for linear in (module.q_proj, module.k_proj, module.v_proj, module.out_proj):
                init.normal_(linear.weight, std=width**-0.5)
            init.normal_(module.fc1.weight, std=(2 * width) ** -0.5)
            init.normal_(module.fc2.weight, std=module.fc2.in_features**-0.5)
        elif isinstance(module, BoxInput):
            for linear in (module.fc1, module.fc2):
                init.normal_(linear.weight, std=linear.in_features**-0.5)
        elif isinstance(module, Prompter):
            init.normal_(module.projection.weight, std=module.projection.in_features**-0.5)
            if module.text_input is not None:
                init.normal_(module.text_input.weight, std=module.text_input.in_features**-0.5)
            if module.corner_embedding is not None:
                init.normal_(module.corner_embedding, std=0.02)
        elif isinstance(module, RoiPooler):
            init.normal_(module.projection.weight, std=module.projection.in_features**-0.5)
        elif isinstance(module, BoxHead):
            init.normal_(module.fc1.weight, std=module.fc1.in_features**-0.5)
            init.normal_(module.fc2.weight, std=0.02)
            init.constant_(module.fc2.bias, 0.5)

    def embed_boxes(self, tokens_BND: Tensor, boxes_R4: Tensor, image_index_R: Tensor) -> Tensor:
        """Region features (R, E) of boxes (R, 4), xyxy in [0, 1] of the square input, each in image `image_index_R` (R,)."""
        if self.roi_pooler is not None:
            return self.roi_pooler(boxes_R4, tokens_BND, image_index_R)
        return self.prompter(tokens_BND, image_index_R, boxes_R4=boxes_R4)

    def embed_texts(self, tokens_BND: Tensor, text_feat_RE: Tensor, image_index_R: Tensor) -> Tensor:
        """Grounded features (R, E) of text features (R, E), each looked for in image `image_index_R` (R,).

        Raises DataError for a model with `region_encoder="roi_align"`: it reads boxes and takes no text prompt.
        """
        if self.prompter is None:
            raise DataError("this model was trained with region_encoder 'roi_align', which takes no text prompt and gives no box")
        return (self.text_prompter or self.prompter)(tokens_BND, image_index_R, text_feat_RE=text_feat_RE)

    def predict_boxes(self, grounded_RE: Tensor) -> Tensor:
        """Boxes (R, 4), xyxy in [0, 1] of the square input, of grounded features (R, E); linear, so not clipped."""
        return self.box_head(grounded_RE)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        boxes: Tensor | None = None,
        image_index: Tensor | None = None,
        region_input_ids: Tensor | None = None,
        region_attention_mask: Tensor | None = None,
        region_text_index: Tensor | None = None,
    ) -> ClocOutput:
        """All features of a training batch.

        pixel_values: (B, 3, S, S); input_ids, attention_mask: (B, L) the captions
        boxes: (R, 4) xyxy in [0, 1]; image_index: (R,) image of each box. None runs the CLIP part alone
        region_input_ids, region_attention_mask: (T, L') the distinct region texts of the batch
        region_text_index: (R,) text of each region; None where texts and regions are one to one
        """
        image = self.encode_image(pixel_values)
        text_feat = self.encode_text(input_ids, attention_mask)
        logits = self._logit_parameters()
        if boxes is None:
            return ClocOutput(image.feat, text_feat, None, None, None, **logits)
        region_text_feat = self.encode_text(region_input_ids, region_attention_mask)
        if region_text_index is not None:
            region_text_feat = region_text_feat[region_text_index]
        region_feat = self.embed_boxes(image.tokens, boxes, image_index)
        predicted_boxes = None
        if self.box_head is not None:
            predicted_boxes = self.predict_boxes(self.embed_texts(image.tokens, region_text_feat, image_index))
        return ClocOutput(image.feat, text_feat, region_feat, region_text_feat, predicted_boxes, **logits)

    def _logit_parameters(self) -> dict[str, Tensor]:
        """Scale, and bias if there is one, of both losses: scalars, whatever shape the engine trains them in.

        (See encoder.engine.reshape_scalars.)
        """
        logits = {}
        for name in ("logit_scale", "logit_bias"):
            shared = getattr(self, name)
            if shared is not None:
                own = getattr(self, f"region_{name}")
                logits |= {name: shared.reshape(()), f"region_{name}": (shared if own is None else own).reshape(())}
        return logits


class ClocModel(RegionEncoder, CLIPModel):
    """CLIP with promptable embeddings."""

    config_class = ClocConfig
    base_model_prefix = "cloc"
    scalar_shape = ()  # of logit_scale in a saved CLIP
    added = (*ADDED, "logit_bias")  # which a stock SigLIP has

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, ClocModel):
            if self.config.position_init == "sincos":
                init_sincos_positions(self.vision_model.embeddings, self.config)
            for name in ("logit_bias", "region_logit_bias"):
                if getattr(module, name, None) is not None:  # CLIPModel initialises before they are there
                    init.constant_(getattr(module, name), self.config.logit_bias_init_value)

    def encode_image(self, pixel_values: Tensor) -> ImageEncoding:
        """Pixels (B, 3, S, S), normalised -> the tokens and feature of each image; the one pass that all prompts share."""
        output = self.vision_model(pixel_values=pixel_values)
        tokens = output.last_hidden_state
        if self.config.prompter_layer_norm:
            tokens = self.vision_model.post_layernorm(tokens)
        return ImageEncoding(tokens, self.visual_projection(output.pooler_output))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Token ids (T, L), each row with an end token, padded after it -> text features (T, E); T may be 0.

        attention_mask: not read. The feature is the end token's and the tower is causal, so the padding after it never
            counts; and without a mask attention takes its fastest kernel, and nothing waits for the device to look at one.
        """
        if not len(input_ids):
            # The stock tower cannot reshape an empty batch. One placeholder row, dropped, keeps a rank without regions
            # in the same parameter gathers as the others.
            row = input_ids.new_full((1, 1), self.config.text_config.eos_token_id)
            return self.encode_text(row)[:0]
        return self.text_projection(self.text_model(input_ids=input_ids).pooler_output)


@torch.no_grad()
def init_sincos_positions(embeddings: CLIPVisionEmbeddings, config: ClocConfig) -> None:
    """Starts a tower's position table at the sinusoids of the patch centres; CLS at zero.

    Scaled to the root mean square that patch embeddings of normalised pixels have at initialisation, so that neither
    drowns the other in the LayerNorm that follows.
    """
    grid = embeddings.image_size // embeddings.patch_size
    centres = (torch.arange(grid) + 0.5) / grid
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    table = sinusoids(
        torch.stack([x, y], -1).reshape(-1, 2), embeddings.embed_dim, config.box_min_frequency, config.box_max_frequency
    )
    fan_in = embeddings.patch_embedding.weight[0].numel()
    scale = config.vision_config.initializer_range * fan_in**0.5 / 0.5**0.5
    table = torch.cat([torch.zeros(1, embeddings.embed_dim), scale * table])
    init.copy_(embeddings.position_embedding.weight, table.to(embeddings.position_embedding.weight))


AutoConfig.register("cloc", ClocConfig)
AutoModel.register(ClocConfig, ClocModel)
