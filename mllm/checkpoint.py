"""An MLLM on disk: a stock `llava` or `llava_next` folder, and `grounding.json` beside it with what stock code does not know.

Weights, configuration, tokenizer and image settings load in transformers without this package; with region tokens the folder
is of a class of ours, `llava_regions` or `llava_next_regions`. `grounding.json` says how boxes are written and how a picture
became the model's square, which an evaluation has to repeat exactly.
"""

import json
import shutil
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoTokenizer, LlavaForConditionalGeneration, PreTrainedTokenizerBase

from encoder.errors import DataError
from encoder.geometry import ANYRES
from encoder.pretrained import weights_hash
from mllm.image_input import ImageInput
from mllm.region_tokens import RegionLlavaConfig, RegionLlavaNextConfig
from mllm.regions import COORDS, REGION_TOKENS
from mllm.tokenizer import save_tokenizer

SETTINGS_FILE = "grounding.json"


@dataclass
class MllmSettings:
    """What `grounding.json` holds.

    codec: how boxes are written; image: geometry, size and normalisation; feature_layer: the tower's projected layer(s)
    template: name of the chat template (`own`: the language model's)
    tower_path: the folder the tower came from; tower_hash: sha256 of its weights as saved here
    dtype: number format of the saved weights; trained: parts that learned, run by run; regions: how a region enters, see
        `mllm.region_tokens`
    base: of an adapter folder, the recipe's fields that name what it was trained on; llm_bits: the language model's, there
    versions: of the libraries that wrote it
    """

    codec: str
    image: ImageInput
    feature_layer: int | list[int]
    template: str
    tower_path: str
    tower_hash: str = ""
    dtype: str = "float32"
    trained: list[list[str]] = field(default_factory=list)
    regions: str = COORDS
    base: dict = field(default_factory=dict)
    llm_bits: int | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def model_type(self) -> str:
        """What config.json says of such an MLLM."""
        tiles = self.image.mode == ANYRES
        if self.regions != COORDS:
            return (RegionLlavaNextConfig if tiles else RegionLlavaConfig).model_type
        return "llava_next" if tiles else "llava"

    def write(self, folder: Path) -> None:
        values = {**vars(self), "image": self.image.as_dict()}
        values["versions"] = {name: version(name) for name in ("torch", "transformers", "deepspeed")}
        (folder / SETTINGS_FILE).write_text(json.dumps(values, indent=2) + "\n")

    @classmethod
    def read(cls, folder: str | Path) -> "MllmSettings":
        path = Path(folder) / SETTINGS_FILE
        if not Path(folder).is_dir():
            raise DataError(f"MLLM folder {folder} does not exist; make it with scripts/finetune_mllm.py")
        if not path.is_file():
            raise DataError(f"{path} does not exist, so it is unknown how boxes are written; name a folder of finetune_mllm.py")
        try:
            values = json.loads(path.read_text())
            settings = cls(**{**values, "image": ImageInput.from_dict(values["image"])})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{path} is not the settings of an MLLM ({error}); train the folder again") from error
        if settings.regions not in REGION_TOKENS:
            known = ", ".join(REGION_TOKENS)
            raise DataError(f"{path}: regions is '{settings.regions}', this version reads {known}; use a newer version")
        return settings


def load_mllm(
    folder: str | Path, dtype: torch.dtype = torch.float32, attention: str = "sdpa"
) -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerBase, MllmSettings]:
    """Model in evaluation mode, tokenizer and settings; the tower's weights must be those that were saved.

    An adapter folder gives the model it was trained on with LoRA added to the weights; in low bits LoRA stays beside them.
    """
    settings = MllmSettings.read(folder)
    if settings.base:
        from mllm.adapter_folder import load_adapter  # which loads its base by this function

        return load_adapter(folder, settings, dtype, attention)
    saved_dtype = getattr(torch, settings.dtype)
    # Loaded in the saved format first: the hash is of those bytes.
    arguments = {"dtype": saved_dtype, "attn_implementation": attention, "ignore_mismatched_sizes": True}
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, **arguments)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, SafetensorError) as error:  # no weights, or not whole
        reason = " ".join(str(error).split())
        raise DataError(f"{folder} cannot be read ({reason}); copy or train the folder again") from error
    wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if wrong:
        raise DataError(
            f"{folder}: {len(wrong)} parameters are missing or of another size ({', '.join(wrong[:3])}); "
            "config.json and weights are not of one model, train the folder again"
        )
    if (found := model.config.model_type) != settings.model_type:
        raise DataError(
            f"{folder}: config.json is of a {found}, {SETTINGS_FILE} of a {settings.model_type}; they are not of one model, "
            "train the folder again"
        )
    check_tower(folder, weights_hash(model.model.vision_tower), settings)
    return model.to(dtype).eval(), tokenizer, settings


