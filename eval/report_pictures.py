"""Pictures of the report: one question, the true box and the two answers drawn on it, as JPEG bytes."""

from pathlib import Path

from PIL import ImageDraw

from encoder.drawing import as_jpeg, draw_box, shown
from encoder.errors import DataError
from eval.comparison import Example
from eval.predictions import Evaluation
from eval.report_plots import RUN_COLOURS, TRUTH_COLOUR
from mllm.image_input import read_picture

LONG_SIDE = 400  # pixels of a picture in the report: sharp on a phone


def image_folder(evaluation: Evaluation, override: Path | None) -> Path:
    """Where the pictures of an evaluation are: `override`, else the folder it was run with."""
    recorded = evaluation.run["launches"][-1].get("images")
    if override is None and recorded is None:
        raise DataError(f"{evaluation.folder}/run.json does not say where the pictures are; pass --images, or --examples 0")
    return override or Path(recorded)


def draw_example(example: Example, folder: Path, colours: tuple[str, str] = RUN_COLOURS[:2]) -> bytes:
    """The picture with the true box in dashed green and, where boxes were asked for, both answers in `colours`."""
    target = example.evaluation.targets[example.index]
    path = folder / target.image
    if not path.exists():
        raise DataError(f"{path} is not there; pass the folder of the pictures as --images, or --examples 0")
    picture = read_picture(path)
    picture, scale = shown(picture, LONG_SIDE)
    draw = ImageDraw.Draw(picture)
    if example.evaluation.protocol["task"] in ("grounding", "phrases"):
        for answer, colour in zip(example.answers, colours, strict=True):
            if answer.box:
                draw_box(draw, [scale * value for value in answer.box], colour, dash=None)
    draw_box(draw, [scale * value for value in target.box], TRUTH_COLOUR, dash=12)
    return as_jpeg(picture)
