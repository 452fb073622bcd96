"""`ClocConfig`: a CLIP configuration plus the Prompter's, and the presets of arXiv 2410.02746 (Table A) and smaller ones.

Every point that the paper leaves open is a field here or in `encoder.losses.LossConfig`; the default is our reading of it.
"""

from dataclasses import dataclass

from transformers import CLIPConfig, SiglipConfig

from encoder.errors import DataError

READOUTS = ("mean", "prompt")
# Settings of parts that a model without a Prompter does not have, and the values that leave them alone. The rest of the
# Prompter's fields are a preset's to set, or serve the position table too.
PROMPTER_ONLY = {"box_token": "corners", "normalize_text_prompt": False, "box_head_width": None}


@dataclass(kw_only=True)
class RegionConfig:
    """What CLOC adds to a tower's configuration: the Prompter's fields, the same for every kind of tower.

    region_encoder: how a box becomes a feature, by the `prompter`, or by `roi_align`: the mean of bilinear samples of the
        tower's patch tokens inside the box, then a projection (the paper's ablation). The latter has no Prompter and no
        BoxHead: it takes no text prompt, gives no box, and is trained without the grounding loss
    prompter_readout: what becomes the region feature: the mean of the `prompt` tokens after the layer, or the `mean` of all
        tokens (the paper's "global average pooler", for which one layer has to write the box into every patch)
    prompter_tokens: which image tokens the Prompter sees, `all` (CLS and patches) or `patches`
    prompter_shared: one Prompter for box and text prompts, or a second one for texts; of no meaning to `roi_align`
    prompter_mlp_ratio: hidden width of the Prompter layer's MLP, as a multiple of the tower's width
    prompter_layer_norm: whether the tower's final LayerNorm is applied to the tokens before the Prompter
    box_token: `corners`, one prompt token per corner (the paper's), or `joint`, one token: an MLP over both corners
    box_corner_embedding: learned embedding per corner type (top-left, bottom-right) added to the sinusoids of `corners`,
        as in SAM
    box_min_frequency, box_max_frequency: cycles over the image's side of the slowest and fastest sinusoid of a corner
    normalize_text_prompt: whether the text feature is L2-normalised before it becomes a prompt
    region_temperature: `shared` with the image-text loss, or the region-text loss's `own`, learned from the same start
    box_head_width: hidden width of the BoxHead; None takes the tower's width
    geometry: how an image becomes the square input, `pad` (the paper's) or `squash`
    """

    region_encoder: str = "prompter"
    prompter_readout: str = "prompt"
    prompter_tokens: str = "all"
    prompter_shared: bool = False
    prompter_mlp_ratio: float = 4.0
    prompter_layer_norm: bool = True
    box_token: str = "corners"
    box_corner_embedding: bool = True
    box_min_frequency: float = 0.5
    box_max_frequency: float = 32.0
    normalize_text_prompt: bool = False
    region_temperature: str = "shared"
    box_head_width: int | None = None
    geometry: str = "pad"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self._check_choices(
            region_encoder=("prompter", "roi_align"),
            prompter_readout=READOUTS,
            prompter_tokens=("all", "patches"),
            box_token=("corners", "joint"),
            region_temperature=("shared", "own"),
            geometry=("pad", "squash"),
        )
        width = self.vision_config.hidden_size
        if width % 4:
            raise self._error(f"vision_config.hidden_size is {width}; box corners need a multiple of 4")
        if not 0 < self.box_min_frequency < self.box_max_frequency:
            raise self._error(
                f"box_min_frequency {self.box_min_frequency} must lie between 0 and box_max_frequency {self.box_max_frequency}"
            )
        if round(self.prompter_mlp_ratio * width) < 1:
            raise self._error(f"prompter_mlp_ratio is {self.prompter_mlp_ratio}; the MLP needs at least one hidden unit")
        if self.box_head_width is not None and self.box_head_width < 1:
            raise self._error(f"box_head_width is {self.box_head_width}; give at least 1, or none for the tower's width")
        unused = [key for key, value in PROMPTER_ONLY.items() if getattr(self, key) != value]
        if self.region_encoder == "roi_align" and unused:
            raise self._error(
                f"{unused[0]} is {getattr(self, unused[0])!r} with region_encoder 'roi_align', which has no Prompter; leave it "
                f"at {PROMPTER_ONLY[unused[0]]!r}"
            )

    def _check_choices(self, **allowed: tuple[str, ...]) -> None:
        for key, values in allowed.items():
            if getattr(self, key) not in values:
                raise self._error(f"{key} is '{getattr(self, key)}'; choose one of {', '.join(values)}")

    def _error(self, sentence: str) -> DataError:
        return DataError(f"{type(self).__name__}.{sentence}")


class ClocConfig(RegionConfig, CLIPConfig):
    """Configuration of `ClocModel`: `RegionConfig`'s fields and

    text_config, vision_config, projection_dim, logit_scale_init_value: as in `transformers.CLIPConfig`
    position_init: how a tower trained from scratch starts its position table: `normal` (CLIP's), or `sincos`, the same
        sinusoids that encode the corners of a box (a starting point: the table is learned either way)
    logit_bias_init_value: start of the two learned biases that the sigmoid loss adds to its logits (SigLIP's is -10); None
        for a model without them
    """

    model_type = "cloc"
    num_class_tokens = 1  # image tokens that are no patch

    position_init: str = "normal"
    logit_bias_init_value: float | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self._check_choices(position_init=("normal", "sincos"))


class ClocSiglipConfig(RegionConfig, SiglipConfig):
    """Configuration of `ClocSiglipModel`: `RegionConfig`'s fields and

    text_config, vision_config: as in `transformers.SiglipConfig`
    """

    model_type = "cloc_siglip"
    num_class_tokens = 0

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        vision, joint = self.vision_config, self.projection_dim
        if not vision.vision_use_head:
            raise self._error("vision_config.vision_use_head is False; the image feature comes from SigLIP's pooling head")
        if vision.hidden_size != joint:
            raise self._error(f"text_config.projection_size is {joint}; it must be the vision tower's {vision.hidden_size}")
        if not self.prompter_layer_norm:
            raise self._error("prompter_layer_norm is False; SigLIP's tower ends in its norm, so leave it True")

    @property
    def projection_dim(self) -> int:
        """Width of the joint space, which SigLIP's configuration keeps with the text tower."""
        return self.text_config.projection_size


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
    fields = {"position_init": "sincos", "box_max_frequency": 8.0, **fields}
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
