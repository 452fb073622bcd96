"""Checkpoints of the llava repository in and out: whole models, projectors, LoRA (layout: `mllm.llava_layout`).

What is read becomes an MLLM folder like any other; what is written loads in that repository's code. Boxes keep their frame:
both pad a picture to the same square. Of geometry `pad` the padding's colour is this picture's mean here, the data set's there.
"""

import json
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel, PreTrainedModel, PreTrainedTokenizerFast

from encoder.errors import DataError
from encoder.export import export_vision
from encoder.pretrained import check_loaded, load_strict, load_vision_tower
from encoder.processor import ClocProcessor
from mllm import llava_layout as layout
from mllm.adapter_folder import ADAPTER, PEFT_PREFIX
from mllm.checkpoint import load_mllm, without_tied_head
from mllm.config import PROJECTORS
from mllm.image_input import ImageInput
from mllm.model import Mllm, join
from mllm.opening import CODEC, FRAME, local_folder, read_mllm
from mllm.projector import fill_projector
from mllm.settings import MllmSettings
from mllm.templates import choose_template, lead_with_space
from mllm.tokenizer import add_image_token, save_tokenizer

TOWER_FOLDER = "vision_tower"


def read_llava(
    folder: str | Path, tower: str | Path | None = None, llm: str | Path | None = None, template: str = "vicuna_v1"
) -> Mllm:
    """The MLLM of a folder in LLaVA's layout, in its number format.

    tower: folder of the vision tower; None takes config.json's `mm_vision_tower` where that is a folder. Weights of a tower
        that are in the checkpoint itself replace the folder's
    llm: folder of the language model, for a projector alone and for LoRA, which is merged into it
    template: of the conversations it was trained on, see `mllm.templates`
    """
    folder = Path(folder)
    config = layout.read_config(folder)
    tower = _tower_folder(folder, config, tower)
    partial = (folder / layout.LORA_FILE).is_file() or (folder / layout.PROJECTOR_FILE).is_file()
    if partial and llm is None:
        raise DataError(f"{folder} holds a projector or LoRA alone; name the folder of its language model too")
    if not partial and llm is not None:
        raise DataError(f"{folder} is a whole model with a language model of its own; leave the language model's folder out")
    if partial:
        language_model, projector = _adapted(folder, llm), layout.read_projector(folder)
        vision = load_vision_tower(tower, language_model.dtype)
    else:
        language_model, projector, vision = _whole(folder, config, tower)
    words = _tokenizer_folder(folder, llm)
    # A fast tokenizer's own file before sentencepiece's, from which transformers makes a fast one by the rules of Llama's.
    fast = (words / "tokenizer.json").is_file()
    tokenizer = (PreTrainedTokenizerFast if fast else AutoTokenizer).from_pretrained(words)
    add_image_token(tokenizer)
    if len(tokenizer) > language_model.get_input_embeddings().num_embeddings:
        language_model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    model = join(vision, language_model, tokenizer, config["mm_vision_select_layer"], PROJECTORS[config["mm_projector_type"]])
    fill_projector(model, projector, folder)
    name = choose_template(tokenizer, template)
    lead_with_space(tokenizer)
    settings = MllmSettings(
        codec=CODEC,
        image=ImageInput.of_tower(tower, FRAME),
        feature_layer=config["mm_vision_select_layer"],
        template=name,
        tower_path=str(tower),
        dtype=str(language_model.dtype).removeprefix("torch."),
    )
    proto = words / "tokenizer.model"
    return Mllm(model, tokenizer, settings, proto.read_bytes() if proto.is_file() else None)


def read_stock(folder: str | Path, template: str | None = None) -> Mllm:
    """The MLLM of a stock Llava's folder, in its number format; template: as of `load_mllm`."""
    folder = local_folder(folder)
    dtype = getattr(torch, read_mllm(folder, template)[1].dtype)
    proto = folder / "tokenizer.model"
    return Mllm(*load_mllm(folder, dtype, template=template), proto.read_bytes() if proto.is_file() else None)


