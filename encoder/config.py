"""`ClocConfig`: a CLIP configuration plus the Prompter's, and the presets of arXiv 2410.02746 (Table A) and smaller ones.

Every point that the paper leaves open is a field here or in `encoder.losses.LossConfig`; the default is our reading of it.
"""

from transformers import CLIPConfig

from encoder.errors import DataError

READOUTS = ("mean", "prompt")


class ClocConfig(CLIPConfig):
    """Configuration of `ClocModel`.

    text_config, vision_config, projection_dim, logit_scale_init_value: as in `transformers.CLIPConfig`
    prompter_readout: what becomes the region feature: `mean` of all tokens after the layer (the paper's "global average
        pooler"), or the mean of the `prompt` tokens alone (one layer no longer has to route the box into every patch)
    prompter_tokens: which image tokens the Prompter sees, `all` (CLS and patches) or `patches`
    prompter_shared: one Prompter for box and text prompts, or a second one for texts
    prompter_mlp_ratio: hidden width of the Prompter layer's MLP, as a multiple of the tower's width
    prompter_layer_norm: whether the tower's final LayerNorm is applied to the tokens before the Prompter
    box_corner_embedding: learned embedding per corner type (top-left, bottom-right) added to the sinusoids, as in SAM
    box_min_frequency, box_max_frequency: cycles over the image's side of the slowest and fastest sinusoid of a corner
    normalize_text_prompt: whether the text feature is L2-normalised before it becomes a prompt
    logit_bias_init_value: start of the two learned biases that the sigmoid loss adds to its logits (SigLIP's is -10); None
        for a model without them
    region_temperature: `shared` with the image-text loss, or the region-text loss's `own`, learned from the same start
    box_head_width: hidden width of the BoxHead; None takes the tower's width
    position_init: how a tower trained from scratch starts its position table: `normal` (CLIP's), or `sincos`, the same
        sinusoids that encode the corners of a box (a starting point: the table is learned either way)
    geometry: how an image becomes the square input, `pad` (the paper's) or `squash`
    """

    model_type = "cloc"

    prompter_readout: str = "mean"
    prompter_tokens: str = "all"
    prompter_shared: bool = True
    prompter_mlp_ratio: float = 4.0
    prompter_layer_norm: bool = True
    box_corner_embedding: bool = True
    box_min_frequency: float = 0.5
    box_max_frequency: float = 32.0
    normalize_text_prompt: bool = False
    logit_bias_init_value: float | None = None
    region_temperature: str = "shared"
    box_head_width: int | None = None
    position_init: str = "normal"
    geometry: str = "pad"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for key, allowed in (
            ("prompter_readout", READOUTS),
            ("prompter_tokens", ("all", "patches")),
            ("region_temperature", ("shared", "own")),
            ("position_init", ("normal", "sincos")),
            ("geometry", ("pad", "squash")),
        ):
            if getattr(self, key) not in allowed:
                raise DataError(f"ClocConfig.{key} is '{getattr(self, key)}'; choose one of {', '.join(allowed)}")
        width = self.vision_config.hidden_size
        if width % 4:
            raise DataError(f"ClocConfig.vision_config.hidden_size is {width}; box corners need a multiple of 4")
        if not 0 < self.box_min_frequency < self.box_max_frequency:
            raise DataError(
                f"ClocConfig.box_min_frequency {self.box_min_frequency} must lie between 0 and "
                f"box_max_frequency {self.box_max_frequency}"
            )


def _config(vision: dict, text: dict, projection_dim: int, vocab_size: int = 32100, **fields) -> ClocConfig:
    """Towers in the shape of OpenAI's CLIP with T5's special tokens (pad 0, eos 1), which the paper's text tower uses."""
    text = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1, "vocab_size": vocab_size, **text}
    sizes = {"projection_dim": projection_dim}
    return ClocConfig(vision_config={**vision, **sizes}, text_config={**text, **sizes}, **sizes, **fields)


def _tower(width: int, layers: int, heads: int, mlp_ratio: int = 4) -> dict:
    return {
        "hidden_size": width,
        "intermediate_size": mlp_ratio * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


def nano(vocab_size: int = 512, **fields) -> ClocConfig:
    """The embedded default: 80 px, patch 8 (100 patches), 2 M parameters; trains on two CPU cores within the hour."""
    fields = {"prompter_readout": "prompt", "position_init": "sincos", "box_max_frequency": 8.0, **fields}
    vision = {**_tower(192, 4, 3, mlp_ratio=2), "image_size": 80, "patch_size": 8}
    text = {**_tower(128, 2, 2), "vocab_size": vocab_size}
    return _config(vision, text, 128, **fields)


def tiny(vocab_size: int = 512, **fields) -> ClocConfig:
    """For tests: 32 px, patch 8, two layers of width 32."""
    vision = {**_tower(32, 2, 2), "image_size": 32, "patch_size": 8}
    text = {**_tower(32, 2, 2), "vocab_size": vocab_size, "max_position_embeddings": 32}
    return _config(vision, text, 16, **fields)


def small(**fields) -> ClocConfig:
    """A debugging size on one GPU: 112 px, patch 8, six layers of width 384."""
    return _config({**_tower(384, 6, 6), "image_size": 112, "patch_size": 8}, _tower(256, 4, 4), 256, **fields)


def b16(**fields) -> ClocConfig:
    """ViT-B/16 at 224 px (arXiv 2410.02746, Section 5.1; sizes of OpenAI's CLIP)."""
    return _config({**_tower(768, 12, 12), "image_size": 224, "patch_size": 16}, _tower(512, 12, 8), 512, **fields)


def l14_336(**fields) -> ClocConfig:
    """ViT-L/14 at 336 px."""
    return _config({**_tower(1024, 24, 16), "image_size": 336, "patch_size": 14}, _tower(768, 12, 12), 768, **fields)


def h14_336(**fields) -> ClocConfig:
    """ViT-H/14 at 336 px."""
    return _config({**_tower(1280, 32, 16), "image_size": 336, "patch_size": 14}, _tower(1024, 24, 16), 1024, **fields)


PRESETS = {preset.__name__: preset for preset in (nano, tiny, small, b16, l14_336, h14_336)}
