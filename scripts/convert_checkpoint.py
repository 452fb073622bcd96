"""Turns a folder into another kind: an encoder into stock CLIP, its vision tower or a CLOC, an MLLM into LLaVA's layout.

    python scripts/convert_checkpoint.py --to clip   CLOC_DIR OUT     # a transformers CLIPModel (or SiglipModel) folder
    python scripts/convert_checkpoint.py --to vision CLOC_DIR OUT     # a CLIPVisionModel folder, for LLaVA, vLLM, ...
    python scripts/convert_checkpoint.py --to cloc   CLIP     OUT     # the CLIP's towers and a fresh Prompter, to be trained
    python scripts/convert_checkpoint.py --to cloc   CLIP     OUT --image-size 448                   # at another resolution
    python scripts/convert_checkpoint.py --to cloc   CLIP.pt  OUT --open-clip-config ViT-B-16.json --tokenizer DIR
    python scripts/convert_checkpoint.py --to llava           MLLM  OUT                 # as the llava repository's code loads it
    python scripts/convert_checkpoint.py --to llava_projector MLLM  OUT                 # its mm_projector.bin and config.json
    python scripts/convert_checkpoint.py --to llava_lora      ADAPTER OUT               # its LoRA folder, beside the base
    python scripts/convert_checkpoint.py --to mllm            LLAVA OUT --tower CLIP    # a released LLaVA-1.5, back again
    python scripts/convert_checkpoint.py --to mllm            LORA  OUT --tower CLIP --llm VICUNA      # or a projector alone
    python scripts/convert_checkpoint.py --to mllm            STOCK OUT                 # of transformers' own llava or llava_next
    python scripts/convert_checkpoint.py --to mllm            ADAPTER OUT               # LoRA added to the weights it learned on
    python scripts/convert_checkpoint.py --to llm             LLM.gguf OUT              # the folder for --llm (needs `gguf`)

Exports keep the precision and every bit of the parameters; a new CLOC is float32.
"""

import argparse
import importlib.util
from pathlib import Path

import torch
import transformers

from encoder.config import READOUTS, RegionConfig
from encoder.errors import DataError, run_main
from encoder.export import export_clip, export_vision
from encoder.from_clip import from_clip
from encoder.pretrained import TOWERS, folder_kind, load_encoder, load_processor, load_vision_tower
from mllm.adapter_folder import merge_adapter
from mllm.checkpoint import save_mllm
from mllm.convert import read_llava, read_stock, write_llava
from mllm.opening import is_stock, local_folder
from mllm.settings import SETTINGS_FILE

