"""Puts a benchmark's questions to a model: an MLLM folder (words) or a CLOC encoder folder (its BoxHead).

Both have the same few methods, so a benchmark does not ask which one it has. Boxes are xyxy pixels of the original image.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from encoder.boxes import box_area
from encoder.data.prompts import GROUNDING_QUESTION, REFERRING_QUESTION
from encoder.distributed import rank, world_size
from encoder.errors import DataError
from encoder.model import RegionEncoder
from encoder.pretrained import load_encoder, load_processor, weights_hash
from eval.predictions import Prediction, PredictionLog, Target
from eval.processes import best_device
from mllm.generation import GroundingModel
from mllm.image_input import read_picture
from mllm.likelihood import answer_likelihoods
from mllm.opening import is_stock
from mllm.regions import COORDS
from mllm.settings import SETTINGS_FILE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class MllmAnswerer:
    """An MLLM asked in words; one greedy decode per question.

    protocol: what must be equal in a comparison; record: what tells this model from another
    """

    def __init__(self, folder: Path, device: str, dtype: torch.dtype):
        self.model = GroundingModel.from_pretrained(folder, device, dtype)
        settings = self.model.settings
        refuse_cutting_geometry(folder / SETTINGS_FILE, settings.image.mode)
        vision_size = self.model.model.config.vision_config.image_size
        if settings.image.size != vision_size:
            raise DataError(
                f"{folder}: grounding.json says images of {settings.image.size} px, config.json a tower of {vision_size} px; "
                "write the folder again with scripts/finetune_mllm.py"
            )
        self.protocol = {"codec": settings.codec, "geometry": settings.image.mode, "decoding": "greedy"}
        self.record = {
            "kind": "mllm",
            "weights_sha256": weights_hash(self.model.model),
            "dtype": str(dtype).removeprefix("torch."),
            "image_size": settings.image.size,
            "feature_layer": settings.feature_layer,
        }
        if settings.image.tile_grids:
            self.record["tile_grids"] = [list(grid) for grid in settings.image.tile_grids]
        if settings.regions != COORDS:
            self.record["region_tokens"] = settings.regions

    def ground(self, targets: list[Target], images: list[Image.Image], batch_size: int) -> list[Prediction]:
        """Asks where each target's expression is; one picture per target."""
        prompts = [GROUNDING_QUESTION.format(target.text) for target in targets]
        answers = self.model.generate(images, prompts, batch_size=batch_size, progress=False)
        predictions = []
        for target, prompt, raw in zip(targets, prompts, answers, strict=True):
            size = (target.width, target.height)
            box, reason = self.model.decode_box(raw, size)
            boxes = self.model.decode_boxes(raw, size)
            several = boxes if len(boxes) > 1 else ()
            predictions.append(Prediction(target.id, target.image, prompt, raw, box, reason, boxes=several))
        return predictions

    def name(self, targets: list[Target], images: list[Image.Image], batch_size: int) -> list[Prediction]:
        """Asks what stands in each target's box, or in the region that points at it instead."""
        prompt = REFERRING_QUESTION.format("<region:0>")
        regions = [[target.region or target.box] for target in targets]
        answers = self.model.generate(images, [prompt] * len(targets), regions, batch_size, progress=False)
        return [Prediction(t.id, t.image, prompt, raw) for t, raw in zip(targets, answers, strict=True)]

    def asks(self, question: Callable[[Target], tuple[str, list]], max_new_tokens: int = 32):
        """What answers in words, to be used like `ground`. question: target -> (words, regions that they name)."""

        def answer(targets: list[Target], images: list[Image.Image], batch_size: int) -> list[Prediction]:
            prompts, regions = zip(*map(question, targets), strict=True)
            raw = self.model.generate(images, list(prompts), list(regions), batch_size, max_new_tokens, progress=False)
            return [Prediction(t.id, t.image, prompt, text) for t, prompt, text in zip(targets, prompts, raw, strict=True)]

        return answer

    def chooses(self, question: Callable[[Target], tuple[str, list]]):
        """What compares the likelihoods of a target's choices as answers, to be used like `ground`; nothing is generated."""

        def answer(targets: list[Target], images: list[Image.Image], batch_size: int) -> list[Prediction]:
            rows = [
                (image, *question(target), choice)
                for target, image in zip(targets, images, strict=True)
                for choice in target.choices
            ]
            found = iter(answer_likelihoods(self.model, rows, batch_size))
            predictions = []
            for target in targets:
                likelihoods = tuple(next(found) for _ in target.choices)
                best = target.choices[max(range(len(likelihoods)), key=likelihoods.__getitem__)]
                predictions.append(Prediction(target.id, target.image, question(target)[0], best, likelihoods=likelihoods))
            return predictions

        return answer


