"""`ClocSiglipModel`: CLOC on SigLIP's towers, with SigLIP's parameter names.

What differs from CLIP: no CLS token, so the Prompter's image tokens are the patches; the image feature comes from an
attention-pooling head; the text tower reads padding too and takes its feature at the last position, so that texts must be
padded to its full length (`ClocProcessor.text_padding`). Neither loss is built in: its `logit_bias` serves the sigmoid one.

B images, N image tokens (patches), T texts, L text tokens, S side of the input, E joint space.
"""

from torch import Tensor
from transformers import AutoConfig, AutoModel, SiglipModel

from encoder.config import ClocSiglipConfig
from encoder.model import ImageEncoding, RegionEncoder


class ClocSiglipModel(RegionEncoder, SiglipModel):
    """SigLIP with promptable embeddings."""

    config_class = ClocSiglipConfig
    base_model_prefix = "cloc_siglip"
    scalar_shape = (1,)  # of logit_scale and logit_bias in a saved SigLIP

    def encode_image(self, pixel_values: Tensor) -> ImageEncoding:
        """Pixels (B, 3, S, S), normalised -> the tokens and feature of each image; the one pass that all prompts share."""
        output = self.vision_model(pixel_values=pixel_values)
        return ImageEncoding(output.last_hidden_state, output.pooler_output)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Token ids (T, L), padded to the tower's full length -> text features (T, E); T may be 0.

        attention_mask: not read, since padding is read like any token.
        """
        if not len(input_ids):
            # One placeholder row, dropped, keeps a rank without regions in the same parameter gathers as the others.
            return self.encode_text(input_ids.new_zeros(1, 1))[:0]
        return self.text_model(input_ids=input_ids).pooler_output


AutoConfig.register("cloc_siglip", ClocSiglipConfig)
AutoModel.register(ClocSiglipConfig, ClocSiglipModel)