ENCODERS, MLLMS = ("clip", "vision", "cloc"), ("llava", "llava_projector", "llava_lora", "mllm")
# Which --to reads a flag.
READ_BY = {
    **dict.fromkeys(("readout", "seed", "image_size", "open_clip_config", "quick_gelu"), ("cloc",)),
    "tokenizer": ENCODERS,
    "tower": MLLMS,
    **dict.fromkeys(("llm", "template"), ("mllm",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", required=True, choices=[*ENCODERS, *MLLMS, "llm"], help="what OUT shall hold")
    readout = RegionConfig.prompter_readout
    parser.add_argument("--readout", choices=READOUTS, help=f"of the new Prompter, with --to cloc; default {readout}")
    parser.add_argument("--seed", type=int, help="of the new Prompter's initialisation, with --to cloc; default 0")
    parser.add_argument("--image-size", type=int, help="side of the new input in pixels, with --to cloc; default the CLIP's")
    parser.add_argument("--tokenizer", help="folder of the tokenizer, for a CLIP without one (VeCap-DFN: T5's)")
    parser.add_argument("--open-clip-config", help="JSON of the model, for open_clip weights without open_clip_config.json")
    parser.add_argument(
        "--quick-gelu", choices=["true", "false"], help="activation of open_clip weights, where their JSON does not say it"
    )
    parser.add_argument("--tower", help="folder of the vision tower, with --to mllm; what config.json names it, with --to llava")
    parser.add_argument("--llm", help="folder of the language model, with --to mllm of a projector or LoRA")
    parser.add_argument("--template", help="chat template of the LLaVA, with --to mllm; default vicuna_v1")
    parser.add_argument("source", metavar="IN", help="folder of an encoder or its tower, open_clip weights; of an MLLM, a LLaVA")
    parser.add_argument("output", metavar="OUT", help="folder to write; it must not exist yet, or be empty")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    source, output = Path(arguments.source), Path(arguments.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"{output} exists and is not an empty folder; choose another output")
    if arguments.to in MLLMS:
        source = local_folder(source)
    adapter = (source / SETTINGS_FILE).is_file() and arguments.to == "mllm"
    check_flags(arguments, adapter)
    if arguments.to in MLLMS:
        kind = "adapter" if adapter else "llava" if arguments.to == "mllm" else "mllm"
        (merge_lora if adapter else convert_mllm)(arguments, source, output)
    elif arguments.to == "llm":
        kind = "GGUF"
        convert_gguf(source, output)
    else:
        kind = folder_kind(source)
        convert_encoder(arguments, kind, source, output)
    print(f"done: {output} holds a {arguments.to} folder made from the {kind} folder {source}")


def check_flags(arguments: argparse.Namespace, adapter: bool) -> None:
    """Refuses a flag that nothing would read; an adapter folder says everything itself."""
    for name, kinds in READ_BY.items():
        if getattr(arguments, name) is not None and (adapter or arguments.to not in kinds):
            flag = "--" + name.replace("_", "-")
            if adapter:
                raise DataError(f"{flag} is given, but an adapter folder says that itself; leave it out")
            raise DataError(
                f"{flag} is given, but --to {arguments.to} does not read it, --to {' or '.join(kinds)} does; leave it out"
            )


def convert_encoder(arguments: argparse.Namespace, kind: str, source: Path, output: Path) -> None:
    if arguments.to == "cloc":
        torch.manual_seed(arguments.seed or 0)
        model = from_clip(
            source,
            image_size=arguments.image_size,
            open_clip_config=arguments.open_clip_config,
            quick_gelu={"true": True, "false": False, None: None}[arguments.quick_gelu],
            prompter_readout=arguments.readout or RegionConfig.prompter_readout,
        )
        processor = load_processor(source, arguments.tokenizer, arguments.image_size, arguments.open_clip_config)
        model.save_pretrained(output)
        processor.save_pretrained(output)
    elif arguments.to == "clip":
        export_clip(load_encoder(source, "auto"), output, load_processor(source, arguments.tokenizer))
    else:
        load = load_vision_tower if kind in TOWERS else load_encoder
        export_vision(load(source, "auto"), output, load_processor(source, arguments.tokenizer))


def convert_mllm(arguments: argparse.Namespace, source: Path, output: Path) -> None:
    if arguments.to != "mllm":
        kind = {"llava": "whole", "llava_projector": "projector", "llava_lora": "lora"}[arguments.to]
        write_llava(source, output, arguments.tower, kind)
        return
    if is_stock(source):
        if arguments.tower or arguments.llm:
            raise DataError(f"{source} is a stock LLaVA, with its tower and language model in it; leave --tower and --llm out")
        mllm = read_stock(source, arguments.template)
    else:
        mllm = read_llava(source, arguments.tower, arguments.llm, arguments.template or "vicuna_v1")
    dtype = getattr(torch, mllm.settings.dtype)
    save_mllm(output, mllm.model, mllm.tokenizer, mllm.settings, dtype, None, mllm.sentencepiece_model)


def merge_lora(arguments: argparse.Namespace, source: Path, output: Path) -> None:
    model, tokenizer, settings = merge_adapter(source)
    proto = source / "tokenizer.model"
    dtype = getattr(torch, settings.dtype)
    save_mllm(output, model, tokenizer, settings, dtype, None, proto.read_bytes() if proto.is_file() else None)


def convert_gguf(source: Path, output: Path) -> None:
    """A language model in a GGUF file -> the folder of a causal language model, bfloat16."""
    if not source.is_file() or importlib.util.find_spec("gguf") is None:
        raise DataError(f"--to llm takes a GGUF file and needs the package gguf: {source} is no file, or pip install gguf")
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16).save_pretrained(output)
    transformers.AutoTokenizer.from_pretrained(**where).save_pretrained(output)


if __name__ == "__main__":
    run_main(main)