def _tower_folder(folder: Path, config: dict, given: str | Path | None) -> Path:
    named = Path(config["mm_vision_tower"])
    for path in (given,) if given is not None else (named, folder / named):
        if Path(path).exists():
            return Path(path)
    raise DataError(
        f"the vision tower {given or named} of {folder} is no folder on this machine; name the folder of that CLIP with --tower"
    )


def _tokenizer_folder(folder: Path, llm: str | Path | None) -> Path:
    return folder if llm is None or (folder / "tokenizer_config.json").is_file() else Path(llm)


def _whole(folder: Path, config: dict, tower: Path) -> tuple[PreTrainedModel, dict[str, Tensor], PreTrainedModel]:
    """Language model, projector and vision tower of a whole checkpoint; every parameter is used, and none is missing."""
    parts: dict[str, dict[str, Tensor]] = {"language_model": {}, "multi_modal_projector": {}, "vision_tower": {}}
    for name, value in layout.read_state(folder).items():
        part, _, rest = name.removeprefix("model.").partition(".")
        # The language model's own names: its base model is `model.` in a causal language model, its head is not.
        target, key = (part, rest) if part in parts and part != "language_model" else ("language_model", name)
        parts[target][key.replace("model.language_model.", "model.", 1)] = value
    text = layout.text_config(config)
    dtype = next(iter(parts["language_model"].values())).dtype
    cls = AutoModelForCausalLM._model_mapping[type(text)]
    llm, info = cls.from_pretrained(
        None,
        config=text,
        state_dict=parts["language_model"],
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    check_loaded(info, folder)
    vision = load_vision_tower(tower, dtype)
    if weights := parts["vision_tower"]:
        vision, info = CLIPVisionModel.from_pretrained(
            None,
            config=vision.config,
            state_dict=weights,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        check_loaded(info, folder)
    return llm, layout.two_layers(parts["multi_modal_projector"]), vision.eval()


def _adapted(folder: Path, llm: str | Path) -> PreTrainedModel:
    """The language model's folder with the LoRA of `folder`, if it holds one, merged in."""
    from peft import PeftModel, get_peft_model_state_dict

    if not (Path(llm) / "config.json").is_file():
        raise DataError(f"language model {llm} has no config.json; give the folder of a causal language model")
    model = load_strict(AutoModelForCausalLM, llm, dtype="auto")
    files = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin") if (folder / name).is_file()]
    if not (folder / layout.LORA_FILE).is_file():
        return model
    if not files:
        raise DataError(f"{folder} has {layout.LORA_FILE} but no adapter_model.bin; copy the folder again")
    adapted = PeftModel.from_pretrained(model, folder)
    expected, found = set(get_peft_model_state_dict(adapted)), set(layout.read_tensors(files[0]))
    if wrong := sorted(expected ^ found):
        raise DataError(
            f"{files[0]}: {len(expected - found)} parameters are missing and {len(found - expected)} have no place in the "
            f"language model {llm} ({', '.join(wrong[:3])}); name the one that the LoRA was trained on"
        )
    return adapted.merge_and_unload()


def write_llava(source: str | Path, output: str | Path, tower: str | None = None, kind: str = "whole") -> None:
    """Writes an MLLM folder in LLaVA-1.5's layout, in its number format; the vision tower lies in a folder beside it.

    tower: what config.json names as the tower, which LLaVA's code loads; None names the folder written here, by its path
    kind: `whole`, with LoRA merged; `projector`, `mm_projector.bin` alone; `lora`, of an adapter folder on a language model
    """
    output = Path(output)
    source = local_folder(source)
    model, tokenizer, settings = load_mllm(source, getattr(torch, read_mllm(source)[1].dtype))
    _check_writable(source, model, settings, kind)
    tower_folder, width = output / TOWER_FOLDER, model.config.vision_config.hidden_size
    config = layout.write_config(
        model.config.text_config,
        (next(name for name, act in PROJECTORS.items() if act == model.config.projector_hidden_act), width),
        tower or str(tower_folder.resolve()),
        settings.feature_layer,
        any(part.startswith("tower") for run in settings.trained for part in run),
        settings.dtype,
    )
    output.mkdir(parents=True, exist_ok=True)
    state = layout.to_llava(without_tied_head(model, model.state_dict()), linear=model.config.projector_hidden_act == "linear")
    export_vision(model.model.vision_tower, tower_folder, ClocProcessor(settings.image.processor(), None))
    projector = {name: value.clone() for name, value in state.items() if ".mm_projector." in name}
    if kind == "projector":
        torch.save(projector, output / layout.PROJECTOR_FILE)
    elif kind == "lora":
        config["vocab_size"] = _write_lora(Path(source), output, settings)
        torch.save({PEFT_PREFIX + name: value for name, value in projector.items()}, output / layout.LORA_PROJECTOR_FILE)
    else:
        save_torch_state_dict(state, output)
        proto = Path(source) / "tokenizer.model"
        save_tokenizer(tokenizer, output, proto.read_bytes() if proto.is_file() else None)
        if proto.is_file():
            _name_slow_tokenizer(output / "tokenizer_config.json")
        model.generation_config.save_pretrained(output)
    (output / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _write_lora(source: Path, output: Path, settings: MllmSettings) -> int:
    """LoRA of an adapter folder by the names of the language model alone, as the peft of LLaVA's time reads it.

    Returns the size of that language model's vocabulary.
    """
    llm, inside = settings.base.get("llm"), f"{PEFT_PREFIX}model.language_model."
    own = layout.read_tensors(source / ADAPTER) if (source / ADAPTER).is_file() else {}
    if not own or not llm or not all(name.startswith(inside) for name in own):
        raise DataError(f"{source} holds no LoRA on a language model's folder and on that alone; write it whole, LoRA merged")
    tensors = {f"{PEFT_PREFIX}model.{name.removeprefix(inside)}": value.contiguous() for name, value in own.items()}
    torch.save(tensors, output / "adapter_model.bin")
    ours = json.loads((source / layout.LORA_FILE).read_text())
    targets = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in own})
    kept = {key: ours[key] for key in ("peft_type", "r", "lora_alpha", "lora_dropout", "bias")}
    more = {"target_modules": targets, "base_model_name_or_path": llm, "task_type": "CAUSAL_LM", "inference_mode": True}
    (output / layout.LORA_FILE).write_text(json.dumps({**kept, **more}, indent=2) + "\n")
    return json.loads((Path(llm) / "config.json").read_text())["vocab_size"]


def _name_slow_tokenizer(path: Path) -> None:
    """LLaVA's code takes the slow tokenizer, which reads `tokenizer.model`: its class is named where ours stood."""
    config = json.loads(path.read_text())
    if config["tokenizer_class"] == "PreTrainedTokenizerFast":
        # `legacy` encodes as sentencepiece itself does, with the space before a text that the model was trained with.
        config |= {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "add_eos_token": False}
        path.write_text(json.dumps(config, indent=2) + "\n")


def _check_writable(source: str | Path, model: PreTrainedModel, settings: MllmSettings, kind: str) -> None:
    tower = type(model.config.vision_config).__name__
    problems = {
        f"its regions are '{settings.regions}'": settings.regions != "coords",
        f"its tower is of {tower}, not CLIP's": tower != "CLIPVisionConfig",
        f"its language model is in {settings.llm_bits} bits": settings.llm_bits is not None and kind == "whole",
        f"it projects the layers {settings.feature_layer}": not isinstance(settings.feature_layer, int),
        f"its geometry is {settings.image.mode}, not pad": settings.image.mode not in ("pad", FRAME),
    }
    for problem, found in problems.items():
        if found:
            raise DataError(f"{source} has no form in LLaVA-1.5's layout: {problem}; use the folder as it is in transformers")
