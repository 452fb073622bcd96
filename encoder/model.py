"""`ClocModel`: CLIP's two towers, the Prompter and the BoxHead (arXiv 2410.02746, Figure 2). No loss, no collectives.

It is a `transformers.CLIPModel` with two more modules, so its CLIP part has CLIP's parameter names and any CLIP
checkpoint starts it. `feat` is projected and unnormalised, `emb` would be L2-normalised.

B images, N image tokens (CLS first), R regions, T texts, L text tokens, S side of the input, D width, E joint space.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, CLIPModel
from transformers import initialization as init
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

from encoder.config import ClocConfig
from encoder.prompter import BoxHead, Prompter, PromptLayer, sinusoids

# Parameters that CLOC adds to CLIP, by the start of their names.
ADDED_TO_CLIP = ("prompter.", "text_prompter.", "box_head.", "region_logit_scale", "logit_bias", "region_logit_bias")


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
    predicted_boxes: (R, 4) xyxy in [0, 1], from the text prompts
    logit_scale, region_logit_scale: (), log of 1/temperature of the image-text and the region-text loss
    logit_bias, region_logit_bias: () of the same two, where the model has them
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


class ClocModel(CLIPModel):
    """CLIP with promptable embeddings. `from_pretrained`, `save_pretrained` and the Auto classes work as for any model."""

    config_class = ClocConfig
    base_model_prefix = "cloc"

    def __init__(self, config: ClocConfig):
        super().__init__(config)
        self.prompter = Prompter(config, texts=config.prompter_shared)
        self.text_prompter = None if config.prompter_shared else Prompter(config, boxes=False)
        own = config.region_temperature == "own"
        self.region_logit_scale = nn.Parameter(self.logit_scale.detach().clone()) if own else None
        bias = config.logit_bias_init_value
        self.logit_bias, self.region_logit_bias = (
            None if bias is None else nn.Parameter(torch.tensor(float(bias))) for _ in range(2)
        )
        self.box_head = BoxHead(config)
        self.post_init()

    @classmethod
    def from_clip(cls, folder: str, **fields) -> "ClocModel":
        """A CLOC that starts from a CLIP folder; see `encoder.pretrained.from_clip`."""
        from encoder.pretrained import from_clip

        return from_clip(folder, **fields)

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
        width = self.config.vision_config.hidden_size if isinstance(self.config, ClocConfig) else 0
        if isinstance(module, PromptLayer):
            for linear in (module.q_proj, module.k_proj, module.v_proj, module.out_proj):
                init.normal_(linear.weight, std=width**-0.5)
            init.normal_(module.fc1.weight, std=(2 * width) ** -0.5)
            init.normal_(module.fc2.weight, std=module.fc2.in_features**-0.5)
        elif isinstance(module, Prompter):
            init.normal_(module.projection.weight, std=width**-0.5)
            if module.text_input is not None:
                init.normal_(module.text_input.weight, std=module.text_input.in_features**-0.5)
            if module.corner_embedding is not None:
                init.normal_(module.corner_embedding, std=0.02)
        elif isinstance(module, BoxHead):
            init.normal_(module.fc1.weight, std=module.fc1.in_features**-0.5)
            init.normal_(module.fc2.weight, std=0.02)
            init.constant_(module.fc2.bias, 0.5)
        elif isinstance(module, ClocModel):
            if self.config.position_init == "sincos":
                init_sincos_positions(self.vision_model.embeddings, self.config)
            if getattr(module, "logit_bias", None) is not None:  # CLIPModel initialises before it is there
                init.constant_(module.logit_bias, self.config.logit_bias_init_value)
                init.constant_(module.region_logit_bias, self.config.logit_bias_init_value)

    def encode_image(self, pixel_values: Tensor) -> ImageEncoding:
        """Pixels (B, 3, S, S), normalised -> the tokens and feature of each image; the one pass that all prompts share."""
        output = self.vision_model(pixel_values=pixel_values)
        tokens = output.last_hidden_state
        if self.config.prompter_layer_norm:
            tokens = self.vision_model.post_layernorm(tokens)
        return ImageEncoding(tokens, self.visual_projection(output.pooler_output))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Token ids (T, L), each row with an end token -> text features (T, E); T may be 0."""
        if not len(input_ids):
            # The stock tower cannot reshape an empty batch. One placeholder row, dropped, keeps a rank without regions
            # in the same parameter gathers as the others.
            row = input_ids.new_full((1, 1), self.config.text_config.eos_token_id)
            return self.encode_text(row)[:0]
        return self.text_projection(self.text_model(input_ids=input_ids, attention_mask=attention_mask).pooler_output)

    def embed_boxes(self, tokens_BND: Tensor, boxes_R4: Tensor, image_index_R: Tensor) -> Tensor:
        """Region features (R, E) of boxes (R, 4), xyxy in [0, 1] of the square input, each in image `image_index_R` (R,)."""
        return self.prompter(self.prompter.box_prompts(boxes_R4), tokens_BND, image_index_R)

    def embed_texts(self, tokens_BND: Tensor, text_feat_RE: Tensor, image_index_R: Tensor) -> Tensor:
        """Grounded features (R, E) of text features (R, E), each looked for in image `image_index_R` (R,)."""
        prompter = self.text_prompter or self.prompter
        return prompter(prompter.text_prompts(text_feat_RE), tokens_BND, image_index_R)

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
        region_scale = self.logit_scale if self.region_logit_scale is None else self.region_logit_scale
        # As scalars, whatever shape the engine trains them in (see encoder.engine.reshape_scalars).
        scalars = [self.logit_scale.reshape(()), region_scale.reshape(())]
        if self.logit_bias is not None:
            scalars += [self.logit_bias.reshape(()), self.region_logit_bias.reshape(())]
        if boxes is None:
            return ClocOutput(image.feat, text_feat, None, None, None, *scalars)
        region_text_feat = self.encode_text(region_input_ids, region_attention_mask)
        if region_text_index is not None:
            region_text_feat = region_text_feat[region_text_index]
        region_feat = self.embed_boxes(image.tokens, boxes, image_index)
        predicted_boxes = self.predict_boxes(self.embed_texts(image.tokens, region_text_feat, image_index))
        return ClocOutput(image.feat, text_feat, region_feat, region_text_feat, predicted_boxes, *scalars)


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
