"""Which MLLM a folder or a name on the model hub is, and how it is asked.

| what there is | how it is opened |
|---|---|
| `grounding.json`: a folder of this package, whole or an adapter | as that file says |
| a stock `llava` or `llava_next` (`llava-hf/llava-1.5-7b-hf`, `llava-hf/llava-v1.6-vicuna-7b-hf`) | as its own files say, below |
| the llava repository's layout (`liuhaotian/llava-v1.5-7b`) | not: the sentence has the command that converts it |
| anything else | not: the sentence says what it is |

**A stock folder** says the layers, the sizes, the tiles and the chat template. Three things it does not say, and LLaVA's training
decides: a picture is padded to a square before it is resized, where the stock processor cuts its middle out; boxes are
[0.12, 0.34, 0.56, 0.78] of that square (`float2`), with tiles too, for LLaVA-NeXT learned LLaVA-1.5's conversations; and a chat
begins with LLaVA's system sentence. A tower without CLIP's cut, such as SigLIP's, is squashed. Nothing is written.
"""

import json
import re
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from encoder.errors import DataError
from encoder.geometry import ANYRES
from encoder.processor import OPENAI_MEAN, OPENAI_STD, SIGLIP_MEAN, SIGLIP_STD
from mllm.conversation import IMAGE
from mllm.image_input import ImageInput
from mllm.llava_layout import LORA_FILE, PROJECTOR_FILE
from mllm.settings import SETTINGS_FILE, MllmSettings
from mllm.templates import TEMPLATES, choose_template, lead_with_space
from mllm.tokenizer import add_image_token

STOCK = ("llava", "llava_next")
TOWER_KINDS = ("clip_vision_model", "siglip_vision_model")
CODEC, FRAME, TEMPLATE = "float2", "pad_first", "vicuna_v1"  # of LLaVA's training
PARTS = (LORA_FILE, PROJECTOR_FILE)
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja"]
CONVERT = "python scripts/convert_checkpoint.py --to mllm"


def local_folder(source: str | Path) -> Path:
    """The folder itself, or that of a name on the model hub, fetched where it is not there yet.

    DataError where there is neither, or the hub cannot be reached.
    """
    folder, name = Path(source), str(source)
    if folder.is_dir() or not HUB_NAME.fullmatch(name) or folder.parent.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # of the network, of the hub, or of the disk
        reason = (str(error).splitlines() or ["no reason given"])[0].rstrip(".")
        raise DataError(
            f"{name} is no folder here, and the model hub did not give it ({type(error).__name__}: {reason[:200]}); "
            "name a folder, or try again with a network"
        ) from error


def read_mllm(folder: str | Path, template: str | None = None) -> tuple[PreTrainedTokenizerBase, MllmSettings]:
    """Tokenizer and settings of an MLLM's folder; weights are not read.

    template: of a stock folder's conversations, in place of what its chat template says
    """
    folder = Path(folder)
    if (folder / SETTINGS_FILE).is_file() or not (folder / "config.json").is_file():
        settings = MllmSettings.read(folder)
        return read_tokenizer_of(folder), settings
    config = read_stock_config(folder)
    tokenizer = read_tokenizer_of(folder)
    add_image_token(tokenizer)
    if tokenizer.convert_tokens_to_ids(IMAGE) != config.image_token_id:
        raise DataError(
            f"{folder}: {IMAGE} is token {tokenizer.convert_tokens_to_ids(IMAGE)} of the tokenizer, config.json says "
            f"{config.image_token_id}; copy the folder's tokenizer files again"
        )
    name = choose_template(tokenizer, template or _template_of(folder, tokenizer, config.text_config.model_type))
    lead_with_space(tokenizer)
    settings = MllmSettings(
        codec=CODEC,
        image=_image_input(folder, config),
        feature_layer=config.vision_feature_layer,
        template=name,
        tower_path=str(folder),
        dtype=str(config.dtype or "float32").removeprefix("torch."),
    )
    return tokenizer, settings


def is_stock(folder: Path) -> bool:
    """Whether a folder is a stock llava or llava_next."""
    path = folder / "config.json"
    if not path.is_file() or (folder / SETTINGS_FILE).is_file():
        return False
    try:
        values = json.loads(path.read_text())
    except ValueError:
        return False
    return values.get("model_type") in STOCK and "mm_vision_tower" not in values