def check_tower(folder: str | Path, found: str, settings: MllmSettings) -> None:
    """Refuses a tower whose weights are not those that were saved."""
    if found != settings.tower_hash:
        raise DataError(
            f"{folder}: the tower's weights (sha256 {found[:12]}) are not those that {SETTINGS_FILE} names "
            f"({settings.tower_hash[:12]}); the folder was changed after training, train it again"
        )


def save_mllm(
    folder: str | Path,
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    settings: MllmSettings,
    dtype: torch.dtype,
    state: dict[str, Tensor] | None = None,
    sentencepiece_model: bytes | None = None,
) -> None:
    """Writes the folder; `grounding.json` comes last and so marks a complete one.

    state: full weights by the model's own names, where they are not in the model (ZeRO-3); rounded to `dtype`
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS_FILE).unlink(missing_ok=True)
    state = without_tied_head(model, model.state_dict() if state is None else state)
    state = {name: value.detach().to("cpu", dtype).contiguous() for name, value in state.items()}
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    if settings.regions == COORDS:
        save_torch_state_dict({_classic_name(name): value for name, value in state.items()}, folder)
    else:
        save_torch_state_dict(state, folder)
    _write_config(folder, model, dtype)
    save_tokenizer(tokenizer, folder, sentencepiece_model)
    _write_image_settings(folder, model, settings.image)
    settings.tower_hash = tower_hash(state)
    settings.dtype = str(dtype).removeprefix("torch.")
    settings.write(folder)


def without_tied_head(model: LlavaForConditionalGeneration, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state without the output layer where that is the embeddings: there loaders read the embeddings alone."""
    tied = model.config.text_config.tie_word_embeddings
    return {name: value for name, value in state.items() if not (tied and name == "lm_head.weight")}


def _classic_name(name: str) -> str:
    """The name that transformers 4 wrote and both generations read.

    transformers 5 leaves `vision_model.` out of the tower's names, and transformers 4 then draws the tower at random.
    """
    name = name.removeprefix("model.")
    for ours, classic in (("vision_tower.", "vision_tower.vision_model."), ("language_model.", "language_model.model.")):
        if name.startswith(ours):
            return classic + name.removeprefix(ours)
    return f"language_model.{name}" if name.startswith("lm_head.") else name


def _write_config(folder: Path, model: LlavaForConditionalGeneration, dtype: torch.dtype) -> None:
    config = model.config.to_dict()
    config.pop("use_cache", None)  # the Trainer turns it off for itself
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = str(dtype).removeprefix("torch.")
    config["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    model.generation_config.save_pretrained(folder)


def tower_hash(state: dict[str, Tensor]) -> str:
    """sha256 of the tower's weights in a stock Llava's state."""
    prefix, holder = "model.vision_tower.", nn.Module()
    holder.state_dict = lambda: {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return weights_hash(holder)


def _write_image_settings(folder: Path, model: LlavaForConditionalGeneration, image: ImageInput) -> None:
    """Stock processor files, the nearest that transformers has: with `pad` its padding colour is the dataset's mean, not the
    picture's."""
    size = {"height": image.size, "width": image.size}
    tiles = image.mode == ANYRES
    pad = image.mode == "pad" or tiles  # of LlavaNext's processor it is the number of tiles that is padded
    kind = "LlavaNext" if tiles else "Llava" if pad else "CLIP"
    preprocessor = {
        "image_processor_type": f"{kind}ImageProcessor",
        "do_pad": pad,
        "do_resize": True,
        "size": {"shortest_edge": image.size} if pad else size,
        "do_center_crop": pad,
        "crop_size": size,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }
    processor = {
        "processor_class": "LlavaNextProcessor" if tiles else "LlavaProcessor",
        "patch_size": model.config.vision_config.patch_size,
        "vision_feature_select_strategy": model.config.vision_feature_select_strategy,
        "num_additional_image_tokens": int(model.config.vision_feature_select_strategy == "default"),
    }
    if tiles:
        preprocessor["image_grid_pinpoints"] = model.config.image_grid_pinpoints
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def is_complete(checkpoint: Path) -> bool:
    """Whether a Trainer's checkpoint was written to its end: its state is written last."""
    return (checkpoint / "trainer_state.json").is_file()


def last_checkpoint(output: Path) -> Path | None:
    """The latest complete `checkpoint-N` of `output`; an incomplete one, of a run killed while saving, is removed."""
    found = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in reversed(found):
        if is_complete(path):
            return path
        shutil.rmtree(path, ignore_errors=True)
    return None
