"""Any CLIP or CLOC folder as what evaluations need of it: unit embeddings of pictures and of texts; and their flags.

B images, T texts, E joint space, K classes.
"""

import argparse
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from encoder.errors import DataError
from encoder.geometry import MODES
from encoder.pretrained import load_encoder, load_processor, weights_hash
from encoder.processor import ClocProcessor
from eval.answering import best_device, check_counts
from eval.scoring import score_folder, score_line, score_run

TEXTS_AT_ONCE = 256
WHOLE_PICTURE = ("pad", "squash")  # geometries that leave every box in the picture
Item, Read = TypeVar("Item"), TypeVar("Read")


def add_run_flags(parser: argparse.ArgumentParser, limit: str, batch_size: int = 64, geometries: tuple[str, ...] = MODES) -> None:
    """The flags that every evaluation of an encoder has.

    limit: what `--limit` keeps, for the help; geometries: that the evaluation can be asked with
    """
    parser.add_argument("--model", type=Path, help="folder of a CLOC or of any CLIP")
    parser.add_argument("--geometry", choices=geometries, help="instead of the model's own; a stock CLIP gets 'pad'")
    parser.add_argument("--limit", type=int, help=f"only {limit}; the result is marked PARTIAL")
    parser.add_argument("--batch-size", type=int, default=batch_size, help="pictures per batch (default: %(default)s)")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--out", type=Path, required=True, help="run folder; several benchmarks may share one")
    parser.add_argument("--score-only", action="store_true", help="score all answers in --out again, without a model")


def run_evaluation(
    args: argparse.Namespace, needed: tuple[str, ...], evaluate: Callable[[argparse.Namespace], list[Path]]
) -> None:
    """`evaluate(args)`, and a line with the score of each folder that it returns; with --score-only of all below --out.

    needed: flags beside --model that `evaluate` cannot do without
    """
    if args.score_only:
        return score_run(args.out)
    flags = ["model", *needed]
    if any(getattr(args, flag) is None for flag in flags):
        *others, last = (f"--{flag}" for flag in flags)
        raise DataError(f"{', '.join(others)} and {last} are needed, unless --score-only is given")
    check_counts(args.limit, args.batch_size)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise DataError("evaluations of an encoder run in one process; start it with python, without a launcher")
    folders = evaluate(args)
    for folder in folders:
        print(score_line(score_folder(folder)))
    print(f"answers and scores: {folders[0] if len(folders) == 1 else args.out}")


class Embedder:
    """An encoder and its processor on one device, in float32.

    geometry: instead of the processor's own, `pad`, `squash` or `center_crop`; see `encoder.geometry`
    """

    def __init__(self, folder: Path, device: str | None = None, geometry: str | None = None):
        self.model, self.processor = load_encoder(folder), load_processor(folder)
        self.model.to(device or best_device())
        if geometry:
            self.processor.image_processor.geometry = geometry

    def record(self) -> dict[str, Any]:
        """What tells this model from another, for run.json."""
        return {
            "kind": self.model.config.model_type,
            "weights_sha256": weights_hash(self.model),
            "geometry": self.processor.image_processor.geometry,
            "image_size": self.processor.image_processor.size,
        }

    @torch.inference_mode()
    def embed_images(self, images: list[Image.Image]) -> Tensor:
        """Whole pictures -> (B, E), L2-normalised."""
        pixels = self.processor.images(images)[0]["pixel_values"].to(self.model.device)
        return F.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)

    def embed_texts(self, texts: list[str]) -> Tensor:
        """Texts -> (T, E), L2-normalised."""
        return embed_texts(self.model, self.processor, texts, progress=True)


@torch.inference_mode()
def embed_texts(model: PreTrainedModel, processor: ClocProcessor, texts: list[str], progress: bool = False) -> Tensor:
    """Texts -> (T, E), L2-normalised; with a bar where there are many."""
    parts = []
    starts = range(0, len(texts), TEXTS_AT_ONCE)
    for start in tqdm(starts, desc="texts", unit="batch", disable=not progress or len(starts) < 4):
        inputs = processor.texts(texts[start : start + TEXTS_AT_ONCE]).to(model.device)
        parts.append(F.normalize(model.get_text_features(**inputs).pooler_output, dim=-1))
    return torch.cat(parts)


def name_classifier(model: PreTrainedModel, processor: ClocProcessor, names: list[str], templates: tuple[str, ...]) -> Tensor:
    """Text embeddings (K, E) of the names: L2-normalised mean over templates of the L2-normalised embeddings."""
    total = 0
    for template in tqdm(templates, desc="class names", unit="template", disable=len(templates) < 4):
        total = total + embed_texts(model, processor, [template.replace("{}", name) for name in names])
    return F.normalize(total, dim=-1)


def read_ahead(batches: Iterable[list[Item]], read: Callable[[Item], Read], threads: int = 4) -> Iterator[tuple[list, list]]:
    """Yields (batch, what `read` gives for each of its items), reading the next batch while the caller is at work."""
    waiting = None
    with ThreadPoolExecutor(threads) as pool:
        for batch in batches:
            futures = [pool.submit(read, item) for item in batch]
            if waiting is not None:
                yield waiting[0], [future.result() for future in waiting[1]]
            waiting = batch, futures
        if waiting is not None:
            yield waiting[0], [future.result() for future in waiting[1]]