def read_stock_config(folder: Path) -> PreTrainedConfig:
    """config.json of a stock Llava; DataError says what another folder is and what can be done with it."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); copy the folder again") from error
    kind, classes = values.get("model_type"), values.get("architectures") or [""]
    if "mm_vision_tower" in values:
        alone = any((folder / name).is_file() for name in PARTS)  # LoRA or a projector, on a language model that lies elsewhere
        raise DataError(
            f"{folder} is in the llava repository's own layout; make an MLLM folder of it once with "
            f"`{CONVERT} {folder} OUT --tower CLIP{' --llm LLM' * alone}`, where CLIP is the folder of "
            f"{values['mm_vision_tower']}{' and LLM that of its language model' * alone}, and open OUT"
        )
    if kind not in STOCK:
        seen = f"{kind} ({classes[0]})" if classes[0] else f"{kind}"
        raise DataError(f"{folder} holds a {seen}, which is no LLaVA; {_advice(kind, classes[0])}")
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # of the class's own checks
        raise DataError(f"{path} is not of a {kind} ({' '.join(str(error).split())[:200]}); copy the folder again") from error
    if (tower := config.vision_config.model_type) not in TOWER_KINDS:
        raise DataError(f"{path}: the vision tower is a {tower}; a LLaVA on CLIP or SigLIP is needed")
    return config


def _advice(kind: str | None, name: str) -> str:
    if name.endswith("ForCausalLM"):
        return "a language model alone learns to see with scripts/finetune_mllm.py --llm and --tower"
    if str(kind).startswith(("clip", "siglip", "cloc")):
        return "a vision encoder alone is for --encoder of the demo, or --tower of scripts/finetune_mllm.py"
    return "name a folder of scripts/finetune_mllm.py, a stock llava or a llava_next"


def read_tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever a file of any origin raises
        reason = " ".join(str(error).split())
        raise DataError(f"the tokenizer of {folder} cannot be read ({reason[:300]}); copy the folder again") from error


def _image_input(folder: Path, config: PreTrainedConfig) -> ImageInput:
    """How a stock folder's pictures are prepared: its processor's numbers, LLaVA's geometry."""
    saved = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            values = json.loads((folder / name).read_text())
            saved |= values.get("image_processor", values)
    vision = config.vision_config
    mean, std = (OPENAI_MEAN, OPENAI_STD) if vision.model_type == TOWER_KINDS[0] else (SIGLIP_MEAN, SIGLIP_STD)
    numbers = vision.image_size, tuple(saved.get("image_mean", mean)), tuple(saved.get("image_std", std))
    if config.model_type == "llava":
        whole = saved and not saved.get("do_pad") and not saved.get("do_center_crop")
        return ImageInput("squash" if whole else FRAME, *numbers)
    grids = tuple((height // vision.image_size, width // vision.image_size) for height, width in config.image_grid_pinpoints)
    if any(side % vision.image_size for pinpoint in config.image_grid_pinpoints for side in pinpoint):
        raise DataError(
            f"{folder}: image_grid_pinpoints {config.image_grid_pinpoints} are no multiples of the tower's "
            f"{vision.image_size} px; take a checkpoint whose tiles are the tower's squares"
        )
    return ImageInput(ANYRES, *numbers, tile_grids=grids, boxes=FRAME)


def _template_of(folder: Path, tokenizer: PreTrainedTokenizerBase, llm: str) -> str:
    """The name of our template that renders what a stock folder's does, its spaces and its default system turn aside.

    llm: kind of language model, which decides among several
    """
    own, path = tokenizer.chat_template, folder / "chat_template.json"  # where transformers 4 kept a processor's
    if own is None and path.is_file():
        own = json.loads(path.read_text()).get("chat_template")
    if own is None:
        return TEMPLATE
    theirs = _turns(tokenizer, own)
    same = [name for name, template in TEMPLATES.items() if theirs and theirs == _turns(tokenizer, template)]
    if same:
        name = llm if llm in same else same[0]
        return TEMPLATE if name == "simple" else name  # the stock one leaves the system sentence to its user
    raise DataError(
        f"{folder}: the chat template is none that is known here; make an MLLM folder with "
        f"`{CONVERT} {folder} OUT --template NAME`, NAME the nearest of {', '.join(TEMPLATES)}"
    )


def _turns(tokenizer: PreTrainedTokenizerBase, template: str) -> str | None:
    """Two questions and an answer, without spaces and the ends of texts; None where it cannot be rendered."""
    said = {"user": "One and two?", "assistant": "Three, of course."}
    for parts in (True, False):  # as processors take a content, and as tokenizers do
        turns = [
            {"role": role, "content": [{"type": "text", "text": said[role]}] if parts else said[role]}
            for role in ("user", "assistant", "user")
        ]
        try:
            text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError):
            text = ""  # it takes contents in the other form
        if said["user"] in text:
            for mark in (tokenizer.bos_token, tokenizer.eos_token):
                text = text.replace(mark or "\0", "")
            return re.sub(r"\s", "", text)
    return None
