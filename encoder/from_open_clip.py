"""An `open_clip` checkpoint as a stock `CLIPModel`: the names, layouts and configuration of one, written as the other's.

Supported is the plain CLIP ViT: `visual.*` with a CLS token and `ln_pre`, a causal text tower that pools at the highest
id, GELU or QuickGELU. Any other member of that family (ResNet and timm towers, Hugging Face text towers, attentional
pooling, CoCa, `open_clip`'s SigLIP) is refused by the field of its configuration that says so.
"""

import json
import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from encoder.errors import DataError

CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

# Fields of a model configuration that are read, and those that change nothing at the value given; others must be unset.
MODEL_FIELDS = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale"}
VISION_FIELDS = {"image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio", "patch_dropout"}
TEXT_FIELDS = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "hf_tokenizer_name", "tokenizer_kwargs"}
NEUTRAL = {("vision_cfg", "pool_type"): "tok", ("text_cfg", "pool_type"): "argmax"}

# Scalars that OpenAI's state dicts carry beside the parameters.
NOT_WEIGHTS = {"input_resolution", "context_length", "vocab_size"}
PLAIN_NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "logit_scale": "logit_scale",
}
NORMS = {
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
}
PLAIN_NAMES |= {f"{a}.{kind}": f"{b}.{kind}" for a, b in NORMS.items() for kind in ("weight", "bias")}
# Matrices that act from the right there (x @ W) and from the left here.
TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
IN_LAYER = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
LAYER = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")


def read_open_clip_config(source: str | Path, given: str | Path | dict | None = None) -> tuple[dict, dict]:
    """(model configuration, preprocessing) of an `open_clip` folder or weights file; `given` as in `from_clip`."""
    if not isinstance(given, dict):
        source = Path(source)
        path = Path(given) if given is not None else (source.parent if source.is_file() else source) / CONFIG_FILE
        if not path.is_file():
            raise DataError(
                f"{path} does not exist, and weights of open_clip alone do not say heads and activation; give the model's JSON "
                "of open_clip's model_configs (scripts/convert_checkpoint.py --open-clip-config, from_clip(open_clip_config=...))"
            )
        try:
            given = json.loads(path.read_text())
        except ValueError as error:
            raise DataError(f"{path} is not valid JSON ({error}); copy it again") from error
    model = given.get("model_cfg", given)
    for key in ("embed_dim", "vision_cfg", "text_cfg"):
        if key not in model:
            raise DataError(f"the open_clip configuration of {source} has no '{key}'; give a model's JSON of its model_configs")
    return model, given.get("preprocess_cfg", {})


def _refuse_other_architectures(model: dict, source: str | Path) -> None:
    parts = {"": (model, MODEL_FIELDS), "vision_cfg": (model["vision_cfg"], VISION_FIELDS)}
    parts["text_cfg"] = (model["text_cfg"], TEXT_FIELDS)
    for part, (values, known) in parts.items():
        for key, value in values.items():
            if key not in known and value and value != NEUTRAL.get((part, key)):
                raise DataError(
                    f"{source}: {part + '.' if part else ''}{key} is {json.dumps(value)} in the open_clip configuration; only "
                    "plain CLIP ViTs are converted, so take the model's Hugging Face folder (SigLIP: google/siglip-*)"
                )
    layers = model["vision_cfg"].get("layers", 12)
    if not isinstance(layers, int):
        raise DataError(f"{source}: vision_cfg.layers is {layers}, a ResNet; CLOC needs the image tokens of a ViT")


def _clip_config(model: dict, quick_gelu: bool) -> CLIPConfig:
    """The configuration in `transformers`' words; defaults are `open_clip`'s."""
    vision, text = model["vision_cfg"], model["text_cfg"]
    common = {"projection_dim": model["embed_dim"], "hidden_act": "quick_gelu" if quick_gelu else "gelu"}
    width, text_width = vision.get("width", 768), text.get("width", 512)
    return CLIPConfig(
        vision_config={
            **common,
            "hidden_size": width,
            "intermediate_size": int(width * vision.get("mlp_ratio", 4.0)),
            "num_hidden_layers": vision.get("layers", 12),
            "num_attention_heads": width // vision.get("head_width", 64),
            "image_size": vision.get("image_size", 224),
            "patch_size": vision.get("patch_size", 16),
        },
        text_config={
            **common,
            "hidden_size": text_width,
            "intermediate_size": int(text_width * text.get("mlp_ratio", 4.0)),
            "num_hidden_layers": text.get("layers", 12),
            "num_attention_heads": text.get("heads", 8),
            "vocab_size": text.get("vocab_size", 49408),
            "max_position_embeddings": text.get("context_length", 77),
            # Makes transformers pool at the highest id of a text, which is open_clip's rule for any tokenizer.
            "eos_token_id": 2,
        },
        projection_dim=model["embed_dim"],
    )


