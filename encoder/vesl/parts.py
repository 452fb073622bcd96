"""The parts of a labelling run by name: which captioner, rule and detector, and what of them the results depend on."""

from functools import partial
from typing import Any

import torch

from encoder.errors import DataError
from encoder.pretrained import model_kind
from encoder.vesl.captioner import Captioner
from encoder.vesl.cloc_detector import ClocDetector
from encoder.vesl.detector import Detector
from encoder.vesl.phrases import Phrases
from encoder.vesl.stages import KEPT_CAPTIONS, Part

KEEP = "keep"
OWLV2 = "google/owlv2-large-patch14-finetuned"  # the paper's: OWLv2 CLIP L/14 ST+FT
# OpenAI's seven sentences around a name, which OWLv2's labelling averages (arXiv 2306.09683, Section 3.1).
OPENAI7 = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


def captioner_part(path: str, device: str | None = None, cls: type = Captioner, **fields: Any) -> Part:
    """`keep`: the input's own captions; else a model's name or folder, and fields of `from_pretrained`.

    device: None: a GPU where the process has one
    cls: who reads the folder
    """
    if path == KEEP:
        if fields:
            raise DataError(f"the captions are kept as they are; leave {', '.join(fields)} out, or name a captioner")
        return KEPT_CAPTIONS
    return Part(partial(_load, cls, path, device, fields), {"captioner": path} | _plain(fields))


def phrases_part(**fields: Any) -> Part:
    """A rule for phrases; fields of `Phrases`."""
    Phrases(**fields)  # says no to wrong ones now
    return Part(partial(Phrases, **fields), _plain(fields))


def detector_part(path: str, device: str | None = None, **fields: Any) -> Part:
    """A CLOC's folder, or the name or folder of a detector that transformers knows, and fields of its `from_pretrained`."""
    otherwise = f"{path} is no model that can be read ({{reason}}); give a detector's folder or name, or a CLOC"
    # The default is no CLOC, and is asked for at the hub only by a stage that runs it.
    cls = ClocDetector if path != OWLV2 and model_kind(path, otherwise).startswith("cloc") else Detector
    if cls is ClocDetector and (wrong := [name for name in ("image_size", "templates") if name in fields]):
        raise DataError(f"{path} is a CLOC, which has its own input and no templates; leave {' and '.join(wrong)} out")
    if cls is Detector and "proposals" in fields:
        raise DataError(f"{path} is no CLOC and makes its own proposals; leave proposals out")
    return Part(partial(_load, cls, path, device, fields), {"detector": path} | _plain(fields))


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}


def _load(cls, path: str, device: str | None, fields: dict[str, Any]):
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if "dtype" in fields:
        fields = fields | {"dtype": getattr(torch, fields["dtype"])}
    return cls.from_pretrained(path, device=device, **fields)
