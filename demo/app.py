"""A chat about one picture, in the browser: ask where a thing is, or mark a place and ask what it is.

    python demo/app.py [--model DIR] [--compare DIR] [--encoder DIR] [--device cuda:0] [--bits 4] [--host 127.0.0.1] [--port 7860]

Every mark has a number and a colour, whether the visitor drew it or the model answered it, and "[1]" in a question means that
mark. docs/demo.md is the guide.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch

from demo.board import POINT_REACH
from demo.models import Models, devices
from encoder.errors import DataError, run_main

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
LOCAL = ("127.0.0.1", "localhost", "::1")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What the page and the terminal have in common."""
    add = parser.add_argument
    add(
        "--model",
        type=Path,
        default=WEIGHTS / "mllm_cloc",
        help="MLLM folder, or a stock LLaVA's: its folder or its name on the model hub (default weights/mllm_cloc)",
    )
    add("--compare", type=Path, help="a second one, which answers the same questions beside it; weights/mllm_clip")
    add("--encoder", type=Path, default=WEIGHTS / "cloc", help="CLOC folder of the encoder alone (default weights/cloc)")
    add("--device", default="cpu", help="cpu (default), cuda:0, mps, or auto for all GPUs")
    add("--bits", type=int, choices=[4, 8], help="language model in 4 or 8 bits")
    add(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="number format of the weights (default bfloat16; on the cpu float32 where that takes at most half of the memory)",
    )
    add(
        "--point-reach",
        type=float,
        default=POINT_REACH,
        help="a point stands for the square that reaches this share of the picture's long side to each of its sides; 0 gives the "
        "model the point's coordinates, for one that was trained on points (default %(default)s)",
    )


def models_of(arguments: argparse.Namespace) -> Models:
    """The models that the arguments name, each loaded or with its error."""
    if arguments.device not in devices():
        raise DataError(f"--device is {arguments.device}; this machine has {', '.join(devices())}")
    if not 0 <= arguments.point_reach < 1:
        raise DataError(f"--point-reach is {arguments.point_reach}; give 0, or a share of the picture's long side below 1")
    folders = [arguments.model, *([arguments.compare] if arguments.compare else [])]
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    return Models(folders, arguments.encoder, arguments.device, arguments.bits, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to serve; 0.0.0.0 opens it to the network")
    parser.add_argument("--port", type=int, default=7860)
    arguments = parser.parse_args()
    if find_spec("gradio") is None:
        raise DataError("gradio is not installed; run `make demo`, or pip install -e '.[demo]'")
    from demo.page import build_page, serve

    models = models_of(arguments)
    for error in [*models.errors, models.encoder_error]:
        if error:
            print(f"warning: {error}", flush=True)
    page = build_page(models, arguments.point_reach, reloads=arguments.host in LOCAL)
    serve(page, arguments.host, arguments.port)
    print(f"the chat is open at http://{arguments.host}:{arguments.port} (Ctrl-C ends it)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    run_main(main)
