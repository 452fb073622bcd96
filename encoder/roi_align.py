"""RoIAlign: a region feature read off the tower's patches, without a prompt. The paper's ablation, and the CLIP baseline.

B images, N image tokens, R regions, C channels, D tower width, E joint space, G patches per side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder.config import RegionConfig
from encoder.errors import DataError


def roi_align(maps_BCGG: Tensor, boxes_R4: Tensor, image_index_R: Tensor, num_samples: int) -> Tensor:
    """Mean of bilinear samples on a regular grid inside each box: RoIAlign with a 1x1 output, `aligned`.

    maps_BCGG: (B, C, G, G); boxes_R4: (R, 4) xyxy in [0, 1] of the square input; image_index_R: (R,)
    num_samples: points per side of the grid. Returns (R, C). Source: arXiv 1703.06870, Section 3.
    """
    steps = (torch.arange(num_samples, device=boxes_R4.device, dtype=boxes_R4.dtype) + 0.5) / num_samples
    x = boxes_R4[:, 0:1] + steps * (boxes_R4[:, 2:3] - boxes_R4[:, 0:1])
    y = boxes_R4[:, 1:2] + steps * (boxes_R4[:, 3:4] - boxes_R4[:, 1:2])
    points = torch.stack([x[:, None, :].expand(-1, num_samples, -1), y[:, :, None].expand(-1, -1, num_samples)], dim=-1)
    # Without align_corners, -1 and 1 are the outer edges of the corner patches: exactly 0 and 1 of our frame.
    grid = (2 * points - 1).to(maps_BCGG.dtype)
    samples = F.grid_sample(maps_BCGG[image_index_R], grid, padding_mode="border", align_corners=False)
    return samples.mean(dim=(2, 3))


def points_per_side(grid: int) -> int:
    """Samples per side of a box over `grid` patches: no patch inside a large box is stepped over."""
    return max(4, grid)


class RoiPooler(nn.Module):
    """Region features by RoIAlign of the tower's tokens and a projection of their own: what stands for the Prompter."""

    def __init__(self, config: RegionConfig):
        super().__init__()
        self.num_class_tokens = config.num_class_tokens
        self.grid = config.vision_config.image_size // config.vision_config.patch_size
        self.projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)

    def forward(self, boxes_R4: Tensor, tokens_BND: Tensor, image_index_R: Tensor) -> Tensor:
        """Boxes (R, 4), xyxy in [0, 1], over the tokens (B, N, D) of image `image_index_R` (R,) -> (R, E), unnormalised."""
        patches_BPD = tokens_BND[:, self.num_class_tokens :]
        # Not only a square number of them: a quarter of a grid is one too, of patches from all over the picture.
        if patches_BPD.shape[1] != self.grid**2:
            raise DataError(
                f"region_encoder 'roi_align' was given {patches_BPD.shape[1]} patches of {self.grid**2}; it needs them all, so "
                "train with patch_dropout 0"
            )
        maps_BDGG = patches_BPD.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        # In float32: half precision places the points too coarsely.
        pooled_RD = roi_align(maps_BDGG.float(), boxes_R4.float(), image_index_R, points_per_side(self.grid))
        return self.projection(pooled_RD.to(self.projection.weight.dtype))