def _read_weights(source: str | Path) -> dict[str, Tensor]:
    """The state dict of a weights file, or of a folder's, under the names of a bare `open_clip.CLIP`."""
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
        if not found:
            raise DataError(f"{path} has neither of {', '.join(WEIGHT_FILES)}; give the weights file itself")
        path = found[0]
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(
            f"{path}: no plain state dict can be read from it ({reason}); OpenAI's TorchScript files and pickled objects are "
            "refused, so save the model's state_dict() or take its Hugging Face folder"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}  # a training checkpoint of open_clip has more
    named = {}
    for name, tensor in state.items():
        name = re.sub(r"^(module\.)?(text\.)?", "", name)  # of DistributedDataParallel; of open_clip's CustomTextCLIP
        if name not in NOT_WEIGHTS:
            named[name] = tensor
    return named


def convert_names(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """(parameters under `CLIPModel`'s names and layout, names that are none of a plain CLIP ViT's)."""
    converted, unused = {}, []
    for name, tensor in state.items():
        layer = LAYER.fullmatch(name)
        if name in PLAIN_NAMES:
            converted[PLAIN_NAMES[name]] = tensor
        elif name in TRANSPOSED:
            converted[TRANSPOSED[name]] = tensor.T.contiguous()
        elif layer and (layer[3] in IN_LAYER or layer[3] == "attn.in_proj"):
            prefix = f"{'vision_model' if layer[1] else 'text_model'}.encoder.layers.{layer[2]}"
            if layer[3] in IN_LAYER:
                converted[f"{prefix}.{IN_LAYER[layer[3]]}.{layer[4]}"] = tensor
            else:  # queries, keys and values in one
                for part, third in zip("qkv", tensor.chunk(3), strict=True):
                    converted[f"{prefix}.self_attn.{part}_proj.{layer[4]}"] = third.contiguous()
        else:
            unused.append(name)
    return converted, unused


def open_clip_as_stock(
    source: str | Path, open_clip_config: str | Path | dict | None = None, quick_gelu: bool | None = None
) -> CLIPConfig:
    """The stock configuration of an `open_clip` folder or weights file, without its weights; see `from_clip`."""
    model, _ = read_open_clip_config(source, open_clip_config)
    _refuse_other_architectures(model, source)
    return _clip_config(model, model.get("quick_gelu", False) if quick_gelu is None else quick_gelu)


def load_open_clip(
    source: str | Path, open_clip_config: str | Path | dict | None = None, quick_gelu: bool | None = None
) -> CLIPModel:
    """A stock `CLIPModel` in float32, evaluation mode, from an `open_clip` folder or weights file; see `from_clip`."""
    config = open_clip_as_stock(source, open_clip_config, quick_gelu)
    state, unused = convert_names(_read_weights(source))
    clip = CLIPModel(config)
    expected = {name: parameter.shape for name, parameter in clip.state_dict().items()}
    missing = sorted(expected.keys() - state.keys())
    wrong = [name for name, value in state.items() if name in expected and value.shape != expected[name]]
    sizes = [f"{name} {tuple(state[name].shape)} not {tuple(expected[name])}" for name in wrong]
    extra = sorted(unused) + sorted(state.keys() - expected.keys())
    for problem, names in (("unused parameters", extra), ("missing parameters", missing), ("parameters of another size", sizes)):
        if names:
            raise DataError(f"{source}: {len(names)} {problem} ({', '.join(names[:5])}); is it the right configuration?")
    clip.load_state_dict(state)
    return clip.eval()
