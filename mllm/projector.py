"""The projector between tower and language model: read from other folders, started on measured features.

(S sampled image tokens, D the tower's width, H the language model's width.)
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.activations import LinearActivation
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from encoder.errors import DataError
from mllm.config import PROJECTORS
from mllm.llava_layout import is_linear, read_projector
from mllm.region_tokens import RegionLlavaForConditionalGeneration


def make_identity(layer: nn.Linear) -> None:
    """What a linear projector's second layer is."""
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)


def load_projector(model: LlavaForConditionalGeneration, folder: str | Path) -> None:
    """Copies the projector of another MLLM folder, or of LLaVA's `mm_projector.bin` or its folder; `image_newline` too, where
    both have one."""
    theirs, ours = read_projector(folder), _weights_below(folder, "multi_modal_projector.")
    found = theirs | ours
    if not found:
        files = len(list(Path(folder).glob("*.safetensors")))
        raise DataError(f"projector folder {folder} holds no Llava projector in {files} safetensors files; name an MLLM folder")
    sizes = Path(folder) / "config.json"
    if ours and sizes.is_file():
        act = json.loads(sizes.read_text()).get("projector_hidden_act", "gelu")
    else:  # of LLaVA's
        act = "linear" if is_linear(found) else "gelu"
    if act != model.config.projector_hidden_act:
        kind = {act: name for name, act in PROJECTORS.items()}.get(act, act)
        raise DataError(f"the projector in {folder} is of projector_type {kind}; pass that, or leave projector out")
    fill_projector(model, found, folder)
    newline = _weights_below(folder, "image_newline").get("")
    if newline is not None and hasattr(model.model, "image_newline"):
        model.model.image_newline.data.copy_(newline)


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


def load_region_projector(model: RegionLlavaForConditionalGeneration, folder: str | Path) -> bool:
    """Copies the projector of another MLLM folder's region tokens, where it has one of this kind; returns whether it has."""
    found = _weights_below(folder, "region_tokens.projector.")
    projector = model.model.region_tokens.projector
    if {name: value.shape for name, value in found.items()} != {n: v.shape for n, v in projector.state_dict().items()}:
        return False
    projector.load_state_dict({name: value.to(projector.linear_1.weight.dtype) for name, value in found.items()})
    return True


def _weights_below(folder: str | Path, part: str) -> dict[str, Tensor]:
    """The weights in a folder's safetensors whose names hold `part`, by the rest of the name."""
    found: dict[str, Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= {name.split(part)[1]: tensors.get_tensor(name) for name in tensors.keys() if part in name}
    return found


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
    if isinstance(projector.act, LinearActivation):  # a linear projector: its first layer alone
        second, shift = projector.linear_2.weight, projector.linear_2.bias
        projector.linear_1.bias.copy_(second @ projector.linear_1.bias + shift)
        projector.linear_1.weight.copy_(second @ projector.linear_1.weight)
        make_identity(projector.linear_2)
