"""The Prompter: one set of image tokens, many prompts, one region feature each (arXiv 2410.02746, Sections 3.2-3.3).

A prompt is two corner tokens (a box; with `box_token="joint"` one token) or one token (a text feature), prepended to the
image tokens of its image; one single-head transformer layer of the tower's width follows, then a pooler and a projection.
Prompts never see each other.

Written naively that is one full layer per prompt. Here the softmax is split exactly: attention among image tokens is
computed once per image together with its log-normaliser, and each prompt adds its own one or two keys to it.

B images, N image tokens, R regions (prompts) of the batch, P prompt tokens each, D tower width, E joint space.
"""

import math

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from encoder.activation import fuse_quick_gelu
from encoder.config import RegionConfig
from encoder.precision import upcast


def sinusoids(coordinates: Tensor, width: int, min_frequency: float, max_frequency: float) -> Tensor:
    """Fixed sinusoidal encoding of points, (..., 2) x, y in [0, 1] -> (..., width).

    width/4 frequencies per coordinate in geometric steps, in cycles over the unit length; order sin x, cos x, sin y, cos y.
    """
    steps = torch.linspace(math.log(min_frequency), math.log(max_frequency), width // 4, device=coordinates.device)
    angles = 2 * math.pi * coordinates.float()[..., None] * steps.exp()
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class Projection(nn.Linear):
    """A linear layer Wx + b that can go to the other side of a dot product: q.(Wx + b) = (qW).x + q.b.

    Both ways are its forward, since ZeRO-3 holds a module's parameters for the time of that alone.
    """

    def forward(self, values: Tensor, dual: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """x (..., I) -> Wx + b (..., O); if `dual`, q (..., O) -> qW (..., I) and q.b (..., 1)."""
        return (values @ self.weight, (values @ self.bias)[..., None]) if dual else super().forward(values)


class PromptLayer(GradientCheckpointingLayer):
    """A pre-LN, single-head CLIP encoder layer over [prompt tokens, image tokens], factored over the prompts of an image."""

    def __init__(self, config: RegionConfig):
        super().__init__()
        vision = config.vision_config
        width, self.scale = vision.hidden_size, vision.hidden_size**-0.5
        self.layer_norm1 = nn.LayerNorm(width, eps=vision.layer_norm_eps)
        self.q_proj, self.k_proj = Projection(width, width), Projection(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.layer_norm2 = nn.LayerNorm(width, eps=vision.layer_norm_eps)
        hidden = round(config.prompter_mlp_ratio * width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.activation = ACT2FN[vision.hidden_act]
        fuse_quick_gelu(self)

    def _feed_forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.fc2(self.activation(self.fc1(self.layer_norm2(hidden))))

    def forward(self, prompts_RPD: Tensor, tokens_BND: Tensor, image_index_R: Tensor, with_image: bool):
        """Prompt tokens after the layer (R, P, D) and, if `with_image`, each region's image tokens (R, N, D), else None."""

        def of_regions(image_BNX: Tensor) -> Tensor:
            """Each region's image, (R, N, X). A single image is not copied; the gradient of a copy adds whole rows."""
            if len(image_BNX) == 1:
                return image_BNX.expand(len(image_index_R), -1, -1)
            return image_BNX.index_select(0, image_index_R)

        # Each region needs its image's keys, values and queries. Their projections are moved to the prompts' side, which is a
        # few tokens, and a mixture of values is the value of the mixture, as weights sum to 1.
        prompt_RPD = self.layer_norm1(prompts_RPD)
        query_RPD, bias_RP1 = self.k_proj(self.q_proj(prompt_RPD), dual=True)
        image_BND = self.layer_norm1(tokens_BND).to(query_RPD.dtype)
        image_RND = of_regions(image_BND)
        logits_RPK = torch.cat([query_RPD @ keys.transpose(1, 2) for keys in (prompt_RPD, image_RND)], dim=-1)
        # The same for all keys, so the softmax does not see it; but no parameter should be without a gradient.
        logits_RPK = self.scale * (upcast(logits_RPK) + bias_RP1)
        weights_RPK = logits_RPK.softmax(-1).to(query_RPD.dtype)
        weights_RPP, weights_RPN = weights_RPK.tensor_split([prompts_RPD.shape[1]], dim=-1)
        attended_RPD = self.v_proj(weights_RPP @ prompt_RPD + weights_RPN @ image_RND)
        prompts_RPD = self._feed_forward(prompts_RPD + self.out_proj(attended_RPD))
        if not with_image:
            return prompts_RPD, None

        query_BND, key_BND, value_BND = self.q_proj(image_BND), self.k_proj(image_BND), self.v_proj(image_BND)
        logits_BNN = upcast(self.scale * query_BND @ key_BND.transpose(1, 2))
        attended_BND = logits_BNN.softmax(-1).to(value_BND.dtype) @ value_BND
        key_RPD, bias_RP1 = self.q_proj(self.k_proj(prompt_RPD), dual=True)
        logits_RNP = self.scale * (upcast(key_RPD @ image_RND.transpose(1, 2)) + bias_RP1).transpose(1, 2)
        # The joint softmax over [prompts, image] is one over P + 1 items: the prompts, and the image as a whole.
        joint_RNQ = torch.cat([logits_RNP, of_regions(logits_BNN.logsumexp(-1, keepdim=True))], dim=-1)
        weights_RNQ = joint_RNQ.softmax(-1).to(value_BND.dtype)
        # Weights sum to 1, so the projection of a mixture is the mixture of projections: one per image, not per prompt.
        mixed_RND = weights_RNQ[..., :-1] @ self.out_proj(self.v_proj(prompt_RPD))
        mixed_RND = torch.addcmul(mixed_RND, weights_RNQ[..., -1:], of_regions(self.out_proj(attended_BND)))
        return prompts_RPD, self._feed_forward(of_regions(tokens_BND) + mixed_RND)


class BoxInput(nn.Module):
    """Two-layer GELU MLP over both corners' encodings at once, (R, 2, D) -> one prompt token (R, 1, D)."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(2 * width, width), nn.Linear(width, width)

    def forward(self, corners_R2D: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(corners_R2D.flatten(1))))[:, None]


class Prompter(nn.Module):
    """Box or text prompt -> region feature in the joint space.

    boxes, texts: which prompts it will be given; the other kind's parameters are left out
    """

    def __init__(self, config: RegionConfig, boxes: bool = True, texts: bool = True):
        super().__init__()
        width, joint = config.vision_config.hidden_size, config.projection_dim
        self.config = config
        joint_box = config.box_token == "joint"
        corner_types = boxes and config.box_corner_embedding and not joint_box
        self.corner_embedding = nn.Parameter(torch.zeros(2, width)) if corner_types else None
        self.box_input = BoxInput(width) if boxes and joint_box else None
        self.text_input = nn.Linear(joint, width) if texts else None
        self.layer = PromptLayer(config)
        self.layer_norm = nn.LayerNorm(width, eps=config.vision_config.layer_norm_eps)
        self.projection = nn.Linear(width, joint, bias=False)

    def forward(
        self,
        tokens_BND: Tensor,
        image_index_R: Tensor,
        boxes_R4: Tensor | None = None,
        text_feat_RE: Tensor | None = None,
    ) -> Tensor:
        """Image tokens (B, N, D), and boxes or text features of R prompts, each of image `image_index_R` -> features (R, E).

        boxes_R4: xyxy in [0, 1] of the square input; text_feat_RE: projected, unnormalised; features are unnormalised too
        """
        # In here, since ZeRO-3 holds a module's own parameters for the time of its forward and backward pass alone.
        prompts_RPD = self.text_prompts(text_feat_RE) if boxes_R4 is None else self.box_prompts(boxes_R4)
        return self.read(prompts_RPD, tokens_BND, image_index_R)

    def read(self, prompts_RPD: Tensor, tokens_BND: Tensor, image_index_R: Tensor) -> Tensor:
        """Prompt tokens (R, P, D) over the image tokens (B, N, D) of image `image_index_R` -> features (R, E), unnormalised."""
        if self.config.prompter_tokens == "patches":
            tokens_BND = tokens_BND[:, self.config.num_class_tokens :]
        readout_mean = self.config.prompter_readout == "mean"
        prompts_RPD, image_RND = self.layer(prompts_RPD, tokens_BND, image_index_R, with_image=readout_mean)
        pooled = (prompts_RPD, image_RND) if readout_mean else (prompts_RPD,)
        summed_RD = sum(upcast(self.layer_norm(tokens).sum(dim=1)) for tokens in pooled)
        return self.projection((summed_RD / sum(tokens.shape[1] for tokens in pooled)).to(prompts_RPD.dtype))

    def box_prompts(self, boxes_R4: Tensor) -> Tensor:
        """Boxes (R, 4), xyxy in [0, 1] of the square input -> prompt tokens (R, 2, D): top-left, bottom-right.

        With `box_token="joint"` they are (R, 1, D).
        """
        config = self.config
        width = self.projection.in_features
        corners = sinusoids(boxes_R4.reshape(-1, 2, 2), width, config.box_min_frequency, config.box_max_frequency)
        corners = corners.to(self.projection.weight.dtype)
        if self.box_input is not None:
            return self.box_input(corners)
        return corners if self.corner_embedding is None else corners + self.corner_embedding

    def text_prompts(self, text_feat_RE: Tensor) -> Tensor:
        """Projected text features (R, E), unnormalised -> prompt tokens (R, 1, D)."""
        if self.config.normalize_text_prompt:
            text_feat_RE = nn.functional.normalize(text_feat_RE, dim=-1)
        return self.text_input(text_feat_RE)[:, None]


class BoxHead(nn.Module):
    """Two-layer GELU MLP, (R, E) text-prompted features -> (R, 4) xyxy in [0, 1] of the square input, linear output."""

    def __init__(self, config: RegionConfig):
        super().__init__()
        hidden = config.box_head_width or config.vision_config.hidden_size
        self.fc1 = nn.Linear(config.projection_dim, hidden)
        self.fc2 = nn.Linear(hidden, 4)

    def forward(self, grounded_RE: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(grounded_RE)))