class EncoderAnswerer:
    """A CLOC encoder alone: the expression prompts the Prompter, and the BoxHead reads the box from it."""

    def __init__(self, folder: Path, device: str, dtype: torch.dtype):
        self.encoder, self.processor = load_encoder(folder, dtype), load_processor(folder)
        if not isinstance(self.encoder, RegionEncoder):
            raise DataError(f"{folder} is a plain CLIP, which cannot point; give an MLLM folder or a CLOC folder")
        mode = self.processor.image_processor.geometry
        refuse_cutting_geometry(folder, mode)
        if mode != self.encoder.config.geometry:
            raise DataError(
                f"{folder}: the processor's geometry is '{mode}', config.json was trained with '{self.encoder.config.geometry}'; "
                "make processor_config.json say the same"
            )
        self.protocol = {"codec": "box head", "geometry": mode, "decoding": "regression"}
        self.record = {
            "kind": "cloc",
            "weights_sha256": weights_hash(self.encoder),
            "dtype": str(dtype).removeprefix("torch."),
            "image_size": self.processor.image_processor.size,
        }
        self.encoder.to(device)

    @torch.inference_mode()
    def ground(self, targets: list[Target], images: list[Image.Image], batch_size: int) -> list[Prediction]:
        """Prompts with each target's expression; one picture per target, seen once by the tower."""
        predictions = []
        for start in range(0, len(targets), batch_size):
            part = targets[start : start + batch_size]
            pictures = {id(image): image for image in images[start : start + batch_size]}
            place = {key: index for index, key in enumerate(pictures)}
            image_index = torch.tensor([place[id(image)] for image in images[start : start + batch_size]])
            predictions += self._ground(part, list(pictures.values()), image_index)
        return predictions

    def _ground(self, targets: list[Target], images: list[Image.Image], image_index_R: torch.Tensor) -> list[Prediction]:
        encoder = self.encoder
        inputs, geometries = self.processor.images(images)
        tokens_BND = encoder.encode_image(inputs["pixel_values"].to(encoder.device, encoder.dtype)).tokens
        text_feat_RE = encoder.encode_text(**self.processor.texts([target.text for target in targets]).to(encoder.device))
        grounded_RE = encoder.embed_texts(tokens_BND, text_feat_RE, image_index_R.to(encoder.device))
        boxes_R4 = encoder.predict_boxes(grounded_RE).float().cpu()
        predictions = []
        for target, index, box in zip(targets, image_index_R.tolist(), boxes_R4, strict=True):
            raw = ", ".join(f"{value:.4f}" for value in box.tolist())
            box_px = geometries[index].boxes_to_image(box)
            empty = not box_area(box_px) > 0
            answer = (None, "the box has no area inside the picture") if empty else (tuple(box_px.tolist()), None)
            predictions.append(Prediction(target.id, target.image, target.text, raw, *answer))
        return predictions


def load_answerer(folder: Path, device: str | None, dtype: str) -> MllmAnswerer | EncoderAnswerer:
    """The folder's own answerer; an MLLM has `grounding.json` or is a stock LLaVA. DataError for a folder that is neither."""
    if not folder.is_dir():
        raise DataError(f"--model {folder} is not a folder; give that of a finetuned MLLM or of a CLOC encoder")
    kind = MllmAnswerer if (folder / SETTINGS_FILE).exists() or is_stock(folder) else EncoderAnswerer
    return kind(folder, device or best_device(), DTYPES[dtype])


def check_counts(limit: int | None, batch_size: int) -> None:
    """DataError where --limit or --batch-size asks for nothing, which would be a score of other questions or a crash."""
    for flag, value in (("--limit", limit), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise DataError(f"{flag} is {value}; give at least 1")


def refuse_cutting_geometry(where: Path, mode: str) -> None:
    if mode == "center_crop":
        raise DataError(f"{where}: geometry 'center_crop' cuts objects off, boxes cannot be scored; train with 'pad' or 'squash'")


def answer_all(log: PredictionLog, images: Path, answer, batch_size: int, unit: str) -> None:
    """Answers what `log` lacks, a few batches between writes, questions on one picture together; of several processes
    each takes every so many-th picture.

    answer: `ground` or `name` of an answerer; unit: what the progress bar counts
    """
    log.report_resumed()
    by_image: dict[str, list[Target]] = {}
    for target in sorted(log.remaining(), key=lambda target: target.image):
        by_image.setdefault(target.image, []).append(target)
    remaining = [target for name in list(by_image)[rank() :: world_size()] for target in by_image[name]]
    total, step = sum(map(len, by_image.values())), 8 * batch_size
    title = log.name + (f", process 1 of {world_size()}" if world_size() > 1 else "")
    done = len(log.targets) - total if world_size() == 1 else 0
    with tqdm(total=len(remaining) + done, initial=done, unit=unit, desc=title, disable=rank() > 0) as bar:
        for start in range(0, len(remaining), step):
            targets = remaining[start : start + step]
            pictures = {name: read_picture(images / name) for name in {target.image: None for target in targets}}
            log.append(answer(targets, [pictures[target.image] for target in targets], batch_size))
            bar.update(len(targets))
    log.finish()
