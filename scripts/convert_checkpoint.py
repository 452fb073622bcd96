"""Turns an encoder folder into another kind: stock CLIP, stock CLIP vision tower, or the start of a CLOC.

    python scripts/convert_checkpoint.py --to clip   CLOC_DIR OUT     # a transformers CLIPModel folder
    python scripts/convert_checkpoint.py --to vision CLOC_DIR OUT     # a CLIPVisionModel folder, for LLaVA, vLLM, ...
    python scripts/convert_checkpoint.py --to cloc   CLIP_DIR OUT     # the CLIP's towers and a fresh Prompter, to be trained

Exports keep the precision and every bit of the parameters; a new CLOC is float32.
"""

import argparse
from pathlib import Path

import torch
import transformers

from encoder.config import READOUTS
from encoder.errors import DataError, run_main
from encoder.pretrained import (
    export_clip,
    export_vision,
    folder_kind,
    from_clip,
    load_encoder,
    load_processor,
    load_vision_tower,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", required=True, choices=["clip", "vision", "cloc"], help="what OUT shall hold")
    parser.add_argument("--readout", choices=READOUTS, default=READOUTS[0], help="of the new Prompter, with --to cloc")
    parser.add_argument("--seed", type=int, default=0, help="of the new Prompter's initialisation, with --to cloc")
    parser.add_argument("source", metavar="IN", help="folder of a CLOC, CLIP or CLIP vision model")
    parser.add_argument("output", metavar="OUT", help="folder to write; it must not exist yet, or be empty")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    source, output = Path(arguments.source), Path(arguments.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"{output} exists and is not an empty folder; choose another output")
    kind, processor = folder_kind(source), load_processor(source)
    if arguments.to == "cloc":
        torch.manual_seed(arguments.seed)
        from_clip(source, prompter_readout=arguments.readout).save_pretrained(output)
        processor.save_pretrained(output)
    elif arguments.to == "clip":
        export_clip(load_encoder(source, "auto"), output, processor)
    else:
        load = load_vision_tower if kind == "clip_vision_model" else load_encoder
        export_vision(load(source, "auto"), output, processor)
    print(f"done: {output} holds a {arguments.to} folder made from the {kind} folder {source}")


if __name__ == "__main__":
    run_main(main)
