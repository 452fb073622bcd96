"""Many boxes of one image: one pass of the tower and a prompt for each box, against crop-and-encode with the same tower.

    python benchmarks/prompter.py
    python benchmarks/prompter.py --preset small --boxes 20 --rounds 5 --out prompter.json

Crop-and-encode cuts each box out, makes it the tower's square input and runs the tower on batches of crops. Ours is
`RegionPredictor`: `set_image`, then `embed_boxes`, both counted; what the boxes cost once the image is set stands beside it.
Both start from a decoded image and end with embeddings. The weights are random: times do not depend on them.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rounds import Bar, in_turn, report_of, show
from torch.nn.functional import normalize

from encoder.config import PRESETS, READOUTS
from encoder.errors import run_main
from encoder.model import ClocModel
from encoder.predictor import RegionPredictor
from encoder.processor import ClocImageProcessor, ClocProcessor

WIDTH, HEIGHT = 640, 480  # of the image, pixels
BARS = [Bar("crops", "prompt", 50, at_least=True), Bar("crops", "mean", 8, at_least=True)]


def draw_boxes(count: int) -> list[list[float]]:
    """Boxes in the image, pixels xyxy, with sides from 24 to 240."""
    random = np.random.default_rng(0)
    boxes = []
    for _ in range(count):
        width, height = random.uniform(24, 240, 2)
        x, y = random.uniform(0, WIDTH - width), random.uniform(0, HEIGHT - height)
        boxes.append([x, y, x + width, y + height])
    return boxes


@torch.no_grad()
def encode_crops(predictor: RegionPredictor, image: Image.Image, boxes: list[list[float]], batch_size: int) -> torch.Tensor:
    """Region embeddings (R, E) the plain way."""
    model, embeddings = predictor.model, []
    for first in range(0, len(boxes), batch_size):
        crops = [image.crop([round(value) for value in box]) for box in boxes[first : first + batch_size]]
        pixels = predictor.processor.image_processor(crops)["pixel_values"].to(model.device, model.dtype)
        embeddings.append(normalize(model.encode_image(pixels).feat.float(), dim=-1))
    return torch.cat(embeddings)


def make_variants(
    predictor: RegionPredictor, image: Image.Image, boxes: list[list[float]], batch_size: int
) -> dict[str, Callable[[], torch.Tensor]]:
    """What is timed, by name; those on a set image come right after the one that sets it."""

    def ours(readout: str, with_image: bool) -> torch.Tensor:
        predictor.model.prompter.config.prompter_readout = readout
        if with_image:
            predictor.set_image(image)
        return predictor.embed_boxes(boxes)

    variants = {"crops": lambda: encode_crops(predictor, image, boxes, batch_size)}
    for readout in READOUTS:
        variants[readout] = lambda readout=readout: ours(readout, True)
        variants[f"{readout}, image set"] = lambda readout=readout: ours(readout, False)
    return variants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="b16", help="the model (default b16, at 224 px)")
    parser.add_argument("--boxes", type=int, default=100, help="boxes of the image (default 100; the bars are for that)")
    parser.add_argument("--crop_batch", type=int, default=20, help="crops that the tower runs on at a time (default 20)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, in which the variants take turns (default 3)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    model = ClocModel(PRESETS[arguments.preset]()).to(device, torch.bfloat16 if arguments.precision == "bf16" else torch.float32)
    predictor = RegionPredictor(model, ClocProcessor(ClocImageProcessor(model.config.vision_config.image_size)))
    pixels = np.random.default_rng(1).integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    image, boxes = Image.fromarray(pixels).resize((WIDTH, HEIGHT)), draw_boxes(arguments.boxes)

    for work in make_variants(predictor, image, boxes[:4], arguments.crop_batch).values():
        work()  # libraries are loaded, threads and handles made
    runs = in_turn(make_variants(predictor, image, boxes, arguments.crop_batch), arguments.rounds, device)
    settings = {key: getattr(arguments, key) for key in ("preset", "boxes", "crop_batch", "precision")}
    print(", ".join(f"{key} {value}" for key, value in settings.items()))
    show({**settings, **report_of(runs, BARS, device)}, arguments.out)


if __name__ == "__main__":
    run_main(main)
